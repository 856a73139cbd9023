//! What a config means by its architecture and by what it leaves out, as the configuration classes of transformers 4.57 and 5 have it.
//! Refuses by name whatever would change the arithmetic and is not computed here.
//!
//! | key left out          | Qwen2       | Qwen3       | Llama       | Mistral     |
//! |-----------------------|-------------|-------------|-------------|-------------|
//! | num_key_value_heads   | 32          | 32          | heads       | 8           |
//! | head_dim              | H / heads   | 128         | H / heads   | H / heads   |
//! | max_position_embeddings | 32,768    | 32,768      | 2,048       | 131,072     |
//! | sliding_window        | 4,096 where `use_sliding_window` | the same | there is none | 4,096 |
//! | tie_word_embeddings   | false       | false       | false       | false       |
//! | attention_bias        | q, k, v always | false    | false       | none ever   |
//!
//! `null` is not left out: heads for num_key_value_heads, no window for sliding_window.

use super::Biases;
use super::object::Object;
use crate::model::ModelError;
use serde_json::Value;

/// `rms_norm_eps` of models that name none.
pub(super) const RMS_NORM_EPS: f64 = 1e-6;
/// `rope_theta` of models that name none.
const ROPE_THETA: f64 = 10_000.0;
/// `sliding_window` of models that have one and do not say how long it is.
const SLIDING_WINDOW: usize = 4096;
/// Most heads, and dimensions of a head.
const MOST_HEADS: usize = 1 << 12;
/// Most positions.
const MOST_POSITIONS: usize = 1 << 24;

/// The architectures that are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    Qwen2,
    Qwen3,
    Llama,
    Mistral,
}

impl Architecture {
    /// The first of `architectures`.
    pub(super) fn of(object: &Object) -> Result<Self, ModelError> {
        match object.value.get("architectures").and_then(|all| all.get(0)).and_then(Value::as_str) {
            Some("Qwen2ForCausalLM") => Ok(Self::Qwen2),
            Some("Qwen3ForCausalLM") => Ok(Self::Qwen3),
            Some("LlamaForCausalLM") => Ok(Self::Llama),
            Some("MistralForCausalLM") => Ok(Self::Mistral),
            other => Err(object.wrong(
                "architectures",
                "Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM or MistralForCausalLM",
                &other.map_or("nothing".into(), |v| format!("{v:?}")),
            )),
        }
    }

    /// Which layers have a bias. Qwen2 and Mistral do not ask the config; Qwen has no biases in its MLP whatever the config says.
    pub(super) fn biases(self, object: &Object) -> Result<Biases, ModelError> {
        match self {
            Self::Qwen2 => Ok(Biases::QueryKeyValue),
            Self::Llama | Self::Mistral if object.flag("mlp_bias")? => {
                Err(object.wrong("mlp_bias", "false (biases of the MLP are not supported)", "true"))
            }
            Self::Llama | Self::Qwen3 if object.flag("attention_bias")? => Ok(Biases::Attention),
            Self::Llama | Self::Qwen3 | Self::Mistral => Ok(Biases::None),
        }
    }

    pub(super) fn kv_heads(self, object: &Object, heads: usize) -> Result<usize, ModelError> {
        let left_out = match (self, object.value.get("num_key_value_heads")) {
            (_, Some(_)) | (Self::Llama, None) => heads,
            (Self::Qwen2 | Self::Qwen3, None) => 32,
            (Self::Mistral, None) => 8,
        };
        object.size_or("num_key_value_heads", left_out, 1, MOST_HEADS)
    }

    /// Dimensions of a head where the config names none.
    pub(super) fn head_dim(self, hidden_size: usize, heads: usize) -> usize {
        match self {
            Self::Qwen3 => 128,
            Self::Qwen2 | Self::Llama | Self::Mistral => hidden_size / heads,
        }
    }

    /// Positions, cut to the sliding window where one is in force. Within a window, sliding attention is full attention.
    pub(super) fn context(self, object: &Object) -> Result<usize, ModelError> {
        let left_out = match self {
            Self::Qwen2 | Self::Qwen3 => 32_768,
            Self::Llama => 2048,
            Self::Mistral => 131_072,
        };
        let positions = object.size_or("max_position_embeddings", left_out, 1, MOST_POSITIONS)?;
        let null = object.value.get("sliding_window").is_some_and(Value::is_null);
        if null || !self.slides(object)? {
            return Ok(positions);
        }
        Ok(positions.min(object.size_or("sliding_window", SLIDING_WINDOW, 1, MOST_POSITIONS)?))
    }

    /// Whether some layer's attention slides. Mistral's always does, Llama's never; Qwen's where `layer_types` says so of a layer or,
    /// without such a list, where `use_sliding_window` is set: of which layers it then is has been read both ways from
    /// `max_window_layers`, so that it is not asked.
    fn slides(self, object: &Object) -> Result<bool, ModelError> {
        match self {
            Self::Llama => Ok(false),
            Self::Mistral => Ok(true),
            Self::Qwen2 | Self::Qwen3 => match object.present("layer_types") {
                None => object.flag("use_sliding_window"),
                Some(list) => listed(object, list),
            },
        }
    }
}

/// Whether `layer_types` names sliding attention; other kinds than full and sliding attention are refused.
fn listed(object: &Object, list: &Value) -> Result<bool, ModelError> {
    let known = ["full_attention", "sliding_attention"];
    let wrong = |found: &Value| object.wrong("layer_types", "a list of full_attention and sliding_attention", &found.to_string());
    let layers = list.as_array().ok_or_else(|| wrong(list))?;
    if let Some(other) = layers.iter().find(|layer| !layer.as_str().is_some_and(|name| known.contains(&name))) {
        return Err(wrong(other));
    }
    Ok(layers.iter().any(|layer| layer.as_str() == Some(known[1])))
}

/// `rope_theta` at the top (transformers 4) or in `rope_parameters` (transformers 5). Scaled and partial variants are refused by name,
/// in whichever section they stand.
pub(super) fn rope_theta(object: &Object) -> Result<f64, ModelError> {
    whole(object, "partial_rotary_factor")?;
    let mut theta = None;
    // In this order: transformers 5 lets the older section count where both are there.
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(scaling) = object.present(key) else { continue };
        let kind = scaling.get("rope_type").or_else(|| scaling.get("type"));
        if !scaling.is_object() || kind.is_some_and(|kind| kind != "default") {
            let expected = "rope_type \"default\" (scaled rotary embeddings are not supported)";
            return Err(object.wrong(key, expected, &kind.unwrap_or(scaling).to_string()));
        }
        if let Some(value) = scaling.as_object().and_then(|s| s.values().find(|v| v.is_object())) {
            return Err(object.wrong(key, "one set of values for all layers", &value.to_string()));
        }
        let section = Object { value: scaling.clone(), file: object.file.clone() };
        whole(&section, "partial_rotary_factor")?;
        if theta.is_none() && section.present("rope_theta").is_some() {
            theta = Some(section.positive("rope_theta", None)?);
        }
    }
    theta.map_or_else(|| object.positive("rope_theta", Some(ROPE_THETA)), Ok)
}

/// A share that must be the whole.
fn whole(object: &Object, key: &str) -> Result<(), ModelError> {
    match object.positive(key, Some(1.0))? {
        1.0 => Ok(()),
        other => Err(object.wrong(key, "1 (partly turned heads are not supported)", &other.to_string())),
    }
}
