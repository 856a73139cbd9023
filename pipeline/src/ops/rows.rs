//! Rows of a tensor by their numbers: taken out, and put back among zeros.

use candle_core::{Result, Tensor};

/// y[i] = x[rows[i]]: f32 [n, H] of x f32 [T, H] and rows u32 `[n]`. Errors: a row that is not there.
pub fn gather(x: &Tensor, rows: &Tensor) -> Result<Tensor> {
    x.index_select(rows, 0)
}

/// The backward of [`gather`]: f32 [`all`, H] of zeros, but y[rows[i]] += x[i]. Errors: a row that is not there.
pub fn scatter(x: &Tensor, rows: &Tensor, all: usize) -> Result<Tensor> {
    Tensor::zeros((all, x.dim(1)?), x.dtype(), x.device())?.index_add(rows, x, 0)
}
