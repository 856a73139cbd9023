//! Owns what a cache cannot know of a distribution at T ≠ 1: how much of it the tail has there, between two bounds that can both
//! be reached. Refuses to guess between them.
//!
//! With a = 1/T, the kept entries give S = Σ pᵃ over themselves. The tail's R = Σ pᵃ is not stored; what is known of its n tokens
//! (those of the vocabulary that were not kept) is that they sum to τ, and that none has more than c, the least kept
//! probability, because the kept entries are the most likely ones. R is a sum of equal functions over that polytope, xᵃ being
//! concave for a < 1 and convex for a > 1 (Jensen; a concave function is least at a vertex). So
//!
//! ```text
//! even    n (τ/n)ᵃ              all tokens alike
//! steep   m cᵃ + (τ − m c)ᵃ     m = ⌊τ/c⌋ tokens of c, one of what is left, the others 0: a vertex
//! T > 1   steep ≤ R ≤ even      T < 1   even ≤ R ≤ steep
//! ```
//!
//! and the tail's share R / (S + R), rising in R, lies between the shares of both. The loss takes the tail as one token, τᵃ.
//! (x + y)ᵃ ≤ xᵃ + yᵃ for a < 1 (≥ for a > 1), so that lies on the steep side, outside or at its bound. Kept entries keep their
//! proportions whatever R is, so what the loss takes for P differs from the truth in total variation by exactly the difference
//! of the tail's shares: at most by that of the even bound.
//!
//! Stored values are taken for the truth; their rounding is another, smaller matter. But a tail that was raised to the
//! cache's floor bounds R from above alone.

use super::coarse::log_sum_exp;
use potstill_cache::{TAIL_FLOOR_LOGPROB, Target};

/// Rounding to few bits may carry the floor this far up.
const FLOOR_ROUNDING: f32 = 0.75;

/// The tail's share of a teacher's distribution at a temperature: where it can lie, and where the loss puts it. From 0 to 1 each.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TailBounds {
    /// The least that it can be.
    pub least: f64,
    /// The most that it can be.
    pub most: f64,
    /// What [`Tail::Bucket`](super::Tail::Bucket) takes it for.
    pub bucket: f64,
}

impl TailBounds {
    /// The bounds of a position's tail at `temperature` (above 0), of a teacher over `vocab` ids. The target's entries are the most
    /// likely ones, exact, not drawn. Without an entry outside the kept ones, or without probability there, all three are 0.
    pub fn of(target: Target<'_>, vocab: usize, temperature: f64) -> Self {
        let a = 1.0 / temperature;
        let tail = f64::from(target.tail_logprob);
        let others = vocab.saturating_sub(target.ids.len()) as f64;
        if tail == f64::NEG_INFINITY || others == 0.0 {
            return Self { least: 0.0, most: 0.0, bucket: 0.0 };
        }
        let powers: Vec<f64> = target.logprobs.iter().map(|l| f64::from(*l) * a).collect();
        let kept = log_sum_exp(&powers);
        let share = |rest: f64| 1.0 / (1.0 + (kept - rest).exp());
        let least_kept = target.logprobs.iter().copied().fold(0.0_f32, f32::min);
        let (even, steep) = (others.ln() + a * (tail - others.ln()), steep(f64::from(least_kept), tail, others, a));
        let (least, most) = if a < 1.0 { (share(steep), share(even)) } else { (share(even), share(steep)) };
        let at_floor = target.tail_logprob <= TAIL_FLOOR_LOGPROB + FLOOR_ROUNDING;
        Self { least: if at_floor { 0.0 } else { least }, most, bucket: share(a * tail) }
    }

    /// The most that the distribution of the loss can be off by, in total variation: probability of unknown whereabouts.
    pub fn unknown(&self) -> f64 {
        (self.most - self.bucket).max(self.bucket - self.least).max(0.0)
    }
}

/// ln (m cᵃ + (τ − m c)ᵃ) of a tail of `others` tokens, from ln c and ln τ.
///
/// Rounded values may leave more for the tail than its tokens can have; then they all have as much as it takes.
fn steep(cap: f64, tail: f64, others: f64, a: f64) -> f64 {
    let cap = cap.max(tail - others.ln());
    let full = (tail - cap).exp().min(others).floor();
    if full == 0.0 {
        return a * tail;
    }
    let left = (1.0 - full * (cap - tail).exp()).max(0.0);
    log_sum_exp(&[full.ln() + a * cap, a * (tail + left.ln())])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use potstill_cache::SoftTargets;
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    const TEMPERATURES: [f64; 6] = [0.25, 0.5, 0.9, 1.3, 2.0, 5.0];
    /// Stored values are f32: 6e-8 of a logarithm of up to some 20, times a share of at most 1 and 1/T of at most 4.
    const STORED: f64 = 1e-5;

    /// The bounds of probabilities of which the `kept` largest (the first) are stored, and the tail's true share.
    fn bounds(p: &[f64], kept: usize, t: f64) -> (TailBounds, f64) {
        let logprobs: Vec<f32> = p[..kept].iter().map(|p| p.ln() as f32).collect();
        let mut targets = SoftTargets::default();
        targets.push(&(0..kept as u32).collect::<Vec<_>>(), &logprobs, p[kept..].iter().sum::<f64>().ln() as f32);
        let power = |p: &[f64]| p.iter().map(|p| p.powf(1.0 / t)).sum::<f64>();
        (TailBounds::of(targets.position(0), p.len(), t), power(&p[kept..]) / power(p))
    }

    #[test]
    fn the_truth_lies_between_the_bounds() {
        let mut dice = ChaCha8Rng::seed_from_u64(5);
        let mut wide = 0;
        for case in 0..400 {
            // From nearly even to nearly certain.
            let steepness = f64::from(case % 20) * 0.7;
            let mut p: Vec<f64> = (0..60).map(|_| (f64::from(dice.next_u32()) / f64::from(u32::MAX) * steepness).exp()).collect();
            p.sort_by(|a, b| b.total_cmp(a));
            let all: f64 = p.iter().sum();
            p.iter_mut().for_each(|p| *p /= all);
            for t in TEMPERATURES {
                let (bounds, truth) = bounds(&p, 1 + case as usize % 30, t);
                let context = format!("case {case}, T {t}: {bounds:?}, in truth {truth}");
                assert!(bounds.least - STORED <= truth && truth <= bounds.most + STORED, "{context}");
                assert!((bounds.bucket - truth).abs() <= bounds.unknown() + STORED, "{context}");
                wide += usize::from(bounds.most - bounds.least > 0.01);
            }
        }
        assert!(wide > 1000, "{wide}");
    }

    #[test]
    fn both_bounds_are_reached() {
        // Kept 0.4 and 0.16, tail 0.44: all alike (11 of 0.04), or two of 0.16 and one of 0.12.
        let even: Vec<f64> = [0.4, 0.16].into_iter().chain([0.04; 11]).collect();
        let steep: Vec<f64> = [0.4, 0.16, 0.16, 0.16, 0.12].into_iter().chain([0.0; 8]).collect();
        for t in TEMPERATURES {
            let ((at_even, one), (at_steep, other)) = (bounds(&even, 2, t), bounds(&steep, 2, t));
            let (least, most) = if t < 1.0 { (one, other) } else { (other, one) };
            // The same is stored of both, but for the last bit of the tail's sum.
            assert!((at_even.least - at_steep.least).abs() < STORED, "{at_even:?} {at_steep:?}");
            assert!((at_even.least - least).abs() < STORED && (at_even.most - most).abs() < STORED, "T {t}: {at_even:?}");
            assert!(most - least > 1e-3, "T {t}: the case tells them apart");
            assert!((at_even.unknown() - (at_even.bucket - one).abs()).abs() < STORED, "T {t}: {at_even:?} {one}");
        }
    }

    #[test]
    fn a_tail_that_is_known_is_known() {
        // At T = 1, with nothing outside, with one token outside, and with no probability there.
        for (p, t) in [(&[0.6, 0.3, 0.05, 0.05][..], 1.0), (&[0.7, 0.3], 2.0), (&[0.6, 0.3, 0.1], 2.0), (&[0.7, 0.3, 0.0], 0.5)] {
            let (bounds, truth) = bounds(p, 2, t);
            assert!(bounds.unknown() < STORED && (bounds.bucket - truth).abs() < STORED, "{p:?} at {t}: {bounds:?}");
        }
    }

    #[test]
    fn a_tail_at_the_floor_may_be_nothing() {
        let mut targets = SoftTargets::default();
        targets.push(&[0], &[0.0], TAIL_FLOOR_LOGPROB);
        let bounds = TailBounds::of(targets.position(0), 150_000, 4.0);
        assert_eq!(bounds.least, 0.0);
        assert!(bounds.unknown() > 0.9, "150,000 tokens of 1e-9 / 150,000 at T = 4: {bounds:?}");
    }
}
