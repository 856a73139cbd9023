//! What a cache keeps of rows of logits, on the GPU; `ops/capture.rs` has the definition, `kernels/head.cu` the plan.

use super::launch::{Argument, Grid, device_of, floats, launch, place, room};
use super::pinned::{Fetched, fetch};
use candle_core::{DType, Result, Tensor};

/// Most entries of a row that the kernel finds.
pub(crate) const MOST_KEPT: usize = 256;

/// Rows of logits [n, V] as the kernel sums them up, in the host's memory.
#[derive(Debug)]
pub(crate) struct Summed {
    /// Ids and logits of each row's k largest, by falling logit, ties by rising id: [n, k]. Of a bad row the first value is the bad logit.
    pub(crate) ids: Vec<u32>,
    pub(crate) values: Vec<f32>,
    pub(crate) kept: usize,
    /// The largest logit.
    pub(crate) max: Vec<f32>,
    /// Σ exp(z − max).
    pub(crate) total: Vec<f64>,
    /// The largest of those that are not among the k, and Σ exp(z − that) over them; max and 0 where there are none.
    pub(crate) rest_max: Vec<f32>,
    pub(crate) rest: Vec<f64>,
    /// The first id whose logit is not finite, or −1.
    pub(crate) bad: Vec<i64>,
    /// Of each temperature T, Σ exp((z − max) / T) of each row.
    pub(crate) tempered: Vec<Vec<f64>>,
}

/// The same on its way there.
#[derive(Debug)]
pub(crate) struct Summing {
    ids: Fetched<u32>,
    values: Fetched<f32>,
    kept: usize,
    max: Fetched<f32>,
    total: Fetched<f64>,
    rest_max: Fetched<f32>,
    rest: Fetched<f64>,
    bad: Fetched<i64>,
    tempered: Vec<Fetched<f64>>,
}

impl Summing {
    /// Waits for it, and for nothing that was launched since.
    pub(crate) fn wait(self) -> Result<Summed> {
        Ok(Summed {
            ids: self.ids.wait()?,
            values: self.values.wait()?,
            kept: self.kept,
            max: self.max.wait()?,
            total: self.total.wait()?,
            rest_max: self.rest_max.wait()?,
            rest: self.rest.wait()?,
            bad: self.bad.wait()?,
            tempered: self.tempered.into_iter().map(Fetched::wait).collect::<Result<_>>()?,
        })
    }
}

/// The `kept` (1 to [`MOST_KEPT`], at most V) largest of f32 logits [n, V] and the sums over the others; `rounded` logits count as bf16
/// holds them; sums for each of `factors` = 1 / T.
pub(crate) fn sum_up(logits: &Tensor, kept: usize, rounded: bool, factors: &[f32]) -> Result<Summing> {
    let (device, (n, vocab)) = (device_of(logits)?, logits.dims2()?);
    let (ids, values) = (room((n, kept), DType::U32, &device)?, room((n, kept), DType::F32, &device)?);
    let (max, rest_max) = (room(n, DType::F32, &device)?, room(n, DType::F32, &device)?);
    let (total, rest) = (room(n, DType::F64, &device)?, room(n, DType::F64, &device)?);
    let bad = room(n, DType::I64, &device)?;
    let rounded = Argument::Int(rounded.into());
    let row = [floats(logits)?, Argument::Int(vocab as i32), Argument::Long(vocab as i64)];
    let places = [
        place(&ids, DType::U32)?,
        floats(&values)?,
        floats(&max)?,
        place(&total, DType::F64)?,
        floats(&rest_max)?,
        place(&rest, DType::F64)?,
        place(&bad, DType::I64)?,
    ];
    let arguments = [&row[..], &[Argument::Int(kept as i32), rounded], &places].concat();
    // SAFETY: n rows of logits, and room for n rows of everything.
    unsafe { launch(&device, "largest", Grid::blocks(n), &arguments) }?;
    let mut tempered = Vec::with_capacity(factors.len());
    for factor in factors {
        let sums = room(n, DType::F64, &device)?;
        let arguments = [&row[..], &[rounded, floats(&max)?, Argument::Float(*factor), place(&sums, DType::F64)?]].concat();
        // SAFETY: n rows of logits, n maxima, n sums.
        unsafe { launch(&device, "tempered_total", Grid::blocks(n), &arguments) }?;
        tempered.push(fetch(&sums)?);
    }
    Ok(Summing {
        ids: fetch(&ids)?,
        values: fetch(&values)?,
        kept,
        max: fetch(&max)?,
        total: fetch(&total)?,
        rest_max: fetch(&rest_max)?,
        rest: fetch(&rest)?,
        bad: fetch(&bad)?,
        tempered,
    })
}
