//! The run folder and its checkpoints.
//!
//! ```text
//! out/  adapter/                      the finished adapter (PEFT)
//!       checkpoint-N/                 adapter_config.json, adapter_model.safetensors, …   (PEFT, usable alone)
//!                     optimizer.safetensors, trainer_state.json, digests.json (BLAKE3 of every other file)
//!       best/                         the adapter with the lowest held-out loss (PEFT), evaluation.json
//!       metrics.jsonl  tensorboard/  config.resolved.toml  train.lock
//! ```
//! A checkpoint is built under another name, made durable, renamed, and only then are older ones removed; two are always kept. It
//! is read only when every file has the digest that was written. A run that goes on from an earlier checkpoint moves the later ones
//! to `set-aside/`, so that the newest one in the folder is always the run's own.

use super::identity::{self, Identity};
use super::optimizer::AdamW;
use super::watch::Standing;
use super::{Resume, TrainConfig, TrainError, save_adapter};
use crate::student::Student;
use crate::{Error, Result, adapter, bounded};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

const STATE_FILE: &str = "trainer_state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const DIGESTS_FILE: &str = "digests.json";
const SETTINGS_FILE: &str = "config.resolved.toml";
const LOCK_FILE: &str = "train.lock";
const SET_ASIDE: &str = "set-aside";
const PREFIX: &str = "checkpoint-";
/// Fewest checkpoints kept, whatever the settings say.
const FEWEST_KEPT: usize = 2;
/// Steps whose mean stands for "at first" and "at last"; one step's loss says more about its conversations.
pub const SMOOTHED: u64 = 10;
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
    /// Losses of the first [`SMOOTHED`] steps.
    first_losses: Vec<f64>,
    /// Losses of the last [`SMOOTHED`] steps.
    last_losses: Vec<f64>,
    /// What held-out evaluations found.
    #[serde(default)]
    pub standing: Standing,
}

impl Progress {
    /// Counts a step.
    pub(super) fn advance(&mut self, loss: f64, tokens: u64) {
        self.step += 1;
        self.tokens += tokens;
        if self.first_losses.len() < SMOOTHED as usize {
            self.first_losses.push(loss);
        }
        self.last_losses.push(loss);
        if self.last_losses.len() > SMOOTHED as usize {
            self.last_losses.remove(0);
        }
    }

    /// Mean loss of the run's first steps.
    pub(super) fn first_loss(&self) -> f64 {
        mean(&self.first_losses)
    }

    /// Mean loss of the last steps done.
    pub(super) fn last_loss(&self) -> f64 {
        mean(&self.last_losses)
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

/// What `trainer_state.json` holds.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    progress: Progress,
    identity: Identity,
}

/// A checkpoint whose bytes were checked.
#[derive(Debug)]
pub(super) struct Checkpoint {
    path: PathBuf,
    state: State,
}

impl Checkpoint {
    /// Errors: it was written by a run with other settings.
    pub(super) fn check_identity(&self, identity: &Identity) -> Result<()> {
        match identity::differences(identity, &self.state.identity) {
            None => Ok(()),
            Some(differences) => Err(TrainError::OtherRun { checkpoint: self.path.clone(), differences }.into()),
        }
    }
}

/// A run folder, locked until dropped.
#[derive(Debug)]
pub(super) struct RunFolder {
    out: PathBuf,
    _lock: File,
}

impl RunFolder {
    /// Makes or opens the run's folder, locks it and removes what a killed run left half-written. Errors: another process has it;
    /// it holds files and is no run folder.
    pub(super) fn open(config: &TrainConfig) -> Result<Self> {
        let out = config.out.clone();
        fs::create_dir_all(&out).map_err(io(&out))?;
        let path = out.join(LOCK_FILE);
        if let (false, Some(entry)) = (path.exists(), fs::read_dir(&out).map_err(io(&out))?.next()) {
            let found = entry.map_err(io(&out))?.file_name().to_string_lossy().into_owned();
            return Err(TrainError::Occupied { out, found }.into());
        }
        let lock = File::options().create(true).truncate(false).write(true).open(&path).map_err(io(&path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(TrainError::Locked { out }.into()),
            Err(TryLockError::Error(source)) => return Err(TrainError::Io { path, source }.into()),
        }
        let folder = Self { out, _lock: lock };
        for entry in fs::read_dir(&folder.out).map_err(io(&folder.out))? {
            let path = entry.map_err(io(&folder.out))?.path();
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
            if name.starts_with('.') && name.contains(".partial") && path.is_dir() {
                fs::remove_dir_all(&path).map_err(io(&path))?;
            }
        }
        Ok(folder)
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
        fs::write(&path, text).map_err(io(&path))
    }

    /// The checkpoint to go on from, its bytes checked; `None` where there is nothing to resume.
    pub(super) fn find(&self, config: &TrainConfig, total: u64) -> Result<Option<Checkpoint>> {
        let newest = self.checkpoints()?.pop().map(|(_, path)| path);
        let adapter = Some(self.out.join(super::ADAPTER_FOLDER)).filter(|path| path.exists());
        let path = match (&config.resume, newest) {
            (Resume::Path(path), _) => path.clone(),
            (Resume::Latest, Some(path)) => path,
            (Resume::Latest, None) => return Ok(None),
            (Resume::Never, newest) => match newest.or(adapter) {
                None => return Ok(None),
                Some(found) => {
                    let found = found.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
                    return Err(TrainError::Occupied { out: self.out.clone(), found }.into());
                }
            },
        };
        check_digests(&path)?;
        let state: State = read_json(&path.join(STATE_FILE))?;
        if state.progress.step > total {
            let expected = format!("at least the {} steps that {} already has", state.progress.step, path.display());
            return Err(Error::Setting { name: "steps", found: total.to_string(), expected });
        }
        Ok(Some(Checkpoint { path, state }))
    }

    /// Puts student and optimiser where the checkpoint has them, and moves later checkpoints out of the way.
    pub(super) fn restore(&self, checkpoint: Checkpoint, student: &mut Student, adamw: &mut AdamW) -> Result<Progress> {
        let Checkpoint { path, state } = checkpoint;
        let (_, mut tensors) = adapter::load(&path)?;
        let parameters = student.parameters().into_iter().filter_map(|(name, _)| tensors.remove(&name).map(|t| (name, t)));
        student.set_parameters(&parameters.collect::<Vec<_>>())?;
        adamw.load_state(&crate::model::weights::Weights::open_file(&path.join(OPTIMIZER_FILE))?)?;
        for (_, later) in self.checkpoints()?.into_iter().filter(|(step, _)| *step > state.progress.step) {
            self.set_aside(&later)?;
        }
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
        save_adapter(&partial, config, student, progress)?;
        let optimizer = partial.join(OPTIMIZER_FILE);
        safetensors::serialize_to_file(adamw.state_tensors()?, None, &optimizer)
            .map_err(|e| TrainError::Io { path: optimizer, source: std::io::Error::other(e) })?;
        write_json(&partial.join(STATE_FILE), &State { progress: progress.clone(), identity: identity.clone() })?;
        write_json(&partial.join(DIGESTS_FILE), &digests(&partial)?)?;
        for name in [OPTIMIZER_FILE, STATE_FILE, DIGESTS_FILE, ""] {
            sync(&partial.join(name))?;
        }
        if path.exists() {
            self.set_aside(&path)?;
        }
        fs::rename(&partial, &path).map_err(io(&path))?;
        sync(&self.out)?;
        self.prune(config.keep_checkpoints as usize)
    }

    /// Moves a checkpoint, or `best/`, to `set-aside/`; an older one of the same name that was set aside before gives way.
    pub(super) fn set_aside(&self, checkpoint: &Path) -> Result<()> {
        let folder = self.out.join(SET_ASIDE);
        fs::create_dir_all(&folder).map_err(io(&folder))?;
        let target = folder.join(checkpoint.file_name().unwrap_or_default());
        if target.exists() {
            fs::remove_dir_all(&target).map_err(io(&target))?;
        }
        fs::rename(checkpoint, &target).map_err(io(checkpoint))
    }

    fn prune(&self, keep: usize) -> Result<()> {
        let all = self.checkpoints()?;
        let beyond = all.len().saturating_sub(keep.max(FEWEST_KEPT));
        for (_, path) in &all[..beyond] {
            fs::remove_dir_all(path).map_err(io(path))?;
        }
        Ok(())
    }

    /// Checkpoints by rising step.
    fn checkpoints(&self) -> Result<Vec<(u64, PathBuf)>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.out).map_err(io(&self.out))? {
            let path = entry.map_err(io(&self.out))?.path();
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
        let why = match folder.is_dir() {
            true => format!("expected a folder with {DIGESTS_FILE} in it, found none in it"),
            false => "expected a folder, found nothing there".into(),
        };
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
    let text = bounded::read(path, MAX_JSON_BYTES).map_err(io(path))?;
    serde_json::from_slice(&text).map_err(|e| {
        let (expected, found) = ("valid JSON of this version".into(), e.to_string());
        TrainError::Damaged { path: path.to_path_buf(), expected, found }.into()
    })
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(|e| io(path)(e.into()))?;
    fs::write(path, text).map_err(io(path))
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(io(path))
}

/// A failed access to `path`.
fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    move |source| Error::Train(TrainError::Io { path, source })
}
