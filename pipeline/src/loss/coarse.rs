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

/// The teacher's ln P at temperature T, K entries and the rest's, normalised. Formulas: `golden/README.md`, table of losses.
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
            (Tail::Renorm | Tail::StudentFull, _) => f64::NEG_INFINITY,
            (Tail::ExactTail, Some(lse_t)) if settings.needs_lse_t() => {
                let lse_t = f64::from(lse_t);
                let kept = (log_sum_exp(&ln) - lse_t).min(0.0);
                lse_t + (-kept.exp_m1()).ln()
            }
            (Tail::Bucket | Tail::ExactTail, _) => f64::from(target.tail_logprob) / t,
        });
    }
    let all = log_sum_exp(&ln);
    if all == f64::NEG_INFINITY {
        return Err(LossError::NoMass { row, kept: target.ids.len() });
    }
    ln.iter_mut().for_each(|l| *l -= all);
    Ok(ln)
}

/// The student's ln Q: `kept` logits over T and, where there is one, `rest` (already at T), normalised.
pub(super) fn student(kept: &[f64], rest: Option<f64>, temperature: f64) -> Vec<f64> {
    let mut ln: Vec<f64> = kept.iter().map(|z| z / temperature).chain(rest).collect();
    let all = log_sum_exp(&ln);
    ln.iter_mut().for_each(|l| *l -= all);
    ln
}
