//! Writing a cache under the clock. Making the records is not part of what is timed.

use crate::Failure;
use crate::clock::{process_cpu, thread_cpu, wall};
use crate::source::{Sequence, Unnamed, VOCAB_SIZE};
use potstill_cache::{
    CacheWriter, DataFingerprint, Description, EncodingFingerprint, Manifest, Record, Selection, Storage, TeacherFingerprint,
    TemplateFingerprint, TokenizerFingerprint, WriterOptions,
};
use std::path::Path;

/// Rows in a shard.
pub const ROWS_PER_SHARD: u32 = 1024;

/// What writing cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cost {
    /// CPU seconds of all threads.
    pub cpu_s: f64,
    /// Seconds on the wall.
    pub wall_s: f64,
}

/// The records of one pass over the data.
pub fn records(sequences: &[Sequence], storage: &Storage, unnamed: Unnamed) -> Vec<Record> {
    sequences.iter().zip(0..).map(|(sequence, seq_id)| sequence.record(seq_id, storage, unnamed)).collect()
}

/// Writes `repeat` copies of `records` to `dir`, numbered through and each with a last token of its own.
pub fn write(dir: &Path, records: &[Record], repeat: u64, storage: &Storage) -> Result<(Cost, Manifest), Failure> {
    let n = records.len() as u64;
    let description = description(n * repeat, storage);
    let (mut cost, start) = (Cost::default(), (process_cpu(), wall()));
    let mut writer = CacheWriter::open(dir, &description, WriterOptions::default())?;
    for pass in 0..repeat {
        let begun = (thread_cpu(), wall());
        let mut copies = records.to_vec();
        for copy in &mut copies {
            copy.seq_id += pass * n;
            if let Some(token) = copy.input_ids.last_mut() {
                *token = pass as u32;
            }
        }
        // Row groups of the pass before are encoded meanwhile on other threads; only this thread's time is taken out.
        (cost.cpu_s, cost.wall_s) = (cost.cpu_s - (thread_cpu() - begun.0), cost.wall_s - (wall() - begun.1));
        writer.extend(&copies)?;
    }
    let manifest = writer.finish()?;
    (cost.cpu_s, cost.wall_s) = (cost.cpu_s + process_cpu() - start.0, cost.wall_s + wall() - start.1);
    Ok((cost, manifest))
}

/// Writes `shards` shards of [`ROWS_PER_SHARD`] rows of two tokens: as many pages, and so as much metadata, as long rows have.
pub fn write_short(dir: &Path, shards: u64, storage: &Storage) -> Result<Manifest, Failure> {
    let rows = shards * u64::from(ROWS_PER_SHARD);
    let mut writer = CacheWriter::open(dir, &description(rows, storage), WriterOptions::default())?;
    let mut targets = potstill_cache::SoftTargets::default();
    targets.push(&[7], &[-0.25], (1.0 - (-0.25f32).exp()).ln());
    let record = |seq_id: u64| Record {
        seq_id,
        input_ids: vec![(seq_id % u64::from(VOCAB_SIZE)) as u32, (seq_id >> 17) as u32],
        positions: vec![0],
        targets: targets.clone(),
        codec: Default::default(),
    };
    for shard in 0..shards {
        let first = shard * u64::from(ROWS_PER_SHARD);
        writer.extend(&(first..first + u64::from(ROWS_PER_SHARD)).map(record).collect::<Vec<_>>())?;
    }
    Ok(writer.finish()?)
}

fn description(rows: u64, storage: &Storage) -> Description {
    let none = String::new;
    let description = Description {
        teacher: TeacherFingerprint {
            name: "made".into(),
            config_blake3: none(),
            weights_blake3: none(),
            weights: "bfloat16".into(),
            compute: "bfloat16".into(),
        },
        tokenizer: TokenizerFingerprint { vocabulary_blake3: none(), blake3: none(), size: VOCAB_SIZE },
        template: TemplateFingerprint { source: none(), blake3: none() },
        data: DataFingerprint { files: Vec::new(), rows, skipped: Default::default() },
        encoding: EncodingFingerprint { max_length: 1025, truncation: "right".into(), truncated_tokens: 0 },
        selection: Selection::TopK { k: 1 },
        mantissa_bits: 7,
        values: Default::default(),
        lse_temperatures: Vec::new(),
        zstd_level: 3,
        id_encoding: Default::default(),
        rows_per_shard: ROWS_PER_SHARD,
        vocab_size: VOCAB_SIZE,
        expected_rows: rows,
        part: None,
        derived: Vec::new(),
    };
    description.stored_as(storage)
}
