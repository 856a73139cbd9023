//! Companion files: small files that make a cache readable by itself, such as the tokenizer its ids belong to.

use crate::manifest::{CompanionEntry, check_companion_path};
use crate::{Error, Result, durable};
use std::path::Path;

/// A file to be kept in the cache's folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Companion {
    /// Path relative to the cache's folder, such as `tokenizer/tokenizer.json`: up to 4 parts of `[A-Za-z0-9._-]`.
    pub path: String,
    /// Its contents.
    pub bytes: Vec<u8>,
}

/// What the manifest says of these files. Refuses unsafe and repeated paths.
pub(crate) fn entries(companions: &[Companion]) -> Result<Vec<CompanionEntry>> {
    let mut entries: Vec<CompanionEntry> = Vec::with_capacity(companions.len());
    for companion in companions {
        let path = companion.path.clone();
        if let Err(flaw) = check_companion_path(&path) {
            return Err(Error::Setting { name: "companions", found: flaw.found, expected: flaw.expected });
        }
        if entries.iter().any(|entry| entry.path == path) {
            return Err(Error::Setting {
                name: "companions",
                found: format!("{path:?} twice"),
                expected: "each path once".into(),
            });
        }
        let blake3 = blake3::hash(&companion.bytes).to_hex().to_string();
        entries.push(CompanionEntry { path, bytes: companion.bytes.len() as u64, blake3 });
    }
    Ok(entries)
}

/// Writes those files that are not there as they should be, durably.
pub(super) fn store(dir: &Path, companions: &[Companion]) -> Result<()> {
    for companion in companions {
        let path = dir.join(&companion.path);
        durable::remove(&durable::tmp_of(&path))?;
        if std::fs::read(&path).is_ok_and(|bytes| bytes == companion.bytes) {
            continue;
        }
        if let Some(parent) = path.parent() {
            durable::create_folder(parent)?;
        }
        durable::replace(&path, &companion.bytes)?;
    }
    Ok(())
}
