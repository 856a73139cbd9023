//! The figures of a cache as people and machines see them. Nothing is computed here but what follows from the counts.

use super::position::RowFigures;
use serde::Serialize;

/// Figures over all scored positions, from the stored (rounded) values. What a selection does not tell is absent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Distributions {
    /// Of the kept entries; absent where all entries are drawn.
    #[serde(flatten)]
    pub kept: Option<Kept>,
    /// Mean stored probability of the tail: outside the kept ids, or outside the drawn ones where all are drawn.
    pub mean_tail_mass: f64,
    /// Positions by log10 of the tail's stored probability, half a decade a bin from 1e-9 to 1.
    pub tail_log10_histogram: Histogram,
    /// Of the drawn entries; absent where none are drawn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drawn: Option<Drawn>,
}

/// Figures of kept entries.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Kept {
    /// Mean probability of the most likely token.
    pub mean_top1: f64,
    /// Median of the same, to within 1/8192.
    pub median_top1: f64,
    /// Mean entropy in nats of the kept tokens and the tail as one outcome: a lower bound of the teacher's entropy.
    pub mean_entropy: f64,
    /// Mean sum of the kept probabilities.
    pub mean_kept_mass: f64,
    /// Share of positions where the teacher's most likely token is the data's next token.
    pub top1_is_next: f64,
    /// Share of positions where the data's next token is among the kept.
    pub next_is_kept: f64,
    /// exp(-mean log-probability of the data's next token) over the positions where that token is kept. Positions where it is
    /// not are left out, so this is below the teacher's perplexity on the data. Absent where no next token is kept.
    pub perplexity_where_kept: Option<f64>,
    /// The same over all positions. Where the next token is not kept, the smaller of the least kept probability and the tail's stands
    /// for it, which is too large if anything: the teacher's perplexity on the data is at least this.
    pub perplexity_at_least: f64,
    /// Positions by entropy in nats, 0.25 a bin from 0 to 12.
    pub entropy_histogram: Histogram,
    /// Positions by probability of the most likely token, 0.05 a bin.
    pub top1_histogram: Histogram,
    /// What the first k entries hold, for k = 1, 2, 4, … and the cache's own.
    pub by_k: Vec<KeptAt>,
    /// Positions by the place of the data's next token among the kept; those where it is not kept are in none.
    pub next_rank: Vec<RankBin>,
    /// How often the most likely token came, by its probability: 0.1 a bin, bins without a position included.
    pub calibration: Vec<CalibrationBin>,
    /// Expected calibration error: over these bins, the mean of |came − said| weighted by positions (Guo et al. 2017).
    pub calibration_error: f64,
    /// The rows with the largest mean surprise, most surprising first, of those with at least
    /// [`MIN_RANKED_POSITIONS`](super::MIN_RANKED_POSITIONS) scored positions.
    pub most_surprising: Vec<RowFigures>,
}

/// Counts in bins of equal width; what lies outside is counted in the nearest bin.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Histogram {
    /// Lower edge of the first bin.
    pub from: f64,
    /// Upper edge of the last bin.
    pub to: f64,
    /// Positions in each bin.
    pub counts: Vec<u64>,
}

/// What the first k entries of each position hold: what a cache of that k would keep.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct KeptAt {
    /// Most entries at a position.
    pub k: u64,
    /// Mean number of entries; below `k` where a selection kept fewer.
    pub mean_entries: f64,
    /// Mean sum of their probabilities.
    pub mean_mass: f64,
    /// Share of positions where they hold at least [`NEARLY_ALL`](super::NEARLY_ALL) of the probability.
    pub nearly_all: f64,
    /// Share of positions where the data's next token is among them.
    pub next_is_kept: f64,
    /// Mean entropy in nats of these tokens and all others as one outcome.
    pub mean_entropy: f64,
}

/// Positions where the data's next token has one of these places.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RankBin {
    /// First place, from 1.
    pub from: u64,
    /// Last place.
    pub to: u64,
    /// Positions.
    pub positions: u64,
}

/// Positions whose most likely token has a probability in [from, to).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CalibrationBin {
    /// Lower edge.
    pub from: f64,
    /// Upper edge; the last bin includes it.
    pub to: f64,
    /// Positions.
    pub positions: u64,
    /// Mean probability of the most likely token; absent without a position, as is the next.
    pub mean_top1: Option<f64>,
    /// Share of positions where it is the data's next token.
    pub top1_is_next: Option<f64>,
}

/// Figures of drawn entries. Counts say nothing without bias of the most likely token, of entropy or of log-probabilities.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Drawn {
    /// Mean number of different ids drawn at a position.
    pub mean_ids: f64,
    /// Share of positions where the data's next token was drawn.
    pub next_is_drawn: f64,
    /// Mean probability of the data's next token: of kept ones as stored, of drawn ones as counts estimate it. Without bias.
    pub mean_next_probability: f64,
}
