//! Owns the merge: W + factor · B A for every adapted layer, everything else copied, written as a plain model folder.
//! Refuses a quantised base and an output folder in use.

use super::merged::{Delta, Linear, Merged, Shared, is_float};
use super::module::{self, Matrix};
use super::staging::{Staging, refuse_occupied};
use super::{AdapterConfig, AdapterError, Checked, load};
use crate::model::ModelError;
use crate::model::config::MAX_CONFIG_BYTES;
use crate::model::weights::Weights;
use crate::run::RunContext;
use crate::{Error, Result};
use candle_core::Tensor;
use safetensors::{Dtype, View};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Most tensor bytes in one file of a merged model; a larger model is cut into several, with an index.
pub const SHARD_BYTES: u64 = 5 << 30;

/// Which weights the adapter is added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum MergeFrom {
    /// The base model's own.
    #[default]
    Original,
    /// Those that training saw: every linear layer through NF4 and back.
    Nf4,
}

/// The type of the merged weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum MergeDtype {
    /// Each tensor's own in the base model.
    #[default]
    Auto,
    /// 32 bits: nothing is rounded.
    F32,
    /// bfloat16.
    Bf16,
    /// float16.
    F16,
}

/// Settings of a merge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct MergeConfig {
    /// Base model's Hugging Face folder (dense).
    pub student: PathBuf,
    /// Adapter's folder (PEFT).
    pub adapter: PathBuf,
    /// Folder of the merged model: absent or empty.
    pub out: PathBuf,
    /// Which weights the adapter is added to.
    pub weights: MergeFrom,
    /// The type of the merged weights.
    pub dtype: MergeDtype,
}

/// What a merge did.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct MergeReport {
    /// The merged model's folder.
    pub out: PathBuf,
    /// Linear layers that the adapter was added to.
    pub adapted: u64,
    /// Tensors written.
    pub tensors: u64,
    /// Bytes of all weight files.
    pub bytes: u64,
    /// Weight files written.
    pub files: u64,
}

/// Merges an adapter into its base model and writes a plain model folder that appears by rename.
///
/// W + factor · B A is computed in f32 and rounded once, some rows after the others; one tensor is in memory at a time, in the type it
/// is written in, and of the base's file no more than that. Counts bytes in a phase of
/// `context.progress`. Errors: settings, base or adapter that cannot be read or do not fit each other, an output folder in use,
/// a weight beyond f16, a stop (nothing is left behind then).
pub fn merge(config: &MergeConfig, context: &RunContext) -> Result<MergeReport> {
    merge_in_shards(config, SHARD_BYTES, context)
}

/// [`merge`] with at most `shard_bytes` tensor bytes in a file (a larger tensor gets a file of its own).
pub fn merge_in_shards(config: &MergeConfig, shard_bytes: u64, context: &RunContext) -> Result<MergeReport> {
    refuse_occupied(&config.out)?;
    let model_config = model_config(config)?;
    let (adapter, matrices) = load(&config.adapter)?;
    let base = Weights::open(&config.student)?;
    let shared = Shared { base: &base, from: config.weights, context, failure: Mutex::new(None), lent: Mutex::new(None) };
    let tensors = plan(&shared, &adapter, &matrices, config)?;

    let staging = Staging::beside(&config.out)?;
    staging.write("config.json", &format!("{model_config:#}\n"))?;
    let bytes: u64 = tensors.iter().map(|t| t.data_len() as u64).sum();
    context.progress.begin("merging", "bytes", bytes);
    let shards = shards(&tensors, shard_bytes);
    let names = file_names(shards.len());
    let mut written = 0;
    for (name, shard) in names.iter().zip(&shards) {
        written += write_shard(&staging, name, shard, &shared)?;
    }
    if names.len() > 1 {
        staging.write("model.safetensors.index.json", &index(&names, &shards, bytes))?;
    }
    staging.copy_companions(&config.student)?;
    staging.publish()?;
    context.progress.end();
    let adapted = (matrices.len() / 2) as u64;
    Ok(MergeReport { out: config.out.clone(), adapted, tensors: tensors.len() as u64, bytes: written, files: names.len() as u64 })
}

/// The merged model's `config.json`: the base's, with the type that was asked for.
fn model_config(config: &MergeConfig) -> Checked<Value> {
    let path = config.student.join("config.json");
    let io = |source| AdapterError::Io { path: path.clone(), source };
    let wrong = |key, expected: &str, found: String| {
        Err(AdapterError::Config { path: path.clone(), key, expected: expected.into(), found })
    };
    let text = crate::bounded::read(&path, MAX_CONFIG_BYTES).map_err(io)?;
    let mut keys: Map<String, Value> =
        serde_json::from_slice(&text).map_err(|source| AdapterError::Json { path: path.clone(), source })?;
    if keys.get("quantization_config").is_some_and(|q| !q.is_null()) {
        return wrong("quantization_config", "none (an adapter is merged into dense weights)", "one".into());
    }
    keys.shift_remove("quantization_config");
    let name = match config.dtype {
        MergeDtype::Auto => return Ok(Value::Object(keys)),
        MergeDtype::F32 => "float32",
        MergeDtype::Bf16 => "bfloat16",
        MergeDtype::F16 => "float16",
    };
    let mut named = false;
    for key in ["torch_dtype", "dtype"] {
        if let Some(value) = keys.get_mut(key) {
            *value = json!(name);
            named = true;
        }
    }
    if !named {
        keys.insert("torch_dtype".into(), json!(name));
    }
    Ok(Value::Object(keys))
}

/// Every tensor of the merged model, sorted by name; adapter and base are checked against each other here.
fn plan<'a>(
    shared: &'a Shared<'a>,
    adapter: &AdapterConfig,
    matrices: &'a BTreeMap<String, Tensor>,
    config: &MergeConfig,
) -> Checked<Vec<Merged<'a>>> {
    let mut deltas = deltas(adapter, matrices);
    let expected: Vec<(String, Vec<usize>)> = deltas
        .iter()
        .map(|(module, delta)| {
            let [out, inputs] = [delta.b.dims().first(), delta.a.dims().last()].map(|d| d.copied().unwrap_or_default());
            (format!("{module}.weight"), vec![out, inputs])
        })
        .collect();
    shared.base.require(&expected)?;
    let mut tensors = Vec::new();
    for name in shared.base.names() {
        let Some(stored) = shared.base.info(name) else { continue };
        let module = name.strip_suffix(".weight").filter(|module| module::projection(module).is_some());
        let linear = match module.map(|module| deltas.remove(module)) {
            None => Linear::No,
            Some(None) => Linear::Plain,
            Some(Some(delta)) => Linear::Adapted(delta),
        };
        let fits = matches!(linear, Linear::No) || (is_float(stored.dtype) && stored.shape.len() == 2);
        if !fits {
            return Err(ModelError::TensorMismatch {
                path: config.student.clone(),
                name: name.to_string(),
                expected: "F32, F16 or BF16 [out, in]".into(),
                found: format!("{:?} {:?}", stored.dtype, stored.shape),
            }
            .into());
        }
        let dtype = match config.dtype {
            _ if !is_float(stored.dtype) => stored.dtype,
            MergeDtype::Auto => stored.dtype,
            MergeDtype::F32 => Dtype::F32,
            MergeDtype::Bf16 => Dtype::BF16,
            MergeDtype::F16 => Dtype::F16,
        };
        tensors.push(Merged { name, stored, dtype, linear, shared });
    }
    Ok(tensors)
}

/// Pairs of matrices by module.
fn deltas<'a>(adapter: &AdapterConfig, matrices: &'a BTreeMap<String, Tensor>) -> BTreeMap<&'a str, Delta<'a>> {
    let factor = adapter.factor();
    matrices
        .iter()
        .filter_map(|(name, a)| {
            let (module, matrix) = module::parse(name)?;
            let b = matrices.get(&module::tensor_name(module, Matrix::B)).filter(|_| matrix == Matrix::A)?;
            Some((module, Delta { a, b, factor }))
        })
        .collect()
}

/// Cuts the tensors, in order, into groups of at most `limit` bytes.
fn shards<'a>(tensors: &'a [Merged<'a>], limit: u64) -> Vec<Vec<&'a Merged<'a>>> {
    let mut shards: Vec<Vec<&Merged>> = vec![Vec::new()];
    let mut held = 0;
    for tensor in tensors {
        let size = (&tensor).data_len() as u64;
        if held > 0 && held + size > limit {
            shards.push(Vec::new());
            held = 0;
        }
        held += size;
        if let Some(last) = shards.last_mut() {
            last.push(tensor);
        }
    }
    shards
}

fn file_names(count: usize) -> Vec<String> {
    if count == 1 {
        return vec!["model.safetensors".into()];
    }
    (1..=count).map(|i| format!("model-{i:05}-of-{count:05}.safetensors")).collect()
}

/// Writes one file and gives its size in bytes.
fn write_shard(staging: &Staging, name: &str, shard: &[&Merged<'_>], shared: &Shared<'_>) -> Result<u64> {
    let path = staging.file(name);
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let written = safetensors::serialize_to_file(shard.iter().map(|t| (t.name, *t)), Some(metadata), &path);
    if shared.context.stopping() {
        return Err(Error::Interrupted { kept: "nothing was written".into(), again: crate::run::RUN_AGAIN });
    }
    if let Some(error) = shared.failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
        return Err(error.into());
    }
    written.map_err(|source| AdapterError::Safetensors { path: path.clone(), source })?;
    staging.share(name, "config.json")?;
    Ok(size_of_file(&path)?)
}

fn size_of_file(path: &Path) -> Checked<u64> {
    std::fs::metadata(path).map(|m| m.len()).map_err(|source| AdapterError::Io { path: path.to_path_buf(), source })
}

/// The index's text.
fn index(names: &[String], shards: &[Vec<&Merged<'_>>], bytes: u64) -> String {
    let map: BTreeMap<&str, &str> =
        names.iter().zip(shards).flat_map(|(file, shard)| shard.iter().map(|t| (t.name, file.as_str()))).collect();
    let index = json!({ "metadata": { "total_size": bytes }, "weight_map": map });
    format!("{index:#}\n")
}
