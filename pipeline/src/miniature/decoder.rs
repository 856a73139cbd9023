//! A small decoder of Qwen2's architecture, written with the tensor library's differentiable operations alone.
//!
//! Owns one forward that can be trained by automatic differentiation, in f32 on the CPU. Refuses: key-value caches, packs,
//! quantised weights, speed. It shares no code with the model room, so it is an independent witness for it in tests.
//! The fused norm, softmax and rotary operations of the library are avoided on purpose: they cut gradients without an error.

use super::MiniatureError;
use super::dice::Dice;
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::rotary_emb::rope_slow;
use std::collections::BTreeMap;

/// Deviation of the first embeddings of a decoder with a head of its own; from 0.02 the same training ends 0.1 nats higher.
pub const EMBEDDING_DEVIATION: f64 = 0.5;

/// Where the logits come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Head {
    /// The embeddings, transposed.
    Tied,
    /// `lm_head.weight`.
    Own,
}

/// Sizes of a decoder; names as in `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderShape {
    /// Rows of the embeddings and of the head (`vocab_size`).
    pub vocabulary: usize,
    /// `hidden_size`; a multiple of `heads`.
    pub hidden: usize,
    /// `intermediate_size`.
    pub intermediate: usize,
    /// `num_hidden_layers`.
    pub layers: usize,
    /// `num_attention_heads`; a multiple of `kv_heads`.
    pub heads: usize,
    /// `num_key_value_heads`.
    pub kv_heads: usize,
    /// `rope_theta`.
    pub rope_theta: f64,
    /// `rms_norm_eps`.
    pub rms_norm_eps: f64,
    /// Tied or not.
    pub head: Head,
}

/// The linear layers of a decoder layer, named below `model.layers.N.`.
const LINEAR: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

impl DecoderShape {
    /// Width of one attention head.
    pub fn head_width(&self) -> usize {
        self.hidden / self.heads.max(1)
    }

    /// Every tensor of the decoder with its shape, linear weights as [out, in].
    pub fn tensors(&self) -> BTreeMap<String, Vec<usize>> {
        let mut tensors = BTreeMap::new();
        tensors.insert("model.embed_tokens.weight".to_string(), vec![self.vocabulary, self.hidden]);
        tensors.insert("model.norm.weight".to_string(), vec![self.hidden]);
        if self.head == Head::Own {
            tensors.insert("lm_head.weight".to_string(), vec![self.vocabulary, self.hidden]);
        }
        for layer in 0..self.layers {
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                tensors.insert(format!("model.layers.{layer}.{norm}.weight"), vec![self.hidden]);
            }
            for name in LINEAR {
                let (outputs, inputs) = self.linear(name);
                tensors.insert(format!("model.layers.{layer}.{name}.weight"), vec![outputs, inputs]);
                if has_bias(name) {
                    tensors.insert(format!("model.layers.{layer}.{name}.bias"), vec![outputs]);
                }
            }
        }
        tensors
    }

    /// (outputs, inputs) of a linear layer.
    fn linear(&self, name: &str) -> (usize, usize) {
        match name {
            "self_attn.k_proj" | "self_attn.v_proj" => (self.kv_heads * self.head_width(), self.hidden),
            "mlp.gate_proj" | "mlp.up_proj" => (self.intermediate, self.hidden),
            "mlp.down_proj" => (self.hidden, self.intermediate),
            _ => (self.hidden, self.hidden),
        }
    }

    fn check(&self) -> Result<(), MiniatureError> {
        let fits = self.heads > 0
            && self.kv_heads > 0
            && self.hidden.is_multiple_of(2 * self.heads)
            && self.heads.is_multiple_of(self.kv_heads);
        if fits {
            return Ok(());
        }
        Err(MiniatureError::Shape {
            what: "[hidden, heads, kv_heads], each head of even width and kv_heads a divisor of heads".into(),
            expected: vec![2 * self.heads, self.kv_heads, self.kv_heads],
            found: vec![self.hidden, self.heads, self.kv_heads],
        })
    }
}

/// Qwen2 has a bias on the projections that enter attention, and nowhere else.
fn has_bias(linear: &str) -> bool {
    matches!(linear, "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj")
}

/// Whether a module is one of the linear layers of a decoder layer: what is quantised.
pub fn is_linear(module: &str) -> bool {
    LINEAR.iter().any(|name| module.ends_with(name))
}

/// A decoder with all its weights in f32 on the CPU.
#[derive(Debug, Clone)]
pub struct Decoder {
    shape: DecoderShape,
    tensors: BTreeMap<String, Tensor>,
}

impl Decoder {
    /// A decoder from tensors named as in a checkpoint, converted to f32 on the CPU; tensors it does not need are ignored.
    ///
    /// Errors: sizes that do not divide, a tensor that is missing or of another shape.
    pub fn from_tensors(shape: &DecoderShape, given: &BTreeMap<String, Tensor>) -> crate::Result<Self> {
        shape.check()?;
        let mut tensors = BTreeMap::new();
        for (name, expected) in shape.tensors() {
            let Some(tensor) = given.get(&name) else { return Err(MiniatureError::Missing { name, expected }.into()) };
            if tensor.dims() != expected.as_slice() {
                return Err(MiniatureError::Shape { what: name, expected, found: tensor.dims().to_vec() }.into());
            }
            tensors.insert(name, tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?);
        }
        Ok(Self { shape: shape.clone(), tensors })
    }

    /// A decoder with first weights drawn from `dice`, and the variables to train, in the order of their names.
    ///
    /// Norms start at 1, biases at 0, a linear weight at deviation 1/√in (the two that write to the residual stream at
    /// 1/√(2·layers·in)), a head of its own at 1/√hidden / 4, which makes the first distributions nearly uniform. Embeddings
    /// are large beside what the layers add at first, [`EMBEDDING_DEVIATION`], so that attention can tell ids apart early; tied
    /// ones are logits too, and start at 1/√hidden / 4.
    pub fn random(shape: &DecoderShape, dice: &mut Dice) -> crate::Result<(Self, Vec<Var>)> {
        shape.check()?;
        let mut tensors = BTreeMap::new();
        let mut variables = Vec::new();
        for (name, dims) in shape.tensors() {
            let count: usize = dims.iter().product();
            let inputs = dims.last().copied().unwrap_or(1) as f64;
            let values = if name.ends_with("norm.weight") {
                vec![1.0; count]
            } else if name.ends_with(".bias") {
                vec![0.0; count]
            } else if name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") {
                dice.normals(count, (2.0 * shape.layers as f64 * inputs).sqrt().recip())
            } else if name.contains("layers") {
                dice.normals(count, inputs.sqrt().recip())
            } else if name.contains("embed_tokens") && shape.head == Head::Own {
                dice.normals(count, EMBEDDING_DEVIATION)
            } else {
                dice.normals(count, inputs.sqrt().recip() / 4.0)
            };
            let variable = Var::from_vec(values, dims, &Device::Cpu)?;
            // The decoder's tensor shares the variable's storage, so it sees every update.
            tensors.insert(name, variable.as_tensor().clone());
            variables.push(variable);
        }
        Ok((Self { shape: shape.clone(), tensors }, variables))
    }

    /// Its sizes.
    pub fn shape(&self) -> &DecoderShape {
        &self.shape
    }

    /// Its tensors by name, in the order of the names.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Logits [T, V] of one sequence of T ids; row t is the distribution after ids 0..=t.
    pub fn forward(&self, ids: &[u32]) -> crate::Result<Tensor> {
        let batch = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
        self.logits(&self.hidden(&batch)?)
    }

    /// Hidden states [B·S, H] after the last norm, of ids [B, S] (u32). Attention is causal, positions count from 0 in each
    /// row; padding belongs on the right, where no earlier position sees it.
    pub fn hidden(&self, ids: &Tensor) -> crate::Result<Tensor> {
        let (rows, length) = ids.dims2()?;
        let rotary = Rotary::new(length, self.shape.head_width(), self.shape.rope_theta)?;
        let mut x = self.tensor("model.embed_tokens.weight")?.index_select(&ids.flatten_all()?, 0)?;
        for layer in 0..self.shape.layers {
            let prefix = format!("model.layers.{layer}");
            let normed = self.norm(&x, &format!("{prefix}.input_layernorm"))?;
            x = (x + self.attention(&normed, &prefix, (rows, length), &rotary)?)?;
            let normed = self.norm(&x, &format!("{prefix}.post_attention_layernorm"))?;
            x = (x + self.mlp(&normed, &prefix)?)?;
        }
        self.norm(&x, "model.norm")
    }

    /// Logits [N, V] of hidden states [N, H].
    pub fn logits(&self, hidden: &Tensor) -> crate::Result<Tensor> {
        let head = match self.shape.head {
            Head::Tied => "model.embed_tokens.weight",
            Head::Own => "lm_head.weight",
        };
        Ok(hidden.matmul(&self.tensor(head)?.t()?)?)
    }

    /// Grouped-query attention over [B·S, H]. Query heads that share a key head are stacked along the sequence, so keys and
    /// values are never repeated.
    fn attention(&self, x: &Tensor, layer: &str, (b, s): (usize, usize), rotary: &Rotary) -> crate::Result<Tensor> {
        let (h, kv, d) = (self.shape.heads, self.shape.kv_heads, self.shape.head_width());
        let split = |y: Tensor, heads: usize| y.reshape((b, s, heads, d))?.transpose(1, 2)?.contiguous();
        let q = rotary.turn(&split(self.linear(x, &format!("{layer}.self_attn.q_proj"))?, h)?)?;
        let k = rotary.turn(&split(self.linear(x, &format!("{layer}.self_attn.k_proj"))?, kv)?)?;
        let v = split(self.linear(x, &format!("{layer}.self_attn.v_proj"))?, kv)?;

        let q = (q.reshape((b, kv, h / kv * s, d))? * (d as f64).sqrt().recip())?;
        let scores = q.matmul(&k.t()?)?.reshape((b, kv, h / kv, s, s))?; // [B, KV, H/KV, S, S]
        let weights = candle_nn::ops::softmax(&scores.broadcast_add(&rotary.mask)?, D::Minus1)?;
        let mixed = weights.reshape((b, kv, h / kv * s, s))?.matmul(&v)?.reshape((b, h, s, d))?;
        let joined = mixed.transpose(1, 2)?.reshape((b * s, h * d))?;
        self.linear(&joined, &format!("{layer}.self_attn.o_proj"))
    }

    /// SwiGLU: down(silu(gate x) ∘ up x).
    fn mlp(&self, x: &Tensor, layer: &str) -> crate::Result<Tensor> {
        let gate = self.linear(x, &format!("{layer}.mlp.gate_proj"))?.silu()?;
        let up = self.linear(x, &format!("{layer}.mlp.up_proj"))?;
        self.linear(&(gate * up)?, &format!("{layer}.mlp.down_proj"))
    }

    /// x Wᵀ (+ b) for W [out, in].
    fn linear(&self, x: &Tensor, name: &str) -> crate::Result<Tensor> {
        let y = x.matmul(&self.tensor(&format!("{name}.weight"))?.t()?)?;
        match self.tensors.get(&format!("{name}.bias")) {
            Some(bias) => Ok(y.broadcast_add(bias)?),
            None => Ok(y),
        }
    }

    /// x / √(mean(x²) + eps) ∘ w.
    fn norm(&self, x: &Tensor, name: &str) -> crate::Result<Tensor> {
        let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + self.shape.rms_norm_eps)?.sqrt()?.recip()?;
        Ok(x.broadcast_mul(&scale)?.broadcast_mul(self.tensor(&format!("{name}.weight"))?)?)
    }

    fn tensor(&self, name: &str) -> Result<&Tensor, MiniatureError> {
        self.tensors.get(name).ok_or_else(|| MiniatureError::Missing { name: name.into(), expected: Vec::new() })
    }
}

/// What depends on positions alone: rotary tables [S, D/2] and the causal mask [S, S] (0, or -∞ above the diagonal).
struct Rotary {
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
}

impl Rotary {
    /// Angle of position p and pair i: p · theta^(-2i/D), in f32 as transformers computes it.
    fn new(length: usize, width: usize, theta: f64) -> crate::Result<Self> {
        let frequencies: Vec<f32> = (0..width / 2).map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / width as f32)).collect();
        let angles: Vec<f32> = (0..length).flat_map(|position| frequencies.iter().map(move |f| position as f32 * f)).collect();
        let angles = Tensor::from_vec(angles, (length, width / 2), &Device::Cpu)?;
        let mask: Vec<f32> =
            (0..length).flat_map(|query| (0..length).map(move |key| if key > query { f32::NEG_INFINITY } else { 0.0 })).collect();
        Ok(Self { cos: angles.cos()?, sin: angles.sin()?, mask: Tensor::from_vec(mask, (length, length), &Device::Cpu)? })
    }

    /// Turns [B, heads, S, D]; halves are paired (i, i + D/2).
    fn turn(&self, x: &Tensor) -> crate::Result<Tensor> {
        Ok(rope_slow(x, &self.cos, &self.sin)?)
    }
}
