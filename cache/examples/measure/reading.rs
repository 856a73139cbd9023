//! Reading a cache under the clock: one row in random order, beside a plain Arrow reader; opening; what a cold read fetches.

use crate::Failure;
use crate::clock::{self, cpu_micros, quantile};
use crate::source::Random;
use bytes::Bytes;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder, RowSelection, RowSelector,
};
use parquet::file::metadata::PageIndexPolicy;
use potstill_cache::{Cache, Manifest};
use std::collections::BTreeSet;
use std::path::Path;

/// Times a cache is opened for the median.
const OPENINGS: usize = 51;
/// Rows read cold, each in a cache opened for it.
const COLD_ROWS: u64 = 24;
/// What a disk gives at least.
const BLOCK: u64 = 4096;

/// CPU microseconds of reads.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spread {
    /// A tenth lies below.
    pub p10: f64,
    /// Half lies below.
    pub p50: f64,
    /// Nine tenths lie below.
    pub p90: f64,
}

impl Spread {
    fn of(values: &[f64]) -> Self {
        Self { p10: quantile(values, 0.1), p50: quantile(values, 0.5), p90: quantile(values, 0.9) }
    }
}

/// Reads `reads` random rows in turn by the cache and by Arrow, after one pass that warms both.
///
/// The Arrow reader gets its file in memory and its metadata loaded: nothing but its decoding is measured. It checks nothing and
/// delivers a record batch, not a record.
pub fn random_rows(dir: &Path, reads: u64) -> Result<(Spread, Spread), Failure> {
    let cache = Cache::open(dir)?;
    let shard = cache.manifest().shards.first().cloned().ok_or("a cache without rows")?;
    let bytes = Bytes::from(std::fs::read(dir.join(&shard.file))?);
    let meta = ArrowReaderMetadata::load(&bytes, offsets_only())?;
    let (mut ours, mut arrow) = (Vec::new(), Vec::new());
    let mut random = Random(1);
    let warm = (0..shard.rows).chain((0..reads).map(|_| random.bits() % shard.rows));
    for (turn, row) in warm.enumerate() {
        let (micros, record) = cpu_micros(|| cache.row(row));
        let (arrow_micros, batch) = cpu_micros(|| arrow_row(&bytes, &meta, row));
        let (record, rows) = (record?, batch?);
        if rows != 1 || record.positions.is_empty() {
            return Err(format!("row {row} is not there").into());
        }
        if turn as u64 >= shard.rows {
            ours.push(micros);
            arrow.push(arrow_micros);
        }
    }
    Ok((Spread::of(&ours), Spread::of(&arrow)))
}

fn offsets_only() -> ArrowReaderOptions {
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    options.with_offset_index_policy(PageIndexPolicy::Required).with_column_index_policy(PageIndexPolicy::Skip)
}

fn arrow_row(bytes: &Bytes, meta: &ArrowReaderMetadata, row: u64) -> Result<usize, Failure> {
    let (mut group, mut within) = (0, row);
    for (index, rows) in meta.metadata().row_groups().iter().map(|g| g.num_rows() as u64).enumerate() {
        if within < rows {
            group = index;
            break;
        }
        within -= rows;
    }
    let selection = RowSelection::from(vec![RowSelector::skip(within as usize), RowSelector::select(1)]);
    let mut reader = ParquetRecordBatchReaderBuilder::new_with_metadata(bytes.clone(), meta.clone())
        .with_row_groups(vec![group])
        .with_row_selection(selection)
        .with_batch_size(1)
        .build()?;
    Ok(reader.next().ok_or("no batch")??.num_rows())
}

/// Median CPU microseconds of opening the cache in `dir`, and of reading its manifest alone.
pub fn opening(dir: &Path) -> Result<(f64, f64), Failure> {
    let (mut whole, mut manifest) = (Vec::new(), Vec::new());
    for _ in 0..OPENINGS {
        let (micros, cache) = cpu_micros(|| Cache::open(dir));
        cache?;
        whole.push(micros);
        let (micros, loaded) = cpu_micros(|| Manifest::load(dir));
        loaded?;
        manifest.push(micros);
    }
    Ok((quantile(&whole, 0.5), quantile(&manifest, 0.5)))
}

/// What a cold read fetched.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cold {
    /// Bytes that the disk delivered for one row, on average.
    pub fetched: f64,
    /// Bytes of the row's own pages.
    pub needed: f64,
    /// Bytes of the 4 KiB blocks that those pages touch, less than which no disk gives.
    pub blocks: f64,
}

/// Forgets the shard's pages, opens the cache, forgets them again and reads a row; several times. The row group's single values are
/// fetched with the row, so they count as needed. Gives a reason where the system does not say or does not forget.
pub fn cold(dir: &Path) -> Result<Result<Cold, String>, Failure> {
    let Some(_) = clock::disk_bytes() else { return Ok(Err("/proc/self/io says nothing".into())) };
    let manifest = Manifest::load(dir)?;
    let shard = manifest.shards.first().ok_or("a cache without rows")?;
    let path = dir.join(&shard.file);
    let delivered = || clock::disk_bytes().unwrap_or_default();
    clock::forget(&path)?;
    let before = delivered();
    let whole = Bytes::from(std::fs::read(&path)?);
    if delivered() - before < shard.bytes / 2 {
        return Ok(Err(format!("the system kept {} in memory when asked to forget it", shard.file)));
    }
    let meta = ArrowReaderMetadata::load(&whole, offsets_only())?;
    let mut random = Random(2);
    let mut sum = Cold::default();
    for _ in 0..COLD_ROWS {
        let row = random.bits() % shard.rows;
        let cache = Cache::open(dir)?;
        clock::forget(&path)?;
        let before = delivered();
        cache.row(row)?;
        sum.fetched += (delivered() - before) as f64 / COLD_ROWS as f64;
        let mut blocks = BTreeSet::new();
        for (offset, length) in pages_of(&meta, row) {
            sum.needed += length as f64 / COLD_ROWS as f64;
            blocks.extend(offset / BLOCK..(offset + length).div_ceil(BLOCK));
        }
        sum.blocks += (blocks.len() as u64 * BLOCK) as f64 / COLD_ROWS as f64;
    }
    Ok(Ok(sum))
}

/// Where the pages lie that hold a row: its own, and those of its row group's single values.
fn pages_of(meta: &ArrowReaderMetadata, row: u64) -> Vec<(u64, u64)> {
    let (mut first, mut pages) = (0, Vec::new());
    for (index, group) in meta.metadata().row_groups().iter().enumerate() {
        let rows = group.num_rows() as u64;
        if row >= first && row < first + rows {
            let indexes = meta.metadata().page_index_for_row_group(index);
            for column in 0..group.num_columns() {
                let locations = indexes.page_locations(column).map(Vec::as_slice).unwrap_or_default();
                let place = locations.partition_point(|page| page.first_row_index as u64 <= row - first);
                if let Some(page) = place.checked_sub(1).and_then(|i| locations.get(i)) {
                    pages.push((page.offset as u64, page.compressed_page_size as u64));
                }
            }
        }
        first += rows;
    }
    pages
}
