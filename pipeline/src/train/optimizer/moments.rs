//! Owns the two moments of each tensor: kept in f32 or in 8-bit blocks, updated, written for a checkpoint and read back.

use super::blocks::{BLOCK, Blocks};
use super::{OptimizerError, OptimizerKind, Update, in_place};
use crate::Result;
#[cfg(feature = "cuda")]
use crate::cuda::optimizer as gpu;
use crate::dynamic_map::Sign;
use crate::model::weights::Weights;
use crate::ops::with_f32;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use safetensors::Dtype;

/// Tensors of fewer values keep f32 state in the 8-bit optimiser, as in bitsandbytes.
pub(super) const LEAST_IN_BLOCKS: usize = 4096;
/// Blocks that a thread takes at a time.
const BLOCKS_AT_ONCE: usize = 16;

/// State of one tensor.
#[derive(Debug, Clone)]
pub(super) struct Moments {
    name: String,
    shape: Vec<usize>,
    kept: Kept,
}

/// How the moments are kept.
#[derive(Debug, Clone)]
enum Kept {
    Floats {
        m: Vec<f32>,
        v: Vec<f32>,
    },
    /// On a GPU, beside the parameter and in its shape.
    #[cfg(feature = "cuda")]
    Placed {
        m: Tensor,
        v: Tensor,
    },
    Blocks {
        m: Blocks,
        v: Blocks,
    },
}

impl Moments {
    /// Zeros for this tensor. Errors: it is not f32.
    pub(super) fn new(kind: OptimizerKind, name: &String, tensor: &Tensor) -> Result<Self> {
        let n = tensor.elem_count();
        let kept = match kind {
            OptimizerKind::AdamW8bit if n >= LEAST_IN_BLOCKS => {
                Kept::Blocks { m: Blocks::zeros(Sign::Signed, n), v: Blocks::zeros(Sign::Unsigned, n) }
            }
            #[cfg(feature = "cuda")]
            _ if tensor.device().is_cuda() => Kept::Placed { m: tensor.zeros_like()?, v: tensor.zeros_like()? },
            _ => Kept::Floats { m: vec![0.0; n], v: vec![0.0; n] },
        };
        let moments = Self { name: name.clone(), shape: tensor.dims().to_vec(), kept };
        moments.fits("parameter", Some(name), tensor)?;
        Ok(moments)
    }

    /// Errors: another name, dtype or shape.
    pub(super) fn fits(
        &self,
        what: &'static str,
        name: Option<&String>,
        tensor: &Tensor,
    ) -> std::result::Result<(), OptimizerError> {
        if tensor.dtype() == DType::F32 && tensor.dims() == self.shape && name.is_none_or(|name| *name == self.name) {
            return Ok(());
        }
        let expected = format!("{} F32 {:?}", self.name, self.shape);
        let found = format!("{} {:?} {:?}", name.unwrap_or(&self.name), tensor.dtype(), tensor.dims());
        Err(OptimizerError::Tensor { what, expected, found })
    }

    /// Updates the parameter's values, where they lie, by the gradient, and the moments.
    pub(super) fn update(&mut self, update: &Update, parameter: &Tensor, gradient: &Tensor) -> Result<()> {
        #[cfg(feature = "cuda")]
        if let Kept::Placed { m, v } = &self.kept {
            return Ok(gpu::adamw(update.constants(), parameter, &gradient.contiguous()?, (m, v))?);
        }
        #[cfg(feature = "cuda")]
        if parameter.device().is_cuda() {
            // Moments in 8 bits are kept by the host.
            let gradient = gradient.to_device(&Device::Cpu)?;
            return Ok(gpu::on_host(parameter, |parameter| self.update_host(update, parameter, &gradient))?);
        }
        Ok(self.update_host(update, parameter, gradient)?)
    }

    fn update_host(&mut self, update: &Update, parameter: &Tensor, gradient: &Tensor) -> candle_core::Result<()> {
        with_f32(&gradient.contiguous()?, |g| in_place(parameter, |p| self.update_values(update, p, g)))
    }

    fn update_values(&mut self, update: &Update, p: &mut [f32], g: &[f32]) {
        match &mut self.kept {
            #[cfg(feature = "cuda")]
            Kept::Placed { .. } => {}
            Kept::Floats { m, v } => {
                let state = m.par_iter_mut().zip(v);
                p.par_iter_mut().zip(g).zip(state).for_each(|((p, g), (m, v))| update.apply(p, *g, m, v));
            }
            // The parameter moves by the moments as they are before they are rounded.
            Kept::Blocks { m, v } => {
                let values = p.par_chunks_mut(BLOCK).zip(g.par_chunks(BLOCK)).with_min_len(BLOCKS_AT_ONCE);
                values.zip(m.each().zip(v.each())).for_each(|((p, g), (mut m, mut v))| {
                    let (mut ms, mut vs) = (m.read(), v.read());
                    for (((p, g), m), v) in p.iter_mut().zip(g).zip(&mut ms).zip(&mut vs) {
                        update.apply(p, *g, m, v);
                    }
                    m.write(&ms);
                    v.write(&vs);
                });
            }
        }
    }

    /// Number of tensors that [`tensors`](Self::tensors) gives.
    pub(super) fn count(&self) -> usize {
        match self.kept {
            Kept::Blocks { .. } => 4,
            _ => 2,
        }
    }

    /// `NAME.m` and `NAME.v`, in the parameter's shape: f32, or u8 codes with `NAME.m.absmax` and `NAME.v.absmax` f32 `[blocks]`.
    pub(super) fn tensors(&self) -> candle_core::Result<Vec<(String, Tensor)>> {
        let named = |kind: &str| format!("{}.{kind}", self.name);
        let shape = self.shape.as_slice();
        let blocks = |kind: &str, blocks: &Blocks| {
            let codes = Tensor::from_slice(&blocks.codes, shape, &Device::Cpu)?;
            let absmax = Tensor::from_slice(&blocks.absmax, blocks.absmax.len(), &Device::Cpu)?;
            Ok::<_, candle_core::Error>([(named(kind), codes), (named(&format!("{kind}.absmax")), absmax)])
        };
        Ok(match &self.kept {
            Kept::Floats { m, v } => vec![
                (named("m"), Tensor::from_slice(m, shape, &Device::Cpu)?),
                (named("v"), Tensor::from_slice(v, shape, &Device::Cpu)?),
            ],
            #[cfg(feature = "cuda")]
            Kept::Placed { m, v } => vec![(named("m"), m.to_device(&Device::Cpu)?), (named("v"), v.to_device(&Device::Cpu)?)],
            Kept::Blocks { m, v } => [blocks("m", m)?, blocks("v", v)?].into_iter().flatten().collect(),
        })
    }

    /// The same tensor's moments as `state` has them. Errors: they are not there, or of another dtype or shape.
    pub(super) fn loaded(&self, state: &Weights) -> Result<Self> {
        let floats = |name: String, shape: &[usize]| {
            let bytes = state.bytes(&name, Dtype::F32, shape).map_err(OptimizerError::State)?;
            Ok::<_, OptimizerError>(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<f32>>())
        };
        let blocks = |kind: &str, sign: Sign, like: &Blocks| {
            let name = format!("{}.{kind}", self.name);
            let codes = state.bytes(&name, Dtype::U8, &self.shape).map_err(OptimizerError::State)?.to_vec();
            Ok::<_, OptimizerError>(Blocks::of(sign, codes, floats(format!("{name}.absmax"), &[like.absmax.len()])?))
        };
        let kept = match &self.kept {
            Kept::Floats { .. } => Kept::Floats {
                m: floats(format!("{}.m", self.name), &self.shape)?,
                v: floats(format!("{}.v", self.name), &self.shape)?,
            },
            #[cfg(feature = "cuda")]
            Kept::Placed { m, .. } => {
                let placed = |values: Vec<f32>| Tensor::from_vec(values, m.dims(), m.device());
                Kept::Placed {
                    m: placed(floats(format!("{}.m", self.name), &self.shape)?)?,
                    v: placed(floats(format!("{}.v", self.name), &self.shape)?)?,
                }
            }
            Kept::Blocks { m, v } => Kept::Blocks { m: blocks("m", Sign::Signed, m)?, v: blocks("v", Sign::Unsigned, v)? },
        };
        Ok(Self { name: self.name.clone(), shape: self.shape.clone(), kept })
    }
}
