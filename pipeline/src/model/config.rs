//! `config.json` of a model folder, as both generations of transformers write it, checked before anything is allocated.

mod architecture;
mod object;

use super::ModelError;
use crate::bounded;
use architecture::Architecture;
use object::Object;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Largest `config.json` read, in bytes.
pub(crate) const MAX_CONFIG_BYTES: u64 = 1 << 20;

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
        let architecture = Architecture::of(&object)?;
        let heads = object.size("num_attention_heads", 1, 1 << 12)?;
        let hidden_size = object.size("hidden_size", 1, 1 << 17)?;
        let config = Self {
            hidden_size,
            intermediate_size: object.size("intermediate_size", 1, 1 << 20)?,
            layers: object.size("num_hidden_layers", 1, 1 << 10)?,
            heads,
            kv_heads: architecture.kv_heads(&object, heads)?,
            head_dim: object.size_or("head_dim", architecture.head_dim(hidden_size, heads), 2, 1 << 12)?,
            vocab_size: object.size("vocab_size", 2, 1 << 20)?,
            rms_norm_eps: object.positive("rms_norm_eps", Some(architecture::RMS_NORM_EPS))?,
            rope_theta: architecture::rope_theta(&object)?,
            context: architecture.context(&object)?,
            tied: object.flag("tie_word_embeddings")?,
            biases: architecture.biases(&object)?,
            head_norms: architecture == Architecture::Qwen3,
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
