//! The decoder: embedding, layers, final norm and head. One forward for the teacher, the student and whatever comes later.
//!
//! Owns reading a folder into layers, and the order of things; the arithmetic is in `layer.rs` and `ops`. A pack goes in, hidden
//! states come out; the head is handed to whoever needs logits, so that [T, V] never has to exist here.

use super::ModelError;
use super::config::{Biases, ModelConfig, Quantization};
use super::layer::{Geometry, Layer, PROJECTIONS};
use super::weights::Weights;
use crate::data::pack::Pack;
use crate::linear::awq::{AwqWeight, PER_WORD};
use crate::linear::nf4::Nf4Weight;
use crate::linear::{Linear, Weight};
use crate::ops::{rms_norm, with_f32};
use crate::run::RunContext;
use candle_core::{DType, Device, Tensor};
use half::f16;
use safetensors::Dtype;
use std::path::Path;

/// How linear layers are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holding {
    /// As the folder stores them: AWQ stays packed, dense becomes f32.
    AsStored,
    /// Quantised to NF4 with double quantisation while reading (dense folders only).
    Nf4,
}

/// A decoder of the Qwen / Llama family.
#[derive(Debug, Clone)]
pub struct Decoder {
    /// Sizes.
    pub config: ModelConfig,
    /// [V, H] in the stored dtype.
    embed_tokens: Tensor,
    /// The layers, first to last.
    pub layers: Vec<Layer>,
    /// f32 `[H]`.
    norm: Tensor,
    /// f32 [V, H]; the embedding where the config ties them.
    head: Tensor,
    device: Device,
}

impl Decoder {
    /// Reads the model folder. Errors: a bad config, missing or misshapen tensors (all named at once), AWQ where dense is needed.
    pub fn from_folder(folder: &Path, holding: Holding, device: &Device, context: &RunContext) -> Result<Self, ModelError> {
        let config = ModelConfig::from_folder(folder)?;
        if holding == Holding::Nf4 {
            config.check_dense(folder)?;
        }
        let weights = Weights::open(folder)?;
        Reader { config: &config, weights: &weights, holding, device }.decoder(context).map_err(|e| match e {
            ReadError::Model(e) => e,
            ReadError::Tensor(source) => ModelError::Tensor { folder: folder.to_path_buf(), source },
        })
    }

    /// Checks config, tensor names and shapes of a model folder without loading it. Errors: as
    /// [`from_folder`](Self::from_folder).
    pub fn check_folder(config: &ModelConfig, weights: &Weights) -> Result<(), ModelError> {
        Reader { config, weights, holding: Holding::AsStored, device: &Device::Cpu }.check()
    }

    /// Hidden states before the first layer, f32 [T, H]. Errors: an id beyond the embedding.
    pub fn embed(&self, input_ids: &[u32]) -> candle_core::Result<Tensor> {
        if let Some(id) = input_ids.iter().find(|id| **id as usize >= self.config.vocab_size) {
            candle_core::bail!("token id {id}: expected ids below the model's vocabulary size, {}", self.config.vocab_size);
        }
        let ids = Tensor::new(input_ids, &self.device)?;
        self.embed_tokens.index_select(&ids, 0)?.to_dtype(DType::F32)
    }

    /// Hidden states after the last layer, before the final norm, f32 [T, H].
    pub fn hidden(&self, pack: &Pack) -> candle_core::Result<Tensor> {
        let geometry = Geometry::new(pack, &self.config);
        let mut x = self.embed(pack.input_ids())?;
        for layer in &self.layers {
            x = layer.forward(&x, &geometry)?;
        }
        Ok(x)
    }

    /// The final norm of x [n, H].
    pub fn final_norm(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        rms_norm::forward(x, &self.norm, self.config.rms_norm_eps)
    }

    /// Backward of [`final_norm`](Self::final_norm).
    pub fn final_norm_backward(&self, x: &Tensor, dy: &Tensor) -> candle_core::Result<Tensor> {
        rms_norm::backward(x, &self.norm, self.config.rms_norm_eps, dy)
    }

    /// The head, f32 [V, H]: logits = normed hidden · headᵀ.
    pub fn head(&self) -> &Tensor {
        &self.head
    }

    /// Where the model computes.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

/// Reads one folder.
struct Reader<'a> {
    config: &'a ModelConfig,
    weights: &'a Weights,
    holding: Holding,
    device: &'a Device,
}

enum ReadError {
    Model(ModelError),
    Tensor(candle_core::Error),
}

impl From<ModelError> for ReadError {
    fn from(e: ModelError) -> Self {
        Self::Model(e)
    }
}

impl From<candle_core::Error> for ReadError {
    fn from(e: candle_core::Error) -> Self {
        Self::Tensor(e)
    }
}

impl Reader<'_> {
    fn decoder(&self, context: &RunContext) -> Result<Decoder, ReadError> {
        let c = self.config;
        self.check()?;
        let embed_tokens = self.weights.tensor("model.embed_tokens.weight", &[c.vocab_size, c.hidden_size], self.device)?;
        let head = match c.tied {
            true => embed_tokens.to_dtype(DType::F32)?,
            false => self.float("lm_head.weight", &[c.vocab_size, c.hidden_size])?,
        };
        context.progress.begin("loading the model", "layers", c.layers as u64);
        let mut layers = Vec::with_capacity(c.layers);
        for i in 0..c.layers {
            if context.stopping() {
                return Err(ReadError::Model(ModelError::Stopped { place: self.weights.place().to_path_buf() }));
            }
            layers.push(self.layer(i)?);
            context.progress.add(1);
        }
        context.progress.end();
        let norm = self.float("model.norm.weight", &[c.hidden_size])?;
        Ok(Decoder { config: c.clone(), embed_tokens, layers, norm, head, device: self.device.clone() })
    }

    /// Group size first, since a wrong one makes every tensor look misshapen; then all names and shapes.
    fn check(&self) -> Result<(), ModelError> {
        let name = format!("model.layers.0.{}", PROJECTIONS[0]);
        let (_, inputs) = features(self.config, 0);
        let scales = self.weights.info(&format!("{name}.scales"));
        if let (Quantization::Awq { group: said, .. }, Some(group), Some([groups, _])) =
            (&self.config.quantization, self.awq_group(&name, inputs), scales.as_ref().map(|s| s.shape.as_slice()))
            && *groups > 0
            && inputs.is_multiple_of(*groups)
            && *groups * group != inputs
        {
            let stored = inputs / groups;
            return Err(ModelError::Config {
                path: said.file.clone(),
                key: said.key.clone(),
                expected: format!("{stored}, as {name}.scales has {groups} rows for {inputs} inputs"),
                found: said.size.map_or("-1 (all inputs)".into(), |size| size.to_string()),
            });
        }
        let expected = self.expected();
        self.weights.require(&expected)?;
        expected.iter().try_for_each(|(name, shape)| self.check_dtype(name, shape))
    }

    /// AWQ's parts have one dtype each; every other tensor is a float.
    fn check_dtype(&self, name: &str, shape: &[usize]) -> Result<(), ModelError> {
        let dtype = match name.rsplit('.').next() {
            Some("qweight" | "qzeros") => Dtype::I32,
            Some("scales") => Dtype::F16,
            _ => match self.weights.info(name).map(|info| info.dtype) {
                Some(float @ (Dtype::F16 | Dtype::BF16)) => float,
                _ => Dtype::F32,
            },
        };
        self.weights.bytes(name, dtype, shape).map(|_| ())
    }

    fn layer(&self, i: usize) -> Result<Layer, ReadError> {
        let norm = |name: &str| self.float(&format!("model.layers.{i}.{name}.weight"), &[self.config.hidden_size]);
        let head_norm = |name: &str| match self.config.head_norms {
            true => self.float(&format!("model.layers.{i}.{name}.weight"), &[self.config.head_dim]).map(Some),
            false => Ok(None),
        };
        let linear = |p: usize| self.linear(&format!("model.layers.{i}.{}", PROJECTIONS[p]), p);
        Ok(Layer {
            input_layernorm: norm("input_layernorm")?,
            q_proj: linear(0)?,
            k_proj: linear(1)?,
            v_proj: linear(2)?,
            q_norm: head_norm("self_attn.q_norm")?,
            k_norm: head_norm("self_attn.k_norm")?,
            o_proj: linear(3)?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            gate_proj: linear(4)?,
            up_proj: linear(5)?,
            down_proj: linear(6)?,
            head_dim: self.config.head_dim,
            eps: self.config.rms_norm_eps,
        })
    }

    fn linear(&self, name: &str, projection: usize) -> Result<Linear, ReadError> {
        let (outputs, inputs) = features(self.config, projection);
        let weight = match (self.awq_group(name, inputs), self.holding) {
            (Some(group), _) => Weight::Awq(self.awq(name, inputs, outputs, group)?),
            (None, Holding::AsStored) => Weight::Dense(self.float(&format!("{name}.weight"), &[outputs, inputs])?),
            (None, Holding::Nf4) => {
                let dense = self.weights.tensor(&format!("{name}.weight"), &[outputs, inputs], &Device::Cpu)?;
                let dense = dense.to_dtype(DType::F32)?;
                let nf4 = with_f32(&dense, |values| Ok(Nf4Weight::quantize(values, outputs, inputs)))?;
                let not_finite = || candle_core::Error::Msg(format!("{name}.weight: holds a value that is not finite"));
                Weight::Nf4(nf4.ok_or_else(not_finite)?)
            }
        };
        let bias = match has_bias(self.config.biases, projection) {
            true => Some(self.float(&format!("{name}.bias"), &[outputs])?),
            false => None,
        };
        Ok(Linear::new(weight, bias))
    }

    fn awq(&self, name: &str, inputs: usize, outputs: usize, group: usize) -> Result<AwqWeight, ReadError> {
        let (words, groups) = (outputs / PER_WORD, inputs / group);
        let part = |suffix: &str, dtype, shape: [usize; 2]| self.weights.bytes(&format!("{name}.{suffix}"), dtype, &shape);
        let packed = |bytes: &[u8]| bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let qweight = packed(part("qweight", Dtype::I32, [inputs, words])?);
        let qzeros = packed(part("qzeros", Dtype::I32, [groups, words])?);
        let scales = part("scales", Dtype::F16, [groups, outputs])?;
        let scales = scales.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
        AwqWeight::new(inputs, outputs, group, qweight, qzeros, scales).ok_or_else(|| {
            let tensor =
                format!("{name}: {inputs} inputs and {outputs} outputs cannot be cut into groups of {group} and words of 8");
            ReadError::Tensor(candle_core::Error::Msg(tensor))
        })
    }

    /// Group size of a module stored as AWQ; `None` for a dense one.
    fn awq_group(&self, name: &str, inputs: usize) -> Option<usize> {
        match &self.config.quantization {
            Quantization::Awq { group, keep_dense } if !keep_dense.iter().any(|part| name.contains(part.as_str())) => {
                Some(group.size.unwrap_or(inputs))
            }
            _ => None,
        }
    }

    fn float(&self, name: &str, shape: &[usize]) -> Result<Tensor, ReadError> {
        Ok(self.weights.tensor(name, shape, self.device)?.to_dtype(DType::F32)?)
    }

    /// Every tensor the model needs, so that all that is wrong is said at once and before anything is allocated.
    fn expected(&self) -> Vec<(String, Vec<usize>)> {
        let c = self.config;
        let mut all = vec![("model.embed_tokens.weight".to_string(), vec![c.vocab_size, c.hidden_size])];
        for i in 0..c.layers {
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                all.push((format!("model.layers.{i}.{norm}.weight"), vec![c.hidden_size]));
            }
            for norm in ["self_attn.q_norm", "self_attn.k_norm"].iter().filter(|_| c.head_norms) {
                all.push((format!("model.layers.{i}.{norm}.weight"), vec![c.head_dim]));
            }
            for (p, projection) in PROJECTIONS.iter().enumerate() {
                let (name, (outputs, inputs)) = (format!("model.layers.{i}.{projection}"), features(c, p));
                match self.awq_group(&name, inputs) {
                    None => all.push((format!("{name}.weight"), vec![outputs, inputs])),
                    Some(group) => all.extend([
                        (format!("{name}.qweight"), vec![inputs, outputs / PER_WORD]),
                        (format!("{name}.qzeros"), vec![inputs / group, outputs / PER_WORD]),
                        (format!("{name}.scales"), vec![inputs / group, outputs]),
                    ]),
                }
                if has_bias(c.biases, p) {
                    all.push((format!("{name}.bias"), vec![outputs]));
                }
            }
        }
        all.push(("model.norm.weight".into(), vec![c.hidden_size]));
        if !c.tied {
            all.push(("lm_head.weight".into(), vec![c.vocab_size, c.hidden_size]));
        }
        all
    }
}

/// (out, in) of a projection.
pub fn features(c: &ModelConfig, projection: usize) -> (usize, usize) {
    match projection {
        0 => (c.heads * c.head_dim, c.hidden_size),
        1 | 2 => (c.kv_heads * c.head_dim, c.hidden_size),
        3 => (c.hidden_size, c.heads * c.head_dim),
        4 | 5 => (c.intermediate_size, c.hidden_size),
        _ => (c.hidden_size, c.intermediate_size),
    }
}

fn has_bias(biases: Biases, projection: usize) -> bool {
    match biases {
        Biases::None => false,
        Biases::QueryKeyValue => projection < 3,
        Biases::Attention => projection < 4,
    }
}
