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
pub mod rows;
pub mod swiglu;
mod weights;

#[cfg(feature = "cuda")]
use crate::cuda::blocks;
use crate::device::on_gpu;
use crate::kernel::vectorised;
use candle_core::{CpuStorage, Result, Storage, Tensor, bail};
use rayon::prelude::*;
use std::ops::{Deref, Range};

/// Elements that a thread takes at a time where each costs little.
const STRIDE: usize = 1 << 14;

/// x + y, f32 of one shape.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    combined(("add", "add"), x, y, add_both)
}

/// What `combine`, or the kernel on a GPU, writes of stretches of x and y, of one shape.
fn combined(
    (name, kernel): (&str, &'static str),
    x: &Tensor,
    y: &Tensor,
    combine: fn(&[f32], &[f32], &mut [f32]),
) -> Result<Tensor> {
    if x.dims() != y.dims() {
        bail!("{name}: {:?} and {:?} do not fit", x.dims(), y.dims());
    }
    on_gpu!(x => blocks::elementwise(kernel, x, y));
    let _ = kernel;
    let (xs, ys) = (floats(x)?, floats(y)?);
    let mut values = vec![0f32; xs.len()];
    let stretches = values.par_chunks_mut(STRIDE).zip(xs.par_chunks(STRIDE)).zip(ys.par_chunks(STRIDE));
    stretches.for_each(|((values, x), y)| combine(x, y, values));
    Tensor::from_vec(values, x.dims(), x.device())
}

vectorised! {
    fn add_both(x: &[f32], y: &[f32], sum: &mut [f32]) {
        for ((sum, x), y) in sum.iter_mut().zip(x).zip(y) {
            *sum = x + y;
        }
    }
}

/// A tensor's f32 values, row-major.
pub struct Floats<'a> {
    /// The tensor's lock, whose type is not ours to name.
    storage: Box<dyn Deref<Target = Storage> + 'a>,
    place: Range<usize>,
}

impl Deref for Floats<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &**self.storage {
            Storage::Cpu(CpuStorage::F32(values)) => &values[self.place.clone()],
            _ => &[],
        }
    }
}

/// The tensor's values, row-major. Errors unless it is f32, contiguous and on the CPU.
pub fn floats(t: &Tensor) -> Result<Floats<'_>> {
    let (storage, layout) = t.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(_)), Some((start, end))) => Ok(Floats { storage: Box::new(storage), place: start..end }),
        (Storage::Cpu(_), Some(_)) => bail!("expected f32 values, found {:?}", t.dtype()),
        (_, None) => bail!("expected a contiguous tensor, found strides {:?} for shape {:?}", layout.stride(), t.dims()),
        _ => bail!("expected a tensor on the CPU, found one on {:?}", t.device().location()),
    }
}

/// Runs `f` on [`floats`].
pub fn with_f32<R>(t: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    f(&floats(t)?)
}
