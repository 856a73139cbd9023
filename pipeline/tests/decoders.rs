//! Every architecture against transformers on a tiny random model: logits of packs, the gradient that passes through, and what a
//! config means by what it leaves out. The folders are made by scripts/make_decoder_fixtures.py.
//!
//! Tolerance: both sides compute in f32 from the same values. A logit is a sum of up to 64 terms after 14 products of up to 96;
//! each sum is off by about √96 · 2^-24 ≈ 6e-7 of its size, 15 of them by about 2.3e-6. Logits reach 13 and gradients 30: honest
//! differences are 3e-5 and 7e-5 (2.1e-5 and 3.3e-5 measured), and 1e-4 is allowed. A wrong decoder is off by more than 0.1
//! (seen below).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use candle_core::{DType, Device, Tensor};
use potstill_pipeline::data::pack::{Pack, Sequence};
use potstill_pipeline::kernel::Precision;
use potstill_pipeline::linear::Weight;
use potstill_pipeline::model::config::{Biases, ModelConfig};
use potstill_pipeline::model::decoder::{Decoder, Holding};
use potstill_pipeline::model::layer::Geometry;
use potstill_pipeline::model::weights::Weights;
use potstill_pipeline::run::RunContext;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::PathBuf;
use support::{floats, ids, max_difference, offsets};

const BOUND: f32 = 1e-4;
/// What a wrong decoder is off by at least.
const SEEN: f32 = 0.1;
const DENSE: [&str; 9] =
    ["qwen2_tied", "qwen2_head_dim", "llama", "llama_bias", "llama_tied", "mistral", "mistral_window", "qwen3", "qwen3_bias"];
const AWQ: [&str; 2] = ["llama_awq", "qwen3_awq"];

fn folder(name: &str) -> PathBuf {
    support::fixture("decoders").join(name)
}

fn decoder(name: &str) -> Decoder {
    let (device, context) = (support::device(), RunContext::default());
    let mut decoder = Decoder::from_folder(&folder(name), Holding::AsStored, Precision::F32, &device, &context).unwrap();
    decoder.place(&RunContext::default()).unwrap();
    decoder
}

fn expected(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(folder(name).join("expected.safetensors"), &Device::Cpu).unwrap()
}

/// Both sequences in one pack.
fn pack(expected: &HashMap<String, Tensor>) -> Pack {
    let (starts, input_ids) = (offsets(&expected["offsets"]), ids(&expected["input_ids"]));
    assert_eq!(starts.len(), 3);
    Pack::new(starts.windows(2).map(|w| Sequence { input_ids: &input_ids[w[0]..w[1]], positions: &[] }))
}

/// Largest difference of a decoder's logits, all positions.
fn off_by(decoder: &Decoder, name: &str) -> f32 {
    let expected = expected(name);
    let hidden = decoder.final_norm(&decoder.hidden(&pack(&expected)).unwrap()).unwrap();
    let logits = decoder.logits(&hidden).unwrap();
    max_difference(&floats(&logits), &floats(&expected["logits"]))
}

#[test]
fn logits_equal_transformers_whatever_the_architecture() {
    for name in DENSE.into_iter().chain(AWQ) {
        let difference = off_by(&decoder(name), name);
        println!("{name}: {difference:e}");
        assert!(difference < BOUND, "{name}: {difference}");
    }
}

#[test]
fn every_part_is_seen() {
    let mut qwen3 = decoder("qwen3");
    qwen3.layers[1].q_norm = None;
    assert!(off_by(&qwen3, "qwen3") > SEEN);
    let mut qwen3 = decoder("qwen3_awq");
    qwen3.layers[0].k_norm = None;
    assert!(off_by(&qwen3, "qwen3_awq") > SEEN);
    for (name, biased) in [("llama", 0), ("llama_bias", 4), ("qwen2_tied", 3), ("qwen3", 0), ("qwen3_bias", 4), ("mistral", 0)] {
        for linear in 0..7 {
            let mut decoder = decoder(name);
            let layer = &mut decoder.layers[0].linears_mut()[linear].bias;
            assert_eq!(layer.is_some(), linear < biased, "{name} {linear}");
            // A bias of k moves all scores of a row alike where nothing is turned; rope makes it seen, though less.
            if layer.take().is_some() {
                assert!(off_by(&decoder, name) > SEEN / 4.0, "{name} {linear}");
            }
        }
    }
}

/// dL/d(embeddings) of L = Σ logits · cotangent.
fn gradient(decoder: &Decoder, expected: &HashMap<String, Tensor>) -> Tensor {
    let pack = pack(expected);
    let geometry = Geometry::new(&pack, &decoder.config, decoder.device()).unwrap();
    let mut inputs = vec![decoder.embed(pack.input_ids()).unwrap()];
    for layer in &decoder.layers {
        inputs.push(layer.forward(inputs.last().unwrap(), &geometry, None).unwrap());
    }
    let d_normed = expected["cotangent"].matmul(&Weight::Dense(decoder.head().clone()).to_tensor().unwrap()).unwrap();
    let d_normed = d_normed.to_device(decoder.device()).unwrap();
    let mut d = decoder.final_norm_backward(&inputs.pop().unwrap(), &d_normed).unwrap();
    for (layer, x) in decoder.layers.iter().zip(&inputs).rev() {
        let below = layer.backward(x, None, &d, &geometry, None).unwrap().0;
        let (_, kept) = layer.forward_keeping(x, &geometry, None).unwrap();
        let from_kept = layer.backward(x, Some(kept), &d, &geometry, None).unwrap().0;
        assert_eq!(floats(&from_kept), floats(&below), "what was kept is what would be computed again");
        d = below;
    }
    d
}

#[test]
fn the_gradient_equals_autograd_whatever_the_architecture() {
    for name in DENSE {
        let expected = expected(name);
        let difference = max_difference(&floats(&gradient(&decoder(name), &expected)), &floats(&expected["d_embeddings"]));
        println!("{name}: {difference:e}");
        assert!(difference < BOUND, "{name}: {difference}");
    }
}

/// Where there is no autograd to compare with, the packed weights, the slope along some direction is asked of the forward itself.
#[test]
fn the_gradient_through_norms_of_heads_is_the_slope() {
    for name in ["qwen3", "qwen3_bias", "qwen3_awq"] {
        let (decoder, expected) = (decoder(name), expected(name));
        let pack = pack(&expected);
        let geometry = Geometry::new(&pack, &decoder.config, decoder.device()).unwrap();
        let layer = &decoder.layers[0];
        let x = decoder.embed(pack.input_ids()).unwrap();
        let wave =
            |salt: usize| (0..x.elem_count()).map(|i| ((i * 7919 + salt) % 1009) as f32 / 504.0 - 1.0).collect::<Vec<f32>>();
        let tensor = |values| Tensor::from_vec(values, x.dims(), x.device()).unwrap();
        let dy = tensor(wave(1));
        let (dx, _) = layer.backward(&x, None, &dy, &geometry, None).unwrap();
        let dot = |a: &Tensor, b: &Tensor| floats(a).iter().zip(floats(b)).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        let h = 2e-3;
        for salt in [2, 3, 4] {
            let way = wave(salt * 31);
            let at = |h: f64| {
                let moved = floats(&x).iter().zip(&way).map(|(x, way)| x + way * h as f32).collect::<Vec<f32>>();
                dot(&layer.forward(&tensor(moved), &geometry, None).unwrap(), &dy)
            };
            let (slope, ours) = ((at(h) - at(-h)) / (2.0 * h), dot(&dx, &tensor(way.clone())));
            println!("{name}: slope {slope}, ours {ours}");
            // f32 sums of some 1,400 products of size 10 differ by about √1400 · 10 · 2^-24 = 2e-5, over 2h: 6e-3; the
            // curve's third derivative adds h² of the slope's own size, about the number of values: 6e-3.
            assert!((slope - ours).abs() < 5e-2 + 1e-3 * slope.abs(), "{name}: {slope} {ours}");
        }
    }
}

/// What we make of a config.
fn read(config: &Value) -> Result<ModelConfig, String> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    ModelConfig::from_folder(folder.path()).map_err(|e| e.to_string())
}

/// The config of an architecture that gives sizes alone, and what transformers makes of it.
fn sizes_alone(kind: &str) -> (Value, Value) {
    let all: Value = serde_json::from_slice(&std::fs::read(folder("defaults.json")).unwrap()).unwrap();
    (all[kind]["given"].clone(), all[kind]["means"].clone())
}

#[test]
fn what_is_left_out_means_what_it_means_to_transformers() {
    for kind in ["qwen2", "qwen3", "llama", "mistral"] {
        let (given, means) = sizes_alone(kind);
        let config = read(&given).unwrap();
        let size = |key: &str| means[key].as_u64().map(|v| v as usize);
        assert_eq!((Some(config.kv_heads), Some(config.head_dim)), (size("kv_heads"), size("head_dim")), "{kind}");
        assert_eq!((config.rms_norm_eps, config.rope_theta), (means["rms_norm_eps"].as_f64().unwrap(), 1e4), "{kind}");
        assert_eq!(means["rope_theta"], 1e4, "{kind}");
        assert_eq!(config.tied, means["tied"], "{kind}");
        let positions = size("positions").unwrap();
        assert_eq!(config.context, size("window").map_or(positions, |window| window.min(positions)), "{kind}");
        let biases = if kind == "qwen2" { Biases::QueryKeyValue } else { Biases::None };
        assert_eq!((config.biases, config.head_norms), (biases, kind == "qwen3"), "{kind}");

        // Not left out but null: as many heads as there are, and no window.
        let mut nothing = given.clone();
        (nothing["num_key_value_heads"], nothing["sliding_window"]) = (Value::Null, Value::Null);
        let config = read(&nothing).unwrap();
        assert_eq!((config.kv_heads, config.context), (64, positions), "{kind}");
    }
}

#[test]
fn a_window_bounds_the_context_where_it_is_in_force() {
    let context = |kind: &str, settings: &[(&str, Value)]| {
        let mut config = sizes_alone(kind).0;
        settings.iter().for_each(|(key, value)| config[*key] = value.clone());
        read(&config).unwrap().context
    };
    let (window, used) = (("sliding_window", json!(100)), ("use_sliding_window", json!(true)));
    let (full, mixed) = (json!(["full_attention"]), json!(["full_attention", "sliding_attention"]));
    for kind in ["qwen2", "qwen3"] {
        assert_eq!(context(kind, std::slice::from_ref(&window)), 32_768);
        assert_eq!(context(kind, &[window.clone(), used.clone()]), 100);
        assert_eq!(context(kind, std::slice::from_ref(&used)), 4096);
        assert_eq!(context(kind, &[window.clone(), used.clone(), ("layer_types", full.clone())]), 32_768);
        assert_eq!(context(kind, &[window.clone(), used.clone(), ("layer_types", mixed.clone())]), 100);
    }
    assert_eq!(context("mistral", std::slice::from_ref(&window)), 100);
    assert_eq!(context("mistral", &[("max_position_embeddings", json!(50)), window.clone()]), 50);
    assert_eq!(context("llama", &[window, used, ("layer_types", mixed)]), 2048);
}

#[test]
fn both_forms_of_the_rotary_base_are_read() {
    let theta = |settings: Value| {
        let mut config = sizes_alone("llama").0;
        settings.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        read(&config).unwrap().rope_theta
    };
    assert_eq!(theta(json!({ "rope_theta": 5e5, "rope_scaling": null })), 5e5);
    assert_eq!(theta(json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 1e6 } })), 1e6);
    assert_eq!(theta(json!({ "rope_parameters": { "rope_type": "default" }, "rope_theta": 7e3 })), 7e3);
    assert_eq!(theta(json!({ "rope_theta": 5e5, "rope_scaling": { "type": "default" }, "partial_rotary_factor": 1.0 })), 5e5);
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let yarn = json!({ "rope_type": "yarn", "factor": 4.0 });
    for (kind, settings, words) in [
        ("llama", json!({ "rope_scaling": { "rope_type": "llama3", "factor": 8.0 } }), ["rope_scaling", "\"llama3\""]),
        ("qwen3", json!({ "rope_parameters": { "rope_theta": 1e6 }, "rope_scaling": yarn }), ["rope_scaling", "\"yarn\""]),
        ("qwen2", json!({ "rope_scaling": { "type": 3 } }), ["rope_scaling", "found 3"]),
        ("qwen2", json!({ "rope_scaling": "dynamic" }), ["rope_scaling", "\"dynamic\""]),
        ("llama", json!({ "partial_rotary_factor": 0.5 }), ["partial_rotary_factor", "found 0.5"]),
        ("llama", json!({ "rope_parameters": { "partial_rotary_factor": 0.25 } }), ["partial_rotary_factor", "found 0.25"]),
        ("llama", json!({ "mlp_bias": true }), ["mlp_bias", "biases of the MLP"]),
        ("qwen3", json!({ "layer_types": ["chunked_attention"] }), ["layer_types", "\"chunked_attention\""]),
        ("qwen3", json!({ "layer_types": "full_attention" }), ["layer_types", "a list of"]),
        ("mistral", json!({ "sliding_window": 0 }), ["sliding_window", "found 0"]),
        ("mistral", json!({ "architectures": ["MixtralForCausalLM"] }), ["architectures", "\"MixtralForCausalLM\""]),
        ("llama", json!({ "architectures": [] }), ["architectures", "found nothing"]),
    ] {
        let mut config = sizes_alone(kind).0;
        settings.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        let error = read(&config).unwrap_err();
        for word in words {
            assert!(error.contains(word) && error.contains("config.json: "), "{settings}: {error}");
        }
    }
}

#[test]
fn a_qwen3_folder_without_its_norms_is_refused() {
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(folder("llama").join("model.safetensors"), copy.path().join("model.safetensors")).unwrap();
    let config = std::fs::read_to_string(folder("llama").join("config.json")).unwrap();
    std::fs::write(copy.path().join("config.json"), config.replace("LlamaForCausalLM", "Qwen3ForCausalLM")).unwrap();
    let error =
        Decoder::from_folder(copy.path(), Holding::AsStored, Precision::F32, &Device::Cpu, &RunContext::default()).unwrap_err();
    assert!(error.to_string().contains("self_attn.q_norm.weight missing (expected [12])"), "{error}");
}

/// A column count that packed words cannot hold is found where names and shapes are, before a cache is begun for such a teacher.
#[test]
fn packed_layers_whose_outputs_fill_no_words_are_refused_before_loading() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
        "num_attention_heads": 1, "vocab_size": 4,
        "quantization_config": { "quant_method": "awq", "bits": 4, "group_size": 4, "zero_point": true }
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let tensor = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    let mut tensors = HashMap::new();
    for (name, shape) in [("embed_tokens", vec![4, 8]), ("norm", vec![8])] {
        tensors.insert(format!("model.{name}.weight"), tensor(&shape, DType::F32));
    }
    tensors.insert("lm_head.weight".into(), tensor(&[4, 8], DType::F32));
    for norm in ["input_layernorm", "post_attention_layernorm"] {
        tensors.insert(format!("model.layers.0.{norm}.weight"), tensor(&[8], DType::F32));
    }
    for (projection, inputs, outputs) in [
        ("self_attn.q_proj", 8, 8),
        ("self_attn.k_proj", 8, 8),
        ("self_attn.v_proj", 8, 8),
        ("self_attn.o_proj", 8, 8),
        ("mlp.gate_proj", 8, 12),
        ("mlp.up_proj", 8, 12),
        ("mlp.down_proj", 12, 8),
    ] {
        let name = |part: &str| format!("model.layers.0.{projection}.{part}");
        tensors.insert(name("qweight"), tensor(&[inputs, outputs / 8], DType::I32));
        tensors.insert(name("qzeros"), tensor(&[inputs / 4, outputs / 8], DType::I32));
        tensors.insert(name("scales"), tensor(&[inputs / 4, outputs], DType::F16));
    }
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors")).unwrap();
    let config = ModelConfig::from_folder(folder.path()).unwrap();
    let weights = Weights::open(folder.path()).unwrap();
    let error = Decoder::check_folder(&config, &weights).unwrap_err().to_string();
    assert!(error.contains("mlp.gate_proj") && error.contains("a multiple of 8") && error.ends_with("found 12"), "{error}");
}
