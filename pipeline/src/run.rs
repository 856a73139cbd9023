//! What a long job shares with whoever started it: counters to draw progress from, and a flag that asks it to stop.
//!
//! The job only writes counters; drawing is the command line's business. No callbacks.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// How an interrupted run goes on by default.
pub const RUN_AGAIN: &str = "run the same command again to continue";

/// The job's side of progress and interruption. Clones share the same counters.
#[derive(Debug, Clone, Default)]
pub struct RunContext {
    /// Counters of the phase under way.
    pub progress: Arc<Progress>,
    /// Set from outside to ask for a durable stop.
    pub stop: Arc<AtomicBool>,
    /// Set by the job itself, on word from elsewhere. Another flag than `stop`, at which a second signal ends the process.
    halt: Arc<AtomicBool>,
    /// Sentences that a person should read, whatever becomes of the job; taken by whoever shows them.
    warnings: Arc<Mutex<Vec<String>>>,
}

impl RunContext {
    /// Whether a stop was asked for.
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.halt.load(Ordering::Relaxed)
    }

    /// Asks for a stop from within the job.
    pub(crate) fn halt(&self) {
        self.halt.store(true, Ordering::Relaxed);
    }

    /// Leaves a sentence for a person.
    pub fn warn(&self, sentence: impl Into<String>) {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).push(sentence.into());
    }

    /// The sentences left since the last time.
    pub fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut *self.warnings.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A snapshot of the phase under way.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Phase {
    /// What is being done, e.g. `scoring`. Empty when nothing is.
    pub name: String,
    /// What is counted, e.g. `tokens`.
    pub unit: &'static str,
    /// How many in all; 0 when unknown.
    pub total: u64,
    /// A short remark beside the bar, e.g. `loss 1.234`.
    pub note: String,
    /// Counts phases; a change means a new phase began.
    pub serial: u64,
}

/// Progress of the phase under way.
#[derive(Debug, Default)]
pub struct Progress {
    phase: Mutex<Phase>,
    done: AtomicU64,
}

impl Progress {
    /// Starts a phase; the counter goes back to 0.
    pub fn begin(&self, name: &str, unit: &'static str, total: u64) {
        self.begin_at(name, unit, total, 0);
    }

    /// Starts a phase of which `done` was done before.
    pub fn begin_at(&self, name: &str, unit: &'static str, total: u64, done: u64) {
        let mut phase = self.lock();
        *phase = Phase { name: name.to_string(), unit, total, note: String::new(), serial: phase.serial + 1 };
        self.done.store(done, Ordering::Relaxed);
    }

    /// Counts `n` more.
    pub fn add(&self, n: u64) {
        self.done.fetch_add(n, Ordering::Relaxed);
    }

    /// Sets the remark.
    pub fn note(&self, note: impl Into<String>) {
        self.lock().note = note.into();
    }

    /// Ends the phase.
    pub fn end(&self) {
        let mut phase = self.lock();
        *phase = Phase { serial: phase.serial + 1, ..Phase::default() };
        self.done.store(0, Ordering::Relaxed);
    }

    /// The phase and how far it is.
    pub fn snapshot(&self) -> (Phase, u64) {
        // Read under the lock, so that a new phase is never seen with the old one's count.
        let phase = self.lock();
        (phase.clone(), self.done.load(Ordering::Relaxed))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
