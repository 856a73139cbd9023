//! Sums over scored positions: of one row, or of rows added up in order. They become figures once, at the end.

use super::figures::{CalibrationBin, Distributions, Drawn, Histogram, Kept, KeptAt, RankBin};
use super::position::{PositionFigures, RowFigures, entropy_term};
use super::{MIN_RANKED_POSITIONS, NEARLY_ALL, RANKED_ROWS};
use crate::{Record, Selection, Target};

/// Fine bins of top-1 probabilities; the median is exact to half a bin.
const FINE_BINS: usize = 4096;
/// Bins of the entropy, a quarter of a nat each.
const ENTROPY_BINS: usize = 48;
const ENTROPY_TOP: f64 = 12.0;
/// Bins of top-1 probabilities that are shown.
const TOP1_BINS: usize = 20;
/// Bins of the tail's log10, half a decade each; writers store no tail below 1e-9.
const TAIL_BINS: usize = 18;
const TAIL_BOTTOM: f64 = -9.0;
/// Bins of calibration.
const CALIBRATION_BINS: usize = 10;
/// Places 1, 2, 3–4, …, 32,769–65,536: a selection keeps at most 65,535.
const RANK_BINS: usize = 17;

/// Sums over scored positions.
#[derive(Debug, Clone, Default)]
pub(super) struct Sums {
    pub(super) left_out: u64,
    positions: u64,
    pub(super) entries: u64,
    top1: f64,
    entropy: f64,
    kept: f64,
    tail: f64,
    top1_is_next: u64,
    next_kept: u64,
    next_logprob: f64,
    surprise: f64,
    pub(super) drawn: u64,
    next_drawn: u64,
    next_probability: f64,
    entropies: Vec<u64>,
    tops: Vec<u64>,
    tails: Vec<u64>,
    ranks: Vec<u64>,
    calibration: Vec<Confidence>,
    by_k: Vec<First>,
    /// Top-1 probabilities: of one row as numbers of fine bins, of many as a histogram.
    fine: Vec<u16>,
    histogram: Vec<u64>,
    /// The row's own figures; of many rows the most surprising, most surprising first.
    rows: Vec<RowFigures>,
}

/// Positions of one bin of calibration.
#[derive(Debug, Clone, Copy, Default)]
struct Confidence {
    positions: u64,
    top1: f64,
    hits: u64,
}

/// Sums of the first `k` entries.
#[derive(Debug, Clone, Copy, Default)]
struct First {
    k: usize,
    entries: u64,
    mass: f64,
    nearly_all: u64,
    next: u64,
    entropy: f64,
}

/// 1, 2, 4, … below `head`, and `head` itself; nothing where nothing is kept exactly.
fn shown_k(head: usize) -> impl Iterator<Item = usize> {
    let doubling = std::iter::successors(Some(1usize), |k| k.checked_mul(2)).take_while(move |k| *k < head);
    doubling.chain((head > 0).then_some(head))
}

/// Number of the bin of `count` equal ones between `from` and `to` that holds `x`, or of the nearest.
fn bin(x: f64, from: f64, to: f64, count: usize) -> usize {
    (((x - from) / (to - from) * count as f64).max(0.0) as usize).min(count - 1)
}

/// Counts one more in bin `i`, if there is one.
pub(crate) fn count_in(bins: &mut [u64], i: usize) {
    if let Some(count) = bins.get_mut(i) {
        *count += 1;
    }
}

/// The bin that holds the `nth` smallest, from 1.
pub(crate) fn holding(counts: &[u64], nth: u64) -> Option<usize> {
    let mut left = nth;
    for (bin, &count) in counts.iter().enumerate() {
        if count >= left {
            return Some(bin);
        }
        left -= count;
    }
    None
}

/// Takes `row` among the [`RANKED_ROWS`] largest where it belongs there; of equal ones the earlier stays first.
pub(crate) fn rank<T>(rows: &mut Vec<T>, row: T, by: impl Fn(&T) -> f64) {
    let place = rows.partition_point(|other| by(other) >= by(&row));
    rows.insert(place, row);
    rows.truncate(RANKED_ROWS);
}

fn add_all(to: &mut [u64], from: &[u64]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

impl Sums {
    /// Nothing, of a selection that keeps `head` entries exactly.
    pub(super) fn none(head: u16) -> Self {
        Self {
            entropies: vec![0; ENTROPY_BINS],
            tops: vec![0; TOP1_BINS],
            tails: vec![0; TAIL_BINS],
            ranks: vec![0; RANK_BINS],
            calibration: vec![Confidence::default(); CALIBRATION_BINS],
            by_k: shown_k(usize::from(head)).map(|k| First { k, ..First::default() }).collect(),
            ..Self::default()
        }
    }

    /// The sums of row `row`, which is `record`.
    pub(super) fn of(row: u64, record: &Record, head: u16) -> Self {
        let mut sums = Sums { left_out: u64::from(record.positions.is_empty()), ..Sums::none(head) };
        for (next, target) in record.scored() {
            sums.position(&target, next);
        }
        // A fine bin for each position that keeps something exactly: where one does not, nothing is said of the row.
        if sums.fine.len() == record.positions.len() {
            sums.rows.extend(RowFigures::of_sums(row, record, sums.surprise, sums.top1_is_next, sums.entropy));
        }
        sums
    }

    fn position(&mut self, target: &Target<'_>, next: u32) {
        let tail = f64::from(target.tail_logprob);
        self.positions += 1;
        self.entries += target.ids.len() as u64;
        self.tail += tail.exp();
        count_in(&mut self.tails, bin(tail / std::f64::consts::LN_10, TAIL_BOTTOM, 0.0, TAIL_BINS));
        if let Some(at) = PositionFigures::of(target, next) {
            self.head(target, &at);
        }
        self.drawn += target.sample_ids.len() as u64;
        if let Some((_, estimate)) = target.drawn_probabilities().find(|(id, _)| *id == next) {
            self.next_drawn += 1;
            self.next_probability += estimate;
        }
    }

    fn head(&mut self, target: &Target<'_>, at: &PositionFigures) {
        self.top1 += at.top1;
        self.entropy += at.entropy;
        self.kept += at.kept_mass;
        self.surprise += at.surprise;
        self.top1_is_next += u64::from(at.top1_is_next);
        if let Some(logprob) = at.next_logprob {
            self.next_kept += 1;
            self.next_logprob += logprob;
            self.next_probability += logprob.exp();
        }
        count_in(&mut self.entropies, bin(at.entropy, 0.0, ENTROPY_TOP, ENTROPY_BINS));
        count_in(&mut self.tops, bin(at.top1, 0.0, 1.0, TOP1_BINS));
        if let Some(rank) = at.next_rank {
            // 1 → 0, 2 → 1, 3 and 4 → 2, 5 to 8 → 3.
            count_in(&mut self.ranks, rank.next_power_of_two().trailing_zeros() as usize);
        }
        if let Some(confidence) = self.calibration.get_mut(bin(at.top1, 0.0, 1.0, CALIBRATION_BINS)) {
            confidence.positions += 1;
            confidence.top1 += at.top1;
            confidence.hits += u64::from(at.top1_is_next);
        }
        self.fine.push(bin(at.top1, 0.0, 1.0, FINE_BINS) as u16);
        self.first(target, at);
    }

    /// One walk over the entries, stopping where a k ends.
    fn first(&mut self, target: &Target<'_>, at: &PositionFigures) {
        let (mut mass, mut entropy, mut done) = (0.0, 0.0, 0);
        for first in &mut self.by_k {
            let entries = first.k.min(target.logprobs.len());
            for &logprob in target.logprobs.get(done..entries).unwrap_or_default() {
                mass += f64::from(logprob).exp();
                entropy += entropy_term(f64::from(logprob));
            }
            done = entries;
            let others = at.tail_mass + if entries < target.logprobs.len() { at.kept_mass - mass } else { 0.0 };
            first.entries += entries as u64;
            first.mass += mass;
            first.nearly_all += u64::from(mass >= NEARLY_ALL);
            first.next += u64::from(at.next_rank.is_some_and(|rank| rank as usize <= first.k));
            first.entropy += entropy + entropy_term(others.ln());
        }
    }

    pub(super) fn add(&mut self, row: Sums) {
        self.left_out += row.left_out;
        self.positions += row.positions;
        self.entries += row.entries;
        self.top1 += row.top1;
        self.entropy += row.entropy;
        self.kept += row.kept;
        self.tail += row.tail;
        self.top1_is_next += row.top1_is_next;
        self.next_kept += row.next_kept;
        self.next_logprob += row.next_logprob;
        self.surprise += row.surprise;
        self.drawn += row.drawn;
        self.next_drawn += row.next_drawn;
        self.next_probability += row.next_probability;
        add_all(&mut self.entropies, &row.entropies);
        add_all(&mut self.tops, &row.tops);
        add_all(&mut self.tails, &row.tails);
        add_all(&mut self.ranks, &row.ranks);
        for (to, from) in self.calibration.iter_mut().zip(&row.calibration) {
            to.positions += from.positions;
            to.top1 += from.top1;
            to.hits += from.hits;
        }
        for (to, from) in self.by_k.iter_mut().zip(&row.by_k) {
            to.entries += from.entries;
            to.mass += from.mass;
            to.nearly_all += from.nearly_all;
            to.next += from.next;
            to.entropy += from.entropy;
        }
        self.histogram.resize(FINE_BINS, 0);
        row.fine.iter().for_each(|&bin| count_in(&mut self.histogram, usize::from(bin)));
        for row in row.rows.into_iter().filter(|row| row.scored >= MIN_RANKED_POSITIONS) {
            rank(&mut self.rows, row, |row| row.mean_surprise);
        }
    }

    pub(super) fn figures(self, selection: &Selection) -> Option<Distributions> {
        if self.positions == 0 {
            return None;
        }
        let n = self.positions as f64;
        let drawn = selection.draws().map(|_| Drawn {
            mean_ids: self.drawn as f64 / n,
            next_is_drawn: self.next_drawn as f64 / n,
            mean_next_probability: self.next_probability / n,
        });
        Some(Distributions {
            mean_tail_mass: self.tail / n,
            tail_log10_histogram: Histogram { from: TAIL_BOTTOM, to: 0.0, counts: self.tails.clone() },
            drawn,
            kept: (selection.head() > 0).then(|| self.kept(selection.head())),
        })
    }

    fn kept(self, head: u16) -> Kept {
        let n = self.positions as f64;
        let perplexity = (self.next_kept > 0).then(|| (-self.next_logprob / self.next_kept as f64).exp());
        let by_k = self.by_k.iter().map(|first| KeptAt {
            k: first.k as u64,
            mean_entries: first.entries as f64 / n,
            mean_mass: first.mass / n,
            nearly_all: first.nearly_all as f64 / n,
            next_is_kept: first.next as f64 / n,
            mean_entropy: first.entropy / n,
        });
        // The last place is the cache's own k, whatever power of two lies above it.
        let ends = (0..RANK_BINS).map(|i| (if i == 0 { 1 } else { (1u64 << (i - 1)) + 1 }, 1u64 << i));
        let ranks = ends.zip(&self.ranks).filter(|((from, _), _)| *from <= u64::from(head));
        let calibration: Vec<CalibrationBin> = self.calibration.iter().enumerate().map(|(i, c)| c.bin(i)).collect();
        let missed = |c: &Confidence| (c.hits as f64 - c.top1).abs();
        Kept {
            mean_top1: self.top1 / n,
            median_top1: self.median(),
            mean_entropy: self.entropy / n,
            mean_kept_mass: self.kept / n,
            top1_is_next: self.top1_is_next as f64 / n,
            next_is_kept: self.next_kept as f64 / n,
            perplexity_where_kept: perplexity,
            perplexity_at_least: (self.surprise / n).exp(),
            entropy_histogram: Histogram { from: 0.0, to: ENTROPY_TOP, counts: self.entropies.clone() },
            top1_histogram: Histogram { from: 0.0, to: 1.0, counts: self.tops.clone() },
            by_k: by_k.collect(),
            next_rank: ranks.map(|((from, to), &positions)| RankBin { from, to: to.min(head.into()), positions }).collect(),
            calibration,
            calibration_error: self.calibration.iter().map(missed).sum::<f64>() / n,
            most_surprising: self.rows,
        }
    }

    /// Middle of the fine bin that holds the lower median.
    fn median(&self) -> f64 {
        holding(&self.histogram, self.positions.div_ceil(2)).map_or(1.0, |bin| (bin as f64 + 0.5) / FINE_BINS as f64)
    }
}

impl Confidence {
    fn bin(&self, i: usize) -> CalibrationBin {
        let share = |x: f64| (self.positions > 0).then(|| x / self.positions as f64);
        let edge = |i: usize| i as f64 / CALIBRATION_BINS as f64;
        CalibrationBin {
            from: edge(i),
            to: edge(i + 1),
            positions: self.positions,
            mean_top1: share(self.top1),
            top1_is_next: share(self.hits as f64),
        }
    }
}
