//! What `inspect` says of a whole cache: sizes by column and figures of its distributions. One streaming pass over all rows;
//! sums are taken in row order, so the figures do not depend on the number of threads.

mod figures;
mod position;
mod sums;

pub use figures::{CalibrationBin, Distributions, Drawn, Histogram, Kept, KeptAt, RankBin};
pub use position::{PositionFigures, RowFigures};

use crate::progress::ScanProgress;
use crate::{Cache, Result};
use rayon::prelude::*;
use serde::Serialize;
use sums::Sums;
pub(crate) use sums::{count_in, holding, rank};

/// Bytes an entry takes uncompressed in the plainest layout: a 4-byte id and a 2-byte log-probability, logit or count.
pub const RAW_ENTRY_BYTES: u64 = 6;
/// Scored positions that a row needs to be ranked by its surprise: an answer of a word says little.
pub const MIN_RANKED_POSITIONS: u64 = 16;
/// Rows that are ranked.
pub const RANKED_ROWS: usize = 10;
/// What counts as nearly all of a distribution.
pub const NEARLY_ALL: f64 = 0.99;
/// Rows read at once before their sums are added up.
const BLOCK_ROWS: u64 = 256;

/// Figures of a cache.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Whether all expected rows are there.
    pub complete: bool,
    /// Shards.
    pub shards: u64,
    /// Rows.
    pub rows: u64,
    /// Rows without a scored position: conversations that the teacher could not score.
    pub left_out: u64,
    /// Tokens.
    pub tokens: u64,
    /// Scored positions.
    pub scored: u64,
    /// Kept entries over all scored positions.
    pub entries: u64,
    /// Different drawn ids over all scored positions.
    pub drawn: u64,
    /// Bytes of all shards.
    pub bytes: u64,
    /// `bytes / scored`; absent where nothing is scored, as are the next two.
    pub bytes_per_scored: Option<f64>,
    /// 6 bytes (a 4-byte id, a 2-byte value) for each entry and each draw that a scored position may have.
    pub raw_bytes: u64,
    /// `raw_bytes / bytes`: how many times smaller the cache is.
    pub raw_ratio: Option<f64>,
    /// Bytes by column.
    pub columns: Vec<ColumnBytes>,
    /// Bytes of footers and page indexes: everything that is no column's page.
    pub other_bytes: u64,
    /// Figures of the distributions; absent where nothing is scored.
    pub distributions: Option<Distributions>,
}

/// Size of one column.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ColumnBytes {
    /// The column's name.
    pub name: String,
    /// Bytes in the files.
    pub compressed: u64,
    /// Bytes of the encoded pages before zstd.
    pub uncompressed: u64,
}

impl Summary {
    /// Reads all rows of `cache`. Stops at the first damaged one.
    pub fn of(cache: &Cache, progress: &ScanProgress) -> Result<Self> {
        let manifest = cache.manifest();
        progress.begin(cache.len(), 0);
        let selection = &manifest.description.selection;
        let mut sums = Sums::none(selection.head());
        let mut first = 0;
        while first < cache.len() {
            let end = first.saturating_add(BLOCK_ROWS).min(cache.len());
            let look = |row| {
                let record = cache.row(row)?;
                progress.add_rows(1);
                Ok(Sums::of(row, &record, selection.head()))
            };
            let block: Vec<Sums> = (first..end).into_par_iter().map(look).collect::<Result<_>>()?;
            block.into_iter().for_each(|row| sums.add(row));
            first = end;
        }
        let columns = columns(cache);
        let (bytes, scored) = (manifest.bytes(), manifest.scored());
        let most = u64::from(selection.head()) + u64::from(selection.draws().unwrap_or(0));
        let raw_bytes = scored.saturating_mul(most).saturating_mul(RAW_ENTRY_BYTES);
        let ratio = |a: u64, b: u64| (b > 0 && scored > 0).then(|| a as f64 / b as f64);
        Ok(Self {
            complete: manifest.complete,
            shards: manifest.shards.len() as u64,
            rows: cache.len(),
            left_out: sums.left_out,
            tokens: manifest.tokens(),
            scored,
            entries: sums.entries,
            drawn: sums.drawn,
            bytes,
            bytes_per_scored: ratio(bytes, scored),
            raw_bytes,
            raw_ratio: ratio(raw_bytes, bytes),
            other_bytes: bytes.saturating_sub(columns.iter().map(|c| c.compressed).sum()),
            columns,
            distributions: sums.figures(selection),
        })
    }
}

fn columns(cache: &Cache) -> Vec<ColumnBytes> {
    let mut columns: Vec<ColumnBytes> = Vec::new();
    for size in cache.shards().iter().flat_map(|shard| shard.column_sizes().iter().cloned()) {
        match columns.iter_mut().find(|c| c.name == size.name) {
            Some(c) => {
                c.compressed = c.compressed.saturating_add(size.compressed);
                c.uncompressed = c.uncompressed.saturating_add(size.uncompressed);
            }
            None => columns.push(ColumnBytes { name: size.name, compressed: size.compressed, uncompressed: size.uncompressed }),
        }
    }
    columns
}
