//! STAGE TWO: cache → packs → NF4 student + LoRA → loss → adapter. The loop a newcomer reads second.

pub mod optimizer;
pub mod schedule;

use potstill_cache::ErrorClass;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What the student is trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// Cross entropy on the data's tokens.
    Sft,
    /// Forward KL to the cached distributions: kept ids and one tail bucket.
    #[default]
    Distill,
    /// Both, weighted.
    #[serde(rename = "distill+sft")]
    DistillSft,
}

/// Where a run starts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Resume {
    /// From the newest checkpoint, or from nothing when there is none.
    #[default]
    Latest,
    /// From nothing; a folder that already holds a run is refused.
    Never,
    /// From this checkpoint folder.
    Path(PathBuf),
}

/// Settings of stage two.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Student's Hugging Face folder (dense).
    pub student: PathBuf,
    /// Folder of the cache.
    pub cache: PathBuf,
    /// Folder for adapter, checkpoints and metrics.
    pub out: PathBuf,
    /// What to train on.
    pub objective: Objective,
    /// Weight of the distillation term; by objective when not given (sft 0, distill 1, distill+sft 0.5).
    pub kd_alpha: Option<f64>,
    /// Weight of the cross entropy; by objective when not given (sft 1, distill 0, distill+sft 0.5).
    pub kd_ce_alpha: Option<f64>,
    /// Temperature of the distillation term.
    pub temperature: f64,
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
    /// Peak learning rate.
    pub lr: f64,
    /// Shape of the learning rate after warm-up.
    pub schedule: schedule::Schedule,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// LoRA rank r.
    pub rank: u32,
    /// LoRA alpha; the adapter is scaled by alpha / r.
    pub alpha: f64,
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
    /// Seed of the order and of the adapter's start.
    pub seed: u64,
    /// Whether rows come in seeded order (else in the cache's order).
    pub shuffle: bool,
    /// Steps between checkpoints; 0 writes only the last.
    pub checkpoint_every: u64,
    /// Checkpoints kept (at least 2).
    pub keep_checkpoints: u32,
    /// Where to start.
    pub resume: Resume,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    pub device: String,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            student: PathBuf::new(),
            cache: PathBuf::new(),
            out: PathBuf::new(),
            objective: Objective::default(),
            kd_alpha: None,
            kd_ce_alpha: None,
            temperature: 1.0,
            steps: None,
            epochs: 1.0,
            batch_size: 16,
            pack_tokens: 4096,
            head_chunk: 256,
            lr: 2e-4,
            schedule: schedule::Schedule::default(),
            warmup_steps: 100,
            rank: 64,
            alpha: 16.0,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            max_grad_norm: 0.3,
            seed: 42,
            shuffle: true,
            checkpoint_every: 100,
            keep_checkpoints: 2,
            resume: Resume::default(),
            device: "auto".into(),
        }
    }
}

/// What stage two did.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct TrainReport {
    /// Optimiser steps done in all.
    pub steps: u64,
    /// Step the run started from.
    pub resumed_from: u64,
    /// Loss of the first step of the whole run (nats per scored position).
    pub first_loss: f64,
    /// Loss of the last step.
    pub last_loss: f64,
    /// Tokens that went through the model in this run.
    pub tokens: u64,
    /// Trainable parameters.
    pub parameters: u64,
    /// Seconds of this run.
    pub seconds: f64,
    /// The adapter folder.
    pub adapter: PathBuf,
}

/// Ways training can be wrong.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Reading or writing a file failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl TrainError {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        ErrorClass::Runtime
    }
}
