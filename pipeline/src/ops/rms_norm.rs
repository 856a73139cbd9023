//! Root-mean-square norm: y = w ∘ x · r with r = 1 / sqrt(mean(x²) + eps), row by row.

use super::with_f32;
#[cfg(feature = "cuda")]
use crate::cuda::blocks;
use crate::device::on_gpu;
use crate::kernel::{Precision, vectorised};
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

/// y [T, H] of x [T, H] and w `[H]`, f32.
pub fn forward(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let h = width(x, w)?;
    on_gpu!(x => blocks::rms_norm(x, w, eps, Precision::F32));
    let y = with_f32(x, |x| {
        with_f32(w, |w| {
            let mut y = vec![0f32; x.len()];
            y.par_chunks_mut(h).zip(x.par_chunks(h)).for_each(|(y, x)| row(x, w, eps, y));
            Ok(y)
        })
    })?;
    Tensor::from_vec(y, x.dims(), x.device())
}

/// [`forward`] for products alone, whose factors are rounded to `precision`: on a GPU y is so already, bf16 or f32; on a CPU it is f32, and
/// they round it.
pub fn forward_rounded(x: &Tensor, w: &Tensor, eps: f64, precision: Precision) -> Result<Tensor> {
    width(x, w)?;
    on_gpu!(x => blocks::rms_norm(x, w, eps, precision));
    let _ = precision;
    forward(x, w, eps)
}

/// dL/dx [T, H] from x, w and dL/dy: r (w ∘ dy − x · r² · mean(x ∘ w ∘ dy)).
pub fn backward(x: &Tensor, w: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    let h = width(x, w)?;
    if dy.dims() != x.dims() {
        bail!("rms_norm: dy {:?} does not fit x {:?}", dy.dims(), x.dims());
    }
    on_gpu!(x => blocks::rms_norm_backward(x, w, eps, dy));
    let dx = with_f32(x, |x| {
        with_f32(w, |w| {
            with_f32(dy, |dy| {
                let mut dx = vec![0f32; x.len()];
                dx.par_chunks_mut(h).zip(x.par_chunks(h)).zip(dy.par_chunks(h)).for_each(|((dx, x), dy)| {
                    row_backward(x, w, eps, dy, dx);
                });
                Ok(dx)
            })
        })
    })?;
    Tensor::from_vec(dx, x.dims(), x.device())
}

/// H, the same in x [T, H] and w `[H]`.
fn width(x: &Tensor, w: &Tensor) -> Result<usize> {
    match (x.dims2()?, w.dims()) {
        ((_, h), [n]) if *n == h && h > 0 => Ok(h),
        _ => bail!("rms_norm: x {:?} and w {:?} do not fit", x.dims(), w.dims()),
    }
}

vectorised! {
    fn row(x: &[f32], w: &[f32], eps: f64, y: &mut [f32]) {
        let r = inverse_rms(x, eps);
        for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
            *y = x * r * w;
        }
    }
}

vectorised! {
    fn row_backward(x: &[f32], w: &[f32], eps: f64, dy: &[f32], dx: &mut [f32]) {
        let r = inverse_rms(x, eps);
        let sum = lane_sum(x.len(), |i| f64::from(x[i] * w[i] * dy[i]));
        let shared = (f64::from(r) * f64::from(r) * sum / x.len() as f64) as f32;
        for (((dx, x), w), dy) in dx.iter_mut().zip(x).zip(w).zip(dy) {
            *dx = r * (w * dy - x * shared);
        }
    }
}

/// 1 / sqrt(mean(x²) + eps).
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f64) -> f32 {
    let sum = lane_sum(x.len(), |i| f64::from(x[i]) * f64::from(x[i]));
    (1.0 / (sum / x.len() as f64 + eps).sqrt()) as f32
}

/// Σ term(i), i < n; in f64, so that a row's width does not cost digits, and in sixteen lanes, so that every machine adds in the same
/// order.
#[inline(always)]
fn lane_sum(n: usize, term: impl Fn(usize) -> f64) -> f64 {
    let mut lanes = [0f64; 16];
    let whole = n - n % lanes.len();
    for start in (0..whole).step_by(lanes.len()) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += term(start + lane);
        }
    }
    for (i, sum) in (whole..n).zip(&mut lanes) {
        *sum += term(i);
    }
    lanes.iter().sum()
}
