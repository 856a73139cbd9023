//! Code of other crates that may panic on hostile input, run so that a panic becomes an error.
//!
//! It does not hide panics of our own. The one idea: while guarded code runs, this thread says so, and a panic hook that
//! asks [`guarded`] can stay silent, because the panic is about to be reported as an error in one sentence.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Whether this thread runs guarded code now: a panic here is caught and becomes an error.
pub fn guarded() -> bool {
    DEPTH.with(|depth| depth.get() > 0)
}

/// Runs `work`; a panic becomes the text it carried.
pub(super) fn guard<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    DEPTH.with(|depth| depth.set(depth.get() + 1));
    // Unwind safety: whatever `work` leaves half-changed is dropped by the callers, which turn this into a final error.
    let result = catch_unwind(AssertUnwindSafe(work));
    DEPTH.with(|depth| depth.set(depth.get() - 1));
    result.map_err(|payload| {
        let text = payload.downcast_ref::<&str>().map(|s| s.to_string());
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
        format!("an internal failure of the reading library ({})", text.unwrap_or_else(|| "no reason given".into()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_its_text_and_the_flag_goes_back() {
        assert!(!guarded());
        let seen = guard(guarded);
        assert_eq!(seen, Ok(true));
        let text: Result<(), String> = guard(|| panic!("boom {}", 3));
        assert_eq!(text, Err("an internal failure of the reading library (boom 3)".to_string()));
        assert!(!guarded());
    }
}
