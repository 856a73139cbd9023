//! Checking every byte of a cache. It reports all that is wrong, each with its place, and stops at nothing but a cache that is
//! not there.

use crate::error::{Flaw, Place};
use crate::manifest::{MANIFEST_FILE, Manifest, ShardEntry};
use crate::progress::ScanProgress;
use crate::shard::read::Shard;
use crate::writer::{LOCK_FILE, check_digest};
use crate::{Error, Result, RowKey, reader};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::HashSet;
use std::path::Path;

/// Most problems that a report spells out; the rest is counted.
pub const MAX_PROBLEMS: usize = 1000;

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Whether the manifest says that all rows are there.
    pub complete: bool,
    /// Shards looked at.
    pub shards: u64,
    /// Rows the manifest lists, those in pieces of the shard under way included.
    pub rows: u64,
    /// Rows that passed every check.
    pub good_rows: u64,
    /// Bytes of all shards, by the manifest.
    pub bytes: u64,
    /// Rows whose key an earlier row has too: the data holds a conversation more than once. No fault of the cache.
    pub repeated_rows: u64,
    /// Files in the folder that the manifest does not name; readers ignore them.
    pub unlisted: Vec<String>,
    /// Everything that is wrong, at most [`MAX_PROBLEMS`] of it, in file and row order.
    pub problems: Vec<Problem>,
    /// Problems in all.
    pub problem_count: u64,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The file, relative to the cache's folder.
    pub file: String,
    /// Row group in the file (0-based).
    pub row_group: Option<u64>,
    /// Row in the cache (0-based).
    pub row: Option<u64>,
    /// What was expected.
    pub expected: String,
    /// What was found.
    pub found: String,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn is_good(&self) -> bool {
        self.problem_count == 0
    }

    fn add(&mut self, file: &str, error: Error) {
        self.problem_count += 1;
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(Problem::of(file, error));
        }
    }
}

impl Problem {
    fn of(file: &str, error: Error) -> Self {
        match error {
            Error::Damaged { file, row_group, row, expected, found, .. } => Self { file, row_group, row, expected, found },
            other => {
                let (expected, found) = ("a file that can be read".into(), other.to_string());
                Self { file: file.to_string(), row_group: None, row: None, expected, found }
            }
        }
    }
}

/// What one row contributes to the checks over rows.
struct Seen {
    seq_id: u64,
    key: RowKey,
    tokens: u64,
    scored: u64,
}

/// Checks the manifest, the companions, every shard's size, BLAKE3, columns and footer, and of every row: its pages, checksum,
/// key, alignment, order, ids, values and mass; then that row numbers of the data rise and that counts add up. The durable pieces
/// of a shard under way are checked alike.
///
/// Errors only where there is nothing to check: no folder, no manifest, a newer format version. Damage is in the report.
pub fn verify(dir: &Path, progress: &ScanProgress) -> Result<VerifyReport> {
    let mut report = VerifyReport::default();
    let manifest = match Manifest::load(dir) {
        Err(damage @ Error::Damaged { .. }) => {
            report.add(MANIFEST_FILE, damage);
            return Ok(report);
        }
        loaded => loaded?,
    };
    let pieces = |of: fn(&ShardEntry) -> u64| manifest.parts.iter().map(of).sum::<u64>();
    let (rows, bytes) = (manifest.rows() + pieces(|part| part.rows), manifest.bytes() + pieces(|part| part.bytes));
    progress.begin(rows, bytes);
    report.complete = manifest.complete;
    report.shards = manifest.shards.len() as u64;
    (report.rows, report.bytes) = (rows, bytes);
    report.unlisted = unlisted(dir, &manifest)?;
    for companion in &manifest.companions {
        if let Err(error) = reader::read_companion(dir, &manifest, &companion.path) {
            report.add(&companion.path, error);
        }
    }
    let mut keys = HashSet::new();
    let mut last_seq_id = None;
    for entry in manifest.shards.iter().chain(&manifest.parts) {
        let shard = check_file(dir, &manifest, entry, &mut report);
        progress.add_bytes(entry.bytes);
        match shard {
            Some(shard) => check_rows(dir, &shard, entry, &mut keys, &mut last_seq_id, progress, &mut report),
            None => progress.add_rows(entry.rows),
        }
    }
    Ok(report)
}

/// Size, digest, footer and columns of a shard; gives the shard if its rows can be looked at.
fn check_file(dir: &Path, manifest: &Manifest, entry: &ShardEntry, report: &mut VerifyReport) -> Option<Shard> {
    let opened = reader::open_entry(dir, manifest, entry);
    // A file that is missing or of another size has been named once already when it could not be opened.
    let sized = std::fs::metadata(dir.join(&entry.file)).is_ok_and(|info| info.is_file() && info.len() == entry.bytes);
    if sized && let Err(error) = check_digest(dir, entry) {
        report.add(&entry.file, error);
    }
    opened.map_err(|error| report.add(&entry.file, error)).ok()
}

fn check_rows(
    dir: &Path,
    shard: &Shard,
    entry: &ShardEntry,
    keys: &mut HashSet<RowKey>,
    last_seq_id: &mut Option<u64>,
    progress: &ScanProgress,
    report: &mut VerifyReport,
) {
    let look = |row: u64| {
        let record = shard.row_by_all_rules(row);
        progress.add_rows(1);
        record.map(|r| Seen {
            seq_id: r.seq_id,
            key: r.key(),
            tokens: r.input_ids.len() as u64,
            scored: r.positions.len() as u64,
        })
    };
    let rows: Vec<Result<Seen>> = (0..shard.rows()).into_par_iter().map(look).collect();
    let (mut good, mut tokens, mut scored) = (0u64, 0u64, 0u64);
    for (within, row) in rows.into_iter().enumerate() {
        let seen = match row {
            Ok(seen) => seen,
            Err(error) => {
                report.add(&entry.file, error);
                continue;
            }
        };
        (good, tokens, scored) = (good + 1, tokens + seen.tokens, scored + seen.scored);
        if let Some(last) = *last_seq_id
            && seen.seq_id <= last
        {
            let flaw = Flaw::new(format!("a seq_id above {last}"), seen.seq_id);
            report.add(&entry.file, flaw.damage(&Place::new(dir, &entry.file), None, Some(entry.first_row + within as u64)));
        }
        *last_seq_id = Some(seen.seq_id);
        report.repeated_rows += u64::from(!keys.insert(seen.key));
    }
    report.good_rows += good;
    if good == entry.rows && (tokens, scored) != (entry.tokens, entry.scored) {
        let flaw = Flaw::new(format!("{} tokens, {} scored", entry.tokens, entry.scored), format!("{tokens} and {scored}"));
        report.add(&entry.file, flaw.damage(&Place::new(dir, &entry.file), None, None));
    }
}

fn unlisted(dir: &Path, manifest: &Manifest) -> Result<Vec<String>> {
    let listed = |name: &String| {
        name == MANIFEST_FILE
            || name == LOCK_FILE
            || manifest.shards.iter().chain(&manifest.parts).any(|s| &s.file == name)
            || manifest.companions.iter().any(|c| c.path.split('/').next() == Some(name))
    };
    Ok(crate::writer::names(dir)?.into_iter().filter(|name| !listed(name)).collect())
}
