//! The kept part of a row of logits: the k largest, log-sum-exp over all, and the rest's log-probability.
//!
//! Ties go to the smaller id, so the choice does not depend on the order of work. The rest is summed directly over the ids that
//! were not kept: a difference from 1 would lose every digit of a small tail.

use super::with_f32;
use candle_core::{Result, Tensor, bail};
use potstill_cache::SoftTargets;
use rayon::prelude::*;
use std::cmp::Ordering;

/// One row's result.
#[derive(Debug, Clone, PartialEq)]
pub struct TopK {
    /// The k ids, largest log-probability first, ties by rising id.
    pub ids: Vec<u32>,
    /// Their log-probabilities over the whole row, in nats.
    pub logprobs: Vec<f32>,
    /// ln of the probability of all other ids; −∞ when there is none.
    pub tail_logprob: f32,
    /// ln Σ exp(logit) over the row.
    pub logsumexp: f64,
}

/// Soft targets of logits [n, V] (f32). Errors: k outside 1..=V, or a logit that is not finite (row and column named).
pub fn soft_targets(logits: &Tensor, k: usize) -> Result<SoftTargets> {
    let (n, vocab) = logits.dims2()?;
    let rows = rows(logits, k)?;
    let mut targets = SoftTargets::with_capacity(n, k.min(vocab));
    for row in &rows {
        targets.push(&row.ids, &row.logprobs, row.tail_logprob);
    }
    Ok(targets)
}

/// The same with each row's log-sum-exp.
pub fn rows(logits: &Tensor, k: usize) -> Result<Vec<TopK>> {
    let (_, vocab) = logits.dims2()?;
    if k == 0 || k > vocab {
        bail!("top-k: k = {k}, expected 1 to the width of the distribution, {vocab}");
    }
    with_f32(logits, |values| {
        let rows: Vec<Result<TopK>> = values.par_chunks(vocab).enumerate().map(|(r, row)| one_row(r, row, k)).collect();
        rows.into_iter().collect()
    })
}

fn one_row(number: usize, row: &[f32], k: usize) -> Result<TopK> {
    if let Some(column) = row.iter().position(|v| !v.is_finite()) {
        bail!("row {number}: the logit of id {column} is {}, expected a finite number", row[column]);
    }
    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
    let larger = |a: &u32, b: &u32| -> Ordering { row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b)) };
    if k < ids.len() {
        ids.select_nth_unstable_by(k - 1, larger);
    }
    let kept = &mut ids[..k];
    kept.sort_unstable_by(larger);
    let (first, last) = (kept[0], kept[k - 1]);
    let max = f64::from(row[first as usize]);
    let weight = |id: &u32| (f64::from(row[*id as usize]) - max).exp();
    let head: f64 = kept.iter().map(weight).sum();
    let tail: f64 = (0..row.len() as u32).filter(|id| larger(id, &last) == Ordering::Greater).map(|id| weight(&id)).sum();
    let log_sum = (head + tail).ln();
    let logprob = |id: &u32| (f64::from(row[*id as usize]) - max - log_sum) as f32;
    // Different logits may meet in one f32 log-probability, which is coarser where it is larger; such ids are ties again.
    let mut entries: Vec<(u32, f32)> = kept.iter().map(|id| (*id, logprob(id))).collect();
    entries.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let (ids, logprobs) = entries.into_iter().unzip();
    Ok(TopK { ids, logprobs, tail_logprob: (tail.ln() - log_sum) as f32, logsumexp: max + log_sum })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    /// 0.001 and the next f32 above it differ, but not once about 20 is taken away: f32 steps there are 2e-6.
    #[test]
    fn logits_that_meet_in_one_logprob_are_ties_by_rising_id() {
        let row = [1.0e-3, 1.0e-3f32.next_up(), 20.0];
        assert!(row[1] > row[0]);
        let top = one_row(0, &row, 3).unwrap();
        assert_eq!(top.ids, [2, 0, 1]);
        assert_eq!(top.logprobs[1], top.logprobs[2]);
    }
}
