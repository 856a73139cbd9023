//! Launching kernels on tensors: where a tensor lies on the GPU, room for results, one launch. Refuses to know what a kernel computes and
//! to wait for one.
//!
//! All work goes over the device's one stream, and so does the freeing of memory: a tensor may be let go as soon as what reads it was
//! launched.

use super::function;
use super::profile::timed;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute_enum;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg, result};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Shape, Storage, Tensor, bail};

/// Threads of a block. Kernels are right for any number of whole warps; with so many they keep a GPU busy (`kernels/flat.cuh`).
const THREADS: u32 = 256;
/// Values that a block of a flat kernel takes; likewise.
const PER_BLOCK: usize = 2048;
/// Bytes of a block's own memory that need no asking.
const PLAIN_SHARED: u32 = 48 << 10;

/// One argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum Argument {
    /// Where something lies on the device.
    Place(u64),
    /// `int`.
    Int(i32),
    /// `unsigned`.
    Unsigned(u32),
    /// `long long`.
    Long(i64),
    /// `unsigned long long`.
    UnsignedLong(u64),
    /// `float`.
    Float(f32),
    /// `double`.
    Double(f64),
    /// A structure of six 8-byte words, by value.
    Words([u64; 6]),
}

/// How many threads run a kernel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    /// Blocks.
    pub(super) blocks: (u32, u32),
    /// Threads of a block.
    pub(super) threads: u32,
    /// Bytes of a block's own memory beside what the kernel declares.
    pub(super) shared: u32,
}

impl Grid {
    /// Of a kernel that goes over `n` values, whatever their shape.
    pub(super) fn flat(n: usize) -> Self {
        Self::blocks(n.div_ceil(PER_BLOCK))
    }

    /// `n` blocks: one a row.
    pub(super) fn blocks(n: usize) -> Self {
        Self { blocks: (n as u32, 1), threads: THREADS, shared: 0 }
    }
}

/// Has the kernel run after everything that was launched before. Errors: no such kernel, or arguments that no device takes.
///
/// # Safety
///
/// The arguments must be the kernel's, in its order, and every place as large as the kernel makes of the sizes beside it.
pub(super) unsafe fn launch(device: &CudaDevice, name: &'static str, grid: Grid, arguments: &[Argument]) -> Result<()> {
    let Grid { blocks: (x, y), threads, shared } = grid;
    if x == 0 || y == 0 {
        return Ok(());
    }
    let stream = device.cuda_stream();
    // The thread may be one that never spoke to this GPU.
    stream.context().bind_to_thread().w()?;
    let function = function(device, name)?;
    if shared > PLAIN_SHARED {
        let most = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(most, shared as i32).map_err(|e| {
            candle_core::Error::msg(format!(
                "kernel {name} wants {shared} bytes of a block's own memory, which this GPU has not: {e}"
            ))
        })?;
    }
    let mut call = stream.launch_builder(&function);
    for argument in arguments {
        match argument {
            Argument::Place(value) | Argument::UnsignedLong(value) => call.arg(value),
            Argument::Int(value) => call.arg(value),
            Argument::Unsigned(value) => call.arg(value),
            Argument::Long(value) => call.arg(value),
            Argument::Float(value) => call.arg(value),
            Argument::Double(value) => call.arg(value),
            Argument::Words(value) => call.arg(value),
        };
    }
    let shape = LaunchConfig { grid_dim: (x, y, 1), block_dim: (threads, 1, 1), shared_mem_bytes: shared };
    timed(&stream, (name, 0.0), || {
        // SAFETY: the caller's promise.
        unsafe { call.launch(shape) }.map(|_| ()).map_err(|e| candle_core::Error::msg(format!("kernel {name}: {e}")))
    })
}

/// The device of a tensor. Errors: it is not on a GPU.
pub(super) fn device_of(t: &Tensor) -> Result<CudaDevice> {
    t.device().as_cuda_device().cloned()
}

/// Where a contiguous tensor of this dtype lies. Errors: it is none, or is not on a GPU.
pub(super) fn place(t: &Tensor, dtype: DType) -> Result<Argument> {
    address(t, dtype).map(Argument::Place)
}

/// [`place`] of f32 values.
pub(super) fn floats(t: &Tensor) -> Result<Argument> {
    place(t, DType::F32)
}

/// The same as a number.
pub(super) fn address(t: &Tensor, dtype: DType) -> Result<u64> {
    if t.dtype() != dtype {
        bail!("expected {dtype:?} values, found {:?}", t.dtype());
    }
    let (storage, layout) = t.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        bail!("expected a tensor on a GPU, found one on {:?}", t.device().location());
    };
    let Some((start, _)) = layout.contiguous_offsets() else {
        bail!("expected a contiguous tensor, found strides {:?} for shape {:?}", layout.stride(), t.dims());
    };
    let begin = match dtype {
        DType::F32 => begin::<f32>(storage),
        DType::F64 => begin::<f64>(storage),
        DType::BF16 => begin::<half::bf16>(storage),
        DType::U8 => begin::<u8>(storage),
        DType::U32 => begin::<u32>(storage),
        DType::I64 => begin::<i64>(storage),
        other => bail!("no kernel takes {other:?}"),
    }?;
    Ok(begin + (start * dtype.size_in_bytes()) as u64)
}

fn begin<T: candle_core::cuda_backend::CudaDType>(storage: &CudaStorage) -> Result<u64> {
    let stream = storage.device.cuda_stream();
    let slice = storage.as_cuda_slice::<T>()?;
    Ok(slice.device_ptr(&stream).0)
}

/// Room for a result; what it holds is whatever lay there. At least one element is asked for: the driver has no memory of none.
pub(super) fn room(shape: impl Into<Shape>, dtype: DType, device: &CudaDevice) -> Result<Tensor> {
    let (shape, device) = (shape.into(), Device::Cuda(device.clone()));
    if shape.elem_count() == 0 {
        // SAFETY: nothing is read of it.
        return unsafe { Tensor::empty(1, dtype, &device) }?.narrow(0, 0, 0)?.reshape(shape);
    }
    // SAFETY: whoever asks has a kernel write all of it first.
    unsafe { Tensor::empty(shape, dtype, &device) }
}

/// Puts values in the place of a tensor's own.
pub(super) fn overwrite(t: &Tensor, values: &[f32]) -> Result<()> {
    if values.len() != t.elem_count() {
        bail!("{} values do not fit {:?}", values.len(), t.dims());
    }
    let stream = device_of(t)?.cuda_stream();
    stream.context().bind_to_thread().w()?;
    // SAFETY: the tensor has room for all the values, which the driver has copied when the call returns.
    unsafe { result::memcpy_htod_async(address(t, DType::F32)?, values, stream.cu_stream()) }.w()
}

/// Copies f32 values on the device into the place of as many others.
pub(super) fn copy(from: &Tensor, to: &Tensor) -> Result<()> {
    if from.elem_count() != to.elem_count() {
        bail!("{:?} does not fit {:?}", from.dims(), to.dims());
    }
    let (stream, bytes) = (device_of(to)?.cuda_stream(), 4 * to.elem_count());
    stream.context().bind_to_thread().w()?;
    let (to, from) = (address(to, DType::F32)?, address(from, DType::F32)?);
    // SAFETY: both have as many bytes.
    timed(&stream, ("copy on the GPU", 0.0), || unsafe { result::memcpy_dtod_async(to, from, bytes, stream.cu_stream()) }.w())
}

/// Bytes as they are, as u8 `[n]`.
pub(super) fn upload(bytes: &[u8], device: &CudaDevice) -> Result<Tensor> {
    if bytes.is_empty() {
        return room(0, DType::U8, device);
    }
    let slice = device.cuda_stream().clone_htod(bytes).w()?;
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, device.clone()));
    Ok(Tensor::from_storage(storage, bytes.len(), candle_core::op::BackpropOp::none(), false))
}
