//! Hugging Face model folders: `config.json`, safetensors, tokenizer.
//!
//! Owns how the two decoders are written: the teacher as AWQ in two safetensors files with an index, everything else in f16;
//! the student dense, in bf16, in one file. Refuses to read anything.

use super::MiniatureError;
use super::awq_pack::{self, AwqMatrix};
use super::decoder::{Decoder, DecoderShape, Head};
use super::tokenizer::{MiniatureTokenizer, pretty};
use super::{CONTEXT, decoder};
use candle_core::Tensor;
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Files of the teacher.
const TEACHER_FILES: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
/// File of the student.
const STUDENT_FILE: &str = "model.safetensors";

/// A tensor as it lies in a file.
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Writes an AWQ folder: the linear layers of the decoder layers packed in groups of `group` inputs, the rest in f16.
///
/// The first half of the tensors, by their names, lies in the first file; the cut need not follow modules. Errors: a layer that cannot be packed, a file that cannot be written.
pub fn write_awq(folder: &Path, decoder: &Decoder, tokenizer: &MiniatureTokenizer, group: usize) -> crate::Result<()> {
    let mut tensors = BTreeMap::new();
    for (name, tensor) in decoder.tensors() {
        match name.strip_suffix(".weight") {
            Some(module) if decoder::is_linear(module) => {
                let (outputs, inputs) = tensor.dims2()?;
                let packed = awq_pack::quantise(&values(tensor)?, outputs, inputs, group)?;
                tensors.extend(stored(module, &packed));
            }
            _ => {
                let bytes = values(tensor)?.into_iter().flat_map(|value| f16::from_f32(value).to_le_bytes()).collect();
                tensors.insert(name.to_string(), Stored { dtype: Dtype::F16, shape: tensor.dims().to_vec(), bytes });
            }
        }
    }
    create(folder)?;
    write_two_files(folder, &tensors)?;
    let quantization = json!({
        "bits": 4, "group_size": group, "modules_to_not_convert": null, "quant_method": "awq", "version": "gemm",
        "zero_point": true,
    });
    write_rest(folder, decoder.shape(), tokenizer, "float16", Some(quantization))
}

/// Writes a dense folder in bf16: one safetensors file. Errors: a file that cannot be written.
pub fn write_dense(folder: &Path, decoder: &Decoder, tokenizer: &MiniatureTokenizer) -> crate::Result<()> {
    let mut tensors = BTreeMap::new();
    for (name, tensor) in decoder.tensors() {
        let bytes = values(tensor)?.into_iter().flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect();
        tensors.insert(name.to_string(), Stored { dtype: Dtype::BF16, shape: tensor.dims().to_vec(), bytes });
    }
    create(folder)?;
    write_safetensors(&folder.join(STUDENT_FILE), tensors.iter())?;
    write_rest(folder, decoder.shape(), tokenizer, "bfloat16", None)
}

/// Creates a folder and its parents.
pub fn create(folder: &Path) -> Result<(), MiniatureError> {
    std::fs::create_dir_all(folder).map_err(|source| MiniatureError::Io { path: folder.into(), source })
}

/// Writes a whole file.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), MiniatureError> {
    std::fs::write(path, bytes).map_err(|source| MiniatureError::Io { path: path.into(), source })
}

/// config.json and the tokenizer's files.
fn write_rest(
    folder: &Path,
    shape: &DecoderShape,
    tokenizer: &MiniatureTokenizer,
    dtype: &str,
    quantization: Option<Value>,
) -> crate::Result<()> {
    let [end_of_text, _, im_end] = tokenizer.special();
    let mut config = json!({
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": im_end,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": CONTEXT,
        "max_window_layers": shape.layers,
        "model_type": "qwen2",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "sliding_window": CONTEXT,
        "tie_word_embeddings": shape.head == Head::Tied,
        "torch_dtype": dtype,
        "use_cache": true,
        "use_sliding_window": false,
        "vocab_size": shape.vocabulary,
    });
    if let (Some(quantization), Some(entries)) = (quantization, config.as_object_mut()) {
        entries.insert("quantization_config".into(), quantization);
    }
    write(&folder.join("config.json"), pretty("config.json", &config)?.as_bytes())?;
    for (name, content) in tokenizer.files(CONTEXT as usize)? {
        write(&folder.join(name), content.as_bytes())?;
    }
    Ok(())
}

fn write_two_files(folder: &Path, tensors: &BTreeMap<String, Stored>) -> Result<(), MiniatureError> {
    let total: usize = tensors.values().map(|tensor| tensor.bytes.len()).sum();
    let file = |place: usize| if place * 2 < tensors.len() { TEACHER_FILES[0] } else { TEACHER_FILES[1] };
    let weight_map: serde_json::Map<String, Value> =
        tensors.keys().enumerate().map(|(place, name)| (name.clone(), file(place).into())).collect();
    for file in TEACHER_FILES {
        let here = tensors.iter().filter(|(name, _)| weight_map.get(*name).is_some_and(|place| place == file));
        write_safetensors(&folder.join(file), here)?;
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    write(&folder.join("model.safetensors.index.json"), pretty("model.safetensors.index.json", &index)?.as_bytes())
}

fn write_safetensors<'a>(path: &Path, tensors: impl Iterator<Item = (&'a String, &'a Stored)>) -> Result<(), MiniatureError> {
    let wrong = |source| MiniatureError::Safetensors { path: path.into(), source };
    let views = tensors
        .map(|(name, tensor)| Ok((name, TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes)?)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(wrong)?;
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    write(path, &safetensors::serialize(views, Some(metadata)).map_err(wrong)?)
}

/// The three tensors of a packed layer.
fn stored(module: &str, packed: &AwqMatrix) -> [(String, Stored); 3] {
    let (groups, words) = (packed.inputs / packed.group, packed.outputs / 8);
    let le = |words: &[i32]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let scales = packed.scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    [
        (
            format!("{module}.qweight"),
            Stored { dtype: Dtype::I32, shape: vec![packed.inputs, words], bytes: le(&packed.qweight) },
        ),
        (format!("{module}.qzeros"), Stored { dtype: Dtype::I32, shape: vec![groups, words], bytes: le(&packed.qzeros) }),
        (format!("{module}.scales"), Stored { dtype: Dtype::F16, shape: vec![groups, packed.outputs], bytes: scales }),
    ]
}

fn values(tensor: &Tensor) -> crate::Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}
