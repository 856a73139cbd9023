//! Weights on their way to the GPU while it computes: copied into pinned memory by the host, and from there by the device, on a stream of
//! its own. Refuses to know which layer comes next.
//!
//! ```text
//! work's stream    room for layer i+1 ─ e ─ compute layer i ····················· wait f ─ compute layer i+1
//! host                                      mapped file ─► pinned 0 ─► pinned 1 ─► pinned 0 …
//! copies' stream                     wait e ─────────────── copy 0 ──── copy 1 ─── … f
//! ```
//! Room is asked for before layer i is launched: memory that layer i - 1 let go of belongs to it once that layer is through, which is what
//! event e says. A pinned buffer is filled again when its last copy is through.

use super::launch::{address, room};
use super::pinned::{Buffer, WAITS};
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream};
use candle_core::{CudaDevice, DType, Result, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Bytes of a pinned buffer; two of them keep a bus of 50 GB/s busy for 2.5 ms each.
const BUFFER: usize = 64 << 20;
/// Bytes that a thread copies at a time.
const PIECE: usize = 1 << 20;

/// Keeps whoever launches one stretch of work ahead of the GPU and no further, so that progress and a wish to stop mean something.
pub(crate) struct Pace {
    device: CudaDevice,
    /// The end of what was launched before.
    last: Option<CudaEvent>,
}

impl Pace {
    /// Nothing was launched yet.
    pub(crate) fn new(device: &CudaDevice) -> Self {
        Self { device: device.clone(), last: None }
    }

    /// Said once a stretch was launched: waits for the end of the one before it.
    pub(crate) fn launched(&mut self) -> Result<()> {
        let now = self.device.cuda_stream().record_event(WAITS).w()?;
        match self.last.replace(now) {
            Some(last) => last.synchronize().w(),
            None => Ok(()),
        }
    }
}

/// The way for weights.
pub(crate) struct Staging {
    device: CudaDevice,
    copies: Arc<CudaStream>,
    buffers: [Buffer; 2],
}

/// Room on the device, and what is to lie there.
pub(crate) struct Reserved<'a> {
    jobs: Vec<(Tensor, &'a [u8])>,
}

impl<'a> Reserved<'a> {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        Self { jobs: Vec::new() }
    }

    /// Room for bytes, u8 `[n]`; they are there when they have [arrived](Staging::bring).
    pub(crate) fn room(&mut self, bytes: &'a [u8], device: &CudaDevice) -> Result<Tensor> {
        let tensor = room(bytes.len(), DType::U8, device)?;
        if !bytes.is_empty() {
            self.jobs.push((tensor.clone(), bytes));
        }
        Ok(tensor)
    }
}

/// Room that is ready to be written from event e on.
pub(crate) struct Ready<'a> {
    reserved: Reserved<'a>,
    from: CudaEvent,
}

impl Staging {
    /// Two pinned buffers and a stream.
    pub(crate) fn new(device: &CudaDevice) -> Result<Self> {
        let context = Arc::clone(device.cuda_stream().context());
        let copies = context.new_stream().w()?;
        let pool = super::pool(device)?;
        let buffers = [pool.take(BUFFER, &context)?, pool.take(BUFFER, &context)?];
        Ok(Self { device: device.clone(), buffers, copies })
    }

    /// What was reserved may be written once everything that was launched until now is through.
    pub(crate) fn mark<'a>(&self, reserved: Reserved<'a>) -> Result<Ready<'a>> {
        Ok(Ready { reserved, from: self.device.cuda_stream().record_event(None).w()? })
    }

    /// Copies everything, and has whatever is launched from now on wait for it. Waits itself for the host's part alone, which reads the
    /// files.
    pub(crate) fn bring(&mut self, ready: &Ready<'_>) -> Result<()> {
        let brought = self.copy(ready);
        if brought.is_err() {
            // The room is let go of by the other stream, which knows nothing of these copies.
            self.copies.synchronize().w()?;
        }
        brought
    }

    fn copy(&mut self, ready: &Ready<'_>) -> Result<()> {
        self.copies.wait(&ready.from).w()?;
        let mut turn = 0;
        for (tensor, bytes) in &ready.reserved.jobs {
            let mut place = address(tensor, DType::U8)?;
            for part in bytes.chunks(BUFFER) {
                let buffer = &mut self.buffers[turn % 2];
                turn += 1;
                let pinned = buffer.bytes(part.len())?;
                pinned.par_chunks_mut(PIECE).zip(part.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
                // SAFETY: the room is as long as the bytes.
                unsafe { buffer.copy_to(place, part.len(), &self.copies) }?;
                place += part.len() as u64;
            }
        }
        let there = self.copies.record_event(None).w()?;
        self.device.cuda_stream().wait(&there).w()
    }
}

impl Drop for Staging {
    /// The stream may go once its copies are through.
    fn drop(&mut self) {
        // What went wrong shows at the next call.
        let _ = self.copies.synchronize();
    }
}
