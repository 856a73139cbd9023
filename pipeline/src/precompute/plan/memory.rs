//! What stage one holds, part by part. Owns the list of everything that is held at once; the weights' bytes are those of their headers,
//! and what program, tokenizer and data take is what this very process takes once it has read them.
//!
//! | held | bytes | when |
//! |---|---|---|
//! | program, tokenizer, data | as measured | always |
//! | weights | all; streamed, two layers while they compute, else the head | always; by phase |
//! | rows on their way to disk | what waits in the writer's queue and in row groups that are being encoded | always |
//! | hidden states | 2 · 4 · H a token of the block: each pack's and the one that takes its place | always |
//! | a layer's tensors | `layer` below, of one pack | layers |
//! | logits of a chunk | 4 · V a position, and rounded once more by each thread | head |
//! | kept of the block | twice what is kept of its scored positions: lists grow by doubling | head |

use super::super::PrecomputeConfig;
use super::super::opening::Opened;
use crate::kernel::Precision;
use crate::model::config::ModelConfig;
use crate::model::layer::{WIDE_THERE, rows_of_part};
use crate::model::stored::StoredBytes;
use crate::teacher::Residency;
use potstill_cache::{Extent, Values};
use serde::Serialize;

/// Bytes of an f32.
const F32: u64 = 4;
/// Row groups that may be encoding or waiting for their turn, for each thread; rows in one (as the cache writes them).
const GROUPS_A_THREAD: u64 = 2;
const ROWS_A_GROUP: u64 = 64;
/// Packs whose records may wait for the writer, the one it is at included.
const PACKS_WAITING: u64 = 3;

/// When something is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Moment {
    /// From the first block to the last.
    Always,
    /// While a block goes through the layers.
    Layers,
    /// While logits are formed and something is kept of them.
    Head,
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MemoryPart {
    /// What it is.
    pub name: &'static str,
    /// When it is held.
    pub when: Moment,
    /// How much it is.
    pub bytes: u64,
}

/// What a run holds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Memory {
    /// The parts.
    pub parts: Vec<MemoryPart>,
    /// What is always held and the larger of both phases.
    pub peak: u64,
}

/// Both ways to hold weights.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlannedMemory {
    /// The one that the run would take.
    pub chosen: Residency,
    /// Bytes that this process could still take; nothing where the system does not say.
    pub available: Option<u64>,
    /// With all weights in memory.
    pub resident: Memory,
    /// With two layers in memory.
    pub streamed: Memory,
}

/// The settings that decide memory beside the run's own.
pub(super) struct MemorySettings {
    pub(super) residency: Residency,
    /// Tokens of the largest pack.
    pub(super) largest: u64,
    /// Most tokens of a block where weights are streamed.
    pub(super) block: u64,
    /// What the run scores.
    pub(super) extent: Extent,
    /// Bytes of program, tokenizer and data; nothing where the system does not say.
    pub(super) loaded: Option<u64>,
    /// Bytes that are kept of a scored position, where that was measured.
    pub(super) kept: Option<f64>,
}

/// What a run holds at its largest moment.
pub(super) fn memory(opened: &Opened, run: &PrecomputeConfig, stored: &StoredBytes, s: &MemorySettings) -> Memory {
    let model = &opened.model;
    let (h, threads) = (model.hidden_size as u64, rayon::current_num_threads() as u64);
    let block = if s.residency == Residency::Streamed { s.block.max(s.largest) } else { s.largest };
    let scored_of = |tokens: u64| (tokens as f64 * s.extent.scored as f64 / s.extent.tokens.max(1) as f64) as u64;
    let kept = s.kept.unwrap_or_else(|| at_most(opened)).ceil() as u64;
    let chunk = u64::from(run.head_chunk).min(scored_of(s.largest).max(1));
    let wide = u64::from(opened.width) * F32;
    let rounded = if opened.storage.values == Values::LogitBf16 { threads * wide } else { 0 };
    let of_rows = |rows: u64| rows.min(s.extent.rows) * (s.extent.scored / s.extent.rows.max(1)) * kept;
    let waiting = (PACKS_WAITING * scored_of(s.largest) * kept).min(s.extent.scored * kept);
    let encoding = of_rows((GROUPS_A_THREAD * threads + 1) * ROWS_A_GROUP);
    let (always, layers, head) = (Moment::Always, Moment::Layers, Moment::Head);
    let part = |name, when, bytes| MemoryPart { name, when, bytes };
    let weights = match s.residency {
        Residency::Resident => vec![part("weights", always, stored.total)],
        Residency::Streamed => {
            vec![part("two layers' weights", layers, 2 * stored.layer), part("head's weights", head, stored.head)]
        }
    };
    let mut parts = vec![part("program, tokenizer and data", always, s.loaded.unwrap_or(5 * s.extent.tokens))];
    parts.extend(weights);
    parts.extend([
        part("rows on their way to disk", always, waiting + encoding),
        part("hidden states of a block", always, 2 * F32 * h * block),
        part("one layer's tensors of a pack", layers, layer(model, s.largest)),
        part("logits of a chunk", head, chunk * wide + rounded),
        part("kept of a block", head, 2 * scored_of(block) * kept),
    ]);
    if opened.device.is_cuda() {
        parts.push(part("weights, unpacked", layers, unpacked(model, run.compute, s.largest)));
    }
    let sum = |when: Moment| -> u64 { parts.iter().filter(|part| part.when == when).map(|part| part.bytes).sum() };
    let peak = sum(always) + sum(layers).max(sum(head));
    Memory { parts, peak }
}

/// Bytes that the selection can keep of a position.
fn at_most(opened: &Opened) -> f64 {
    let (selection, values) = (&opened.storage.selection, opened.storage.values);
    let entry = if values == Values::LogitBf16 { 3 * F32 } else { 2 * F32 };
    (u64::from(selection.head()) * entry + 6 * u64::from(selection.draws().unwrap_or(0)) + 4 * F32) as f64
}

/// Bytes of what exists in a layer at its widest, its input and output aside: the larger of two moments. All f32.
///
/// | in | [T, ·] | [rows, ·] of the MLP's part |
/// |---|---|---|
/// | attention | normed, q and k before and after rope, v, attended, o's output, h; one of them packed | |
/// | MLP | h, rows' outputs; cosines and sines | normed, gate, up, product; one of them packed |
fn layer(model: &ModelConfig, tokens: u64) -> u64 {
    let (h, i) = (model.hidden_size as u64, model.intermediate_size as u64);
    let (q, kv) = ((model.heads * model.head_dim) as u64, (model.kv_heads * model.head_dim) as u64);
    let turned = model.head_dim as u64;
    let rows = (rows_of_part(WIDE_THERE, model.intermediate_size) as u64).min(tokens);
    let attention = tokens * (3 * h + 3 * q + 3 * kv + h.max(q) + turned);
    let mlp = tokens * (2 * h + turned) + rows * (h + (WIDE_THERE as u64 + 1) * i);
    F32 * attention.max(mlp)
}

/// Bytes of the weights that a GPU holds unpacked at once: one of the MLP's, or all three where rows go through them in parts.
fn unpacked(model: &ModelConfig, compute: Precision, tokens: u64) -> u64 {
    let (h, i) = (model.hidden_size as u64, model.intermediate_size as u64);
    let in_parts = (rows_of_part(WIDE_THERE, model.intermediate_size) as u64) < tokens;
    let held = if in_parts { 3 } else { 1 };
    held * h * i * compute.bytes()
}
