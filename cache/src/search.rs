//! Looking for rows: every row is read and shown to the caller's question, many at a time, until enough have answered.

use crate::progress::ScanProgress;
use crate::{Cache, Record, Result};
use rayon::prelude::*;

/// Rows read at once; at most so many are read beyond the last one that was wanted.
const BLOCK_ROWS: u64 = 64;

/// What `look` says of the first `most` rows of which it says something, in row order. Stops there, or at the first damaged row.
pub fn search<T: Send>(
    cache: &Cache,
    most: usize,
    progress: &ScanProgress,
    look: impl Fn(u64, &Record) -> Option<T> + Sync,
) -> Result<Vec<T>> {
    progress.begin(cache.len(), 0);
    let mut found = Vec::new();
    let mut first = 0;
    while first < cache.len() && found.len() < most {
        let end = first.saturating_add(BLOCK_ROWS).min(cache.len());
        let one = |row| {
            let said = look(row, &cache.row(row)?);
            progress.add_rows(1);
            Ok(said)
        };
        let block: Vec<Option<T>> = (first..end).into_par_iter().map(one).collect::<Result<_>>()?;
        found.extend(block.into_iter().flatten());
        first = end;
    }
    found.truncate(most);
    Ok(found)
}
