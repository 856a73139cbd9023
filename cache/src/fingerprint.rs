//! What a cache was made from: teacher, tokenizer, template, data and settings; compared field by field.

use crate::Selection;
use serde::{Deserialize, Serialize};

/// Everything that decides a cache's bytes. Two runs with equal descriptions write equal caches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// The model that scored.
    pub teacher: TeacherFingerprint,
    /// The tokenizer that made the ids.
    pub tokenizer: TokenizerFingerprint,
    /// The chat template that made the text.
    pub template: TemplateFingerprint,
    /// The conversations.
    pub data: DataFingerprint,
    /// How conversations became tokens.
    pub encoding: EncodingFingerprint,
    /// What is kept of each distribution.
    pub selection: Selection,
    /// Mantissa bits kept of each stored log-probability (1 to 23).
    pub mantissa_bits: u8,
    /// zstd level of the pages (1 to 22).
    pub zstd_level: i32,
    /// Rows in a shard; the last one may hold fewer.
    pub rows_per_shard: u32,
    /// Width of the distributions: ids are below this.
    pub vocab_size: u32,
    /// Rows the finished cache will hold.
    pub expected_rows: u64,
}

/// The teacher's identity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TeacherFingerprint {
    /// The model folder's name, for people.
    pub name: String,
    /// BLAKE3 (hex) of `config.json`.
    pub config_blake3: String,
    /// BLAKE3 (hex) over the weight files' names and contents.
    pub weights_blake3: String,
    /// How the weights are stored: `awq-int4`, `bfloat16`, `float16`, `float32`.
    pub weights: String,
    /// Arithmetic of the forward pass: `float32`, `bfloat16`.
    pub compute: String,
}

/// The tokenizer's identity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerFingerprint {
    /// BLAKE3 (hex) over the id → token table, special flags included. Ids mean the same where this is equal.
    pub vocabulary_blake3: String,
    /// BLAKE3 (hex) over the whole normalised tokenizer (merges, normaliser, pre-tokenizer). Text encodes the same where equal.
    pub blake3: String,
    /// Highest id + 1.
    pub size: u32,
}

/// The chat template's identity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateFingerprint {
    /// The file it came from, for people.
    pub source: String,
    /// BLAKE3 (hex) of its text.
    pub blake3: String,
}

/// The data's identity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataFingerprint {
    /// The files in reading order.
    pub files: Vec<DataFile>,
    /// Rows read, skipped ones included.
    pub rows: u64,
    /// Skipped rows by reason.
    pub skipped: std::collections::BTreeMap<String, u64>,
}

/// One data file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataFile {
    /// File name without its folder.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// BLAKE3 (hex) of its bytes.
    pub blake3: String,
}

/// How a conversation became tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncodingFingerprint {
    /// Longest row in tokens.
    pub max_length: u32,
    /// What was done with longer ones: `turns` or `right`.
    pub truncation: String,
    /// Tokens cut away by truncation, over all rows.
    pub truncated_tokens: u64,
}
