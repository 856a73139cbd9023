//! The run folder and its checkpoints.
//!
//! ```text
//! out/  adapter/                      the finished adapter (PEFT)
//!       checkpoint-N/                 adapter_config.json, adapter_model.safetensors, …   (PEFT, usable alone)
//!                     optimizer.safetensors, trainer_state.json, digests.json (BLAKE3 of every other file, and its own)
//!       best/                         the adapter with the lowest held-out loss (PEFT), evaluation.json
//!       metrics.jsonl  tensorboard/  config.resolved.toml  train.lock  bad-step-N.json
//! ```
//! A checkpoint is built under another name, made durable, renamed, and only then are older ones removed; two are always kept. (One of
//! the same step is `.checkpoint-N.old` for the moment between the two names; the next run puts it back or removes it.) A checkpoint is
//! read only when every file has the digest that was written; where the newest one does not, the run goes on from the one before
//! it, and says so. A run that goes on from an earlier checkpoint moves the later ones to `set-aside/`, so that the newest one in the
//! folder is always the run's own.

use super::files::{self, io};
use super::identity::{self, Identity};
use super::optimizer::AdamW;
use super::provenance::Provenance;
use super::watch::Standing;
use super::{Resume, TrainConfig, TrainError, digests};
use crate::ops::with_f32;
use crate::student::Student;
use crate::{Error, Result, adapter};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

const STATE_FILE: &str = "trainer_state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const SETTINGS_FILE: &str = "config.resolved.toml";
const LOCK_FILE: &str = "train.lock";
const SET_ASIDE: &str = "set-aside";
const PREFIX: &str = "checkpoint-";
/// How the hidden name of a checkpoint ends that gives way to another of its step.
const OLD: &str = ".old";
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
    /// Losses of the first [`SMOOTHED`] steps that had one; f32, which JSON gives back to the bit.
    first_losses: Vec<f32>,
    /// Losses of the last [`SMOOTHED`] steps that had one.
    last_losses: Vec<f32>,
    /// Steps of these that were skipped, because they were not finite.
    pub skipped: u64,
    /// How many of them came last, without another between.
    pub skipped_in_a_row: u64,
    /// What held-out evaluations found.
    #[serde(default)]
    pub standing: Standing,
}

impl Progress {
    /// Counts a step that was skipped.
    pub(super) fn skip(&mut self, tokens: u64) {
        self.step += 1;
        self.tokens += tokens;
        self.skipped += 1;
        self.skipped_in_a_row += 1;
    }

    /// Counts a step that was taken; one without a scored position has no loss.
    pub(super) fn advance(&mut self, loss: Option<f64>, tokens: u64) {
        self.step += 1;
        self.tokens += tokens;
        self.skipped_in_a_row = 0;
        let Some(loss) = loss.map(|loss| loss as f32) else { return };
        if self.first_losses.len() < SMOOTHED as usize {
            self.first_losses.push(loss);
        }
        self.last_losses.push(loss);
        if self.last_losses.len() > SMOOTHED as usize {
            self.last_losses.remove(0);
        }
    }

    /// Mean loss of the run's first steps; not a number where none had one.
    pub(super) fn first_loss(&self) -> f64 {
        mean(&self.first_losses)
    }

    /// Mean loss of the last steps done; not a number where none had one.
    pub(super) fn last_loss(&self) -> f64 {
        mean(&self.last_losses)
    }
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len() as f64
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
    /// Reads a checkpoint whose every byte is what was written. Errors: it is not, or cannot be read, or there is none.
    fn open(path: &Path) -> Result<Self> {
        digests::check(path, &[STATE_FILE, OPTIMIZER_FILE])?;
        Ok(Self { path: path.to_path_buf(), state: read_json(&path.join(STATE_FILE))? })
    }

    /// The checkpoint of this step that another rank has found: the one that the settings name, or the one in the run's folder. Errors:
    /// as [`open`](Self::open); it is of another step or of other settings.
    pub(super) fn of_step(config: &TrainConfig, step: u64, identity: &Identity) -> Result<Self> {
        let path = match &config.resume {
            Resume::Path(path) => path.clone(),
            _ => config.out.join(format!("{PREFIX}{step}")),
        };
        let checkpoint = Self::open(&path)?;
        checkpoint.check_identity(identity)?;
        if checkpoint.step() != step {
            let (expected, found) = (format!("step {step}, as rank 0 has it"), format!("step {}", checkpoint.step()));
            return Err(TrainError::Damaged { path, expected, found }.into());
        }
        Ok(checkpoint)
    }

    /// Steps done.
    pub(super) fn step(&self) -> u64 {
        self.state.progress.step
    }

    /// Errors: it was written by a run with other settings.
    pub(super) fn check_identity(&self, identity: &Identity) -> Result<()> {
        let said = |name: &str, ours: &str, stored: &str| format!("{name}: the checkpoint has {stored}, here it is {ours}");
        match identity::differences(identity, &self.state.identity, said) {
            None => Ok(()),
            Some(differences) => Err(TrainError::OtherRun { checkpoint: self.path.clone(), differences }.into()),
        }
    }

    /// Puts student and optimiser where the checkpoint has them.
    pub(super) fn restore(self, student: &mut Student, adamw: &mut AdamW) -> Result<Progress> {
        let Checkpoint { path, state } = self;
        let (_, mut tensors) = adapter::load(&path)?;
        let parameters = student.parameters().into_iter().filter_map(|(name, _)| tensors.remove(&name).map(|t| (name, t)));
        student.set_parameters(&parameters.collect::<Vec<_>>())?;
        adamw.load_state(&crate::model::weights::Weights::open_file(&path.join(OPTIMIZER_FILE))?)?;
        Ok(state.progress)
    }
}

/// What there is to go on from.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// The checkpoint.
    pub checkpoint: Option<Checkpoint>,
    /// Newer checkpoints that are damaged or cannot be read, a sentence each.
    pub passed_over: Vec<String>,
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
        folder.recover()?;
        Ok(folder)
    }

    /// Tidies what a run left that was killed while a checkpoint took the place of one of the same step: the older one goes back
    /// where nothing took its place.
    fn recover(&self) -> Result<()> {
        for entry in fs::read_dir(&self.out).map_err(io(&self.out))? {
            let old = entry.map_err(io(&self.out))?.path();
            let name = old.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_prefix('.')?.strip_suffix(OLD));
            let Some(path) = name.filter(|name| name.starts_with(PREFIX)).map(|name| self.out.join(name)) else { continue };
            if path.exists() {
                files::remove_folder(&old)?;
            } else {
                files::rename(&old, &path)?;
            }
        }
        Ok(())
    }

    /// The folder.
    pub(super) fn path(&self) -> &Path {
        &self.out
    }

    /// Writes the settings as they were resolved.
    fn write_settings(&self, config: &TrainConfig) -> Result<()> {
        let path = self.out.join(SETTINGS_FILE);
        let text = toml::to_string(&BTreeMap::from([("train", config)]))
            .map_err(|e| TrainError::Io { path: path.clone(), source: std::io::Error::other(e) })?;
        fs::write(&path, text).map_err(io(&path))
    }

    /// The checkpoint to go on from, its bytes checked: the one named, or the newest that is whole.
    ///
    /// Errors: one that was named, or all there are, are damaged; a run that is not to go on where one stands; fewer steps asked for
    /// than there are.
    pub(super) fn find(&self, config: &TrainConfig, total: u64) -> Result<Found> {
        let mut checkpoints = self.checkpoints()?;
        let found = match &config.resume {
            Resume::Path(path) => Found { checkpoint: Some(Checkpoint::open(path)?), passed_over: Vec::new() },
            Resume::Latest => newest_whole(checkpoints)?,
            Resume::Never => {
                let adapter = Some(self.out.join(super::ADAPTER_FOLDER)).filter(|path| path.exists());
                let Some(found) = checkpoints.pop().map(|(_, path)| path).or(adapter) else { return Ok(Found::default()) };
                let found = found.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
                return Err(TrainError::Occupied { out: self.out.clone(), found }.into());
            }
        };
        if let Some(Checkpoint { path, state }) = found.checkpoint.as_ref().filter(|found| found.state.progress.step > total) {
            let expected = format!("at least the {} steps that {} already has", state.progress.step, path.display());
            return Err(Error::Setting { name: "steps", found: total.to_string(), expected });
        }
        Ok(found)
    }

    /// Begins a run in the folder at `step`, that of its checkpoint: writes the settings, moves later checkpoints out of the way and removes
    /// those beyond the number kept.
    pub(super) fn begin(&self, config: &TrainConfig, step: u64) -> Result<()> {
        for (_, later) in self.checkpoints()?.into_iter().filter(|(of, _)| *of > step) {
            self.set_aside(&later)?;
        }
        self.write_settings(config)?;
        // A run that was killed after its last checkpoint appeared has not got as far.
        self.prune(config.keep_checkpoints as usize)
    }

    /// Writes `checkpoint-N`, then removes those beyond the number kept.
    pub(super) fn save(
        &self,
        config: &TrainConfig,
        provenance: &Provenance,
        student: &Student,
        adamw: &AdamW,
        progress: &Progress,
    ) -> Result<()> {
        let path = self.out.join(format!("{PREFIX}{}", progress.step));
        let partial = self.out.join(format!(".{PREFIX}{}.partial", progress.step));
        let state = adamw.state_tensors()?;
        refuse_not_finite(progress.step, student.parameters().iter().chain(&state))?;
        files::moment(&partial)?;
        provenance.save(&partial, student, progress)?;
        let optimizer = partial.join(OPTIMIZER_FILE);
        files::moment(&optimizer)?;
        safetensors::serialize_to_file(state, None, &optimizer)
            .map_err(|e| TrainError::Io { path: optimizer.clone(), source: std::io::Error::other(e) })?;
        files::sync(&optimizer)?;
        let state = State { progress: progress.clone(), identity: provenance.identity().clone() };
        let state_file = partial.join(STATE_FILE);
        files::write(&state_file, &serde_json::to_vec_pretty(&state).map_err(|e| io(&state_file)(e.into()))?)?;
        digests::write(&partial)?;
        files::sync(&partial)?;
        publish(&partial, &path)?;
        self.prune(config.keep_checkpoints as usize)
    }

    /// Moves a checkpoint, or `best/`, to `set-aside/`; an older one of the same name that was set aside before gives way.
    pub(super) fn set_aside(&self, checkpoint: &Path) -> Result<()> {
        let folder = self.out.join(SET_ASIDE);
        fs::create_dir_all(&folder).map_err(io(&folder))?;
        let target = folder.join(checkpoint.file_name().unwrap_or_default());
        if target.exists() {
            files::remove_folder(&target)?;
        }
        files::rename(checkpoint, &target)
    }

    /// Removes the oldest checkpoints beyond `keep`, which counts as two at least.
    fn prune(&self, keep: usize) -> Result<()> {
        let all = self.checkpoints()?;
        let beyond = all.len().saturating_sub(keep.max(FEWEST_KEPT));
        for (_, path) in &all[..beyond] {
            files::remove_folder(path)?;
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

/// Gives a finished checkpoint its name. One of the same step that stands there waits under another name until its successor does,
/// then goes.
fn publish(partial: &Path, path: &Path) -> Result<()> {
    let old = path.with_file_name(format!(".{}{OLD}", path.file_name().unwrap_or_default().to_string_lossy()));
    let replaces = path.exists();
    if replaces {
        files::rename(path, &old)?;
    }
    files::rename(partial, path)?;
    if replaces { files::remove_folder(&old) } else { Ok(()) }
}

/// The newest of these (by rising step) that is whole. Errors: there are some, and none is.
fn newest_whole(mut checkpoints: Vec<(u64, PathBuf)>) -> Result<Found> {
    let (mut passed_over, mut newest) = (Vec::new(), None);
    while let Some((_, path)) = checkpoints.pop() {
        match Checkpoint::open(&path) {
            Ok(checkpoint) => {
                let instead = format!("going on from {}", path.display());
                let passed_over = passed_over.into_iter().map(|why: String| format!("{why}; {instead}")).collect();
                return Ok(Found { checkpoint: Some(checkpoint), passed_over });
            }
            Err(Error::Train(e)) if speaks_of(&e, &path) => {
                passed_over.push(e.to_string());
                newest.get_or_insert(e);
            }
            Err(other) => return Err(other),
        }
    }
    newest.map_or(Ok(Found::default()), |e| Err(e.into()))
}

/// Whether it is this checkpoint that is wrong: not what was written, of another version, or not to be read.
fn speaks_of(error: &TrainError, checkpoint: &Path) -> bool {
    match error {
        TrainError::Damaged { .. } | TrainError::NoCheckpoint { .. } | TrainError::OtherVersion { .. } => true,
        TrainError::Io { path, .. } => path.starts_with(checkpoint),
        _ => false,
    }
}

/// Errors: an adapter or a state that holds a value that is not finite, which must not replace one that does not.
fn refuse_not_finite<'a>(step: u64, tensors: impl Iterator<Item = &'a (String, Tensor)>) -> Result<()> {
    for (name, tensor) in tensors.filter(|(_, tensor)| tensor.dtype() == DType::F32) {
        if !with_f32(&tensor.to_device(&Device::Cpu)?, |values| Ok(values.iter().all(|value| value.is_finite())))? {
            return Err(TrainError::NotFiniteState { step, name: name.clone() }.into());
        }
    }
    Ok(())
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = digests::read(path, MAX_JSON_BYTES)?;
    serde_json::from_slice(&text).map_err(|e| {
        let (expected, found) = ("valid JSON of this version".into(), e.to_string());
        TrainError::Damaged { path: path.to_path_buf(), expected, found }.into()
    })
}
