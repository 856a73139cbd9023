//! Owns AdamW and gradient clipping over named f32 tensors, and their state for checkpoints. Refuses to know what the
//! tensors are and to decide about steps that are not finite.
//!
//! The one idea: every element is computed in f64 from f32 state and rounded once, elements never meet, and the norm is
//! added in a fixed order; so a step gives the same bits on any number of threads, before and after a resume.

use crate::Error;
use crate::model::ModelError;
use crate::model::weights::Weights;
use candle_core::{DType, Device, Tensor};
use potstill_cache::ErrorClass;
use rayon::prelude::*;
use safetensors::Dtype;

/// The result of this file; other failures than the crate's are named.
type Result<T, E = Error> = std::result::Result<T, E>;

/// Added to the norm when clipping, as PyTorch's `clip_grad_norm_` does.
const NORM_FLOOR: f64 = 1e-6;
/// Name of the state tensor that counts updates.
const STEP_NAME: &str = "step";

/// AdamW's constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
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
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
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

/// State of one tensor.
#[derive(Debug, Clone)]
struct Moments {
    name: String,
    shape: Vec<usize>,
    m: Vec<f32>,
    v: Vec<f32>,
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
        let moments = parameters
            .iter()
            .map(|(name, tensor)| {
                let (shape, zeros) = (tensor.dims().to_vec(), vec![0.0; tensor.elem_count()]);
                let moments = Moments { name: name.clone(), shape, m: zeros.clone(), v: zeros };
                moments.fits("parameter", Some(name), tensor).map(|()| moments)
            })
            .collect::<std::result::Result<_, _>>()?;
        Ok(AdamW { config, step: 0, moments })
    }

    /// Updates done so far.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// One update with learning rate `rate`; every parameter is replaced by a new tensor on its device.
    ///
    /// With t counting updates from 1: p ← p (1 − rate · wd); m ← β₁ m + (1 − β₁) g; v ← β₂ v + (1 − β₂) g²;
    /// p ← p − rate · (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε). (Loshchilov and Hutter, 2019; as `torch.optim.AdamW`.)
    ///
    /// Gradients stand in the parameters' order. Errors: a list or tensor that does not fit, and nothing is
    /// changed then; a device that is full.
    pub fn step(&mut self, parameters: &mut [(String, Tensor)], gradients: &[Tensor], rate: f64) -> Result<()> {
        let expected = self.moments.len();
        for (what, found) in [("parameters", parameters.len()), ("gradients", gradients.len())] {
            if found != expected {
                return Err(OptimizerError::Count { what, expected, found }.into());
            }
        }
        for ((moments, (name, parameter)), gradient) in self.moments.iter().zip(&*parameters).zip(gradients) {
            moments.fits("parameter", Some(name), parameter)?;
            moments.fits("gradient", None, gradient)?;
        }
        let update = Update::new(&self.config, self.step + 1, rate);
        let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        self.step += 1;
        // One tensor at a time, so that only one is held twice.
        for ((moments, (_, parameter)), gradient) in self.moments.iter_mut().zip(parameters).zip(gradients) {
            let (mut p, g) = (values(parameter)?, values(gradient)?);
            let state = moments.m.par_iter_mut().zip(&mut moments.v);
            p.par_iter_mut().zip(&g).zip(state).for_each(|((p, g), (m, v))| update.apply(p, *g, m, v));
            *parameter = Tensor::from_vec(p, parameter.shape(), parameter.device())?;
        }
        Ok(())
    }

    /// The state for a checkpoint, on the CPU: `NAME.m` and `NAME.v` (f32, the parameter's shape) and `step` (i64 `[1]`).
    pub fn state_tensors(&self) -> Result<Vec<(String, Tensor)>> {
        let mut tensors = Vec::with_capacity(2 * self.moments.len() + 1);
        for Moments { name, shape, m, v } in &self.moments {
            for (kind, values) in [("m", m), ("v", v)] {
                let tensor = Tensor::from_slice(values, shape.as_slice(), &Device::Cpu)?;
                tensors.push((format!("{name}.{kind}"), tensor));
            }
        }
        tensors.push((STEP_NAME.into(), Tensor::from_vec(vec![self.step as i64], 1, &Device::Cpu)?));
        Ok(tensors)
    }

    /// Takes over a state saved from [`state_tensors`](Self::state_tensors). Errors: it was saved for other tensors; nothing is
    /// changed then.
    pub fn load_state(&mut self, state: &Weights) -> Result<()> {
        let (expected, found) = (2 * self.moments.len() + 1, state.names().count());
        if expected != found {
            return Err(OptimizerError::StateCount { expected, found }.into());
        }
        let step = state.bytes(STEP_NAME, Dtype::I64, &[1]).map_err(OptimizerError::State)?;
        let step = step.first_chunk().map(|bytes| i64::from_le_bytes(*bytes)).unwrap_or(-1);
        let step = u64::try_from(step).map_err(|_| OptimizerError::StateStep { found: step })?;
        let read = |name: String, shape: &[usize]| -> Result<Vec<f32>, OptimizerError> {
            let bytes = state.bytes(&name, Dtype::F32, shape).map_err(OptimizerError::State)?;
            Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        };
        let loaded = self
            .moments
            .iter()
            .map(|Moments { name, shape, .. }| {
                let (m, v) = (read(format!("{name}.m"), shape)?, read(format!("{name}.v"), shape)?);
                Ok(Moments { name: name.clone(), shape: shape.clone(), m, v })
            })
            .collect::<Result<Vec<_>, OptimizerError>>()?;
        (self.step, self.moments) = (step, loaded);
        Ok(())
    }
}

/// Scales all gradients by `max_norm / (norm + 1e-6)` where that is below 1, and gives the norm before: the L2 norm over all
/// elements of all tensors, added in f64 in a fixed order.
///
/// A `max_norm` of 0 only measures. Where the norm is not finite nothing is scaled. Errors: a tensor that is not f32.
pub fn clip(gradients: &mut [Tensor], max_norm: f64) -> Result<f64> {
    let mut squares = Vec::with_capacity(gradients.len());
    for gradient in gradients.iter() {
        let values = gradient.flatten_all()?.to_vec1::<f32>()?;
        squares.push(values.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>());
    }
    let norm = squares.iter().sum::<f64>().sqrt();
    let factor = max_norm / (norm + NORM_FLOOR);
    if max_norm > 0.0 && norm.is_finite() && factor < 1.0 {
        for gradient in gradients.iter_mut() {
            *gradient = gradient.affine(factor, 0.0)?;
        }
    }
    Ok(norm)
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
        let AdamWConfig { beta1, beta2, eps, weight_decay } = *config;
        let correction = (1.0 - beta1.powf(t as f64), 1.0 - beta2.powf(t as f64));
        Update { beta1, beta2, eps, keep: 1.0 - rate * weight_decay, rate, correction }
    }

    fn apply(&self, p: &mut f32, g: f32, m: &mut f32, v: &mut f32) {
        let g = f64::from(g);
        *m = (self.beta1 * f64::from(*m) + (1.0 - self.beta1) * g) as f32;
        *v = (self.beta2 * f64::from(*v) + (1.0 - self.beta2) * g * g) as f32;
        let root = (f64::from(*v) / self.correction.1).sqrt() + self.eps;
        *p = (f64::from(*p) * self.keep - self.rate * (f64::from(*m) / self.correction.0) / root) as f32;
    }
}

impl Moments {
    fn fits(&self, what: &'static str, name: Option<&String>, tensor: &Tensor) -> Result<(), OptimizerError> {
        if tensor.dtype() == DType::F32 && tensor.dims() == self.shape && name.is_none_or(|name| *name == self.name) {
            return Ok(());
        }
        let expected = format!("{} F32 {:?}", self.name, self.shape);
        let found = format!("{} {:?} {:?}", name.unwrap_or(&self.name), tensor.dtype(), tensor.dims());
        Err(OptimizerError::Tensor { what, expected, found })
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
