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
}

impl EvaluateError {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        ErrorClass::Runtime
    }
}
