//! A cache of sparse teacher distributions: zstd Parquet shards, a manifest, and readers that check every row.
//!
//! Two types carry the crate: [`CacheWriter`] appends [`Record`]s and publishes immutable shards; [`Cache`] opens a
//! finished or partial cache and reads any row by number. `FORMAT.md` describes the bytes.
#![deny(missing_docs)]

mod codec;
mod durable;
mod error;
mod fingerprint;
mod guard;
mod manifest;
mod progress;
mod reader;
mod record;
mod rules;
mod sampler;
mod schema;
mod shard;
mod stats;
mod targets;
mod verify;
mod writer;

pub use codec::{TAIL_FLOOR_LOGPROB, UNSCORED_TAIL_LOGPROB, encode, round_to_mantissa, stored_logprob, stored_tail_logprob};
pub use error::{Difference, Error, ErrorClass, Result};
pub use fingerprint::{
    DataFile, DataFingerprint, Description, EncodingFingerprint, MAX_ROWS_PER_SHARD, MAX_VOCAB_SIZE, TeacherFingerprint,
    TemplateFingerprint, TokenizerFingerprint,
};
pub use guard::decoding;
pub use manifest::{CompanionEntry, FORMAT_VERSION, MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest, ShardEntry};
pub use progress::ScanProgress;
pub use reader::Cache;
pub use record::{Record, RowKey};
pub use rules::{LOGPROB_EPSILON, MASS_EPSILON, MAX_ROW_ENTRIES, MAX_ROW_TOKENS};
pub use sampler::{Order, Sampler};
pub use stats::{ColumnBytes, Distributions, RAW_ENTRY_BYTES, Summary};
pub use targets::{Selection, SoftTargets, Target};
pub use verify::{MAX_PROBLEMS, Problem, VerifyReport, verify};
pub use writer::{CacheWriter, Companion, WriterOptions};
