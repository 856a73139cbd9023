//! What a cache says it was made from, found out before the teacher is loaded. Refuses a model folder that could not be loaded.

use super::PrecomputeConfig;
use crate::data::{self, ChatTokenizer, DataError, Dataset, Truncation};
use crate::kernel::Precision;
use crate::model::ModelError;
use crate::model::config::{ModelConfig, Quantization};
use crate::model::weights::Weights;
use crate::run::RunContext;
use crate::teacher::Teacher;
use crate::{Result, bounded};
use potstill_cache::{Companion, Description, EncodingFingerprint, Storage, TeacherFingerprint};
use std::path::Path;

/// Everything that decides the cache's bytes.
pub(super) fn describe(
    config: &PrecomputeConfig,
    storage: &Storage,
    teacher: TeacherFingerprint,
    tokenizer: &ChatTokenizer,
    dataset: &Dataset,
) -> Result<Description> {
    let template = tokenizer.template_fingerprint().cloned();
    Ok(Description {
        teacher,
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
        selection: storage.selection,
        mantissa_bits: storage.mantissa_bits,
        values: storage.values,
        lse_temperatures: config.temperatures(),
        zstd_level: storage.zstd_level,
        id_encoding: storage.id_encoding,
        rows_per_shard: config.rows_per_shard,
        vocab_size: tokenizer.tokenizer_fingerprint().size,
        expected_rows: dataset.examples.len() as u64,
        part: None,
        derived: Vec::new(),
    })
}

/// What the cache says of its teacher; reads all weights. `width` is the number of the tokenizer's ids.
pub(super) fn teacher_fingerprint(
    config: &PrecomputeConfig,
    (model, weights): (&ModelConfig, &Weights),
    width: u32,
    context: &RunContext,
) -> Result<TeacherFingerprint> {
    // A folder that cannot be loaded must not leave a cache behind that was made from it.
    Teacher::check_folder(&config.teacher, model, weights, width)?;
    Ok(TeacherFingerprint { weights_blake3: weights.fingerprint(context)?, ..unread(config, (model, weights))? })
}

/// The same of weights that nobody has read: their digest is missing.
pub(super) fn unread(config: &PrecomputeConfig, (model, weights): (&ModelConfig, &Weights)) -> Result<TeacherFingerprint> {
    let folder = &config.teacher;
    // A snapshot's folder is named after its commit; the model's name is one of the cache's folders above it.
    let last = || folder.canonicalize().ok().and_then(|p| p.file_name().map(|n| n.to_string_lossy().into_owned()));
    let name = crate::hub::name_of(folder).or_else(last);
    let dense =
        weights.info("model.embed_tokens.weight").map_or("unknown".into(), |info| format!("{:?}", info.dtype).to_lowercase());
    Ok(TeacherFingerprint {
        name: name.unwrap_or_else(|| folder.display().to_string()),
        config_blake3: ModelConfig::fingerprint(folder)?,
        weights_blake3: "0".repeat(64),
        weights: match model.quantization {
            Quantization::Awq { .. } => "awq-int4".into(),
            Quantization::None => dense,
        },
        compute: match config.compute {
            Precision::F32 => "float32".into(),
            Precision::Bf16 => "bfloat16".into(),
        },
    })
}

/// The tokenizer travels with the cache, so that an inspector can show tokens as text.
pub(super) fn companions(folder: &Path) -> Result<Vec<Companion>> {
    let file = folder.join("tokenizer.json");
    let bytes = bounded::read(&file, data::MAX_TOKENIZER_BYTES).map_err(|source| ModelError::Io { path: file, source })?;
    Ok(vec![Companion { path: "tokenizer/tokenizer.json".into(), bytes }])
}
