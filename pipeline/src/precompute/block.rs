//! How many tokens go through the layers together, and whether weights stay in memory: plans from the memory at hand and from the
//! speed seen. Decides no byte of the cache.

use super::PrecomputeConfig;
use crate::model::config::ModelConfig;
use crate::teacher::Residency;
use potstill_cache::{Storage, Values};
use std::iter::Peekable;
use std::ops::Range;
use std::time::Duration;

/// Most tokens of a block, however much memory there is: beyond, reading weights costs next to nothing on any disk.
const MOST_TOKENS: u64 = 1 << 17;
/// The part of the available memory that resident weights may take.
const WEIGHTS_PART: f64 = 0.7;
/// The part of the available memory that a block's hidden states, and what is kept of its logits, may take.
const STATES_PART: f64 = 0.25;

/// What is decided before the teacher is loaded.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plan {
    /// Where weights are between two uses.
    pub residency: Residency,
    /// Most tokens of a block; 0 where each pack is one.
    most: u64,
    /// Whether the user named the number.
    fixed: bool,
}

impl Plan {
    /// The plan for a teacher whose weights take so many bytes, where so many are available (unknown where the system does not say).
    pub fn new(
        config: &PrecomputeConfig,
        (storage, model): (&Storage, &ModelConfig),
        weights: u64,
        available: Option<u64>,
    ) -> Self {
        let fits = available.is_none_or(|available| weights as f64 <= available as f64 * WEIGHTS_PART);
        let residency = config.residency.unwrap_or(if fits { Residency::Resident } else { Residency::Streamed });
        let most = match (config.block_tokens, residency) {
            (Some(tokens), _) => u64::from(tokens),
            (None, Residency::Resident) => 0,
            (None, Residency::Streamed) => {
                let token = token_bytes(storage, model);
                available.map_or(MOST_TOKENS, |available| (available as f64 * STATES_PART) as u64 / token).min(MOST_TOKENS)
            }
        };
        Self { residency, most, fixed: config.block_tokens.is_some() }
    }

    /// Most tokens that go through the layers together, where a pack has at most so many.
    pub fn most_tokens(&self, pack_tokens: u64) -> u64 {
        self.most.max(pack_tokens)
    }

    /// The first block is small where nothing is known about the teacher's speed.
    pub fn budget(&self, seal_interval: Duration) -> Budget {
        Budget { most: self.most, now: if self.fixed { self.most } else { 0 }, fixed: self.fixed, seal_interval }
    }
}

/// Bytes that a block holds of a scored token: its state and the one that replaces it, and at the end what is kept of its logits, in
/// lists that may have twice the room they need.
fn token_bytes(storage: &Storage, model: &ModelConfig) -> u64 {
    let entry = 4 + 4 + if storage.values == Values::LogitBf16 { 4 } else { 0 };
    let drawn = 4 + 2;
    let selection = &storage.selection;
    let kept = entry * u64::from(selection.head()) + drawn * u64::from(selection.draws().unwrap_or(0));
    2 * 4 * model.hidden_size as u64 + 2 * kept
}

/// How many tokens the next block may have.
#[derive(Debug)]
pub(super) struct Budget {
    most: u64,
    now: u64,
    fixed: bool,
    seal_interval: Duration,
}

impl Budget {
    /// The packs of the next block, at least one.
    pub fn take(
        &self,
        packs: &mut Peekable<impl Iterator<Item = Range<usize>>>,
        tokens_of: impl Fn(&Range<usize>) -> u64,
    ) -> Vec<Range<usize>> {
        let mut block: Vec<Range<usize>> = packs.next().into_iter().collect();
        let mut tokens: u64 = block.iter().map(&tokens_of).sum();
        while let Some(pack) = packs.next_if(|pack| tokens + tokens_of(pack) <= self.now) {
            tokens += tokens_of(&pack);
            block.push(pack);
        }
        block
    }

    /// Learns from a block: the next one is to take as long as rows may stay undurable, so that a kill loses little more than that.
    pub fn took(&mut self, tokens: u64, time: Duration) {
        if !self.fixed {
            let per_second = tokens as f64 / time.as_secs_f64().max(1e-3);
            self.now = self.most.min((per_second * self.seal_interval.as_secs_f64()) as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use potstill_cache::Preset;

    fn blocks(budget: &Budget, packs: &[u64]) -> Vec<usize> {
        let mut ranges = (0..packs.len()).map(|i| i..i + 1).peekable();
        let mut sizes = Vec::new();
        while ranges.peek().is_some() {
            sizes.push(budget.take(&mut ranges, |pack| packs[pack.start]).len());
        }
        sizes
    }

    #[test]
    fn a_block_takes_packs_while_they_fit_and_never_none() {
        let budget = |now| Budget { most: now, now, fixed: true, seal_interval: Duration::ZERO };
        assert_eq!(blocks(&budget(0), &[5, 5, 5]), [1, 1, 1]);
        assert_eq!(blocks(&budget(10), &[5, 5, 5]), [2, 1]);
        assert_eq!(blocks(&budget(10), &[50, 4, 4, 4]), [1, 2, 1]);
        assert_eq!(blocks(&budget(10), &[]), [0usize; 0]);
    }

    #[test]
    fn blocks_grow_to_what_is_scored_between_two_seals() {
        let plan = Plan { residency: Residency::Streamed, most: 1000, fixed: false };
        let mut budget = plan.budget(Duration::from_secs(10));
        assert_eq!(budget.now, 0, "one pack first");
        budget.took(300, Duration::from_secs(10));
        assert_eq!(budget.now, 300);
        budget.took(300, Duration::from_secs(1));
        assert_eq!(budget.now, 1000, "never more than memory allows");
        let mut fixed = Plan { fixed: true, ..plan }.budget(Duration::from_secs(10));
        fixed.took(1, Duration::from_secs(10));
        assert_eq!(fixed.now, 1000);
    }

    #[test]
    fn weights_stay_in_memory_where_they_fit_and_blocks_in_what_is_left() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden/teacher-awq");
        let model = ModelConfig::from_folder(std::path::Path::new(golden)).unwrap();
        let plan =
            |config: &PrecomputeConfig, available| Plan::new(config, (&config.storage().unwrap(), &model), 1000, available);
        let config = PrecomputeConfig::default();
        assert_eq!(plan(&config, None), Plan { residency: Residency::Resident, most: 0, fixed: false });
        assert_eq!(plan(&config, Some(2000)).residency, Residency::Resident);
        assert_eq!(plan(&config, Some(1200)).residency, Residency::Streamed);
        // A quarter of 80 MiB holds the states, before and after, of so many tokens of 256 values, and twice 64 entries of 8 bytes.
        let streamed = PrecomputeConfig { residency: Some(Residency::Streamed), ..PrecomputeConfig::default() };
        assert_eq!(plan(&streamed, Some(80 << 20)).most, (20 << 20) / (2 * 4 * 256 + 2 * 8 * 64));
        // What is kept may be far more than the states: 24 KiB a token here.
        let wide = PrecomputeConfig { preset: Preset::Exact, top_k: Some(1024), ..streamed.clone() };
        assert_eq!(plan(&wide, Some(80 << 20)).most, (20 << 20) / (2 * 4 * 256 + 2 * 12 * 1024));
        let drawn = PrecomputeConfig { preset: Preset::Sampled, draws: Some(5000), ..streamed.clone() };
        assert_eq!(plan(&drawn, Some(80 << 20)).most, (20 << 20) / (2 * 4 * 256 + 2 * 6 * 5000));
        assert_eq!(plan(&streamed, Some(1 << 50)).most, MOST_TOKENS);
        let named = PrecomputeConfig { block_tokens: Some(77), ..streamed };
        assert_eq!(plan(&named, Some(80 << 20)), Plan { residency: Residency::Streamed, most: 77, fixed: true });
    }
}
