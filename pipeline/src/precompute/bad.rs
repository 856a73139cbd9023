//! Conversations that the teacher gives a logit for that is NaN, infinite, or more than a cache of logits holds: what becomes of them,
//! how many there are, and how many there may be. Refuses to judge the data; it is the teacher that failed here.
//!
//! The one idea: such a conversation keeps its row, with its tokens and without a scored position. So numbers of rows, borders of
//! shards, shares, resumed runs and repairs are what they would be without it, and nothing is trained on it. The row's key says that it
//! was left out, since no conversation of a dataset is without scored positions; a resumed run needs nothing else to know.

use super::PrecomputeReport;
use crate::data::Example;
use crate::data::pack::Pack;
use crate::ops::capture::Captured;
use crate::{Error, Result};
use potstill_cache::{Record, SoftTargets};
use serde::Serialize;
use std::collections::BTreeSet;

/// Left-out conversations that a report names in full.
pub const NAMED: usize = 10;
/// What a report of skipped conversations calls them.
pub const NOT_FINITE: &str = "the teacher's logits are not finite";

/// A left-out conversation and the first of its logits that cannot be kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BadRow {
    /// Number of the conversation in the data.
    pub seq_id: u64,
    /// Position in the conversation, in tokens from 0.
    pub position: u32,
    /// The id whose logit it is.
    pub id: u32,
    /// What is wrong with the logit.
    pub found: String,
}

impl std::fmt::Display for BadRow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "conversation {} of the data, position {}: {}", self.seq_id, self.position, self.found)
    }
}

/// The left-out conversations of a run, each counted once.
pub(super) struct BadRows {
    allowed: u64,
    conversations: u64,
    seq_ids: BTreeSet<u64>,
    named: Vec<BadRow>,
}

impl BadRows {
    /// At most `share` of so many conversations may be bad; `known` are those that the cache has left out already.
    pub(super) fn of(share: f64, conversations: usize, known: impl IntoIterator<Item = u64>) -> Result<Self> {
        let (allowed, seq_ids) = (allowed(share, conversations), known.into_iter().collect());
        let rows = Self { allowed, conversations: conversations as u64, seq_ids, named: Vec::new() };
        rows.check().map(|()| rows)
    }

    /// Counts those of a pack. Errors: more than may be.
    pub(super) fn add(&mut self, found: Vec<BadRow>) -> Result<()> {
        for row in found {
            // A resumed run may score a pack again of which some rows are in the cache.
            if self.seq_ids.insert(row.seq_id) && self.named.len() < NAMED {
                self.named.push(row);
            }
        }
        self.check()
    }

    /// Adds them to the skipped conversations of a report.
    pub(super) fn report(self, report: &mut PrecomputeReport) {
        let Some(first) = self.seq_ids.first() else { return };
        let first = self.named.first().filter(|row| row.seq_id == *first);
        let first = first.map_or_else(|| self.known(), ToString::to_string);
        report.skipped.insert(NOT_FINITE.into(), self.seq_ids.len() as u64);
        report.first_skipped.insert(NOT_FINITE.into(), first);
        report.left_out = self.named;
    }

    /// The first one where nothing is known but that it was left out.
    fn known(&self) -> String {
        self.seq_ids.first().map_or_else(String::new, |seq_id| format!("conversation {seq_id} of the data"))
    }

    fn check(&self) -> Result<()> {
        let bad = self.seq_ids.len() as u64;
        if bad <= self.allowed {
            return Ok(());
        }
        let example = self.named.last().map_or_else(|| self.known(), ToString::to_string);
        Err(Error::TooManyBad { bad, conversations: self.conversations, allowed: self.allowed, example })
    }
}

/// The largest number that is no larger share of all than `share`.
fn allowed(share: f64, conversations: usize) -> u64 {
    let all = conversations as f64;
    // 0.29 · 100 is a little less than 29 in f64, and 29 / 100 is 0.29.
    let near = (share * all).round();
    (if near / all <= share { near } else { (share * all).floor() }) as u64
}

/// A pack's records, and its conversations that were left out. `positions` are those of `examples`, of which the pack was made.
pub(super) fn records(
    examples: &[Example],
    positions: Vec<Vec<u32>>,
    pack: &Pack,
    captured: &Captured,
) -> (Vec<Record>, Vec<BadRow>) {
    let mut left_out = Vec::new();
    let one = |(i, (example, positions)): (usize, (&Example, Vec<u32>))| {
        let scored = pack.scored_of(i);
        let (mut positions, mut targets) = (positions, SoftTargets::default());
        match captured.bad.iter().find(|bad| scored.contains(&bad.row)) {
            None => targets = captured.targets.slice(scored),
            Some(bad) => {
                let position = positions.get(bad.row - scored.start).copied().unwrap_or_default();
                left_out.push(BadRow { seq_id: example.seq_id, position, id: bad.id, found: bad.to_string() });
                positions.clear();
            }
        }
        let input_ids = example.input_ids.clone();
        Record { seq_id: example.seq_id, input_ids, positions, targets, codec: Default::default() }
    };
    let records = examples.iter().zip(positions).enumerate().map(one).collect();
    (records, left_out)
}

#[cfg(test)]
mod tests {
    use super::allowed;

    #[test]
    fn a_share_is_of_whole_conversations() {
        let cases = [
            (0.0, 39, 0),
            (0.001, 39, 0),
            (0.001, 999, 0),
            (0.001, 1000, 1),
            (0.29, 100, 29),
            (0.5, 3, 1),
            (0.001, 207_865, 207),
        ];
        for (share, of, most) in cases {
            assert_eq!(allowed(share, of), most, "{share} of {of}");
        }
        assert_eq!(allowed(0.5, 0), 0);
    }
}
