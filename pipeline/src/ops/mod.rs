//! The decoder's blocks beside the linear layers: norm, rotary, attention, SwiGLU, each file a forward, its backward and the
//! formula; and what a cache keeps of logits. The CPU code is the definition. All of it is f32 on contiguous tensors.
//!
//! A backward takes what the forward took (or what it saved) and dL/dy, and gives dL/dx. Nothing here knows of models or losses.

pub mod attention;
pub mod capture;
pub mod draw;
pub mod exponential;
mod largest;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
pub(crate) mod vectors;
mod weights;

use candle_core::{CpuStorage, Result, Storage, Tensor, bail};

/// Runs `f` on the tensor's values, row-major. Errors unless it is f32, contiguous and on the CPU.
pub fn with_f32<R>(t: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let (storage, layout) = t.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => f(&values[start..end]),
        (Storage::Cpu(_), Some(_)) => bail!("expected f32 values, found {:?}", t.dtype()),
        (_, None) => bail!("expected a contiguous tensor, found strides {:?} for shape {:?}", layout.stride(), t.dims()),
        _ => bail!("expected a tensor on the CPU, found one on {:?}", t.device().location()),
    }
}
