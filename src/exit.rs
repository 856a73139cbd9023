//! How a run ends: what became of it, as one sentence on stderr and one exit code.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | something failed while running |
//! | 2 | the request or a setting is wrong |
//! | 3 | finished, some conversations were skipped |
//! | 4 | stored bytes are not what was written |
//! | 5 | another process holds the lock |
//! | 6 | teacher, tokenizer, template, data or settings differ |
//! | 75 | stopped by a signal with durable progress: run the same command again |

use crate::text;
use potstill_cache::ErrorClass;
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

/// What a verb that did not fail has to say about its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All of it was done.
    Done,
    /// Finished, but some conversations were skipped.
    Skipped,
    /// A check found stored bytes that are not what was written.
    Corrupt,
}

/// A request that cannot be carried out as written (exit 2).
#[derive(Debug)]
pub struct UsageError(pub String);

impl std::fmt::Display for UsageError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// The last panic's sentence; printed only when the panic reaches `main`, since bytes from outside are also decoded
/// under `catch_unwind`, where a panic is an ordinary error.
static LAST_PANIC: Mutex<Option<String>> = Mutex::new(None);

/// Makes panics silent until they reach `main`. With `RUST_BACKTRACE` set they are also printed where they happen.
pub fn record_panics() {
    let chatty = std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0");
    let default_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let payload = info.payload();
        let what = payload.downcast_ref::<&str>().map(|s| s.to_string()).or_else(|| payload.downcast_ref::<String>().cloned());
        let place = info.location().map_or_else(|| "an unknown place".into(), ToString::to_string);
        let sentence = format!("{} (at {place})", what.unwrap_or_else(|| "a panic without a message".into()));
        *LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = Some(sentence);
        if chatty && !potstill_cache::decoding() && !potstill_pipeline::data::guarded() {
            default_hook(info);
        }
    }));
}

/// Turns SIGHUP (a terminal that went away), SIGINT, SIGTERM and SIGUSR1 (the word of a cluster engine that time is nearly up) into a
/// request for a durable stop; a second one ends the process at once.
///
/// Only long jobs ask for this: everything else should simply end.
pub fn stop_on_signals(stop: &Arc<AtomicBool>) -> anyhow::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
    for signal in [SIGHUP, SIGINT, SIGTERM, SIGUSR1] {
        // The order matters: on the first signal the flag is still down, so only the second one exits.
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(stop))?;
        signal_hook::flag::register(signal, Arc::clone(stop))?;
    }
    Ok(())
}

/// Prints what went wrong, if anything did, and picks the exit code.
pub fn conclude(ended: std::thread::Result<anyhow::Result<Outcome>>) -> ExitCode {
    match ended {
        Ok(Ok(Outcome::Done)) => ExitCode::SUCCESS,
        Ok(Ok(Outcome::Skipped)) => ExitCode::from(3),
        Ok(Ok(Outcome::Corrupt)) => ExitCode::from(4),
        Ok(Err(error)) if reader_went_away(&error) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            say(&format!("error: {}", sentence(&error)));
            ExitCode::from(code(&error))
        }
        Err(_) => {
            let what = LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner).take();
            let what = text::visible(&what.unwrap_or_else(|| "a panic without a message".into()));
            say(&format!("error: a defect in potstill: {what}; please report it together with the command"));
            ExitCode::from(1)
        }
    }
}

/// The last words. Where nobody can hear them, the exit code still tells.
fn say(words: &str) {
    let _ = writeln!(std::io::stderr(), "{words}");
}

/// The chain of causes as one sentence; a cause that its parent already quotes is not said twice.
fn sentence(error: &anyhow::Error) -> String {
    let mut said = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if said.is_empty() {
            said = cause;
        } else if !said.contains(&cause) {
            said = format!("{said}: {cause}");
        }
    }
    text::visible(&said)
}

/// The exit code of a failure: the class of the first error in the chain that has one.
fn code(error: &anyhow::Error) -> u8 {
    let class = error.chain().find_map(|cause| {
        let pipeline = cause.downcast_ref::<potstill_pipeline::Error>().map(potstill_pipeline::Error::class);
        let cache = cause.downcast_ref::<potstill_cache::Error>().map(potstill_cache::Error::class);
        pipeline.or(cache).or(cause.is::<UsageError>().then_some(ErrorClass::Usage))
    });
    match class.unwrap_or(ErrorClass::Runtime) {
        ErrorClass::Runtime => 1,
        ErrorClass::Usage => 2,
        ErrorClass::Integrity => 4,
        ErrorClass::Locked => 5,
        ErrorClass::Mismatch => 6,
        ErrorClass::Interrupted => 75,
    }
}

/// Whether printing failed because nobody reads any more (`potstill inspect … | head`): that is no failure of ours.
fn reader_went_away(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref::<std::io::Error>()).any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn each_class_has_its_code() {
        let stopped = potstill_pipeline::Error::Interrupted { kept: "3 shards are on disk".into(), again: "go on" };
        let device = potstill_pipeline::Error::Device { asked: "x".into(), why: "y".into() };
        assert_eq!(code(&anyhow::Error::new(stopped)), 75);
        assert_eq!(code(&anyhow::Error::new(device).context("while starting")), 2);
        assert_eq!(code(&anyhow::Error::new(UsageError("no".into()))), 2);
        assert_eq!(code(&anyhow::anyhow!("no class")), 1);
    }

    #[test]
    fn causes_are_joined_and_not_repeated() {
        let inner = std::io::Error::other("disk on fire");
        let error = anyhow::Error::new(inner).context("a.bin: disk on fire").context("writing\u{1b}[31m");
        assert_eq!(sentence(&error), "writing\\u{1b}[31m: a.bin: disk on fire");
    }
}
