//! Matrix products by cuBLAS: f32 or bf16 factors, f32 sums. Owns how row-major matrices are told to a column-major library; refuses to
//! round anything itself.

use super::launch::{Argument, Grid, address, device_of, launch, room};
use super::profile::timed;
use crate::kernel::Precision;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};
use std::ffi::c_void;
use std::time::Instant;

/// A factor of a product, row-major [rows, columns] on the device.
#[derive(Debug, Clone)]
pub(super) struct Factor {
    /// Who keeps the memory.
    pub(super) owner: Tensor,
    pub(super) address: u64,
    /// F32 or BF16.
    pub(super) dtype: DType,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl Factor {
    /// A tensor [rows, columns] of f32 or bf16 as it is.
    pub(super) fn of(t: &Tensor) -> Result<Self> {
        let (rows, columns) = t.dims2()?;
        if !matches!(t.dtype(), DType::F32 | DType::BF16) {
            bail!("product: expected F32 or BF16 factors, found {:?}", t.dtype());
        }
        Ok(Self { owner: t.clone(), address: address(t, t.dtype())?, dtype: t.dtype(), rows, columns })
    }

    /// A tensor [rows, columns] rounded to what `precision` says: of f32 values, or already so.
    pub(super) fn rounded(t: &Tensor, precision: Precision) -> Result<Self> {
        match (precision, t.dtype()) {
            (Precision::Bf16, DType::F32) => Self::of(&to_bf16(t)?),
            _ => Self::of(t),
        }
    }
}

/// f32 values rounded to bf16, ties to even.
fn to_bf16(t: &Tensor) -> Result<Tensor> {
    let (device, n) = (device_of(t)?, t.elem_count());
    let y = room(t.shape(), DType::BF16, &device)?;
    let arguments = [super::launch::floats(t)?, super::launch::place(&y, DType::BF16)?, Argument::Long(n as i64)];
    // SAFETY: both have n elements.
    unsafe { launch(&device, "cast_f32_bf16", Grid::flat(n), &arguments) }?;
    Ok(y)
}

/// Whether a factor is read by rows as it lies, or turned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reads {
    AsItLies,
    Turned,
}

/// How factors of f32 are multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Multiplies {
    /// With all their digits.
    Exactly,
    /// With eleven digits of each, by tensor cores.
    Fast,
}

/// out = alpha · a b + beta · out: f32 [m, n]. A profile calls it by its name. Errors: sizes or dtypes that do not fit.
pub(super) fn product(
    name: &'static str,
    (a, reads_a): (&Factor, Reads),
    (b, reads_b): (&Factor, Reads),
    (alpha, beta): (f32, f32),
    how: Multiplies,
    out: &Tensor,
) -> Result<()> {
    let turned = |f: &Factor, reads| if reads == Reads::Turned { (f.columns, f.rows) } else { (f.rows, f.columns) };
    let ((m, k), (depth, n)) = (turned(a, reads_a), turned(b, reads_b));
    if depth != k || out.dims() != [m, n] || a.dtype != b.dtype {
        bail!("product: {m} by {k} {:?} and {depth} by {n} {:?} do not make {:?}", a.dtype, b.dtype, out.dims());
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    if k == 0 {
        bail!("product: factors of no columns");
    }
    let device = device_of(out)?;
    gemm((&device, name), [m, n, k], (b, reads_b), (a, reads_a), (alpha, beta), how, address(out, DType::F32)?)
}

/// Row-major C = A B is column-major Cᵀ = Bᵀ Aᵀ: `first` is B, `second` A, and a row-major matrix is its own transpose to the library.
fn gemm(
    (device, name): (&CudaDevice, &'static str),
    [m, n, k]: [usize; 3],
    first: (&Factor, Reads),
    second: (&Factor, Reads),
    (alpha, beta): (f32, f32),
    how: Multiplies,
    out: u64,
) -> Result<()> {
    let int = |value: usize| {
        i32::try_from(value).map_err(|_| candle_core::Error::msg(format!("product: {value} is more than cuBLAS counts to")))
    };
    let operation = |reads| match reads {
        Reads::AsItLies => sys::cublasOperation_t::CUBLAS_OP_N,
        Reads::Turned => sys::cublasOperation_t::CUBLAS_OP_T,
    };
    let kind = |dtype| match dtype {
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        _ => sys::cudaDataType_t::CUDA_R_32F,
    };
    let compute = match (how, first.0.dtype) {
        (Multiplies::Fast, DType::F32) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
        _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
    };
    let (alpha, beta): (*const f32, *const f32) = (&alpha, &beta);
    let handle = device.cublas_handle();
    let [rows, columns, depth] = [int(m)?, int(n)?, int(k)?];
    let [stride_a, stride_b] = [int(second.0.columns)?, int(first.0.columns)?];
    let stream = device.cuda_stream();
    stream.context().bind_to_thread().w()?;
    timed(&stream, (name, 2.0 * m as f64 * n as f64 * k as f64), || {
        // SAFETY: three matrices of these sizes lie on the device, and the stream that the handle works on is the one they were made on.
        let done = unsafe {
            result::gemm_ex(
                *handle.handle(),
                operation(first.1),
                operation(second.1),
                columns,
                rows,
                depth,
                alpha.cast(),
                first.0.address as *const c_void,
                kind(first.0.dtype),
                stride_b,
                second.0.address as *const c_void,
                kind(second.0.dtype),
                stride_a,
                beta.cast(),
                out as *mut c_void,
                sys::cudaDataType_t::CUDA_R_32F,
                columns,
                compute,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        done.map_err(|e| candle_core::Error::msg(format!("cuBLAS: {m} by {k} by {n}: {e:?}")))
    })
}

/// Operations a second that a GPU reaches in products of bf16 factors [n, n] with f32 sums: what everything else is measured by. The best of
/// `rounds`; waits for the GPU. Errors: not a GPU.
pub fn matrix_rate(device: &Device, n: usize, rounds: usize) -> Result<f64> {
    let cuda = device.as_cuda_device()?;
    // Zeros would be faster than anything real.
    let values: Vec<f32> = (0..n * n).map(|i| ((i * 7919) % 1009) as f32 / 504.0 - 1.0).collect();
    let factor = Factor::rounded(&Tensor::from_vec(values, (n, n), device)?, Precision::Bf16)?;
    let out = room((n, n), DType::F32, cuda)?;
    let mut best = f64::INFINITY;
    for _ in 0..=rounds {
        device.synchronize()?;
        let began = Instant::now();
        product("product", (&factor, Reads::AsItLies), (&factor, Reads::Turned), (1.0, 0.0), Multiplies::Exactly, &out)?;
        device.synchronize()?;
        best = best.min(began.elapsed().as_secs_f64());
    }
    Ok(2.0 * (n as f64).powi(3) / best)
}
