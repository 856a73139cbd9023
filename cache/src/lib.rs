//! A cache of sparse teacher distributions: zstd Parquet shards, a manifest, and readers that check every row.
//!
//! Two types carry the crate: `CacheWriter` appends [`Record`]s and publishes immutable shards; `Cache` opens a
//! finished or partial cache and reads any row by number. `FORMAT.md` describes the bytes.
#![deny(missing_docs)]

mod error;
mod fingerprint;
mod record;
mod targets;

pub use error::{Error, ErrorClass, Result};
pub use fingerprint::{
    DataFile, DataFingerprint, Description, EncodingFingerprint, TeacherFingerprint, TemplateFingerprint, TokenizerFingerprint,
};
pub use record::{Record, RowKey};
pub use targets::{Selection, SoftTargets, Target};
