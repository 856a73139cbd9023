//! What a cache keeps of a row of logits: the selection's entries, the rest's log-probability, draws, log-sum-exps. Refuses to know
//! of models, files and rounding, but for logits that are kept as a bf16 head gives them.
//!
//! The one idea: a row becomes weights exp(z − max) in f64 once; everything kept of it is a sum over them in the order of ids, so
//! it is a function of the row (and, for draws, of its [`Place`]) and not of how rows were cut into chunks or spread over threads.
//!
//! ```text
//! z [V] ─ (bf16) ─► w = exp(z − max) ─► W = Σ w ─► log-probability (z − max) − ln W
//!                      │                   k largest, ties to the smaller id ─ Selection::kept ─► kept
//!                      ├─ Σ over ids not kept ───────────────────────────────► tail, never 1 − Σ kept
//!                      ├─ sorted uniforms · W, or · tail ────────────────────► drawn ids and counts
//!                      └─ ln Σ exp((z − max) / T) − ln W / T ────────────────► ln Σ p^(1/T)
//! ```

use super::draw::{self, Place};
use super::with_f32;
use candle_core::{Result, Tensor, bail};
use half::bf16;
use potstill_cache::{Selection, SoftTargets, Storage, Target, Values};
use rayon::prelude::*;
use std::cmp::Ordering;

/// What is kept of each distribution.
#[derive(Debug, Clone, PartialEq)]
pub struct Capture {
    /// Which entries.
    pub selection: Selection,
    /// What their numbers are.
    pub values: Values,
    /// Temperatures T at which ln Σ p^(1/T) is kept.
    pub lse_temperatures: Vec<f32>,
}

impl Capture {
    /// The `k` most likely ids as log-probabilities, and the tail.
    pub fn top_k(k: u16) -> Self {
        Self { selection: Selection::TopK { k }, values: Values::Logprob, lse_temperatures: Vec::new() }
    }

    /// What rows stored as `storage` says need.
    pub fn of(storage: &Storage, lse_temperatures: &[f32]) -> Self {
        Self { selection: storage.selection, values: storage.values, lse_temperatures: lse_temperatures.to_vec() }
    }

    /// Soft targets, unrounded, of logits [n, V] (f32) that stand at `places` (n).
    ///
    /// Errors: a head wider than V or of 0 entries, other than n places, logits together with draws, a logit that is not finite (row
    /// and column named).
    pub fn targets(&self, logits: &Tensor, places: &[Place]) -> Result<SoftTargets> {
        let (n, vocab) = logits.dims2()?;
        let head = usize::from(self.selection.head());
        let drawn_alone = matches!(self.selection, Selection::Sampled { .. });
        if head > vocab || head == 0 && !drawn_alone {
            bail!("{}: expected 1 to {vocab} kept ids, as wide as the distribution", self.selection);
        }
        if self.values == Values::LogitBf16 && self.selection.draws().is_some() {
            bail!("{}: expected log-probabilities, found logits", self.selection);
        }
        if places.len() != n {
            bail!("expected a place for each of {n} rows of logits, found {}", places.len());
        }
        with_f32(logits, |values| {
            let rows = values.par_chunks(vocab.max(1)).zip(places).enumerate();
            let rows: Vec<Result<Row>> =
                rows.map_init(Scratch::default, |scratch, (number, (z, place))| self.row(scratch, number, z, *place)).collect();
            let mut targets = SoftTargets::with_capacity(n, head);
            for row in rows {
                targets.push_target(&row?.target());
            }
            Ok(targets)
        })
    }

    fn row(&self, scratch: &mut Scratch, number: usize, z: &[f32], place: Place) -> Result<Row> {
        if let Some(column) = z.iter().position(|v| !v.is_finite()) {
            bail!("row {number}: the logit of id {column} is {}, expected a finite number", z[column]);
        }
        let Scratch { ids, rounded, weights } = scratch;
        let z = match self.values {
            Values::Logprob => z,
            Values::LogitBf16 => {
                rounded.clear();
                // Adding 0 turns −0 into 0: equal logits are ties, whatever their sign.
                rounded.extend(z.iter().map(|v| bf16::from_f32(*v).to_f32() + 0.0));
                if let Some(column) = rounded.iter().position(|v| !v.is_finite()) {
                    bail!("row {number}: the logit of id {column} is {}, more than bfloat16 holds", z[column]);
                }
                &rounded[..]
            }
        };
        let max = f64::from(z.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        weights.clear();
        weights.extend(z.iter().map(|v| (f64::from(*v) - max).exp()));
        let total: f64 = weights.iter().sum();
        let mut row = Row { lse_t: self.lse_at_temperatures(z, max, total.ln()), ..Row::default() };
        self.keep(&mut row, ids, z, (max, total.ln()));
        if let Selection::Sampled { draws, seed } = self.selection {
            let all = (0..).zip(weights.iter().copied());
            (row.sample_ids, row.sample_counts) = draw::counts(all, total, &draw::sorted_uniforms(seed, place, draws));
        }
        let mut left_out = if row.ids.is_empty() { row.sample_ids.clone() } else { row.ids.clone() };
        left_out.sort_unstable();
        let rest: f64 = others(weights, &left_out).map(|(_, w)| w).sum();
        row.tail_logprob = ((rest.ln() - total.ln()) as f32).min(0.0) + 0.0;
        if let Selection::Hybrid { draws, seed, .. } = self.selection
            && rest > 0.0
        {
            let uniforms = draw::sorted_uniforms(seed, place, draws);
            (row.sample_ids, row.sample_counts) = draw::counts(others(weights, &left_out), rest, &uniforms);
        }
        Ok(row)
    }

    /// ln Σ p^(1/T) with ln p = (z − max) − ln W.
    fn lse_at_temperatures(&self, z: &[f32], max: f64, log_total: f64) -> Vec<f32> {
        let at = |t: &f32| {
            let t = f64::from(*t);
            let sum: f64 = z.iter().map(|v| ((f64::from(*v) - max) / t).exp()).sum();
            (sum.ln() - log_total / t) as f32
        };
        self.lse_temperatures.iter().map(at).collect()
    }

    /// The head: ids by falling stored value, ties by rising id, as far as the selection keeps them.
    fn keep(&self, row: &mut Row, ids: &mut Vec<u32>, z: &[f32], (max, log_total): (f64, f64)) {
        let head = usize::from(self.selection.head());
        let exact = self.values == Values::LogitBf16;
        row.logsumexp = exact.then_some((max + log_total) as f32);
        let logprob = |id: u32| {
            let z = f64::from(z[id as usize]);
            let l = row.logsumexp.map_or(z - max - log_total, |lse| z - f64::from(lse)) as f32;
            l.min(0.0) + 0.0
        };
        let mut entries: Vec<(u32, f32)> = largest(ids, z, head).iter().map(|&id| (id, logprob(id))).collect();
        if !exact {
            // Different logits may meet in one f32 log-probability, which is coarser where it is larger; such ids are ties again.
            entries.sort_unstable_by(|a, b| falling(a.1, b.1).then(a.0.cmp(&b.0)));
        }
        (row.ids, row.logprobs) = entries.into_iter().unzip();
        let kept = self.selection.kept(&row.logprobs);
        row.ids.truncate(kept);
        row.logprobs.truncate(kept);
        if exact {
            row.logits = row.ids.iter().map(|id| z[*id as usize]).collect();
        }
    }
}

/// Buffers as wide as the vocabulary, one of each a thread.
#[derive(Default)]
struct Scratch {
    ids: Vec<u32>,
    rounded: Vec<f32>,
    weights: Vec<f64>,
}

/// All that is kept of one row.
#[derive(Debug, Default)]
struct Row {
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    logits: Vec<f32>,
    logsumexp: Option<f32>,
    tail_logprob: f32,
    sample_ids: Vec<u32>,
    sample_counts: Vec<u16>,
    lse_t: Vec<f32>,
}

impl Row {
    fn target(&self) -> Target<'_> {
        Target {
            ids: &self.ids,
            logprobs: &self.logprobs,
            tail_logprob: self.tail_logprob,
            sample_ids: &self.sample_ids,
            sample_counts: &self.sample_counts,
            logits: &self.logits,
            logsumexp: self.logsumexp,
            lse_t: &self.lse_t,
        }
    }
}

/// Ids and weights but for those of `left_out`, which rises.
fn others<'a>(weights: &'a [f64], left_out: &'a [u32]) -> impl Iterator<Item = (u32, f64)> + 'a {
    let mut left_out = left_out.iter().copied().peekable();
    (0..).zip(weights.iter().copied()).filter(move |(id, _)| left_out.next_if_eq(id).is_none())
}

/// The ids of the k largest values, largest first, ties by rising id.
fn largest<'a>(ids: &'a mut Vec<u32>, z: &[f32], k: usize) -> &'a [u32] {
    ids.clear();
    ids.extend(0..z.len() as u32);
    let k = k.min(ids.len());
    if k == 0 {
        return &[];
    }
    let larger = |a: &u32, b: &u32| falling(z[*a as usize], z[*b as usize]).then(a.cmp(b));
    if k < ids.len() {
        ids.select_nth_unstable_by(k - 1, larger);
    }
    let kept = &mut ids[..k];
    kept.sort_unstable_by(larger);
    kept
}

/// Larger values first. All are finite; 0 and −0 are equal.
fn falling(a: f32, b: f32) -> Ordering {
    b.partial_cmp(&a).unwrap_or(Ordering::Equal)
}
