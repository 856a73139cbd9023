//! What a student holds in training, part by part: a pure function of its config and a few settings. Owns the list of everything that is
//! held at once.
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
//! | loss, backward | what is kept of the last layers (`kept`) (4) | device |
//! | loss, backward | input of each layer [T, H] (4); scored hidden states [N, H] (4) | device |
//! | loss | their norms and gradients [N, H] (3 · 4); logits of a chunk [n, V] (4); a stretch of them packed [n, 8192] (4) | device |
//! | backward | one layer's gradients beside the sums over packs (4); one layer's tensors (`layer_backward`) | device |
//!
//! The optimiser changes A and B where they lie.

use super::super::optimizer::BLOCK;
use crate::adapter::TargetModules;
use crate::linear::nf4;
use crate::loss::VOCABULARY_STRETCH;
use crate::model::config::ModelConfig;
use crate::model::decoder::{features, has_bias};
use crate::model::layer::{PROJECTIONS, WIDE_BACK, rows_of_part};
use serde::Serialize;

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
    /// Layers whose activations are kept.
    pub keep_layers: u64,
    /// Rank of the adapter.
    pub rank: u64,
    /// The projections that carry it.
    pub targets: TargetModules,
    /// What the optimiser keeps.
    pub optimizer: StateWidth,
    /// How many packs a step has.
    pub packs: Packs,
    /// Bytes of an unpacked weight on a GPU, 2 or 4; nothing on a CPU, which never unpacks one as a whole.
    pub unpacked: Option<u64>,
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
    let stretch = s.head_chunk.min(s.scored) * (VOCABULARY_STRETCH as u64).min(model.vocab_size as u64) * F32;
    let kept = kept(model, s);
    let of_layer = if s.packs == Packs::Several { F32 * trainable / model.layers.max(1) as u64 } else { 0 };
    let (device, always) = (Place::Device, When::Always);
    let part = |name, when, bytes| Part { name, place: device, when, bytes };
    let mut parts = vec![
        part("NF4 codes", always, weights.codes),
        part("NF4 absolute maxima", always, weights.maxima),
        part("head", always, ends * BF16),
        part("norms and biases", always, weights.small),
        part("adapter", always, F32 * trainable),
        part("gradients", always, F32 * trainable),
        part("optimiser", always, state),
        part("layer inputs", When::Pass, model.layers as u64 * s.tokens * h * F32),
        part("activations of kept layers", When::Pass, s.keep_layers * kept),
        part("scored hidden states", When::Pass, scored),
        part("head's hidden states", When::Loss, 3 * scored),
        part("logits of a chunk", When::Loss, chunk + stretch),
        part("gradients of a layer", When::Backward, of_layer),
        // The last layer's, part of which is what was kept of it.
        part("one layer's backward", When::Backward, layer_backward(model, s) - s.keep_layers.min(1) * kept),
        Part { name: "embedding", place: Place::Host, when: always, bytes: ends * BF16 },
    ];
    parts.extend(s.unpacked.map(|bytes| part("weights of a layer, unpacked", When::Backward, bytes * weights.of_layer)));
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
    /// How many weights a layer has.
    of_layer: u64,
}

impl Weights {
    fn of(model: &ModelConfig) -> Self {
        let (h, layers) = (model.hidden_size as u64, model.layers as u64);
        let mut layer = Self { codes: 0, maxima: 0, small: 2 * h * F32, of_layer: 0 };
        for projection in 0..PROJECTIONS.len() {
            let (outputs, inputs) = features(model, projection);
            let n = outputs as u64 * inputs as u64;
            let blocks = n.div_ceil(nf4::BLOCK as u64);
            layer.codes += n.div_ceil(2);
            layer.of_layer += n;
            layer.maxima += blocks + F32 * blocks.div_ceil(nf4::NESTED_BLOCK as u64) + F32;
            layer.small += if has_bias(model.biases, projection) { F32 * outputs as u64 } else { 0 };
        }
        layer.small += if model.head_norms { 2 * F32 * model.head_dim as u64 } else { 0 };
        let (codes, maxima, small) = (layers * layer.codes, layers * layer.maxima, layers * layer.small + h * F32);
        Self { codes, maxima, small, ..layer }
    }
}

/// Trainable numbers, and blocks of an 8-bit optimiser's state.
fn adapters(model: &ModelConfig, s: &MemorySettings) -> (u64, u64) {
    let mut sum = (0, 0);
    for projection in (0..PROJECTIONS.len()).filter(|projection| s.targets.contains(*projection)) {
        let (outputs, inputs) = features(model, projection);
        let (a, b) = (s.rank * inputs as u64, s.rank * outputs as u64);
        sum = (sum.0 + a + b, sum.1 + a.div_ceil(BLOCK as u64) + b.div_ceil(BLOCK as u64));
    }
    (sum.0 * model.layers as u64, sum.1 * model.layers as u64)
}

/// Sizes of a layer's tensors, in numbers a token.
struct Widths {
    h: u64,
    i: u64,
    /// heads · d, kv · d.
    q: u64,
    kv: u64,
    /// Kept of attention: h (H), q, attended, k, v, log-sum-exp (heads), A x of q, k, v, o (r); q and k before their norms, if any.
    attended: u64,
    /// A x of gate, up, down.
    low: u64,
}

impl Widths {
    fn of(model: &ModelConfig, s: &MemorySettings) -> Self {
        let (h, i, heads) = (model.hidden_size as u64, model.intermediate_size as u64, model.heads as u64);
        let (q, kv) = (heads * model.head_dim as u64, (model.kv_heads * model.head_dim) as u64);
        let low = |projections: std::ops::Range<usize>| s.rank * projections.filter(|p| s.targets.contains(*p)).count() as u64;
        let unnormed = if model.head_norms { q + kv } else { 0 };
        let attended = h + 2 * q + 2 * kv + heads + low(0..4) + unnormed;
        Self { h, i, q, kv, attended, low: low(4..PROJECTIONS.len()) }
    }
}

/// Bytes that a kept layer's activations take: what is kept of attention; gate, up and A x of the MLP. All f32.
fn kept(model: &ModelConfig, s: &MemorySettings) -> u64 {
    let Widths { i, attended, low, .. } = Widths::of(model, s);
    F32 * s.tokens * (attended + 2 * i + low)
}

/// Bytes of what exists in the backward of the last layer at its peak, its input (kept) aside: the largest of three moments. All f32.
///
/// | in | [T, ·] | [rows, ·] of the MLP's part |
/// |---|---|---|
/// | each | what is kept of attention; dL/dy (H) | |
/// | MLP | dL/dh (H; twice while parts are joined) | product, the gradients of three, one packed; three of H |
/// | the same, kept | gate, up, A x of the three | |
/// | the same, not kept | | gate, up, A x of the three |
/// | attention's own way back | dL/dh (H), d attended, dq (heads · d), dk, dv (kv · d); dq, dk, dv of each query head (heads · d each); panels of keys, of keys turned, of values (kv · d each) | |
/// | its projections' | dL/dh, normed, d normed, dL/dx (H), d attended, dq before and after rope (heads · d each), dk likewise, dv (kv · d), one packed | |
fn layer_backward(model: &ModelConfig, s: &MemorySettings) -> u64 {
    let Widths { h, i, q, kv, attended, low } = Widths::of(model, s);
    let each = attended + h;
    let rows = (rows_of_part(WIDE_BACK, model.intermediate_size) as u64).min(s.tokens);
    let joined = if rows < s.tokens { 2 * h } else { h };
    let gated = if s.keep_layers > 0 { s.tokens } else { rows };
    let mlp = s.tokens * (each + joined) + gated * (2 * i + low) + rows * ((WIDE_BACK as u64 - 2) * i + 3 * h);
    let attention = s.tokens * (each + h + 2 * q + 2 * kv + 3 * q + 3 * kv);
    let projections = s.tokens * (each + 4 * h + 3 * q + 3 * kv + h.max(q));
    F32 * mlp.max(attention).max(projections)
}
