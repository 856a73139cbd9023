//! Soft targets: for each scored position the kept token ids, their log-probabilities, and the tail's.

use serde::{Deserialize, Serialize};

/// Which entries of a distribution are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Selection {
    /// The `k` most likely tokens; ties go to the smaller id.
    TopK {
        /// Entries kept at each scored position (1 to 65,535).
        k: u16,
    },
}

/// The soft targets of N scored positions, stored flat.
///
/// Log-probabilities are natural, over the teacher's whole distribution (the tokenizer's ids), at temperature 1.
#[derive(Debug, Clone, PartialEq)]
pub struct SoftTargets {
    /// N + 1 offsets into `ids` and `logprobs`; the first is 0.
    offsets: Vec<u32>,
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    /// N values: ln of the probability outside the kept ids, taken from unrounded values.
    tail_logprobs: Vec<f32>,
}

/// One position's view into [`SoftTargets`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Target<'a> {
    /// Kept token ids, most likely first (ties by rising id).
    pub ids: &'a [u32],
    /// Their log-probabilities in nats, same order.
    pub logprobs: &'a [f32],
    /// ln of the remaining probability.
    pub tail_logprob: f32,
}

impl Default for SoftTargets {
    fn default() -> Self {
        Self::with_shape(0, 0)
    }
}

impl Selection {
    /// Most entries that a scored position may keep.
    pub fn max_entries(&self) -> u16 {
        match self {
            Selection::TopK { k } => *k,
        }
    }

    /// The selection's name, as shard footers state it.
    pub fn name(&self) -> &'static str {
        match self {
            Selection::TopK { .. } => "top-k",
        }
    }
}

impl SoftTargets {
    /// Room for `positions` positions of `k` entries.
    pub fn with_capacity(positions: usize, k: usize) -> Self {
        Self::with_shape(positions, positions * k)
    }

    /// Room for `positions` positions with `entries` entries in all.
    pub(crate) fn with_shape(positions: usize, entries: usize) -> Self {
        let mut offsets = Vec::with_capacity(positions + 1);
        offsets.push(0);
        let (ids, logprobs) = (Vec::with_capacity(entries), Vec::with_capacity(entries));
        Self { offsets, ids, logprobs, tail_logprobs: Vec::with_capacity(positions) }
    }

    /// Adds one position. `ids` and `logprobs` have the same length (the shorter one counts).
    pub fn push(&mut self, ids: &[u32], logprobs: &[f32], tail_logprob: f32) {
        let n = ids.len().min(logprobs.len());
        self.ids.extend_from_slice(&ids[..n]);
        self.logprobs.extend_from_slice(&logprobs[..n]);
        self.tail_logprobs.push(tail_logprob);
        self.offsets.push(self.ids.len() as u32);
    }

    /// Adds one position given as (id, log-probability) pairs.
    pub(crate) fn push_pairs(&mut self, entries: &[(u32, f32)], tail_logprob: f32) {
        self.ids.extend(entries.iter().map(|e| e.0));
        self.logprobs.extend(entries.iter().map(|e| e.1));
        self.tail_logprobs.push(tail_logprob);
        self.offsets.push(self.ids.len() as u32);
    }

    /// Appends all positions of `other`.
    pub fn extend(&mut self, other: &SoftTargets) {
        for i in 0..other.len() {
            let t = other.position(i);
            self.push(t.ids, t.logprobs, t.tail_logprob);
        }
    }

    /// Number of positions, N.
    pub fn len(&self) -> usize {
        self.tail_logprobs.len()
    }

    /// Whether there is no position.
    pub fn is_empty(&self) -> bool {
        self.tail_logprobs.is_empty()
    }

    /// Position `i` (0-based, below [`len`](Self::len)).
    pub fn position(&self, i: usize) -> Target<'_> {
        let (a, b) = (self.offsets[i] as usize, self.offsets[i + 1] as usize);
        Target { ids: &self.ids[a..b], logprobs: &self.logprobs[a..b], tail_logprob: self.tail_logprobs[i] }
    }

    /// N + 1 offsets: position `i` owns entries `offsets[i]..offsets[i + 1]` of [`ids`](Self::ids).
    pub fn offsets(&self) -> &[u32] {
        &self.offsets
    }

    /// Kept token ids of all positions, one after another.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Log-probabilities in nats, aligned with [`ids`](Self::ids).
    pub fn logprobs(&self) -> &[f32] {
        &self.logprobs
    }

    /// N values: ln of each position's probability outside its kept ids.
    pub fn tail_logprobs(&self) -> &[f32] {
        &self.tail_logprobs
    }

    /// A new value holding positions `range`.
    pub fn slice(&self, range: std::ops::Range<usize>) -> SoftTargets {
        let mut out = SoftTargets::with_capacity(range.len(), 0);
        for i in range {
            let t = self.position(i);
            out.push(t.ids, t.logprobs, t.tail_logprob);
        }
        out
    }
}
