//! The shards of a cache, one after another, and their rows in parallel: what is damaged, and what would have to be computed again.

use super::{DamagedRow, ShardDamage, VerifyMode, VerifyReport};
use crate::error::{Flaw, Place};
use crate::manifest::{Manifest, ShardEntry};
use crate::progress::ScanProgress;
use crate::reader::Opener;
use crate::shard::read::Shard;
use crate::writer::check_digest;
use crate::{Result, RowKey};
use rayon::prelude::*;
use std::collections::{BTreeSet, HashSet};
use std::path::Path;

/// A check under way.
pub(super) struct Check<'a> {
    dir: &'a Path,
    manifest: &'a Manifest,
    progress: &'a ScanProgress,
    opener: Opener,
    mode: VerifyMode,
    report: VerifyReport,
    keys: HashSet<RowKey>,
    last_seq_id: Option<u64>,
}

/// What one row contributes to the checks over rows.
struct Seen {
    seq_id: u64,
    key: RowKey,
    tokens: u64,
    scored: u64,
}

/// What is wrong with one file.
#[derive(Default)]
struct Found {
    wrong: bool,
    rows: BTreeSet<u64>,
}

impl<'a> Check<'a> {
    pub(super) fn new(dir: &'a Path, manifest: &'a Manifest, progress: &'a ScanProgress, report: VerifyReport) -> Result<Self> {
        let (opener, mode) = (Opener::of(dir, manifest)?, report.mode);
        Ok(Self { dir, manifest, progress, opener, mode, report, keys: HashSet::new(), last_seq_id: None })
    }

    /// Looks at every shard and piece.
    pub(super) fn all(mut self) -> VerifyReport {
        let entries = || self.manifest.shards.iter().chain(&self.manifest.parts);
        let rows = entries().map(|entry| self.mode.count(entry.first_row, entry.rows)).sum();
        let bytes = entries().map(|entry| entry.bytes).sum();
        self.progress.begin(rows, bytes);
        self.report.checked_rows = rows;
        let manifest = self.manifest;
        for (index, entry) in (0..).zip(&manifest.shards) {
            let damage = self.file(index, entry);
            self.report.damaged_shards.extend(damage);
        }
        for (index, entry) in (manifest.shards.len() as u64..).zip(&manifest.parts) {
            let damage = self.file(index, entry);
            self.report.damaged_parts.extend(damage);
        }
        self.report
    }

    /// Columns, footer, size and digest of a file, then its rows. A file that cannot be opened is named once.
    fn file(&mut self, index: u64, entry: &ShardEntry) -> Option<ShardDamage> {
        let shard = match self.opener.open(entry) {
            Ok(shard) => shard,
            Err(error) => {
                self.report.add(&entry.file, error);
                self.progress.add_bytes(entry.bytes);
                self.progress.add_rows(self.mode.count(entry.first_row, entry.rows));
                let (file, first_row, rows) = (entry.file.clone(), entry.first_row, entry.rows);
                return Some(ShardDamage { file, first_row, rows, whole: true, damaged: Vec::new() });
            }
        };
        let mut found = Found::default();
        if self.mode.takes(index)
            && let Err(error) = check_digest(self.dir, entry)
        {
            self.report.add(&entry.file, error);
            found.wrong = true;
        }
        self.progress.add_bytes(entry.bytes);
        self.rows(&shard, entry, &mut found);
        if !found.wrong {
            return None;
        }
        let damaged = |&within: &u64| DamagedRow { row: entry.first_row + within, seq_id: shard.stated_seq_id(within) };
        Some(ShardDamage {
            file: entry.file.clone(),
            first_row: entry.first_row,
            rows: entry.rows,
            whole: false,
            damaged: found.rows.iter().map(damaged).collect(),
        })
    }

    fn rows(&mut self, shard: &Shard, entry: &ShardEntry, found: &mut Found) {
        let look = |within: u64| {
            let record = shard.row_by_all_rules(within);
            self.progress.add_rows(1);
            let seen = record.map(|r| Seen {
                seq_id: r.seq_id,
                key: r.key(),
                tokens: r.input_ids.len() as u64,
                scored: r.positions.len() as u64,
            });
            (within, seen)
        };
        let taken: Vec<u64> = (0..shard.rows()).filter(|within| self.mode.takes(entry.first_row + within)).collect();
        let seen: Vec<(u64, Result<Seen>)> = taken.into_par_iter().map(look).collect();
        let place = Place::new(self.dir, &entry.file);
        let (mut good, mut tokens, mut scored) = (0u64, 0u64, 0u64);
        for (within, row) in seen {
            let seen = match row {
                Ok(seen) => seen,
                Err(error) => {
                    self.report.add(&entry.file, error);
                    found.wrong = true;
                    found.rows.insert(within);
                    continue;
                }
            };
            (good, tokens, scored) = (good + 1, tokens + seen.tokens, scored + seen.scored);
            if let Some(last) = self.last_seq_id
                && seen.seq_id <= last
            {
                let flaw = Flaw::new(format!("a seq_id above {last}"), seen.seq_id);
                self.report.add(&entry.file, flaw.damage(&place, None, Some(entry.first_row + within)));
                found.wrong = true;
                found.rows.insert(within);
            }
            self.last_seq_id = Some(seen.seq_id);
            self.report.repeated_rows += u64::from(!self.keys.insert(seen.key));
        }
        self.report.good_rows += good;
        if good == entry.rows && (tokens, scored) != (entry.tokens, entry.scored) {
            let flaw = Flaw::new(format!("{} tokens, {} scored", entry.tokens, entry.scored), format!("{tokens} and {scored}"));
            self.report.add(&entry.file, flaw.damage(&place, None, None));
            found.wrong = true;
        }
    }
}
