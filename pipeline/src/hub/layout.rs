//! Owns the layout of the Hugging Face cache. Knows nothing of what the files mean, and fetches nothing.
//!
//! ```text
//! CACHE/models--ORG--NAME/refs/main                     one commit's hash
//!                         snapshots/COMMIT/config.json  a link to ../../blobs/ETAG (a file where there are no links)
//!                         blobs/ETAG                    the bytes, or a link to CACHE/blobs/XX/HASH, which repositories share
//!                         trees/COMMIT.json             what the commit holds, if somebody asked
//! ```

use super::name::{self, HubName, Kind};
use std::fs;
use std::path::{Path, PathBuf};

/// Longest `refs/REVISION` read, in bytes.
const MAX_REF_BYTES: u64 = 1024;
/// Most files of a snapshot that are looked at.
const MAX_FILES: usize = 50_000;

/// A repository's folder in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Repository {
    /// `CACHE/models--ORG--NAME`.
    pub folder: PathBuf,
}

impl Repository {
    pub(super) fn of(cache: &Path, name: &HubName) -> Self {
        Self { folder: cache.join(name.folder()) }
    }

    /// The commit that a revision means here; else what is missing or wrong, for a sentence.
    pub(super) fn commit(&self, revision: &str) -> Result<String, String> {
        if name::is_commit(revision) {
            return Ok(revision.to_string());
        }
        if !self.folder.is_dir() {
            return Err(format!("there is no {}", self.folder.display()));
        }
        let path = self.folder.join("refs").join(revision);
        let bytes = match crate::bounded::read(&path, MAX_REF_BYTES) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(format!("there is no {}", path.display())),
            Err(e) => return Err(format!("{}: {e}", path.display())),
        };
        let commit = String::from_utf8_lossy(&bytes).trim().to_string();
        if name::is_commit(&commit) {
            Ok(commit)
        } else {
            let found: String = commit.chars().take(60).collect();
            Err(format!("{}: expected a commit's hash of 40 digits, found {found:?}", path.display()))
        }
    }

    /// `snapshots/COMMIT`.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// `trees/COMMIT.json`.
    pub(super) fn tree(&self, commit: &str) -> PathBuf {
        self.folder.join("trees").join(format!("{commit}.json"))
    }

    /// `blobs`.
    #[cfg(feature = "hub")]
    pub(super) fn blobs(&self) -> PathBuf {
        self.folder.join("blobs")
    }
}

/// The files of a snapshot whose bytes are there, by their paths in the repository, in order.
pub(super) fn files(snapshot: &Path) -> std::io::Result<Vec<String>> {
    let mut found = Vec::new();
    let mut open = vec![(snapshot.to_path_buf(), String::new())];
    while let Some((folder, prefix)) = open.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let Some(path) = entry.file_name().to_str().map(|name| format!("{prefix}{name}")) else { continue };
            // Folders are never links in a snapshot, so no loop is walked.
            if entry.file_type()?.is_dir() {
                open.push((entry.path(), format!("{path}/")));
            } else if entry.path().is_file() {
                found.push(path);
            }
            if found.len() + open.len() > MAX_FILES {
                return Err(std::io::Error::other(format!("more than {MAX_FILES} files")));
            }
        }
    }
    found.sort();
    Ok(found)
}

/// What a snapshot's folder says about itself. `snapshot` is canonical.
fn identity(snapshot: &Path) -> Option<(Kind, String, &Path)> {
    let commit = snapshot.file_name()?.to_str()?;
    let snapshots = snapshot.parent()?;
    let repository = snapshots.parent()?;
    let (kind, id) = name::id_of_folder(repository.file_name()?.to_str()?)?;
    (name::is_commit(commit) && snapshots.file_name()? == "snapshots").then_some((kind, id, repository))
}

/// `ORG/NAME` of a folder that is a snapshot in a Hugging Face cache; `None` for any other folder.
pub fn name_of(folder: &Path) -> Option<String> {
    identity(&folder.canonicalize().ok()?).map(|(_, id, _)| id)
}

/// Whether what `path` is belongs to the model or dataset folder `root`: it lies in it or, where that is a snapshot, is one of its blobs.
/// Both are canonical.
pub(crate) fn holds(root: &Path, path: &Path) -> bool {
    path.starts_with(root) || is_blob_of(root, path)
}

/// Whether `path` is a blob of the repository that `snapshot` is a snapshot of: `blobs/ETAG` beside it, or `blobs/XX/HASH` of the
/// whole cache, where repositories share files. Both are canonical.
fn is_blob_of(snapshot: &Path, path: &Path) -> bool {
    let Some((_, _, repository)) = identity(snapshot) else { return false };
    if path.parent() == Some(&repository.join("blobs")) {
        return true;
    }
    let shared = repository.parent().map(|cache| cache.join("blobs"));
    let hash = path
        .file_name()
        .and_then(|name| name.to_str())
        .filter(|name| name.len() == 64 && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')));
    shared.zip(hash).is_some_and(|(shared, hash)| path == shared.join(&hash[..2]).join(hash))
}
