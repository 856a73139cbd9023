//! What a cache was made from: teacher, tokenizer, template, data and settings; compared field by field.

use crate::error::Difference;
use crate::preset::LOGIT_MANTISSA_BITS;
use crate::{Error, IdEncoding, Result, Selection, Storage, Values};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Largest vocabulary: ids have 24 bits.
pub const MAX_VOCAB_SIZE: u32 = 1 << 24;
/// Most temperatures that a cache may declare.
pub const MAX_LSE_TEMPERATURES: usize = 8;
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
    /// What the stored numbers of kept entries are.
    #[serde(default, skip_serializing_if = "is_default")]
    pub values: Values,
    /// Temperatures T at which ln Σ p^(1/T) is kept, rising, none of them 1.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lse_temperatures: Vec<f32>,
    /// zstd level of the pages (1 to 22).
    pub zstd_level: i32,
    /// How ids are laid out in a page.
    #[serde(default, skip_serializing_if = "is_default")]
    pub id_encoding: IdEncoding,
    /// Rows in a shard; the last one may hold fewer.
    pub rows_per_shard: u32,
    /// Width of the distributions: ids are below this.
    pub vocab_size: u32,
    /// Rows the finished cache will hold.
    pub expected_rows: u64,
    /// Which share of the data's conversations this is, where it is not all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Part>,
    /// What was done to a stored cache to make this one, oldest first; empty for what a teacher wrote.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub derived: Vec<Derivation>,
}

/// One of several shares of the same data, scored apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Which one, from 1.
    pub number: u32,
    /// Of how many.
    pub of: u32,
}

impl Part {
    /// The rows of the whole that this part holds, where the whole has `rows` of them: a contiguous share, cut at borders of
    /// shards, so that the parts' shards are the whole's shards. Nothing where there are fewer shards than parts before it.
    pub fn rows(&self, rows: u64, rows_per_shard: u32) -> std::ops::Range<u64> {
        let per_shard = u64::from(rows_per_shard.max(1));
        let shards = u128::from(rows.div_ceil(per_shard));
        let border = |number: u32| {
            let shard = shards * u128::from(number) / u128::from(self.of.max(1));
            (u64::try_from(shard).unwrap_or(u64::MAX)).saturating_mul(per_shard).min(rows)
        };
        border(self.number.saturating_sub(1))..border(self.number)
    }
}

/// One rewriting of stored rows. What a rewriting took away cannot come back; this is where it is said.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Derivation {
    /// The verb: `repack` or `combine`.
    pub verb: String,
    /// `description_blake3` of each cache that rows were taken from.
    pub from: Vec<String>,
    /// What they kept.
    pub selection: Selection,
    /// What the numbers of their kept entries were.
    #[serde(default, skip_serializing_if = "is_default")]
    pub values: Values,
    /// Mantissa bits they kept.
    pub mantissa_bits: u8,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
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
        self.selection.check(self.vocab_size)?;
        self.check_values()?;
        // What was done before widens what a reader allows as rounding; nothing out of range may.
        for derivation in &self.derived {
            derivation.selection.check(self.vocab_size).map_err(|(_, expected, found)| ("derived", expected, found))?;
            if !(1..=23).contains(&derivation.mantissa_bits) {
                return Err(("derived", "1 to 23 mantissa bits".into(), derivation.mantissa_bits.to_string()));
            }
        }
        let ranges = [
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

impl Description {
    /// How the rows are stored.
    pub fn storage(&self) -> Storage {
        let (selection, values, mantissa_bits) = (self.selection, self.values, self.mantissa_bits);
        Storage { selection, values, mantissa_bits, zstd_level: self.zstd_level, id_encoding: self.id_encoding }
    }

    /// The same cache, stored as `storage` says.
    pub fn stored_as(self, storage: &Storage) -> Self {
        let Storage { selection, values, mantissa_bits, zstd_level, id_encoding } = *storage;
        Self { selection, values, mantissa_bits, zstd_level, id_encoding, ..self }
    }

    fn check_values(&self) -> std::result::Result<(), (&'static str, String, String)> {
        if self.values == Values::LogitBf16 && (self.selection.draws().is_some() || self.mantissa_bits != LOGIT_MANTISSA_BITS) {
            let expected = format!("logprob, or exact entries only and {LOGIT_MANTISSA_BITS} mantissa bits");
            return Err(("values", expected, format!("logit-bf16, {} and {} bits", self.selection, self.mantissa_bits)));
        }
        let rising = self.lse_temperatures.windows(2).all(|pair| pair[0] < pair[1]);
        let allowed = |t: &f32| *t > 0.0 && t.is_finite() && *t != 1.0;
        if !rising || !self.lse_temperatures.iter().all(allowed) || self.lse_temperatures.len() > MAX_LSE_TEMPERATURES {
            let expected = format!("at most {MAX_LSE_TEMPERATURES} rising temperatures above 0, none of them 1");
            return Err(("lse_temperatures", expected, format!("{:?}", self.lse_temperatures)));
        }
        match self.part {
            Some(Part { number, of }) if number == 0 || number > of => {
                Err(("part", "a number from 1 to the count".into(), format!("{number} of {of}")))
            }
            _ => Ok(()),
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
    // By way of text, so that 32-bit numbers show their shortest digits.
    serde_json::from_str(&text_of(value)).unwrap_or(Value::Null)
}

fn text_of<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

fn digest_of<T: Serialize>(value: &T) -> String {
    blake3::hash(text_of(value).as_bytes()).to_hex().to_string()
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

#[cfg(test)]
pub(crate) fn tests_description(selection: Selection, values: Values) -> Description {
    let none = String::new;
    Description {
        teacher: TeacherFingerprint {
            name: "by hand".into(),
            config_blake3: none(),
            weights_blake3: none(),
            weights: "float32".into(),
            compute: "float32".into(),
        },
        tokenizer: TokenizerFingerprint { vocabulary_blake3: none(), blake3: none(), size: 10 },
        template: TemplateFingerprint { source: none(), blake3: none() },
        data: DataFingerprint { files: Vec::new(), rows: 2, skipped: Default::default() },
        encoding: EncodingFingerprint { max_length: 1024, truncation: "turns".into(), truncated_tokens: 0 },
        selection,
        mantissa_bits: 7,
        values,
        lse_temperatures: Vec::new(),
        zstd_level: 3,
        id_encoding: IdEncoding::default(),
        rows_per_shard: 1024,
        vocab_size: 10,
        expected_rows: 2,
        part: None,
        derived: Vec::new(),
    }
}
