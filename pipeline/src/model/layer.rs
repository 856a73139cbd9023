//! One decoder layer, forward and backward side by side. The backward starts from the layer's input and computes everything in
//! between once more, so that a run keeps only one tensor a layer (activation recomputation).
//!
//! ```text
//! x ─ input_layernorm ─ q,k,v ─ (q,k norm) ─ rope ─ attention ─ o ─(+x)─ h ─ post_attention_layernorm ─ gate,up ─ SwiGLU ─ down ─(+h)─ y
//! ```

use super::config::ModelConfig;
use crate::data::pack::Pack;
use crate::linear::{Linear, LoraGradient};
use crate::ops::attention::{self, Attended};
use crate::ops::rope::{Table, Turn};
use crate::ops::{rms_norm, swiglu};
use candle_core::{Result, Tensor};

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

/// Where a pack's conversations begin and how their positions turn; the same for every layer.
#[derive(Debug, Clone)]
pub struct Geometry {
    segments: Vec<u32>,
    rope: Table,
}

impl Geometry {
    /// The geometry of `pack` for a model.
    pub fn new(pack: &Pack, config: &ModelConfig) -> Self {
        Self { segments: pack.segments().to_vec(), rope: Table::new(&pack.positions(), config.head_dim, config.rope_theta) }
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
    pub(super) head_dim: usize,
    pub(super) eps: f64,
}

/// What lies between a layer's input and its output.
struct Between {
    normed: Tensor,
    /// q and k [T · heads, d] as they were before their norms; `None` without norms.
    q_unnormed: Option<Tensor>,
    k_unnormed: Option<Tensor>,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attended: Attended,
    attended_flat: Tensor,
    h: Tensor,
    h_normed: Tensor,
    gate: Tensor,
    up: Tensor,
    product: Tensor,
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

    /// y [T, H] of x [T, H], f32.
    pub fn forward(&self, x: &Tensor, geometry: &Geometry) -> Result<Tensor> {
        // Everything else is let go before the widest product.
        let Between { h, product, .. } = self.between(x, geometry)?;
        h + self.down_proj.forward(&product)?
    }

    /// From the layer's input x and dL/dy, both [T, H]: dL/dx, and the LoRA gradients in the order of [`PROJECTIONS`].
    pub fn backward(&self, x: &Tensor, dy: &Tensor, geometry: &Geometry) -> Result<(Tensor, [Option<LoraGradient>; 7])> {
        let s = self.between(x, geometry)?;
        let (d_product, down) = self.down_proj.backward(&s.product, dy)?;
        let (d_gate, d_up) = swiglu::backward(&s.gate, &s.up, &d_product)?;
        let (from_gate, gate) = self.gate_proj.backward(&s.h_normed, &d_gate)?;
        let (from_up, up) = self.up_proj.backward(&s.h_normed, &d_up)?;
        let d_h_normed = (from_gate + from_up)?;
        let dh = (dy + rms_norm::backward(&s.h, &self.post_attention_layernorm, self.eps, &d_h_normed)?)?;

        let (d_flat, o) = self.o_proj.backward(&s.attended_flat, &dh)?;
        let d_attended = d_flat.reshape(s.q.dims())?;
        let (dq, dk, dv) = attention::backward(&s.q, &s.k, &s.v, &s.attended, &d_attended, &geometry.segments)?;
        let flat = |t: Tensor| -> Result<Tensor> { t.flatten_from(1) };
        let dq = self.head_norm_backward(&s.q_unnormed, &self.q_norm, geometry.rope.apply(&dq, Turn::Backward)?)?;
        let dk = self.head_norm_backward(&s.k_unnormed, &self.k_norm, geometry.rope.apply(&dk, Turn::Backward)?)?;
        let (from_q, q) = self.q_proj.backward(&s.normed, &flat(dq)?)?;
        let (from_k, k) = self.k_proj.backward(&s.normed, &flat(dk)?)?;
        let (from_v, v) = self.v_proj.backward(&s.normed, &flat(dv)?)?;
        let d_normed = ((from_q + from_k)? + from_v)?;
        let dx = (dh + rms_norm::backward(x, &self.input_layernorm, self.eps, &d_normed)?)?;
        Ok((dx, [q, k, v, o, gate, up, down]))
    }

    fn between(&self, x: &Tensor, geometry: &Geometry) -> Result<Between> {
        let (t, _) = x.dims2()?;
        let heads = |y: Tensor| -> Result<Tensor> { y.reshape((t, (), self.head_dim)) };
        let normed = rms_norm::forward(x, &self.input_layernorm, self.eps)?;
        let (q, q_unnormed) = self.head_norm(heads(self.q_proj.forward(&normed)?)?, &self.q_norm)?;
        let (k, k_unnormed) = self.head_norm(heads(self.k_proj.forward(&normed)?)?, &self.k_norm)?;
        let q = geometry.rope.apply(&q, Turn::Forward)?;
        let k = geometry.rope.apply(&k, Turn::Forward)?;
        let v = heads(self.v_proj.forward(&normed)?)?;
        let attended = attention::forward(&q, &k, &v, &geometry.segments)?;
        let attended_flat = attended.output.flatten_from(1)?;
        let h = (x + self.o_proj.forward(&attended_flat)?)?;
        let h_normed = rms_norm::forward(&h, &self.post_attention_layernorm, self.eps)?;
        let (gate, up) = (self.gate_proj.forward(&h_normed)?, self.up_proj.forward(&h_normed)?);
        let product = swiglu::forward(&gate, &up)?;
        Ok(Between { normed, q_unnormed, k_unnormed, q, k, v, attended, attended_flat, h, h_normed, gate, up, product })
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
