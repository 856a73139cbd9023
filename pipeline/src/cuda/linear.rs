//! Linear layers on the GPU, there and back; `linear/pass.rs` has the formulas and the CPU's definition.
//!
//! Weights are unpacked one at a time into bf16 (or f32, for comparisons) and multiplied by cuBLAS. With bf16 factors the gradients' own
//! products take f32 factors with eleven digits (TF32): 24 times as fast as all digits, and closer to the definition, which has them all.

use super::DeviceWeight;
use super::blocks::{broadcast_rows, dropout};
use super::launch::{device_of, room};
use super::placed::Lies;
use super::product::{Factor, Multiplies, Reads, product};
use crate::kernel::Precision;
use crate::linear::dropout::RowMask;
use crate::linear::{Linear, Lora, LoraGradient, Low, Pass};
use candle_core::{DType, Result, Tensor, bail};

/// What a profile calls the products with an adapter's factors, and those that make their gradients.
const ADAPTER: &str = "product of an adapter";

/// The outputs [T, out] of several layers of the same x [T, in], and what the way back needs.
pub(crate) fn forward_kept<const N: usize>(layers: [&Linear; N], x: &Tensor, pass: Pass<N>) -> Result<(Vec<Tensor>, Vec<Low>)> {
    let rows = Factor::rounded(x, pass.precision)?;
    let (mut outputs, mut kept) = (Vec::with_capacity(N), Vec::with_capacity(N));
    for (layer, mask) in layers.into_iter().zip(pass.masks) {
        let y = room((rows.rows, layer.weight.outputs()), DType::F32, &device_of(x)?)?;
        let mut beta = 0.0;
        if let Some(bias) = &layer.bias {
            broadcast_rows(bias, &y)?;
            beta = 1.0;
        }
        times_weight(&rows, placed(layer)?, pass.precision, Way::Forward, beta, &y)?;
        let low = match &layer.lora {
            None => None,
            Some(lora) => {
                let u = seen(lora, x, &rows, mask, pass.precision)?;
                let (u_rounded, b) = (Factor::rounded(&u, pass.precision)?, Factor::rounded(&lora.b, pass.precision)?);
                product(ADAPTER, (&u_rounded, Reads::AsItLies), (&b, Reads::Turned), (1.0, 1.0), Multiplies::Exactly, &y)?;
                Some(u)
            }
        };
        outputs.push(y);
        kept.push(low);
    }
    Ok((outputs, kept))
}

/// What [`forward_kept`] keeps, alone.
pub(crate) fn low(layer: &Linear, x: &Tensor, pass: Pass<1>) -> Result<Low> {
    let [mask] = pass.masks;
    let rows = |_: &Lora| Factor::rounded(x, pass.precision);
    layer.lora.as_ref().map(|lora| seen(lora, x, &rows(lora)?, mask, pass.precision)).transpose()
}

/// dL/dx [T, in], the sum over the layers, and the gradients of their factors.
pub(crate) fn backward_all<const N: usize>(
    layers: [&Linear; N],
    x: &Tensor,
    low: &[Low; N],
    dy: [&Tensor; N],
    pass: Pass<N>,
) -> Result<(Tensor, Vec<Option<LoraGradient>>)> {
    let ((t, width), precision, device) = (x.dims2()?, pass.precision, device_of(x)?);
    let dx = room((t, width), DType::F32, &device)?;
    let (mut gradients, mut beta) = (Vec::with_capacity(N), 0.0);
    for (((layer, low), dy), mask) in layers.into_iter().zip(low).zip(dy).zip(pass.masks) {
        let rows = Factor::rounded(dy, precision)?;
        times_weight(&rows, placed(layer)?, precision, Way::Backward, beta, &dx)?;
        beta = 1.0;
        let Some((lora, u)) = layer.lora.as_ref().zip(low.as_ref()) else {
            gradients.push(None);
            continue;
        };
        let rank = lora.a.dim(0)?;
        let du = room((t, rank), DType::F32, &device)?;
        let (a, b) = (Factor::rounded(&lora.a, precision)?, Factor::rounded(&lora.b, precision)?);
        product(ADAPTER, (&rows, Reads::AsItLies), (&b, Reads::AsItLies), (lora.scale as f32, 0.0), Multiplies::Exactly, &du)?;
        let du_rounded = Factor::rounded(&du, precision)?;
        let through_a = |beta, out: &Tensor| {
            product(ADAPTER, (&du_rounded, Reads::AsItLies), (&a, Reads::AsItLies), (1.0, beta), Multiplies::Exactly, out)
        };
        let x = match mask {
            None => {
                through_a(1.0, &dx)?;
                x.clone()
            }
            Some(mask) => {
                let through = room((t, width), DType::F32, &device)?;
                through_a(0.0, &through)?;
                dropout(&through, mask, Some(&dx))?;
                dropout(x, mask, None)?
            }
        };
        gradients.push(Some(LoraGradient { a: outer(&du, &x, precision)?, b: outer(dy, u, precision)? }));
    }
    Ok((dx, gradients))
}

/// xᵀ y: f32 [width of x, width of y].
fn outer(x: &Tensor, y: &Tensor, precision: Precision) -> Result<Tensor> {
    let (rows, columns) = (Factor::of(x)?, Factor::of(y)?);
    let out = room((rows.columns, columns.columns), DType::F32, &device_of(x)?)?;
    let how = if precision == Precision::Bf16 { Multiplies::Fast } else { Multiplies::Exactly };
    product(ADAPTER, (&rows, Reads::Turned), (&columns, Reads::AsItLies), (1.0, 0.0), how, &out)?;
    Ok(out)
}

/// u = s · (M ∘ x) Aᵀ: f32 [T, r]. `rows` are x's, rounded.
fn seen(lora: &Lora, x: &Tensor, rows: &Factor, mask: Option<RowMask>, precision: Precision) -> Result<Tensor> {
    let u = room((rows.rows, lora.a.dim(0)?), DType::F32, &device_of(x)?)?;
    let masked = mask.map(|mask| Factor::rounded(&dropout(x, mask, None)?, precision)).transpose()?;
    let a = Factor::rounded(&lora.a, precision)?;
    let rows = (masked.as_ref().unwrap_or(rows), Reads::AsItLies);
    product(ADAPTER, rows, (&a, Reads::Turned), (lora.scale as f32, 0.0), Multiplies::Exactly, &u)?;
    Ok(u)
}

/// Which product with W [out, in]: x Wᵀ, or dy W.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Forward,
    Backward,
}

/// out = rows · W (either way) + beta · out.
pub(super) fn times_weight(
    rows: &Factor,
    weight: &DeviceWeight,
    precision: Precision,
    way: Way,
    beta: f32,
    out: &Tensor,
) -> Result<()> {
    let (weight, lies) = weight.unpacked(precision)?;
    let reads = match (lies, way) {
        (Lies::OutputsFirst, Way::Forward) | (Lies::InputsFirst, Way::Backward) => Reads::Turned,
        (Lies::InputsFirst, Way::Forward) | (Lies::OutputsFirst, Way::Backward) => Reads::AsItLies,
    };
    product("product with a weight", (rows, Reads::AsItLies), (&weight, reads), (1.0, beta), Multiplies::Exactly, out)
}

fn placed(layer: &Linear) -> Result<&DeviceWeight> {
    match &layer.placed {
        Some(weight) => Ok(weight),
        None => bail!("linear: the input is on a GPU, but the weight was not copied there"),
    }
}
