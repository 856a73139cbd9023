//! Two caches of the same conversations, held against each other: how far their distributions lie apart. Rows are matched by key, so
//! the same tokens were scored at the same positions; what selection, codec or teacher each was made with does not matter.
//!
//! Two positions are compared over the ids that both keep and one outcome for everything else. Whatever lies beyond that can only
//! drive them further apart (data processing inequality): every divergence here is a lower bound of that of the whole distributions.

use crate::progress::ScanProgress;
use crate::stats::{Histogram, MIN_RANKED_POSITIONS, count_in, holding, rank};
use crate::{Cache, Record, Result, Target};
use rayon::prelude::*;
use serde::Serialize;

/// Pairs of rows read at once before their sums are added up.
const BLOCK_ROWS: usize = 256;
/// Fine bins of ln(KL) from [`LEAST`] to [`MOST`]: quantiles are exact to a factor of 1.004.
const FINE_BINS: usize = 4096;
const LEAST: f64 = 1e-10;
const MOST: f64 = 1e2;
/// Bins of log10(KL) that are shown, half a decade each.
const SHOWN_BINS: usize = 24;

/// How far two caches lie apart, over the positions of the rows that both hold.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Rows that both hold.
    pub rows: u64,
    /// Rows that only the first holds.
    pub only_first: u64,
    /// Rows that only the second holds.
    pub only_second: u64,
    /// Scored positions of the shared rows.
    pub positions: u64,
    /// Divergences and agreement; absent where nothing is scored.
    pub figures: Option<Divergences>,
}

/// Figures over all shared positions. Nats.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Divergences {
    /// KL(first ‖ second), at least.
    pub forward: Spread,
    /// KL(second ‖ first), at least.
    pub backward: Spread,
    /// Share of positions where both have the same most likely token.
    pub top1_agrees: f64,
    /// Mean number of ids that both keep.
    pub mean_shared_ids: f64,
    /// Mean probability in the first of what is not among the shared ids.
    pub mean_rest_first: f64,
    /// Mean probability in the second of what is not among the shared ids.
    pub mean_rest_second: f64,
    /// Positions by log10 of KL(first ‖ second), half a decade a bin from 1e-10 to 1e2; what is below counts in the first.
    pub forward_log10_histogram: Histogram,
    /// The shared rows that differ most by their mean KL(first ‖ second), of those with enough scored positions to be ranked.
    pub most_different: Vec<RowPair>,
}

/// A divergence over positions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Median, to within a factor of 1.004, as the next two; 0 where it is below 1e-10.
    pub median: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// The largest.
    pub largest: f64,
}

/// A row that both hold.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RowPair {
    /// Its number in the first.
    pub first: u64,
    /// Its number in the second.
    pub second: u64,
    /// Scored positions.
    pub scored: u64,
    /// Mean KL(first ‖ second), at least.
    pub mean_forward: f64,
    /// Mean KL(second ‖ first), at least.
    pub mean_backward: f64,
    /// Share of positions where both have the same most likely token.
    pub top1_agrees: f64,
}

/// What two distributions of one position have of each other.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Pair {
    forward: f64,
    backward: f64,
    agrees: bool,
    shared: usize,
    rest: (f64, f64),
}

impl Pair {
    /// Both kept at the same position; None where one of them keeps nothing exactly.
    fn of(first: &Target<'_>, second: &Target<'_>) -> Option<Self> {
        let agrees = first.ids.first()? == second.ids.first()?;
        let mut by_id: Vec<(u32, f64)> = probabilities(second).collect();
        by_id.sort_unstable_by_key(|(id, _)| *id);
        let (mut p, mut q) = (Vec::new(), Vec::new());
        let mut alone = 0.0;
        for (id, probability) in probabilities(first) {
            match by_id.binary_search_by_key(&id, |(other, _)| *other).ok().and_then(|at| by_id.get(at)) {
                Some(&(_, other)) => {
                    p.push(probability);
                    q.push(other);
                }
                None => alone += probability,
            }
        }
        let kept: f64 = by_id.iter().map(|(_, probability)| probability).sum();
        let shared = q.iter().sum::<f64>();
        let rest = (alone + f64::from(first.tail_logprob).exp(), (kept - shared).max(0.0) + f64::from(second.tail_logprob).exp());
        let count = p.len();
        p.push(rest.0);
        q.push(rest.1);
        Some(Self { forward: divergence(&p, &q), backward: divergence(&q, &p), agrees, shared: count, rest })
    }
}

fn probabilities(target: &Target<'_>) -> impl Iterator<Item = (u32, f64)> {
    target.ids.iter().zip(target.logprobs).map(|(&id, &logprob)| (id, f64::from(logprob).exp()))
}

/// KL(p ‖ q) of two lists of the same outcomes, each normalised (rounding leaves sums a little off 1).
fn divergence(p: &[f64], q: &[f64]) -> f64 {
    let (all_p, all_q): (f64, f64) = (p.iter().sum(), q.iter().sum());
    let terms = p.iter().zip(q).filter(|(p, _)| **p > 0.0).map(|(p, q)| p / all_p * ((p / all_p) / (q / all_q)).ln());
    terms.sum::<f64>().max(0.0)
}

/// Sums over positions.
#[derive(Debug, Clone, Default)]
struct Sums {
    positions: u64,
    forward: f64,
    backward: f64,
    largest: (f64, f64),
    agrees: u64,
    shared: u64,
    rest: (f64, f64),
    /// Of one row: numbers of fine bins; of many: counts.
    bins: Vec<(u16, u16)>,
    counts: [Vec<u64>; 2],
    rows: Vec<RowPair>,
}

fn fine_bin(kl: f64) -> u16 {
    let share = (kl.max(LEAST) / LEAST).ln() / (MOST / LEAST).ln();
    ((share * FINE_BINS as f64) as usize).min(FINE_BINS - 1) as u16
}

impl Sums {
    fn of((row_first, row_second): (u64, u64), first: &Record, second: &Record) -> Self {
        let mut sums = Sums::default();
        for ((_, a), (_, b)) in first.scored().zip(second.scored()) {
            let Some(pair) = Pair::of(&a, &b) else { continue };
            sums.positions += 1;
            sums.forward += pair.forward;
            sums.backward += pair.backward;
            sums.largest = (sums.largest.0.max(pair.forward), sums.largest.1.max(pair.backward));
            sums.agrees += u64::from(pair.agrees);
            sums.shared += pair.shared as u64;
            sums.rest = (sums.rest.0 + pair.rest.0, sums.rest.1 + pair.rest.1);
            sums.bins.push((fine_bin(pair.forward), fine_bin(pair.backward)));
        }
        let n = sums.positions as f64;
        if sums.positions >= MIN_RANKED_POSITIONS {
            sums.rows.push(RowPair {
                first: row_first,
                second: row_second,
                scored: sums.positions,
                mean_forward: sums.forward / n,
                mean_backward: sums.backward / n,
                top1_agrees: sums.agrees as f64 / n,
            });
        }
        sums
    }

    fn add(&mut self, row: Sums) {
        self.positions += row.positions;
        self.forward += row.forward;
        self.backward += row.backward;
        self.largest = (self.largest.0.max(row.largest.0), self.largest.1.max(row.largest.1));
        self.agrees += row.agrees;
        self.shared += row.shared;
        self.rest = (self.rest.0 + row.rest.0, self.rest.1 + row.rest.1);
        self.counts.iter_mut().for_each(|counts| counts.resize(FINE_BINS, 0));
        let [forward, backward] = &mut self.counts;
        for (f, b) in row.bins {
            count_in(forward, f.into());
            count_in(backward, b.into());
        }
        for pair in row.rows {
            rank(&mut self.rows, pair, |pair| pair.mean_forward);
        }
    }

    fn figures(self) -> Option<Divergences> {
        let n = self.positions as f64;
        let [forward, backward] = &self.counts;
        let spread = |sum: f64, largest: f64, counts: &[u64]| Spread {
            mean: sum / n,
            median: quantile(counts, self.positions, 0.5),
            p90: quantile(counts, self.positions, 0.9),
            p99: quantile(counts, self.positions, 0.99),
            largest,
        };
        let (from, to) = (LEAST.log10(), MOST.log10());
        // Fine bins that do not divide into the shown ones evenly are counted where their middle lies.
        let mut counts = vec![0; SHOWN_BINS];
        for (i, &count) in forward.iter().enumerate() {
            if let Some(shown) = counts.get_mut((2 * i + 1) * SHOWN_BINS / (2 * FINE_BINS)) {
                *shown += count;
            }
        }
        (self.positions > 0).then(|| Divergences {
            forward: spread(self.forward, self.largest.0, forward),
            backward: spread(self.backward, self.largest.1, backward),
            top1_agrees: self.agrees as f64 / n,
            mean_shared_ids: self.shared as f64 / n,
            mean_rest_first: self.rest.0 / n,
            mean_rest_second: self.rest.1 / n,
            forward_log10_histogram: Histogram { from, to, counts },
            most_different: self.rows,
        })
    }
}

/// Middle (geometric) of the fine bin that holds the `share`-quantile; 0 in the first bin, which holds all that is smaller.
fn quantile(counts: &[u64], positions: u64, share: f64) -> f64 {
    match holding(counts, ((positions as f64 * share).ceil() as u64).max(1)) {
        Some(bin @ 1..) => LEAST * (MOST / LEAST).powf((bin as f64 + 0.5) / FINE_BINS as f64),
        Some(0) | None => 0.0,
    }
}

impl Comparison {
    /// Reads every row that both caches hold. Equal rows of one cache are matched in order. Stops at the first damaged row.
    pub fn of(first: &Cache, second: &Cache, progress: &ScanProgress) -> Result<Self> {
        let pairs = pairs(first.by_key()?, second.by_key()?);
        progress.begin(pairs.len() as u64, 0);
        let mut sums = Sums::default();
        for block in pairs.chunks(BLOCK_ROWS) {
            let look = |&pair: &(u64, u64)| {
                let row = Sums::of(pair, &first.row(pair.0)?, &second.row(pair.1)?);
                progress.add_rows(1);
                Ok(row)
            };
            let rows: Vec<Sums> = block.par_iter().map(look).collect::<Result<_>>()?;
            rows.into_iter().for_each(|row| sums.add(row));
        }
        let rows = pairs.len() as u64;
        Ok(Self {
            rows,
            only_first: first.len().saturating_sub(rows),
            only_second: second.len().saturating_sub(rows),
            positions: sums.positions,
            figures: sums.figures(),
        })
    }
}

/// Row numbers of the same key in two lists sorted by key, in the order of the first cache.
fn pairs<K: Ord + Copy>(first: &[(K, u64)], second: &[(K, u64)]) -> Vec<(u64, u64)> {
    let (mut i, mut j) = (0, 0);
    let mut pairs = Vec::new();
    while let (Some((a, row_first)), Some((b, row_second))) = (first.get(i), second.get(j)) {
        match a.cmp(b) {
            std::cmp::Ordering::Less => i += 1,
            std::cmp::Ordering::Greater => j += 1,
            std::cmp::Ordering::Equal => {
                pairs.push((*row_first, *row_second));
                (i, j) = (i + 1, j + 1);
            }
        }
    }
    pairs.sort_unstable();
    pairs
}
