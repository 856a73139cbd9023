//! The folder of a cache before anything is appended: whose it is, whether it matches, and what an interrupted run left.

use super::Companion;
use crate::error::{Difference, Flaw, Place};
use crate::manifest::{CompanionEntry, MANIFEST_FILE, Manifest};
use crate::shard::{file_name, part_name};
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

/// Removes what the manifest does not name, and checks that what it names is where a writer would continue.
pub(super) fn clean(dir: &Path, manifest: &Manifest) -> Result<()> {
    let mut removed = false;
    for name in names(dir)? {
        let ours = (name.starts_with("shard-") || name.starts_with("part-")) && name.ends_with(".parquet");
        let unnamed = ours && !manifest.shards.iter().chain(&manifest.parts).any(|entry| entry.file == name);
        if unnamed || name.ends_with(durable::TMP_SUFFIX) {
            durable::remove(&dir.join(&name))?;
            removed = true;
        }
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

/// Names of the folder's entries; a name that is not UTF-8 is shown with replacement characters.
pub(crate) fn names(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in durable::call(|| std::fs::read_dir(dir)).map_err(Error::io(dir))? {
        names.push(entry.map_err(Error::io(dir))?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
