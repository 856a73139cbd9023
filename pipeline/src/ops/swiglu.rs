//! SwiGLU: y = silu(g) ∘ u, with silu(g) = g · σ(g).

use super::exponential::sigmoid;
use super::{STRIDE, combined, floats};
#[cfg(feature = "cuda")]
use crate::cuda::blocks;
use crate::device::on_gpu;
use crate::kernel::{Precision, vectorised};
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

/// y of gate g and up u, all f32 of one shape.
pub fn forward(g: &Tensor, u: &Tensor) -> Result<Tensor> {
    combined(("swiglu", "swiglu_forward"), g, u, gate)
}

/// [`forward`] for products alone, whose factors are rounded to `precision`: on a GPU y is so already, bf16 or f32; on a CPU it is f32, and
/// they round it.
pub fn forward_rounded(g: &Tensor, u: &Tensor, precision: Precision) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if precision == Precision::Bf16 && g.device().is_cuda() {
        fit(g, u)?;
        return blocks::swiglu_bf16(g, u);
    }
    let _ = precision;
    forward(g, u)
}

/// (dL/dg, dL/du): dg = dy · u · σ(g) (1 + g (1 − σ(g))), du = dy · g · σ(g).
pub fn backward(g: &Tensor, u: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    fit(g, u)?;
    fit(g, dy)?;
    on_gpu!(g => blocks::swiglu_backward(g, u, dy));
    let (gs, us, dys) = (floats(g)?, floats(u)?, floats(dy)?);
    let (mut dg, mut du) = (vec![0f32; gs.len()], dys.to_vec());
    let rows = dg.par_chunks_mut(STRIDE).zip(du.par_chunks_mut(STRIDE)).zip(gs.par_chunks(STRIDE)).zip(us.par_chunks(STRIDE));
    rows.for_each(|(((dg, du), g), u)| gate_backward(g, u, dg, du));
    Ok((Tensor::from_vec(dg, g.dims(), g.device())?, Tensor::from_vec(du, g.dims(), g.device())?))
}

fn fit(g: &Tensor, other: &Tensor) -> Result<()> {
    if g.dims() != other.dims() {
        bail!("swiglu: {:?} and {:?} do not fit", g.dims(), other.dims());
    }
    Ok(())
}

vectorised! {
    fn gate(g: &[f32], u: &[f32], y: &mut [f32]) {
        for ((y, g), u) in y.iter_mut().zip(g).zip(u) {
            *y = u * (g * sigmoid(*g));
        }
    }
}

vectorised! {
    /// du comes in as dy.
    fn gate_backward(g: &[f32], u: &[f32], dg: &mut [f32], du: &mut [f32]) {
        for (((g, u), dg), du) in g.iter().zip(u).zip(dg).zip(du) {
            let s = sigmoid(*g);
            let dy = *du;
            *dg = dy * u * s * (1.0 + g * (1.0 - s));
            *du = dy * g * s;
        }
    }
}
