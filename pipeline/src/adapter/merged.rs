//! Owns one tensor of a merged model: how it is computed and rounded. Refuses to hold more than one at a time: a tensor's
//! bytes are made when the file writer asks for them, some rows after the others, and the base's are let go then.

use super::{AdapterError, Checked, MergeFrom};
use crate::linear::nf4::Nf4Weight;
use crate::model::weights::{TensorInfo, Weights};
use crate::run::RunContext;
use candle_core::Tensor;
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::{Dtype, View};
use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};

/// What all tensors of a merge share.
pub(super) struct Shared<'a> {
    pub(super) base: &'a Weights,
    pub(super) from: MergeFrom,
    pub(super) context: &'a RunContext,
    /// The first thing that went wrong; the writer's interface has no room for it.
    pub(super) failure: Mutex<Option<AdapterError>>,
    /// The tensor whose bytes the writer has straight from the base's file.
    pub(super) lent: Mutex<Option<&'a str>>,
}

/// A tensor of the merged model, not computed yet.
pub(super) struct Merged<'a> {
    pub(super) name: &'a str,
    pub(super) stored: TensorInfo,
    /// The type it is written in.
    pub(super) dtype: Dtype,
    /// Whether it is a linear layer that training held in NF4.
    pub(super) linear: Linear<'a>,
    pub(super) shared: &'a Shared<'a>,
}

/// A tensor's part in the model.
pub(super) enum Linear<'a> {
    /// Embedding, norm, bias, head.
    No,
    /// A linear layer without an adapter.
    Plain,
    /// A linear layer with one.
    Adapted(Delta<'a>),
}

/// factor · B A.
pub(super) struct Delta<'a> {
    /// `[r, in]` f32.
    pub(super) a: &'a Tensor,
    /// `[out, r]` f32.
    pub(super) b: &'a Tensor,
    pub(super) factor: f64,
}

impl Shared<'_> {
    fn fail(&self, error: AdapterError) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(error);
    }

    fn failed(&self) -> bool {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }
}

/// Values of a tensor that exist in f32 at once, in whole rows; a multiple of what a product wants to be cut into.
const VALUES_AT_ONCE: usize = 1 << 22;

impl Merged<'_> {
    fn bytes(&self) -> Checked<Cow<'_, [u8]>> {
        let stored = self.shared.base.bytes(self.name, self.stored.dtype, &self.stored.shape)?;
        let requantised = self.shared.from == MergeFrom::Nf4 && !matches!(self.linear, Linear::No);
        if self.dtype == self.stored.dtype && !requantised && !matches!(self.linear, Linear::Adapted(_)) {
            return Ok(Cow::Borrowed(stored));
        }
        let mut out = Vec::with_capacity(self.data_len());
        let width = self.stored.shape.last().copied().unwrap_or(1).max(1);
        // NF4's absolute maxima are scaled by a mean over the whole tensor, so it is quantised as a whole.
        let nf4 = requantised.then(|| self.quantised(stored)).transpose()?;
        let rows = (VALUES_AT_ONCE / width).max(1);
        let size = self.stored.dtype.bitsize() / 8;
        for (part, stored) in stored.chunks(rows * width * size).enumerate() {
            let mut values = match &nf4 {
                Some(nf4) => rows_of(nf4, part * rows, stored.len() / size),
                None => decode(stored, self.stored.dtype),
            };
            if let Linear::Adapted(delta) = &self.linear {
                let added = delta.rows(part * rows, values.len() / width);
                let added = added.map_err(|source| AdapterError::Tensor { name: self.name.into(), source: source.into() })?;
                values.iter_mut().zip(added).for_each(|(w, d)| *w += d);
            }
            encode(self.name, &values, self.dtype, &mut out)?;
        }
        Ok(Cow::Owned(out))
    }

    fn quantised(&self, stored: &[u8]) -> Checked<Nf4Weight> {
        let (out, inputs) = match self.stored.shape[..] {
            [out, inputs] => (out, inputs),
            _ => (0, 0),
        };
        let quantised = Nf4Weight::quantize(&decode(stored, self.stored.dtype), out, inputs);
        quantised.ok_or_else(|| AdapterError::NotFinite { name: self.name.into() })
    }
}

/// `count` values from row `first` on, in whole rows.
fn rows_of(nf4: &Nf4Weight, first: usize, count: usize) -> Vec<f32> {
    let mut values = vec![0f32; count];
    let rows = values.par_chunks_exact_mut(nf4.columns().max(1));
    rows.enumerate().for_each(|(i, row)| nf4.decode(first + i, 0, row));
    values
}

impl Delta<'_> {
    /// Rows of factor · (B A), f32, row-major.
    fn rows(&self, first: usize, count: usize) -> candle_core::Result<Vec<f32>> {
        let product = self.b.narrow(0, first, count)?.matmul(self.a)?.flatten_all()?.to_vec1::<f32>()?;
        let factor = self.factor as f32;
        Ok(product.into_iter().map(|v| v * factor).collect())
    }
}

impl View for &Merged<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.stored.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let stopped = self.shared.context.stopping() || self.shared.failed();
        let bytes = if stopped { None } else { self.bytes().map_err(|error| self.shared.fail(error)).ok() };
        // What was computed from the file is not needed again; what is lent is when the writer asks for the next tensor.
        let done = match bytes {
            Some(Cow::Owned(_)) => Some(self.name),
            _ => None,
        };
        let lent = Some(self.name).filter(|_| done.is_none());
        let before = std::mem::replace(&mut *self.shared.lent.lock().unwrap_or_else(PoisonError::into_inner), lent);
        self.shared.base.release(done.into_iter().chain(before));
        self.shared.context.progress.add(self.data_len() as u64);
        // After a stop or a failure the file is thrown away; it only has to be as long as its header says.
        bytes.unwrap_or_else(|| Cow::Owned(vec![0; self.data_len()]))
    }

    fn data_len(&self) -> usize {
        self.stored.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Whether a dtype is one of those that are merged and converted.
pub(super) fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// f32 values of little-endian bytes; the dtype is a float (checked when the merge was planned).
fn decode(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    match dtype {
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        _ => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
    }
}

/// Rounds once to `dtype`, to nearest, ties to even, and appends the bytes.
fn encode(name: &str, values: &[f32], dtype: Dtype, out: &mut Vec<u8>) -> Checked<()> {
    match dtype {
        Dtype::F16 => match values.iter().find(|v| v.is_finite() && f16::from_f32(**v).is_infinite()) {
            Some(&value) => return Err(AdapterError::Range { name: name.to_string(), value, dtype: "f16" }),
            None => out.extend(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes())),
        },
        Dtype::BF16 => out.extend(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes())),
        _ => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
    }
    Ok(())
}
