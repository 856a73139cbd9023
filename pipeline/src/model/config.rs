//! `config.json` of a model folder, as both generations of transformers write it, checked before anything is allocated.

use super::ModelError;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Largest `config.json` read, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Default `rope_theta` of models that name none.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;

/// How the linear layers are stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Quantization {
    /// bf16, f16 or f32.
    None,
    /// AWQ int4, GEMM layout, with zero points.
    Awq {
        /// Inputs that share a scale and a zero point; `None`: all of them.
        group: Option<usize>,
        /// Parts of module names that stay dense.
        keep_dense: Vec<String>,
    },
}

/// Which layers have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Biases {
    /// None at all (Llama, Mistral).
    None,
    /// `q_proj`, `k_proj` and `v_proj` (Qwen2).
    QueryKeyValue,
    /// All four of attention (Llama with `attention_bias`).
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
    /// Longest context the model was made for, in tokens.
    pub max_positions: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Which layers have a bias.
    pub biases: Biases,
    /// How the linear layers are stored.
    pub quantization: Quantization,
}

impl ModelConfig {
    /// Reads `config.json`, and `quant_config.json` where the first names no quantisation. Errors name file, key, expected, found.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
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
            max_positions: object.size("max_position_embeddings", 1, 1 << 24)?,
            tied: object.flag("tie_word_embeddings")?,
            biases,
            quantization: quantization(folder, &object)?,
        };
        config.check(&object)?;
        Ok(config)
    }

    fn check(&self, object: &Object) -> Result<(), ModelError> {
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a divisor of num_attention_heads = {}", self.heads);
            return Err(object.wrong("num_key_value_heads", &expected, &self.kv_heads.to_string()));
        }
        if self.head_dim < 2 || !self.head_dim.is_multiple_of(2) {
            return Err(object.wrong("head_dim", "an even number above 0", &self.head_dim.to_string()));
        }
        if let Quantization::Awq { group: Some(group), .. } = self.quantization {
            let inputs = [self.hidden_size, self.heads * self.head_dim, self.intermediate_size];
            if let Some(inputs) = inputs.iter().find(|n| !n.is_multiple_of(group)) {
                return Err(object.wrong(
                    "group_size",
                    &format!("a divisor of every layer's inputs, {inputs} among them"),
                    &group.to_string(),
                ));
            }
        }
        let act = object.value.get("hidden_act").and_then(Value::as_str).unwrap_or("silu");
        if act != "silu" {
            return Err(object.wrong("hidden_act", "\"silu\"", &format!("{act:?}")));
        }
        if object.flag("use_sliding_window")? {
            return Err(object.wrong("use_sliding_window", "false (sliding windows are not supported)", "true"));
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
    let architecture = object.value.get("architectures").and_then(|v| v.get(0)).and_then(Value::as_str);
    match architecture {
        Some("Qwen2ForCausalLM") => Ok(Biases::QueryKeyValue),
        Some("LlamaForCausalLM") if object.flag("attention_bias")? => Ok(Biases::Attention),
        Some("LlamaForCausalLM" | "MistralForCausalLM") => match object.flag("mlp_bias")? {
            true => Err(object.wrong("mlp_bias", "false", "true")),
            false => Ok(Biases::None),
        },
        other => Err(object.wrong(
            "architectures",
            "Qwen2ForCausalLM, LlamaForCausalLM or MistralForCausalLM",
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
        if let Some(theta) = scaling.get("rope_theta").and_then(Value::as_f64).filter(|v| *v > 0.0) {
            return Ok(theta);
        }
    }
    object.positive("rope_theta", Some(DEFAULT_ROPE_THETA))
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
        return awq(&object, "bits", "group_size");
    }
    let older = folder.join("quant_config.json");
    if older.is_file() {
        awq(&Object { value: read_json(&older)?, file: older }, "w_bit", "q_group_size")
    } else {
        Ok(Quantization::None)
    }
}

fn awq(object: &Object, bits: &str, group: &str) -> Result<Quantization, ModelError> {
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
    let group = match object.present(group).and_then(Value::as_i64) {
        Some(-1) => None,
        _ => Some(object.size(group, 1, 1 << 17)?),
    };
    let names = object.present("modules_to_not_convert").and_then(Value::as_array);
    let keep_dense = names.into_iter().flatten().filter_map(Value::as_str).map(String::from).collect();
    Ok(Quantization::Awq { group, keep_dense })
}

fn read_json(file: &Path) -> Result<Value, ModelError> {
    let io = |source| ModelError::Io { path: file.to_path_buf(), source };
    let bytes = std::fs::metadata(file).map_err(io)?.len();
    if bytes > MAX_CONFIG_BYTES {
        return Err(ModelError::Config {
            path: file.to_path_buf(),
            key: "size".into(),
            expected: format!("at most {MAX_CONFIG_BYTES} bytes"),
            found: format!("{bytes} bytes"),
        });
    }
    let text = std::fs::read(file).map_err(io)?;
    serde_json::from_slice(&text).map_err(|source| ModelError::Json { path: file.to_path_buf(), source })
}
