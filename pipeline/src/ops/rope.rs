//! Rotary position embedding, half-split layout: dimension i pairs with i + d/2 and turns by position · theta^(−2i/d).
//!
//! ```text
//! y[i]       = x[i] · cos − x[i + d/2] · sin          angle(p, i) = p · theta^(−2i/d),   i < d/2
//! y[i + d/2] = x[i + d/2] · cos + x[i] · sin
//! ```
//! Angles are f32, as the models' own code has them; the turn's backward is the turn the other way.

use super::{floats, with_f32};
#[cfg(feature = "cuda")]
use crate::cuda::blocks;
use crate::device::{self, on_gpu};
use crate::kernel::vectorised;
use candle_core::{Device, Result, Tensor, bail};
use rayon::prelude::*;

/// Cosines and sines of a pack's positions.
#[derive(Debug, Clone)]
pub struct Table {
    half: usize,
    /// f32 [T, d/2].
    cos: Tensor,
    sin: Tensor,
}

/// Which way to turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// The forward pass.
    Forward,
    /// Its backward.
    Backward,
}

impl Table {
    /// The table of `positions` for heads of `head_dim` dimensions, for tensors on `device`.
    pub fn new(positions: &[u32], head_dim: usize, theta: f64, device: &Device) -> Result<Self> {
        let half = head_dim / 2;
        let inverse: Vec<f32> = (0..half).map(|i| (1.0 / theta.powf(2.0 * i as f64 / head_dim as f64)) as f32).collect();
        let mut turned = (vec![0f32; positions.len() * half], vec![0f32; positions.len() * half]);
        // Of a long pack some milliseconds on one thread, in which a GPU would have nothing to do.
        let rows = turned.0.par_chunks_mut(half.max(1)).zip(turned.1.par_chunks_mut(half.max(1))).zip(positions);
        rows.for_each(|((cos, sin), p)| {
            for ((cos, sin), f) in cos.iter_mut().zip(sin).zip(&inverse) {
                (*cos, *sin) = ((*p as f32 * f).cos(), (*p as f32 * f).sin());
            }
        });
        let tensor = |values: &[f32]| device::tensor(values, (positions.len(), half), device);
        Ok(Self { half, cos: tensor(&turned.0)?, sin: tensor(&turned.1)? })
    }

    /// Turns x [T, heads, d] (f32).
    pub fn apply(&self, x: &Tensor, turn: Turn) -> Result<Tensor> {
        let (t, heads, d) = x.dims3()?;
        let half = self.half;
        if self.cos.dims() != [t, half] || d != 2 * half || heads == 0 {
            bail!("rope: x {:?} does not fit a table of {:?} angles", x.dims(), self.cos.dims());
        }
        let sign = if turn == Turn::Forward { 1.0 } else { -1.0 };
        on_gpu!(x => blocks::rope(x, &self.cos, &self.sin, sign));
        let (cos, sin) = (floats(&self.cos)?, floats(&self.sin)?);
        let (cos, sin) = (&cos[..], &sin[..]);
        let y = with_f32(x, |x| {
            let mut y = vec![0f32; x.len()];
            y.par_chunks_mut(heads * d).zip(x.par_chunks(heads * d)).enumerate().for_each(|(t, (y, x))| {
                let (cos, sin) = (&cos[t * half..(t + 1) * half], &sin[t * half..(t + 1) * half]);
                turn_heads(x, cos, sin, sign, y);
            });
            Ok(y)
        })?;
        Tensor::from_vec(y, x.dims(), x.device())
    }
}

vectorised! {
    /// Turns every head of a token.
    fn turn_heads(x: &[f32], cos: &[f32], sin: &[f32], sign: f32, y: &mut [f32]) {
        let half = cos.len();
        for (y, x) in y.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
            let ((y0, y1), (x0, x1)) = (y.split_at_mut(half), x.split_at(half));
            for i in 0..half {
                let s = sin[i] * sign;
                y0[i] = x0[i] * cos[i] - x1[i] * s;
                y1[i] = x1[i] * cos[i] + x0[i] * s;
            }
        }
    }
}
