//! Settings of stage two and their defaults.

use super::distillation::{DEFAULT_MAX_UNKNOWN_MASS, DivergenceName, LossSchedule, TailName};
use super::optimizer::{AdamWConfig, OptimizerKind};
use super::ranks::DistBackend;
use super::report::{Objective, Resume};
use super::schedule::Schedule;
use super::watch::DEFAULT_EVAL_EVERY;
use crate::adapter::{Scaling, TargetModules};
use crate::data::{BadRoles, Truncation};
use crate::kernel::Precision;
use crate::loss::{DEFAULT_BETA, DEFAULT_SKEW, LossSettings};
use crate::student::LoraSettings;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Lowest temperature; below it one token is everything.
pub const MIN_TEMPERATURE: f64 = 0.05;
/// Highest temperature; above it all kept tokens are alike.
pub const MAX_TEMPERATURE: f64 = 100.0;
/// Weight of either term of `distill+sft` when none is given.
pub const DEFAULT_MIXED_WEIGHT: f64 = 0.5;
/// Default for [`TrainConfig::temperature`].
pub const DEFAULT_TEMPERATURE: f64 = 1.0;
/// Default for [`TrainConfig::max_length`], in tokens; as in stage one.
pub const DEFAULT_MAX_LENGTH: u32 = 1024;
/// Default for [`TrainConfig::epochs`].
pub const DEFAULT_EPOCHS: f64 = 1.0;
/// Default for [`TrainConfig::batch_size`] (Firefly: 1 row, 16 accumulated).
pub const DEFAULT_BATCH_SIZE: u32 = 16;
/// Default for [`TrainConfig::pack_tokens`].
pub const DEFAULT_PACK_TOKENS: u32 = 4096;
/// Default for [`TrainConfig::head_chunk`], in positions.
pub const DEFAULT_HEAD_CHUNK: u32 = 256;
/// Default for [`TrainConfig::lr`].
pub const DEFAULT_LR: f64 = 2e-4;
/// Default for [`TrainConfig::warmup_steps`].
pub const DEFAULT_WARMUP_STEPS: u64 = 100;
/// Part of the run's steps that [`TrainConfig::decay_steps`] is by default: one in so many, rounded up.
pub const DEFAULT_DECAY_PART: u64 = 10;
/// Default for [`TrainConfig::min_lr_ratio`].
pub const DEFAULT_MIN_LR_RATIO: f64 = 0.0;
/// Default for [`TrainConfig::rank`].
pub const DEFAULT_RANK: u32 = 64;
/// Default for [`TrainConfig::alpha`].
pub const DEFAULT_ALPHA: f64 = 16.0;
/// Default for [`TrainConfig::dropout`].
pub const DEFAULT_DROPOUT: f64 = 0.0;
/// Default for [`TrainConfig::weight_decay`].
pub const DEFAULT_WEIGHT_DECAY: f64 = 0.0;
/// Default for [`TrainConfig::beta1`].
pub const DEFAULT_BETA1: f64 = 0.9;
/// Default for [`TrainConfig::beta2`].
pub const DEFAULT_BETA2: f64 = 0.999;
/// Default for [`TrainConfig::eps`].
pub const DEFAULT_EPS: f64 = 1e-8;
/// Default for [`TrainConfig::max_grad_norm`].
pub const DEFAULT_MAX_GRAD_NORM: f64 = 0.3;
/// Default for [`TrainConfig::seed`].
pub const DEFAULT_SEED: u64 = 42;
/// Default for [`TrainConfig::checkpoint_every`].
pub const DEFAULT_CHECKPOINT_EVERY: u64 = 100;
/// Default for [`TrainConfig::keep_checkpoints`].
pub const DEFAULT_KEEP_CHECKPOINTS: u32 = 2;

/// Settings of stage two.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Student's Hugging Face folder (dense).
    pub student: PathBuf,
    /// Folder of the cache; empty where `data` is given.
    #[serde(skip_serializing_if = "no_path")]
    pub cache: PathBuf,
    /// Files, folders or globs of chats, for the objective sft without a cache.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub data: Vec<PathBuf>,
    /// Longest conversation of `data`, in tokens. The rows of a cache are as long as they are.
    pub max_length: u32,
    /// What to do with longer ones of `data`.
    pub truncate: Truncation,
    /// What to do with a conversation of `data` whose roles cannot be trained on.
    pub on_bad_roles: BadRoles,
    /// Folder for adapter, checkpoints and metrics.
    pub out: PathBuf,
    /// What to train on.
    pub objective: Objective,
    /// Weight of the distillation term; by objective when not given (sft 0, distill 1, distill+sft 0.5).
    pub kd_alpha: Option<f64>,
    /// Weight of the cross entropy; by objective when not given (sft 1, distill 0, distill+sft 0.5).
    pub kd_ce_alpha: Option<f64>,
    /// Temperature T of the distillation term. Where the cache declares `lse_t` at T the tail is formed at T
    /// (exactly where it keeps logits, else as exactly as its values are rounded), else at 1.
    pub temperature: f64,
    /// How the student is compared with the teacher.
    pub divergence: DivergenceName,
    /// Weight of the teacher in the divergence `jsd`, between 0 and 1.
    pub beta: f64,
    /// Skew α of `skewed-kl` and `skewed-reverse-kl`, between 0 and 1.
    pub skew: f64,
    /// What becomes of the probability outside the kept ids.
    pub tail: TailName,
    /// Most probability, on average, of which a cache may not tell where it lies at a temperature other than 1; from 0 to 1.
    pub max_unknown_mass: f64,
    /// `kd_alpha` of the last step, where it changes.
    pub kd_alpha_end: Option<f64>,
    /// `kd_ce_alpha` of the last step, where it changes.
    pub kd_ce_alpha_end: Option<f64>,
    /// `temperature` of the last step, where it changes. The tails `auto` and `bucket` are then one bucket at every step.
    pub temperature_end: Option<f64>,
    /// How those three are reached.
    pub loss_schedule: LossSchedule,
    /// Read at most so many entries of each distribution.
    pub top_k: Option<u16>,
    /// Read entries of at least this probability.
    pub min_prob: Option<f64>,
    /// Read the fewest entries that make up this mass.
    pub min_mass: Option<f64>,
    /// Optimiser steps; overrides `epochs`.
    pub steps: Option<u64>,
    /// Passes over the cache when `steps` is not given.
    pub epochs: f64,
    /// Conversations in an optimiser step.
    pub batch_size: u32,
    /// Tokens that go through the model at once; a step is split into packs of at most this.
    pub pack_tokens: u32,
    /// Scored positions whose logits exist at once.
    pub head_chunk: u32,
    /// Last layers whose activations a pass keeps instead of computing them again on its way back; at most the student's layers. Decides
    /// memory and time, and no bit of the adapter.
    pub keep_layers: u32,
    /// What the factors of products are rounded to; sums, norms, softmax, losses and the optimiser are f32 in any case.
    pub compute: Precision,
    /// Peak learning rate.
    pub lr: f64,
    /// Shape of the learning rate after warm-up.
    pub schedule: Schedule,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Steps of the schedule wsd's fall; absent: the last tenth of the run.
    pub decay_steps: Option<u64>,
    /// What the falling schedules fall to, as a share of `lr`.
    pub min_lr_ratio: f64,
    /// How the optimiser keeps its state.
    pub optimizer: OptimizerKind,
    /// LoRA rank r.
    pub rank: u32,
    /// LoRA alpha; the adapter is scaled by alpha / r, with `rslora` by alpha / √r.
    pub alpha: f64,
    /// Whether the adapter is scaled by alpha / √r (rank-stabilised LoRA).
    pub rslora: bool,
    /// The projections that carry the adapter.
    pub target_modules: TargetModules,
    /// Share of the adapter's inputs that training leaves out, from 0 to below 1.
    pub dropout: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// AdamW's first decay.
    pub beta1: f64,
    /// AdamW's second decay.
    pub beta2: f64,
    /// AdamW's epsilon.
    pub eps: f64,
    /// Largest L2 norm of the gradient; 0 turns clipping off.
    pub max_grad_norm: f64,
    /// Seed of the order, the adapter's start, its dropout, and the rows held out.
    pub seed: u64,
    /// Whether rows come in seeded order (else in the cache's order).
    pub shuffle: bool,
    /// Rows of the cache that are held out: never trained on, and evaluated on; chosen by the seed. 0 for none.
    pub eval_rows: u32,
    /// Another cache to evaluate on, all of its rows.
    pub eval_cache: Option<PathBuf>,
    /// Optimiser steps between evaluations; the last step is followed by one too.
    pub eval_every: u64,
    /// Evaluations in a row without a lower held-out loss after which the run ends; 0 for never.
    pub patience: u32,
    /// A cache of whole distributions, on which each evaluation measures what the run's own cache leaves out.
    pub probe_cache: Option<PathBuf>,
    /// Whether TensorBoard event files are written.
    pub tensorboard: bool,
    /// Steps between checkpoints; 0 writes only the last one. A stop, or a better evaluation, still writes one.
    pub checkpoint_every: u64,
    /// Checkpoints kept (at least 2).
    pub keep_checkpoints: u32,
    /// Where to start.
    pub resume: Resume,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    pub device: String,
    /// By which way gradients cross between ranks. Decides no bit of the adapter of one rank or two, and of more only last ones.
    pub dist_backend: DistBackend,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            student: PathBuf::new(),
            cache: PathBuf::new(),
            data: Vec::new(),
            max_length: DEFAULT_MAX_LENGTH,
            truncate: Truncation::default(),
            on_bad_roles: BadRoles::default(),
            out: PathBuf::new(),
            objective: Objective::default(),
            kd_alpha: None,
            kd_ce_alpha: None,
            temperature: DEFAULT_TEMPERATURE,
            divergence: DivergenceName::default(),
            beta: DEFAULT_BETA,
            skew: DEFAULT_SKEW,
            tail: TailName::default(),
            max_unknown_mass: DEFAULT_MAX_UNKNOWN_MASS,
            kd_alpha_end: None,
            kd_ce_alpha_end: None,
            temperature_end: None,
            loss_schedule: LossSchedule::default(),
            top_k: None,
            min_prob: None,
            min_mass: None,
            steps: None,
            epochs: DEFAULT_EPOCHS,
            batch_size: DEFAULT_BATCH_SIZE,
            pack_tokens: DEFAULT_PACK_TOKENS,
            head_chunk: DEFAULT_HEAD_CHUNK,
            keep_layers: 0,
            compute: Precision::F32,
            lr: DEFAULT_LR,
            schedule: Schedule::default(),
            warmup_steps: DEFAULT_WARMUP_STEPS,
            decay_steps: None,
            min_lr_ratio: DEFAULT_MIN_LR_RATIO,
            optimizer: OptimizerKind::default(),
            rank: DEFAULT_RANK,
            alpha: DEFAULT_ALPHA,
            rslora: false,
            target_modules: TargetModules::ALL,
            dropout: DEFAULT_DROPOUT,
            weight_decay: DEFAULT_WEIGHT_DECAY,
            beta1: DEFAULT_BETA1,
            beta2: DEFAULT_BETA2,
            eps: DEFAULT_EPS,
            max_grad_norm: DEFAULT_MAX_GRAD_NORM,
            seed: DEFAULT_SEED,
            shuffle: true,
            eval_rows: 0,
            eval_cache: None,
            eval_every: DEFAULT_EVAL_EVERY,
            patience: 0,
            probe_cache: None,
            tensorboard: true,
            checkpoint_every: DEFAULT_CHECKPOINT_EVERY,
            keep_checkpoints: DEFAULT_KEEP_CHECKPOINTS,
            resume: Resume::default(),
            device: "auto".into(),
            dist_backend: DistBackend::default(),
        }
    }
}

fn no_path(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

impl TrainConfig {
    /// The first step's loss, before a cache has had its say. Errors: a weight, temperature or parameter out of its range, a divergence
    /// that the tail cannot have, or two weights of 0, with which there is nothing to train on.
    pub fn loss_settings(&self) -> Result<LossSettings> {
        let (kd, ce) = match self.objective {
            Objective::Sft => (0.0, 1.0),
            Objective::Distill => (1.0, 0.0),
            Objective::DistillSft => (DEFAULT_MIXED_WEIGHT, DEFAULT_MIXED_WEIGHT),
        };
        let settings = LossSettings {
            divergence: self.divergence(),
            tail: self.tail(),
            temperature: self.temperature,
            kd_alpha: self.kd_alpha.unwrap_or(kd),
            kd_ce_alpha: self.kd_ce_alpha.unwrap_or(ce),
        };
        settings.check()?;
        if !(MIN_TEMPERATURE..=MAX_TEMPERATURE).contains(&self.temperature) {
            let expected = format!("a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}");
            return Err(Error::Setting { name: "temperature", found: self.temperature.to_string(), expected });
        }
        if settings.kd_alpha == 0.0 && settings.kd_ce_alpha == 0.0 {
            let expected = "kd_alpha or kd_ce_alpha above 0".into();
            return Err(Error::Setting { name: "kd_alpha", found: "0, and kd_ce_alpha 0".into(), expected });
        }
        for (name, value) in [("min_prob", self.min_prob), ("min_mass", self.min_mass)] {
            if let Some(value) = value.filter(|value| !(*value as f32 > 0.0 && (*value as f32) < 1.0)) {
                let expected = "a number above 0 and below 1".into();
                return Err(Error::Setting { name, found: value.to_string(), expected });
            }
        }
        if self.top_k == Some(0) {
            return Err(Error::Setting { name: "top_k", found: "0".into(), expected: "at least 1".into() });
        }
        for (name, value) in [("batch_size", self.batch_size), ("pack_tokens", self.pack_tokens), ("head_chunk", self.head_chunk)]
        {
            if value == 0 {
                return Err(Error::Setting { name, found: "0".into(), expected: "at least 1".into() });
            }
        }
        Ok(settings)
    }

    /// Errors: more layers are to be kept than the student has.
    pub fn check_layers(&self, layers: usize) -> Result<()> {
        if self.keep_layers as usize > layers {
            let expected = format!("at most {layers}, the student's layers");
            return Err(Error::Setting { name: "keep_layers", found: self.keep_layers.to_string(), expected });
        }
        Ok(())
    }

    /// AdamW's constants.
    pub fn optimizer(&self) -> AdamWConfig {
        let Self { optimizer: kind, beta1, beta2, eps, weight_decay, .. } = *self;
        AdamWConfig { kind, beta1, beta2, eps, weight_decay }
    }

    /// The adapter's size and start.
    pub fn lora(&self) -> LoraSettings {
        let scaling = if self.rslora { Scaling::RankStabilised } else { Scaling::Standard };
        let (targets, dropout) = (self.target_modules, self.dropout);
        LoraSettings { scaling, targets, dropout, ..LoraSettings::plain(self.rank, self.alpha, self.seed) }
    }

    /// Whether anything is held out to evaluate on.
    pub fn evaluates(&self) -> bool {
        self.eval_rows > 0 || self.eval_cache.is_some()
    }

    /// Optimiser steps over a cache of `rows` rows to train on: `steps`, else as many as `epochs` passes need, at least one.
    pub fn total_steps(&self, rows: u64) -> u64 {
        self.steps.unwrap_or_else(|| ((rows as f64 * self.epochs / f64::from(self.batch_size)).ceil() as u64).max(1))
    }

    /// Whether a checkpoint is written after this step.
    pub fn checkpoint_due(&self, step: u64) -> bool {
        self.checkpoint_every > 0 && step.is_multiple_of(self.checkpoint_every)
    }
}
