//! STAGE ONE: chats → tokens → teacher → cache. The loop a newcomer reads first.

use crate::data::{BadRoles, Truncation};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Default for [`PrecomputeConfig::top_k`].
pub const DEFAULT_TOP_K: u16 = 64;
/// Default for [`PrecomputeConfig::max_length`], in tokens.
pub const DEFAULT_MAX_LENGTH: u32 = 1024;
/// Default for [`PrecomputeConfig::pack_tokens`].
pub const DEFAULT_PACK_TOKENS: u32 = 4096;
/// Default for [`PrecomputeConfig::head_chunk`], in positions.
pub const DEFAULT_HEAD_CHUNK: u32 = 256;
/// Default for [`PrecomputeConfig::rows_per_shard`].
pub const DEFAULT_ROWS_PER_SHARD: u32 = 1024;
/// Default for [`PrecomputeConfig::mantissa_bits`] (preset `standard`).
pub const DEFAULT_MANTISSA_BITS: u8 = 7;
/// Default for [`PrecomputeConfig::zstd_level`] (preset `standard`).
pub const DEFAULT_ZSTD_LEVEL: i32 = 3;

/// Settings of stage one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrecomputeConfig {
    /// Teacher's Hugging Face folder.
    pub teacher: PathBuf,
    /// Files, folders or globs of chats.
    pub data: Vec<PathBuf>,
    /// Folder of the cache.
    pub cache: PathBuf,
    /// Entries kept at each scored position.
    pub top_k: u16,
    /// Longest row, in tokens.
    pub max_length: u32,
    /// What to do with longer ones.
    pub truncate: Truncation,
    /// What to do with a conversation whose roles cannot be trained on.
    pub on_bad_roles: BadRoles,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// Tokens that go through the model at once.
    pub pack_tokens: u32,
    /// Scored positions whose logits exist at once.
    pub head_chunk: u32,
    /// Rows in a shard.
    pub rows_per_shard: u32,
    /// Mantissa bits of a stored log-probability.
    pub mantissa_bits: u8,
    /// zstd level of the shards.
    pub zstd_level: i32,
}

impl Default for PrecomputeConfig {
    fn default() -> Self {
        Self {
            teacher: PathBuf::new(),
            data: Vec::new(),
            cache: PathBuf::new(),
            top_k: DEFAULT_TOP_K,
            max_length: DEFAULT_MAX_LENGTH,
            truncate: Truncation::default(),
            on_bad_roles: BadRoles::default(),
            device: "auto".into(),
            pack_tokens: DEFAULT_PACK_TOKENS,
            head_chunk: DEFAULT_HEAD_CHUNK,
            rows_per_shard: DEFAULT_ROWS_PER_SHARD,
            mantissa_bits: DEFAULT_MANTISSA_BITS,
            zstd_level: DEFAULT_ZSTD_LEVEL,
        }
    }
}

/// What stage one did.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct PrecomputeReport {
    /// Rows in the cache now.
    pub rows: u64,
    /// Rows that were there before this run.
    pub resumed_rows: u64,
    /// Tokens in the cache.
    pub tokens: u64,
    /// Scored positions in the cache.
    pub scored: u64,
    /// Bytes of all shards.
    pub bytes: u64,
    /// Skipped conversations by reason.
    pub skipped: BTreeMap<String, u64>,
    /// The first skipped conversation of each reason: `file:line`.
    pub first_skipped: BTreeMap<String, String>,
    /// Tokens cut away by truncation.
    pub truncated_tokens: u64,
    /// Seconds spent scoring in this run.
    pub seconds: f64,
    /// Tokens that went through the teacher in this run.
    pub scored_tokens: u64,
}
