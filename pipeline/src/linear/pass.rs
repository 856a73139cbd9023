//! Layers that read the same x, there and back: one packing of x, one sum of products each way. Owns LoRA's arithmetic; refuses to
//! make a gradient of anything frozen.
//!
//! ```text
//! u = s · x Aᵀ       y = x Wᵀ + u Bᵀ + b
//! du = s · dy B      dB = dyᵀ u      dA = duᵀ x      dx = Σ over the layers of dy W + du A
//! ```
//! While training, dropout puts M ∘ x in place of x wherever A is, M being each layer's own mask: dA = duᵀ (M ∘ x), dx += M ∘ (du A).
//!
//! With [`Precision::Bf16`] the factors of x Aᵀ, u Bᵀ, dy B and of everything frozen are rounded as automatic mixed precision would;
//! the sums, and the gradients' own products, are f32.

use super::dropout::RowMask;
use super::outer::{Lies, add_outer};
use super::panel::{Factor, Matrix, Way};
use super::product::{Product, Term, products};
use super::{Linear, Lora, LoraGradient};
#[cfg(feature = "cuda")]
use crate::cuda::linear as gpu;
use crate::device::on_gpu;
use crate::kernel::{Precision, Rows};
use crate::ops::{Floats, floats};
use candle_core::{Result, Tensor, bail};

/// u = s · x Aᵀ of a layer, f32 [T, r]; `None` for a layer without an adapter.
pub type Low = Option<Tensor>;

/// How layers are passed through.
#[derive(Debug, Clone, Copy)]
pub struct Pass<const N: usize> {
    /// What factors are rounded to.
    pub precision: Precision,
    /// What each layer's adapter does not see.
    pub masks: [Option<RowMask>; N],
}

impl<const N: usize> From<Precision> for Pass<N> {
    /// Nothing is left out.
    fn from(precision: Precision) -> Self {
        Self { precision, masks: [None; N] }
    }
}

/// A layer's adapter, laid open.
struct Factors<'a> {
    a: Floats<'a>,
    b: Floats<'a>,
    rank: usize,
    scale: f32,
}

impl<'a> Factors<'a> {
    /// Errors: factors of other shapes than the layer's.
    fn of(layer: &'a Linear) -> Result<Option<Self>> {
        let Some(Lora { a, b, scale }) = &layer.lora else { return Ok(None) };
        let ((rank, inputs), (outputs, columns)) = (a.dims2()?, b.dims2()?);
        if rank == 0 || columns != rank || inputs != layer.weight.inputs() || outputs != layer.weight.outputs() {
            let (inputs, outputs) = (layer.weight.inputs(), layer.weight.outputs());
            bail!("linear: LoRA factors {:?} and {:?} do not fit {inputs} inputs and {outputs} outputs", a.dims(), b.dims());
        }
        Ok(Some(Self { a: floats(a)?, b: floats(b)?, rank, scale: *scale as f32 }))
    }

    /// A [r, in], read one way or the other.
    fn a(&self, way: Way) -> Factor<'_> {
        Factor { matrix: Matrix::Values { values: &self.a, columns: self.a.len() / self.rank }, way }
    }

    /// B [out, r].
    fn b(&self, way: Way) -> Factor<'_> {
        Factor { matrix: Matrix::Values { values: &self.b, columns: self.rank }, way }
    }

    /// s · (M ∘ x) Aᵀ: f32 [T, r]. `rows` are x's, packed.
    fn seen(&self, x: &[f32], rows: &Rows, mask: Option<RowMask>) -> Vec<f32> {
        match mask {
            None => self.low(rows, self.a(Way::Forward)),
            Some(mask) => {
                let rows = Rows::pack(&mask.of(x, rows.width()), rows.width(), rows.precision());
                self.low(&rows, self.a(Way::Forward))
            }
        }
    }

    /// rows · A or B, scaled: f32 [T, r].
    fn low(&self, rows: &Rows, factor: Factor) -> Vec<f32> {
        let mut low = products(&[Product::of(rows, factor)]).swap_remove(0);
        low.iter_mut().for_each(|v| *v *= self.scale);
        low
    }
}

/// The outputs [T, out] of several layers of the same x [T, in], all f32 and contiguous.
pub fn forward_all<const N: usize>(layers: [&Linear; N], x: &Tensor, precision: Precision) -> Result<[Tensor; N]> {
    Ok(forward_kept(layers, x, precision.into())?.0)
}

/// The same, with what the way back needs. Errors: widths that do not fit.
pub fn forward_kept<const N: usize>(layers: [&Linear; N], x: &Tensor, pass: Pass<N>) -> Result<([Tensor; N], [Low; N])> {
    let ((t, width), precision) = (x.dims2()?, pass.precision);
    check_inputs(&layers, width, x)?;
    on_gpu!(x => gpu::forward_kept(layers, x, pass).and_then(|(y, low)| Ok((array(y)?, array(low)?))));
    let x_values = floats(x)?;
    let rows = Rows::pack(&x_values, width, precision);
    let factors = layers.iter().map(|layer| Factors::of(layer)).collect::<Result<Vec<_>>>()?;
    let biases = layers.iter().map(|layer| layer.bias.as_ref().map(floats).transpose()).collect::<Result<Vec<_>>>()?;
    let (mut low, mut packed) = (Vec::with_capacity(N), Vec::with_capacity(N));
    for (factors, mask) in factors.iter().zip(pass.masks) {
        let seen = factors.as_ref().map(|f| (f.seen(&x_values, &rows, mask), f.rank));
        packed.push(seen.as_ref().map(|(seen, rank)| Rows::pack(seen, *rank, precision)));
        low.push(seen.map(|(seen, rank)| Tensor::from_vec(seen, (t, rank), x.device())).transpose()?);
    }
    let mut sums = Vec::with_capacity(N);
    for (((layer, bias), factors), low) in layers.iter().zip(&biases).zip(&factors).zip(&packed) {
        if let Some(bias) = bias.as_ref().filter(|bias| bias.len() != layer.weight.outputs()) {
            bail!("linear: a bias of {} values does not fit {} outputs", bias.len(), layer.weight.outputs());
        }
        let mut sum = Product { bias: bias.as_deref(), ..Product::of(&rows, Factor::forward(&layer.weight)) };
        if let (Some(factors), Some(rows)) = (factors, low) {
            sum.terms.push(Term { rows, factor: factors.b(Way::Forward) });
        }
        sums.push(sum);
    }
    let outputs = products(&sums).into_iter().zip(layers);
    let outputs = outputs.map(|(values, layer)| Tensor::from_vec(values, (t, layer.weight.outputs()), x.device()));
    Ok((array(outputs.collect::<Result<Vec<_>>>()?)?, array(low)?))
}

impl Linear {
    /// What [`forward_kept`] keeps of x [T, in], without the product.
    pub fn low(&self, x: &Tensor, pass: Pass<1>) -> Result<Low> {
        let (t, width) = x.dims2()?;
        check_inputs(&[self], width, x)?;
        on_gpu!(x => gpu::low(self, x, pass));
        let Some(factors) = Factors::of(self)? else { return Ok(None) };
        let (values, [mask]) = (floats(x)?, pass.masks);
        let seen = factors.seen(&values, &Rows::pack(&values, width, pass.precision), mask);
        Tensor::from_vec(seen, (t, factors.rank), x.device()).map(Some)
    }
}

/// From x [T, in], what [`forward_kept`] kept, and each layer's dL/dy [T, out]: dL/dx [T, in], the sum over the layers, and the gradients of
/// their factors.
pub fn backward_all<const N: usize>(
    layers: [&Linear; N],
    x: &Tensor,
    low: &[Low; N],
    dy: [&Tensor; N],
    pass: Pass<N>,
) -> Result<(Tensor, [Option<LoraGradient>; N])> {
    let ((t, width), precision) = (x.dims2()?, pass.precision);
    check_inputs(&layers, width, x)?;
    on_gpu!(x => gpu::backward_all(layers, x, low, dy, pass).and_then(|(dx, gradients)| Ok((dx, array(gradients)?))));
    let factors = layers.iter().map(|layer| Factors::of(layer)).collect::<Result<Vec<_>>>()?;
    let x_values = floats(x)?;
    let (mut rows, mut gradients) = (Vec::with_capacity(N), Vec::with_capacity(N));
    for ((((layer, factors), low), dy), mask) in layers.iter().zip(&factors).zip(low).zip(dy).zip(pass.masks) {
        let outputs = layer.weight.outputs();
        if dy.dims() != [t, outputs] {
            bail!("linear: dy {:?} does not fit {t} rows of {outputs} outputs", dy.dims());
        }
        let dy = floats(dy)?;
        let packed = Rows::pack(&dy, outputs, precision);
        let Some(factors) = factors else {
            rows.push((packed, None));
            gradients.push(None);
            continue;
        };
        let rank = factors.rank;
        let Some(low) = low.as_ref().filter(|low| low.dims() == [t, rank]) else {
            bail!("linear: A x {:?} does not fit {t} rows of rank {rank}", low.as_ref().map(Tensor::dims));
        };
        let low = floats(low)?;
        let du = factors.low(&packed, factors.b(Way::Backward));
        let (mut a, mut b) = (vec![0f32; rank * width], vec![0f32; outputs * rank]);
        add_outer((&dy, outputs), (&low, rank), Lies::Straight, &mut b);
        match mask {
            None => add_outer((&x_values, width), (&du, rank), Lies::Turned, &mut a),
            Some(mask) => add_outer((&mask.of(&x_values, width), width), (&du, rank), Lies::Turned, &mut a),
        }
        let (a, b) = (Tensor::from_vec(a, (rank, width), x.device())?, Tensor::from_vec(b, (outputs, rank), x.device())?);
        gradients.push(Some(LoraGradient { a, b }));
        rows.push((packed, Some(Rows::pack(&du, rank, precision))));
    }
    let mut sum = Product { terms: Vec::with_capacity(2 * N), bias: None };
    let mut masked = Vec::new();
    for (((layer, factors), (dy, du)), mask) in layers.iter().zip(&factors).zip(&rows).zip(pass.masks) {
        sum.terms.push(Term { rows: dy, factor: Factor::backward(&layer.weight) });
        if let (Some(factors), Some(rows)) = (factors, du) {
            let term = Term { rows, factor: factors.a(Way::Backward) };
            match mask {
                None => sum.terms.push(term),
                Some(mask) => masked.push((term, mask)),
            }
        }
    }
    let mut dx = products(&[sum]).swap_remove(0);
    for (term, mask) in masked {
        mask.add(&products(&[Product { terms: vec![term], bias: None }]).swap_remove(0), width, &mut dx);
    }
    Ok((Tensor::from_vec(dx, (t, width), x.device())?, array(gradients)?))
}

fn check_inputs(layers: &[&Linear], width: usize, x: &Tensor) -> Result<()> {
    match layers.iter().find(|layer| layer.weight.inputs() != width) {
        Some(layer) => bail!("linear: x {:?} does not fit {} inputs", x.dims(), layer.weight.inputs()),
        None => Ok(()),
    }
}

fn array<T, const N: usize>(all: Vec<T>) -> Result<[T; N]> {
    all.try_into().map_err(|_| candle_core::Error::Msg("linear: a product is missing".into()))
}
