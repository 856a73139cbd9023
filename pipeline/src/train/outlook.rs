//! What a run will need, before a weight is read: memory part by part ([`memory()`]), and steps and tokens where the cache tells. Refuses
//! to read more than `config.json`, the cache's manifest and the settings.

mod memory;

pub use memory::{Memory, MemorySettings, Packs, Part, Place, StateWidth, When, memory};

use super::TrainConfig;
use super::optimizer::OptimizerKind;
use crate::Result;
use crate::adapter::TargetModules;
use crate::device;
use crate::model::config::ModelConfig;
use potstill_cache::Manifest;
use serde::Serialize;

/// What the cache tells of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// Conversations in the cache.
    pub rows: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Passes over the rows that are trained on (all but those held out) that these are.
    pub epochs: f64,
    /// Tokens of a step, on average.
    pub tokens_per_step: f64,
    /// Scored positions of a step, on average.
    pub scored_per_step: f64,
    /// Longest conversation that there may be.
    pub max_length: u64,
}

/// What a run will need.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outlook {
    /// Most tokens of a pack, which the memory is computed for.
    pub pack_tokens: u64,
    /// Scored positions whose logits exist at once.
    pub head_chunk: u64,
    /// Rank of the adapter.
    pub rank: u32,
    /// The projections that carry it.
    pub target_modules: TargetModules,
    /// What it holds.
    pub memory: Memory,
    /// Steps and tokens; nothing where no cache was named.
    pub run: Option<Run>,
}

/// Looks at a run's settings: `config.json` of the student, which may be all that its folder holds, and the manifest of the cache if one
/// is named. Nothing is written. Errors: settings that a run refuses before it reads its rows (naming neither cache nor data is allowed
/// here), a config or manifest that cannot be read, a student that is quantised already.
pub fn look(config: &TrainConfig) -> Result<Outlook> {
    config.loss_plan()?;
    config.check_schedule()?;
    config.lora().check()?;
    if !(config.cache.as_os_str().is_empty() && config.data.is_empty()) {
        config.check_rows()?;
    }
    let model = ModelConfig::from_folder(&config.student)?;
    model.check_dense(&config.student)?;
    config.check_layers(model.layers)?;
    let cache = if config.cache.as_os_str().is_empty() { None } else { Some(Manifest::load(&config.cache)?) };
    let run = cache.as_ref().map(|manifest| steps(config, manifest));
    let settings = memory_settings(config, run.as_ref());
    Ok(Outlook {
        pack_tokens: settings.tokens,
        head_chunk: settings.head_chunk,
        rank: config.rank,
        target_modules: config.target_modules,
        memory: memory(&model, &settings),
        run,
    })
}

/// Steps and tokens over this cache. Of a cache that is not finished, what is there stands for the whole.
fn steps(config: &TrainConfig, manifest: &Manifest) -> Run {
    let rows = manifest.description.expected_rows;
    let (steps, epochs) = passes(config, rows);
    let (there, batch) = (manifest.rows().max(1) as f64, f64::from(config.batch_size));
    Run {
        rows,
        steps,
        epochs,
        tokens_per_step: manifest.tokens() as f64 / there * batch,
        scored_per_step: manifest.scored() as f64 / there * batch,
        max_length: u64::from(manifest.description.encoding.max_length),
    }
}

/// Steps over a cache of `rows` rows, and how often each row that is not held out comes in them.
fn passes(config: &TrainConfig, rows: u64) -> (u64, f64) {
    let trained = rows.saturating_sub(u64::from(config.eval_rows)).max(1);
    let steps = config.total_steps(trained);
    (steps, steps as f64 * f64::from(config.batch_size) / trained as f64)
}

/// The largest pack that may come: `pack_tokens`, or one longer conversation, but never more than a step has.
fn memory_settings(config: &TrainConfig, run: Option<&Run>) -> MemorySettings {
    let pack_tokens = u64::from(config.pack_tokens);
    let batch = u64::from(config.batch_size);
    let longest = match run {
        Some(run) => run.max_length,
        None if !config.data.is_empty() => u64::from(config.max_length),
        None => pack_tokens,
    };
    let tokens = pack_tokens.max(longest).min(batch * longest);
    MemorySettings {
        tokens,
        scored: tokens,
        head_chunk: u64::from(config.head_chunk),
        keep_layers: u64::from(config.keep_layers),
        rank: u64::from(config.rank),
        targets: config.target_modules,
        optimizer: match config.optimizer {
            OptimizerKind::AdamW => StateWidth::F32,
            OptimizerKind::AdamW8bit => StateWidth::Blocks8,
        },
        packs: if batch * longest > tokens { Packs::Several } else { Packs::One },
        unpacked: device::means_gpu(&config.device).then(|| config.compute.bytes()),
    }
}

#[cfg(test)]
#[path = "outlook_tests.rs"]
mod tests;
