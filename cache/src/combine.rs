//! Several caches become one: parts of the same data scored apart, runs that were interrupted, caches of different data.
//!
//! It refuses caches that were not made alike, and two distributions of one row of the same data that differ. The one idea: the order
//! of all rows is planned from their numbers and keys alone (40 bytes a row), and compared where two caches hold the same row of the
//! same data, before a byte is written; then rows stream through in blocks.
//!
//! ```text
//! caches of the same data    merged by seq_id; a row that two of them hold is kept once, if it is the same
//! caches of other data       put one after another; seq_ids shifted by the data rows before; files and skipped counts added;
//!                            a conversation that was there before (same key: tokens and scored positions) is kept as
//!                            the first has it and counted as a skipped duplicate. Scored in another pack or on another device its
//!                            last bits may differ, and either scoring is as good
//! ```
//!
//! Rows in pieces of a shard under way are no rows of a cache yet: they are left out, and counted. The parts of one data make the very
//! bytes of a single run over it.

mod merged;
mod plan;

use crate::progress::ScanProgress;
use crate::writer::{Companion, WriterOptions};
use crate::{
    Cache, CacheWriter, CodecError, Derivation, Description, Error, IdEncoding, Record, Reshape, Result, Storage, Values, parts,
};
use merged::Merged;
use plan::{Plan, Planned};
use rayon::prelude::*;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Why rows are counted as skipped that another data set has already: the word that reading both at once would use.
pub(crate) const DUPLICATE: &str = "duplicate of an earlier row";
/// Bytes of stored rows that are under way at once, about; decoded they are some five times as many.
const BLOCK_BYTES: u64 = 16 << 20;
/// Most rows that are under way at once.
const BLOCK_ROWS: u64 = 512;

/// What a rewriting did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rewritten {
    /// Rows in the new cache.
    pub rows: u64,
    /// Rows it will have when it is complete.
    pub expected_rows: u64,
    /// Whether it has them all.
    pub complete: bool,
    /// Rows that were there before this run.
    pub resumed_rows: u64,
    /// Scored positions in the new cache.
    pub scored: u64,
    /// Rows that several of the caches held, all of them alike, and that were kept once.
    pub shared_rows: u64,
    /// Conversations of later data that earlier data had already, by their key; left out, whatever their distributions are.
    pub duplicates: u64,
    /// Rows of the caches that were not looked at, for they are in pieces of shards under way: continuing those caches joins them.
    pub piece_rows: u64,
    /// Bytes of the shards read from.
    pub bytes_before: u64,
    /// Bytes of the new shards.
    pub bytes: u64,
    /// How rows were stored.
    pub before: Stored,
    /// How they are stored now.
    pub after: Stored,
    /// Mean and largest KL(given, stored) of a scored position in nats, over all steps since the teacher; absent where some step was
    /// not measured (version 1).
    pub codec_kl: Option<(f64, f64)>,
}

/// A [`Storage`] in words and numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Stored {
    /// The selection in words, as shards state it.
    pub selection: String,
    /// What the numbers of kept entries are.
    pub values: Values,
    /// Mantissa bits of log-probabilities and tails.
    pub mantissa_bits: u8,
    /// zstd level of the pages.
    pub zstd_level: i32,
    /// How ids are laid out.
    pub id_encoding: IdEncoding,
    /// Rows in a shard.
    pub rows_per_shard: u32,
}

impl Stored {
    fn of(description: &Description) -> Self {
        let Storage { selection, values, mantissa_bits, zstd_level, id_encoding } = description.storage();
        let (selection, rows_per_shard) = (selection.to_string(), description.rows_per_shard);
        Self { selection, values, mantissa_bits, zstd_level, id_encoding, rows_per_shard }
    }
}

/// Writes the rows of the caches in `sources` into one cache in `out`, stored as `reshape` says. Run again, it continues.
///
/// zstd level and rows in a shard are the first cache's, unless `reshape` says otherwise. Where rows are still missing, the result is
/// a partial cache that the command of a single run continues: this is refused where the missing rows are not the last ones, the
/// first of them begins no shard, the data differ, or something is taken away.
///
/// Of a conversation in several data the first scoring is kept; pieces of a shard under way are left out, both counted.
///
/// A source that is a folder of workers' parts stands for all of them, and all have to be finished.
///
/// Errors: `Unlike` (other teacher, tokenizer, template, settings or companions), `Conflict`, `Incomplete`, `Raise`, damage, as
/// [`CacheWriter::open`], I/O.
pub fn combine(sources: &[PathBuf], out: &Path, reshape: &Reshape, progress: &ScanProgress) -> Result<Rewritten> {
    let mut caches = Vec::with_capacity(sources.len());
    for source in sources {
        caches.extend(parts::caches(source)?);
    }
    rewrite("combine", &caches, out, reshape, progress)
}

/// The work of `combine` and `repack`.
pub(crate) fn rewrite(
    verb: &str,
    sources: &[PathBuf],
    out: &Path,
    reshape: &Reshape,
    progress: &ScanProgress,
) -> Result<Rewritten> {
    let inputs = sources.iter().map(|dir| Cache::open(dir)).collect::<Result<Vec<_>>>()?;
    check_folders(&inputs, out)?;
    let first = first_of(&inputs)?;
    let before = first.manifest().description.clone();
    let storage = reshape.storage(&before.storage())?;
    let merged = Merged::of(&inputs)?;
    let plan = Plan::of(&inputs, &merged)?;
    let rows_per_shard = reshape.rows_per_shard.unwrap_or(before.rows_per_shard);
    let description = describe(verb, &inputs, &merged, &plan, &storage, rows_per_shard);
    if plan.rows.len() as u64 + plan.duplicates != merged.rows() {
        // The parts do not hold what their descriptions say: somebody wrote other rows into them.
        let found = plan.rows.len() as u64 + plan.duplicates;
        return Err(Error::RowCount { dir: out.to_path_buf(), expected: merged.rows(), found });
    }
    merged.check_continuable(&description, plan.rows.len() as u64)?;

    progress.begin(plan.rows.len() as u64 + plan.twins.len() as u64, 0);
    plan.check_twins(&inputs, progress)?;
    let mut writer = CacheWriter::open(out, &description, options(first)?)?;
    let resumed_rows = writer.committed_rows();
    check_committed(&writer, &inputs, &plan, out)?;
    progress.add_rows(resumed_rows.min(plan.rows.len() as u64));
    let rest = plan.rows.get(resumed_rows as usize..).unwrap_or_default();
    for block in rest.chunks(block_rows(&inputs)) {
        let read = |planned: &Planned| narrowed(&inputs, planned, &before.storage(), &storage);
        let records = block.par_iter().map(read).collect::<Result<Vec<Record>>>()?;
        writer.extend_stored(&records)?;
        progress.add_rows(records.len() as u64);
    }
    // What is still missing is the command's to add that makes such a cache; until then this one is partial.
    let manifest = if writer.rows() == description.expected_rows { writer.finish()? } else { writer.manifest().clone() };
    Ok(Rewritten {
        rows: manifest.rows(),
        expected_rows: description.expected_rows,
        complete: manifest.complete,
        resumed_rows,
        scored: manifest.scored(),
        shared_rows: plan.shared,
        duplicates: plan.duplicates,
        piece_rows: inputs.iter().map(|cache| cache.manifest().part_rows()).sum(),
        bytes_before: inputs.iter().map(|cache| cache.manifest().bytes()).sum(),
        bytes: manifest.bytes(),
        before: Stored::of(&before),
        after: Stored::of(&description),
        codec_kl: manifest.codec_kl(),
    })
}

fn first_of(inputs: &[Cache]) -> Result<&Cache> {
    let none = || Error::Setting { name: "caches", found: "none".into(), expected: "one cache or more".into() };
    inputs.first().ok_or_else(none)
}

/// The caches read are not the one written.
fn check_folders(inputs: &[Cache], out: &Path) -> Result<()> {
    let same = |dir: &Path| matches!((dir.canonicalize(), out.canonicalize()), (Ok(a), Ok(b)) if a == b);
    match inputs.iter().find(|cache| same(cache.dir())) {
        Some(cache) => Err(Error::Setting {
            name: "out",
            found: cache.dir().display().to_string(),
            expected: "a folder other than those of the caches that are read".into(),
        }),
        None => Ok(()),
    }
}

/// What the new cache is.
fn describe(verb: &str, inputs: &[Cache], merged: &Merged, plan: &Plan, storage: &Storage, rows_per_shard: u32) -> Description {
    let mut description = merged.description(plan.duplicates);
    let had = description.storage();
    let taken = (had.selection, had.values, had.mantissa_bits) != (storage.selection, storage.values, storage.mantissa_bits);
    if taken {
        let mut from: Vec<String> = Vec::new();
        for digest in inputs.iter().map(|cache| cache.manifest().description.digest()) {
            if !from.contains(&digest) {
                from.push(digest);
            }
        }
        let (selection, values, mantissa_bits) = (had.selection, had.values, had.mantissa_bits);
        description.derived.push(Derivation { verb: verb.into(), from, selection, values, mantissa_bits });
    }
    Description { rows_per_shard, ..description.stored_as(storage) }
}

/// The companions of a cache, checked.
fn options(cache: &Cache) -> Result<WriterOptions> {
    let read = |path: &String| cache.companion(path).map(|bytes| Companion { path: path.clone(), bytes });
    let companions = cache.manifest().companions.iter().map(|entry| read(&entry.path)).collect::<Result<Vec<_>>>()?;
    Ok(WriterOptions { companions })
}

/// Rows that are in the new cache already are the first rows of the plan.
fn check_committed(writer: &CacheWriter, inputs: &[Cache], plan: &Plan, out: &Path) -> Result<()> {
    for (row, (key, planned)) in writer.committed_keys()?.into_iter().zip(&plan.rows).enumerate() {
        if key != planned.key {
            return Err(Error::Conflict {
                first: out.to_path_buf(),
                first_row: row as u64,
                second: inputs.get(planned.input as usize).map_or(PathBuf::new(), |cache| cache.dir().to_path_buf()),
                second_row: planned.row,
                seq_id: planned.seq_id,
                key: planned.key.to_string(),
                what: "tokens",
            });
        }
    }
    Ok(())
}

/// Rows of a block: as many as take about [`BLOCK_BYTES`] where rows are largest.
fn block_rows(inputs: &[Cache]) -> usize {
    let shards = inputs.iter().flat_map(|cache| &cache.manifest().shards);
    let largest = shards.map(|shard| shard.bytes / shard.rows.max(1)).max().unwrap_or(0);
    (BLOCK_BYTES / largest.max(1)).clamp(1, BLOCK_ROWS) as usize
}

/// A planned row as the new cache is to store it.
fn narrowed(inputs: &[Cache], planned: &Planned, from: &Storage, to: &Storage) -> Result<Record> {
    let cache = inputs.get(planned.input as usize).ok_or(Error::NoRow { row: planned.row, rows: 0 })?;
    let mut record = cache.row(planned.row)?;
    record.seq_id = planned.seq_id;
    if cache.manifest().format_version == 1 {
        // Version 1 did not measure what storing cost, and 0 would be a claim.
        record.codec = CodecError { kl_sum: f32::NAN, kl_max: f32::NAN };
    }
    if from.selection != to.selection {
        record.targets = record.targets.narrowed_from(&from.selection, &to.selection);
    }
    if from.values != to.values {
        record.targets = record.targets.without_logits();
    }
    Ok(record)
}
