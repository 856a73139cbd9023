//! One decoder layer, forward and backward side by side. The backward starts from the layer's input and computes everything in
//! between once more, so that a run keeps only one tensor a layer (activation recomputation); or from what the forward kept
//! ([`Activations`]), which costs memory and saves a third of the products. Either way the same bits come out.
//!
//! ```text
//! x ─ input_layernorm ─ q,k,v ─ (q,k norm) ─ rope ─ attention ─ o ─(+x)─ h ─ post_attention_layernorm ─ gate,up ─ SwiGLU ─ down ─(+h)─ y
//! ```

use super::config::ModelConfig;
use crate::data::pack::Pack;
use crate::kernel::Precision;
use crate::linear::dropout::Dropout;
use crate::linear::{Linear, LoraGradient, Low, Pass, backward_all, forward_kept};
use crate::ops::attention::{self, KeysValues, Segments};
use crate::ops::rope::{Table, Turn};
use crate::ops::{add, rms_norm, rows, swiglu};
use candle_core::{Device, Result, Tensor};
use std::borrow::Cow;
use std::ops::RangeInclusive;

/// The seven linear layers, named as in the checkpoint, in the order of [`Layer::linears`].
pub const PROJECTIONS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// Places in [`PROJECTIONS`]: the first of q, k and v; o; the first of gate and up; down.
const Q: usize = 0;
const O: usize = 3;
const GATE: usize = 4;
const DOWN: usize = 6;

/// Where a pack's conversations begin and how their positions turn; the same for every layer.
#[derive(Debug, Clone)]
pub struct Geometry {
    segments: Segments,
    rope: Table,
}

impl Geometry {
    /// The geometry of `pack` for a model on `device`.
    pub fn new(pack: &Pack, config: &ModelConfig, device: &Device) -> Result<Self> {
        let rope = Table::new(&pack.positions(), config.head_dim, config.rope_theta, device)?;
        Ok(Self { segments: Segments::new(pack.segments().to_vec()), rope })
    }

    /// The geometry of conversations that go on: (rows before, new rows) of each.
    pub fn continued(conversations: &[(usize, usize)], config: &ModelConfig, device: &Device) -> Result<Self> {
        let positions = conversations.iter().flat_map(|(before, new)| *before as u32..(before + new) as u32);
        let ends = conversations.iter().scan(0, |end, (_, new)| {
            *end += *new as u32;
            Some(*end)
        });
        let rope = Table::new(&positions.collect::<Vec<u32>>(), config.head_dim, config.rope_theta, device)?;
        Ok(Self { segments: Segments::new(std::iter::once(0).chain(ends).collect()), rope })
    }
}

/// One decoder layer; fields are named as in the checkpoint.
#[derive(Debug, Clone)]
pub struct Layer {
    /// f32 `[H]`.
    pub input_layernorm: Tensor,
    /// H → heads · d.
    pub q_proj: Linear,
    /// H → kv_heads · d.
    pub k_proj: Linear,
    /// H → kv_heads · d.
    pub v_proj: Linear,
    /// f32 `[d]`, over every head of q before rope (Qwen3).
    pub q_norm: Option<Tensor>,
    /// f32 `[d]`, over every head of k before rope (Qwen3).
    pub k_norm: Option<Tensor>,
    /// heads · d → H.
    pub o_proj: Linear,
    /// f32 `[H]`.
    pub post_attention_layernorm: Tensor,
    /// H → intermediate.
    pub gate_proj: Linear,
    /// H → intermediate.
    pub up_proj: Linear,
    /// intermediate → H.
    pub down_proj: Linear,
    /// Rows that go through the MLP at once; by memory where not given. Outputs do not depend on it, gradients in last bits.
    pub mlp_rows: Option<usize>,
    pub(super) head_dim: usize,
    pub(super) eps: f64,
    /// What the factors of the frozen weights' products are rounded to.
    pub(super) precision: Precision,
}

/// What a backward pass needs of a layer beside its input and its output's gradient, except what takes no product to compute again
/// (normed inputs, gate · up).
#[derive(Debug)]
pub struct Activations {
    attended: Attended,
    /// Of each part of the rows.
    fed: Vec<Fed>,
}

/// What lies between a layer's input and the sum after attention.
#[derive(Debug)]
struct Attended {
    /// q and k [T · heads, d] as they were before their norms; `None` without norms.
    q_unnormed: Option<Tensor>,
    k_unnormed: Option<Tensor>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: attention::Attended,
    attended_flat: Tensor,
    h: Tensor,
    /// A x of q, k, v and o.
    low: [Low; 3],
    low_o: [Low; 1],
}

/// What lies between that sum and SwiGLU.
#[derive(Debug)]
struct Gated {
    gate: Tensor,
    up: Tensor,
    /// A x of gate and up.
    low: [Low; 2],
}

/// What lies between that sum and the layer's output.
#[derive(Debug)]
struct Fed {
    gated: Gated,
    /// A x of down.
    low: [Low; 1],
}

/// What a part of the rows adds to the MLP's backward.
struct FedGradients {
    dh: Tensor,
    gate: Option<LoraGradient>,
    up: Option<LoraGradient>,
    down: Option<LoraGradient>,
}

/// Bytes of a row part's widest tensors that exist at once: rows go through the MLP in as many parts as that takes, for a model of
/// 27,392 intermediate features would need 330 KB a token on the way there and 770 KB on the way back.
const MLP_BYTES: usize = 512 << 20;
/// Fewest rows of such a part: fewer would unpack weights too often.
const LEAST_MLP_ROWS: usize = 512;
/// Tensors [rows, intermediate] that exist at once, there (gate, up, product) and back (those, their gradients, one packed).
pub(crate) const WIDE_THERE: usize = 3;
pub(crate) const WIDE_BACK: usize = 7;

/// Most rows of a part where `wide` f32 tensors of `width` intermediate features exist at once.
pub(crate) fn rows_of_part(wide: usize, width: usize) -> usize {
    (MLP_BYTES / (wide * 4 * width.max(1))).max(LEAST_MLP_ROWS)
}

impl Layer {
    /// The linear layers in the order of [`PROJECTIONS`].
    pub fn linears(&self) -> [&Linear; 7] {
        [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj, &self.gate_proj, &self.up_proj, &self.down_proj]
    }

    /// The same, to change.
    pub fn linears_mut(&mut self) -> [&mut Linear; 7] {
        let Self { q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, .. } = self;
        [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]
    }

    /// y [T, H] of x [T, H], f32. `dropout` is for training alone.
    pub fn forward(&self, x: &Tensor, geometry: &Geometry, dropout: Option<Dropout>) -> Result<Tensor> {
        let Attended { h, .. } = self.attend(x, geometry, dropout)?;
        self.feed_forward(&h, dropout)
    }

    /// The same of rows that come after earlier ones, whose keys and values are in `past`, one a conversation of a
    /// [continued](Geometry::continued) geometry; the new ones' are added there.
    pub fn forward_cached(&self, x: &Tensor, geometry: &Geometry, past: &mut [&mut KeysValues]) -> Result<Tensor> {
        let Attended { h, .. } = self.attend_after(Some(past), x, geometry, None)?;
        self.feed_forward(&h, None)
    }

    /// The layer's output from the sum after attention.
    fn feed_forward(&self, h: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
        let mut sums = Vec::new();
        let parts = self.row_parts(h.dim(0)?, WIDE_THERE);
        let layer = self.held_for(&parts)?;
        for (start, rows) in parts {
            let (h, dropout) = (h.narrow(0, start, rows)?, dropout.map(|dropout| dropout.later(start)));
            let gated = layer.feed(&h, dropout)?;
            let product = swiglu::forward_rounded(&gated.gate, &gated.up, self.rounding(dropout))?;
            // Everything else is let go before the last product.
            drop(gated);
            let ([down], _) = forward_kept([&layer.down_proj], &product, self.pass(dropout, DOWN))?;
            sums.push(add(&h, &down)?);
        }
        joined(sums)
    }

    /// The same, and what [`backward`](Self::backward) would otherwise compute again.
    pub fn forward_keeping(&self, x: &Tensor, geometry: &Geometry, dropout: Option<Dropout>) -> Result<(Tensor, Activations)> {
        let attended = self.attend(x, geometry, dropout)?;
        let (mut sums, mut fed) = (Vec::new(), Vec::new());
        // The parts of the way back, which may be shorter.
        let parts = self.row_parts(x.dim(0)?, WIDE_BACK);
        let layer = self.held_for(&parts)?;
        for (start, rows) in parts {
            let (h, dropout) = (attended.h.narrow(0, start, rows)?, dropout.map(|dropout| dropout.later(start)));
            let gated = layer.feed(&h, dropout)?;
            let product = swiglu::forward_rounded(&gated.gate, &gated.up, self.rounding(dropout))?;
            let ([down], low) = forward_kept([&layer.down_proj], &product, self.pass(dropout, DOWN))?;
            sums.push(add(&h, &down)?);
            fed.push(Fed { gated, low });
        }
        Ok((joined(sums)?, Activations { attended, fed }))
    }

    /// The layer with its MLP's weights unpacked on a GPU, where rows go through them in several parts.
    fn held_for(&self, parts: &[(usize, usize)]) -> Result<Cow<'_, Self>> {
        if parts.len() > 1 { self.held(GATE..=DOWN) } else { Ok(Cow::Borrowed(self)) }
    }

    /// The layer with these projections' weights unpacked on a GPU, for as long as it is held: 2 bytes a weight. A CPU unpacks as it
    /// multiplies, and nothing is gained there.
    fn held(&self, projections: RangeInclusive<usize>) -> Result<Cow<'_, Self>> {
        if self.input_layernorm.device().is_cpu() {
            return Ok(Cow::Borrowed(self));
        }
        let mut layer = self.clone();
        for linear in &mut layer.linears_mut()[projections] {
            **linear = linear.held(self.precision)?;
        }
        Ok(Cow::Owned(layer))
    }

    /// From the layer's input x and dL/dy, both [T, H]: dL/dx, and the LoRA gradients in the order of [`PROJECTIONS`]. `dropout` is what
    /// the forward was given, `kept` what it kept; without it everything is computed again.
    pub fn backward(
        &self,
        x: &Tensor,
        kept: Option<Activations>,
        dy: &Tensor,
        geometry: &Geometry,
        dropout: Option<Dropout>,
    ) -> Result<(Tensor, [Option<LoraGradient>; 7])> {
        let row_parts = self.row_parts(x.dim(0)?, WIDE_BACK);
        // A weight's second use is close: what is computed again, and the way back. What was kept leaves it one.
        let layer = if kept.is_none() { self.held(Q..=DOWN)? } else { self.held_for(&row_parts)? };
        let (s, fed) = match kept {
            Some(Activations { attended, fed }) => (attended, fed),
            None => (layer.attend(x, geometry, dropout)?, Vec::new()),
        };
        let mut fed = fed.into_iter();
        let (mut parts, mut mlp) = (Vec::new(), [None, None, None]);
        for (start, rows) in row_parts {
            let (h, dy) = (s.h.narrow(0, start, rows)?, dy.narrow(0, start, rows)?);
            let dropout = dropout.map(|dropout| dropout.later(start));
            let FedGradients { dh, gate, up, down } = layer.feed_backward(&h, fed.next(), &dy, dropout)?;
            parts.push(dh);
            for (sum, part) in mlp.iter_mut().zip([gate, up, down]) {
                *sum = summed(sum.take(), part)?;
            }
        }
        let [gate, up, down] = mlp;
        let (dx, [q, k, v, o]) = layer.attend_backward(x, s, joined(parts)?, geometry, dropout)?;
        Ok((dx, [q, k, v, o, gate, up, down]))
    }

    /// dL/dx and the gradients of q, k, v and o from dL/dh.
    fn attend_backward(
        &self,
        x: &Tensor,
        s: Attended,
        dh: Tensor,
        geometry: &Geometry,
        dropout: Option<Dropout>,
    ) -> Result<(Tensor, [Option<LoraGradient>; 4])> {
        let (d_flat, [o]) = backward_all([&self.o_proj], &s.attended_flat, &s.low_o, [&dh], self.pass(dropout, O))?;
        let d_attended = d_flat.reshape(s.q.dims())?;
        let (dq, dk, dv) =
            attention::backward_at(&s.q, &s.k, &s.v, &s.attended, &d_attended, &geometry.segments, self.precision)?;
        let flat = |t: Tensor| -> Result<Tensor> { t.flatten_from(1) };
        let dq = flat(self.head_norm_backward(&s.q_unnormed, &self.q_norm, geometry.rope.apply(&dq, Turn::Backward)?)?)?;
        let dk = flat(self.head_norm_backward(&s.k_unnormed, &self.k_norm, geometry.rope.apply(&dk, Turn::Backward)?)?)?;
        let layers = [&self.q_proj, &self.k_proj, &self.v_proj];
        let normed = rms_norm::forward(x, &self.input_layernorm, self.eps)?;
        let (d_normed, [q, k, v]) = backward_all(layers, &normed, &s.low, [&dq, &dk, &flat(dv)?], self.pass(dropout, Q))?;
        let dx = add(&dh, &rms_norm::backward(x, &self.input_layernorm, self.eps, &d_normed)?)?;
        Ok((dx, [q, k, v, o]))
    }

    /// dL/dh and the gradients of gate, up and down from dL/dy of the rows of h [n, H].
    fn feed_backward(&self, h: &Tensor, fed: Option<Fed>, dy: &Tensor, dropout: Option<Dropout>) -> Result<FedGradients> {
        let pass = self.pass(dropout, DOWN);
        let (gated, low_down) = match fed {
            Some(Fed { gated, low }) => (gated, Some(low)),
            None => (self.feed(h, dropout)?, None),
        };
        let Gated { gate, up, low } = gated;
        let product = swiglu::forward(&gate, &up)?;
        // What down keeps of its input is a product of it alone, so its output is not made again.
        let low_down = low_down.map_or_else(|| Ok([self.down_proj.low(&product, pass)?]), Ok::<_, candle_core::Error>)?;
        let (d_product, [down]) = backward_all([&self.down_proj], &product, &low_down, [dy], pass)?;
        let (d_gate, d_up) = swiglu::backward(&gate, &up, &d_product)?;
        let layers = [&self.gate_proj, &self.up_proj];
        let h_normed = rms_norm::forward(h, &self.post_attention_layernorm, self.eps)?;
        let (d_normed, [gate, up]) = backward_all(layers, &h_normed, &low, [&d_gate, &d_up], self.pass(dropout, GATE))?;
        let dh = add(dy, &rms_norm::backward(h, &self.post_attention_layernorm, self.eps, &d_normed)?)?;
        Ok(FedGradients { dh, gate, up, down })
    }

    /// The parts, as (first row, rows), in which `t` rows go through the MLP when `wide` tensors of its width exist at once.
    fn row_parts(&self, t: usize, wide: usize) -> Vec<(usize, usize)> {
        let by_memory = || rows_of_part(wide, self.gate_proj.weight.outputs());
        let part = self.mlp_rows.unwrap_or_else(by_memory).max(1);
        (0..t).step_by(part).map(|start| (start, part.min(t - start))).collect()
    }

    /// How the N projections from number `first` on are passed through.
    fn pass<const N: usize>(&self, dropout: Option<Dropout>, first: usize) -> Pass<N> {
        Pass { precision: self.precision, masks: Dropout::masks(dropout, first) }
    }

    fn attend(&self, x: &Tensor, geometry: &Geometry, dropout: Option<Dropout>) -> Result<Attended> {
        self.attend_after(None, x, geometry, dropout)
    }

    /// What [`attend`](Self::attend) gives, of rows that may come after earlier ones.
    fn attend_after(
        &self,
        past: Option<&mut [&mut KeysValues]>,
        x: &Tensor,
        geometry: &Geometry,
        dropout: Option<Dropout>,
    ) -> Result<Attended> {
        let (t, _) = x.dims2()?;
        let heads = |y: Tensor| -> Result<Tensor> { y.reshape((t, (), self.head_dim)) };
        let normed = rms_norm::forward_rounded(x, &self.input_layernorm, self.eps, self.rounding(dropout))?;
        let ([q, k, v], low) = forward_kept([&self.q_proj, &self.k_proj, &self.v_proj], &normed, self.pass(dropout, Q))?;
        let (q, q_unnormed) = self.head_norm(heads(q)?, &self.q_norm)?;
        let (k, k_unnormed) = self.head_norm(heads(k)?, &self.k_norm)?;
        let q = geometry.rope.apply(&q, Turn::Forward)?;
        let k = geometry.rope.apply(&k, Turn::Forward)?;
        let v = heads(v)?;
        let attended = match past {
            None => attention::forward_at(&q, &k, &v, &geometry.segments, self.precision)?,
            Some(past) => attention::forward_cached(&q, &k, &v, geometry.segments.bounds(), past)?,
        };
        let attended_flat = attended.output.flatten_from(1)?;
        let ([o], low_o) = forward_kept([&self.o_proj], &attended_flat, self.pass(dropout, O))?;
        let h = add(x, &o)?;
        Ok(Attended { q_unnormed, k_unnormed, q, k, v, attended, attended_flat, h, low, low_o })
    }

    /// What gate and up make of h [n, H].
    fn feed(&self, h: &Tensor, dropout: Option<Dropout>) -> Result<Gated> {
        let h_normed = rms_norm::forward_rounded(h, &self.post_attention_layernorm, self.eps, self.rounding(dropout))?;
        let ([gate, up], low) = forward_kept([&self.gate_proj, &self.up_proj], &h_normed, self.pass(dropout, GATE))?;
        Ok(Gated { gate, up, low })
    }

    /// What a tensor that products alone read is rounded to at once: not at all where dropout comes between.
    fn rounding(&self, dropout: Option<Dropout>) -> Precision {
        if dropout.is_none() { self.precision } else { Precision::F32 }
    }

    /// x [T, heads, d] under its norm, and as [T · heads, d] without; x as it is where there is no norm.
    fn head_norm(&self, x: Tensor, w: &Option<Tensor>) -> Result<(Tensor, Option<Tensor>)> {
        let Some(w) = w else { return Ok((x, None)) };
        let rows = x.flatten_to(1)?;
        Ok((rms_norm::forward(&rows, w, self.eps)?.reshape(x.dims())?, Some(rows)))
    }

    /// dL/dx of [`head_norm`](Self::head_norm) from dL/dy [T, heads, d].
    fn head_norm_backward(&self, unnormed: &Option<Tensor>, w: &Option<Tensor>, dy: Tensor) -> Result<Tensor> {
        let (Some(x), Some(w)) = (unnormed, w) else { return Ok(dy) };
        rms_norm::backward(x, w, self.eps, &dy.flatten_to(1)?)?.reshape(dy.dims())
    }
}

/// Rows of parts, one after the other.
fn joined(parts: Vec<Tensor>) -> Result<Tensor> {
    match &parts[..] {
        [all] => Ok(all.clone()),
        parts => rows::joined(parts),
    }
}

/// The sum of the gradients of two parts of the rows.
fn summed(sum: Option<LoraGradient>, part: Option<LoraGradient>) -> Result<Option<LoraGradient>> {
    match (sum, part) {
        (Some(sum), Some(part)) => Ok(Some(LoraGradient { a: add(&sum.a, &part.a)?, b: add(&sum.b, &part.b)? })),
        (sum, part) => Ok(sum.or(part)),
    }
}
