//! SwiGLU: y = silu(g) ∘ u, with silu(g) = g · σ(g).

use super::exponential::sigmoid;
use super::{combined, with_f32};
use crate::kernel::vectorised;
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

/// y of gate g and up u, all f32 of one shape.
pub fn forward(g: &Tensor, u: &Tensor) -> Result<Tensor> {
    combined("swiglu", u, g, gate)
}

/// (dL/dg, dL/du): dg = dy · u · σ(g) (1 + g (1 − σ(g))), du = dy · g · σ(g).
pub fn backward(g: &Tensor, u: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    fit(g, u)?;
    fit(g, dy)?;
    let (dg, du): (Vec<f32>, Vec<f32>) = with_f32(g, |g| {
        with_f32(u, |u| {
            with_f32(dy, |dy| {
                let pair = |((g, u), dy): ((&f32, &f32), &f32)| {
                    let s = sigmoid(*g);
                    (dy * u * s * (1.0 + g * (1.0 - s)), dy * g * s)
                };
                Ok(g.par_iter().zip(u).zip(dy).map(pair).unzip())
            })
        })
    })?;
    Ok((Tensor::from_vec(dg, g.dims(), g.device())?, Tensor::from_vec(du, g.dims(), g.device())?))
}

fn fit(g: &Tensor, other: &Tensor) -> Result<()> {
    if g.dims() != other.dims() {
        bail!("swiglu: {:?} and {:?} do not fit", g.dims(), other.dims());
    }
    Ok(())
}

vectorised! {
    /// y = silu(g) · y.
    fn gate(y: &mut [f32], g: &[f32]) {
        for (y, g) in y.iter_mut().zip(g) {
            *y *= g * sigmoid(*g);
        }
    }
}
