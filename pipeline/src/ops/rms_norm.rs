//! Root-mean-square norm: y = w ∘ x · r with r = 1 / sqrt(mean(x²) + eps), row by row.

use super::with_f32;
use crate::kernel::vectorised;
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

/// y [T, H] of x [T, H] and w `[H]`, f32.
pub fn forward(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let h = width(x, w)?;
    let y = with_f32(x, |x| {
        with_f32(w, |w| {
            let mut y = vec![0f32; x.len()];
            y.par_chunks_mut(h).zip(x.par_chunks(h)).for_each(|(y, x)| row(x, w, eps, y));
            Ok(y)
        })
    })?;
    Tensor::from_vec(y, x.dims(), x.device())
}

/// dL/dx [T, H] from x, w and dL/dy: r (w ∘ dy − x · r² · mean(x ∘ w ∘ dy)).
pub fn backward(x: &Tensor, w: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    let h = width(x, w)?;
    if dy.dims() != x.dims() {
        bail!("rms_norm: dy {:?} does not fit x {:?}", dy.dims(), x.dims());
    }
    let dx = with_f32(x, |x| {
        with_f32(w, |w| {
            with_f32(dy, |dy| {
                let mut dx = vec![0f32; x.len()];
                dx.par_chunks_mut(h).zip(x.par_chunks(h)).zip(dy.par_chunks(h)).for_each(|((dx, x), dy)| {
                    let r = inverse_rms(x, eps);
                    let sum: f64 = x.iter().zip(w).zip(dy).map(|((x, w), dy)| f64::from(x * w * dy)).sum();
                    let shared = (f64::from(r) * f64::from(r) * sum / h as f64) as f32;
                    for (((dx, x), w), dy) in dx.iter_mut().zip(x).zip(w).zip(dy) {
                        *dx = r * (w * dy - x * shared);
                    }
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

/// 1 / sqrt(mean(x²) + eps); the sum in f64, so that a row's width does not cost digits, and in sixteen lanes, so that every machine adds in
/// the same order.
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f64) -> f32 {
    let mut lanes = [0f64; 16];
    let mut chunks = x.chunks_exact(lanes.len());
    for chunk in &mut chunks {
        for (lane, v) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(*v) * f64::from(*v);
        }
    }
    for (lane, v) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane += f64::from(*v) * f64::from(*v);
    }
    (1.0 / (lanes.iter().sum::<f64>() / x.len() as f64 + eps).sqrt()) as f32
}
