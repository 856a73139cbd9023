//! y = W x + b (+ LoRA), whatever the encoding of W: the only place that knows encodings.
//!
//! W is frozen: it is a field, never an operand whose gradient somebody computes. Only LoRA's A and B get gradients.

pub mod awq;
pub mod dense;
pub mod dropout;
pub mod nf4;
pub mod outer;
pub mod panel;
mod pass;
pub mod product;

#[cfg(feature = "cuda")]
pub use crate::cuda::DeviceWeight;
pub use pass::{Low, Pass, backward_all, forward_all, forward_kept};

use crate::kernel::Precision;
use candle_core::{Device, Result, Tensor};

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

    /// A copy on `device`, if that is a GPU.
    pub fn placed(&self, device: &Device) -> Result<Option<DeviceWeight>> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = device {
            return DeviceWeight::new(self, device).map(Some);
        }
        let _ = device;
        Ok(None)
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

/// The frozen matrix that makes logits, [V, H].
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// As stored.
    pub weight: &'a dense::DenseWeight,
    /// What the factors of its products are rounded to.
    pub precision: Precision,
    /// Its copy on a GPU.
    pub placed: Option<&'a DeviceWeight>,
}

impl<'a> Head<'a> {
    /// A head in the host's memory.
    pub fn new(weight: &'a dense::DenseWeight, precision: Precision) -> Self {
        Self { weight, precision, placed: None }
    }
}

/// A weight's copy on a GPU: without the feature `cuda` there is none.
#[cfg(not(feature = "cuda"))]
#[derive(Debug, Clone)]
pub enum DeviceWeight {}

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
    /// The weight's copy on a GPU.
    pub(crate) placed: Option<DeviceWeight>,
}

impl Linear {
    /// A frozen layer.
    pub fn new(weight: Weight, bias: Option<Tensor>) -> Self {
        Self { weight, bias, lora: None, placed: None }
    }

    /// The same layer with a copy of its weight on `device`; as it is where that is the CPU.
    pub fn placed(&self, device: &Device) -> Result<Self> {
        Ok(Self { placed: self.weight.placed(device)?, ..self.clone() })
    }

    /// The same layer for several products on end: on a GPU its weight is unpacked once for all of them, into 2 bytes a value (of f32: 4).
    pub(crate) fn held(&self, precision: Precision) -> Result<Self> {
        let _ = precision;
        Ok(Self {
            #[cfg(feature = "cuda")]
            placed: self.placed.as_ref().map(|weight| weight.held(precision)).transpose()?,
            ..self.clone()
        })
    }

    /// y [T, out] of x [T, in], both f32 and contiguous.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [y] = forward_all([self], x, Precision::F32)?;
        Ok(y)
    }

    /// From x [T, in] and dL/dy [T, out]: dL/dx [T, in], and the gradients of LoRA's factors where there are any.
    pub fn backward(&self, x: &Tensor, dy: &Tensor) -> Result<(Tensor, Option<LoraGradient>)> {
        let (_, low) = forward_kept([self], x, Precision::F32.into())?;
        let (dx, [gradient]) = backward_all([self], x, &low, [dy], Precision::F32.into())?;
        Ok((dx, gradient))
    }
}
