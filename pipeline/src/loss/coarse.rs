//! Owns the coarse distributions: the log-probabilities of the kept ids and, last, of everything else. Refuses to take a
//! student's tail as one minus the rest: it comes from the logits themselves.

use super::{LossError, LossSettings, Tail};
use potstill_cache::Target;

/// ln Σ exp over f64 values; −∞ when there are none or all are −∞.
pub(super) fn log_sum_exp(values: &[f64]) -> f64 {
    let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY {
        // A NaN is passed over by `max`; it must not turn into a number here.
        return if values.iter().any(|v| v.is_nan()) { f64::NAN } else { largest };
    }
    largest + values.iter().map(|v| (v - largest).exp()).sum::<f64>().ln()
}

/// What the coarse distributions of a row end with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Rest {
    /// An entry for everything outside the kept ids.
    Entry,
    /// Nothing: the tail is left out, or the kept ids are the whole vocabulary.
    Nothing,
}

/// The teacher's ln P at temperature T, K entries and the rest's, normalised, but with [`Tail::None`]: there they are as they are.
/// Formulas: `golden/README.md`, table of losses.
///
/// Stored values are rounded, so they are normalised even at T = 1: a divergence of unequal sums can fall below 0.
pub(super) fn teacher(
    target: Target<'_>,
    lse_t: Option<f32>,
    settings: &LossSettings,
    rest: Rest,
    row: usize,
) -> Result<Vec<f64>, LossError> {
    let t = settings.temperature;
    let mut ln: Vec<f64> = target.logprobs.iter().map(|l| f64::from(*l) / t).collect();
    if rest == Rest::Entry {
        ln.push(match (settings.tail, lse_t) {
            (Tail::Renorm | Tail::StudentFull | Tail::None, _) => f64::NEG_INFINITY,
            (Tail::ExactTail, Some(lse_t)) if settings.needs_lse_t() => {
                left_at(t, log_sum_exp(&ln), f64::from(lse_t), f64::from(target.tail_logprob) / t)
            }
            (Tail::Bucket | Tail::ExactTail, _) => f64::from(target.tail_logprob) / t,
        });
    }
    let mut all = log_sum_exp(&ln);
    if all == f64::NEG_INFINITY {
        return Err(LossError::NoMass { row, kept: target.ids.len() });
    }
    if settings.tail == Tail::None {
        all = if settings.needs_lse_t() { lse_t.map_or(f64::NAN, f64::from) } else { 0.0 };
    }
    ln.iter_mut().for_each(|l| *l -= all);
    Ok(ln)
}

/// ln of the rest at T: what the kept entries leave of Z_T. `bucket` is the whole tail as one token, tempered.
///
/// A stored tail of nothing (−∞) is nothing at every temperature. Rounded entries may leave nothing, or too much. A sum of p^(1/T) is at most (Σ p)^(1/T) for T < 1, so there the bucket is a bound.
/// For T > 1 it would be one from below, but a stored tail may have been raised to its floor and then proves nothing.
fn left_at(t: f64, kept: f64, lse_t: f64, bucket: f64) -> f64 {
    if kept >= lse_t || bucket == f64::NEG_INFINITY {
        return bucket;
    }
    let left = lse_t + (-(kept - lse_t).exp_m1()).ln();
    if t < 1.0 { left.min(bucket) } else { left }
}

/// The student's ln Q: `kept` logits over T and, where there is one, `rest` (already at T), normalised.
pub(super) fn student(kept: &[f64], rest: Option<f64>, temperature: f64) -> Vec<f64> {
    let mut ln: Vec<f64> = kept.iter().map(|z| z / temperature).chain(rest).collect();
    let all = log_sum_exp(&ln);
    ln.iter_mut().for_each(|l| *l -= all);
    ln
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use potstill_cache::SoftTargets;

    /// Teacher's P at T of probabilities of which the first `kept` are stored, rounded to multiples of `step` in ln; and the truth.
    fn rest(p: &[f64], kept: usize, step: f64, t: f64) -> (f64, f64) {
        let power = |p: &[f64]| p.iter().map(|p| p.powf(1.0 / t)).sum::<f64>();
        let stored = |p: f64| ((p.ln() / step).round() * step) as f32;
        let logprobs: Vec<f32> = p[..kept].iter().map(|p| stored(*p)).collect();
        let mut targets = SoftTargets::default();
        targets.push(&(0..kept as u32).collect::<Vec<_>>(), &logprobs, stored(p[kept..].iter().sum()));
        let settings = LossSettings { tail: Tail::ExactTail, temperature: t, ..LossSettings::default() };
        let ln = teacher(targets.position(0), Some(power(p).ln() as f32), &settings, Rest::Entry, 0).unwrap();
        (ln[kept].exp(), power(&p[kept..]) / power(p))
    }

    #[test]
    fn rounded_values_leave_no_impossible_tail() {
        // ln 0.6 = -0.5108 and ln 0.32 = -1.139.
        let p = [0.6, 0.32, 0.05, 0.03];
        for t in [0.5, 0.8, 2.0] {
            let (found, truth) = rest(&p, 2, 1e-7, t);
            assert!((found - truth).abs() < 1e-5, "unrounded at {t}: {found} {truth}");
        }
        // Stored too low (-0.52, -1.17), entries leave 4 % at T = 0.5, where the tail is 0.7 % and can be at most 1.4 %.
        let (found, truth) = rest(&p, 2, 0.13, 0.5);
        assert!((found - truth).abs() < 0.01, "too low: {found} {truth}");
        // Stored too high (-0.5, -1.0), they leave nothing.
        let (found, truth) = rest(&p, 2, 0.5, 0.5);
        assert!(found > 0.0 && (found - truth).abs() < 0.02, "too high: {found} {truth}");
        let (found, _) = rest(&p, 2, 0.5, 1.1);
        assert!(found > 0.0, "too high at a temperature above 1: {found}");
    }
}
