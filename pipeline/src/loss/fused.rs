//! Owns the head of the student during training: hidden states in, loss and gradient to the hidden states out. Refuses to
//! hold more than one chunk of logits; a `[N, V]` tensor never exists.

use super::{Batch, Checked, LossError, LossSettings, LossSums};
use crate::{Error, Result};
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Tensor};
use potstill_cache::SoftTargets;
use std::sync::Mutex;

/// The loss of N scored positions from their hidden states `[N, H]` (f32) and the head `[V, H]` (f32), and
/// d(total · scale) / d(hidden) `[N, H]` (f32).
///
/// `chunk` positions' logits exist at once. The result does not depend on it, nor on threads, to the last bit. The head gets no
/// gradient: it is frozen. Errors: as [`rows`](super::rows), and tensors of other shapes or dtypes.
pub fn fused(
    hidden: &Tensor,
    head: &Tensor,
    labels: &[u32],
    targets: Option<&SoftTargets>,
    settings: &LossSettings,
    scale: f64,
    chunk: usize,
) -> Result<(LossSums, Tensor)> {
    fused_batch(hidden, head, &Batch { labels, targets, lse_t: None, settings, scale }, chunk)
}

/// [`fused`] with everything about the rows in one value, ln Z_T included.
pub fn fused_batch(hidden: &Tensor, head: &Tensor, batch: &Batch<'_>, chunk: usize) -> Result<(LossSums, Tensor)> {
    let (n, vocab) = shapes(hidden, head, batch)?;
    if chunk == 0 {
        return Err(Error::Setting { name: "head_chunk", found: "0".into(), expected: "1 or more positions".into() });
    }
    batch.check(vocab)?;
    let mut sums = LossSums::default();
    let mut gradients = Vec::with_capacity(n.div_ceil(chunk));
    for first in (0..n).step_by(chunk) {
        let rows = chunk.min(n - first);
        gradients.push(chunk_gradient(&hidden.narrow(0, first, rows)?, head, batch, first, &mut sums)?);
    }
    batch.close(&mut sums);
    let gradient = if gradients.is_empty() { hidden.zeros_like()? } else { Tensor::cat(&gradients, 0)? };
    Ok((sums, gradient))
}

/// Checks hidden states against head and labels; gives N and V.
fn shapes(hidden: &Tensor, head: &Tensor, batch: &Batch<'_>) -> Checked<(usize, usize)> {
    let describe = |t: &Tensor| format!("{:?} {:?}", t.dtype(), t.dims());
    let refuse = |what, expected: String, t| Err(LossError::Tensor { what, expected, found: describe(t) });
    match (hidden.dims(), head.dims()) {
        (&[n, h], &[v, width])
            if n == batch.labels.len() && h == width && hidden.dtype() == DType::F32 && head.dtype() == DType::F32 =>
        {
            Ok((n, v))
        }
        (_, &[_, h]) if head.dtype() == DType::F32 => {
            refuse("hidden states", format!("F32 [{}, {h}]", batch.labels.len()), hidden)
        }
        _ => refuse("head", "F32 [V, H]".into(), head),
    }
}

/// d(total · scale) / d(hidden) of one chunk `[n, H]`, whose first row is row `first` of the batch.
fn chunk_gradient(hidden: &Tensor, head: &Tensor, batch: &Batch<'_>, first: usize, sums: &mut LossSums) -> Result<Tensor> {
    let rows = hidden.dim(0)?;
    // A product with one row takes another path in the matrix library and adds in another order. With its copy beside it a
    // single row comes out bit for bit as it would among others.
    let at_least_two = if rows == 1 { Tensor::cat(&[hidden, hidden], 0)? } else { hidden.clone() };
    let logits = at_least_two.matmul(&head.t()?)?;
    let kernel = Kernel { batch, first, rows, outcome: Mutex::new(Ok(*sums)) };
    let applied = logits.inplace_op1(&kernel);
    *sums = kernel.outcome.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)?;
    applied?;
    Ok(logits.matmul(head)?.narrow(0, 0, rows)?)
}

/// The row kernel as an operation on a tensor's own storage.
struct Kernel<'a> {
    batch: &'a Batch<'a>,
    first: usize,
    rows: usize,
    /// The running sums, or what went wrong.
    outcome: Mutex<Checked<LossSums>>,
}

impl InplaceOp1 for Kernel<'_> {
    fn name(&self) -> &'static str {
        "loss rows"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(values), Some((start, _)), Ok((_, vocab))) =
            (storage, layout.contiguous_offsets(), layout.shape().dims2())
        else {
            return Err(candle_core::Error::Msg("loss rows: expected contiguous F32 logits [n, V]".into()));
        };
        let Some(logits) = values.get_mut(start..start + self.rows * vocab) else {
            return Err(candle_core::Error::Msg("loss rows: the logits are shorter than their shape".into()));
        };
        let mut outcome = self.outcome.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Ok(mut sums) = *outcome {
            *outcome = self.batch.add_rows(logits, vocab, self.first, &mut sums).map(|()| sums);
        }
        Ok(())
    }
}
