//! y = W x + b (+ LoRA), whatever the encoding of W: the only place that knows encodings.
//!
//! W is frozen: it is a field, never an operand whose gradient somebody computes. Only LoRA's A and B get gradients.

pub mod awq;
pub mod dense;
pub mod dropout;
pub mod nf4;
pub mod product;

use crate::kernel::{Precision, Rows};
use crate::ops::with_f32;
use candle_core::{Device, Result, Tensor, bail};
use product::{Factor, products};

/// A frozen weight.
#[derive(Debug, Clone)]
pub enum Weight {
    /// As stored, [out, in].
    Dense(dense::DenseWeight),
    /// int4 in groups, [in, out].
    Awq(awq::AwqWeight),
    /// 4-bit blocks, [out, in].
    Nf4(nf4::Nf4Weight),
}

impl Weight {
    /// Input features.
    pub fn inputs(&self) -> usize {
        match self {
            Weight::Dense(w) => w.inputs(),
            Weight::Awq(w) => w.inputs(),
            Weight::Nf4(w) => w.columns(),
        }
    }

    /// Output features.
    pub fn outputs(&self) -> usize {
        match self {
            Weight::Dense(w) => w.outputs(),
            Weight::Awq(w) => w.outputs(),
            Weight::Nf4(w) => w.rows(),
        }
    }

    /// All of it as f32 [out, in].
    pub fn to_tensor(&self) -> Result<Tensor> {
        let (outputs, inputs) = (self.outputs(), self.inputs());
        match self {
            Weight::Dense(w) => Tensor::from_vec(w.dequantize(), (outputs, inputs), &Device::Cpu),
            Weight::Awq(w) => Tensor::from_vec(w.dequantize(), (inputs, outputs), &Device::Cpu)?.t(),
            Weight::Nf4(w) => Tensor::from_vec(w.dequantize(), (outputs, inputs), &Device::Cpu),
        }
    }
}

/// Low-rank factors added to a frozen layer: y += scale · B (A x).
#[derive(Debug, Clone)]
pub struct Lora {
    /// f32 [r, in].
    pub a: Tensor,
    /// f32 [out, r].
    pub b: Tensor,
    /// alpha / r, or alpha / √r (rank-stabilised).
    pub scale: f64,
}

/// Gradients of one layer's LoRA factors.
#[derive(Debug, Clone)]
pub struct LoraGradient {
    /// f32 [r, in].
    pub a: Tensor,
    /// f32 [out, r].
    pub b: Tensor,
}

/// One linear layer.
#[derive(Debug, Clone)]
pub struct Linear {
    /// The frozen weight.
    pub weight: Weight,
    /// f32 `[out]`.
    pub bias: Option<Tensor>,
    /// Trainable factors.
    pub lora: Option<Lora>,
}

impl Linear {
    /// A frozen layer.
    pub fn new(weight: Weight, bias: Option<Tensor>) -> Self {
        Self { weight, bias, lora: None }
    }

    /// y [T, out] of x [T, in], both f32 and contiguous.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [y] = forward_all([self], x, Precision::F32)?;
        Ok(y)
    }

    /// From x [T, in] and dL/dy [T, out]: dL/dx [T, in], and the gradients of LoRA's factors where there are any.
    ///
    /// With u = A x: du = scale·Bᵀ dy, dB = scale·dy uᵀ, dA = du xᵀ, dx = Wᵀ dy + Aᵀ du (sums over the T rows).
    pub fn backward(&self, x: &Tensor, dy: &Tensor) -> Result<(Tensor, Option<LoraGradient>)> {
        let dx = dy.matmul(&self.weight.to_tensor()?)?;
        let Some(lora) = &self.lora else { return Ok((dx, None)) };
        let u = x.matmul(&lora.a.t()?)?;
        let scaled = (dy * lora.scale)?;
        let du = scaled.matmul(&lora.b)?;
        let gradient = LoraGradient { a: du.t()?.matmul(x)?, b: scaled.t()?.matmul(&u)? };
        Ok(((dx + du.matmul(&lora.a)?)?, Some(gradient)))
    }
}

/// The outputs [T, out] of several layers of the same x [T, in], all f32 and contiguous. `precision` is that of the frozen weights'
/// products; LoRA's are f32.
pub fn forward_all<const N: usize>(layers: [&Linear; N], x: &Tensor, precision: Precision) -> Result<[Tensor; N]> {
    let (t, width) = x.dims2()?;
    if let Some(layer) = layers.iter().find(|layer| layer.weight.inputs() != width) {
        bail!("linear: x {:?} does not fit {} inputs", x.dims(), layer.weight.inputs());
    }
    let rows = with_f32(x, |x| Ok(Rows::pack(x, width, precision)))?;
    let biases = layers.iter().map(|layer| layer.bias.as_ref().map(Tensor::to_vec1::<f32>).transpose());
    let biases: Vec<Option<Vec<f32>>> = biases.collect::<Result<_>>()?;
    let mut factors = Vec::with_capacity(N);
    for (layer, bias) in layers.iter().zip(&biases) {
        let (weight, bias) = (&layer.weight, bias.as_deref());
        if let Some(bias) = bias.filter(|bias| bias.len() != weight.outputs()) {
            bail!("linear: a bias of {} values does not fit {} outputs", bias.len(), weight.outputs());
        }
        factors.push(Factor { weight, bias });
    }
    let mut outputs = Vec::with_capacity(N);
    for (values, layer) in products(&rows, &factors).into_iter().zip(layers) {
        let mut y = Tensor::from_vec(values, (t, layer.weight.outputs()), x.device())?;
        if let Some(lora) = &layer.lora {
            let u = x.matmul(&lora.a.t()?)?;
            y = (y + (u.matmul(&lora.b.t()?)? * lora.scale)?)?;
        }
        outputs.push(y);
    }
    outputs.try_into().map_err(|_| candle_core::Error::Msg("linear: a product is missing".into()))
}
