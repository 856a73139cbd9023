//! The pipeline's error: one variant a room, each room naming its own ways to be wrong.

use potstill_cache::ErrorClass;

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of the pipeline.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Chats, template or tokenizer.
    #[error(transparent)]
    Data(#[from] crate::data::DataError),
    /// Model folder: config or weights.
    #[error(transparent)]
    Model(#[from] crate::model::ModelError),
    /// A name that is not on this machine and could not be fetched.
    #[error(transparent)]
    Hub(#[from] crate::hub::HubError),
    /// Adapter folder or merge.
    #[error(transparent)]
    Adapter(#[from] crate::adapter::AdapterError),
    /// Inputs of a loss.
    #[error(transparent)]
    Loss(#[from] crate::loss::LossError),
    /// A cache and a student that do not go together.
    #[error(transparent)]
    Pairing(#[from] crate::pairing::PairingError),
    /// An optimizer's update or state.
    #[error(transparent)]
    Optimizer(#[from] crate::train::optimizer::OptimizerError),
    /// Training settings, checkpoints or a failed step.
    #[error(transparent)]
    Train(#[from] crate::train::TrainError),
    /// Several processes that train together.
    #[error(transparent)]
    Ranks(#[from] crate::train::ranks::RankError),
    /// An evaluation.
    #[error(transparent)]
    Evaluate(#[from] crate::evaluate::EvaluateError),
    /// The miniature models that are made on the spot.
    #[error(transparent)]
    Miniature(#[from] crate::miniature::MiniatureError),
    /// Judges, their endpoints and the files of benchmarks.
    #[error(transparent)]
    Judge(#[from] crate::evaluate::judge::JudgeError),
    /// The cache.
    #[error(transparent)]
    Cache(#[from] potstill_cache::Error),
    /// The tensor library.
    #[error("tensor: {0}")]
    Tensor(#[from] candle_core::Error),
    /// A device that is not here.
    #[error("device {asked:?}: {why}")]
    Device {
        /// What was asked for.
        asked: String,
        /// Why it cannot be had.
        why: String,
    },
    /// A setting out of its range.
    #[error("{name} = {found}: expected {expected}")]
    Setting {
        /// The setting's name.
        name: &'static str,
        /// What was given.
        found: String,
        /// What is allowed.
        expected: String,
    },
    /// A pack that the teacher could not score.
    #[error("conversations {first} to {last} of the data: {source}")]
    Scoring {
        /// Number of the pack's first conversation.
        first: u64,
        /// Number of its last.
        last: u64,
        /// What went wrong.
        source: Box<Error>,
    },
    /// A teacher that fails on more conversations than may be left out.
    #[error(
        "{bad} of {conversations} conversations have a logit that cannot be kept, expected at most {allowed} (--max-bad); {example}"
    )]
    TooManyBad {
        /// How many, those that the cache has left out already included.
        bad: u64,
        /// Conversations of the run.
        conversations: u64,
        /// How many may be.
        allowed: u64,
        /// One of them, with its place.
        example: String,
    },
    /// A cache whose rows are not this run's first rows, although its description is.
    #[error("{cache}: row {row} has key {found}, expected {expected}: it was written from other conversations; use another --cache folder", cache = cache.display())]
    OtherRow {
        /// The cache.
        cache: std::path::PathBuf,
        /// The row.
        row: usize,
        /// This run's key.
        expected: String,
        /// The stored key.
        found: String,
    },
    /// A signal asked for a stop; what is kept is on disk.
    #[error("stopped by a signal; {kept}; {again}")]
    Interrupted {
        /// What is durable.
        kept: String,
        /// How to go on.
        again: &'static str,
    },
}

impl Error {
    /// Of something that nobody could stop, if it was stopped.
    pub(crate) fn stopped() -> Self {
        Self::Interrupted { kept: "nothing was written".into(), again: crate::run::RUN_AGAIN }
    }

    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        match self {
            Error::Data(e) => e.class(),
            Error::Model(e) => e.class(),
            Error::Hub(e) => e.class(),
            Error::Adapter(e) => e.class(),
            Error::Loss(e) => e.class(),
            Error::Pairing(e) => e.class(),
            Error::Optimizer(e) => e.class(),
            Error::Train(e) => e.class(),
            Error::Ranks(e) => e.class(),
            Error::Evaluate(e) => e.class(),
            Error::Miniature(e) => e.class(),
            Error::Judge(e) => e.class(),
            Error::Cache(e) => e.class(),
            Error::Tensor(_) | Error::TooManyBad { .. } => ErrorClass::Runtime,
            Error::Device { .. } | Error::Setting { .. } => ErrorClass::Usage,
            Error::Scoring { source, .. } => source.class(),
            Error::OtherRow { .. } => ErrorClass::Mismatch,
            Error::Interrupted { .. } => ErrorClass::Interrupted,
        }
    }
}
