//! A fence around the Parquet decoder: on hostile bytes it may panic, and a panic becomes an ordinary error here.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Whether this thread is decoding stored bytes behind the fence. A panic hook that asks this can stay silent: the panic is
/// caught and reported as damage.
pub fn decoding() -> bool {
    DEPTH.try_with(|depth| depth.get() > 0).unwrap_or(false)
}

/// Runs `decode`; a panic inside gives its message.
pub(crate) fn fenced<T>(decode: impl FnOnce() -> T) -> Result<T, String> {
    DEPTH.with(|depth| depth.set(depth.get() + 1));
    // What `decode` touches is either owned by it or only read, so nothing half-changed can be seen afterwards.
    let result = catch_unwind(AssertUnwindSafe(decode));
    DEPTH.with(|depth| depth.set(depth.get() - 1));
    result.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(ToString::to_string).or_else(|| panic.downcast_ref::<String>().cloned());
        text.unwrap_or_else(|| "a panic of the Parquet decoder".into())
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_panic_becomes_its_message_and_the_fence_is_lifted() {
        assert!(!decoding());
        assert_eq!(fenced(decoding), Ok(true));
        let caught = fenced(|| -> u32 { std::panic::resume_unwind(Box::new("index 7 out of range")) });
        assert_eq!(caught, Err("index 7 out of range".into()));
        assert!(!decoding());
    }
}
