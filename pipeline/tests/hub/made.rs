//! Caches made by hand, as Hugging Face's own library lays them out.

use potstill_pipeline::hub::{Hub, HubSettings, Proxy};
use potstill_pipeline::run::RunContext;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub const OTHER: &str = "76543210fedcba9876543210fedcba9876543210";

/// Settings from these variables alone.
pub fn settings(variables: &[(&str, &str)]) -> HubSettings {
    let find = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value));
    HubSettings::from(find, Proxy::Never)
}

/// A cache in a scratch folder.
pub struct Cache {
    pub folder: TempDir,
}

impl Cache {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Links `file` of a commit to a blob with these bytes.
    pub fn put(&self, repository: &str, commit: &str, file: &str, bytes: &str) {
        let folder = self.path(repository);
        let etag = format!("{}-{}", file.replace(['/', '.'], "-"), bytes.len());
        fs::create_dir_all(folder.join("blobs")).unwrap();
        fs::write(folder.join("blobs").join(&etag), bytes).unwrap();
        let link = folder.join("snapshots").join(commit).join(file);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        let up = "../".repeat(2 + file.matches('/').count());
        std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), link).unwrap();
    }

    pub fn refer(&self, repository: &str, revision: &str, commit: &str) {
        let path = self.path(repository).join("refs").join(revision);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, commit).unwrap();
    }

    /// A model with these files beside what every model has.
    pub fn model(&self, repository: &str, commit: &str, files: &[(&str, &str)]) {
        for (file, bytes) in [("config.json", "{}"), ("tokenizer.json", "{}")].iter().chain(files) {
            self.put(repository, commit, file, bytes);
        }
        self.refer(repository, "main", commit);
    }

    /// The hub that looks here and fetches nothing.
    pub fn hub(&self) -> Hub {
        Hub::new(settings(&[("HF_HUB_CACHE", self.folder.path().to_str().unwrap()), ("HF_HUB_OFFLINE", "1")]))
    }

    pub fn snapshot(&self, repository: &str, commit: &str) -> PathBuf {
        self.path(repository).join("snapshots").join(commit)
    }

    /// The folder of a model; else the sentence, with the cache's folder cut out.
    pub fn found(&self, name: &str) -> Result<PathBuf, String> {
        self.hub().model_folder(Path::new(name), &RunContext::default()).map_err(|e| self.short(&e))
    }

    /// Paths of a dataset's files in its snapshot; else the sentence.
    pub fn files(&self, name: &str) -> Result<Vec<String>, String> {
        let files = self.hub().data_files(&[PathBuf::from(name)], &RunContext::default()).map_err(|e| self.short(&e))?;
        Ok(files.iter().map(|file| in_snapshot(file)).collect())
    }

    pub fn short(&self, error: &potstill_pipeline::Error) -> String {
        let text = error.to_string();
        assert!(text.lines().count() == 1 && text.len() < 700, "{text}");
        text.replace(&format!("{}/", self.folder.path().display()), "CACHE/")
    }
}

/// What follows `snapshots/COMMIT/`.
pub fn in_snapshot(file: &Path) -> String {
    let text = file.to_str().unwrap();
    let (_, rest) = text.split_once("/snapshots/").unwrap_or_else(|| panic!("{text} is in no snapshot"));
    rest.split_once('/').unwrap().1.to_string()
}
