//! Models and chats by name: `Qwen/Qwen1.5-14B`, `HuggingFaceH4/ultrachat_200k:train_sft`, as folders and files of the Hugging Face
//! cache. A path that exists always wins; what can only be a path stays one.
//!
//! The one idea: what the cache holds whole is used as it is, without a word to any network, so a run tomorrow reads what a run
//! today read. Only what is missing is fetched, and only where the cargo feature `hub` is on.

#[cfg(feature = "hub")]
mod download;
mod error;
mod layout;
mod listing;
mod name;
mod settings;
mod split;
mod wanted;

pub use error::HubError;
pub(crate) use layout::holds;
pub use layout::name_of;
pub use name::{DEFAULT_REVISION, HubName, Kind};
pub use settings::{DEFAULT_ENDPOINT, DEFAULT_PAUSE, DEFAULT_TIMEOUT_SECONDS, HubSettings, Network, Proxy};

use crate::run::RunContext;
use layout::Repository;
use std::path::{Path, PathBuf};

/// The cache, and the hub behind it.
#[derive(Debug, Clone)]
pub struct Hub {
    settings: HubSettings,
}

/// What the cache holds of a name.
enum Cached {
    /// All of it: paths in the snapshot, of a model none.
    Whole(PathBuf, Vec<String>),
    /// A part, and what is missing.
    Part { commit: String, snapshot: PathBuf, lacking: Vec<String> },
    /// Nothing, and what was looked for.
    Nothing { commit: Option<String>, looked: String },
}

impl Hub {
    /// The cache and hub that `settings` name.
    pub fn new(settings: HubSettings) -> Self {
        Self { settings }
    }

    /// The cache and hub that the environment names.
    pub fn of_process() -> Self {
        Self::new(HubSettings::of_process())
    }

    /// The folder that `given` means: itself where it exists or can only be a path, else the snapshot of the model of this name.
    ///
    /// Counts fetched bytes in a phase of `context.progress`. Errors: a name that is neither here nor can be fetched; a stop.
    pub fn model_folder(&self, given: &Path, context: &RunContext) -> crate::Result<PathBuf> {
        match named(Kind::Model, given) {
            Some(name) => Ok(self.found(&name, context)?.0),
            None => Ok(given.to_path_buf()),
        }
    }

    /// The paths that `given` mean: each itself where it exists or can only be a path, else the files of the dataset of this name,
    /// in the order of their paths. Progress and errors as in [`model_folder`](Self::model_folder).
    pub fn data_files(&self, given: &[PathBuf], context: &RunContext) -> crate::Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for one in given {
            match named(Kind::Dataset, one) {
                Some(name) => {
                    let (snapshot, files) = self.found(&name, context)?;
                    for file in files {
                        paths.push(contained(&snapshot, &file)?);
                    }
                }
                None => paths.push(one.clone()),
            }
        }
        Ok(paths)
    }

    fn found(&self, name: &HubName, context: &RunContext) -> Result<(PathBuf, Vec<String>), HubError> {
        let (commit, missing) = match self.cached(name)? {
            Cached::Whole(snapshot, files) => return Ok((snapshot, files)),
            Cached::Part { commit, snapshot, lacking } => {
                let (name, lacking) = (name.to_string(), some(&lacking));
                (Some(commit), HubError::Incomplete { name, folder: snapshot, lacking, network: self.settings.network })
            }
            Cached::Nothing { commit, looked } => {
                let (name, kind) = (name.to_string(), name.kind.singular());
                (commit, HubError::NotFound { name, kind, looked, network: self.settings.network })
            }
        };
        self.fetched(name, commit, missing, context)
    }

    /// Fetches what is missing; without that power, says what is.
    #[cfg(feature = "hub")]
    fn fetched(
        &self,
        name: &HubName,
        commit: Option<String>,
        missing: HubError,
        context: &RunContext,
    ) -> Result<(PathBuf, Vec<String>), HubError> {
        let Some(cache) = self.settings.cache.as_deref().filter(|_| self.settings.network == Network::Allowed) else {
            return Err(missing);
        };
        download::fetch(&self.settings, &Repository::of(cache, name), name, commit, context)?;
        match self.cached(name)? {
            Cached::Whole(snapshot, files) => Ok((snapshot, files)),
            Cached::Part { snapshot, lacking, .. } => Err(HubError::Incomplete {
                name: name.to_string(),
                folder: snapshot,
                lacking: format!("{}, which the hub does not have", some(&lacking)),
                network: self.settings.network,
            }),
            Cached::Nothing { .. } => Err(missing),
        }
    }

    #[cfg(not(feature = "hub"))]
    fn fetched(
        &self,
        _: &HubName,
        _: Option<String>,
        missing: HubError,
        _: &RunContext,
    ) -> Result<(PathBuf, Vec<String>), HubError> {
        Err(missing)
    }

    fn cached(&self, name: &HubName) -> Result<Cached, HubError> {
        let Some(cache) = self.settings.cache.as_deref() else {
            return Ok(Cached::Nothing {
                commit: None,
                looked: "none of HF_HUB_CACHE, HF_HOME and HOME says where it is".into(),
            });
        };
        let repository = Repository::of(cache, name);
        let commit = match repository.commit(&name.revision) {
            Ok(commit) => commit,
            Err(looked) => return Ok(Cached::Nothing { commit: None, looked }),
        };
        let snapshot = repository.snapshot(&commit);
        if !snapshot.is_dir() {
            let looked = format!("there is no {}", snapshot.display());
            return Ok(Cached::Nothing { commit: Some(commit), looked });
        }
        let here = layout::files(&snapshot).map_err(|source| HubError::Io { path: snapshot.clone(), source })?;
        let (files, lacking) = match name.kind {
            Kind::Model => (Vec::new(), wanted::lacking_of_model(&snapshot, &here)?),
            Kind::Dataset => files_of_dataset(name, &here, listing::kept(&repository.tree(&commit)))?,
        };
        Ok(if lacking.is_empty() { Cached::Whole(snapshot, files) } else { Cached::Part { commit, snapshot, lacking } })
    }
}

/// The files of a dataset's split, and what a snapshot in which there are `here` lacks of them. What a list of the commit does not
/// say, and the numbers in the names neither, nobody can know: then it counts as whole.
fn files_of_dataset(name: &HubName, here: &[String], list: Option<Vec<String>>) -> Result<(Vec<String>, Vec<String>), HubError> {
    if let Some(list) = list {
        let files = wanted::of_dataset(name, &list)?;
        let lacking = files.iter().filter(|file| here.binary_search(file).is_err()).cloned().collect();
        return Ok((files, lacking));
    }
    match wanted::of_dataset(name, here) {
        Ok(files) => {
            let lacking = split::gaps(&files);
            Ok((files, lacking))
        }
        // Another split may be all that was fetched so far.
        Err(HubError::NoSplit { found, .. }) => {
            let asked = name.split.as_ref().map_or("chats".into(), |split| format!("files of the split {split}"));
            Ok((Vec::new(), vec![format!("{asked} (it holds {found})")]))
        }
        Err(error) => Err(error),
    }
}

/// The name that `given` is, if it is no path.
fn named(kind: Kind, given: &Path) -> Option<HubName> {
    let text = given.to_str().filter(|_| given.symlink_metadata().is_err())?;
    // A mistyped file of chats is looked for nowhere else.
    let file = kind == Kind::Dataset && crate::data::holds_chats(text);
    HubName::parse(kind, text).filter(|_| !file)
}

/// `snapshot/file`, which must be in the snapshot or a blob of its repository.
fn contained(snapshot: &Path, file: &str) -> Result<PathBuf, HubError> {
    let path = snapshot.join(file);
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| HubError::Io { path, source }
    };
    let root = snapshot.canonicalize().map_err(io(snapshot))?;
    let leads_to = path.canonicalize().map_err(io(&path))?;
    if !name::is_plain_path(file) || !holds(&root, &leads_to) {
        return Err(HubError::Outside { path, leads_to });
    }
    Ok(path)
}

/// The first of what is missing, and how much more.
fn some(lacking: &[String]) -> String {
    match lacking {
        [] => String::new(),
        [one] => one.clone(),
        [one, more @ ..] => format!("{one} and {} more", more.len()),
    }
}
