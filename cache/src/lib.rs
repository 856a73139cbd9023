//! A cache of sparse teacher distributions: zstd Parquet shards, a manifest, and readers that check every row.
//!
//! Two types carry the crate: [`CacheWriter`] appends [`Record`]s and publishes immutable shards; [`Cache`] opens a
//! finished or partial cache and reads any row by number. `FORMAT.md` describes the bytes.
#![deny(missing_docs)]

mod alignment;
mod batches;
mod codec;
mod combine;
mod compare;
mod disk;
mod durable;
mod error;
#[cfg(test)]
mod faults;
mod fingerprint;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod guard;
mod layout;
mod manifest;
mod narrow;
mod parts;
#[cfg(test)]
mod power;
mod preset;
mod progress;
mod queue;
mod reader;
mod record;
mod repack;
mod repair;
mod rules;
mod sampler;
mod schema;
mod search;
mod selection;
mod shard;
mod stats;
mod targets;
mod verify;
mod writer;

pub use alignment::Misalignment;
pub use batches::Batches;
pub use codec::{TAIL_FLOOR_LOGPROB, UNSCORED_TAIL_LOGPROB, encode, round_to_mantissa, stored_logprob, stored_tail_logprob};
pub use combine::{Rewritten, Stored, combine};
pub use compare::{Comparison, Divergences, RowPair, Spread};
pub use disk::free_bytes;
pub use error::{Difference, Error, ErrorClass, Result};
pub use fingerprint::{
    DataFile, DataFingerprint, Derivation, Description, EncodingFingerprint, MAX_LSE_TEMPERATURES, MAX_ROWS_PER_SHARD,
    MAX_VOCAB_SIZE, Part, TeacherFingerprint, TemplateFingerprint, TokenizerFingerprint,
};
pub use guard::decoding;
pub use manifest::{CompanionEntry, FORMAT_VERSION, MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest, ShardCodec, ShardEntry};
pub use parts::WorkerFolder;
pub use preset::{
    DEFAULT_DRAWS, DEFAULT_MIN_MASS, DEFAULT_MIN_PROB, DEFAULT_TOP_K, IdEncoding, Knobs, LOGIT_MANTISSA_BITS, Preset,
    SelectionKind, Storage, Values,
};
pub use progress::ScanProgress;
pub use queue::{WriterQueue, Written};
pub use reader::Cache;
pub use record::{CodecError, Record, RowKey};
pub use repack::{Reshape, repack};
pub use repair::{Mended, Mending, Repair, RepairList, RepairReport, Sameness, ShardRepair};
pub use rules::{LOGPROB_EPSILON, MASS_EPSILON, MAX_ROW_ENTRIES, MAX_ROW_TOKENS};
pub use sampler::{Order, Sampler};
pub use search::search;
pub use selection::{Cutoff, MAX_DRAWS, Selection};
pub use shard::sizing::{Extent, SizeEstimate, Sizing};
pub use stats::{
    CalibrationBin, ColumnBytes, Distributions, Drawn, Histogram, Kept, KeptAt, MIN_RANKED_POSITIONS, NEARLY_ALL,
    PositionFigures, RANKED_ROWS, RAW_ENTRY_BYTES, RankBin, RowFigures, Summary,
};
pub use targets::{SoftTargets, Target};
pub use verify::{DamagedRow, MAX_PROBLEMS, ManifestState, Problem, ShardDamage, VerifyMode, VerifyReport, verify, verify_as};
pub use writer::{CacheWriter, Companion, WriterOptions};
