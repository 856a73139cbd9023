//! The list of what has to be computed again: a JSON file from `verify`, read by a repair. Its contents are believed no further than
//! that they fit the cache.

use crate::{Description, Error, ManifestState, Result, ShardDamage, VerifyReport, durable};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Version of the list's own format.
const VERSION: u32 = 1;
/// Largest list that is read: some 15 million rows.
const MAX_BYTES: u64 = 1 << 30;

/// What has to be computed again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepairList {
    /// Version of this format.
    pub repair_list_version: u32,
    /// BLAKE3 (hex) of the description of the cache it was made for; absent where neither manifest nor shards could say.
    pub description_blake3: Option<String>,
    /// How the manifest is. Where it is no good, all shards are looked at again when it is rebuilt.
    pub manifest: ManifestState,
    /// Damaged shards.
    pub shards: Vec<ShardDamage>,
    /// Damaged pieces of the shard under way.
    pub parts: Vec<ShardDamage>,
    /// Damaged companion files.
    pub companions: Vec<String>,
}

impl RepairList {
    /// What a check found.
    pub fn of(report: &VerifyReport) -> Self {
        Self {
            repair_list_version: VERSION,
            description_blake3: report.description_blake3.clone(),
            manifest: report.manifest,
            shards: report.damaged_shards.clone(),
            parts: report.damaged_parts.clone(),
            companions: report.damaged_companions.clone(),
        }
    }

    /// Rows that are named one by one, and those of shards that are lost whole.
    pub fn rows(&self) -> u64 {
        let rows = |shard: &ShardDamage| if shard.whole { shard.rows } else { shard.damaged.len() as u64 };
        self.shards.iter().chain(&self.parts).map(rows).fold(0, u64::saturating_add)
    }

    /// Writes the list to a file, durably: the file holds what it held before or all of the list.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self).map_err(|e| Error::io(path)(e.into()))?;
        text.push('\n');
        durable::replace(path, text.as_bytes())
    }

    /// Reads a list. Errors: I/O; `RepairList` where it is none, or one of a later version.
    pub fn load(path: &Path) -> Result<Self> {
        let refused = |place: &str, expected: String, found: String| Error::RepairList {
            list: path.to_path_buf(),
            place: place.into(),
            expected,
            found,
        };
        let info = std::fs::metadata(path).map_err(Error::io(path))?;
        if !info.is_file() || info.len() > MAX_BYTES {
            let found = format!("{} bytes, plain file: {}", info.len(), info.is_file());
            return Err(refused("file", format!("a plain file of at most {MAX_BYTES} bytes"), found));
        }
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        let list: RepairList = serde_json::from_slice(&bytes)
            .map_err(|e| refused("contents", "a list written by verify --repair-list".into(), e.to_string()))?;
        if list.repair_list_version != VERSION {
            return Err(refused("repair_list_version", VERSION.to_string(), list.repair_list_version.to_string()));
        }
        Ok(list)
    }

    /// Refuses a list that was made for a cache of another description.
    pub(super) fn check_description(&self, path: &Path, here: &Description) -> Result<()> {
        let expected = here.digest();
        match &self.description_blake3 {
            Some(found) if *found != expected => {
                Err(Error::OtherCache { list: path.to_path_buf(), expected, found: found.chars().take(64).collect() })
            }
            _ => Ok(()),
        }
    }
}
