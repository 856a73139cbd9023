//! STAGE ONE: chats → tokens → teacher → cache. The loop a newcomer reads first.
//!
//! Owns the order of things; what a token, a distribution or a shard is, is said elsewhere. The one idea: the whole dataset is
//! encoded before the teacher is loaded, so the cache knows from the start what it will hold, a second run proves that what is
//! there are its own first rows, and progress has an end. Packs never cross a shard, so a resumed run repeats the very same
//! products and its bytes are those of a run that was never stopped.

mod part;
mod repair;

pub use part::Share;

use crate::data::pack::{self, Pack, Sequence};
use crate::data::{self, BadRoles, ChatTokenizer, DataError, DataOptions, Dataset, Example, Truncation};
use crate::model::ModelError;
use crate::model::config::{ModelConfig, Quantization};
use crate::model::weights::Weights;
use crate::run::{RUN_AGAIN, RunContext};
use crate::teacher::Teacher;
use crate::{Error, Result, bounded, device};
use potstill_cache::{
    CacheWriter, Companion, Description, EncodingFingerprint, Manifest, Record, RepairReport, RowKey, Selection,
    TeacherFingerprint, WriterOptions,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

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
    /// The share of the conversations to be scored, where it is not all of them.
    pub part: Option<Share>,
    /// A list of damaged rows, written by a check, that are to be scored again first. No setting of the cache.
    #[serde(skip)]
    pub repair: Option<PathBuf>,
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
            part: None,
            repair: None,
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
    /// What was mended first, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repair: Option<RepairReport>,
}

/// Runs stage one: scores every conversation that the cache does not hold yet.
///
/// A second run with the same settings continues after the last whole shard; of a complete cache it only reports. Errors: bad
/// settings, data, model folder or cache; a stop asked for by `context` (whole shards stay).
pub fn run(config: &PrecomputeConfig, context: &RunContext) -> Result<PrecomputeReport> {
    check(config)?;
    let device = device::pick(&config.device)?;
    let model = ModelConfig::from_folder(&config.teacher)?;
    if config.max_length as usize > model.context {
        let expected = format!("at most the teacher's context of {} tokens", model.context);
        return Err(Error::Setting { name: "max_length", found: config.max_length.to_string(), expected });
    }
    let tokenizer = ChatTokenizer::from_folder(&config.teacher)?;
    let width = tokenizer.tokenizer_fingerprint().size;
    if u32::from(config.top_k) > width {
        let expected = format!("at most the tokenizer's {width} ids");
        return Err(Error::Setting { name: "top_k", found: config.top_k.to_string(), expected });
    }
    let options = DataOptions { max_length: config.max_length, truncation: config.truncate, on_bad_roles: config.on_bad_roles };
    let mut dataset = data::load(&config.data, &tokenizer, &options, context)?;
    let part = part::cut(&mut dataset.examples, config.part, config.rows_per_shard)?;
    let description = Description { part, ..describe(config, &model, &tokenizer, &dataset, context)? };
    let kept = WriterOptions { companions: companions(&config.teacher)? };
    let teacher = || Teacher::from_folder(&config.teacher, width, &device, context);
    let repaired =
        config.repair.as_ref().map(|list| repair::run(config, list, (&description, &kept), &dataset.examples, teacher, context));
    let repair = repaired.transpose()?;
    let mut writer = CacheWriter::open(&config.cache, &description, kept)?;
    let resumed_rows = writer.committed_rows();
    check_committed(&writer, &dataset.examples, &config.cache)?;

    let mut report = PrecomputeReport { resumed_rows, repair, ..PrecomputeReport::default() };
    let remaining = &dataset.examples[resumed_rows as usize..];
    if !remaining.is_empty() {
        let teacher = teacher()?;
        let tokens = remaining.iter().map(|e| e.input_ids.len() as u64).sum();
        let started = Instant::now();
        context.progress.begin("scoring", "tokens", tokens);
        for shard in remaining.chunks(config.rows_per_shard as usize) {
            for range in pack::plan(shard.iter().map(|e| e.input_ids.len()), config.pack_tokens as usize) {
                if context.stopping() {
                    let kept = format!("{} of {} rows are durable", writer.committed_rows(), dataset.examples.len());
                    return Err(Error::Interrupted { kept, again: RUN_AGAIN });
                }
                let examples = &shard[range];
                let records = score(&teacher, examples, config).map_err(|source| Error::Scoring {
                    first: examples.first().map_or(0, |e| e.seq_id),
                    last: examples.last().map_or(0, |e| e.seq_id),
                    source: Box::new(source),
                })?;
                for record in records {
                    writer.append(&record)?;
                }
                let tokens: usize = examples.iter().map(|e| e.input_ids.len()).sum();
                context.progress.add(tokens as u64);
                context.progress.note(format!("row {} of {}", writer.rows(), dataset.examples.len()));
            }
        }
        context.progress.end();
        (report.seconds, report.scored_tokens) = (started.elapsed().as_secs_f64(), tokens);
    }
    let manifest = writer.finish()?;
    Ok(fill(report, &manifest, dataset))
}

/// One pack's records.
fn score(teacher: &Teacher, examples: &[Example], config: &PrecomputeConfig) -> Result<Vec<Record>> {
    let positions: Vec<Vec<u32>> = examples.iter().map(Example::positions).collect();
    let pack = Pack::new(examples.iter().zip(&positions).map(|(e, positions)| Sequence { input_ids: &e.input_ids, positions }));
    let targets = teacher.score(&pack, usize::from(config.top_k), config.head_chunk as usize)?;
    let records = examples.iter().zip(positions).enumerate().map(|(i, (example, positions))| Record {
        seq_id: example.seq_id,
        input_ids: example.input_ids.clone(),
        positions,
        targets: targets.slice(pack.scored_of(i)),
        codec: Default::default(),
    });
    Ok(records.collect())
}

fn check(config: &PrecomputeConfig) -> Result<()> {
    let at_least = |name, value: u32, least: u32| match value >= least {
        true => Ok(()),
        false => Err(Error::Setting { name, found: value.to_string(), expected: format!("at least {least}") }),
    };
    at_least("top_k", config.top_k.into(), 1)?;
    at_least("max_length", config.max_length, 2)?;
    at_least("pack_tokens", config.pack_tokens, 1)?;
    at_least("head_chunk", config.head_chunk, 1)?;
    at_least("rows_per_shard", config.rows_per_shard, 1)
}

/// Everything that decides the cache's bytes.
fn describe(
    config: &PrecomputeConfig,
    model: &ModelConfig,
    tokenizer: &ChatTokenizer,
    dataset: &Dataset,
    context: &RunContext,
) -> Result<Description> {
    let template = tokenizer.template_fingerprint().cloned();
    Ok(Description {
        teacher: teacher_fingerprint(&config.teacher, model, tokenizer.tokenizer_fingerprint().size, context)?,
        tokenizer: tokenizer.tokenizer_fingerprint().clone(),
        template: template.ok_or_else(|| DataError::NoTemplate { folder: config.teacher.clone(), found: "none".into() })?,
        data: dataset.fingerprint.clone(),
        encoding: EncodingFingerprint {
            max_length: config.max_length,
            truncation: match config.truncate {
                Truncation::Turns => "turns".into(),
                Truncation::Right => "right".into(),
            },
            truncated_tokens: dataset.truncated_tokens,
        },
        selection: Selection::TopK { k: config.top_k },
        mantissa_bits: config.mantissa_bits,
        values: Default::default(),
        lse_temperatures: Vec::new(),
        zstd_level: config.zstd_level,
        id_encoding: Default::default(),
        rows_per_shard: config.rows_per_shard,
        vocab_size: tokenizer.tokenizer_fingerprint().size,
        expected_rows: dataset.examples.len() as u64,
        part: None,
        derived: Vec::new(),
    })
}

fn teacher_fingerprint(folder: &Path, model: &ModelConfig, width: u32, context: &RunContext) -> Result<TeacherFingerprint> {
    let weights = Weights::open(folder)?;
    // A folder that cannot be loaded must not leave a cache behind that was made from it.
    Teacher::check_folder(folder, model, &weights, width)?;
    let name = folder.canonicalize().ok().and_then(|p| p.file_name().map(|n| n.to_string_lossy().into_owned()));
    let dense =
        weights.info("model.embed_tokens.weight").map_or("unknown".into(), |info| format!("{:?}", info.dtype).to_lowercase());
    Ok(TeacherFingerprint {
        name: name.unwrap_or_else(|| folder.display().to_string()),
        config_blake3: ModelConfig::fingerprint(folder)?,
        weights_blake3: weights.fingerprint(context)?,
        weights: match model.quantization {
            Quantization::Awq { .. } => "awq-int4".into(),
            Quantization::None => dense,
        },
        compute: "float32".into(),
    })
}

/// The tokenizer travels with the cache, so that an inspector can show tokens as text.
fn companions(folder: &Path) -> Result<Vec<Companion>> {
    let file = folder.join("tokenizer.json");
    let bytes = bounded::read(&file, data::MAX_TOKENIZER_BYTES).map_err(|source| ModelError::Io { path: file, source })?;
    Ok(vec![Companion { path: "tokenizer/tokenizer.json".into(), bytes }])
}

/// Proves that the rows already in the cache are this run's first rows.
fn check_committed(writer: &CacheWriter, examples: &[Example], cache: &Path) -> Result<()> {
    for (row, (key, example)) in writer.committed_keys()?.into_iter().zip(examples).enumerate() {
        let ours = RowKey::of(&example.input_ids, &example.positions());
        if key != ours {
            let (expected, found) = (ours.to_string(), key.to_string());
            return Err(Error::OtherRow { cache: cache.to_path_buf(), row, expected, found });
        }
    }
    Ok(())
}

fn fill(report: PrecomputeReport, manifest: &Manifest, dataset: Dataset) -> PrecomputeReport {
    PrecomputeReport {
        rows: manifest.rows(),
        tokens: manifest.tokens(),
        scored: manifest.scored(),
        bytes: manifest.bytes(),
        skipped: dataset.fingerprint.skipped,
        first_skipped: dataset.first_skipped,
        truncated_tokens: dataset.truncated_tokens,
        ..report
    }
}
