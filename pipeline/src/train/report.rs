//! What a run is asked for and what it answers: what it trains on, where it starts, what it did. Owns the words that settings files and
//! reports have for these; refuses any others.

use super::watch::HeldOutReport;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What the student is trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// Cross entropy on the data's tokens.
    Sft,
    /// A divergence from the cached distributions: kept ids and one tail bucket; estimates of the whole where tokens were drawn.
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

impl std::fmt::Display for Objective {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Objective::Sft => "sft",
            Objective::Distill => "distill",
            Objective::DistillSft => "distill+sft",
        })
    }
}

/// What stage two did.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct TrainReport {
    /// What was learned from, in words: the selection read, how the tail is formed, which part of the data.
    pub targets: String,
    /// Processes that trained together; absent for one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ranks: Option<u32>,
    /// The version of NCCL, where gradients crossed between GPUs by it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nccl: Option<String>,
    /// Optimiser steps done in all.
    pub steps: u64,
    /// Step the run started from.
    pub resumed_from: u64,
    /// Steps of these that were skipped, because loss or gradient was not finite.
    pub skipped_steps: u64,
    /// Conversations of the data that were skipped, by reason; none of a cache.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub skipped: BTreeMap<String, u64>,
    /// Damaged checkpoints that the run did not go on from, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub passed_over: Vec<String>,
    /// Mean loss of the first ten steps of the whole run, or of all of them where it is shorter (nats per scored position).
    pub first_loss: f64,
    /// Mean loss of the last ten steps.
    pub last_loss: f64,
    /// Highest learning rate of any step of the whole run; below `lr` when the run ends within its warm-up.
    pub highest_lr: f64,
    /// Tokens that went through the model in this run.
    pub tokens: u64,
    /// Trainable parameters.
    pub parameters: u64,
    /// Seconds of this run.
    pub seconds: f64,
    /// The adapter folder.
    pub adapter: PathBuf,
    /// What held-out evaluations found; absent without any.
    pub held_out: Option<HeldOutReport>,
}
