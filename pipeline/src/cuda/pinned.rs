//! Copies between the host and a GPU that nobody waits for: through pinned memory, in the order of the device's one stream. Refuses to know
//! what is copied.
//!
//! ```text
//! send     values ─► pinned ─ copy ─► tensor          whatever is launched later sees them
//! fetch    tensor ─ copy ─► pinned ─ event            wait: the values, as they were when it was asked for
//! ```
//! A copy from or to ordinary memory may have the host wait for all that was launched before, which leaves the GPU without work. Pinned
//! memory is kept for as long as the GPU is open, since asking the system for it takes longer than most copies: a buffer is free again once
//! its last copy is through.

use super::launch::{address, room};
use super::profile::timed;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaEvent, CudaStream, PinnedHostSlice, result};
use candle_core::{CudaDevice, Result, Shape, Tensor, WithDType};
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of the smallest buffer.
const SMALLEST: usize = 64 << 10;
/// Events that the host sleeps for, rather than asking again and again.
pub(super) const WAITS: Option<CUevent_flags> = Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC);

/// The pinned memory of a GPU that nobody uses, or that a copy may still use.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<Vec<Memory>>);

#[derive(Debug)]
struct Memory {
    bytes: PinnedHostSlice<u8>,
    /// The end of the last copy.
    copied: CudaEvent,
}

/// Pinned memory in use; back in its pool at the end.
#[derive(Debug)]
pub(super) struct Buffer {
    pool: Arc<Pool>,
    memory: Option<Memory>,
}

impl Pool {
    /// A buffer of at least so many bytes, which no copy uses. What it holds is whatever lay there.
    pub(super) fn take(self: &Arc<Self>, bytes: usize, context: &Arc<CudaContext>) -> Result<Buffer> {
        context.bind_to_thread().w()?;
        // Few sizes, so that buffers are found again, and a small copy never takes a large one away.
        let size = bytes.next_power_of_two().max(SMALLEST);
        let free = {
            let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // The first of a size was given back first; where a copy uses it, others are mostly used too, and are not asked one by one.
            let first = idle.iter().position(|memory| memory.bytes.len() == size);
            first.filter(|i| idle[*i].copied.is_complete()).map(|i| idle.remove(i))
        };
        let memory = match free {
            Some(memory) => memory,
            None => {
                // SAFETY: whoever asks writes it, or has the device write it, before it is read. Plain memory: the host reads it too.
                let bytes = unsafe { context.alloc_pinned_with_flags(size, 0) }.w()?;
                Memory { bytes, copied: context.new_event(WAITS).w()? }
            }
        };
        Ok(Buffer { pool: Arc::clone(self), memory: Some(memory) })
    }
}

impl Buffer {
    fn memory(&mut self) -> Result<&mut Memory> {
        self.memory.as_mut().ok_or_else(|| candle_core::Error::Msg("pinned memory that was given back".into()))
    }

    /// Its first `n` bytes, once the last copy is through.
    pub(super) fn bytes(&mut self, n: usize) -> Result<&mut [u8]> {
        let memory = self.memory()?;
        memory.copied.synchronize().w()?;
        let bytes = memory.bytes.as_mut_slice().w()?;
        let all = bytes.len();
        bytes.get_mut(..n).ok_or_else(|| candle_core::Error::Msg(format!("{n} bytes in a buffer of {all}")))
    }

    /// Copies its first `n` bytes to `place` on the device.
    ///
    /// # Safety
    ///
    /// There must be room for them, which stays until the copy is through.
    pub(super) unsafe fn copy_to(&mut self, place: u64, n: usize, stream: &CudaStream) -> Result<()> {
        let bytes = self.bytes(n)?;
        // SAFETY: the caller's promise; the buffer stays as it is until the copy's event.
        timed(stream, ("copy to the GPU", 0.0), || unsafe { result::memcpy_htod_async(place, bytes, stream.cu_stream()) }.w())?;
        self.memory()?.copied.record(stream).w()
    }

    /// Copies `n` bytes at `place` on the device to its beginning.
    ///
    /// # Safety
    ///
    /// There must be so many bytes, and they must stay until the copy is through.
    unsafe fn copy_from(&mut self, place: u64, n: usize, stream: &CudaStream) -> Result<()> {
        let bytes = self.bytes(n)?;
        // SAFETY: the caller's promise; nobody reads the buffer before the copy's event.
        timed(stream, ("copy to the host", 0.0), || unsafe { result::memcpy_dtoh_async(bytes, place, stream.cu_stream()) }.w())?;
        self.memory()?.copied.record(stream).w()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.pool.0.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
        }
    }
}

/// The values on a device, for whatever is launched from now on. Does not wait for it.
pub(crate) fn send<T: WithDType>(values: &[T], shape: impl Into<Shape>, device: &CudaDevice) -> Result<Tensor> {
    let shape = shape.into();
    if shape.elem_count() != values.len() {
        candle_core::bail!("{} values do not fit {shape:?}", values.len());
    }
    let tensor = room(shape, T::DTYPE, device)?;
    let n = size_of_val(values);
    if n > 0 {
        let stream = device.cuda_stream();
        let mut buffer = super::pool(device)?.take(n, stream.context())?;
        // SAFETY: numbers without padding, n bytes of them.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), n) };
        buffer.bytes(n)?.copy_from_slice(bytes);
        // SAFETY: the tensor has n bytes; when it is let go of, its memory is freed in the same stream's order.
        unsafe { buffer.copy_to(address(&tensor, T::DTYPE)?, n, &stream) }?;
    }
    Ok(tensor)
}

/// A tensor's values on their way to the host.
#[derive(Debug)]
pub(crate) struct Fetched<T> {
    buffer: Option<Buffer>,
    count: usize,
    values: PhantomData<T>,
}

/// Asks for the values of a contiguous tensor as they are after all that was launched until now. Does not wait for them.
pub(crate) fn fetch<T: WithDType>(t: &Tensor) -> Result<Fetched<T>> {
    let count = t.elem_count();
    let n = count * size_of::<T>();
    let buffer = if n == 0 {
        None
    } else {
        let device = t.device().as_cuda_device()?;
        let stream = device.cuda_stream();
        let mut buffer = super::pool(device)?.take(n, stream.context())?;
        // SAFETY: the tensor has n bytes; when it is let go of, its memory is freed in the same stream's order.
        unsafe { buffer.copy_from(address(t, T::DTYPE)?, n, &stream) }?;
        Some(buffer)
    };
    Ok(Fetched { buffer, count, values: PhantomData })
}

impl<T: WithDType> Fetched<T> {
    /// The values, row by row. Waits for them, and for nothing that was launched later.
    pub(crate) fn wait(self) -> Result<Vec<T>> {
        let mut values = vec![T::from_f64(0.0); self.count];
        if let Some(mut buffer) = self.buffer {
            let bytes = buffer.bytes(size_of_val(&values[..]))?;
            // SAFETY: as many bytes, and any bytes are values of these types; the buffer shares nothing with the list.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), values.as_mut_ptr().cast::<u8>(), bytes.len()) };
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::launch::overwrite;
    use super::super::{describe, open};
    use super::*;
    use candle_core::DType;

    /// On a GPU, or an emulated one, of which pinned memory holds no data before it was waited for, and which ends the process where it is
    /// written too early.
    #[test]
    fn values_are_those_of_the_moment_they_were_asked_for() {
        let Ok(device) = open(0) else { return };
        let cuda = device.as_cuda_device().unwrap();
        let first: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        let tensor = send(&first, (10, 100), cuda).unwrap();
        let before = fetch::<f32>(&tensor).unwrap();
        overwrite(&tensor, &[7.0; 1000]).unwrap();
        let after = fetch::<f32>(&tensor.narrow(0, 3, 2).unwrap()).unwrap();
        assert_eq!(before.wait().unwrap(), first);
        assert_eq!(after.wait().unwrap(), [7.0; 200]);
        let wide = send(&[-1i64, i64::MAX], 2, cuda).unwrap();
        assert_eq!(fetch::<i64>(&wide).unwrap().wait().unwrap(), [-1, i64::MAX]);
        let nothing = send::<u32>(&[], (0, 3), cuda).unwrap();
        assert_eq!((nothing.dims(), fetch::<u32>(&nothing).unwrap().wait().unwrap()), (&[0, 3][..], Vec::new()));
        assert!(send(&[1u32], 2, cuda).is_err());
    }

    #[test]
    fn a_buffer_is_used_again_once_its_copy_is_through() {
        let Ok(device) = open(0) else { return };
        let cuda = device.as_cuda_device().unwrap();
        let (stream, own): (_, Arc<Pool>) = (cuda.cuda_stream(), Arc::default());
        let context = Arc::clone(stream.context());
        let place = |buffer: &mut Buffer| buffer.bytes(1).unwrap().as_ptr() as usize;
        let room = send(&[0u8; 4], 4, cuda).unwrap();
        let mut one = own.take(SMALLEST, &context).unwrap();
        let first = place(&mut one);
        one.bytes(4).unwrap().copy_from_slice(&[1, 2, 3, 4]);
        // SAFETY: there is room for four bytes until the end of the test.
        unsafe { one.copy_to(address(&room, DType::U8).unwrap(), 4, &stream) }.unwrap();
        drop(one);
        // A real GPU may be through already; the emulated one says that it is not.
        let mut other = own.take(SMALLEST, &context).unwrap();
        assert!(describe(cuda).unwrap().name != "Emulated GPU" || place(&mut other) != first, "a buffer in use");
        stream.synchronize().unwrap();
        drop(other);
        assert_eq!(place(&mut own.take(1, &context).unwrap()), first);
        assert_ne!(place(&mut own.take(SMALLEST + 1, &context).unwrap()), first, "a buffer that is too small");
        assert!(own.take(1, &context).unwrap().bytes(SMALLEST + 1).is_err());
        assert_eq!(room.to_vec1::<u8>().unwrap(), [1, 2, 3, 4]);
    }
}
