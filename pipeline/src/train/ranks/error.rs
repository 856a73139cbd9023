//! Ways that ranks can fail to train together.

use potstill_cache::ErrorClass;

/// Ways that ranks can fail to train together.
#[derive(Debug, thiserror::Error)]
pub enum RankError {
    /// Rank 0 cannot listen where the others look for it.
    #[error("rank 0 cannot listen at {address} (MASTER_ADDR and MASTER_PORT): {source}")]
    Listen {
        /// Host and port.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Rank 0 does not answer.
    #[error("rank 0 was not reached at {address} (MASTER_ADDR and MASTER_PORT) within {seconds} s: {why}")]
    Unreachable {
        /// Host and port.
        address: String,
        /// How long it was tried.
        seconds: u64,
        /// What the system said last.
        why: String,
    },
    /// Something else answers where rank 0 should.
    #[error("{address} (MASTER_ADDR and MASTER_PORT) is no rank 0 of potstill: {why}")]
    Stranger {
        /// Host and port.
        address: String,
        /// What it did.
        why: String,
    },
    /// Ranks that never came.
    #[error("of {of} ranks (WORLD_SIZE) rank {missing} did not come within {seconds} s")]
    Missing {
        /// How many ranks there should be.
        of: u32,
        /// Those that did not come.
        missing: String,
        /// How long they were waited for.
        seconds: u64,
    },
    /// A rank that belongs to another run.
    #[error("rank {rank} does not belong to this run: {differences}; give all ranks the same command, program and cache")]
    Other {
        /// The rank.
        rank: u32,
        /// Each difference with both values.
        differences: String,
    },
    /// A rank whose adapter has other bits than rank 0's.
    #[error(
        "rank {rank} has another adapter than rank 0 after step {step}, though both did the same: their machines compute differently; \
         use machines of one kind"
    )]
    Diverged {
        /// The rank.
        rank: u32,
        /// Steps done.
        step: u64,
    },
    /// A rank that has ended without a word, or cannot be heard.
    #[error("rank {rank} is gone: {why}; what it said last tells more; run all ranks again to continue from the last checkpoint")]
    Gone {
        /// The rank.
        rank: u32,
        /// What is known.
        why: String,
    },
    /// Gradients that cannot cross the way that was asked for.
    #[error("dist_backend = nccl: {why}; --dist-backend tcp does without NCCL")]
    NoNccl {
        /// What is missing.
        why: String,
    },
    /// An exchange between GPUs that failed, and not because a rank did.
    #[error("NCCL could not {what}: {why}; --dist-backend tcp does without NCCL")]
    Nccl {
        /// What it was to do.
        what: &'static str,
        /// What it said.
        why: String,
    },
    /// A rank that has ended and said why.
    #[error("rank {rank} ended, and all with it: {sentence}")]
    Ended {
        /// The rank.
        rank: u32,
        /// Its error.
        sentence: String,
        /// Its error's class.
        class: ErrorClass,
    },
}

impl RankError {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        match self {
            RankError::Other { .. } => ErrorClass::Mismatch,
            RankError::NoNccl { .. } => ErrorClass::Usage,
            RankError::Ended { class, .. } => *class,
            _ => ErrorClass::Runtime,
        }
    }
}
