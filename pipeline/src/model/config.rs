//! `config.json` of a model folder, as both generations of transformers write it, checked before anything is allocated.

use super::ModelError;
use crate::bounded;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Largest `config.json` read, in bytes.
pub(crate) const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Default `rope_theta` of models that name none.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;

/// How the linear layers are stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Quantization {
    /// bf16, f16 or f32.
    None,
    /// AWQ int4, GEMM layout, with zero points.
    Awq {
        /// Inputs that share a scale and a zero point.
        group: Group,
        /// Parts of module names that stay dense.
        keep_dense: Vec<String>,
    },
}

/// An AWQ group size and where it was said.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// Inputs; `None` stands for -1, all inputs of a layer.
    pub size: Option<usize>,
    /// The file.
    pub file: PathBuf,
    /// The key in it.
    pub key: String,
}

/// Which layers have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Biases {
    /// None at all (Llama, Mistral, Qwen3).
    None,
    /// `q_proj`, `k_proj` and `v_proj` (Qwen2).
    QueryKeyValue,
    /// All four of attention (Llama and Qwen3 with `attention_bias`).
    Attention,
}

/// The decoder's sizes.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// H.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// L.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Dimensions of a head.
    pub head_dim: usize,
    /// V: rows of the embedding and of the head, padding included.
    pub vocab_size: usize,
    /// Epsilon of the norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// Longest conversation that is computed as the model was made to, in tokens: its positions, or its sliding window.
    pub context: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Which layers have a bias.
    pub biases: Biases,
    /// Whether q and k pass a norm, head by head, before they are turned (Qwen3).
    pub head_norms: bool,
    /// How the linear layers are stored.
    pub quantization: Quantization,
}

impl ModelConfig {
    /// Reads `config.json`, and `quant_config.json` where the first names no quantisation. Errors name file, key, expected, found.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        if !folder.is_dir() {
            let found = if folder.exists() { "a file" } else { "nothing there" };
            return Err(ModelError::NoFolder { folder: folder.to_path_buf(), found });
        }
        let file = folder.join("config.json");
        let object = Object { value: read_json(&file)?, file };
        let biases = biases(&object)?;
        let heads = object.size("num_attention_heads", 1, 1 << 12)?;
        let hidden_size = object.size("hidden_size", 1, 1 << 17)?;
        let kv_heads = object.size_or("num_key_value_heads", heads, 1, 1 << 12)?;
        let head_dim = object.size_or("head_dim", hidden_size / heads, 2, 1 << 12)?;
        let config = Self {
            hidden_size,
            intermediate_size: object.size("intermediate_size", 1, 1 << 20)?,
            layers: object.size("num_hidden_layers", 1, 1 << 10)?,
            heads,
            kv_heads,
            head_dim,
            vocab_size: object.size("vocab_size", 2, 1 << 20)?,
            rms_norm_eps: object.positive("rms_norm_eps", None)?,
            rope_theta: rope_theta(&object)?,
            context: context(&object)?,
            tied: object.flag("tie_word_embeddings")?,
            biases,
            head_norms: object.architecture() == Some("Qwen3ForCausalLM"),
            quantization: quantization(folder, &object)?,
        };
        config.check(&object)?;
        Ok(config)
    }

    /// BLAKE3 (hex) of `config.json`, and of `quant_config.json` where there is one.
    pub fn fingerprint(folder: &Path) -> Result<String, ModelError> {
        let mut hasher = blake3::Hasher::new();
        for (name, required) in [("config.json", true), ("quant_config.json", false)] {
            let path = folder.join(name);
            if required || path.is_file() {
                hasher.update(&bounded::read(&path, MAX_CONFIG_BYTES).map_err(|source| ModelError::Io { path, source })?);
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Errors: the weights are quantised already, so no student can be made of them.
    pub fn check_dense(&self, folder: &Path) -> Result<(), ModelError> {
        match self.quantization {
            Quantization::None => Ok(()),
            Quantization::Awq { .. } => Err(ModelError::Config {
                path: folder.join("config.json"),
                key: "quantization_config".into(),
                expected: "none: a student is quantised to NF4 from dense weights".into(),
                found: "an already quantised model".into(),
            }),
        }
    }

    fn check(&self, object: &Object) -> Result<(), ModelError> {
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a divisor of num_attention_heads = {}", self.heads);
            return Err(object.wrong("num_key_value_heads", &expected, &self.kv_heads.to_string()));
        }
        if self.head_dim < 2 || !self.head_dim.is_multiple_of(2) {
            return Err(object.wrong("head_dim", "an even number above 0", &self.head_dim.to_string()));
        }
        if let Quantization::Awq { group: Group { size: Some(group), file, key }, .. } = &self.quantization {
            let inputs = [self.hidden_size, self.heads * self.head_dim, self.intermediate_size];
            if let Some(inputs) = inputs.iter().find(|n| !n.is_multiple_of(*group)) {
                return Err(ModelError::Config {
                    path: file.clone(),
                    key: key.clone(),
                    expected: format!("a divisor of every layer's inputs, {inputs} among them"),
                    found: group.to_string(),
                });
            }
        }
        let act = object.value.get("hidden_act").and_then(Value::as_str).unwrap_or("silu");
        if act != "silu" {
            return Err(object.wrong("hidden_act", "\"silu\"", &format!("{act:?}")));
        }
        Ok(())
    }
}

/// A JSON object that knows its file.
struct Object {
    value: Value,
    file: PathBuf,
}

impl Object {
    fn wrong(&self, key: &str, expected: &str, found: &str) -> ModelError {
        ModelError::Config { path: self.file.clone(), key: key.into(), expected: expected.into(), found: found.into() }
    }

    /// The first of `architectures`.
    fn architecture(&self) -> Option<&str> {
        self.value.get("architectures")?.get(0)?.as_str()
    }

    fn present(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|v| !v.is_null())
    }

    fn size(&self, key: &str, min: usize, max: usize) -> Result<usize, ModelError> {
        let found = self.present(key);
        let number = found.and_then(Value::as_u64).map(|v| v as usize).filter(|v| (min..=max).contains(v));
        number.ok_or_else(|| {
            self.wrong(key, &format!("a whole number from {min} to {max}"), &found.map_or("nothing".into(), Value::to_string))
        })
    }

    fn size_or(&self, key: &str, default: usize, min: usize, max: usize) -> Result<usize, ModelError> {
        if self.present(key).is_some() { self.size(key, min, max) } else { Ok(default) }
    }

    fn positive(&self, key: &str, default: Option<f64>) -> Result<f64, ModelError> {
        let found = self.present(key);
        let number = found.map_or(default, |v| v.as_f64().filter(|v| *v > 0.0 && v.is_finite()));
        number.ok_or_else(|| self.wrong(key, "a positive number", &found.map_or("nothing".into(), Value::to_string)))
    }

    fn flag(&self, key: &str) -> Result<bool, ModelError> {
        match self.present(key) {
            None => Ok(false),
            Some(v) => v.as_bool().ok_or_else(|| self.wrong(key, "true or false", &v.to_string())),
        }
    }
}

fn biases(object: &Object) -> Result<Biases, ModelError> {
    match object.architecture() {
        Some("Qwen2ForCausalLM") => Ok(Biases::QueryKeyValue),
        Some("LlamaForCausalLM" | "MistralForCausalLM") if object.flag("mlp_bias")? => {
            Err(object.wrong("mlp_bias", "false (biases of the MLP are not supported)", "true"))
        }
        Some("LlamaForCausalLM" | "Qwen3ForCausalLM") if object.flag("attention_bias")? => Ok(Biases::Attention),
        Some("LlamaForCausalLM" | "MistralForCausalLM" | "Qwen3ForCausalLM") => Ok(Biases::None),
        other => Err(object.wrong(
            "architectures",
            "Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM or MistralForCausalLM",
            &other.map_or("nothing".into(), |v| format!("{v:?}")),
        )),
    }
}

/// `rope_theta` at the top (transformers 4) or in `rope_parameters` (transformers 5). Scaled variants are refused by name.
fn rope_theta(object: &Object) -> Result<f64, ModelError> {
    for key in ["rope_parameters", "rope_scaling"] {
        let Some(scaling) = object.present(key) else { continue };
        let kind = scaling.get("rope_type").or_else(|| scaling.get("type")).and_then(Value::as_str).unwrap_or("default");
        if kind != "default" {
            return Err(object.wrong(
                key,
                "rope_type \"default\" (scaled rotary embeddings are not supported)",
                &format!("{kind:?}"),
            ));
        }
        if let Some(value) = scaling.as_object().and_then(|s| s.values().find(|v| v.is_object())) {
            return Err(object.wrong(key, "one set of values for all layers", &value.to_string()));
        }
        if scaling.get("rope_theta").is_some_and(|v| !v.is_null()) {
            return Object { value: scaling.clone(), file: object.file.clone() }.positive("rope_theta", None);
        }
    }
    object.positive("rope_theta", Some(DEFAULT_ROPE_THETA))
}

/// Positions, cut to the sliding window where one is in force: Mistral's always is, Qwen2's where `use_sliding_window` says so, and
/// transformers 5 lists it layer by layer. Within a window, sliding attention is full attention.
fn context(object: &Object) -> Result<usize, ModelError> {
    let positions = object.size("max_position_embeddings", 1, 1 << 24)?;
    let mistral = object.architecture() == Some("MistralForCausalLM");
    let layers = object.present("layer_types").and_then(Value::as_array);
    let listed = layers.into_iter().flatten().any(|l| l.as_str() == Some("sliding_attention"));
    let slides = listed || object.flag("use_sliding_window")? || mistral;
    if slides && object.present("sliding_window").is_some() {
        return Ok(positions.min(object.size("sliding_window", 1, 1 << 24)?));
    }
    Ok(positions)
}

fn quantization(folder: &Path, config: &Object) -> Result<Quantization, ModelError> {
    if let Some(section) = config.present("quantization_config") {
        let object = Object { value: section.clone(), file: config.file.clone() };
        let method = object.present("quant_method").and_then(Value::as_str).unwrap_or("nothing");
        if method != "awq" {
            return Err(object.wrong(
                "quantization_config.quant_method",
                "\"awq\", or no quantization_config",
                &format!("{method:?}"),
            ));
        }
        return awq(&object, "quantization_config.", "bits", "group_size");
    }
    let older = folder.join("quant_config.json");
    if older.is_file() {
        awq(&Object { value: read_json(&older)?, file: older }, "", "w_bit", "q_group_size")
    } else {
        Ok(Quantization::None)
    }
}

fn awq(object: &Object, section: &str, bits: &str, group: &str) -> Result<Quantization, ModelError> {
    if object.size(bits, 1, 64)? != 4 {
        return Err(object.wrong(bits, "4", &object.size(bits, 1, 64)?.to_string()));
    }
    let version = object.present("version").and_then(Value::as_str).unwrap_or("gemm");
    if !version.eq_ignore_ascii_case("gemm") {
        return Err(object.wrong("version", "\"gemm\"", &format!("{version:?}")));
    }
    if object.present("zero_point").is_some() && !object.flag("zero_point")? {
        return Err(object.wrong("zero_point", "true", "false"));
    }
    let size = match object.present(group).and_then(Value::as_i64) {
        Some(-1) => None,
        _ => Some(object.size(group, 1, 1 << 17)?),
    };
    let group = Group { size, file: object.file.clone(), key: format!("{section}{group}") };
    let names = object.present("modules_to_not_convert").and_then(Value::as_array);
    let keep_dense = names.into_iter().flatten().filter_map(Value::as_str).map(String::from).collect();
    Ok(Quantization::Awq { group, keep_dense })
}

fn read_json(file: &Path) -> Result<Value, ModelError> {
    let text = bounded::read(file, MAX_CONFIG_BYTES).map_err(|source| ModelError::Io { path: file.to_path_buf(), source })?;
    serde_json::from_slice(&text).map_err(|source| ModelError::Json { path: file.to_path_buf(), source })
}
