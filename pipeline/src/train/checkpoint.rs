//! The run folder and its checkpoints.
//!
//! ```text
//! out/  adapter/                      the finished adapter (PEFT)
//!       checkpoint-N/                 adapter_config.json, adapter_model.safetensors, …   (PEFT, usable alone)
//!                     optimizer.safetensors, trainer_state.json, digests.json (BLAKE3 of every other file)
//!       metrics.jsonl  config.resolved.toml  .lock
//! ```
//! A checkpoint is built under another name, made durable, renamed, and only then are older ones removed; two are always kept. It
//! is read only when every file has the digest that was written.

use super::identity::{self, Identity};
use super::optimizer::AdamW;
use super::{Resume, TrainConfig, TrainError, save_adapter};
use crate::student::Student;
use crate::{Error, Result, adapter};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

const STATE_FILE: &str = "trainer_state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const DIGESTS_FILE: &str = "digests.json";
const SETTINGS_FILE: &str = "config.resolved.toml";
const LOCK_FILE: &str = ".lock";
const PREFIX: &str = "checkpoint-";
/// Fewest checkpoints kept, whatever the settings say.
const FEWEST_KEPT: usize = 2;
/// Largest JSON file of a checkpoint read, in bytes.
const MAX_JSON_BYTES: u64 = 1 << 20;

/// How far a run is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Progress {
    /// Steps done.
    pub step: u64,
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Loss of step 1.
    pub first_loss: f64,
    /// Loss of the last step done.
    pub last_loss: f64,
}

impl Progress {
    /// Counts a step.
    pub(super) fn advance(&mut self, loss: f64, tokens: u64) {
        if self.step == 0 {
            self.first_loss = loss;
        }
        self.step += 1;
        self.last_loss = loss;
        self.tokens += tokens;
    }
}

/// What `trainer_state.json` holds.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    progress: Progress,
    identity: Identity,
}

/// A run folder, locked until dropped.
#[derive(Debug)]
pub(super) struct RunFolder {
    out: PathBuf,
    _lock: File,
}

impl RunFolder {
    /// Makes or opens the run's folder and locks it.
    pub(super) fn open(config: &TrainConfig) -> Result<Self> {
        let out = config.out.clone();
        let io = |path: &Path| {
            let path = path.to_path_buf();
            move |source| TrainError::Io { path, source }
        };
        fs::create_dir_all(&out).map_err(io(&out))?;
        let path = out.join(LOCK_FILE);
        let lock = File::options().create(true).truncate(false).write(true).open(&path).map_err(io(&path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { out, _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(TrainError::Locked { out }.into()),
            Err(TryLockError::Error(source)) => Err(TrainError::Io { path, source }.into()),
        }
    }

    /// The folder.
    pub(super) fn path(&self) -> &Path {
        &self.out
    }

    /// Writes the settings as they were resolved.
    pub(super) fn write_settings(&self, config: &TrainConfig) -> Result<()> {
        let path = self.out.join(SETTINGS_FILE);
        let text = toml::to_string(&BTreeMap::from([("train", config)]))
            .map_err(|e| TrainError::Io { path: path.clone(), source: std::io::Error::other(e) })?;
        fs::write(&path, text).map_err(|source| TrainError::Io { path, source })?;
        Ok(())
    }

    /// Puts student and optimiser where the run stopped; at the start where there is nothing to resume.
    pub(super) fn resume(
        &self,
        config: &TrainConfig,
        identity: &Identity,
        student: &mut Student,
        adamw: &mut AdamW,
    ) -> Result<Progress> {
        let newest = self.checkpoints()?.pop().map(|(_, path)| path);
        let path = match (&config.resume, newest) {
            (Resume::Path(path), _) => path.clone(),
            (Resume::Latest, Some(path)) => path,
            (Resume::Latest, None) => return Ok(Progress::default()),
            (Resume::Never, None) if !self.out.join(super::ADAPTER_FOLDER).exists() => return Ok(Progress::default()),
            (Resume::Never, newest) => {
                let found = newest.unwrap_or_else(|| self.out.join(super::ADAPTER_FOLDER));
                let found = found.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
                return Err(TrainError::Occupied { out: self.out.clone(), found }.into());
            }
        };
        check_digests(&path)?;
        let state: State = read_json(&path.join(STATE_FILE))?;
        if let Some(differences) = identity::differences(identity, &state.identity) {
            return Err(TrainError::OtherRun { checkpoint: path, differences }.into());
        }
        let (_, mut tensors) = adapter::load(&path)?;
        let parameters = student.parameters().into_iter().filter_map(|(name, _)| tensors.remove(&name).map(|t| (name, t)));
        student.set_parameters(&parameters.collect::<Vec<_>>())?;
        adamw.load_state(&crate::model::weights::Weights::open_file(&path.join(OPTIMIZER_FILE))?)?;
        Ok(state.progress)
    }

    /// Writes `checkpoint-N`, then removes those beyond the number kept.
    pub(super) fn save(
        &self,
        config: &TrainConfig,
        identity: &Identity,
        student: &Student,
        adamw: &AdamW,
        progress: &Progress,
    ) -> Result<()> {
        let path = self.out.join(format!("{PREFIX}{}", progress.step));
        let partial = self.out.join(format!(".{PREFIX}{}.partial", progress.step));
        for leftover in [&partial, &path] {
            if leftover.exists() {
                fs::remove_dir_all(leftover).map_err(|source| TrainError::Io { path: leftover.clone(), source })?;
            }
        }
        save_adapter(&partial, config, student, progress)?;
        let optimizer = partial.join(OPTIMIZER_FILE);
        safetensors::serialize_to_file(adamw.state_tensors()?, None, &optimizer)
            .map_err(|e| TrainError::Io { path: optimizer, source: std::io::Error::other(e) })?;
        write_json(&partial.join(STATE_FILE), &State { progress: progress.clone(), identity: identity.clone() })?;
        write_json(&partial.join(DIGESTS_FILE), &digests(&partial)?)?;
        for name in [OPTIMIZER_FILE, STATE_FILE, DIGESTS_FILE, ""] {
            sync(&partial.join(name))?;
        }
        fs::rename(&partial, &path).map_err(|source| TrainError::Io { path: path.clone(), source })?;
        sync(&self.out)?;
        self.prune(config.keep_checkpoints as usize)
    }

    fn prune(&self, keep: usize) -> Result<()> {
        let all = self.checkpoints()?;
        let beyond = all.len().saturating_sub(keep.max(FEWEST_KEPT));
        for (_, path) in &all[..beyond] {
            fs::remove_dir_all(path).map_err(|source| TrainError::Io { path: path.clone(), source })?;
        }
        Ok(())
    }

    /// Checkpoints by rising step.
    fn checkpoints(&self) -> Result<Vec<(u64, PathBuf)>> {
        let io = |source| Error::Train(TrainError::Io { path: self.out.clone(), source });
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.out).map_err(io)? {
            let path = entry.map_err(io)?.path();
            let name = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_prefix(PREFIX));
            if let Some(step) = name.and_then(|n| n.parse().ok()) {
                all.push((step, path));
            }
        }
        all.sort();
        Ok(all)
    }
}

/// BLAKE3 (hex) of every file in the folder but the list itself.
fn digests(folder: &Path) -> Result<BTreeMap<String, String>> {
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| Error::Train(TrainError::Io { path, source })
    };
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).map_err(io(folder))? {
        let path = entry.map_err(io(folder))?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if name != DIGESTS_FILE && path.is_file() {
            let mut hasher = blake3::Hasher::new();
            hasher.update_reader(File::open(&path).map_err(io(&path))?).map_err(io(&path))?;
            all.insert(name, hasher.finalize().to_hex().to_string());
        }
    }
    Ok(all)
}

/// Proves that a checkpoint holds what was written.
fn check_digests(folder: &Path) -> Result<()> {
    let list = folder.join(DIGESTS_FILE);
    if !list.is_file() {
        let why = format!("it has no {DIGESTS_FILE}");
        return Err(TrainError::NoCheckpoint { path: folder.to_path_buf(), why }.into());
    }
    let expected: BTreeMap<String, String> = read_json(&list)?;
    let found = digests(folder)?;
    for name in [STATE_FILE, OPTIMIZER_FILE].into_iter().chain(expected.keys().map(String::as_str)) {
        let show = |of: &BTreeMap<String, String>| of.get(name).map_or("nothing".into(), |d| format!("BLAKE3 {d}"));
        if expected.get(name) != found.get(name) || !expected.contains_key(name) {
            return Err(TrainError::Damaged { path: folder.join(name), expected: show(&expected), found: show(&found) }.into());
        }
    }
    Ok(())
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let io = |source| TrainError::Io { path: path.to_path_buf(), source };
    if fs::metadata(path).map_err(io)?.len() > MAX_JSON_BYTES {
        let (expected, found) = (format!("at most {MAX_JSON_BYTES} bytes"), "more".into());
        return Err(TrainError::Damaged { path: path.to_path_buf(), expected, found }.into());
    }
    serde_json::from_slice(&fs::read(path).map_err(io)?).map_err(|e| {
        let (expected, found) = ("valid JSON of this version".into(), e.to_string());
        TrainError::Damaged { path: path.to_path_buf(), expected, found }.into()
    })
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let io = |source| TrainError::Io { path: path.to_path_buf(), source };
    let text = serde_json::to_vec_pretty(value).map_err(|e| io(e.into()))?;
    Ok(fs::write(path, text).map_err(io)?)
}

fn sync(path: &Path) -> Result<()> {
    let synced = File::open(path).and_then(|file| file.sync_all());
    Ok(synced.map_err(|source| TrainError::Io { path: path.to_path_buf(), source })?)
}
