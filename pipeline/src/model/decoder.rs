//! The decoder: embedding, layers, final norm and head. One forward for the teacher, the student and whatever comes later.
//!
//! Owns reading a folder into layers, and the order of things; the arithmetic is in `layer.rs` and `ops`. A pack goes in, hidden
//! states come out; the head is handed to whoever needs logits, so that [T, V] never has to exist here.

use super::ModelError;
use super::config::{Biases, ModelConfig, Quantization};
use super::layer::{Geometry, Layer, PROJECTIONS};
use super::turns::Turns;
use super::weights::Weights;
#[cfg(feature = "cuda")]
use crate::cuda::pinned::send;
use crate::data::pack::Pack;
use crate::kernel::Precision;
use crate::linear::awq::{AwqWeight, PER_WORD};
use crate::linear::dense::{DenseWeight, Stored};
use crate::linear::nf4::Nf4Weight;
use crate::linear::{DeviceWeight, Head, Linear, Weight, forward_all};
use crate::ops::{rms_norm, with_f32};
use crate::run::RunContext;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use safetensors::Dtype;
use std::path::Path;
use std::sync::Arc;

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
    /// [V, H].
    embed_tokens: DenseWeight,
    /// The layers, first to last.
    pub layers: Vec<Layer>,
    /// f32 `[H]`.
    norm: Tensor,
    /// [V, H]; the embedding where the config ties them.
    head: DenseWeight,
    /// Copies of both on a GPU.
    embed_placed: Option<DeviceWeight>,
    head_placed: Option<DeviceWeight>,
    device: Device,
    /// The files that weights held as stored lie in.
    weights: Arc<Weights>,
    precision: Precision,
}

impl Decoder {
    /// Reads the model folder. Errors: a bad config, missing or misshapen tensors (all named at once), AWQ where dense is needed.
    ///
    /// Weights held as stored are not read here: they stay in the mapped files until they are needed.
    pub fn from_folder(
        folder: &Path,
        holding: Holding,
        precision: Precision,
        device: &Device,
        context: &RunContext,
    ) -> Result<Self, ModelError> {
        let config = ModelConfig::from_folder(folder)?;
        if holding == Holding::Nf4 {
            config.check_dense(folder)?;
        }
        let weights = Arc::new(Weights::open(folder)?);
        Reader { config: &config, weights: &weights, holding, precision, device }.decoder(&weights, context).map_err(
            |e| match e {
                ReadError::Model(e) => e,
                ReadError::Tensor(source) => ModelError::Tensor { folder: folder.to_path_buf(), source },
            },
        )
    }

    /// Checks config, tensor names and shapes of a model folder without loading it. Errors: as
    /// [`from_folder`](Self::from_folder).
    pub fn check_folder(config: &ModelConfig, weights: &Weights) -> Result<(), ModelError> {
        let (holding, precision) = (Holding::AsStored, Precision::default());
        Reader { config, weights, holding, precision, device: &Device::Cpu }.check()
    }

    /// Hidden states before the first layer, f32 [T, H]. Errors: an id beyond the embedding.
    pub fn embed(&self, input_ids: &[u32]) -> candle_core::Result<Tensor> {
        if let Some(id) = input_ids.iter().find(|id| **id as usize >= self.config.vocab_size) {
            candle_core::bail!("token id {id}: expected ids below the model's vocabulary size, {}", self.config.vocab_size);
        }
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = &self.device {
            return match &self.embed_placed {
                Some(table) => table.rows(&send(input_ids, input_ids.len(), device)?),
                None => DeviceWeight::rows_of_host(&self.embed_tokens, input_ids, device),
            };
        }
        let h = self.config.hidden_size;
        let mut x = vec![0f32; input_ids.len() * h];
        let rows = x.par_chunks_mut(h).zip(input_ids);
        rows.for_each(|(row, id)| self.embed_tokens.decode(*id as usize, 0, row));
        Tensor::from_vec(x, (input_ids.len(), h), &self.device)
    }

    /// Hidden states after the last layer, before the final norm, f32 [T, H].
    pub fn hidden(&self, pack: &Pack) -> candle_core::Result<Tensor> {
        let geometry = Geometry::new(pack, &self.config, &self.device)?;
        let mut x = self.embed(pack.input_ids())?;
        for layer in &self.layers {
            x = layer.forward(&x, &geometry, None)?;
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

    /// The head [V, H]: logits = normed hidden · headᵀ.
    pub fn head(&self) -> &DenseWeight {
        &self.head
    }

    /// The same as a loss takes it.
    pub fn head_of_loss(&self) -> Head<'_> {
        Head { weight: &self.head, precision: self.precision, placed: self.head_placed.as_ref() }
    }

    /// Copies all weights that are not there yet to the device, if it is a GPU; but not an embedding of its own, of which a pack needs no
    /// more than a few rows.
    pub fn place(&mut self, context: &RunContext) -> candle_core::Result<()> {
        self.place_layers(context)?;
        if self.head_placed.is_some() {
            return Ok(());
        }
        self.head_placed = Weight::Dense(self.head.clone()).placed(&self.device)?;
        if self.config.tied {
            self.embed_placed = self.head_placed.clone();
        }
        Ok(())
    }

    /// The same of the layers alone.
    pub fn place_layers(&mut self, context: &RunContext) -> candle_core::Result<()> {
        let there = |layer: &Layer| layer.linears().iter().all(|linear| linear.placed.is_some());
        if self.device.is_cpu() || self.layers.iter().all(there) {
            return Ok(());
        }
        context.progress.begin("copying the model to the GPU", "layers", self.layers.len() as u64);
        let mut placed = Vec::with_capacity(self.layers.len());
        {
            let mut turns = Turns::new(self, true)?;
            for i in 0..self.layers.len() {
                placed.push(turns.begin(i)?);
                context.progress.add(1);
            }
        }
        self.layers = placed;
        context.progress.end();
        Ok(())
    }

    /// The same of the embedding alone; without it, rows are looked up in the host's memory.
    pub fn place_embedding(&mut self) -> candle_core::Result<()> {
        self.embed_placed = Weight::Dense(self.embed_tokens.clone()).placed(&self.device)?;
        Ok(())
    }

    /// Logits f32 [n, V] of normed hidden states x [n, H].
    pub fn logits(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut head = Linear::new(Weight::Dense(self.head.clone()), None);
        head.placed = self.head_placed.clone();
        let [logits] = forward_all([&head], x, self.precision)?;
        Ok(logits)
    }

    /// What the factors of the frozen weights' products are rounded to.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Where the model computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Brings what layer `i` has in files into memory, waiting for the disk. Nothing where there is no such layer.
    pub fn populate_layer(&self, i: usize) {
        self.weights.populate(self.stored_names(i).iter().map(String::as_str));
    }

    /// Lets go of what layer `i` has in files.
    pub fn release_layer(&self, i: usize) {
        self.weights.release(self.stored_names(i).iter().map(String::as_str));
    }

    /// Lets go of the embedding and the head.
    pub fn release_ends(&self) {
        self.weights.release([EMBEDDING, HEAD]);
    }

    fn stored_names(&self, i: usize) -> Vec<String> {
        if i >= self.layers.len() {
            return Vec::new();
        }
        let parts = ["weight", "qweight", "qzeros", "scales"];
        PROJECTIONS.iter().flat_map(|p| parts.map(|part| format!("model.layers.{i}.{p}.{part}"))).collect()
    }
}

/// Names of the tensors at both ends.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const HEAD: &str = "lm_head.weight";

/// Reads one folder.
struct Reader<'a> {
    config: &'a ModelConfig,
    weights: &'a Weights,
    holding: Holding,
    precision: Precision,
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
    fn decoder(&self, files: &Arc<Weights>, context: &RunContext) -> Result<Decoder, ReadError> {
        let c = self.config;
        self.check()?;
        let embed_tokens = self.dense(EMBEDDING, c.vocab_size, c.hidden_size)?;
        let head = if c.tied { embed_tokens.clone() } else { self.dense(HEAD, c.vocab_size, c.hidden_size)? };
        context.progress.begin("loading the model", "layers", c.layers as u64);
        let mut layers = Vec::with_capacity(c.layers);
        for i in 0..c.layers {
            if context.stopping() {
                return Err(ReadError::Model(ModelError::Stopped { place: self.weights.place().to_path_buf() }));
            }
            layers.push(self.layer(i)?);
            if self.holding == Holding::Nf4 {
                // What was read has its own copy now, a seventh of the size; the files' pages go.
                let names = PROJECTIONS.iter().map(|p| format!("model.layers.{i}.{p}.weight")).collect::<Vec<_>>();
                self.weights.release(names.iter().map(String::as_str));
            }
            context.progress.add(1);
        }
        context.progress.end();
        let norm = self.float("model.norm.weight", &[c.hidden_size])?;
        let (device, weights) = (self.device.clone(), Arc::clone(files));
        Ok(Decoder {
            config: c.clone(),
            embed_tokens,
            layers,
            norm,
            head,
            embed_placed: None,
            head_placed: None,
            device,
            weights,
            precision: self.precision,
        })
    }

    /// Group size first, since a wrong one makes every tensor look misshapen; then all names and shapes; then what packed words hold.
    fn check(&self) -> Result<(), ModelError> {
        let name = format!("model.layers.0.{}", PROJECTIONS[0]);
        let (_, inputs) = features(self.config, 0);
        let scales = self.weights.info(&format!("{name}.scales"));
        if let (Quantization::Awq { group: said, .. }, Some(group), Some([groups, _])) =
            (&self.config.quantization, awq_group(self.config, &name, inputs), scales.as_ref().map(|s| s.shape.as_slice()))
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
        let expected = expected(self.config);
        self.weights.require(&expected)?;
        expected.iter().try_for_each(|(name, shape)| self.check_dtype(name, shape))?;
        (0..self.config.layers).try_for_each(|i| self.check_words(i))
    }

    /// Packed layers have as many outputs as their words: the shapes alone would leave the last few of them out.
    fn check_words(&self, layer: usize) -> Result<(), ModelError> {
        for (p, projection) in PROJECTIONS.iter().enumerate() {
            let (name, (outputs, inputs)) = (format!("model.layers.{layer}.{projection}"), features(self.config, p));
            if awq_group(self.config, &name, inputs).is_some() && !outputs.is_multiple_of(PER_WORD) {
                return Err(ModelError::Config {
                    path: self.weights.place().join("config.json"),
                    key: format!("outputs of {name}"),
                    expected: format!("a multiple of {PER_WORD}, as many as packed words hold"),
                    found: outputs.to_string(),
                });
            }
        }
        Ok(())
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
            mlp_rows: None,
            head_dim: self.config.head_dim,
            eps: self.config.rms_norm_eps,
            precision: self.precision,
        })
    }

    fn linear(&self, name: &str, projection: usize) -> Result<Linear, ReadError> {
        let (outputs, inputs) = features(self.config, projection);
        let weight = match (awq_group(self.config, name, inputs), self.holding) {
            (Some(group), _) => Weight::Awq(self.awq(name, inputs, outputs, group)?),
            (None, Holding::AsStored) => Weight::Dense(self.dense(&format!("{name}.weight"), outputs, inputs)?),
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
        let part = |suffix: &str, dtype, shape: [usize; 2]| self.weights.shared(&format!("{name}.{suffix}"), dtype, &shape);
        let qweight = part("qweight", Dtype::I32, [inputs, words])?;
        let qzeros = part("qzeros", Dtype::I32, [groups, words])?;
        let scales = part("scales", Dtype::F16, [groups, outputs])?;
        AwqWeight::new(inputs, outputs, group, qweight, qzeros, scales).ok_or_else(|| {
            let tensor =
                format!("{name}: {inputs} inputs and {outputs} outputs cannot be cut into groups of {group} and words of 8");
            ReadError::Tensor(candle_core::Error::Msg(tensor))
        })
    }

    /// A dense float tensor [outputs, inputs], left where it lies.
    fn dense(&self, name: &str, outputs: usize, inputs: usize) -> Result<DenseWeight, ReadError> {
        let (dtype, stored) = match self.weights.info(name).map(|info| info.dtype) {
            Some(Dtype::F16) => (Dtype::F16, Stored::F16),
            Some(Dtype::BF16) => (Dtype::BF16, Stored::Bf16),
            _ => (Dtype::F32, Stored::F32),
        };
        let bytes = self.weights.shared(name, dtype, &[outputs, inputs])?;
        let found = bytes.len();
        DenseWeight::new(outputs, inputs, stored, bytes).ok_or_else(|| {
            ReadError::Tensor(candle_core::Error::Msg(format!("{name}: {outputs} by {inputs} values do not fit {found} bytes")))
        })
    }

    fn float(&self, name: &str, shape: &[usize]) -> Result<Tensor, ReadError> {
        let values = self.weights.tensor(name, shape, &Device::Cpu)?.to_dtype(DType::F32)?;
        Ok(values.to_device(self.device)?)
    }
}

/// Every tensor that a model of this config needs, with its shape, so that all that is wrong is said at once and before anything is allocated.
pub(super) fn expected(c: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let mut all = vec![(EMBEDDING.to_string(), vec![c.vocab_size, c.hidden_size])];
    for i in 0..c.layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            all.push((format!("model.layers.{i}.{norm}.weight"), vec![c.hidden_size]));
        }
        for norm in ["self_attn.q_norm", "self_attn.k_norm"].iter().filter(|_| c.head_norms) {
            all.push((format!("model.layers.{i}.{norm}.weight"), vec![c.head_dim]));
        }
        for (p, projection) in PROJECTIONS.iter().enumerate() {
            let (name, (outputs, inputs)) = (format!("model.layers.{i}.{projection}"), features(c, p));
            match awq_group(c, &name, inputs) {
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
        all.push((HEAD.into(), vec![c.vocab_size, c.hidden_size]));
    }
    all
}

/// Group size of a module stored as AWQ; `None` for a dense one.
fn awq_group(c: &ModelConfig, name: &str, inputs: usize) -> Option<usize> {
    match &c.quantization {
        Quantization::Awq { group, keep_dense } if !keep_dense.iter().any(|part| name.contains(part.as_str())) => {
            Some(group.size.unwrap_or(inputs))
        }
        _ => None,
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

/// Whether a projection has a bias.
pub(crate) fn has_bias(biases: Biases, projection: usize) -> bool {
    match biases {
        Biases::None => false,
        Biases::QueryKeyValue => projection < 3,
        Biases::Attention => projection < 4,
    }
}
