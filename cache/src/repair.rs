//! Mending a damaged cache: rows that a list names are computed again by the caller, all others are taken from the damaged shard, and
//! the shard is written anew in the old one's place. A manifest that is damaged, lost or an earlier one is rebuilt from the shards.
//!
//! It refuses a list made for another cache, and never takes a row that does not pass every check, whatever the list says. The one
//! idea: a shard's bytes depend on the description and the rows alone, so where the teacher's arithmetic is the same, the mended
//! shard has the very BLAKE3 that the manifest states, and [`Sameness`] says so.

mod list;
mod rebuild;

pub use list::RepairList;

use crate::manifest::{FORMAT_VERSION, Manifest, ShardEntry};
use crate::rules::Form;
use crate::shard::read::Shard;
use crate::writer::{LOCK_FILE, MendedShard, WriterOptions};
use crate::{CacheWriter, Description, Error, ManifestState, Record, Result, ShardDamage, durable, reader};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A repair under way; holds the cache's lock until dropped.
#[derive(Debug)]
pub struct Repair {
    dir: PathBuf,
    writer: CacheWriter,
    shards: Vec<ShardRepair>,
    /// Whether the manifest on disk is good, and saved whenever a shard's entry changes; else it is saved at the end.
    manifest: ManifestState,
    /// Pieces that a rebuilt manifest does not name; removed once it is saved.
    lost_parts: Vec<String>,
    report: RepairReport,
}

/// A shard that is to be written anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardRepair {
    /// Its number.
    pub index: usize,
    /// Its file.
    pub file: String,
    /// Row of the cache that is its first.
    pub first_row: u64,
    /// Rows in it.
    pub rows: u64,
    /// Rows of the cache to be computed again, rising: those that the list names, and any other that cannot be read.
    pub recompute: Vec<u64>,
}

/// How a mended shard compares with what the manifest said of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sameness {
    /// The very bytes that were lost.
    Identical,
    /// Other bytes, which the manifest states now: the teacher's arithmetic differs from that of the first run.
    Different,
    /// There was no manifest to compare with.
    Unknown,
}

/// A shard that was written anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mended {
    /// Its file.
    pub file: String,
    /// Rows computed again.
    pub recomputed_rows: u64,
    /// Rows taken from the damaged file.
    pub kept_rows: u64,
    /// Whether it is what it was.
    pub sameness: Sameness,
}

/// What a repair did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RepairReport {
    /// Shards written anew.
    pub shards: Vec<Mended>,
    /// How the manifest was found; where it was not good, it has been rebuilt.
    pub manifest: ManifestState,
    /// Shards that were looked at for that and found good.
    pub adopted_shards: u64,
    /// Pieces of the shard under way that were given up; their rows are computed again by the run that continues.
    pub dropped_parts: u64,
}

impl Repair {
    /// Takes the lock of the cache in `dir`, reads the list, and finds out which rows are needed.
    ///
    /// Errors: `OtherCache` for a list made for another cache, `Mismatch` for a cache made from something else, `RepairList` for a
    /// list that does not fit, `OlderFormat`, `NoManifest` where there is nothing to rebuild it from, `ForeignShards` where nothing there is known
    /// to be of this cache, `Locked`, I/O.
    pub fn open(dir: &Path, description: &Description, options: &WriterOptions, list: &Path) -> Result<Self> {
        description.validate()?;
        let (path, list) = (list, RepairList::load(list)?);
        list.check_description(path, description)?;
        if !dir.is_dir() {
            return Err(Error::NoFolder { dir: dir.to_path_buf() });
        }
        let lock = durable::lock(dir, &dir.join(LOCK_FILE))?;
        let mut report = RepairReport::default();
        let names = crate::writer::names(dir)?;
        let (loaded, state) = load(dir, &names, description, options)?;
        report.manifest = state;
        let mut lost_parts = Vec::new();
        let (manifest, shards) = match loaded {
            Some(mut manifest) => {
                let shards = wanted(dir, path, &manifest, &list)?;
                report.dropped_parts = drop_parts(dir, path, &mut manifest, &list.parts)?;
                (manifest, shards)
            }
            None => {
                let (manifest, shards) = rebuild::from_shards(dir, path, description, options, state)?;
                // Without any shard a damaged manifest has lost nothing; without a manifest either it is no cache.
                if state == ManifestState::Missing && manifest.shards.is_empty() {
                    return Err(Error::NoManifest { dir: dir.to_path_buf() });
                }
                // Which pieces belong together, only the manifest knew.
                lost_parts = names.into_iter().filter(|name| crate::writer::part_of(name).is_some()).collect();
                report.dropped_parts = lost_parts.len() as u64;
                report.adopted_shards = (manifest.shards.len() - shards.len()) as u64;
                (manifest, shards)
            }
        };
        let writer = CacheWriter::of_damaged(dir, manifest, lock);
        Ok(Self { dir: dir.to_path_buf(), writer, shards, manifest: state, lost_parts, report })
    }

    /// The shards that are to be written anew, in order.
    pub fn shards(&self) -> &[ShardRepair] {
        &self.shards
    }

    /// Begins to write a shard anew.
    pub fn mend(&mut self, shard: &ShardRepair) -> Result<Mending<'_>> {
        let manifest = self.writer.manifest();
        let entry =
            manifest.shards.get(shard.index).cloned().ok_or(Error::NoRow { row: shard.first_row, rows: manifest.rows() })?;
        let old = open_old(&self.dir, manifest, &entry);
        let new = self.writer.start_mending(&entry)?;
        let recompute = shard.recompute.clone();
        Ok(Mending { repair: self, index: shard.index, entry, old, new, recompute, next: 0, given: 0 })
    }

    /// Ends the repair: saves the manifest where it had to be rebuilt. Errors: a shard that was not mended; I/O.
    pub fn finish(mut self) -> Result<RepairReport> {
        let (expected, found) = (self.shards.len() as u64, self.report.shards.len() as u64);
        if expected != found {
            return Err(Error::RowCount { dir: self.dir, expected, found });
        }
        if self.manifest != ManifestState::Good {
            let manifest = self.writer.manifest_mut();
            manifest.complete = manifest.rows() == manifest.description.expected_rows;
            manifest.save(&self.dir)?;
            self.lost_parts.iter().try_for_each(|part| durable::remove(&self.dir.join(part)))?;
        }
        Ok(self.report)
    }
}

/// A shard being written anew.
pub struct Mending<'a> {
    repair: &'a mut Repair,
    index: usize,
    entry: ShardEntry,
    old: Option<Shard>,
    new: MendedShard,
    recompute: Vec<u64>,
    /// Row of the shard that comes next.
    next: u64,
    /// Rows given so far.
    given: usize,
}

impl Mending<'_> {
    /// Adds recomputed rows as the teacher gives them, in the order of [`ShardRepair::recompute`]; rows between them are taken from the
    /// damaged shard. Errors: `BadRecord`; more rows than were asked for.
    pub fn extend(&mut self, records: &[Record]) -> Result<()> {
        for record in records {
            let Some(&row) = self.recompute.get(self.given) else {
                let expected = self.recompute.len() as u64;
                return Err(Error::RowCount { dir: self.repair.dir.clone(), expected, found: expected + 1 });
            };
            self.take_old(row - self.entry.first_row)?;
            self.repair.writer.mend_row(&mut self.new, record, Form::Given)?;
            (self.next, self.given) = (self.next + 1, self.given + 1);
        }
        Ok(())
    }

    /// Closes and checks the new shard, puts it in the old one's place and states it in the manifest.
    pub fn finish(mut self) -> Result<Mended> {
        let (expected, found) = (self.recompute.len() as u64, self.given as u64);
        if expected != found {
            return Err(Error::RowCount { dir: self.repair.dir.clone(), expected, found });
        }
        self.take_old(self.entry.rows)?;
        // The old file must be closed before its name is given away.
        self.old = None;
        let Mending { repair, index, entry: before, new, .. } = self;
        let entry = repair.writer.finish_mending(new)?;
        let sameness = match (repair.manifest, entry == before) {
            (ManifestState::Good, true) => Sameness::Identical,
            (ManifestState::Good, false) => Sameness::Different,
            _ => Sameness::Unknown,
        };
        let mended = Mended { file: entry.file.clone(), recomputed_rows: found, kept_rows: entry.rows - found, sameness };
        if let Some(stated) = repair.writer.manifest_mut().shards.get_mut(index) {
            *stated = entry;
        }
        if sameness == Sameness::Different {
            repair.writer.manifest().save(&repair.dir)?;
        }
        repair.report.shards.push(mended.clone());
        Ok(mended)
    }

    /// Copies good rows up to row `end` of the shard.
    fn take_old(&mut self, end: u64) -> Result<()> {
        while self.next < end {
            let old = self.old.as_ref().ok_or(Error::NoRow { row: self.entry.first_row + self.next, rows: 0 })?;
            let record = old.row_by_all_rules(self.next)?;
            self.repair.writer.mend_row(&mut self.new, &record, Form::Stored)?;
            self.next += 1;
        }
        Ok(())
    }
}

/// The manifest, where it is good and the newest that the folder can have had, and how it was found.
fn load(
    dir: &Path,
    names: &[String],
    description: &Description,
    options: &WriterOptions,
) -> Result<(Option<Manifest>, ManifestState)> {
    let manifest = match Manifest::load(dir) {
        Ok(manifest) => manifest,
        Err(Error::Damaged { .. }) => return Ok((None, ManifestState::Damaged)),
        Err(Error::NoManifest { .. }) => return Ok((None, ManifestState::Missing)),
        Err(other) => return Err(other),
    };
    crate::writer::compare(dir, &manifest, description, options)?;
    if manifest.format_version != FORMAT_VERSION {
        let (found, known) = (manifest.format_version, FORMAT_VERSION);
        return Err(Error::OlderFormat { dir: dir.to_path_buf(), found, known });
    }
    match crate::writer::stale(&manifest, names) {
        Some(_) => Ok((None, ManifestState::Stale)),
        None => Ok((Some(manifest), ManifestState::Good)),
    }
}

/// Opens a damaged shard, whatever its size is now; nothing where nothing of it can be read.
fn open_old(dir: &Path, manifest: &Manifest, entry: &ShardEntry) -> Option<Shard> {
    let bytes = std::fs::metadata(dir.join(&entry.file)).ok()?.len();
    reader::open_entry(dir, manifest, &ShardEntry { bytes, ..entry.clone() }).ok()
}

/// Rows of a shard that do not pass every check: all of them where it cannot be opened.
fn unreadable(dir: &Path, manifest: &Manifest, entry: &ShardEntry) -> BTreeSet<u64> {
    match open_old(dir, manifest, entry) {
        Some(shard) => (0..entry.rows).into_par_iter().filter(|&row| shard.row_by_all_rules(row).is_err()).collect(),
        None => (0..entry.rows).collect(),
    }
}

/// The shards that the list names, each with all rows that are needed.
fn wanted(dir: &Path, path: &Path, manifest: &Manifest, list: &RepairList) -> Result<Vec<ShardRepair>> {
    let misfit =
        |place: String, expected: String, found: String| Error::RepairList { list: path.to_path_buf(), place, expected, found };
    let mut shards: Vec<ShardRepair> = Vec::with_capacity(list.shards.len().min(manifest.shards.len()));
    for damage in &list.shards {
        let index = manifest.shards.iter().position(|entry| entry.file == damage.file);
        let Some((index, entry)) = index.and_then(|index| Some((index, manifest.shards.get(index)?))) else {
            let found = format!("{:?}", damage.file.chars().take(128).collect::<String>());
            return Err(misfit("shards".into(), "a shard of this cache".into(), found));
        };
        if (damage.first_row, damage.rows) != (entry.first_row, entry.rows) {
            let expected = format!("{} rows from {}", entry.rows, entry.first_row);
            return Err(misfit(entry.file.clone(), expected, format!("{} from {}", damage.rows, damage.first_row)));
        }
        // Mended since the list was made: a repair that was interrupted goes on where it was.
        if crate::writer::check_digest(dir, entry).is_ok() {
            continue;
        }
        let end = entry.first_row + entry.rows;
        if let Some(row) = damage.damaged.iter().find(|row| row.row < entry.first_row || row.row >= end) {
            let expected = format!("rows {} to {}", entry.first_row, end - 1);
            return Err(misfit(entry.file.clone(), expected, row.row.to_string()));
        }
        let mut recompute: BTreeSet<u64> = match damage.whole {
            true => (0..entry.rows).collect(),
            false => unreadable(dir, manifest, entry),
        };
        recompute.extend(damage.damaged.iter().map(|row| row.row - entry.first_row));
        let recompute = recompute.into_iter().map(|within| entry.first_row + within).collect();
        let (file, first_row, rows) = (entry.file.clone(), entry.first_row, entry.rows);
        shards.push(ShardRepair { index, file, first_row, rows, recompute });
    }
    shards.sort_by_key(|shard| shard.index);
    if let Some(pair) = shards.windows(2).find(|pair| pair[0].index == pair[1].index) {
        return Err(misfit("shards".into(), "each shard once".into(), format!("{} twice", pair[0].file)));
    }
    Ok(shards)
}

/// Gives up the first damaged piece of the shard under way and those after it. Gives how many.
fn drop_parts(dir: &Path, path: &Path, manifest: &mut Manifest, damaged: &[ShardDamage]) -> Result<u64> {
    let place = |damage: &ShardDamage| manifest.parts.iter().position(|part| part.file == damage.file);
    let mut first = None;
    for damage in damaged {
        let Some(part) = place(damage) else {
            return Err(Error::RepairList {
                list: path.to_path_buf(),
                place: "parts".into(),
                expected: "a piece of the shard under way".into(),
                found: format!("{:?}", damage.file.chars().take(128).collect::<String>()),
            });
        };
        first = Some(first.map_or(part, |first: usize| first.min(part)));
    }
    let Some(first) = first else { return Ok(0) };
    let dropped = manifest.parts.split_off(first);
    manifest.save(dir)?;
    dropped.iter().try_for_each(|part| durable::remove(&dir.join(&part.file)))?;
    Ok(dropped.len() as u64)
}
