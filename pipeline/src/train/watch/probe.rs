//! What a cache's narrowness costs, measured where the whole distribution of the teacher is known: on a small dense sample.
//!
//! A position is dense where the cache keeps every id of its vocabulary. There, with P the teacher's distribution, Q the student's at
//! temperature 1 and z the logits:
//!
//! - *angle*: between d(run's loss) / dz, as training computes it from what is read of the cache, and Q − P, the gradient of forward
//!   KL against the whole of P; degrees, averaged over the positions at which neither is 0. The run's loss is all of it: with a cross
//!   entropy in it, the angle says how far that pulls away too.
//! - *calibration against the teacher*: tokens of all positions fall into [`BINS`] bins by Q, bin b holding Q in (2^−(b+1), 2^−b] and
//!   the last one everything below; Σ over bins |Σ over their tokens (P − Q)| / N. It is 0 where the tokens to which the student
//!   gives about q have q on average by the teacher too, and at most 2. (Bins by powers of two, because what a narrow cache spoils
//!   lies among the unlikely tokens, which bins of equal width would put into one.)

use crate::Result;
use crate::evaluate::calibration::BINS;
use crate::loss::{self, LossSettings};
use potstill_cache::{SoftTargets, Target};

/// Most dense positions that are looked at.
const MOST_POSITIONS: usize = 2_000;

/// Figures of one dense position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Look {
    /// Degrees; `None` where a gradient is 0.
    angle: Option<f64>,
    /// Σ (P − Q) of each bin.
    gaps: [f64; BINS],
}

impl Look {
    /// A position whose logits are `z` `[V]`. `dense` is the teacher's whole distribution, `read` what the run reads of it, alone.
    /// Errors: as [`loss::rows`].
    pub(super) fn of(
        z: &[f32],
        dense: Target<'_>,
        (label, read, lse_t): (u32, Option<&SoftTargets>, Option<f32>),
        settings: &LossSettings,
    ) -> Result<Self> {
        let (p, q) = (whole(dense, z.len()), softmax(z));
        let mut gaps = [0.0; BINS];
        p.iter().zip(&q).for_each(|(p, q)| gaps[bin(*q)] += p - q);
        let full: Vec<f64> = q.iter().zip(&p).map(|(q, p)| q - p).collect();
        let mut gradient = z.to_vec();
        let lse_t = lse_t.as_ref().map(std::slice::from_ref);
        loss::rows(&mut gradient, z.len(), &[label], read, lse_t, settings, 1.0)?;
        let gradient: Vec<f64> = gradient.into_iter().map(f64::from).collect();
        Ok(Self { angle: degrees_between(&gradient, &full), gaps })
    }
}

/// Whether a position keeps every id of a vocabulary.
pub(super) fn is_dense(target: Target<'_>, vocabulary: u32) -> bool {
    target.ids.len() as u64 == u64::from(vocabulary)
}

/// Positions so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Looks {
    angles: (f64, u64),
    gaps: [f64; BINS],
    positions: usize,
}

impl Looks {
    /// Counts the next position, unless the student's distribution there is none: such a position is left out.
    pub(super) fn add(&mut self, look: &Look) {
        if look.gaps.iter().any(|gap| !gap.is_finite()) {
            return;
        }
        self.positions += 1;
        self.gaps.iter_mut().zip(look.gaps).for_each(|(sum, gap)| *sum += gap);
        if let Some(angle) = look.angle {
            self.angles.0 += angle;
            self.angles.1 += 1;
        }
    }

    /// How many more are looked at.
    pub(super) fn wanted(&self) -> usize {
        MOST_POSITIONS.saturating_sub(self.positions)
    }

    /// Mean angle in degrees and calibration error against the teacher, where there are any.
    pub(super) fn close(&self) -> (Option<f64>, Option<f64>) {
        let angle = (self.angles.1 > 0).then(|| self.angles.0 / self.angles.1 as f64);
        let error = self.gaps.iter().map(|gap| gap.abs()).sum::<f64>() / self.positions.max(1) as f64;
        (angle, (self.positions > 0).then_some(error))
    }
}

/// The teacher's distribution over `vocab` ids, normalised, since stored values are rounded; ids that it lacks have 0.
fn whole(dense: Target<'_>, vocab: usize) -> Vec<f64> {
    let mut p = vec![0.0; vocab];
    for (id, logprob) in dense.ids.iter().zip(dense.logprobs) {
        if let Some(p) = p.get_mut(*id as usize) {
            *p = f64::from(*logprob).exp();
        }
    }
    let all: f64 = p.iter().sum();
    p.iter_mut().for_each(|p| *p /= all);
    p
}

fn softmax(z: &[f32]) -> Vec<f64> {
    let largest = z.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut q: Vec<f64> = z.iter().map(|z| (f64::from(*z) - f64::from(largest)).exp()).collect();
    let all: f64 = q.iter().sum();
    q.iter_mut().for_each(|q| *q /= all);
    q
}

/// ⌊−log₂ q⌋, at most the last bin.
fn bin(q: f64) -> usize {
    // As a float's cast saturates, q = 0 falls into the last bin.
    ((-q.log2()) as usize).min(BINS - 1)
}

/// The angle between two vectors; `None` where one is 0 or not finite. With unit vectors a and b it is 2 atan2(|a − b|, |a + b|)
/// (Kahan, "Computing cross-products and rotations", 2016), which keeps small angles that a cosine would lose.
fn degrees_between(a: &[f64], b: &[f64]) -> Option<f64> {
    let norm = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    let (na, nb) = (norm(a), norm(b));
    if !(na > 0.0 && nb > 0.0 && na.is_finite() && nb.is_finite()) {
        return None;
    }
    let side = |sign: f64| a.iter().zip(b).map(|(a, b)| (a / na + sign * b / nb).powi(2)).sum::<f64>().sqrt();
    Some((2.0 * side(-1.0).atan2(side(1.0))).to_degrees())
}

#[cfg(test)]
#[path = "probe_tests.rs"]
mod tests;
