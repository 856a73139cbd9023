//! What a run will need, before a weight is read: memory part by part ([`memory`]), and steps and tokens where the cache tells. Owns
//! the list of everything that is held at once; refuses to read more than `config.json`, the cache's manifest and the settings.
//!
//! The one idea: what a run holds is a sum over few kinds of tensors whose shapes the config knows. Some are held always, the others in
//! one of two phases of a step, so the peak is what is always held and the largest phase.
//!
//! | held | tensors (bytes of an element) | place |
//! |---|---|---|
//! | always | codes of the projections (½), their absolute maxima (1 in 64, 4 in 16,384) | device |
//! | always | head [V, H] as stored, bf16 (2); norms and biases (4) | device |
//! | always | A, B (4), their gradients (4), the optimiser's two means (8, or 2 and a scale for each 256) | device |
//! | always | embedding [V, H] as stored, bf16 (2): rows are read of it, so it stays in its file | host |
//! | loss, backward | input of each layer [T, H] (4); scored hidden states [N, H] (4) | device |
//! | loss | their norms and gradients [N, H] (3 · 4); logits of a chunk [n, V] (4); a stretch of them packed [n, 8192] (4) | device |
//! | backward | one layer's gradients beside the sums over packs (4); one layer's tensors (`layer_backward`) | device |
//!
//! The optimiser changes A and B where they lie.

use super::TrainConfig;
use super::optimizer::OptimizerKind;
use crate::Result;
use crate::adapter::TargetModules;
use crate::linear::nf4;
use crate::model::config::ModelConfig;
use crate::model::decoder::{features, has_bias};
use crate::model::layer::PROJECTIONS;
use potstill_cache::Manifest;
use serde::Serialize;

/// Bytes of the widest tensors of the MLP that exist at once, and fewest rows of a part, as `model/layer.rs` has them.
const MLP_BYTES: u64 = 512 << 20;
const LEAST_MLP_ROWS: u64 = 512;
/// Tensors [rows, intermediate] at once on the way back: gate, up, their product, the three gradients, one packed.
const WIDE_BACK: u64 = 7;
/// Vocabulary entries packed at once on the way back from logits, as `loss/fused.rs` has them.
const VOCABULARY_STRETCH: u64 = 8192;
/// Numbers that share a scale in an 8-bit optimiser's state.
const STATE_BLOCK: u64 = 256;
/// Bytes of an f32, and of a bf16.
const F32: u64 = 4;
const BF16: u64 = 2;

/// What the optimiser keeps of a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StateWidth {
    /// Two f32 means.
    #[default]
    F32,
    /// Two bytes, and two f32 scales for each block of 256 numbers of a tensor.
    Blocks8,
}

/// How many packs a step has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packs {
    /// One: its gradients are the step's.
    One,
    /// More: a pack's gradients are added to those before it, layer by layer.
    Several,
}

/// The settings that decide memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemorySettings {
    /// T: most tokens of a pack.
    pub tokens: u64,
    /// N: most scored positions of a pack, at most T.
    pub scored: u64,
    /// Scored positions whose logits exist at once.
    pub head_chunk: u64,
    /// Rank of the adapter.
    pub rank: u64,
    /// The projections that carry it.
    pub targets: TargetModules,
    /// What the optimiser keeps.
    pub optimizer: StateWidth,
    /// How many packs a step has.
    pub packs: Packs,
}

/// Where something is held. On a CPU both are the same memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// Where the model computes.
    Device,
    /// In mapped files.
    Host,
}

/// When something is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// From the first step to the last.
    Always,
    /// From the forward pass to the end of the backward.
    Pass,
    /// While the loss is computed.
    Loss,
    /// While gradients go back through the layers.
    Backward,
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Part {
    /// What it is.
    pub name: &'static str,
    /// Where it is held.
    pub place: Place,
    /// When it is held.
    pub when: When,
    /// How much it is.
    pub bytes: u64,
}

/// What a run holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Memory {
    /// The parts, in the order of the page.
    pub parts: Vec<Part>,
    /// Bytes on the device at the peak: what is always there and the largest phase.
    pub device: u64,
    /// The phase that is the largest.
    pub peak: When,
    /// Bytes of mapped files on the host.
    pub host: u64,
    /// Trainable numbers.
    pub trainable: u64,
}

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

/// What a student of these sizes holds in training. A pure function of both.
pub fn memory(model: &ModelConfig, s: &MemorySettings) -> Memory {
    let weights = Weights::of(model);
    let (trainable, blocks) = adapters(model, s);
    let h = model.hidden_size as u64;
    let (ends, scored) = (model.vocab_size as u64 * h, s.scored * h * F32);
    let state = match s.optimizer {
        StateWidth::F32 => 2 * F32 * trainable,
        StateWidth::Blocks8 => 2 * (trainable + F32 * blocks),
    };
    let chunk = s.head_chunk.min(s.scored) * model.vocab_size as u64 * F32;
    let stretch = s.head_chunk.min(s.scored) * VOCABULARY_STRETCH.min(model.vocab_size as u64) * F32;
    let of_layer = if s.packs == Packs::Several { F32 * trainable / model.layers.max(1) as u64 } else { 0 };
    let (device, always) = (Place::Device, When::Always);
    let part = |name, when, bytes| Part { name, place: device, when, bytes };
    let parts = vec![
        part("NF4 codes", always, weights.codes),
        part("NF4 absolute maxima", always, weights.maxima),
        part("head", always, ends * BF16),
        part("norms and biases", always, weights.small),
        part("adapter", always, F32 * trainable),
        part("gradients", always, F32 * trainable),
        part("optimiser", always, state),
        part("layer inputs", When::Pass, model.layers as u64 * s.tokens * h * F32),
        part("scored hidden states", When::Pass, scored),
        part("head's hidden states", When::Loss, 3 * scored),
        part("logits of a chunk", When::Loss, chunk + stretch),
        part("gradients of a layer", When::Backward, of_layer),
        part("one layer's backward", When::Backward, layer_backward(model, s)),
        Part { name: "embedding", place: Place::Host, when: always, bytes: ends * BF16 },
    ];
    let (peak, device) = peak(&parts);
    let host = parts.iter().filter(|part| part.place == Place::Host).map(|part| part.bytes).sum();
    Memory { parts, device, peak, host, trainable }
}

/// The phase that takes most of the device, and how much there is then.
fn peak(parts: &[Part]) -> (When, u64) {
    let sum = |phases: &[When]| -> u64 {
        let held = parts.iter().filter(|part| part.place == Place::Device && phases.contains(&part.when));
        held.map(|part| part.bytes).sum()
    };
    let phases = [
        (When::Loss, sum(&[When::Always, When::Pass, When::Loss])),
        (When::Backward, sum(&[When::Always, When::Pass, When::Backward])),
    ];
    phases.into_iter().max_by_key(|(_, bytes)| *bytes).unwrap_or((When::Always, 0))
}

/// Bytes of the frozen layers.
struct Weights {
    codes: u64,
    maxima: u64,
    /// Norms and biases, the final norm among them.
    small: u64,
}

impl Weights {
    fn of(model: &ModelConfig) -> Self {
        let (h, layers) = (model.hidden_size as u64, model.layers as u64);
        let mut layer = Self { codes: 0, maxima: 0, small: 2 * h * F32 };
        for projection in 0..PROJECTIONS.len() {
            let (outputs, inputs) = features(model, projection);
            let n = outputs as u64 * inputs as u64;
            let blocks = n.div_ceil(nf4::BLOCK as u64);
            layer.codes += n.div_ceil(2);
            layer.maxima += blocks + F32 * blocks.div_ceil(nf4::NESTED_BLOCK as u64) + F32;
            layer.small += if has_bias(model.biases, projection) { F32 * outputs as u64 } else { 0 };
        }
        layer.small += if model.head_norms { 2 * F32 * model.head_dim as u64 } else { 0 };
        Self { codes: layers * layer.codes, maxima: layers * layer.maxima, small: layers * layer.small + h * F32 }
    }
}

/// Trainable numbers, and blocks of an 8-bit optimiser's state.
fn adapters(model: &ModelConfig, s: &MemorySettings) -> (u64, u64) {
    let mut sum = (0, 0);
    for projection in (0..PROJECTIONS.len()).filter(|projection| s.targets.contains(*projection)) {
        let (outputs, inputs) = features(model, projection);
        let (a, b) = (s.rank * inputs as u64, s.rank * outputs as u64);
        sum = (sum.0 + a + b, sum.1 + a.div_ceil(STATE_BLOCK) + b.div_ceil(STATE_BLOCK));
    }
    (sum.0 * model.layers as u64, sum.1 * model.layers as u64)
}

/// Bytes of what exists in the backward of one layer at its peak, its input (kept) aside: the largest of three moments. All f32.
///
/// | in | [T, ·] | [rows, ·] of the MLP's part |
/// |---|---|---|
/// | each | normed, h, dL/dy (H each), q, attended (heads · d), k, v (kv · d), log-sum-exp (heads), A x of q, k, v, o (r) | |
/// | each, with norms of q and k | q and k before them | |
/// | MLP | dL/dh (H; twice while parts are joined) | gate, up, product, their gradients, one packed; three of H; A x of the three |
/// | attention's own way back | dL/dh (H), d attended, dq (heads · d), dk, dv (kv · d); dq, dk, dv of each query head (heads · d each); panels of keys, of keys turned, of values (kv · d each) | |
/// | its projections' | dL/dh, d normed, dL/dx (H), d attended, dq before and after rope (heads · d each), dk likewise, dv (kv · d), one packed | |
fn layer_backward(model: &ModelConfig, s: &MemorySettings) -> u64 {
    let (h, i, heads) = (model.hidden_size as u64, model.intermediate_size as u64, model.heads as u64);
    let (q, kv) = (heads * model.head_dim as u64, (model.kv_heads * model.head_dim) as u64);
    let low = |projections: std::ops::Range<usize>| s.rank * projections.filter(|p| s.targets.contains(*p)).count() as u64;
    let unnormed = if model.head_norms { q + kv } else { 0 };
    let both = 3 * h + 2 * q + 2 * kv + heads + low(0..4) + unnormed;
    let rows = (MLP_BYTES / (WIDE_BACK * F32 * i)).max(LEAST_MLP_ROWS).min(s.tokens);
    let joined = if rows < s.tokens { 2 * h } else { h };
    let mlp = s.tokens * (both + joined) + rows * (WIDE_BACK * i + 3 * h + low(4..PROJECTIONS.len()));
    let attention = s.tokens * (both + h + 2 * q + 2 * kv + 3 * q + 3 * kv);
    let projections = s.tokens * (both + 3 * h + 3 * q + 3 * kv + h.max(q));
    F32 * mlp.max(attention).max(projections)
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
        rank: u64::from(config.rank),
        targets: config.target_modules,
        optimizer: match config.optimizer {
            OptimizerKind::AdamW => StateWidth::F32,
            OptimizerKind::AdamW8bit => StateWidth::Blocks8,
        },
        packs: if batch * longest > tokens { Packs::Several } else { Packs::One },
    }
}

#[cfg(test)]
#[path = "outlook_tests.rs"]
mod tests;
