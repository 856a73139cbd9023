//! Owns the training losses and their gradients: divergence from sparse teacher distributions, cross entropy, and the
//! fused head. Refuses to know where targets come from, to normalise by a micro-batch, and to shift anything.
//!
//! The one idea: teacher and student are compared on a *coarse* distribution of K + 1 entries, the kept ids and everything
//! else, so a row of logits is read twice, overwritten by its gradient, and never copied. Shifted already: row *i* of the
//! logits, `labels[i]` and position *i* of the targets speak of the same next token.
//!
//! ```text
//! logits z [V] ─┬─ kept ids ─► z_1..z_K ──────┐
//!               └─ the others ─► ln Σ exp z ──┴─► coarse ln Q ─ divergence ─► g ─► dz (in place of z)
//! targets ──────────────────────────────────────► coarse ln P ──┘
//! ```

mod coarse;
mod comparison;
mod divergence;
mod exponential;
mod fused;
mod row;
mod settings;
mod unknown;

pub use comparison::Comparison;
pub(crate) use fused::VOCABULARY_STRETCH;
pub use fused::{PendingSums, fused, fused_batch};
#[cfg(feature = "cuda")]
pub(crate) use row::refuse_repeated;
pub use settings::{DEFAULT_BETA, DEFAULT_SKEW, Divergence, LossError, LossSettings, Tail};
pub use unknown::TailBounds;

use crate::Result;
use potstill_cache::SoftTargets;
use rayon::prelude::*;

/// A step that only the inputs can fail.
type Checked<T> = std::result::Result<T, LossError>;

/// Sums over rows, in nats; divide by the number of scored positions of the optimiser step for a mean.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LossSums {
    /// `kd_alpha · T² · kd + kd_ce_alpha · ce`.
    pub total: f64,
    /// The divergence at temperature T, without T² and weight.
    pub kd: f64,
    /// The cross entropy with the labels, without weight.
    pub ce: f64,
}

/// What N rows of logits are compared with, and how.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// N next tokens, each below the student's vocabulary.
    pub labels: &'a [u32],
    /// N teacher distributions; `None` leaves the divergence out.
    pub targets: Option<&'a SoftTargets>,
    /// N values ln Σ exp(logprob / T) over the teacher's vocabulary; only [`Tail::ExactTail`] and [`Tail::None`] need them, at T ≠ 1.
    pub lse_t: Option<&'a [f32]>,
    /// Which loss.
    pub settings: &'a LossSettings,
    /// Factor of the gradient (not of the sums): 1 / scored positions of the optimiser step.
    pub scale: f64,
}

/// The loss of N rows of logits `[n, vocab]`, whose place d(total · scale) / d(logits) takes.
///
/// Rows are computed in parallel and added in order, so the result does not depend on threads. A row that is not finite gives
/// sums that are not finite; the caller decides what becomes of the step. After an error the logits mean nothing.
///
/// Errors: lengths that do not fit, a label or id beyond the vocabulary, an id twice in a position, a teacher's value that is
/// no log-probability, a setting out of its range.
pub fn rows(
    logits: &mut [f32],
    vocab: usize,
    labels: &[u32],
    targets: Option<&SoftTargets>,
    lse_t: Option<&[f32]>,
    settings: &LossSettings,
    scale: f64,
) -> Result<LossSums> {
    let batch = Batch { labels, targets, lse_t, settings, scale };
    batch.check(vocab)?;
    if vocab.checked_mul(labels.len()) != Some(logits.len()) {
        let (expected, found) = (format!("{} rows of {vocab}", labels.len()), logits.len());
        return Err(LossError::Length { what: "logits", expected, found }.into());
    }
    let mut sums = LossSums::default();
    batch.add_rows(logits, vocab, 0, &mut sums)?;
    Ok(sums.weighted(settings))
}

impl LossSums {
    /// With the weighted total filled in.
    fn weighted(self, settings: &LossSettings) -> Self {
        let LossSettings { kd_alpha, kd_ce_alpha, temperature: t, .. } = *settings;
        Self { total: kd_alpha * t * t * self.kd + kd_ce_alpha * self.ce, ..self }
    }
}

impl Batch<'_> {
    /// Checks settings, lengths, labels, ids and log-probabilities against a student of this vocabulary.
    fn check(&self, vocab: usize) -> Result<()> {
        self.settings.check()?;
        let n = self.labels.len();
        let length = |what, found| match found == n {
            true => Ok(()),
            false => Err(LossError::Length { what, expected: format!("{n}, one a label"), found }),
        };
        if let Some((row, &label)) = self.labels.iter().enumerate().find(|(_, l)| **l as usize >= vocab) {
            return Err(LossError::Label { row, label, vocab }.into());
        }
        let Some(targets) = self.targets else { return Ok(()) };
        length("targets", targets.len())?;
        if self.settings.needs_lse_t() {
            length("ln Z_T of the teacher (for this tail and temperature)", self.lse_t.map_or(0, <[f32]>::len))?;
        }
        if let Some((row, &found)) = self.lse_t.and_then(|l| l.iter().enumerate().find(|(_, lse_t)| !lse_t.is_finite())) {
            return Err(LossError::LogSum { row, found }.into());
        }
        for row in 0..n {
            let target = targets.position(row);
            if let Some(&id) = target.ids.iter().find(|id| **id as usize >= vocab) {
                return Err(LossError::TargetId { row, id, vocab }.into());
            }
            let stored = target.logprobs.iter().chain([&target.tail_logprob]);
            // NaN is not at most 0; −∞, of a tail that is empty, is.
            if let Some(&found) = stored.into_iter().find(|l| l.partial_cmp(&&0.0).is_none_or(std::cmp::Ordering::is_gt)) {
                return Err(LossError::Logprob { row, found }.into());
            }
        }
        Ok(())
    }

    /// Adds rows `first..` of the batch to the sums and replaces their logits by the gradient.
    fn add_rows(&self, logits: &mut [f32], vocab: usize, first: usize, sums: &mut LossSums) -> Checked<()> {
        if vocab == 0 {
            return Ok(());
        }
        let terms: Vec<Checked<row::Terms>> =
            logits.par_chunks_exact_mut(vocab).enumerate().map(|(i, z)| row::differentiate(z, first + i, self)).collect();
        for term in terms {
            let term = term?;
            sums.kd += term.kd;
            sums.ce += term.ce;
        }
        Ok(())
    }
}
