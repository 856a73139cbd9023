//! Ways an evaluation can be wrong.

use potstill_cache::ErrorClass;
use std::path::PathBuf;

/// Ways an evaluation can be wrong.
#[derive(Debug, thiserror::Error)]
pub enum EvaluateError {
    /// Rows that say nothing.
    #[error("{cache}: none of the {rows} rows looked at has a scored position; look at more of them (--rows)", cache = cache.display())]
    NothingScored {
        /// The cache.
        cache: PathBuf,
        /// Rows looked at.
        rows: usize,
    },
    /// A student whose figures are no numbers.
    #[error("{student}: at all {positions} positions a figure is not finite: the model's weights give no numbers", student = student.display())]
    NotFinite {
        /// The model.
        student: PathBuf,
        /// Positions looked at.
        positions: u64,
    },
    /// Reading or writing a file failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A row of questions that is none.
    #[error("{path}: row {row}: expected {expected}, found {found}", path = path.display())]
    Question {
        /// The file.
        path: PathBuf,
        /// The row, counted from 1.
        row: usize,
        /// What can be asked.
        expected: String,
        /// What is there.
        found: String,
    },
    /// Stop tokens that cannot be read.
    #[error("{path}: eos_token_id: expected a token id or a list of them, found {found}", path = path.display())]
    StopIds {
        /// The file.
        path: PathBuf,
        /// What is there.
        found: String,
    },
    /// An answers file of somebody else.
    #[error("{out}: is there already, without the journal of the run that made it; choose another --out", out = out.display())]
    Occupied {
        /// The answers file.
        out: PathBuf,
    },
    /// Answers that were given with other settings.
    #[error("{path}: holds answers given with other settings: {differences}; give the same settings, or another --out", path = path.display())]
    OtherAnswers {
        /// The journal.
        path: PathBuf,
        /// Each setting with both values.
        differences: String,
    },
    /// A journal that another process writes.
    #[error("{path}: another process is answering into this file; wait for it or choose another --out", path = path.display())]
    Locked {
        /// The journal.
        path: PathBuf,
    },
    /// A line of a journal that no run wrote.
    #[error("{path}: line {line}: expected an answer, found none: {why}; remove the file to begin anew", path = path.display())]
    Journal {
        /// The journal.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What the parser said.
        why: String,
    },
    /// A model that gives no numbers.
    #[error("answer {number}, token {token}: a logit is not finite: the model's weights give no numbers")]
    Logits {
        /// Which of the run's answers, counted from 0.
        number: usize,
        /// Which token of it, counted from 0.
        token: usize,
    },
}

impl EvaluateError {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        match self {
            EvaluateError::Question { .. } | EvaluateError::Occupied { .. } => ErrorClass::Usage,
            EvaluateError::OtherAnswers { .. } => ErrorClass::Mismatch,
            EvaluateError::Locked { .. } => ErrorClass::Locked,
            EvaluateError::Journal { .. } => ErrorClass::Integrity,
            _ => ErrorClass::Runtime,
        }
    }
}
