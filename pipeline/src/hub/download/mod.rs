//! Fetches what a name means into the Hugging Face cache, in the very layout that Hugging Face's own library writes and reads.
//!
//! Owns the order of things: list, blobs, and only then links, with the sign that all is there (`config.json`, of a dataset the
//! list) where a look into the cache expects it, and the revision's name at the very last. So an interrupted fetch never looks whole.

mod blob;
mod client;
mod list;

use super::layout::Repository;
use super::name::{self, HubName, Kind};
use super::wanted::{self, Weights};
use super::{HubError, HubSettings, listing};
use crate::run::RunContext;
use crate::whole_file;
use client::Client;
use list::List;
use std::fs;
use std::path::Path;

/// Fetches the files that `name` means at `commit`, or at the commit that its revision is now.
pub(super) fn fetch(
    settings: &HubSettings,
    repository: &Repository,
    name: &HubName,
    commit: Option<String>,
    context: &RunContext,
) -> Result<(), HubError> {
    let client = Client::new(settings, name, context);
    context.progress.begin(&format!("asking for {}", name.id), "bytes", 0);
    let revision = commit.as_deref().unwrap_or(&name.revision);
    let list = client.list(revision)?;
    if name::is_commit(revision) && list.commit != revision {
        let (what, expected) = (name.id.clone(), format!("commit {revision}"));
        return Err(HubError::Answer { what, expected, found: list.commit });
    }
    let fetching = Fetching { client: &client, repository, list: &list };
    match name.kind {
        Kind::Model => fetching.model()?,
        Kind::Dataset => fetching.dataset()?,
    }
    if !name::is_commit(&name.revision) {
        write(&repository.folder.join("refs").join(&name.revision), list.commit.as_bytes())?;
    }
    context.progress.end();
    Ok(())
}

/// One fetch.
struct Fetching<'a> {
    client: &'a Client<'a>,
    repository: &'a Repository,
    list: &'a List,
}

impl Fetching<'_> {
    fn model(&self) -> Result<(), HubError> {
        let paths: Vec<String> = self.list.files.keys().cloned().collect();
        let wrong = |expected: String, found: &str| HubError::Answer {
            what: self.client.name.to_string(),
            expected,
            found: found.into(),
        };
        if let Some(lacking) = wanted::NEEDED.iter().find(|needed| !paths.iter().any(|path| path == *needed)) {
            return Err(wrong(format!("a model with {lacking}"), "none in the hub's list"));
        }
        if wanted::weights(&paths) == Weights::None {
            return Err(wrong("safetensors weights".into(), "none in the hub's list, or several without an index"));
        }
        let beside = self.blobs(&wanted::beside(&paths))?;
        let index = beside.iter().find(|(path, _)| path == wanted::INDEX);
        let weights = match (wanted::weights(&paths), index) {
            (Weights::Files(files), _) => files,
            (_, Some((_, blob))) => wanted::indexed(&self.place(wanted::INDEX, blob.as_deref()))?,
            (_, None) => Vec::new(),
        };
        let weights = self.blobs(&weights)?;
        self.point(weights.iter().chain(&beside))
    }

    fn dataset(&self) -> Result<(), HubError> {
        let paths: Vec<String> = self.list.files.keys().cloned().collect();
        let files = self.blobs(&wanted::of_dataset(self.client.name, &paths)?)?;
        if let Some(list) = listing::to_keep(&self.list.files) {
            write(&self.repository.tree(&self.list.commit), &list)?;
        }
        self.point(files.iter())
    }

    /// Fetches those of `paths` that the snapshot lacks: each path with its blob, none where it stands in the snapshot already.
    fn blobs(&self, paths: &[String]) -> Result<Vec<(String, Option<String>)>, HubError> {
        let snapshot = self.repository.snapshot(&self.list.commit);
        let mut entries = Vec::new();
        for path in paths {
            let here = name::is_plain_path(path) && snapshot.join(path).is_file();
            match self.list.files.get(path) {
                _ if here => entries.push((path, None)),
                Some(entry) if name::is_plain_path(path) => entries.push((path, Some(entry))),
                found => {
                    let what = self.client.what(&path.escape_debug().to_string());
                    let found = if found.is_some() { "a path that leads elsewhere" } else { "none in the hub's list" };
                    return Err(HubError::Answer { what, expected: "a file of the repository".into(), found: found.into() });
                }
            }
        }
        let total = entries.iter().filter_map(|(_, entry)| entry.as_ref()?.bytes).fold(0, u64::saturating_add);
        let progress = &self.client.context.progress;
        progress.begin(&format!("fetching {}", self.client.name.id), "bytes", total);
        let mut done = Vec::new();
        for (path, entry) in entries {
            progress.note(path.clone());
            let fetch = |entry| blob::fetch(self.client, self.repository, &self.list.commit, path, entry);
            done.push((path.clone(), entry.map(fetch).transpose()?));
        }
        Ok(done)
    }

    fn place(&self, path: &str, blob: Option<&str>) -> std::path::PathBuf {
        match blob {
            Some(etag) => self.repository.blobs().join(etag),
            None => self.repository.snapshot(&self.list.commit).join(path),
        }
    }

    fn point<'f>(&self, files: impl Iterator<Item = &'f (String, Option<String>)>) -> Result<(), HubError> {
        for (path, blob) in files {
            if let Some(etag) = blob {
                blob::point(self.repository, &self.list.commit, path, etag)?;
            }
        }
        Ok(())
    }
}

/// Writes a small file that appears by rename.
fn write(path: &Path, bytes: &[u8]) -> Result<(), HubError> {
    let io = |source| HubError::Io { path: path.to_path_buf(), source };
    fs::create_dir_all(path.parent().unwrap_or(Path::new("."))).map_err(io)?;
    whole_file::write(path, bytes).map_err(io)
}
