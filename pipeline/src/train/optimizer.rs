//! Owns AdamW and gradient clipping over named f32 tensors, and their state for checkpoints. Refuses to know what the
//! tensors are and to decide about steps that are not finite.
//!
//! The one idea: every element is computed in f64 from f32 state and rounded once, elements never meet (in 8 bits: blocks never), and
//! the norm is added in a fixed order; so a step gives the same bits on any number of threads, before and after a resume. Values are
//! changed where they lie: neither an update nor clipping holds a second copy of anything.

mod blocks;
mod moments;

pub use blocks::BLOCK;

use crate::Error;
#[cfg(feature = "cuda")]
use crate::cuda::optimizer as gpu;
use crate::device::on_gpu;
use crate::model::ModelError;
use crate::model::weights::Weights;
use crate::ops::with_f32;
use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Tensor, bail};
use moments::Moments;
use potstill_cache::ErrorClass;
use rayon::prelude::*;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use std::cell::Cell;

/// The result of this file; other failures than the crate's are named.
type Result<T, E = Error> = std::result::Result<T, E>;

/// Added to the norm when clipping, as PyTorch's `clip_grad_norm_` does.
const NORM_FLOOR: f64 = 1e-6;
/// Name of the state tensor that counts updates.
const STEP_NAME: &str = "step";

/// How AdamW keeps its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub enum OptimizerKind {
    /// 8 bytes a parameter: both moments in f32.
    #[default]
    #[serde(rename = "adamw")]
    AdamW,
    /// 2.03 bytes a parameter: both moments in 8 bits, block by block, as bitsandbytes keeps them; small tensors in f32.
    #[serde(rename = "adamw-8bit")]
    AdamW8bit,
}

impl std::fmt::Display for OptimizerKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            OptimizerKind::AdamW => "adamw",
            OptimizerKind::AdamW8bit => "adamw-8bit",
        })
    }
}

/// AdamW's constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// How the state is kept.
    pub kind: OptimizerKind,
    /// Decay of the gradient's mean, 0 or above and below 1.
    pub beta1: f64,
    /// Decay of the gradient's squared mean, 0 or above and below 1.
    pub beta2: f64,
    /// Added to the root, above 0.
    pub eps: f64,
    /// Decoupled weight decay, 0 or above.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    /// PyTorch's constants without weight decay.
    fn default() -> Self {
        Self { kind: OptimizerKind::AdamW, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// AdamW over a fixed list of named tensors.
#[derive(Debug, Clone)]
pub struct AdamW {
    config: AdamWConfig,
    /// Updates done.
    step: u64,
    moments: Vec<Moments>,
}

/// Ways an update or a stored state can be wrong.
#[derive(Debug, thiserror::Error)]
pub enum OptimizerError {
    /// Lists of different lengths.
    #[error("optimizer: {what}: expected {expected}, found {found}")]
    Count {
        /// The list.
        what: &'static str,
        /// Tensors that the optimizer was made for.
        expected: usize,
        /// Tensors given.
        found: usize,
    },
    /// A tensor of another name, dtype or shape than the optimizer was made for.
    #[error("optimizer: {what}: expected {expected}, found {found}")]
    Tensor {
        /// Parameter or gradient.
        what: &'static str,
        /// Name, dtype and shape expected.
        expected: String,
        /// Name, dtype and shape given.
        found: String,
    },
    /// A stored state that fits no such optimizer.
    #[error("optimizer state: {0}")]
    State(ModelError),
    /// A stored state of other tensors.
    #[error("optimizer state: expected {expected} tensors, found {found}: it was saved for another adapter")]
    StateCount {
        /// Tensors this optimizer's state has.
        expected: usize,
        /// Tensors found.
        found: usize,
    },
    /// A stored step that is none.
    #[error("optimizer state: step {found}: expected 0 or above")]
    StateStep {
        /// The stored value.
        found: i64,
    },
}

impl OptimizerError {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        match self {
            OptimizerError::State(e) if e.class() != ErrorClass::Runtime => e.class(),
            OptimizerError::State(_) | OptimizerError::StateCount { .. } => ErrorClass::Mismatch,
            _ => ErrorClass::Runtime,
        }
    }
}

impl AdamW {
    /// An optimizer with zero state for these f32 tensors, in this order.
    ///
    /// Errors: a constant out of its range, a tensor that is not f32.
    pub fn new(config: AdamWConfig, parameters: &[(String, Tensor)]) -> Result<AdamW> {
        check(&config)?;
        let moments = parameters.iter().map(|(name, tensor)| Moments::new(config.kind, name, tensor));
        Ok(AdamW { config, step: 0, moments: moments.collect::<Result<_>>()? })
    }

    /// Updates done so far.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// One update with learning rate `rate`. The parameters' values change where they lie, so every tensor that shares their memory
    /// sees it.
    ///
    /// With t counting updates from 1: p ← p (1 − rate · wd); m ← β₁ m + (1 − β₁) g; v ← β₂ v + (1 − β₂) g²;
    /// p ← p − rate · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε). (Loshchilov and Hutter, 2019; as `torch.optim.AdamW`.)
    /// In 8 bits m and v are then rounded (`blocks.rs`).
    ///
    /// Gradients stand in the parameters' order and share no memory with them. Errors: a list or tensor that does not fit, a parameter
    /// that is not contiguous, and nothing is changed then.
    pub fn step(&mut self, parameters: &[(String, Tensor)], gradients: &[Tensor], rate: f64) -> Result<()> {
        let expected = self.moments.len();
        for (what, found) in [("parameters", parameters.len()), ("gradients", gradients.len())] {
            if found != expected {
                return Err(OptimizerError::Count { what, expected, found }.into());
            }
        }
        for ((moments, (name, parameter)), gradient) in self.moments.iter().zip(parameters).zip(gradients) {
            moments.fits("parameter", Some(name), parameter)?;
            moments.fits("gradient", None, gradient)?;
            if !parameter.is_contiguous() {
                return Err(candle_core::Error::Msg(format!("optimizer: {name} does not lie row by row")).into());
            }
        }
        let update = Update::new(&self.config, self.step + 1, rate);
        self.step += 1;
        for ((moments, (_, parameter)), gradient) in self.moments.iter_mut().zip(parameters).zip(gradients) {
            moments.update(&update, parameter, gradient)?;
        }
        Ok(())
    }

    /// The state for a checkpoint, on the CPU: `NAME.m` and `NAME.v` (the parameter's shape; f32, or u8 with `NAME.m.absmax` and
    /// `NAME.v.absmax`, f32, one a block) and `step` (i64 `[1]`).
    pub fn state_tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = Vec::with_capacity(4 * self.moments.len() + 1);
        for moments in &self.moments {
            tensors.extend(moments.tensors()?);
        }
        tensors.push((STEP_NAME.into(), Tensor::from_vec(vec![self.step as i64], 1, &Device::Cpu)?));
        Ok(tensors)
    }

    /// Takes over a state saved from [`state_tensors`](Self::state_tensors). Errors: it was saved for other tensors or another kind;
    /// nothing is changed then.
    pub fn load_state(&mut self, state: &Weights) -> Result<()> {
        let expected = self.moments.iter().map(Moments::count).sum::<usize>() + 1;
        let found = state.names().count();
        if expected != found {
            return Err(OptimizerError::StateCount { expected, found }.into());
        }
        let step = state.bytes(STEP_NAME, Dtype::I64, &[1]).map_err(OptimizerError::State)?;
        let step = step.first_chunk().map(|bytes| i64::from_le_bytes(*bytes)).unwrap_or(-1);
        let step = u64::try_from(step).map_err(|_| OptimizerError::StateStep { found: step })?;
        let loaded = self.moments.iter().map(|moments| moments.loaded(state)).collect::<Result<Vec<_>>>()?;
        (self.step, self.moments) = (step, loaded);
        Ok(())
    }
}

/// Scales all gradients, where they lie, by `max_norm / (norm + 1e-6)` where that is below 1, and gives the norm before: the L2 norm
/// over all elements of all tensors, added in f64 in a fixed order.
///
/// A `max_norm` of 0 only measures. Where the norm is not finite nothing is scaled. Errors: a tensor that is not f32.
pub fn clip(gradients: &mut [Tensor], max_norm: f64) -> Result<f64> {
    for gradient in gradients.iter_mut() {
        // What is scaled below must lie row by row; what a matrix product gave does.
        *gradient = gradient.contiguous()?;
    }
    let norm = squares(gradients)?.iter().sum::<f64>().sqrt();
    let factor = max_norm / (norm + NORM_FLOOR);
    if max_norm > 0.0 && norm.is_finite() && factor < 1.0 {
        for gradient in gradients.iter() {
            scale(gradient, factor)?;
        }
    }
    Ok(norm)
}

/// The sum of each tensor's squares. The tensors are on one device.
fn squares(tensors: &[Tensor]) -> candle_core::Result<Vec<f64>> {
    #[cfg(feature = "cuda")]
    if tensors.first().is_some_and(|first| first.device().is_cuda()) {
        return gpu::squares(tensors);
    }
    let squares = |t: &Tensor| with_f32(t, |t| Ok(t.iter().map(|v| f64::from(*v) * f64::from(*v)).sum()));
    tensors.iter().map(squares).collect()
}

/// Multiplies a tensor by `factor`, where it lies.
fn scale(t: &Tensor, factor: f64) -> candle_core::Result<()> {
    on_gpu!(t => gpu::scale(t, factor));
    in_place(t, |t| t.par_iter_mut().for_each(|v| *v = (f64::from(*v) * factor) as f32))
}

/// Work on a tensor's own memory, done once.
struct InPlace<F>(Cell<Option<F>>);

impl<F: FnOnce(&mut [f32])> InplaceOp1 for InPlace<F> {
    fn name(&self) -> &'static str {
        "optimizer"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let (CpuStorage::F32(values), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            bail!("optimizer: expected contiguous f32 values");
        };
        if let (Some(work), Some(values)) = (self.0.take(), values.get_mut(start..end)) {
            work(values);
        }
        Ok(())
    }
}

/// Runs `work` on the values of a contiguous f32 tensor, row-major, where they lie.
fn in_place(tensor: &Tensor, work: impl FnOnce(&mut [f32])) -> candle_core::Result<()> {
    tensor.inplace_op1(&InPlace(Cell::new(Some(work))))
}

/// The constants of one update.
struct Update {
    beta1: f64,
    beta2: f64,
    eps: f64,
    /// 1 − rate · weight decay.
    keep: f64,
    rate: f64,
    /// 1 − β₁ᵗ and 1 − β₂ᵗ.
    correction: (f64, f64),
}

impl Update {
    fn new(config: &AdamWConfig, t: u64, rate: f64) -> Update {
        let AdamWConfig { beta1, beta2, eps, weight_decay, .. } = *config;
        let correction = (1.0 - beta1.powf(t as f64), 1.0 - beta2.powf(t as f64));
        Update { beta1, beta2, eps, keep: 1.0 - rate * weight_decay, rate, correction }
    }

    /// As the GPU's kernel takes them.
    #[cfg(feature = "cuda")]
    fn constants(&self) -> [f64; 7] {
        [self.beta1, self.beta2, self.eps, self.keep, self.rate, self.correction.0, self.correction.1]
    }

    fn apply(&self, p: &mut f32, g: f32, m: &mut f32, v: &mut f32) {
        let g = f64::from(g);
        *m = (self.beta1 * f64::from(*m) + (1.0 - self.beta1) * g) as f32;
        *v = (self.beta2 * f64::from(*v) + (1.0 - self.beta2) * g * g) as f32;
        let root = (f64::from(*v) / self.correction.1).sqrt() + self.eps;
        *p = (f64::from(*p) * self.keep - self.rate * (f64::from(*m) / self.correction.0) / root) as f32;
    }
}

fn check(config: &AdamWConfig) -> Result<()> {
    let refuse =
        |name, found: f64, expected: &str| Err(Error::Setting { name, found: found.to_string(), expected: expected.into() });
    for (name, beta) in [("beta1", config.beta1), ("beta2", config.beta2)] {
        if !(0.0..1.0).contains(&beta) {
            return refuse(name, beta, "0 or above and below 1");
        }
    }
    if !(config.eps.is_finite() && config.eps > 0.0) {
        return refuse("eps", config.eps, "a finite number above 0");
    }
    if !(config.weight_decay.is_finite() && config.weight_decay >= 0.0) {
        return refuse("weight_decay", config.weight_decay, "a finite number, 0 or above");
    }
    Ok(())
}
