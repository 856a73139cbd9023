//! What a cache was made from: teacher, tokenizer, template, data and settings; compared field by field.

use crate::error::Difference;
use crate::{Error, Result, Selection};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Largest vocabulary: ids have 24 bits.
pub const MAX_VOCAB_SIZE: u32 = 1 << 24;
/// Most rows in a shard.
pub const MAX_ROWS_PER_SHARD: u32 = 1 << 20;

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

impl Description {
    /// Every field in which `here` differs from this one, the cache's, in the order they are written.
    pub fn differences(&self, here: &Description) -> Vec<Difference> {
        let mut found = Vec::new();
        collect("", &value_of(self), &value_of(here), &mut found);
        found
    }

    /// BLAKE3 (hex) of this description as compact JSON.
    pub fn digest(&self) -> String {
        digest_of(self)
    }

    /// Refuses settings out of their ranges.
    pub fn validate(&self) -> Result<()> {
        self.check().map_err(|(name, expected, found)| Error::Setting { name, found, expected })
    }

    /// As [`validate`](Self::validate): name, expected, found.
    pub(crate) fn check(&self) -> std::result::Result<(), (&'static str, String, String)> {
        let k = self.selection.max_entries();
        let ranges = [
            ("selection.k", u64::from(k), 1, u64::from(self.vocab_size.min(u32::from(u16::MAX)))),
            ("mantissa_bits", u64::from(self.mantissa_bits), 1, 23),
            ("rows_per_shard", u64::from(self.rows_per_shard), 1, u64::from(MAX_ROWS_PER_SHARD)),
            ("vocab_size", u64::from(self.vocab_size), 1, u64::from(MAX_VOCAB_SIZE)),
            ("zstd_level", u64::try_from(self.zstd_level).unwrap_or(0), 1, 22),
            ("expected_rows", self.expected_rows, 0, i64::MAX as u64),
        ];
        match ranges.into_iter().find(|(_, value, low, high)| value < low || value > high) {
            Some((name, value, low, high)) => Err((name, format!("{low} to {high}"), value.to_string())),
            None => Ok(()),
        }
    }
}

impl DataFingerprint {
    /// BLAKE3 (hex) of this fingerprint as compact JSON.
    pub fn digest(&self) -> String {
        digest_of(self)
    }
}

/// These types hold only strings, whole numbers and lists of them: turning them into JSON cannot fail.
fn value_of<T: Serialize>(value: &T) -> Value {
    serde_json::to_value(value).unwrap_or(Value::Null)
}

fn digest_of<T: Serialize>(value: &T) -> String {
    blake3::hash(value_of(value).to_string().as_bytes()).to_hex().to_string()
}

fn collect(path: &str, cache: &Value, here: &Value, found: &mut Vec<Difference>) {
    let below = |key: &str| if path.is_empty() { key.to_string() } else { format!("{path}.{key}") };
    match (cache, here) {
        (a, b) if a == b => {}
        (Value::Object(a), Value::Object(b)) => {
            let only_here = b.keys().filter(|key| !a.contains_key(*key));
            for key in a.keys().chain(only_here) {
                collect(&below(key), a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null), found);
            }
        }
        (Value::Array(a), Value::Array(b)) => {
            for i in 0..a.len().max(b.len()) {
                let at = format!("{path}[{i}]");
                collect(&at, a.get(i).unwrap_or(&Value::Null), b.get(i).unwrap_or(&Value::Null), found);
            }
        }
        (a, b) => found.push(Difference { field: path.to_string(), cache: shown(a), here: shown(b) }),
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "nothing".into(),
        value => value.to_string(),
    }
}
