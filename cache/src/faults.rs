//! Faults on order, for the crate's own tests: the n-th call to the system on this thread fails, once or from then on. It knows
//! nothing of files; `durable.rs` asks it at every call. The sweep at the end has every call of a run fail in every way.

use std::cell::Cell;
use std::io::{self, Error};

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing is done and an I/O error reported.
    Eio,
    /// Nothing is done; no space is left.
    Full,
    /// A write takes half of its bytes and the next finds no space; any other call is done.
    HalfThenFull,
    /// A write takes half of its bytes, which is no error; any other call is done.
    Half,
    /// A signal comes before anything is done; a write is to be tried again, and the next try gets through.
    Interrupted,
    /// All is done, and an I/O error reported all the same.
    Late,
}

impl Fault {
    pub(crate) const ALL: [Fault; 6] =
        [Fault::Eio, Fault::Full, Fault::HalfThenFull, Fault::Half, Fault::Interrupted, Fault::Late];
}

/// How often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lasting {
    Once,
    FromThenOn,
}

#[derive(Debug, Clone, Copy)]
struct Order {
    at: u64,
    fault: Fault,
    lasting: Lasting,
}

thread_local! {
    static ORDER: Cell<Option<Order>> = const { Cell::new(None) };
    static CALLS: Cell<u64> = const { Cell::new(0) };
    static INTERRUPTED: Cell<bool> = const { Cell::new(false) };
    static FULL_NEXT: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` with call `at` (from 1) failing. Gives what it gave and how many calls it made.
pub(crate) fn with<T>(at: u64, fault: Fault, lasting: Lasting, work: impl FnOnce() -> T) -> (T, u64) {
    FULL_NEXT.set(false);
    INTERRUPTED.set(false);
    CALLS.set(0);
    ORDER.set(Some(Order { at, fault, lasting }));
    let result = work();
    ORDER.set(None);
    (result, CALLS.get())
}

/// The fault of the call that is made now, if it is to fail.
fn next() -> Option<Fault> {
    let order = ORDER.get()?;
    let number = CALLS.get() + 1;
    CALLS.set(number);
    let due = match order.lasting {
        Lasting::Once => number == order.at,
        Lasting::FromThenOn => number >= order.at,
    };
    due.then_some(order.fault)
}

fn eio() -> Error {
    Error::from_raw_os_error(5)
}

fn full() -> Error {
    Error::from_raw_os_error(28)
}

/// A call that is no write.
pub(crate) fn call<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    match next() {
        Some(Fault::Eio) => Err(eio()),
        Some(Fault::Full) => Err(full()),
        Some(Fault::Late) => work().and_then(|_| Err(eio())),
        // The standard library tries again where a call can be interrupted.
        Some(Fault::Half | Fault::HalfThenFull | Fault::Interrupted) | None => work(),
    }
}

/// A write.
pub(crate) fn write(bytes: &[u8], work: impl FnOnce(&[u8]) -> io::Result<usize>) -> io::Result<usize> {
    let fault = next();
    if FULL_NEXT.take() {
        return Err(full());
    }
    let half = &bytes[..bytes.len().div_ceil(2)];
    match fault {
        Some(Fault::Eio) => Err(eio()),
        Some(Fault::Full) => Err(full()),
        Some(Fault::Late) => work(bytes).and_then(|_| Err(eio())),
        Some(Fault::Interrupted) if !INTERRUPTED.replace(true) => Err(io::ErrorKind::Interrupted.into()),
        Some(Fault::Interrupted) => {
            INTERRUPTED.set(false);
            work(bytes)
        }
        Some(Fault::Half) => work(half),
        Some(Fault::HalfThenFull) => {
            FULL_NEXT.set(true);
            work(half)
        }
        None => work(bytes),
    }
}

#[cfg(test)]
#[path = "faults_tests.rs"]
mod tests;
