//! Settings of stage one, their defaults, and what they come to.

use super::{Share, Worker};
use crate::data::{BadRoles, Truncation};
use crate::kernel::Precision;
use crate::teacher::Residency;
use crate::{Error, Result};
use potstill_cache::{IdEncoding, Knobs, MAX_LSE_TEMPERATURES, Preset, SelectionKind, Storage, Values};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// Default for [`PrecomputeConfig::max_length`], in tokens.
pub const DEFAULT_MAX_LENGTH: u32 = 1024;
/// Default for [`PrecomputeConfig::pack_tokens`].
pub const DEFAULT_PACK_TOKENS: u32 = 4096;
/// Default for [`PrecomputeConfig::head_chunk`], in positions.
pub const DEFAULT_HEAD_CHUNK: u32 = 256;
/// Default for [`PrecomputeConfig::rows_per_shard`].
pub const DEFAULT_ROWS_PER_SHARD: u32 = 1024;
/// Default for [`PrecomputeConfig::seal_minutes`].
pub const DEFAULT_SEAL_MINUTES: f64 = 10.0;
/// Default for [`PrecomputeConfig::max_bad`].
pub const DEFAULT_MAX_BAD: f64 = 0.001;
/// Highest [`PrecomputeConfig::seal_minutes`]: a year.
pub const MAX_SEAL_MINUTES: f64 = 525_600.0;

/// Settings of stage one. Those from `selection` to `zstd_level` turn a knob of the preset; absent ones leave it as it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PrecomputeConfig {
    /// Teacher's Hugging Face folder.
    pub teacher: PathBuf,
    /// Files, folders or globs of chats.
    pub data: Vec<PathBuf>,
    /// Folder of the cache.
    pub cache: PathBuf,
    /// What is kept of each distribution, and how.
    pub preset: Preset,
    /// The kind of selection.
    pub selection: Option<SelectionKind>,
    /// Most entries kept exactly at each scored position.
    pub top_k: Option<u16>,
    /// Keep entries of at least this probability.
    pub min_prob: Option<f64>,
    /// Keep the fewest entries that make up this mass.
    pub min_mass: Option<f64>,
    /// Draws at each scored position.
    pub draws: Option<u16>,
    /// Seed of the draws.
    pub sample_seed: Option<u64>,
    /// What is stored of kept entries.
    pub values: Option<Values>,
    /// Mantissa bits of a stored log-probability.
    pub mantissa_bits: Option<u8>,
    /// zstd level of the shards.
    pub zstd_level: Option<i32>,
    /// Ids laid out value by value, for every reader of Parquet.
    pub compat: bool,
    /// Temperatures T, rising, at which ln Σ p^(1/T) is kept beside each distribution.
    pub lse_temperatures: Vec<f64>,
    /// Longest row, in tokens.
    pub max_length: u32,
    /// What to do with longer ones.
    pub truncate: Truncation,
    /// What to do with a conversation whose roles cannot be trained on.
    pub on_bad_roles: BadRoles,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// What the factors of the teacher's products are rounded to.
    pub compute: Precision,
    /// Where the teacher's weights are between two uses; absent: wherever there is room.
    pub residency: Option<Residency>,
    /// Tokens that go through a layer at once. A matter of memory and speed alone: a conversation sees only itself, and no sum
    /// depends on what else is computed beside it, so the cache's bytes do not depend on this.
    pub pack_tokens: u32,
    /// Most tokens that go through the layers together, when weights are streamed: each layer is read once a block. Absent: as the
    /// memory at hand allows, and no more than are scored in `seal_minutes`. No matter of the cache's bytes either.
    pub block_tokens: Option<u32>,
    /// Scored positions whose logits exist at once; like `pack_tokens` no matter of the cache's bytes.
    pub head_chunk: u32,
    /// Rows in a shard.
    pub rows_per_shard: u32,
    /// The share of the conversations to be scored, where it is not all of them.
    pub part: Option<Share>,
    /// The worker that this process is, where several share the conversations: it scores its share into a folder of its own in `cache`.
    pub worker: Option<Worker>,
    /// A list of damaged rows, written by a check, that are to be scored again first. No setting of the cache.
    #[serde(skip)]
    pub repair: Option<PathBuf>,
    /// Minutes after which rows of a shard under way are made durable; 0 makes them so after every pack. The finished cache's bytes
    /// do not depend on it.
    pub seal_minutes: f64,
    /// The share of the run's conversations that may be left out because the teacher gives a logit for them that is not finite; 0
    /// stops at the first. No setting of the cache.
    pub max_bad: f64,
}

impl Default for PrecomputeConfig {
    fn default() -> Self {
        Self {
            teacher: PathBuf::new(),
            data: Vec::new(),
            cache: PathBuf::new(),
            preset: Preset::default(),
            selection: None,
            top_k: None,
            min_prob: None,
            min_mass: None,
            draws: None,
            sample_seed: None,
            values: None,
            mantissa_bits: None,
            zstd_level: None,
            compat: false,
            lse_temperatures: Vec::new(),
            max_length: DEFAULT_MAX_LENGTH,
            truncate: Truncation::default(),
            on_bad_roles: BadRoles::default(),
            device: "auto".into(),
            compute: Precision::F32,
            residency: None,
            pack_tokens: DEFAULT_PACK_TOKENS,
            block_tokens: None,
            head_chunk: DEFAULT_HEAD_CHUNK,
            rows_per_shard: DEFAULT_ROWS_PER_SHARD,
            part: None,
            worker: None,
            repair: None,
            seal_minutes: DEFAULT_SEAL_MINUTES,
            max_bad: DEFAULT_MAX_BAD,
        }
    }
}

impl PrecomputeConfig {
    /// How rows are stored: the preset with its knobs turned. Errors: a setting out of its range, or one that says nothing about the
    /// selection it comes to.
    pub fn storage(&self) -> Result<Storage> {
        self.check()?;
        let knobs = Knobs {
            selection: self.selection,
            top_k: self.top_k,
            min_prob: self.min_prob.map(|p| p as f32),
            min_mass: self.min_mass.map(|mass| mass as f32),
            draws: self.draws,
            sample_seed: self.sample_seed,
            values: self.values,
            mantissa_bits: self.mantissa_bits,
            zstd_level: self.zstd_level,
            id_encoding: self.compat.then_some(IdEncoding::Plain),
        };
        Ok(self.preset.with(&knobs)?)
    }

    /// How long rows of a shard under way may stay undurable.
    pub fn seal_interval(&self) -> Duration {
        Duration::try_from_secs_f64(self.seal_minutes.clamp(0.0, MAX_SEAL_MINUTES) * 60.0).unwrap_or_default()
    }

    /// The temperatures as the cache declares them.
    pub fn temperatures(&self) -> Vec<f32> {
        self.lse_temperatures.iter().map(|t| *t as f32).collect()
    }

    fn check(&self) -> Result<()> {
        let refuse = |name, found: String, expected: String| Err(Error::Setting { name, found, expected });
        let least = [
            ("top_k", self.top_k.map(u32::from), 1),
            ("draws", self.draws.map(u32::from), 1),
            ("max_length", Some(self.max_length), 2),
            ("pack_tokens", Some(self.pack_tokens), 1),
            ("block_tokens", self.block_tokens, 1),
            ("head_chunk", Some(self.head_chunk), 1),
            ("rows_per_shard", Some(self.rows_per_shard), 1),
        ];
        for (name, value, least) in least {
            if let Some(value) = value.filter(|value| *value < least) {
                return refuse(name, value.to_string(), format!("at least {least}"));
            }
        }
        for (name, value) in [("min_prob", self.min_prob), ("min_mass", self.min_mass)] {
            // As the cache keeps them: numbers next to 0 and 1 become 0 and 1 there.
            if let Some(value) = value.filter(|value| !(*value as f32 > 0.0 && (*value as f32) < 1.0)) {
                return refuse(name, value.to_string(), "a number above 0 and below 1".into());
            }
        }
        if !(0.0..=MAX_SEAL_MINUTES).contains(&self.seal_minutes) {
            return refuse("seal_minutes", self.seal_minutes.to_string(), format!("0 to {MAX_SEAL_MINUTES} minutes"));
        }
        if !(0.0..1.0).contains(&self.max_bad) {
            return refuse("max_bad", self.max_bad.to_string(), "a share from 0 to below 1".into());
        }
        let temperatures = self.temperatures();
        let rising = temperatures.windows(2).all(|pair| pair[0] < pair[1]);
        let allowed = |t: &f32| *t > 0.0 && t.is_finite() && *t != 1.0;
        if !rising || !temperatures.iter().all(allowed) || temperatures.len() > MAX_LSE_TEMPERATURES {
            let expected = format!("at most {MAX_LSE_TEMPERATURES} rising temperatures above 0, none of them 1");
            return refuse("lse_temperatures", format!("{temperatures:?}"), expected);
        }
        Ok(())
    }
}
