//! A manifest from nothing but the shards: which of them belong to the cache, which rows are good, which have to be computed again.

use super::{ShardRepair, unreadable};
use crate::manifest::{CompanionEntry, Manifest, ShardCodec, ShardEntry};
use crate::shard::{file_name, footer, index_of};
use crate::writer::{WriterOptions, companion_entries, count, digest_of};
use crate::{Description, Error, ManifestState, Result, reader};
use rayon::prelude::*;
use std::path::Path;

/// Rows that are decoded at once.
const BLOCK_ROWS: u64 = 256;

/// The manifest as far as the shards tell it, and the shards that have to be written anew; those have no digest in it yet.
///
/// The last shard file says how far the cache had come: what is missing before it is computed again, what is missing after it is
/// left to the run that continues. Errors: `OtherCache` where all shards belong to another cache, `ForeignShards` where
/// the manifest is missing and no shard states its cache.
pub(super) fn from_shards(
    dir: &Path,
    list: &Path,
    description: &Description,
    options: &WriterOptions,
    state: ManifestState,
) -> Result<(Manifest, Vec<ShardRepair>)> {
    let rows_per_shard = u64::from(description.rows_per_shard);
    let most = description.expected_rows.div_ceil(rows_per_shard);
    let names = crate::writer::names(dir)?;
    let indexes: Vec<usize> = names.iter().filter_map(|name| index_of(name)).filter(|&i| (i as u64) < most).collect();
    check_ours(dir, list, description, &indexes, state)?;
    let companions: Vec<CompanionEntry> = companion_entries(&options.companions)?;
    let mut manifest = Manifest::new(description.clone(), companions);
    let mut repairs = Vec::new();
    let mut last_seq_id = None;
    for index in 0..indexes.iter().max().map_or(0, |last| last + 1) {
        let first_row = index as u64 * rows_per_shard;
        let rows = rows_per_shard.min(description.expected_rows - first_row);
        let codec = Some(ShardCodec::default());
        let file = file_name(index);
        let blank = ShardEntry { file, first_row, rows, tokens: 0, scored: 0, bytes: 0, blake3: String::new(), codec };
        match adopt(dir, &manifest, &blank, &mut last_seq_id)? {
            Some(entry) => manifest.shards.push(entry),
            None => {
                let recompute = unreadable(dir, &manifest, &blank).into_iter().map(|within| first_row + within).collect();
                repairs.push(ShardRepair { index, file: blank.file.clone(), first_row, rows, recompute });
                manifest.shards.push(blank);
            }
        }
    }
    Ok((manifest, repairs))
}

/// The entry of a shard whose footer is this cache's and whose rows are all good; nothing where something is wrong with it.
fn adopt(dir: &Path, manifest: &Manifest, blank: &ShardEntry, last_seq_id: &mut Option<u64>) -> Result<Option<ShardEntry>> {
    let path = dir.join(&blank.file);
    let Ok(bytes) = std::fs::metadata(&path).map(|info| info.len()) else { return Ok(None) };
    let Ok(shard) = reader::open_entry(dir, manifest, &ShardEntry { bytes, ..blank.clone() }) else { return Ok(None) };
    let mut entry = ShardEntry { bytes, rows: 0, ..blank.clone() };
    // Row by row into the sums in the order of writing: they are floating-point numbers.
    let (mut last, mut kl_sum) = (*last_seq_id, 0.0);
    for start in (0..blank.rows).step_by(BLOCK_ROWS as usize) {
        let block = start..blank.rows.min(start + BLOCK_ROWS);
        let records: Vec<_> = block.into_par_iter().map(|row| shard.row_by_all_rules(row)).collect();
        for record in records {
            let Ok(record) = record else { return Ok(None) };
            if last.is_some_and(|last| record.seq_id <= last) {
                return Ok(None);
            }
            last = Some(record.seq_id);
            count(&mut entry, &mut kl_sum, &record);
        }
    }
    entry.blake3 = digest_of(&path)?;
    *last_seq_id = last;
    Ok(Some(entry))
}

/// Refuses to write over the shards of another cache: one of the readable ones has to be of this description. Without a manifest
/// nothing else says whose folder it is, so there has to be one.
fn check_ours(dir: &Path, list: &Path, description: &Description, indexes: &[usize], state: ManifestState) -> Result<()> {
    let expected = description.digest();
    let stated: Vec<String> =
        indexes.iter().filter_map(|&index| footer::stated_description(&dir.join(file_name(index)))).collect();
    match (stated.first(), indexes.first()) {
        _ if stated.contains(&expected) => Ok(()),
        (Some(other), _) => {
            Err(Error::OtherCache { list: list.to_path_buf(), expected, found: other.chars().take(64).collect() })
        }
        (None, Some(&first)) if state == ManifestState::Missing => {
            Err(Error::ForeignShards { dir: dir.to_path_buf(), found: file_name(first), expected })
        }
        _ => Ok(()),
    }
}
