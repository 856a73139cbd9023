//! Owns the hub's answer about a commit: its hash and its files. Refuses lists beyond the limits below.

use super::super::listing::{Entry, MAX_LIST_BYTES};
use super::super::name;
use serde::Deserialize;
use std::collections::BTreeMap;

/// Most files of a repository.
const MAX_FILES: usize = 50_000;

/// A commit and its files.
pub(super) struct List {
    pub(super) commit: String,
    pub(super) files: BTreeMap<String, Entry>,
}

/// Reads the hub's answer about a commit; else (expected, found).
pub(super) fn parsed(bytes: &[u8]) -> Result<List, (String, String)> {
    #[derive(Deserialize)]
    struct Answer {
        sha: String,
        siblings: Vec<Sibling>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Sibling {
        rfilename: String,
        size: Option<u64>,
        blob_id: Option<String>,
        lfs: Option<Large>,
    }
    #[derive(Deserialize)]
    struct Large {
        sha256: String,
        size: u64,
    }
    if bytes.len() as u64 > MAX_LIST_BYTES {
        return Err((format!("a list of at most {MAX_LIST_BYTES} bytes"), "more".into()));
    }
    let answer: Answer = serde_json::from_slice(bytes).map_err(|e| ("a commit and its files".to_string(), e.to_string()))?;
    if !name::is_commit(&answer.sha) {
        let found: String = answer.sha.chars().take(60).collect();
        return Err(("a commit's hash of 40 digits".into(), format!("{found:?}")));
    }
    if answer.siblings.len() > MAX_FILES {
        return Err((format!("at most {MAX_FILES} files"), answer.siblings.len().to_string()));
    }
    let entry = |sibling: Sibling| {
        let (sha256, size) = sibling.lfs.map(|large| (large.sha256, large.size)).unzip();
        (sibling.rfilename, Entry { bytes: size.or(sibling.size), git: sibling.blob_id, sha256 })
    };
    Ok(List { commit: answer.sha, files: answer.siblings.into_iter().map(entry).collect() })
}
