//! What a cache keeps of a row of logits: the selection's entries, the rest's log-probability, draws, log-sum-exps. Refuses to know
//! of models, files and rounding, but for logits that are kept as a bf16 head gives them.
//!
//! The one idea: a row is read a few times and never spread out; everything kept of it is a sum of f32 weights exp(z − max), added in
//! f64 in a fixed order, so it is a function of the row (and, for draws, of its [`Place`]) and not of how rows were cut into chunks,
//! spread over threads, or of how wide the machine's vectors are.
//!
//! ```text
//! z [V] ─ (bf16) ─► w = exp(z − max) ─► W = Σ w ─► log-probability (z − max) − ln W, in f64
//!                      │                   k largest, ties to the smaller id ─ Selection::kept ─► kept
//!                      ├─ Σ over ids not kept ───────────────────────────────► tail, never 1 − Σ kept
//!                      ├─ sorted uniforms · W, or · tail ────────────────────► drawn ids and counts
//!                      └─ ln Σ exp((z − max) / T) − ln W / T ────────────────► ln Σ p^(1/T)
//! ```

use super::draw::{self, Place};
use super::largest::{Largest, falling};
use super::weights::{Weights, tempered_total};
use super::with_f32;
#[cfg(feature = "cuda")]
use crate::cuda::head as gpu;
use crate::kernel::vectorised;
use candle_core::{Device, Result, Tensor, bail};
use potstill_cache::{LOGIT_MANTISSA_BITS, Selection, SoftTargets, Storage, Target, Values, round_to_mantissa};
use rayon::prelude::*;

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
    /// Errors: as [`rows`](Self::rows), and a logit that cannot be kept (row and id named).
    pub fn targets(&self, logits: &Tensor, places: &[Place]) -> Result<SoftTargets> {
        self.rows(logits, places)?.sound()
    }

    /// Soft targets as [`targets`](Self::targets), with the rows that have none.
    ///
    /// Errors: a head wider than V or of 0 entries, other than n places, logits together with draws.
    pub fn rows(&self, logits: &Tensor, places: &[Place]) -> Result<Captured> {
        self.begin(logits, places)?.finish()
    }

    /// Begins with [`rows`](Self::rows): on a GPU the work is launched, and the host is free until the end of it.
    pub fn begin(&self, logits: &Tensor, places: &[Place]) -> Result<Capturing> {
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
        #[cfg(feature = "cuda")]
        if logits.device().is_cuda() && self.selection.draws().is_none() && head <= gpu::MOST_KEPT {
            let factors: Vec<f32> = self.lse_temperatures.iter().map(|t| factor(*t)).collect();
            let summing = gpu::sum_up(logits, head, self.values == Values::LogitBf16, &factors)?;
            return Ok(Capturing(Stage::OnGpu(self.clone(), Box::new(summing))));
        }
        // Draws walk a row block by block, which only the host does.
        let logits = &logits.to_device(&Device::Cpu)?;
        let captured = with_f32(logits, |values| {
            let rows = values.par_chunks(vocab.max(1)).zip(places).enumerate();
            let rows: Vec<std::result::Result<Row, BadLogit>> =
                rows.map_init(Scratch::default, |scratch, (number, (z, place))| self.row(scratch, number, z, *place)).collect();
            Ok(self.captured(rows, head))
        })?;
        Ok(Capturing(Stage::Done(Box::new(captured))))
    }

    fn captured(&self, rows: Vec<std::result::Result<Row, BadLogit>>, head: usize) -> Captured {
        let mut captured = Captured { targets: SoftTargets::with_capacity(rows.len(), head), bad: Vec::new() };
        for row in rows {
            let row = row.unwrap_or_else(|bad| {
                captured.bad.push(bad);
                self.nothing()
            });
            captured.targets.push_target(&row.target());
        }
        captured
    }

    /// What stands in the place of a row that has no targets: every part that the others have, and nothing in it.
    fn nothing(&self) -> Row {
        let logsumexp = (self.values == Values::LogitBf16).then_some(0.0);
        Row { logsumexp, lse_t: vec![0.0; self.lse_temperatures.len()], ..Row::default() }
    }

    fn row(&self, scratch: &mut Scratch, number: usize, z: &[f32], place: Place) -> std::result::Result<Row, BadLogit> {
        let Scratch { largest, rounded, sums } = scratch;
        let given = z;
        let z = match self.values {
            Values::Logprob => z,
            Values::LogitBf16 => {
                round(z, rounded);
                &rounded[..]
            }
        };
        let bad = |id| BadLogit { row: number, id: id as u32, value: given[id] };
        let max = largest.read(z, usize::from(self.selection.head())).map_err(bad)?;
        let weights = Weights::of(z, max, sums);
        let log_total = weights.total().ln();
        let mut row = Row::default();
        let draw = |row: &mut Row, weights: &Weights<'_>, seed, draws| {
            let uniforms = draw::sorted_uniforms(seed, place, draws);
            (row.sample_ids, row.sample_counts) =
                draw::counts(weights.sums(), |block| weights.weights(block), weights.total(), &uniforms);
        };
        let head = largest.ids(z, usize::from(self.selection.head()));
        self.keep(&mut row, head.iter().map(|id| (*id, z[*id as usize])), (f64::from(max), log_total));
        if let Selection::Sampled { draws, seed } = self.selection {
            draw(&mut row, &weights, seed, draws);
        }
        let mut left_out = if row.ids.is_empty() { row.sample_ids.clone() } else { row.ids.clone() };
        left_out.sort_unstable();
        let rest = weights.without(&left_out);
        let is_something = row.set_tail(rest.shift() - f64::from(max), rest.total(), log_total);
        if let Selection::Hybrid { draws, seed, .. } = self.selection
            && is_something
        {
            draw(&mut row, &rest, seed, draws);
        }
        row.lse_t = self.lse_at_temperatures(z, max, log_total, sums);
        Ok(row)
    }

    /// ln Σ p^(1/T) with ln p = (z − max) − ln W.
    fn lse_at_temperatures(&self, z: &[f32], max: f32, log_total: f64, sums: &mut Vec<f64>) -> Vec<f32> {
        let at = |t: &f32| lse_at(*t, tempered_total(z, max, factor(*t), sums), log_total);
        self.lse_temperatures.iter().map(at).collect()
    }

    /// The head: ids by falling stored value, ties by rising id, as far as the selection keeps them.
    fn keep(&self, row: &mut Row, largest: impl Iterator<Item = (u32, f32)>, (max, log_total): (f64, f64)) {
        let exact = self.values == Values::LogitBf16;
        row.logsumexp = exact.then_some((max + log_total) as f32);
        let logprob = |z: f32| {
            let z = f64::from(z);
            let l = row.logsumexp.map_or(z - max - log_total, |lse| z - f64::from(lse)) as f32;
            l.min(0.0) + 0.0
        };
        let mut entries: Vec<(u32, f32, f32)> = largest.map(|(id, z)| (id, logprob(z), z)).collect();
        if !exact {
            // Different logits may meet in one f32 log-probability, which is coarser where it is larger; such ids are ties again.
            entries.sort_unstable_by(|a, b| falling(a.1, b.1).then(a.0.cmp(&b.0)));
        }
        row.ids = entries.iter().map(|entry| entry.0).collect();
        row.logprobs = entries.iter().map(|entry| entry.1).collect();
        let kept = self.selection.kept(&row.logprobs);
        row.ids.truncate(kept);
        row.logprobs.truncate(kept);
        if exact {
            row.logits = entries[..kept].iter().map(|entry| entry.2).collect();
        }
    }
}

#[cfg(feature = "cuda")]
impl Capture {
    /// [`rows`](Self::rows) of logits of which a GPU has found the largest and summed up the rest.
    fn rows_of_gpu(&self, summed: &gpu::Summed) -> Captured {
        let rows = (0..summed.bad.len()).into_par_iter().map(|number| match u32::try_from(summed.bad[number]) {
            Err(_) => Ok(self.row_of_gpu(summed, number)),
            Ok(id) => Err(BadLogit { row: number, id, value: summed.values[number * summed.kept] }),
        });
        self.captured(rows.collect(), summed.kept)
    }

    fn row_of_gpu(&self, summed: &gpu::Summed, number: usize) -> Row {
        let place = number * summed.kept..(number + 1) * summed.kept;
        let (ids, values) = (&summed.ids[place.clone()], &summed.values[place]);
        let (max, log_total) = (f64::from(summed.max[number]), summed.total[number].ln());
        let mut row = Row::default();
        self.keep(&mut row, ids.iter().copied().zip(values.iter().copied()), (max, log_total));
        // What the selection cut off the k largest belongs to the rest, of which it is the larger part.
        let mut cut: Vec<f64> = Vec::new();
        if row.ids.len() < ids.len() {
            cut.extend(ids.iter().zip(values).filter(|(id, _)| !row.ids.contains(id)).map(|(_, z)| f64::from(*z)));
        }
        let rest_max = f64::from(summed.rest_max[number]);
        let shift = cut.iter().copied().fold(rest_max, f64::max);
        let total = summed.rest[number] * (rest_max - shift).exp() + cut.iter().map(|z| (z - shift).exp()).sum::<f64>();
        row.set_tail(shift - max, total, log_total);
        let sums = self.lse_temperatures.iter().zip(&summed.tempered);
        row.lse_t = sums.map(|(t, sums)| lse_at(*t, sums[number], log_total)).collect();
        row
    }
}

/// 1 / T. A factor of ∞ would make the largest logit's 0 a NaN.
fn factor(t: f32) -> f32 {
    (1.0 / t).min(f32::MAX)
}

/// ln Σ p^(1/T) from Σ exp((z − max) / T) and ln W.
fn lse_at(t: f32, sum: f64, log_total: f64) -> f32 {
    (sum.ln() - log_total / f64::from(t)) as f32
}

/// A capture under way.
#[derive(Debug)]
pub struct Capturing(Stage);

#[derive(Debug)]
enum Stage {
    Done(Box<Captured>),
    #[cfg(feature = "cuda")]
    OnGpu(Capture, Box<gpu::Summing>),
}

impl Capturing {
    /// What was captured. Waits for it, and for nothing that was launched since.
    pub fn finish(self) -> Result<Captured> {
        match self.0 {
            Stage::Done(captured) => Ok(*captured),
            #[cfg(feature = "cuda")]
            Stage::OnGpu(capture, summing) => Ok(capture.rows_of_gpu(&summing.wait()?)),
        }
    }
}

/// What was captured of rows of logits.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Captured {
    /// One target for each row; that of a bad row is empty and stands for nothing.
    pub targets: SoftTargets,
    /// The first bad logit of each bad row, rows rising.
    pub bad: Vec<BadLogit>,
}

impl Captured {
    /// Appends the rows of `other`, whose numbers go on from these.
    pub fn extend(&mut self, other: &Captured) {
        let first = self.targets.len();
        self.bad.extend(other.bad.iter().map(|bad| BadLogit { row: first + bad.row, ..*bad }));
        self.targets.extend(&other.targets);
    }

    /// The targets of rows of which none is bad. Errors: the first bad row.
    pub fn sound(self) -> Result<SoftTargets> {
        match self.bad.first() {
            Some(bad) => bail!("row {}: {bad}", bad.row),
            None => Ok(self.targets),
        }
    }
}

/// A logit that cannot be kept: NaN, infinite, or beyond bfloat16 where that is what is kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BadLogit {
    /// The row, from 0.
    pub row: usize,
    /// The id.
    pub id: u32,
    /// The logit as the head gave it.
    pub value: f32,
}

impl std::fmt::Display for BadLogit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let expected = if self.value.is_finite() { "more than bfloat16 holds" } else { "expected a finite number" };
        write!(f, "the logit of id {} is {}, {expected}", self.id, self.value)
    }
}

vectorised! {
    /// z rounded to bfloat16. Adding 0 turns −0 into 0: equal logits are ties, whatever their sign. `rounded` is overwritten.
    fn round(z: &[f32], rounded: &mut Vec<f32>) {
        rounded.resize(z.len(), 0.0);
        for (rounded, z) in rounded.iter_mut().zip(z) {
            *rounded = round_to_mantissa(*z, LOGIT_MANTISSA_BITS) + 0.0;
        }
    }
}

/// Buffers, one of each a thread.
#[derive(Default)]
struct Scratch {
    largest: Largest,
    /// As wide as the vocabulary where logits are kept.
    rounded: Vec<f32>,
    sums: Vec<f64>,
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
    /// The others' log-probability from their sum of weights exp(z − shift), `below` being shift − max. Whether they are anything: a rest
    /// whose likeliest id has no probability in f64 is nothing.
    fn set_tail(&mut self, below: f64, total: f64, log_total: f64) -> bool {
        let is_something = total > 0.0 && below.exp() > 0.0;
        let tail = if is_something { below + total.ln() - log_total } else { f64::NEG_INFINITY };
        self.tail_logprob = (tail as f32).min(0.0) + 0.0;
        is_something
    }

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
