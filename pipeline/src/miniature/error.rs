//! Ways making a miniature can fail.

use potstill_cache::ErrorClass;
use std::path::PathBuf;

/// Ways making a miniature can fail.
#[derive(Debug, thiserror::Error)]
pub enum MiniatureError {
    /// Creating a folder or writing a file failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A document could not be written as JSON.
    #[error("{what}: {source}")]
    Json {
        /// The document.
        what: &'static str,
        /// What serde said.
        source: serde_json::Error,
    },
    /// A safetensors file could not be laid out.
    #[error("{path}: {source}", path = path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What the library said.
        source: safetensors::SafeTensorError,
    },
    /// The tokenizer could not be trained or used.
    #[error("tokenizer: {what}: {source}")]
    Tokenizer {
        /// What was being done.
        what: &'static str,
        /// What the library said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A tensor that the decoder needs is not there.
    #[error("tensor {name} is missing; expected shape {expected:?}")]
    Missing {
        /// The tensor's name.
        name: String,
        /// The shape it should have.
        expected: Vec<usize>,
    },
    /// Numbers whose count or shape does not fit.
    #[error("{what}: expected {expected:?}, found {found:?}")]
    Shape {
        /// What has the wrong shape.
        what: String,
        /// The shape it should have.
        expected: Vec<usize>,
        /// The shape it has.
        found: Vec<usize>,
    },
    /// A weight that int4 with an f16 scale cannot hold.
    #[error("weight of output {output}, inputs {first}..{last}: {found} cannot be scaled in f16")]
    Unscalable {
        /// Output row.
        output: usize,
        /// First input of the group.
        first: usize,
        /// One past the last input of the group.
        last: usize,
        /// The number at fault.
        found: f32,
    },
    /// A code outside 0..=15.
    #[error("code {index} is {found}: expected 0 to 15")]
    Code {
        /// Place in the list of codes.
        index: usize,
        /// The code.
        found: u8,
    },
    /// The loss stopped being a number.
    #[error("training the {model} diverged: the loss at step {step} is {loss}")]
    Diverged {
        /// `teacher` or `student`.
        model: String,
        /// 1-based step.
        step: u64,
        /// What the loss was.
        loss: f32,
    },
}

impl MiniatureError {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        ErrorClass::Runtime
    }
}
