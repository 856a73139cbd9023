//! y = W x + b (+ LoRA), whatever the encoding of W: the only place that knows encodings.
//!
//! W is frozen: it is a field, never an operand whose gradient somebody computes. Only LoRA's A and B get gradients.

pub mod awq;
pub mod nf4;

use candle_core::{Device, Result, Tensor};

/// Products of at most so many entries (and those of a single row) are made of dot products rather than blocks.
const OTHER_ORDER_ENTRIES: usize = 256;
/// Products of at most so many rows and as many columns are cut into blocks of another depth.
const OTHER_ORDER_SIDE: usize = 64;

/// A frozen weight.
#[derive(Debug, Clone)]
pub enum Weight {
    /// f32 [out, in].
    Dense(Tensor),
    /// int4 in groups, [in, out].
    Awq(awq::AwqWeight),
    /// 4-bit blocks, [out, in].
    Nf4(nf4::Nf4Weight),
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
        let mut y = match &self.weight {
            Weight::Dense(w) => product(x, &w.t()?)?,
            Weight::Awq(w) => product(x, &awq_matrix(w, x.device())?)?,
            Weight::Nf4(w) => product(x, &nf4_matrix(w, x.device())?.t()?)?,
        };
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some(lora) = &self.lora {
            let u = x.matmul(&lora.a.t()?)?;
            y = (y + (u.matmul(&lora.b.t()?)? * lora.scale)?)?;
        }
        Ok(y)
    }

    /// From x [T, in] and dL/dy [T, out]: dL/dx [T, in], and the gradients of LoRA's factors where there are any.
    ///
    /// With u = A x: du = scale·Bᵀ dy, dB = scale·dy uᵀ, dA = du xᵀ, dx = Wᵀ dy + Aᵀ du (sums over the T rows).
    pub fn backward(&self, x: &Tensor, dy: &Tensor) -> Result<(Tensor, Option<LoraGradient>)> {
        let dx = match &self.weight {
            Weight::Dense(w) => dy.matmul(w)?,
            Weight::Awq(w) => dy.matmul(&awq_matrix(w, x.device())?.t()?)?,
            Weight::Nf4(w) => dy.matmul(&nf4_matrix(w, x.device())?)?,
        };
        let Some(lora) = &self.lora else { return Ok((dx, None)) };
        let u = x.matmul(&lora.a.t()?)?;
        let scaled = (dy * lora.scale)?;
        let du = scaled.matmul(&lora.b)?;
        let gradient = LoraGradient { a: du.t()?.matmul(x)?, b: scaled.t()?.matmul(&u)? };
        Ok(((dx + du.matmul(&lora.a)?)?, Some(gradient)))
    }
}

/// x [T, in] · m [in, out], f32, of which a row's bits do not depend on T or on the other rows.
///
/// The matrix library adds up small products in another order (up to 256 entries, up to 64 by 64). Such a product is made
/// larger by copies of its rows, so that a conversation scores alike alone and among others.
pub fn product(x: &Tensor, m: &Tensor) -> Result<Tensor> {
    let (rows, out) = (x.dim(0)?, m.dim(1)?.max(1));
    let least = (OTHER_ORDER_ENTRIES / out + 1).max(2);
    let least = if out <= OTHER_ORDER_SIDE { least.max(OTHER_ORDER_SIDE + 1) } else { least };
    if rows == 0 || rows >= least {
        return x.matmul(m);
    }
    x.repeat((least.div_ceil(rows), 1))?.matmul(m)?.narrow(0, 0, rows)?.contiguous()
}

fn awq_matrix(w: &awq::AwqWeight, device: &Device) -> Result<Tensor> {
    Tensor::from_vec(w.dequantize(), (w.inputs(), w.outputs()), &Device::Cpu)?.to_device(device)
}

fn nf4_matrix(w: &nf4::Nf4Weight, device: &Device) -> Result<Tensor> {
    Tensor::from_vec(w.dequantize(), (w.rows(), w.columns()), &Device::Cpu)?.to_device(device)
}
