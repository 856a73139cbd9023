//! Rows of a tensor by their numbers: taken out, and put back among zeros.

#[cfg(feature = "cuda")]
use crate::cuda::blocks;
use crate::device::on_gpu;
use candle_core::{Result, Tensor};

/// `y[i] = x[rows[i]]`: f32 [n, H] of x f32 [T, H] and rows u32 `[n]`. Errors: a row that is not there; on a GPU, where nobody looks at the
/// numbers, the caller answers for them.
pub fn gather(x: &Tensor, rows: &Tensor) -> Result<Tensor> {
    on_gpu!(x => blocks::gather(x, rows));
    x.index_select(rows, 0)
}

/// The backward of [`gather`]: f32 [`all`, H] of zeros, but `y[rows[i]] = x[i]`; `rows` are distinct. Errors: as there.
pub fn scatter(x: &Tensor, rows: &Tensor, all: usize) -> Result<Tensor> {
    on_gpu!(x => blocks::scatter(x, rows, all));
    Tensor::zeros((all, x.dim(1)?), x.dtype(), x.device())?.index_add(rows, x, 0)
}

/// Rows of several tensors [n, H], one after the other. Errors: none given, or of different widths.
pub fn joined(parts: &[Tensor]) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if parts.iter().all(|part| part.device().is_cuda()) {
        return blocks::joined(parts);
    }
    Tensor::cat(parts, 0)
}
