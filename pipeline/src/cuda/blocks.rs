//! The decoder's blocks on the GPU beside linear layers and attention: each is one launch. Formulas and the CPU's definitions are in `ops/`
//! and `linear/dropout.rs`; shapes were checked there.

use super::launch::{Argument, Grid, copy, device_of, floats, launch, place, room};
use crate::kernel::Precision;
use crate::linear::dropout::RowMask;
use candle_core::{DType, Result, Tensor, bail};

fn int(value: usize) -> Argument {
    Argument::Int(value as i32)
}

/// What `kernel` (x, y, out, n) makes of x and y of one shape, f32.
pub(crate) fn elementwise(kernel: &'static str, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    pairwise((kernel, DType::F32), x, y)
}

fn pairwise((kernel, dtype): (&'static str, DType), x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (device, n) = (device_of(x)?, x.elem_count());
    let out = room(x.shape(), dtype, &device)?;
    let arguments = [floats(x)?, floats(y)?, place(&out, dtype)?, Argument::Long(n as i64)];
    // SAFETY: the caller compared the shapes; three times n elements.
    unsafe { launch(&device, kernel, Grid::flat(n), &arguments) }?;
    Ok(out)
}

/// SwiGLU of g and u of one shape, rounded to bf16.
pub(crate) fn swiglu_bf16(g: &Tensor, u: &Tensor) -> Result<Tensor> {
    pairwise(("swiglu_forward_bf16", DType::BF16), g, u)
}

/// (dL/dg, dL/du) of SwiGLU.
pub(crate) fn swiglu_backward(g: &Tensor, u: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let (device, n) = (device_of(g)?, g.elem_count());
    let (dg, du) = (room(g.shape(), DType::F32, &device)?, room(g.shape(), DType::F32, &device)?);
    let arguments = [floats(g)?, floats(u)?, floats(dy)?, floats(&dg)?, floats(&du)?, Argument::Long(n as i64)];
    // SAFETY: the caller compared the shapes; five times n elements.
    unsafe { launch(&device, "swiglu_backward", Grid::flat(n), &arguments) }?;
    Ok((dg, du))
}

/// The norm of x [T, H] with w `[H]`, rounded to `precision`.
pub(crate) fn rms_norm(x: &Tensor, w: &Tensor, eps: f64, precision: Precision) -> Result<Tensor> {
    let (device, (t, h)) = (device_of(x)?, x.dims2()?);
    let (kernel, dtype) = match precision {
        Precision::F32 => ("rms_norm_forward", DType::F32),
        Precision::Bf16 => ("rms_norm_forward_bf16", DType::BF16),
    };
    let y = room((t, h), dtype, &device)?;
    let arguments = [floats(x)?, floats(w)?, place(&y, dtype)?, int(t), int(h), Argument::Double(eps)];
    // SAFETY: x and y are [t, h], w `[h]`, as the caller checked.
    unsafe { launch(&device, kernel, Grid::blocks(t), &arguments) }?;
    Ok(y)
}

/// Its backward from dL/dy [T, H].
pub(crate) fn rms_norm_backward(x: &Tensor, w: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    let (device, (t, h)) = (device_of(x)?, x.dims2()?);
    let dx = room((t, h), DType::F32, &device)?;
    let arguments = [floats(x)?, floats(w)?, floats(dy)?, floats(&dx)?, int(t), int(h), Argument::Double(eps)];
    // SAFETY: x, dy and dx are [t, h], w `[h]`, as the caller checked.
    unsafe { launch(&device, "rms_norm_backward", Grid::blocks(t), &arguments) }?;
    Ok(dx)
}

/// x [T, heads, d] turned by a table f32 [T, d/2], forwards with `sign` 1, back with -1.
pub(crate) fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, sign: f32) -> Result<Tensor> {
    let (device, (t, heads, d)) = (device_of(x)?, x.dims3()?);
    let y = room((t, heads, d), DType::F32, &device)?;
    let sizes = [int(t), int(heads), int(d / 2)];
    let places = [floats(x)?, floats(cos)?, floats(sin)?, Argument::Float(sign), floats(&y)?];
    let arguments = [&places[..], &sizes].concat();
    // SAFETY: x and y are [t, heads, d], the table [t, d / 2], as the caller checked.
    unsafe { launch(&device, "rope", Grid::blocks(t), &arguments) }?;
    Ok(y)
}

/// Has each row of y [T, H] become `row` `[H]`.
pub(super) fn broadcast_rows(row: &Tensor, y: &Tensor) -> Result<()> {
    let (device, (t, h)) = (device_of(y)?, y.dims2()?);
    if row.dims() != [h] {
        bail!("linear: a bias of {} values does not fit {h} outputs", row.elem_count());
    }
    // SAFETY: y is [t, h] and the row `[h]`.
    unsafe { launch(&device, "broadcast_rows", Grid::blocks(t), &[floats(row)?, floats(y)?, int(t), int(h)]) }
}

/// y[i] = x[rows[i]]; `rows` u32 `[n]` are all below T.
pub(crate) fn gather(x: &Tensor, rows: &Tensor) -> Result<Tensor> {
    let (device, (_, h), n) = (device_of(x)?, x.dims2()?, rows.elem_count());
    let y = room((n, h), DType::F32, &device)?;
    let arguments = [floats(x)?, place(rows, DType::U32)?, floats(&y)?, int(n), int(h)];
    // SAFETY: y has n rows; the caller's promise about the numbers.
    unsafe { launch(&device, "gather_rows", Grid::blocks(n), &arguments) }?;
    Ok(y)
}

/// [`all`, H] of zeros, but y[rows[i]] = x[i]; `rows` are distinct and below `all`.
pub(crate) fn scatter(x: &Tensor, rows: &Tensor, all: usize) -> Result<Tensor> {
    let (device, (n, h)) = (device_of(x)?, x.dims2()?);
    let y = Tensor::zeros((all, h), DType::F32, x.device())?;
    let arguments = [floats(x)?, place(rows, DType::U32)?, floats(&y)?, int(n), int(h)];
    // SAFETY: x has n rows; the caller's promise about the numbers.
    unsafe { launch(&device, "scatter_rows", Grid::blocks(n), &arguments) }?;
    Ok(y)
}

/// Rows of several tensors of one width, one after the other.
pub(crate) fn joined(parts: &[Tensor]) -> Result<Tensor> {
    let Some(first) = parts.first() else { bail!("rows: expected a tensor, found none") };
    let (device, h) = (device_of(first)?, first.dim(1)?);
    let mut end = 0;
    for part in parts {
        let (n, width) = part.dims2()?;
        if width != h {
            bail!("rows: {width} columns do not go below {h}");
        }
        end += n;
    }
    let all = room((end, h), DType::F32, &device)?;
    let mut start = 0;
    for part in parts {
        copy(part, &all.narrow(0, start, part.dim(0)?)?)?;
        start += part.dim(0)?;
    }
    Ok(all)
}

/// M ∘ x for rows [T, H], new; or added to `onto`, which is then given back.
pub(super) fn dropout(x: &Tensor, mask: RowMask, onto: Option<&Tensor>) -> Result<Tensor> {
    let (device, (t, h)) = (device_of(x)?, x.dims2()?);
    let (kernel, out) = match onto {
        Some(onto) => ("dropout_add", onto.clone()),
        None => ("dropout_apply", room((t, h), DType::F32, &device)?),
    };
    let (mask, first_row) = mask.parts();
    let mask = [
        Argument::UnsignedLong(mask.key),
        Argument::Unsigned(mask.threshold),
        Argument::Float(mask.scale),
        Argument::UnsignedLong(first_row as u64),
    ];
    let arguments = [&[floats(x)?, floats(&out)?, int(t), int(h)][..], &mask].concat();
    // SAFETY: x and what is written are [t, h].
    unsafe { launch(&device, kernel, Grid::blocks(t), &arguments) }?;
    Ok(out)
}
