//! Chats → conversations → examples. Pure CPU; no tensor type.

pub mod pack;

use potstill_cache::ErrorClass;
use serde::{Deserialize, Serialize};

/// What happens to a conversation longer than the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Truncation {
    /// Whole trailing turns are dropped; when not even the first exchange fits, it is cut on the right.
    #[default]
    Turns,
    /// Tokens beyond the limit are cut on the right.
    Right,
}

/// What happens to a conversation with roles that cannot be trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum BadRoles {
    /// It is skipped and counted.
    #[default]
    Skip,
    /// The run stops with an error naming the place.
    Error,
}

/// One tokenised conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Number of the conversation in the data (0-based, skipped rows counted).
    pub seq_id: u64,
    /// Tokens of the whole rendered text.
    pub input_ids: Vec<u32>,
    /// For each token, whether it carries a character of an assistant message or of the end marker after it.
    pub scored: Vec<bool>,
}

/// Ways data can be wrong.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// Reading or writing a file failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl DataError {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        ErrorClass::Runtime
    }
}
