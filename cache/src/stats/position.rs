//! What one position and one row say, in f64: the only place where a stored target becomes entropy, mass, rank and surprise.

use crate::{Record, Target};
use serde::Serialize;

/// Figures of one position with kept entries. Nats and shares of 1, from the stored (rounded) values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PositionFigures {
    /// Probability of the most likely token.
    pub top1: f64,
    /// Whether the most likely token is the one that follows in the data.
    pub top1_is_next: bool,
    /// Entropy of the kept tokens and the tail as one outcome: a lower bound of the teacher's.
    pub entropy: f64,
    /// Sum of the kept probabilities; rounding may lift it a little above 1.
    pub kept_mass: f64,
    /// Probability outside the kept ids.
    pub tail_mass: f64,
    /// Place of the data's next token among the kept, from 1; absent when it was not kept.
    pub next_rank: Option<u32>,
    /// Its log-probability; absent when it was not kept.
    pub next_logprob: Option<f64>,
    /// −ln of its probability, at least: a token that was not kept is at most as likely as the least likely kept one, and as the whole
    /// tail (to within the rounding of the stored values).
    pub surprise: f64,
}

impl PositionFigures {
    /// Figures of `target`, after which `next` follows in the data. None where all is drawn: counts say none of this without bias.
    pub fn of(target: &Target<'_>, next: u32) -> Option<Self> {
        let (first, &top1) = (*target.ids.first()?, target.logprobs.first()?);
        let tail = f64::from(target.tail_logprob);
        let mut entropy = entropy_term(tail);
        let mut kept_mass = 0.0;
        for &logprob in target.logprobs {
            kept_mass += f64::from(logprob).exp();
            entropy += entropy_term(f64::from(logprob));
        }
        let place = target.ids.iter().position(|&id| id == next);
        let next_logprob = place.and_then(|i| target.logprobs.get(i)).map(|&l| f64::from(l));
        let least = target.logprobs.last().map_or(tail, |&l| f64::from(l).min(tail));
        Some(Self {
            top1: f64::from(top1).exp(),
            top1_is_next: first == next,
            entropy,
            kept_mass,
            tail_mass: tail.exp(),
            next_rank: place.map(|i| i as u32 + 1),
            next_logprob,
            surprise: -next_logprob.unwrap_or(least),
        })
    }
}

/// −p ln p of a log-probability; 0 at p = 0.
pub(super) fn entropy_term(logprob: f64) -> f64 {
    let p = logprob.exp();
    if p == 0.0 { 0.0 } else { -p * logprob }
}

/// Figures of one row, over its scored positions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RowFigures {
    /// Its row number.
    pub row: u64,
    /// Number of the conversation in the data.
    pub seq_id: u64,
    /// Tokens.
    pub tokens: u64,
    /// Scored positions.
    pub scored: u64,
    /// Mean of −ln p(next) in nats, at least: see [`PositionFigures::surprise`].
    pub mean_surprise: f64,
    /// exp of the same: the teacher's perplexity on the row, at least.
    pub perplexity_at_least: f64,
    /// Share of positions where the teacher's most likely token is the data's next token.
    pub top1_is_next: f64,
    /// Mean entropy in nats, at least.
    pub mean_entropy: f64,
}

impl RowFigures {
    /// Figures of row `row`, which is `record`. None where nothing is scored or all is drawn.
    pub fn of(row: u64, record: &Record) -> Option<Self> {
        let (mut surprise, mut hits, mut entropy) = (0.0, 0u64, 0.0);
        for (next, target) in record.scored() {
            let at = PositionFigures::of(&target, next)?;
            surprise += at.surprise;
            entropy += at.entropy;
            hits += u64::from(at.top1_is_next);
        }
        Self::of_sums(row, record, surprise, hits, entropy)
    }

    /// The same from what its positions, of which each keeps something exactly, add up to.
    pub(super) fn of_sums(row: u64, record: &Record, surprise: f64, hits: u64, entropy: f64) -> Option<Self> {
        let scored = record.positions.len() as u64;
        let n = scored as f64;
        (scored > 0).then(|| Self {
            row,
            seq_id: record.seq_id,
            tokens: record.input_ids.len() as u64,
            scored,
            mean_surprise: surprise / n,
            perplexity_at_least: (surprise / n).exp(),
            top1_is_next: hits as f64 / n,
            mean_entropy: entropy / n,
        })
    }
}
