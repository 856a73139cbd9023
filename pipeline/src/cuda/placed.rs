//! Frozen weights on the GPU, as they are stored: uploaded once, unpacked before each product into room that the next product uses
//! again, or held unpacked for as long as several products on end take.
//!
//! Unpacking costs reading the packed weight and writing it in bf16: of a product with n rows a share of about 220 / n on an H200 (2.5 bytes
//! a weight at 4.3 TB/s against 2 n operations at 0.75 PFLOP/s).

use super::launch::{Argument, Grid, address, device_of, floats, launch, place, room, upload};
use super::pinned::send;
use super::product::Factor;
use crate::kernel::Precision;
use crate::linear::Weight;
use crate::linear::dense::{DenseWeight, Stored};
use crate::linear::nf4;
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};
use rayon::prelude::*;

/// A weight's copy on a GPU.
#[derive(Debug, Clone)]
pub struct DeviceWeight {
    outputs: usize,
    inputs: usize,
    parts: Parts,
}

/// Bytes as the host has them, u8 `[n]` each.
#[derive(Debug, Clone)]
enum Parts {
    Dense {
        stored: Stored,
        values: Tensor,
    },
    Awq {
        group: usize,
        qweight: Tensor,
        qzeros: Tensor,
        scales: Tensor,
    },
    Nf4 {
        codes: Tensor,
        absmax: Tensor,
        nested: Tensor,
        offset: f32,
        map: Tensor,
    },
    /// Not as the host has them: all values.
    Unpacked {
        values: Factor,
        lies: Lies,
    },
}

/// Which way a matrix lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lies {
    /// [out, in].
    OutputsFirst,
    /// [in, out].
    InputsFirst,
}

impl DeviceWeight {
    /// Copies a weight to the device.
    pub(crate) fn new(weight: &Weight, device: &CudaDevice) -> Result<Self> {
        Self::with(weight, device, |bytes| upload(bytes, device))
    }

    /// The same with `put` to bring its bytes there, as u8 `[n]`, before anything that is launched later.
    pub(crate) fn with<'a>(
        weight: &'a Weight,
        device: &CudaDevice,
        mut put: impl FnMut(&'a [u8]) -> Result<Tensor>,
    ) -> Result<Self> {
        let floats = |values: &[f32]| Tensor::from_slice(values, values.len(), &Device::Cuda(device.clone()));
        let parts = match weight {
            Weight::Dense(w) => Parts::Dense { stored: w.stored(), values: put(w.bytes())? },
            Weight::Awq(w) => {
                let [qweight, qzeros, scales] = w.parts().map(&mut put);
                Parts::Awq { group: w.group(), qweight: qweight?, qzeros: qzeros?, scales: scales? }
            }
            Weight::Nf4(w) => Parts::Nf4 {
                codes: put(w.codes())?,
                absmax: put(w.absmax())?,
                nested: floats(w.nested_absmax())?,
                offset: w.nested_offset(),
                map: floats(nf4::dynamic_map())?,
            },
        };
        Ok(Self { outputs: weight.outputs(), inputs: weight.inputs(), parts })
    }

    /// The same with all its values beside it, in 2 bytes each (of f32: 4): for several products on end.
    pub(crate) fn held(&self, precision: Precision) -> Result<Self> {
        let (values, lies) = self.unpacked(precision)?;
        Ok(Self { parts: Parts::Unpacked { values, lies }, ..*self })
    }

    /// All values, as a product takes them. A dense weight of the product's own dtype is not copied.
    pub(super) fn unpacked(&self, precision: Precision) -> Result<(Factor, Lies)> {
        let (dtype, n) = (if precision == Precision::Bf16 { DType::BF16 } else { DType::F32 }, self.outputs * self.inputs);
        let flat = vec![Argument::Long(n as i64)];
        let (kernel, lies, parts, sizes, grid) = match &self.parts {
            Parts::Unpacked { values, lies } => return Ok((values.clone(), *lies)),
            Parts::Dense { stored, values } => {
                let kernel = match (stored, dtype) {
                    (Stored::F32, DType::F32) | (Stored::Bf16, DType::BF16) => {
                        let address = address(values, DType::U8)?;
                        return Ok((self.factor(values.clone(), address, dtype, Lies::OutputsFirst), Lies::OutputsFirst));
                    }
                    (Stored::F32, _) => "cast_f32_bf16",
                    (Stored::Bf16, _) => "cast_bf16_f32",
                    (Stored::F16, DType::BF16) => "cast_f16_bf16",
                    (Stored::F16, _) => "cast_f16_f32",
                };
                (kernel, Lies::OutputsFirst, vec![place(values, DType::U8)?], flat, Grid::flat(n))
            }
            Parts::Awq { group, qweight, qzeros, scales } => {
                let kernel = if dtype == DType::BF16 { "awq_unpack_bf16" } else { "awq_unpack_f32" };
                let parts = [place(qweight, DType::U8)?, place(qzeros, DType::U8)?, place(scales, DType::U8)?];
                let sizes = [self.inputs, self.outputs, *group].map(|size| Argument::Int(size as i32));
                let words = self.inputs.div_ceil(8) * (self.outputs / 8);
                (kernel, Lies::InputsFirst, parts.to_vec(), sizes.to_vec(), Grid::blocks(words.div_ceil(256)))
            }
            Parts::Nf4 { codes, absmax, nested, offset, map } => {
                let kernel = if dtype == DType::BF16 { "nf4_unpack_bf16" } else { "nf4_unpack_f32" };
                let (codes, absmax) = (place(codes, DType::U8)?, place(absmax, DType::U8)?);
                let parts = vec![codes, absmax, floats(nested)?, Argument::Float(*offset), floats(map)?];
                (kernel, Lies::OutputsFirst, parts, flat, Grid::flat(n))
            }
        };
        let device = device_of(self.any_part())?;
        let values = room(n, dtype, &device)?;
        let out = address(&values, dtype)?;
        let arguments = [parts, vec![Argument::Place(out)], sizes].concat();
        // SAFETY: the parts' lengths were checked when the weight was made, and there is room for all its values.
        unsafe { launch(&device, kernel, grid, &arguments) }?;
        Ok((self.factor(values, out, dtype, lies), lies))
    }

    /// Rows of a dense weight in the host's memory by their numbers, f32 [n, in] on the device. They are sent as they are stored.
    pub(crate) fn rows_of_host(weight: &DenseWeight, ids: &[u32], device: &CudaDevice) -> Result<Tensor> {
        let (inputs, all) = (weight.inputs(), weight.bytes());
        let width = all.len() / weight.outputs().max(1);
        let mut bytes = vec![0u8; ids.len() * width];
        let rows = bytes.par_chunks_mut(width.max(1)).zip(ids);
        rows.for_each(|(row, id)| row.copy_from_slice(&all[*id as usize * width..][..width]));
        let values = send(&bytes, bytes.len(), device)?;
        let table = Self { outputs: ids.len(), inputs, parts: Parts::Dense { stored: weight.stored(), values } };
        table.rows(&send(&(0..ids.len() as u32).collect::<Vec<_>>(), ids.len(), device)?)
    }

    /// Rows of a dense weight by their numbers, f32 [n, in]; `ids` u32 `[n]` are all below the number of rows.
    pub(crate) fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        let Parts::Dense { stored, values } = &self.parts else { bail!("embedding: expected a dense weight") };
        let (device, n) = (device_of(values)?, ids.elem_count());
        let y = room((n, self.inputs), DType::F32, &device)?;
        let kernel = match stored {
            Stored::F32 => "embed_f32",
            Stored::F16 => "embed_f16",
            Stored::Bf16 => "embed_bf16",
        };
        let sizes = [Argument::Int(n as i32), Argument::Int(self.inputs as i32)];
        let arguments = [place(values, DType::U8)?, place(ids, DType::U32)?, floats(&y)?, sizes[0], sizes[1]];
        // SAFETY: the caller's promise about ids; y has n rows.
        unsafe { launch(&device, kernel, Grid::blocks(n), &arguments) }?;
        Ok(y)
    }

    fn factor(&self, owner: Tensor, address: u64, dtype: DType, lies: Lies) -> Factor {
        let (rows, columns) = match lies {
            Lies::OutputsFirst => (self.outputs, self.inputs),
            Lies::InputsFirst => (self.inputs, self.outputs),
        };
        Factor { owner, address, dtype, rows, columns }
    }

    fn any_part(&self) -> &Tensor {
        match &self.parts {
            Parts::Dense { values, .. } => values,
            Parts::Awq { qweight, .. } => qweight,
            Parts::Nf4 { codes, .. } => codes,
            Parts::Unpacked { values, .. } => &values.owner,
        }
    }
}
