//! PEFT adapter folders in and out, and the merge of an adapter into a model folder.

use potstill_cache::ErrorClass;

/// Ways an adapter can be wrong.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// Reading or writing a file failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl AdapterError {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        ErrorClass::Runtime
    }
}
