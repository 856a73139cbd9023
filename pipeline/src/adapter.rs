//! Owns PEFT adapter folders, in and out, what puts one on a model, and the merge of an adapter into a plain model folder. Refuses adapters that
//! mean more than y = W x + b + factor · B (A x), because a part left out in silence gives a wrong model.
//!
//! The one idea: inside the program a tensor is named as in the checkpoint (`model.layers.0.self_attn.q_proj.lora_A.weight`);
//! PEFT's prefix `base_model.model.` exists only in the file. Every folder is built beside its place and renamed into it.

mod attach;
mod card;
mod config;
mod folder;
mod merge;
mod merged;
mod module;
mod staging;
mod targets;

pub use attach::FittedAdapter;
pub use card::{LearnedFrom, RUN_FILE, Surroundings};
pub(crate) use config::is_dropout;
pub use config::{AdapterConfig, MAX_RANK, Scaling};
pub(crate) use folder::{CONFIG_NAME, TENSORS_NAME};
pub use folder::{load, save};
pub use merge::{MergeConfig, MergeDtype, MergeFrom, MergeReport, SHARD_BYTES, merge, merge_in_shards};
pub use targets::{ALL_MODULES, MODULES, TargetModules, WrongModules};

use crate::model::ModelError;
use potstill_cache::ErrorClass;
use std::path::PathBuf;

/// Ways an adapter or a merge can be wrong.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// Reading or writing a file failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file that is none.
    #[error("{path}: not valid JSON: {source}", path = path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// A setting that cannot be honoured.
    #[error("{path}: {key}: expected {expected}, found {found}", path = path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// The setting.
        key: &'static str,
        /// What can be honoured.
        expected: String,
        /// What the file says.
        found: String,
    },
    /// A tensor of an unknown name.
    #[error("{path}: tensor {name:?}: expected base_model.model.model.layers.N.MODULE.lora_A.weight or lora_B, MODULE one of {modules}", path = path.display())]
    Name {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The modules that the configuration names.
        modules: String,
    },
    /// One matrix of a pair.
    #[error("{path}: {module} has {found} but no {missing}", path = path.display())]
    Partner {
        /// The file.
        path: PathBuf,
        /// The layer's module.
        module: String,
        /// The matrix that is there.
        found: &'static str,
        /// The matrix that is not.
        missing: &'static str,
    },
    /// A tensor of the wrong shape or dtype.
    #[error("{path}: tensor {name:?}: expected {expected}, found {found}", path = path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Shape and dtype by the configuration.
        expected: String,
        /// Shape and dtype in the file.
        found: String,
    },
    /// An adapter without tensors.
    #[error("{path}: holds no tensor", path = path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The adapter's or the model's weights (boxed: it is the largest).
    #[error(transparent)]
    Weights(Box<ModelError>),
    /// An output folder that is in use.
    #[error("{path}: expected no such folder or an empty one, found {found}", path = path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// What is there.
        found: String,
    },
    /// A merged weight that the type asked for cannot hold.
    #[error("tensor {name:?}: {value} is beyond the range of {dtype}; merge with --dtype bf16 or f32")]
    Range {
        /// The tensor.
        name: String,
        /// The value.
        value: f32,
        /// The type.
        dtype: &'static str,
    },
    /// A folder that holds no adapter.
    #[error("{folder}: expected a PEFT adapter folder, found {found}", folder = folder.display())]
    NoAdapter {
        /// The folder.
        folder: PathBuf,
        /// What is there.
        found: String,
    },
    /// A base weight that NF4 has no code for.
    #[error("tensor {name:?}: holds a value that is not finite, which NF4 cannot; merge with --weights original")]
    NotFinite {
        /// The tensor.
        name: String,
    },
    /// Writing a safetensors file failed.
    #[error("{path}: {source}", path = path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What the writer said.
        source: safetensors::SafeTensorError,
    },
    /// The tensor library refused.
    #[error("tensor {name:?}: {source}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What it said.
        source: Box<candle_core::Error>,
    },
}

impl AdapterError {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        match self {
            AdapterError::Occupied { .. } => ErrorClass::Usage,
            AdapterError::Weights(e) => e.class(),
            _ => ErrorClass::Runtime,
        }
    }
}

impl From<ModelError> for AdapterError {
    fn from(error: ModelError) -> Self {
        AdapterError::Weights(Box::new(error))
    }
}

/// A step of this room.
type Checked<T> = std::result::Result<T, AdapterError>;
