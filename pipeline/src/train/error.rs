//! Ways training can be wrong.

use potstill_cache::{ErrorClass, Selection};
use std::path::PathBuf;

/// Ways training can be wrong.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Reading or writing a file of the run folder failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// No rows to train on, or two kinds of them.
    #[error("{found}: expected either a cache (--cache) or, for --objective sft, chats (--data)")]
    RowSource {
        /// What is given.
        found: &'static str,
    },
    /// The thread that reads batches ended though more were wanted: a defect, not the cache's fault.
    #[error("{cache}: the thread that reads it ended before the training did", cache = cache.display())]
    ReaderGone {
        /// The cache.
        cache: PathBuf,
    },
    /// A loss that drawn tokens give no unbiased gradient of.
    #[error(
        "{cache}: tokens were drawn ({selection}), which can be trained on with forward KL at temperature 1 alone: found {found}",
        cache = cache.display()
    )]
    Drawn {
        /// The cache.
        cache: PathBuf,
        /// What it keeps.
        selection: Selection,
        /// The loss asked for.
        found: String,
    },
    /// A teacher whose tail the cache does not know well enough at the temperature asked for.
    #[error(
        "{cache}: at temperature {temperature} up to {unknown:.4} of the teacher's probability lies where the cache cannot tell (mean \
         of {positions} positions): expected at most max_unknown_mass = {allowed}; {remedy}",
        cache = cache.display()
    )]
    UnknownMass {
        /// The cache.
        cache: PathBuf,
        /// The temperature at which it knows least.
        temperature: f64,
        /// How much it does not know, mean over the positions looked at.
        unknown: f64,
        /// How many those were.
        positions: u64,
        /// How much may be unknown.
        allowed: f64,
        /// What can be done.
        remedy: String,
    },
    /// A cache to evaluate on whose distributions cannot be read as the run's own.
    #[error(
        "{cache}: the run's cache knows the tail at temperature {expected}: expected the same here, found {found:?}",
        cache = cache.display()
    )]
    OtherTail {
        /// The cache to evaluate on.
        cache: PathBuf,
        /// The loss's temperature.
        expected: f64,
        /// Temperatures it declares.
        found: Vec<f32>,
    },
    /// A cache to evaluate on whose distributions are another teacher's.
    #[error("{cache}: is of another teacher than the run's cache: expected {expected}, found {found}", cache = cache.display())]
    OtherTeacher {
        /// The cache to evaluate on.
        cache: PathBuf,
        /// The run's teacher.
        expected: String,
        /// This cache's.
        found: String,
    },
    /// Held-out rows that say nothing.
    #[error(
        "{cache}: none of the {rows} rows held out has a scored position; hold out more of them (--eval-rows)",
        cache = cache.display()
    )]
    NothingHeldOut {
        /// The cache.
        cache: PathBuf,
        /// Rows held out.
        rows: usize,
    },
    /// A student whose figures are no numbers on any held-out position, or beyond what f32 holds.
    #[error("step {step}: held-out loss {loss}, or a figure beside it: not finite; try a lower --lr")]
    EvaluationNotFinite {
        /// Steps done.
        step: u64,
        /// The held-out loss.
        loss: f32,
    },
    /// Another process trains into this folder.
    #[error("{out}: another process is training into this folder; wait for it or choose another --out", out = out.display())]
    Locked {
        /// The run folder.
        out: PathBuf,
    },
    /// A fresh run into a folder that holds one.
    #[error("{out}: already holds {found}; choose another --out, or --resume latest to continue", out = out.display())]
    Occupied {
        /// The run folder.
        out: PathBuf,
        /// What is in it.
        found: String,
    },
    /// A folder that is no checkpoint.
    #[error("{path}: no checkpoint: {why}", path = path.display())]
    NoCheckpoint {
        /// The folder.
        path: PathBuf,
        /// What is missing.
        why: String,
    },
    /// A checkpoint whose bytes are not what was written.
    #[error("{path}: damaged checkpoint: expected {expected}, found {found}; resume from another one with --resume PATH", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was written.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A checkpoint in a form that this version does not read.
    #[error(
        "{path}: was written by an earlier version of the program, whose checkpoints this one does not read; begin anew with another \
         --out, or finish the run with that version",
        path = path.display()
    )]
    OtherVersion {
        /// The folder.
        path: PathBuf,
    },
    /// A checkpoint of a run with other settings.
    #[error("{checkpoint}: was written by a run with other settings: {differences}; give the same settings, or another --out", checkpoint = checkpoint.display())]
    OtherRun {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// Each setting with both values.
        differences: String,
    },
    /// Too many steps in a row that cannot be taken.
    #[error(
        "step {step}: loss {loss}, gradient norm {grad_norm}: not finite, as in the {} steps before it; {}; {rows} names its conversations",
        in_a_row.saturating_sub(1),
        if *taken > 0 { "try a lower --lr" } else { "nothing was changed yet, so it is the student's weights that give this" },
        rows = rows.display()
    )]
    NotFinite {
        /// The step, counted from 1.
        step: u64,
        /// Such steps in a row, this one included.
        in_a_row: u64,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
        /// Steps of the run that were taken.
        taken: u64,
        /// The file about it.
        rows: PathBuf,
    },
    /// A state that must not become a checkpoint.
    #[error("step {step}: {name} holds a value that is not finite, so no checkpoint was written; try a lower --lr")]
    NotFiniteState {
        /// Steps done.
        step: u64,
        /// The tensor.
        name: String,
    },
    /// A student whose tokenizer has ids that it has no embedding for.
    #[error(
        "{student}: its vocabulary is too small for its tokenizer: expected at least {expected} ids, found {found}",
        student = student.display()
    )]
    OwnTokenizer {
        /// The student's folder.
        student: PathBuf,
        /// Ids of its tokenizer.
        expected: u32,
        /// Rows of its embedding.
        found: usize,
    },
}

impl TrainError {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        match self {
            TrainError::Damaged { .. } => ErrorClass::Integrity,
            TrainError::Locked { .. } => ErrorClass::Locked,
            TrainError::OtherRun { .. }
            | TrainError::OtherVersion { .. }
            | TrainError::OwnTokenizer { .. }
            | TrainError::OtherTail { .. }
            | TrainError::OtherTeacher { .. } => ErrorClass::Mismatch,
            TrainError::RowSource { .. }
            | TrainError::Occupied { .. }
            | TrainError::Drawn { .. }
            | TrainError::UnknownMass { .. } => ErrorClass::Usage,
            _ => ErrorClass::Runtime,
        }
    }
}
