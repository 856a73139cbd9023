//! A small cache of every way to store: each selection, each kind of value, both layouts of ids, declared temperatures. Made-up
//! teachers with whole distributions, the same on every run.

use crate::made::{self, VOCAB};
use potstill_cache::{
    Cutoff, Description, IdEncoding, LOGIT_MANTISSA_BITS, Record, Selection, SoftTargets, Target, Values, encode,
    round_to_mantissa,
};
use std::collections::{BTreeMap, BTreeSet};

/// Tokens to which a made-up distribution gives any probability.
const SUPPORT: usize = 200;

/// A way to store, with its name.
pub struct Mode {
    pub name: &'static str,
    pub description: Description,
}

impl Mode {
    /// The rows a teacher gives.
    pub fn given(&self) -> Vec<Record> {
        let description = &self.description;
        (0..description.expected_rows).map(|row| record(description, 2 * row + 1, 3 + (row as usize * 5) % 11)).collect()
    }

    /// The rows a reader gets back.
    pub fn stored(&self) -> Vec<Record> {
        let storage = self.description.storage();
        self.given().iter().map(|record| encode(record, &storage)).collect()
    }
}

/// All modes, each a cache of `rows` rows in shards of `rows_per_shard`.
pub fn modes(rows: u64, rows_per_shard: u32) -> Vec<Mode> {
    let k = 6;
    let top = Selection::TopK { k };
    let cutoff = |rule| Selection::Cutoff { k, rule };
    let base = made::description(rows, rows_per_shard, 1);
    let with = |selection| Description { selection, ..base.clone() };
    let exact = |selection| Description {
        values: Values::LogitBf16,
        mantissa_bits: LOGIT_MANTISSA_BITS,
        zstd_level: 12,
        ..with(selection)
    };
    [
        ("top-k", with(top)),
        ("cutoff-prob", Description { mantissa_bits: 5, zstd_level: 12, ..with(cutoff(Cutoff::MinProb(0.02))) }),
        ("cutoff-mass", Description { mantissa_bits: 4, ..with(cutoff(Cutoff::MinMass(0.6))) }),
        ("logit", exact(top)),
        ("logit-cutoff", Description { lse_temperatures: vec![0.5], ..exact(cutoff(Cutoff::MinProb(0.02))) }),
        ("sampled", Description { mantissa_bits: 4, ..with(Selection::Sampled { draws: 12, seed: 3 }) }),
        ("hybrid", with(Selection::Hybrid { k: 3, draws: 5, seed: 1 << 40 })),
        ("plain-ids", Description { id_encoding: IdEncoding::Plain, ..with(Selection::Hybrid { k: 2, draws: 4, seed: 0 }) }),
        ("temperatures", Description { lse_temperatures: vec![0.5, 1.5, 2.0], ..with(top) }),
        ("all-bits", Description { mantissa_bits: 23, zstd_level: 22, ..with(top) }),
    ]
    .into_iter()
    .map(|(name, description)| Mode { name, description })
    .collect()
}

/// A generator with a fixed sequence (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// A row of `tokens` tokens (2 or more) in which about two of three positions are scored.
fn record(description: &Description, seq_id: u64, tokens: usize) -> Record {
    let mut random = Random(seq_id.wrapping_mul(7919) + tokens as u64);
    let input_ids = (0..tokens).map(|_| random.below(VOCAB as usize) as u32).collect();
    let mut positions: Vec<u32> = (0..tokens as u32 - 1).filter(|_| random.below(3) > 0).collect();
    if positions.is_empty() {
        positions.push(0);
    }
    let mut targets = SoftTargets::with_capacity(positions.len(), 8);
    for _ in &positions {
        push(&mut targets, description, &mut random);
    }
    Record { seq_id, input_ids, positions, targets, codec: Default::default() }
}

/// Adds what `description` keeps of one whole distribution.
fn push(targets: &mut SoftTargets, description: &Description, random: &mut Random) {
    let mut ids = BTreeSet::new();
    while ids.len() < SUPPORT {
        ids.insert(random.below(VOCAB as usize) as u32);
    }
    let logit = |random: &mut Random| round_to_mantissa((9.0 * random.unit() * random.unit()) as f32 - 2.0, 7);
    let mut all: Vec<(u32, f32)> = ids.into_iter().map(|id| (id, logit(random))).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let logsumexp = all.iter().map(|(_, z)| f64::from(*z).exp()).sum::<f64>().ln();
    let logprobs: Vec<f32> = all.iter().map(|(_, z)| (f64::from(*z) - logsumexp) as f32).collect();
    let kept = description.selection.kept(&logprobs);
    let samples = drawn(&all[kept..], &logprobs[kept..], description.selection.draws().unwrap_or(0), random);
    let outside = |(i, (id, _)): &(usize, &(u32, f32))| *i >= kept && (kept > 0 || !samples.contains_key(id));
    let tail: f64 = all.iter().enumerate().filter(outside).map(|(i, _)| f64::from(logprobs[i]).exp()).sum();
    let lse = |t: &f32| logprobs.iter().map(|l| (f64::from(*l) / f64::from(*t)).exp()).sum::<f64>().ln() as f32;
    let (ids, logits): (Vec<u32>, Vec<f32>) = all[..kept].iter().copied().unzip();
    let with_logits = description.values == Values::LogitBf16;
    targets.push_target(&Target {
        ids: &ids,
        logprobs: &logprobs[..kept],
        tail_logprob: tail.ln() as f32,
        sample_ids: &samples.keys().copied().collect::<Vec<_>>(),
        sample_counts: &samples.values().copied().collect::<Vec<_>>(),
        logits: if with_logits { &logits } else { &[] },
        logsumexp: with_logits.then_some(logsumexp as f32),
        lse_t: &description.lse_temperatures.iter().map(lse).collect::<Vec<_>>(),
    });
}

/// `draws` draws from these entries, with how often each came.
fn drawn(entries: &[(u32, f32)], logprobs: &[f32], draws: u16, random: &mut Random) -> BTreeMap<u32, u16> {
    let mut counts = BTreeMap::new();
    let total: f64 = logprobs.iter().map(|l| f64::from(*l).exp()).sum();
    for _ in 0..draws {
        let mut left = random.unit() * total;
        let hit = logprobs.iter().position(|l| {
            left -= f64::from(*l).exp();
            left < 0.0
        });
        let (id, _) = entries[hit.unwrap_or(entries.len() - 1)];
        *counts.entry(id).or_insert(0) += 1;
    }
    counts
}
