//! AdamW and the gradients' norm on the GPU; `train/optimizer.rs` has the formulas and the CPU's definition.

use super::launch::{Argument, Grid, device_of, floats, launch, overwrite, place, room};
use crate::ops::with_f32;
use candle_core::{DType, Device, Result, Tensor};

/// Values whose squares one block of `sum_squares` adds up.
const STRETCH: usize = 16_384;

/// Changes w, m and v where they lie; all of one shape, g too. `constants` are those of an update, in the kernel's order.
pub(crate) fn adamw(constants: [f64; 7], w: &Tensor, g: &Tensor, (m, v): (&Tensor, &Tensor)) -> Result<()> {
    let (device, n) = (device_of(w)?, w.elem_count());
    let places = [floats(w)?, floats(g)?, floats(m)?, floats(v)?, Argument::Long(n as i64)];
    let constants = constants.map(Argument::Double);
    // SAFETY: four times n elements, as the caller compared.
    unsafe { launch(&device, "adamw", Grid::flat(n), &[&places[..], &constants].concat()) }
}

/// The sum of the squares of each tensor, added in f64 in a fixed order. Waits for the GPU.
pub(crate) fn squares(tensors: &[Tensor]) -> Result<Vec<f64>> {
    let Some(first) = tensors.first() else { return Ok(Vec::new()) };
    let device = device_of(first)?;
    let blocks = |t: &Tensor| t.elem_count().div_ceil(STRETCH);
    let partials = room(tensors.iter().map(blocks).sum::<usize>(), DType::F64, &device)?;
    let mut start = 0;
    for t in tensors {
        let out = partials.narrow(0, start, blocks(t))?;
        let arguments = [floats(t)?, place(&out, DType::F64)?, Argument::Long(t.elem_count() as i64)];
        // SAFETY: a block for every stretch of values, each with a place of its own.
        unsafe { launch(&device, "sum_squares", Grid::blocks(blocks(t)), &arguments) }?;
        start += blocks(t);
    }
    let partials = partials.to_vec1::<f64>()?;
    let mut rest = &partials[..];
    Ok(tensors
        .iter()
        .map(|t| {
            let (own, others) = rest.split_at(blocks(t));
            rest = others;
            own.iter().sum()
        })
        .collect())
}

/// Multiplies a tensor by `factor`, where it lies.
pub(crate) fn scale(t: &Tensor, factor: f64) -> Result<()> {
    let (device, n) = (device_of(t)?, t.elem_count());
    let arguments = [floats(t)?, Argument::Double(factor), Argument::Long(n as i64)];
    // SAFETY: n elements.
    unsafe { launch(&device, "scale", Grid::flat(n), &arguments) }
}

/// Runs `work` on the values of a tensor in the host's memory, and puts them back where they lie.
pub(crate) fn on_host(t: &Tensor, work: impl FnOnce(&Tensor) -> Result<()>) -> Result<()> {
    let values = t.to_device(&Device::Cpu)?.contiguous()?;
    work(&values)?;
    with_f32(&values, |values| overwrite(t, values))
}
