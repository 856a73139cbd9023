//! Checking a cache: all of it, a share of it, or only that its files are there. It reports all that is wrong, each with its place,
//! and stops at nothing but a cache that is not there.
//!
//! What is wrong is kept twice: in sentences for people, at most [`MAX_PROBLEMS`] of them, and as the rows to be computed again
//! ([`ShardDamage`]), all of them, for [`RepairList`](crate::RepairList).

mod rows;

use crate::error::{Flaw, Place};
use crate::manifest::{MANIFEST_FILE, Manifest};
use crate::progress::ScanProgress;
use crate::shard::{footer, index_of};
use crate::writer::LOCK_FILE;
use crate::{Error, Result, reader};
use rows::Check;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Most problems that a report spells out; the rest is counted.
pub const MAX_PROBLEMS: usize = 1000;

/// How much is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum VerifyMode {
    /// Manifest, companions, and of every shard size, columns and footer. No row is read.
    Quick,
    /// Every byte and every row.
    #[default]
    Full,
    /// As quick, and of every `of`-th shard the BLAKE3, of every `of`-th row everything, starting with the `number`-th. The samples
    /// 1 to `of` together look at all that the full check looks at.
    Sample {
        /// Which share, from 1.
        number: u32,
        /// Of how many.
        of: u32,
    },
}

impl VerifyMode {
    /// Whether the `index`-th thing (0-based) is looked into.
    pub(crate) fn takes(&self, index: u64) -> bool {
        match self {
            VerifyMode::Quick => false,
            VerifyMode::Full => true,
            VerifyMode::Sample { number, of } => index % u64::from(*of).max(1) == u64::from(number.saturating_sub(1)),
        }
    }

    /// How many of `rows` things from `first` on are looked into.
    pub(crate) fn count(&self, first: u64, rows: u64) -> u64 {
        let before = |end: u64| match self {
            VerifyMode::Quick => 0,
            VerifyMode::Full => end,
            VerifyMode::Sample { number, of } => {
                let (of, number) = (u64::from(*of).max(1), u64::from(*number));
                end / of + u64::from(end % of >= number)
            }
        };
        before(first.saturating_add(rows)) - before(first)
    }

    fn check(&self) -> Result<()> {
        match self {
            VerifyMode::Sample { number, of } if *number == 0 || number > of => {
                Err(Error::Setting { name: "sample", found: format!("{number}/{of}"), expected: "N/T with N from 1 to T".into() })
            }
            _ => Ok(()),
        }
    }
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// How much was looked at.
    pub mode: VerifyMode,
    /// Whether the manifest says that all rows are there.
    pub complete: bool,
    /// Shards looked at.
    pub shards: u64,
    /// Rows the manifest lists, those in pieces of the shard under way included.
    pub rows: u64,
    /// Rows that were to be read.
    pub checked_rows: u64,
    /// Of these, rows that passed every check.
    pub good_rows: u64,
    /// Bytes of all shards, by the manifest.
    pub bytes: u64,
    /// Durable pieces of the shard under way.
    pub parts: u64,
    /// Rows read whose key an earlier row has too: the data holds a conversation more than once. No fault of the cache.
    pub repeated_rows: u64,
    /// Files in the folder that the manifest does not name; readers ignore them. No problem by themselves, unless shards among them
    /// show that the manifest is an earlier one ([`ManifestState::Stale`]).
    pub unlisted: Vec<String>,
    /// Everything that is wrong, at most [`MAX_PROBLEMS`] of it, in file and row order.
    pub problems: Vec<Problem>,
    /// Problems in all.
    pub problem_count: u64,
    /// BLAKE3 (hex) of the cache's description: from the manifest, or from the shards where that is no good.
    pub description_blake3: Option<String>,
    /// How the manifest is.
    pub manifest: ManifestState,
    /// Damaged shards.
    pub damaged_shards: Vec<ShardDamage>,
    /// Damaged pieces of the shard under way.
    pub damaged_parts: Vec<ShardDamage>,
    /// Damaged companion files.
    pub damaged_companions: Vec<String>,
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

/// How a manifest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ManifestState {
    /// As it was written.
    #[default]
    Good,
    /// Not what was written.
    Damaged,
    /// There are shards and no manifest.
    Missing,
    /// An earlier state of the cache: there are shards of later rows that it does not name.
    Stale,
}

/// What has to be written anew of one shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardDamage {
    /// The shard's file.
    pub file: String,
    /// Row of the cache that is its first.
    pub first_row: u64,
    /// Rows it has by the manifest.
    pub rows: u64,
    /// Whether nothing of it can be read.
    pub whole: bool,
    /// Else the rows that have to be computed again; none where only bytes outside rows are damaged.
    pub damaged: Vec<DamagedRow>,
}

/// A row that has to be computed again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DamagedRow {
    /// Row of the cache (0-based).
    pub row: u64,
    /// Number of the conversation in the data, as far as that can be read.
    pub seq_id: Option<u64>,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn is_good(&self) -> bool {
        self.problem_count == 0
    }

    pub(crate) fn add(&mut self, file: &str, error: Error) {
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

/// Checks everything: [`verify_as`] in full.
pub fn verify(dir: &Path, progress: &ScanProgress) -> Result<VerifyReport> {
    verify_as(dir, VerifyMode::Full, progress)
}

/// Checks the manifest, the companions, every shard's size, BLAKE3, columns and footer, and of every row: its pages, checksum,
/// key, alignment, order, ids, values and mass; then that row numbers of the data rise and that counts add up. Of a shard under way
/// the durable pieces are checked alike. `mode` says how much of it.
///
/// Errors only where there is nothing to check: no folder, neither manifest nor shard, a newer format version. Damage is in the
/// report.
pub fn verify_as(dir: &Path, mode: VerifyMode, progress: &ScanProgress) -> Result<VerifyReport> {
    mode.check()?;
    let mut report = VerifyReport { mode, ..VerifyReport::default() };
    // Before the manifest is read: a writer at work names shards after it made them, never before.
    let names = crate::writer::names(dir);
    let manifest = match Manifest::load(dir) {
        Err(damage @ Error::Damaged { .. }) => {
            report.manifest = ManifestState::Damaged;
            return without_manifest(dir, &names?, report, damage);
        }
        Err(error @ Error::NoManifest { .. }) => {
            let names = names?;
            if !names.iter().any(|name| index_of(name).is_some()) {
                return Err(error);
            }
            report.manifest = ManifestState::Missing;
            let missing = Flaw::new("this manifest, for there are shards", "no such file");
            return without_manifest(dir, &names, report, missing.damage(&Place::new(dir, MANIFEST_FILE), None, None));
        }
        loaded => loaded?,
    };
    report.complete = manifest.complete;
    report.shards = manifest.shards.len() as u64;
    report.rows = manifest.rows() + manifest.part_rows();
    report.bytes = manifest.bytes() + manifest.parts.iter().map(|part| part.bytes).sum::<u64>();
    report.parts = manifest.parts.len() as u64;
    report.description_blake3 = Some(manifest.description.digest());
    let names = names?;
    if let Some(flaw) = crate::writer::stale(&manifest, &names) {
        report.manifest = ManifestState::Stale;
        report.add(MANIFEST_FILE, flaw.damage(&Place::new(dir, MANIFEST_FILE), None, None));
    }
    report.unlisted = unlisted(names, &manifest);
    for companion in &manifest.companions {
        if let Err(error) = reader::read_companion(dir, &manifest, &companion.path) {
            report.add(&companion.path, error);
            report.damaged_companions.push(companion.path.clone());
        }
    }
    Ok(Check::new(dir, &manifest, progress, report)?.all())
}

/// The report where nothing is known of the rows: what the shards say of themselves is left to a repair.
fn without_manifest(dir: &Path, names: &[String], mut report: VerifyReport, damage: Error) -> Result<VerifyReport> {
    report.add(MANIFEST_FILE, damage);
    let mut stated: Vec<String> = Vec::new();
    for name in names.iter().filter(|name| index_of(name).is_some()) {
        if let Some(digest) = footer::stated_description(&dir.join(name))
            && !stated.contains(&digest)
        {
            stated.push(digest);
        }
    }
    if let [digest] = stated.as_slice() {
        report.description_blake3 = Some(digest.clone());
    }
    Ok(report)
}

fn unlisted(names: Vec<String>, manifest: &Manifest) -> Vec<String> {
    let listed = |name: &String| {
        name == MANIFEST_FILE
            || name == LOCK_FILE
            || crate::writer::is_named(manifest, name)
            || manifest.companions.iter().any(|c| c.path.split('/').next() == Some(name))
    };
    names.into_iter().filter(|name| !listed(name)).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_sample_counts_what_it_takes_and_all_samples_take_each_once() {
        for of in [1u32, 2, 3, 7, 50] {
            let samples = || (1..=of).map(|number| VerifyMode::Sample { number, of });
            for index in 0..100 {
                assert_eq!(samples().filter(|mode| mode.takes(index)).count(), 1, "{index} of {of}");
            }
            for (first, rows) in [(0, 0), (0, 1), (0, 49), (3, 11), (48, 3), (49, 51)] {
                for mode in samples().chain([VerifyMode::Full, VerifyMode::Quick]) {
                    let taken = (first..first + rows).filter(|&index| mode.takes(index)).count() as u64;
                    assert_eq!(mode.count(first, rows), taken, "{mode:?} from {first}, {rows}");
                }
            }
        }
        assert!(
            VerifyMode::Sample { number: 0, of: 3 }.check().is_err() && VerifyMode::Sample { number: 4, of: 3 }.check().is_err()
        );
    }
}
