//! Owns what a commit holds: its files with sizes and hashes, as `trees/COMMIT.json` of the cache says it. Refuses lists beyond the
//! limits below; what is no such list counts as none, as for everybody else who reads that file.
//!
//! The one idea: of a dataset only such a list can say that a file is missing, so it is kept when chats are fetched.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// Longest list read, in bytes.
pub(super) const MAX_LIST_BYTES: u64 = 64 << 20;
/// The version of the file's form.
const FORMAT_VERSION: u32 = 1;

/// One file of a commit, as far as it is known.
#[cfg(feature = "hub")]
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Entry {
    /// Bytes.
    pub bytes: Option<u64>,
    /// Git's hash of it (of the pointer, where the file is a large one).
    pub git: Option<String>,
    /// SHA-256 of a large file, hexadecimal.
    pub sha256: Option<String>,
}

/// The file as it is kept.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    format_version: u32,
    files: BTreeMap<String, KeptFile>,
}

/// One of its entries; others are passed over.
#[derive(Debug, Serialize, Deserialize)]
struct KeptFile {
    size: u64,
    blob_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lfs_sha256: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lfs_size: Option<u64>,
}

/// The paths of the list in `file`, in order, if there is one that can be read.
pub(super) fn kept(file: &Path) -> Option<Vec<String>> {
    let kept: Kept = serde_json::from_slice(&crate::bounded::read(file, MAX_LIST_BYTES).ok()?).ok()?;
    (kept.format_version == FORMAT_VERSION).then(|| kept.files.into_keys().collect())
}

/// The bytes of the file that keeps `files`; `None` where too little is known of them for that.
#[cfg(feature = "hub")]
pub(super) fn to_keep(files: &BTreeMap<String, Entry>) -> Option<Vec<u8>> {
    let file = |entry: &Entry| {
        let (size, lfs_sha256) = (entry.bytes?, entry.sha256.clone());
        Some(KeptFile { size, blob_id: entry.git.clone()?, lfs_size: lfs_sha256.as_ref().map(|_| size), lfs_sha256 })
    };
    let files = files.iter().map(|(path, entry)| Some((path.clone(), file(entry)?))).collect::<Option<_>>()?;
    serde_json::to_vec_pretty(&Kept { format_version: FORMAT_VERSION, files }).ok()
}
