//! Attention's backward, row by row.

use super::{Attended, Shape, pairs};
use crate::ops::with_f32;
use candle_core::{Result, Tensor};
use rayon::prelude::*;

impl Shape {
    /// Copies head `h` of x [T, heads, d] into [T, d].
    fn head(&self, x: &[f32], heads: usize, h: usize) -> Vec<f32> {
        x.chunks_exact(heads * self.d).flat_map(|token| &token[h * self.d..(h + 1) * self.d]).copied().collect()
    }

    /// The reverse: heads, each [T, d], into [T, heads, d].
    fn interleave(&self, by_head: &[Vec<f32>]) -> Vec<f32> {
        let mut out = Vec::with_capacity(by_head.len() * self.tokens * self.d);
        for t in 0..self.tokens {
            for head in by_head {
                out.extend_from_slice(&head[t * self.d..(t + 1) * self.d]);
            }
        }
        out
    }
}

/// (dQ, dK, dV), shaped as q, k and v.
pub fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    attended: &Attended,
    dy: &Tensor,
    segments: &[u32],
) -> Result<(Tensor, Tensor, Tensor)> {
    let shape = Shape::of(q, k, v, segments)?;
    let group = shape.heads / shape.kv_heads;
    // One job owns a key/value head and walks its query heads in order, so sums do not depend on the number of threads.
    let jobs: Vec<KvGradient> = with_f32(q, |q| {
        with_f32(k, |k| {
            with_f32(v, |v| {
                with_f32(&attended.output, |o| {
                    with_f32(dy, |dy| {
                        let one = |kv: usize| {
                            let (k, v) = (shape.head(k, shape.kv_heads, kv), shape.head(v, shape.kv_heads, kv));
                            let mut gradient = KvGradient { dq: Vec::new(), dk: vec![0.0; k.len()], dv: vec![0.0; v.len()] };
                            for h in kv * group..(kv + 1) * group {
                                let part = |x: &[f32]| shape.head(x, shape.heads, h);
                                let lse = &attended.lse[h * shape.tokens..(h + 1) * shape.tokens];
                                let saved = HeadSaved { q: part(q), o: part(o), dy: part(dy), lse };
                                backward_head(&saved, &k, &v, segments, shape, &mut gradient);
                            }
                            gradient
                        };
                        Ok((0..shape.kv_heads).into_par_iter().map(one).collect())
                    })
                })
            })
        })
    })?;
    let (mut dq, mut dk, mut dv) = (Vec::new(), Vec::new(), Vec::new());
    for job in jobs {
        dq.extend(job.dq);
        dk.push(job.dk);
        dv.push(job.dv);
    }
    let tensor = |by_head: &[Vec<f32>], like: &Tensor| Tensor::from_vec(shape.interleave(by_head), like.dims(), like.device());
    Ok((tensor(&dq, q)?, tensor(&dk, k)?, tensor(&dv, v)?))
}

/// Gradients of one key/value head and of its query heads.
struct KvGradient {
    dq: Vec<Vec<f32>>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

struct HeadSaved<'a> {
    q: Vec<f32>,
    o: Vec<f32>,
    dy: Vec<f32>,
    lse: &'a [f32],
}

fn backward_head(saved: &HeadSaved, k: &[f32], v: &[f32], segments: &[u32], shape: Shape, gradient: &mut KvGradient) {
    let d = shape.d;
    let mut dq = vec![0f32; saved.q.len()];
    for (begin, end) in pairs(segments) {
        for i in begin..end {
            let row = i * d..(i + 1) * d;
            let (query, dy) = (&saved.q[row.clone()], &saved.dy[row.clone()]);
            let delta = dot(dy, &saved.o[row.clone()]);
            for j in begin..=i {
                let at = j * d..(j + 1) * d;
                let p = (dot(query, &k[at.clone()]) * shape.scale - saved.lse[i]).exp();
                let ds = p * (dot(dy, &v[at.clone()]) - delta) * shape.scale;
                add_scaled(&mut gradient.dv[at.clone()], dy, p);
                add_scaled(&mut gradient.dk[at.clone()], query, ds);
                add_scaled(&mut dq[row.clone()], &k[at], ds);
            }
        }
    }
    gradient.dq.push(dq);
}

/// Eight running sums, so that the compiler may use vector registers without changing the order of additions between runs.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + rest
}

fn add_scaled(out: &mut [f32], x: &[f32], by: f32) {
    for (o, x) in out.iter_mut().zip(x) {
        *o += x * by;
    }
}
