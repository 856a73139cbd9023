//! What the sampled distributions take when they are stored, in each of several ways, and with that what all of them will take.
//!
//! A way to store is derived from what was kept for it: log-probabilities from log-probabilities, logits from logits, so that each
//! is rounded from what a run would round. A smaller k is a shorter list with more in its tail, the same as if less had been kept.

use super::sample::Sample;
use crate::run::RunContext;
use crate::{Error, Result};
use potstill_cache::{Description, Extent, Knobs, Preset, Record, SizeEstimate, Sizing, Storage, Values};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Instant;

/// The presets that keep the most likely ids, which sizes are compared of.
const COMPARED: [Preset; 4] = [Preset::Exact, Preset::Standard, Preset::Compact, Preset::Small];

/// Bytes a scored position that caches of realistic distributions took, as `scripts/LOG.md` tells (`cargo run --release -p potstill-cache
/// --example measure` on 64 conversations, every position scored, ids of a vocabulary of 151,643), by preset and k.
const TYPICAL: [(Preset, [(u16, f64); 5]); 4] = [
    (Preset::Exact, [(8, 29.0), (16, 50.3), (32, 91.7), (64, 175.8), (128, 323.2)]),
    (Preset::Standard, [(8, 25.1), (16, 46.7), (32, 85.4), (64, 161.6), (128, 295.0)]),
    (Preset::Compact, [(8, 16.1), (16, 25.7), (32, 42.1), (64, 70.5), (128, 118.4)]),
    (Preset::Small, [(8, 14.2), (16, 22.4), (32, 36.8), (64, 62.5), (128, 109.2)]),
];

/// The cache as it is set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedSize {
    /// What is kept, in words: `top-k 64`.
    pub selection: String,
    /// What is stored of it: `logprob` or `logit-bf16`.
    pub values: Values,
    /// Mantissa bits of it.
    pub mantissa_bits: u8,
    /// zstd level.
    pub zstd_level: i32,
    /// The shards.
    pub estimate: SizeEstimate,
    /// Entries kept at a position, draws included, on average.
    pub mean_entries: f64,
    /// Bytes that a scored position takes in memory before it is stored.
    pub per_scored_in_memory: f64,
}

/// The same data stored otherwise.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ComparedSize {
    /// The preset.
    pub preset: Preset,
    /// Most ids kept; nothing where ids are drawn.
    pub k: Option<u16>,
    /// The shards.
    pub estimate: SizeEstimate,
    /// Entries kept at a position on average.
    pub mean_entries: f64,
}

/// What a cache of so many positions of other distributions takes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TypicalSize {
    /// The preset.
    pub preset: Preset,
    /// Most ids kept.
    pub k: u16,
    /// Bytes a scored position.
    pub per_scored: f64,
    /// Bytes of all.
    pub bytes: u64,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Sizes {
    pub(super) size: Option<PlannedSize>,
    pub(super) compared: Vec<ComparedSize>,
    pub(super) kept_mass: BTreeMap<u16, f64>,
    pub(super) typical: Vec<TypicalSize>,
    /// Seconds that storing all rows takes as the run is set.
    pub(super) storing_seconds: f64,
}

impl Sizes {
    /// Stores the sample in every way. Errors: as [`Sizing::of`]; a stop.
    pub(super) fn of(
        sample: &Sample,
        description: &Description,
        whole: &Extent,
        compared: &[u16],
        context: &RunContext,
    ) -> Result<Self> {
        let ways = ways(compared)?;
        context.progress.begin("storing the sample", "ways", ways.len() as u64 + 1);
        let began = Instant::now();
        let sizing = Sizing::of(description, &sample.own)?;
        let sampled = sizing.sampled();
        let storing = began.elapsed().as_secs_f64() / sampled.scored.max(1) as f64;
        let mut sizes = Self {
            size: Some(PlannedSize {
                selection: description.selection.to_string(),
                values: description.values,
                mantissa_bits: description.mantissa_bits,
                zstd_level: description.zstd_level,
                estimate: sizing.of_all(whole),
                mean_entries: mean_entries(&sample.own),
                per_scored_in_memory: per_scored_in_memory(&sample.own),
            }),
            kept_mass: compared.iter().map(|k| (*k, kept_mass(&sample.logprobs, usize::from(*k)))).collect(),
            storing_seconds: storing * whole.scored as f64,
            ..Self::default()
        };
        for (preset, k, storage) in ways {
            context.progress.add(1);
            if context.stopping() {
                return Err(Error::stopped());
            }
            let records = match (k, storage.values) {
                (None, _) => sample.drawn.clone(),
                (_, Values::Logprob) => narrowed(&sample.logprobs, &storage),
                (_, Values::LogitBf16) => narrowed(&sample.logits, &storage),
            };
            // The temperatures belong to the run's own way to store alone.
            let description = Description { lse_temperatures: Vec::new(), ..description.clone().stored_as(&storage) };
            let estimate = Sizing::of(&description, &records)?.of_all(whole);
            sizes.compared.push(ComparedSize { preset, k, estimate, mean_entries: mean_entries(&records) });
        }
        context.progress.end();
        Ok(sizes)
    }
}

/// What is compared: each preset at each k, and draws.
fn ways(compared: &[u16]) -> Result<Vec<(Preset, Option<u16>, Storage)>> {
    let mut ways = Vec::new();
    for k in compared {
        for preset in COMPARED {
            ways.push((preset, Some(*k), preset.with(&Knobs { top_k: Some(*k), ..Knobs::default() })?));
        }
    }
    ways.push((Preset::Sampled, None, Preset::Sampled.storage()));
    Ok(ways)
}

/// What caches of other distributions say, carried over to so many positions.
pub(super) fn typical(whole: &Extent) -> Vec<TypicalSize> {
    let of = |(preset, by_k): (Preset, [(u16, f64); 5])| {
        by_k.map(|(k, per_scored)| TypicalSize { preset, k, per_scored, bytes: (per_scored * whole.scored as f64) as u64 })
    };
    TYPICAL.into_iter().flat_map(of).collect()
}

/// The records as `storage` selects of them.
fn narrowed(records: &[Record], storage: &Storage) -> Vec<Record> {
    let narrow = |record: &Record| Record { targets: record.targets.narrowed(&storage.selection), ..record.clone() };
    records.iter().map(narrow).collect()
}

fn positions(records: &[Record]) -> f64 {
    records.iter().map(|record| record.positions.len()).sum::<usize>().max(1) as f64
}

fn mean_entries(records: &[Record]) -> f64 {
    let entries = |record: &Record| record.targets.ids().len() + record.targets.sample_ids().len();
    records.iter().map(entries).sum::<usize>() as f64 / positions(records)
}

/// Ids, their numbers and draws, and what there is one of at a position.
fn per_scored_in_memory(records: &[Record]) -> f64 {
    let of = |record: &Record| {
        let t = &record.targets;
        4 * (t.ids().len() + t.logprobs().len() + t.logits().len() + t.sample_ids().len())
            + 2 * t.sample_counts().len()
            + 4 * (t.tail_logprobs().len()
                + t.logsumexps().len()
                + t.lse_t().len()
                + t.offsets().len()
                + t.sample_offsets().len())
    };
    records.iter().map(of).sum::<usize>() as f64 / positions(records)
}

/// Mean probability of the first k ids.
fn kept_mass(records: &[Record], k: usize) -> f64 {
    let mass = |record: &Record| -> f64 {
        let of = |i: usize| record.targets.position(i).logprobs.iter().take(k).map(|l| f64::from(*l).exp()).sum::<f64>();
        (0..record.targets.len()).map(of).sum()
    };
    records.iter().map(mass).sum::<f64>() / positions(records)
}
