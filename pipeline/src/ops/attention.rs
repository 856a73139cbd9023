//! Block-diagonal causal attention over a pack, with grouped key/value heads.
//!
//! ```text
//!            keys →   a a a b b          segments [0, 3, 5]: conversation a sees only a, b only b,
//! queries  a          x                  and each token only itself and what came before it
//!    ↓     a          x x
//!          a          x x x              S = q kᵀ / √d on the x, P = softmax(S) by row, o = P v
//!          b                x            lse[i] = ln Σ_j exp S[i][j]
//!          b                x x
//! ```
//! No [T, T] matrix exists: rows are made one at a time. Backward, with `D[i]` = `dO[i]` · `O[i]`:
//! P = exp(S − lse), dV += Pᵀ dO, dS = P ∘ (dO Vᵀ − D) / √d, dQ = dS K, dK += dSᵀ Q.

use super::with_f32;
use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

/// What the backward needs of the forward: the output and each row's log-sum-exp.
#[derive(Debug, Clone)]
pub struct Attended {
    /// o f32 [T, heads, d].
    pub output: Tensor,
    /// By head, then token: f32 [heads · T].
    lse: Vec<f32>,
}

/// Sizes of one call.
#[derive(Clone, Copy)]
struct Shape {
    tokens: usize,
    heads: usize,
    kv_heads: usize,
    d: usize,
    scale: f32,
}

impl Shape {
    fn of(q: &Tensor, k: &Tensor, v: &Tensor, segments: &[u32]) -> Result<Self> {
        let ((tokens, heads, d), (kt, kv_heads, kd)) = (q.dims3()?, k.dims3()?);
        if kt != tokens || kd != d || v.dims() != k.dims() || kv_heads == 0 || d == 0 || heads % kv_heads != 0 {
            bail!("attention: q {:?}, k {:?} and v {:?} do not fit", q.dims(), k.dims(), v.dims());
        }
        let rising = segments.windows(2).all(|w| w[0] <= w[1]);
        if segments.first() != Some(&0) || segments.last() != Some(&(tokens as u32)) || !rising {
            bail!("attention: segments {segments:?} do not cover {tokens} tokens");
        }
        Ok(Self { tokens, heads, kv_heads, d, scale: (1.0 / (d as f64).sqrt()) as f32 })
    }

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

/// o [T, heads, d] of q [T, heads, d], k and v [T, kv_heads, d]; `segments` are cumulative lengths from 0 to T.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, segments: &[u32]) -> Result<Attended> {
    let shape = Shape::of(q, k, v, segments)?;
    let heads: Vec<(Vec<f32>, Vec<f32>)> = with_f32(q, |q| {
        with_f32(k, |k| {
            with_f32(v, |v| {
                let one = |h: usize| {
                    let kv = h / (shape.heads / shape.kv_heads);
                    let (q, k, v) =
                        (shape.head(q, shape.heads, h), shape.head(k, shape.kv_heads, kv), shape.head(v, shape.kv_heads, kv));
                    forward_head(&q, &k, &v, segments, shape)
                };
                Ok((0..shape.heads).into_par_iter().map(one).collect())
            })
        })
    })?;
    let (outputs, lse): (Vec<Vec<f32>>, Vec<Vec<f32>>) = heads.into_iter().unzip();
    Ok(Attended { output: Tensor::from_vec(shape.interleave(&outputs), q.dims(), q.device())?, lse: lse.concat() })
}

fn forward_head(q: &[f32], k: &[f32], v: &[f32], segments: &[u32], shape: Shape) -> (Vec<f32>, Vec<f32>) {
    let d = shape.d;
    let (mut out, mut lse) = (vec![0f32; q.len()], vec![0f32; shape.tokens]);
    let mut scores = Vec::new();
    for (begin, end) in pairs(segments) {
        for i in begin..end {
            scores.clear();
            let query = &q[i * d..(i + 1) * d];
            scores.extend((begin..=i).map(|j| dot(query, &k[j * d..(j + 1) * d]) * shape.scale));
            let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut sum = 0f32;
            for s in &mut scores {
                *s = (*s - max).exp();
                sum += *s;
            }
            let row = &mut out[i * d..(i + 1) * d];
            for (p, j) in scores.iter().zip(begin..) {
                add_scaled(row, &v[j * d..(j + 1) * d], *p / sum);
            }
            lse[i] = max + sum.ln();
        }
    }
    (out, lse)
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

fn pairs(segments: &[u32]) -> impl Iterator<Item = (usize, usize)> + '_ {
    segments.windows(2).map(|w| (w[0] as usize, w[1] as usize))
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
