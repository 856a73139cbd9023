//! A decoder of the Qwen2 / Llama family, read from a Hugging Face folder.

pub mod weights;

use potstill_cache::ErrorClass;

/// Ways a model folder can be wrong.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Reading or writing a file failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl ModelError {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        ErrorClass::Runtime
    }
}
