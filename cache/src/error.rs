//! Every way a cache can be wrong, with both sides of each disagreement, and the class that decides an exit code.

use std::path::PathBuf;

/// What kind of failure an error is; the command line turns it into an exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// Something failed while running (I/O, malformed input): exit 1.
    Runtime,
    /// The request itself cannot be carried out as written: exit 2.
    Usage,
    /// Stored bytes are not what was written: exit 4.
    Integrity,
    /// Another process holds the lock: exit 5.
    Locked,
    /// Teacher, tokenizer, template, data or settings differ: exit 6.
    Mismatch,
    /// Stopped by a signal after durable progress: exit 75.
    Interrupted,
}

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of the cache.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing a file failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        match self {
            Error::Io { .. } => ErrorClass::Runtime,
        }
    }
}
