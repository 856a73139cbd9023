//! Owns the head of the student during training: hidden states in, loss and gradient to the hidden states out. Refuses to
//! hold more than one chunk of logits; a `[N, V]` tensor never exists.
//!
//! ```text
//! of a chunk:  hidden [n, H] ─ · headᵀ ─► logits [n, V] ─ loss of each row ─► d logits, in their place ─ · head ─► d hidden [n, H]
//! ```
//! The second product goes by stretches of the vocabulary, so that only a few of the chunk's columns are ever packed beside it.

use super::{Batch, Checked, LossError, LossSettings, LossSums};
#[cfg(feature = "cuda")]
use crate::cuda::loss as gpu;
use crate::kernel::Rows;
use crate::linear::dense::DenseWeight;
use crate::linear::panel::Factor;
use crate::linear::product::{Product, add_product, write_products};
use crate::linear::{Head, Weight};
use crate::ops::floats;
use crate::run::RunContext;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use potstill_cache::SoftTargets;

/// Vocabulary entries whose gradients are packed at once for the way back to the hidden states.
pub(crate) const VOCABULARY_STRETCH: usize = 8192;

/// The loss of N scored positions from their hidden states `[N, H]` (f32) and the head, and d(total · scale) / d(hidden) `[N, H]` (f32).
///
/// `chunk` positions' logits exist at once. The result does not depend on it, nor on threads, to the last bit. The head gets no
/// gradient: it is frozen. Errors: as [`rows`](super::rows), and tensors of other shapes or dtypes.
pub fn fused(
    hidden: &Tensor,
    head: Head<'_>,
    labels: &[u32],
    targets: Option<&SoftTargets>,
    settings: &LossSettings,
    scale: f64,
    chunk: usize,
) -> Result<(LossSums, Tensor)> {
    let batch = Batch { labels, targets, lse_t: None, settings, scale };
    let done = fused_batch(hidden, head, &batch, chunk, &RunContext::default())?;
    let (sums, gradient) = done.ok_or_else(Error::stopped)?;
    Ok((sums.wait()?, gradient))
}

/// The sums of a batch, which a GPU may still have to compute.
#[derive(Debug)]
pub struct PendingSums(Stage);

#[derive(Debug)]
enum Stage {
    Done(LossSums),
    #[cfg(feature = "cuda")]
    OnGpu(Box<gpu::Owed>, LossSettings),
}

impl PendingSums {
    /// The sums. Waits for what was launched until they were asked for, and not for what was launched since. Errors: those of the rows.
    pub fn wait(self) -> Result<LossSums> {
        match self.0 {
            Stage::Done(sums) => Ok(sums),
            #[cfg(feature = "cuda")]
            Stage::OnGpu(owed, settings) => Ok(owed.wait()?.weighted(&settings)),
        }
    }
}

/// [`fused`] with everything about the rows in one value, ln Z_T included; `None` when a stop was asked for. On a GPU everything is
/// launched, and errors of the rows are those of the sums.
pub fn fused_batch(
    hidden: &Tensor,
    head: Head<'_>,
    batch: &Batch<'_>,
    chunk: usize,
    context: &RunContext,
) -> Result<Option<(PendingSums, Tensor)>> {
    let (n, width) = shapes(hidden, head.weight, batch)?;
    if chunk == 0 {
        return Err(Error::Setting { name: "head_chunk", found: "0".into(), expected: "1 or more positions".into() });
    }
    batch.check(head.weight.outputs())?;
    #[cfg(feature = "cuda")]
    if hidden.device().is_cuda() {
        let done = gpu::fused_batch(hidden, head, batch, chunk, context)?;
        return Ok(done.map(|(owed, gradient)| (PendingSums(Stage::OnGpu(Box::new(owed), *batch.settings)), gradient)));
    }
    let mut sums = LossSums::default();
    let mut gradient = vec![0f32; n * width];
    let mut logits = vec![Vec::new()];
    {
        let hidden = floats(hidden)?;
        let chunks = hidden.chunks(chunk.saturating_mul(width)).zip(gradient.chunks_mut(chunk.saturating_mul(width)));
        for (i, (hidden, gradient)) in chunks.enumerate() {
            if context.stopping() {
                return Ok(None);
            }
            differentiate(hidden, head, batch, i * chunk, &mut logits, gradient, &mut sums)?;
        }
    }
    let sums = PendingSums(Stage::Done(sums.weighted(batch.settings)));
    Ok(Some((sums, Tensor::from_vec(gradient, (n, width), hidden.device())?)))
}

/// Checks hidden states against head and labels; gives N and H.
fn shapes(hidden: &Tensor, head: &DenseWeight, batch: &Batch<'_>) -> Checked<(usize, usize)> {
    let (n, width) = (batch.labels.len(), head.inputs());
    if hidden.dims() == [n, width] && hidden.dtype() == DType::F32 && width > 0 {
        return Ok((n, width));
    }
    let (expected, found) = (format!("F32 [{n}, {width}]"), format!("{:?} {:?}", hidden.dtype(), hidden.dims()));
    Err(LossError::Tensor { what: "hidden states", expected, found })
}

/// Adds one chunk, whose first row is row `first` of the batch: its terms to `sums`, d(total · scale) / d(hidden) to `gradient`, which is 0.
fn differentiate(
    hidden: &[f32],
    head: Head<'_>,
    batch: &Batch<'_>,
    first: usize,
    logits: &mut [Vec<f32>],
    gradient: &mut [f32],
    sums: &mut LossSums,
) -> Result<()> {
    let (vocab, width) = (head.weight.outputs(), head.weight.inputs());
    let rows = Rows::pack(hidden, width, head.precision);
    let weight = Weight::Dense(head.weight.clone());
    write_products(&[Product::of(&rows, Factor::forward(&weight))], logits);
    let [logits] = logits else { return Ok(()) };
    batch.add_rows(logits, vocab, first, sums)?;
    for start in (0..vocab).step_by(VOCABULARY_STRETCH) {
        let stretch = start..vocab.min(start + VOCABULARY_STRETCH);
        let Some(part) = head.weight.rows(stretch.clone()).map(Weight::Dense) else { continue };
        let rows = Rows::pack_columns(logits, vocab, stretch, head.precision);
        add_product(&Product::of(&rows, Factor::backward(&part)), gradient);
    }
    Ok(())
}
