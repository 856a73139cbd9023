//! Soft targets: for each scored position the kept token ids and what is known of their probabilities, and of the rest.

/// The soft targets of N scored positions, stored flat.
///
/// Log-probabilities are natural, over the teacher's whole distribution (the tokenizer's ids), at temperature 1. What of it is
/// there depends on the cache: every position of one cache has the same parts.
#[derive(Debug, Clone, PartialEq)]
pub struct SoftTargets {
    /// N + 1 offsets into `ids`, `logprobs` and (where they are kept) `logits`; the first is 0.
    offsets: Vec<u32>,
    ids: Vec<u32>,
    logprobs: Vec<f32>,
    /// N values: ln of the probability outside the kept ids, taken from unrounded values.
    tail_logprobs: Vec<f32>,
    /// N + 1 offsets into `sample_ids` and `sample_counts`.
    sample_offsets: Vec<u32>,
    sample_ids: Vec<u32>,
    sample_counts: Vec<u16>,
    /// Raw logits of `ids`, or nothing.
    logits: Vec<f32>,
    /// N values of ln Σ exp(logit), or nothing.
    logsumexps: Vec<f32>,
    /// N × M values, position by position, or nothing.
    lse_t: Vec<f32>,
}

/// One position's view into [`SoftTargets`].
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Target<'a> {
    /// Kept token ids, most likely first (ties by rising id). Empty where everything is drawn.
    pub ids: &'a [u32],
    /// Their log-probabilities in nats, same order.
    pub logprobs: &'a [f32],
    /// ln of the probability outside `ids`; outside `sample_ids` where `ids` is empty.
    pub tail_logprob: f32,
    /// Drawn token ids, rising. From the tail where `ids` is not empty, else from the whole distribution.
    pub sample_ids: &'a [u32],
    /// How often each was drawn.
    pub sample_counts: &'a [u16],
    /// Raw logits of `ids`, where the cache keeps logits: `logprobs[i] = logits[i] - logsumexp`.
    pub logits: &'a [f32],
    /// ln Σ exp(logit) over the vocabulary, where the cache keeps logits.
    pub logsumexp: Option<f32>,
    /// ln Σ p^(1/T) over the vocabulary for each temperature T that the cache declares.
    pub lse_t: &'a [f32],
}

impl Target<'_> {
    /// Drawn ids with the unbiased estimate of each one's probability: `count / draws`, times the tail's where there is a head.
    pub fn drawn_probabilities(&self) -> impl Iterator<Item = (u32, f64)> {
        let draws: f64 = self.sample_counts.iter().map(|&count| f64::from(count)).sum();
        let share = if self.ids.is_empty() { 1.0 } else { f64::from(self.tail_logprob).exp() };
        self.sample_ids.iter().zip(self.sample_counts).map(move |(&id, &count)| (id, share * f64::from(count) / draws))
    }
}

impl Default for SoftTargets {
    fn default() -> Self {
        Self::with_shape(0, 0)
    }
}

impl SoftTargets {
    /// Room for `positions` positions of `k` entries.
    pub fn with_capacity(positions: usize, k: usize) -> Self {
        Self::with_shape(positions, positions * k)
    }

    /// Room for `positions` positions with `entries` kept entries in all.
    pub(crate) fn with_shape(positions: usize, entries: usize) -> Self {
        let mut offsets = Vec::with_capacity(positions + 1);
        offsets.push(0);
        Self {
            sample_offsets: offsets.clone(),
            offsets,
            ids: Vec::with_capacity(entries),
            logprobs: Vec::with_capacity(entries),
            tail_logprobs: Vec::with_capacity(positions),
            sample_ids: Vec::new(),
            sample_counts: Vec::new(),
            logits: Vec::new(),
            logsumexps: Vec::new(),
            lse_t: Vec::new(),
        }
    }

    /// From what columns hold. The lengths agree with each other where the row's checksum holds. Where logits are kept the
    /// log-probabilities are theirs.
    pub(crate) fn from_parts(
        (offsets, ids, logprobs): (Vec<u32>, Vec<u32>, Vec<f32>),
        tail_logprobs: Vec<f32>,
        (sample_offsets, sample_ids, sample_counts): (Vec<u32>, Vec<u32>, Vec<u16>),
        (logits, logsumexps): (Vec<f32>, Vec<f32>),
        lse_t: Vec<f32>,
    ) -> Self {
        let mut new =
            Self { offsets, ids, logprobs, tail_logprobs, sample_offsets, sample_ids, sample_counts, logits, logsumexps, lse_t };
        if new.logprobs.is_empty() {
            new.logprobs = new.logprobs_of_logits();
        }
        new
    }

    /// `logit - logsumexp` of every kept entry; never above 0.
    pub(crate) fn logprobs_of_logits(&self) -> Vec<f32> {
        let mut logprobs = Vec::with_capacity(self.logits.len());
        for (bounds, &lse) in self.offsets.windows(2).zip(&self.logsumexps) {
            let logits = self.logits.get(bounds[0] as usize..bounds[1] as usize).unwrap_or_default();
            logprobs.extend(logits.iter().map(|&z| ((f64::from(z) - f64::from(lse)) as f32).min(0.0)));
        }
        logprobs
    }

    /// Adds one position of exact entries. `ids` and `logprobs` have the same length (the shorter one counts).
    pub fn push(&mut self, ids: &[u32], logprobs: &[f32], tail_logprob: f32) {
        self.push_target(&Target { ids, logprobs, tail_logprob, ..Target::default() });
    }

    /// Adds one position with everything that is known of it. Lists that go together have the same length (the shorter counts).
    pub fn push_target(&mut self, target: &Target<'_>) {
        let n = target.ids.len().min(target.logprobs.len());
        self.ids.extend_from_slice(&target.ids[..n]);
        self.logprobs.extend_from_slice(&target.logprobs[..n]);
        self.tail_logprobs.push(target.tail_logprob);
        self.offsets.push(self.ids.len() as u32);
        let n = target.sample_ids.len().min(target.sample_counts.len());
        self.sample_ids.extend_from_slice(&target.sample_ids[..n]);
        self.sample_counts.extend_from_slice(&target.sample_counts[..n]);
        self.sample_offsets.push(self.sample_ids.len() as u32);
        self.logits.extend_from_slice(&target.logits[..target.logits.len().min(target.ids.len())]);
        self.logsumexps.extend(target.logsumexp);
        self.lse_t.extend_from_slice(target.lse_t);
    }

    /// Appends all positions of `other`.
    pub fn extend(&mut self, other: &SoftTargets) {
        for i in 0..other.len() {
            self.push_target(&other.position(i));
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
        let entries = self.offsets[i] as usize..self.offsets[i + 1] as usize;
        let samples = self.sample_offsets[i] as usize..self.sample_offsets[i + 1] as usize;
        let temperatures = self.temperatures();
        Target {
            ids: &self.ids[entries.clone()],
            logprobs: &self.logprobs[entries.clone()],
            tail_logprob: self.tail_logprobs[i],
            sample_ids: &self.sample_ids[samples.clone()],
            sample_counts: &self.sample_counts[samples],
            logits: self.logits.get(entries).unwrap_or_default(),
            logsumexp: self.logsumexps.get(i).copied(),
            lse_t: self.lse_t.get(i * temperatures..(i + 1) * temperatures).unwrap_or_default(),
        }
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

    /// N + 1 offsets: position `i` owns `sample_offsets[i]..sample_offsets[i + 1]` of [`sample_ids`](Self::sample_ids).
    pub fn sample_offsets(&self) -> &[u32] {
        &self.sample_offsets
    }

    /// Drawn token ids of all positions, one after another.
    pub fn sample_ids(&self) -> &[u32] {
        &self.sample_ids
    }

    /// How often each was drawn, aligned with [`sample_ids`](Self::sample_ids).
    pub fn sample_counts(&self) -> &[u16] {
        &self.sample_counts
    }

    /// Raw logits aligned with [`ids`](Self::ids); empty where the cache keeps none.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// N values of ln Σ exp(logit); empty where the cache keeps no logits.
    pub fn logsumexps(&self) -> &[f32] {
        &self.logsumexps
    }

    /// Declared temperatures, M.
    pub fn temperatures(&self) -> usize {
        self.lse_t.len().checked_div(self.len()).unwrap_or(0)
    }

    /// N × M values, position by position: ln Σ p^(1/T) for each declared temperature T.
    pub fn lse_t(&self) -> &[f32] {
        &self.lse_t
    }

    /// A new value holding positions `range`.
    pub fn slice(&self, range: std::ops::Range<usize>) -> SoftTargets {
        let mut out = SoftTargets::with_capacity(range.len(), 0);
        for i in range {
            out.push_target(&self.position(i));
        }
        out
    }

    /// The unbiased estimate of each whole distribution that drawn entries stand for: kept entries as they are, drawn ones with
    /// `ln(count / draws)` plus the tail's log-probability where there is a head. The tail becomes −∞: nothing is left over.
    ///
    /// A loss over the whole student distribution, linear in these probabilities (forward KL), has the expectation of the loss
    /// against the teacher's own distribution.
    pub fn estimate(&self) -> SoftTargets {
        let mut out = SoftTargets::with_shape(self.len(), self.ids.len() + self.sample_ids.len());
        let mut entries: Vec<(u32, f32)> = Vec::new();
        for i in 0..self.len() {
            let target = self.position(i);
            let draws: f64 = target.sample_counts.iter().map(|&c| f64::from(c)).sum();
            let share = if target.ids.is_empty() { 0.0 } else { f64::from(target.tail_logprob) };
            entries.clear();
            entries.extend(target.ids.iter().copied().zip(target.logprobs.iter().copied()));
            let drawn = target.sample_ids.iter().zip(target.sample_counts);
            entries.extend(drawn.map(|(&id, &count)| (id, (share + (f64::from(count) / draws).ln()) as f32)));
            entries.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let (ids, logprobs): (Vec<u32>, Vec<f32>) = entries.iter().copied().unzip();
            out.push(&ids, &logprobs, f32::NEG_INFINITY);
        }
        out
    }
}
