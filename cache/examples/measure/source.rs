//! The distributions to store: sequences of the 128 most likely tokens as bf16 logits with their log-sum-exp and the tail's
//! log-probability, and what each way to store keeps of them.

use crate::Failure;
use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, UInt32Type};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use potstill_cache::{Record, SoftTargets, Storage, Target, Values};
use std::fs::File;
use std::path::Path;

/// Width of the distributions: that of Qwen's models, whose ids the data has.
pub const VOCAB_SIZE: u32 = 151_936;

/// One sequence: each position has `width` entries, by falling logit, ties by rising id.
pub struct Sequence {
    input_ids: Vec<u32>,
    width: usize,
    ids: Vec<u32>,
    logits: Vec<f32>,
    logsumexps: Vec<f32>,
    tail_logprobs: Vec<f32>,
}

/// What a draw that falls into the part of the distribution that the data does not name becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unnamed {
    /// It is drawn again: the data's entries stand for the whole distribution. Too few ids, so a lower bound of the bytes.
    Redrawn,
    /// Any other id, all alike. Nothing is harder to compress, so an upper bound of the bytes.
    AnyId,
}

impl Sequence {
    /// Reads all sequences of a file with columns `input_ids`, `topk_ids`, `topk_logits`, `logsumexp` and `tail_logprob`.
    pub fn load(path: &Path) -> Result<Vec<Self>, Failure> {
        let file = File::open(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let mut sequences = Vec::new();
        for batch in ParquetRecordBatchReaderBuilder::try_new(file)?.build()? {
            let batch = batch?;
            let column =
                |name: &str| batch.column_by_name(name).cloned().ok_or_else(|| format!("{}: no column {name}", path.display()));
            let (input_ids, ids, logits) = (column("input_ids")?, column("topk_ids")?, column("topk_logits")?);
            let (lse, tail) = (column("logsumexp")?, column("tail_logprob")?);
            for row in 0..batch.num_rows() {
                let words = |array: &arrow_array::ArrayRef| array.as_primitive::<UInt32Type>().values().to_vec();
                let floats = |array: &arrow_array::ArrayRef| array.as_primitive::<Float32Type>().values().to_vec();
                let inner = |array: &arrow_array::ArrayRef| array.as_list::<i32>().value(row);
                let nested = |array: &arrow_array::ArrayRef| {
                    let lists = inner(array);
                    let lists = lists.as_list::<i32>();
                    let (first, last) = (lists.value_offsets().first(), lists.value_offsets().last());
                    let (first, last) = (*first.unwrap_or(&0) as usize, *last.unwrap_or(&0) as usize);
                    lists.values().slice(first, last - first)
                };
                let (input_ids, ids, logits) = (words(&inner(&input_ids)), words(&nested(&ids)), floats(&nested(&logits)));
                let (logsumexps, tail_logprobs) = (floats(&inner(&lse)), floats(&inner(&tail)));
                let width = ids.len() / input_ids.len().max(1);
                let n = input_ids.len();
                if width == 0 || [ids.len(), logits.len()] != [n * width; 2] || [logsumexps.len(), tail_logprobs.len()] != [n; 2]
                {
                    return Err(format!("{}: row {row}: lists of unequal lengths", path.display()).into());
                }
                let mut sequence = Self { input_ids, width, ids, logits, logsumexps, tail_logprobs };
                sequence.order_ties();
                sequences.push(sequence);
            }
        }
        Ok(sequences)
    }

    fn order_ties(&mut self) {
        let width = self.width;
        for (ids, logits) in self.ids.chunks_exact_mut(width).zip(self.logits.chunks_exact_mut(width)) {
            let mut pairs: Vec<(f32, u32)> = logits.iter().copied().zip(ids.iter().copied()).collect();
            pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            for ((logit, id), pair) in logits.iter_mut().zip(ids.iter_mut()).zip(pairs) {
                (*logit, *id) = pair;
            }
        }
    }

    /// Scored positions.
    pub fn positions(&self) -> usize {
        self.input_ids.len()
    }

    /// The record of this sequence as `storage` keeps it, before rounding. One token is added, so that every position is scored.
    pub fn record(&self, seq_id: u64, storage: &Storage, unnamed: Unnamed) -> Record {
        let n = self.positions();
        let mut targets = SoftTargets::with_capacity(n, usize::from(storage.selection.head()));
        for i in 0..n {
            self.push(&mut targets, i, storage, unnamed, seq_id);
        }
        let mut record = Record {
            seq_id,
            input_ids: self.input_ids.clone(),
            positions: (0..n as u32).collect(),
            targets,
            codec: Default::default(),
        };
        record.input_ids.push(0);
        record
    }

    fn push(&self, targets: &mut SoftTargets, i: usize, storage: &Storage, unnamed: Unnamed, seq_id: u64) {
        let range = i * self.width..(i + 1) * self.width;
        let (ids, logits, lse) = (&self.ids[range.clone()], &self.logits[range], self.logsumexps[i]);
        let logprobs: Vec<f32> = logits.iter().map(|&z| ((f64::from(z) - f64::from(lse)) as f32).min(0.0)).collect();
        let p: Vec<f64> = logprobs.iter().map(|&l| f64::from(l).exp()).collect();
        let rest = f64::from(self.tail_logprobs[i]).exp();
        let kept = storage.selection.kept(&logprobs);
        let dropped: f64 = p[kept..].iter().sum();
        let mut tail = rest + dropped;
        let mut drawn = Vec::new();
        if let Some(draws) = storage.selection.draws() {
            let mut random = Random(seq_id << 32 | i as u64);
            drawn = draw(&mut random, &ids[kept..], &p[kept..], rest, ids, draws, unnamed);
            if kept == 0 {
                let named = |id: u32| ids.iter().position(|&other| other == id).map_or(0.0, |at| p[at]);
                tail = (rest + dropped - drawn.iter().map(|&(id, _)| named(id)).sum::<f64>()).max(0.0);
            }
        }
        let (sample_ids, sample_counts): (Vec<u32>, Vec<u16>) = drawn.into_iter().unzip();
        let exact = storage.values == Values::LogitBf16;
        targets.push_target(&Target {
            ids: &ids[..kept],
            logprobs: &logprobs[..kept],
            tail_logprob: (tail.ln() as f32).min(0.0),
            sample_ids: &sample_ids,
            sample_counts: &sample_counts,
            logits: if exact { &logits[..kept] } else { &[] },
            logsumexp: exact.then_some(lse),
            lse_t: &[],
        });
    }
}

/// `draws` draws from the entries `ids` with probabilities `p` and from the unnamed rest: rising ids with counts.
fn draw(random: &mut Random, ids: &[u32], p: &[f64], rest: f64, named: &[u32], draws: u16, unnamed: Unnamed) -> Vec<(u32, u16)> {
    let cumulative: Vec<f64> = p
        .iter()
        .scan(0.0, |sum, p| {
            *sum += p;
            Some(*sum)
        })
        .collect();
    let all = cumulative.last().copied().unwrap_or_default();
    let total = if unnamed == Unnamed::Redrawn && all > 0.0 { all } else { all + rest };
    let mut counts = std::collections::BTreeMap::new();
    for _ in 0..draws {
        let at = random.unit() * total;
        let id = match ids.get(cumulative.partition_point(|&sum| sum <= at)) {
            Some(&id) => id,
            None => loop {
                let id = (random.unit() * f64::from(VOCAB_SIZE)) as u32;
                if !named.contains(&id) {
                    break id;
                }
            },
        };
        *counts.entry(id).or_insert(0u16) += 1;
    }
    counts.into_iter().collect()
}

/// SplitMix64: the same numbers on every machine.
pub struct Random(pub u64);

impl Random {
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number from 0 to below 1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
}
