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
//! No [T, T] matrix exists: scores are made for 32 queries of a head at a time (`forward.rs`, `backward.rs`); `cached.rs` is for text that
//! grows row by row. Backward, with `D[i]` = `dO[i]` · `O[i]`:
//! P = exp(S − lse), dV += Pᵀ dO, dS = P ∘ (dO Vᵀ − D) / √d, dQ = dS K, dK += dSᵀ Q.

mod backward;
mod cached;
mod forward;

pub use backward::{backward, backward_at};
pub use cached::{KeysValues, forward_cached};
pub use forward::{forward, forward_at};

#[cfg(feature = "cuda")]
use crate::cuda::attention::Tiles;
#[cfg(feature = "cuda")]
use candle_core::CudaDevice;
use candle_core::{Result, Tensor, bail};
#[cfg(feature = "cuda")]
use std::sync::OnceLock;

/// Which rows of a pack are one conversation: cumulative lengths from 0 to T.
#[derive(Debug, Clone)]
pub struct Segments {
    bounds: Vec<u32>,
    /// What a GPU's kernels walk over; made when they first do.
    #[cfg(feature = "cuda")]
    tiles: OnceLock<Tiles>,
}

impl Segments {
    /// Of these lengths.
    pub fn new(bounds: Vec<u32>) -> Self {
        Self {
            bounds,
            #[cfg(feature = "cuda")]
            tiles: OnceLock::new(),
        }
    }

    /// The lengths.
    pub fn bounds(&self) -> &[u32] {
        &self.bounds
    }

    /// Tiles of them on the device.
    #[cfg(feature = "cuda")]
    pub(crate) fn tiles(&self, device: &CudaDevice) -> Result<&Tiles> {
        match self.tiles.get() {
            Some(tiles) => Ok(tiles),
            None => {
                let made = Tiles::new(&self.bounds, device)?;
                Ok(self.tiles.get_or_init(|| made))
            }
        }
    }
}

/// What the backward needs of the forward: the output and each row's log-sum-exp.
#[derive(Debug, Clone)]
pub struct Attended {
    /// o f32 [T, heads, d].
    pub output: Tensor,
    /// By head, then token: f32 [heads · T]; `None` where no backward follows.
    lse: Option<Tensor>,
}

impl Attended {
    /// The log-sum-exps. Errors: there are none, or what came out does not fit what went in and dL/do.
    fn log_sums(&self, dy: &Tensor, q: &Tensor, shape: Shape) -> Result<&Tensor> {
        match &self.lse {
            Some(lse) if [dy.dims(), self.output.dims()] == [q.dims(); 2] && lse.dims() == [shape.heads * shape.tokens] => {
                Ok(lse)
            }
            _ => bail!("attention: o {:?} and dy {:?} do not fit q {:?}", self.output.dims(), dy.dims(), q.dims()),
        }
    }
}

/// Sizes of one call.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) tokens: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) d: usize,
    /// 1 / √d.
    pub(crate) scale: f32,
}

impl Shape {
    fn of(q: &Tensor, k: &Tensor, v: &Tensor, segments: &[u32]) -> Result<Self> {
        let ((tokens, heads, d), (kt, kv_heads, kd)) = (q.dims3()?, k.dims3()?);
        if kt != tokens || kd != d || v.dims() != k.dims() || kv_heads == 0 || d == 0 || heads % kv_heads != 0 {
            bail!("attention: q {:?}, k {:?} and v {:?} do not fit", q.dims(), k.dims(), v.dims());
        }
        let rising = segments.windows(2).all(|w| w[0] <= w[1]);
        if segments.first() != Some(&0) || segments.last().map(|end| *end as usize) != Some(tokens) || !rising {
            bail!("attention: segments {segments:?} do not cover {tokens} tokens");
        }
        Ok(Self { tokens, heads, kv_heads, d, scale: (1.0 / (d as f64).sqrt()) as f32 })
    }
}

fn pairs(segments: &[u32]) -> impl Iterator<Item = (usize, usize)> + '_ {
    segments.windows(2).map(|w| (w[0] as usize, w[1] as usize))
}
