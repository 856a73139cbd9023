//! The folder of a cache before anything is appended: whose it is, whether it matches, and what an interrupted run left.

use super::Companion;
use crate::error::{Difference, Flaw, Place};
use crate::manifest::{CompanionEntry, MANIFEST_FILE, Manifest};
use crate::shard::{file_name, index_of, part_name};
use crate::{Description, Error, Result, durable};
use std::path::Path;

/// The lock file's name. It stays, empty, in the folder.
pub(crate) const LOCK_FILE: &str = "cache.lock";

/// Makes the folder. Without a manifest it may hold only what a run killed at its very start leaves: nobody's files are touched.
pub(super) fn prepare(dir: &Path, companions: &[Companion]) -> Result<()> {
    durable::create_folder(dir)?;
    if dir.join(MANIFEST_FILE).exists() {
        return Ok(());
    }
    let manifest_tmp = format!("{MANIFEST_FILE}{}", durable::TMP_SUFFIX);
    let ours = |name: &str| {
        let companion =
            |c: &Companion| c.path.split('/').next() == Some(name) || format!("{}{}", c.path, durable::TMP_SUFFIX) == name;
        name == LOCK_FILE || name == manifest_tmp || companions.iter().any(companion)
    };
    let foreign = names(dir)?.into_iter().find(|name| !ours(name));
    match foreign {
        // Another process may just have made this cache: then its manifest is there by now, and the lock decides.
        Some(_) if dir.join(MANIFEST_FILE).exists() => Ok(()),
        Some(found) => Err(Error::ForeignFolder { dir: dir.to_path_buf(), found }),
        None => Ok(()),
    }
}

/// Refuses to continue a cache made from something else.
pub(super) fn compare(dir: &Path, manifest: &Manifest, here: &Description, companions: &[CompanionEntry]) -> Result<()> {
    let mut differences = manifest.description.differences(here);
    let cached = &manifest.companions;
    let only_cached = cached.iter().filter(|c| !companions.iter().any(|d| d.path == c.path));
    for entry in companions.iter().chain(only_cached) {
        let shown = |list: &[CompanionEntry]| {
            list.iter().find(|c| c.path == entry.path).map_or("nothing".to_string(), |c| format!("{:?}", c.blake3))
        };
        let (cache, here) = (shown(cached), shown(companions));
        if cache != here {
            differences.push(Difference { field: format!("companions[{}].blake3", entry.path), cache, here });
        }
    }
    if differences.is_empty() { Ok(()) } else { Err(Error::Mismatch { dir: dir.to_path_buf(), differences }) }
}

/// Removes what a crash leaves, and checks that what the manifest names is where a writer would continue. Whatever a crash of this
/// program cannot have left stays: a stranger's files, and shards that only a later manifest names. Those are `Damaged`.
pub(super) fn clean(dir: &Path, manifest: &Manifest) -> Result<()> {
    let names = names(dir)?;
    if let Some(flaw) = stale(manifest, &names) {
        return Err(flaw.damage(&Place::new(dir, MANIFEST_FILE), None, None));
    }
    let mut removed = false;
    for name in names.iter().filter(|name| is_leftover(manifest, name)) {
        durable::remove(&dir.join(name))?;
        removed = true;
    }
    if removed {
        durable::sync_folder(dir)?;
    }
    if manifest.complete {
        return Ok(());
    }
    let misplaced =
        |expected: String, found: String| Err(Flaw::new(expected, found).damage(&Place::new(dir, MANIFEST_FILE), None, None));
    let rows_per_shard = u64::from(manifest.description.rows_per_shard);
    for (index, entry) in manifest.shards.iter().enumerate() {
        if entry.file != file_name(index) || entry.rows != rows_per_shard {
            let expected = format!("{} with {rows_per_shard} rows", file_name(index));
            return misplaced(expected, format!("{} with {}", entry.file, entry.rows));
        }
    }
    let mut rows = 0;
    for (part, entry) in manifest.parts.iter().enumerate() {
        let name = part_name(manifest.shards.len(), part);
        rows += entry.rows;
        if entry.file != name || rows > rows_per_shard {
            return misplaced(format!("{name}, parts of {rows_per_shard} rows at most"), format!("{} and {rows}", entry.file));
        }
    }
    Ok(())
}

/// What is wrong with a manifest that is older than the files beside it. A crash leaves at most the one shard unnamed that comes
/// next; more of them, or pieces of a shard after it, were named by a manifest that is gone.
pub(crate) fn stale(manifest: &Manifest, names: &[String]) -> Option<Flaw> {
    let next = manifest.shards.len();
    let index = |name: &String| index_of(name).or(part_of(name).map(|(index, _)| index));
    let unnamed = |name: &&String| index(name).is_some_and(|i| i >= next && is_within(manifest, i)) && !is_named(manifest, name);
    let mut files: Vec<&String> = names.iter().filter(unnamed).collect();
    if manifest.complete || files.iter().all(|name| index(name) == Some(next)) {
        return None;
    }
    files.sort_by_key(|name| index_of(name).is_none());
    let shown = match files.as_slice() {
        [first, .., last] => format!("{first} to {last} ({} files)", files.len()),
        one => one.iter().map(|name| name.as_str()).collect(),
    };
    let advice =
        "an earlier manifest, which `verify --repair-list FILE` and then `precompute --repair FILE` rebuild from the shards";
    Some(Flaw::new("all shards of the folder to be named", format!("{next} named, and {shown} not: {advice}")))
}

/// Number of the shard and of the piece, where this is exactly the name of a piece.
pub(crate) fn part_of(name: &str) -> Option<(usize, usize)> {
    let (index, part) = name.strip_prefix("part-")?.strip_suffix(".parquet")?.split_once('-')?;
    let (index, part) = (index.parse().ok()?, part.parse().ok()?);
    (part_name(index, part) == name).then_some((index, part))
}

pub(crate) fn is_named(manifest: &Manifest, name: &str) -> bool {
    manifest.shards.iter().chain(&manifest.parts).any(|entry| entry.file == name)
}

/// Whether the whole cache has a shard of this number.
fn is_within(manifest: &Manifest, index: usize) -> bool {
    let rows_per_shard = u64::from(manifest.description.rows_per_shard).max(1);
    (index as u64) < manifest.description.expected_rows.div_ceil(rows_per_shard)
}

/// Whether a crash of this program may have left the file: one under way, a piece, or the next shard, renamed and not yet named.
fn is_leftover(manifest: &Manifest, name: &str) -> bool {
    if is_named(manifest, name) {
        return false;
    }
    if let Some(name) = name.strip_suffix(durable::TMP_SUFFIX) {
        let companion = manifest.companions.iter().any(|companion| companion.path == name);
        return companion || name == MANIFEST_FILE || index_of(name).is_some() || part_of(name).is_some();
    }
    let piece = part_of(name).is_some_and(|(index, _)| is_within(manifest, index));
    let next = index_of(name) == Some(manifest.shards.len()) && is_within(manifest, manifest.shards.len());
    piece || next && !manifest.complete
}

/// Names of the folder's entries; a name that is not UTF-8 is shown with replacement characters.
pub(crate) fn names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in durable::call(|| std::fs::read_dir(dir)).map_err(Error::io(dir))? {
        names.push(entry.map_err(Error::io(dir))?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
