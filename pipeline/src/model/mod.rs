//! A decoder of the Qwen2 / Llama family, read from a Hugging Face folder.

pub mod config;
pub mod decoder;
pub mod kv_cache;
pub mod layer;
pub mod stored;
pub(crate) mod turns;
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

    // Config.
    /// A path that is no folder.
    #[error("{folder}: expected a model folder, found {found}", folder = folder.display())]
    NoFolder {
        /// The path.
        folder: std::path::PathBuf,
        /// What is there.
        found: &'static str,
    },
    /// A JSON file that is none.
    #[error("{path}: not valid JSON: {source}", path = path.display())]
    Json {
        /// The file.
        path: std::path::PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// A setting of the model that cannot be used.
    #[error("{path}: {key}: expected {expected}, found {found}", path = path.display())]
    Config {
        /// The file.
        path: std::path::PathBuf,
        /// The setting.
        key: String,
        /// What can be used.
        expected: String,
        /// What the file says.
        found: String,
    },
    /// The tensor library refused.
    #[error("{folder}: {source}", folder = folder.display())]
    Tensor {
        /// The model folder.
        folder: std::path::PathBuf,
        /// What it said.
        source: candle_core::Error,
    },

    // Weights.
    /// A folder without readable weights.
    #[error("{folder}: no weights: {why}", folder = folder.display())]
    WeightsMissing {
        /// The model folder.
        folder: std::path::PathBuf,
        /// What was looked for and what was found.
        why: String,
    },
    /// A weight file that leads out of its folder.
    #[error("{path}: leads out of the model folder, to {leads_to}", path = path.display(), leads_to = leads_to.display())]
    WeightsOutside {
        /// The file as the folder names it.
        path: std::path::PathBuf,
        /// Where it really lies.
        leads_to: std::path::PathBuf,
    },
    /// An index that cannot be believed.
    #[error("{path}: bad index: {why}", path = path.display())]
    WeightsIndex {
        /// The index file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A safetensors header that cannot be believed.
    #[error("{path}: bad safetensors header: {why}", path = path.display())]
    WeightsHeader {
        /// The safetensors file.
        path: std::path::PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// One tensor name in two files.
    #[error("{path}: tensor {name:?} is also in {first}", path = path.display())]
    TensorTwice {
        /// The second file.
        path: std::path::PathBuf,
        /// The tensor.
        name: String,
        /// The first file's name.
        first: String,
    },
    /// A tensor that is not there.
    #[error("{place}: no tensor named {name:?}", place = place.display())]
    TensorMissing {
        /// The folder or file.
        place: std::path::PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor of another dtype or shape than the model needs.
    #[error("{path}: tensor {name:?}: expected {expected}, found {found}", path = path.display())]
    TensorMismatch {
        /// The safetensors file.
        path: std::path::PathBuf,
        /// The tensor.
        name: String,
        /// Dtype and shape that the model needs.
        expected: String,
        /// Dtype and shape in the file.
        found: String,
    },
    /// Several tensors missing or misshapen.
    #[error("{place}: {wrong} of {asked} tensors are missing or misshapen: {list}", place = place.display())]
    TensorsWrong {
        /// The folder or file.
        place: std::path::PathBuf,
        /// How many are wrong.
        wrong: usize,
        /// How many were asked for.
        asked: usize,
        /// The first of them with both shapes.
        list: String,
    },
    /// A tensor that could not be brought to the device.
    #[error("tensor {name:?}: {source}")]
    TensorCopy {
        /// The tensor.
        name: String,
        /// What the tensor library said.
        source: Box<candle_core::Error>,
    },
    /// A signal asked for a stop while weights were hashed or read.
    #[error("{place}: stopped by a signal while reading the model; nothing was written since", place = place.display())]
    Stopped {
        /// The folder or file.
        place: std::path::PathBuf,
    },
}

impl ModelError {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        match self {
            ModelError::Stopped { .. } => ErrorClass::Interrupted,
            _ => ErrorClass::Runtime,
        }
    }
}
