//! Sums over the GPUs of several processes, by NCCL: one communicator, made, used and given up.
//!
//! Refuses to know who the ranks are, and to wait for ever. A kernel that adds up runs until all ranks take part, so one whose peer is gone
//! never ends. So nothing here blocks: NCCL is asked how far it is, and in between the caller is asked whether it still makes sense to wait.
//! What does not is given up (`ncclCommAbort`), which ends the kernels and leaves the stream usable.

use super::launch::address;
use super::{first_line, plain, search};
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DriverError};
use candle_core::cuda_backend::cudarc::nccl::sys::{self, ncclResult_t};
use candle_core::{DType, Device, Tensor};
use std::cell::Cell;
use std::ffi::CStr;
use std::ptr::{self, NonNull};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// What rank 0 makes and all ranks of a communicator are given.
pub(crate) type Id = [u8; 128];

/// Between two looks.
const LOOK: Duration = Duration::from_micros(100);
/// Until something that no rank has failed at is given up nevertheless; as long as PyTorch waits.
const PATIENCE: Duration = Duration::from_secs(600);
/// For giving up. NCCL may wait there for ranks on the same machine, which may be gone; by then its kernels have been told to end.
const GIVING_UP: Duration = Duration::from_secs(5);

/// The oldest NCCL that makes communicators without blocking: 2.14.
const OLDEST: i32 = 21400;
/// The size of its settings. Newer ones take their own defaults for what they have behind these.
const SETTINGS_BYTES: usize = 24;
/// What marks settings as such.
const MAGIC: u32 = 0xcafe_beef;

/// Why something was not done.
#[derive(Debug)]
pub(crate) enum Failure<E> {
    /// The caller wanted no more waiting.
    Lost(E),
    /// NCCL's, or CUDA's, own words.
    Nccl(String),
}

impl<E> From<String> for Failure<E> {
    fn from(words: String) -> Self {
        Failure::Nccl(words)
    }
}

/// Opens NCCL's library, once a process, and says its version, such as 2.30.7. Error: one sentence about what is missing.
pub(crate) fn version() -> Result<String, String> {
    search::collectives()?;
    let mut version = 0;
    // SAFETY: writes one number to the place that it is given.
    done(unsafe { sys::ncclGetVersion(&raw mut version) })?;
    let name = format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100);
    // Up to 2.8 the major number counted thousands.
    if version < OLDEST { Err("libnccl.so.2 is older than 2.14".into()) } else { Ok(name) }
}

/// Something that no other communicator has.
pub(crate) fn new_id() -> Result<Id, String> {
    search::collectives()?;
    let mut id = sys::ncclUniqueId { internal: [0; 128] };
    // SAFETY: writes all of the id.
    done(unsafe { sys::ncclGetUniqueId(&raw mut id) })?;
    Ok(id.internal.map(|byte| byte as u8))
}

/// This process's part of a group of GPUs that add up together.
pub(crate) struct Communicator {
    /// None once given up.
    raw: Cell<Option<NonNull<sys::ncclComm>>>,
    stream: Arc<CudaStream>,
}

// SAFETY: NCCL's communicators belong to no thread; with one owner and no `Sync`, one thread at a time speaks to this one.
unsafe impl Send for Communicator {}

impl std::fmt::Debug for Communicator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Communicator").field("given_up", &self.raw.get().is_none()).finish_non_exhaustive()
    }
}

impl Communicator {
    /// Rank number `rank` of `of` that were given the same id, with this device; returns when all have come. `lost` says why it makes no
    /// sense to wait, if it does not.
    pub(crate) fn connect<E>(
        device: &Device,
        id: Id,
        (rank, of): (u32, u32),
        lost: &dyn Fn() -> Option<E>,
    ) -> Result<Self, Failure<E>> {
        search::collectives()?;
        let stream = device.as_cuda_device().map_err(|e| first_line(&e))?.cuda_stream();
        stream.context().bind_to_thread().map_err(|e| plain(&e))?;
        let id = sys::ncclUniqueId { internal: id.map(|byte| byte as _) };
        let (mut settings, mut raw) = (settings(), ptr::null_mut());
        // SAFETY: NCCL writes a communicator to `raw`, or null, and has read the settings when it returns.
        let begun = unsafe { sys::ncclCommInitRankConfig(&raw mut raw, of as i32, id, rank as i32, &raw mut settings) };
        let communicator = Self { raw: Cell::new(NonNull::new(raw)), stream };
        done(begun)?;
        communicator.settle(lost)?;
        Ok(communicator)
    }

    /// Puts the sums over all ranks in the place of the tensors' values, f32 on the communicator's device, and waits for that. All ranks give
    /// tensors of the same shapes in the same order.
    ///
    /// All ranks get the same bits. Of two ranks they are those of a + b; of more, the order of a sum is NCCL's. After a failure the values are
    /// whatever they are, and the communicator is given up.
    pub(crate) fn all_reduce<E>(&self, tensors: &[Tensor], lost: &dyn Fn() -> Option<E>) -> Result<(), Failure<E>> {
        let added = self.enqueue(tensors).map_err(Failure::Nccl).and_then(|()| {
            // Before that the kernels may not be on the stream yet.
            self.settle(lost)?;
            let event = self.stream.record_event(None).map_err(|e| plain(&e))?;
            wait(lost, || {
                self.settled()?;
                event.try_is_complete().map_err(|e| plain(&e))
            })
        });
        if added.is_err() {
            self.give_up();
        }
        added
    }

    /// Has NCCL put its kernels onto the stream, behind everything that was launched before.
    fn enqueue(&self, tensors: &[Tensor]) -> Result<(), String> {
        let communicator = self.raw()?;
        let placed = |t: &Tensor| Ok((address(t, DType::F32)?, t.elem_count()));
        let of_values = tensors.iter().filter(|t| t.elem_count() > 0).map(placed);
        let places = of_values.collect::<candle_core::Result<Vec<_>>>().map_err(|e| first_line(&e))?;
        let stream = &self.stream;
        stream.context().bind_to_thread().map_err(|e: DriverError| plain(&e))?;
        // SAFETY: opens a group in this thread, which is closed below whatever happens in it.
        done(unsafe { sys::ncclGroupStart() })?;
        let (f32, sum) = (sys::ncclDataType_t::ncclFloat32, sys::ncclRedOp_t::ncclSum);
        let mut refused = None;
        for (place, count) in places {
            // SAFETY: so many f32 lie there, which live until the caller has waited for this stream or given the communicator up.
            let result = unsafe {
                sys::ncclAllReduce(place as _, place as _, count, f32, sum, communicator.as_ptr(), stream.cu_stream().cast())
            };
            if let Err(words) = done(result) {
                refused = Some(words);
                break;
            }
        }
        // SAFETY: closes the group.
        let ended = done(unsafe { sys::ncclGroupEnd() });
        refused.map_or(Ok(()), Err).and(ended.map(|_| ()))
    }

    fn raw(&self) -> Result<NonNull<sys::ncclComm>, String> {
        self.raw.get().ok_or_else(|| "the communicator was given up before".into())
    }

    /// Whether NCCL has done what it was asked for last, as far as the host is concerned. Errors: it has failed.
    fn settled(&self) -> Result<bool, String> {
        let mut state = ncclResult_t::ncclInternalError;
        // SAFETY: the communicator is whole, and one result is written to the place that is given.
        done(unsafe { sys::ncclCommGetAsyncError(self.raw()?.as_ptr(), &raw mut state) })?;
        done(state)
    }

    fn settle<E>(&self, lost: &dyn Fn() -> Option<E>) -> Result<(), Failure<E>> {
        wait(lost, || self.settled())
    }

    /// Ends what is under way and frees what NCCL holds. In a thread of its own, since nobody can say how long NCCL takes for it.
    fn give_up(&self) {
        let Some(raw) = self.raw.take() else { return };
        let (address, context) = (raw.as_ptr() as usize, Arc::clone(self.stream.context()));
        let (over, ended) = mpsc::channel();
        let give_up = move || {
            // Without its device current the thread could only leave the memory where it is.
            if context.bind_to_thread().is_ok() {
                // SAFETY: nobody else has the communicator any more.
                unsafe { sys::ncclCommAbort(address as sys::ncclComm_t) };
            }
            let _ = over.send(());
        };
        if thread::Builder::new().name("giving NCCL up".into()).spawn(give_up).is_ok() {
            let _ = ended.recv_timeout(GIVING_UP);
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// Settings of a communicator that never blocks.
fn settings() -> sys::ncclConfig_t {
    // SAFETY: a structure of numbers and pointers, for which zeros are values.
    let mut settings: sys::ncclConfig_t = unsafe { std::mem::zeroed() };
    (settings.size, settings.magic, settings.version, settings.blocking) = (SETTINGS_BYTES, MAGIC, OLDEST as u32, 0);
    settings
}

fn wait<E>(lost: &dyn Fn() -> Option<E>, mut over: impl FnMut() -> Result<bool, String>) -> Result<(), Failure<E>> {
    let begun = Instant::now();
    while !over()? {
        if let Some(error) = lost() {
            return Err(Failure::Lost(error));
        }
        if begun.elapsed() > PATIENCE {
            return Err(Failure::Nccl(format!("nothing came of it for {} s", PATIENCE.as_secs())));
        }
        thread::sleep(LOOK);
    }
    Ok(())
}

/// Whether it is done; else it is under way. Errors: what NCCL says of the failure.
fn done(result: ncclResult_t) -> Result<bool, String> {
    match result {
        ncclResult_t::ncclSuccess => Ok(true),
        ncclResult_t::ncclInProgress => Ok(false),
        // SAFETY: both are static texts of NCCL's, which a result can only come from if it is there.
        failed => Err(unsafe { words(sys::ncclGetErrorString(failed), sys::ncclGetLastError(ptr::null_mut())) }),
    }
}

/// What the result means, and what happened last, in one line.
///
/// # Safety
///
/// Both must be null or end with a zero.
unsafe fn words(meaning: *const std::ffi::c_char, last: *const std::ffi::c_char) -> String {
    let text = |from: *const std::ffi::c_char| {
        // SAFETY: the caller's promise.
        let all = if from.is_null() { "".into() } else { unsafe { CStr::from_ptr(from) }.to_string_lossy() };
        all.lines().map(str::trim).find(|line| !line.is_empty()).map(String::from)
    };
    let all: Vec<String> = [text(meaning), text(last)].into_iter().flatten().collect();
    if all.is_empty() { "no reason was given".into() } else { all.join(": ") }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn gpu() -> Option<Device> {
        let there = version().and_then(|_| crate::cuda::open(0));
        assert!(there.is_ok() || std::env::var_os("POTSTILL_TEST_DEVICE").is_none(), "{there:?}");
        there.ok()
    }

    fn words<T>(result: Result<T, Failure<()>>) -> String {
        match result.map(|_| ()).unwrap_err() {
            Failure::Nccl(words) => words,
            Failure::Lost(()) => panic!("nobody was lost"),
        }
    }

    #[test]
    fn one_rank_adds_up_to_itself_and_only_what_fits() {
        let Some(device) = gpu() else { return };
        let connect = || Communicator::connect(&device, new_id().unwrap(), (0, 1), &|| None::<()>).unwrap();
        let values = |n: usize| Tensor::from_vec((0..n).map(|i| i as f32).collect::<Vec<_>>(), n, &device).unwrap();
        let nothing = crate::cuda::launch::room(0, DType::F32, device.as_cuda_device().unwrap()).unwrap();
        let (tensors, communicator) = ([values(3), nothing, values(20_000)], connect());
        for _ in 0..2 {
            communicator.all_reduce(&tensors, &|| None::<()>).unwrap();
        }
        communicator.all_reduce(&[], &|| None::<()>).unwrap();
        assert_eq!(tensors[0].to_vec1::<f32>().unwrap(), [0.0, 1.0, 2.0]);
        assert_eq!(tensors[2].to_vec1::<f32>().unwrap()[19_999], 19_999.0);
        // A failure is the end of it, whatever comes after.
        let other = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
        let said = words(communicator.all_reduce(&[other], &|| None));
        assert!(said.starts_with("expected a tensor on a GPU"), "{said}");
        assert_eq!(words(communicator.all_reduce(&tensors, &|| None)), "the communicator was given up before");
        let said = words(connect().all_reduce(&[Tensor::zeros(3, DType::F64, &device).unwrap()], &|| None));
        assert_eq!(said, "expected F32 values, found F64");
        let said = words(Communicator::connect(&device, [0; 128], (1, 1), &|| None));
        assert!(said.starts_with("invalid argument"), "{said}");
    }

    #[test]
    fn what_failed_is_one_line() {
        // SAFETY: texts that end with a zero, and none.
        let said = |meaning: Option<&CStr>, last: Option<&CStr>| unsafe {
            super::words(meaning.map_or(ptr::null(), CStr::as_ptr), last.map_or(ptr::null(), CStr::as_ptr))
        };
        assert_eq!(said(Some(c"invalid usage"), Some(c"\n Duplicate GPU\nmore")), "invalid usage: Duplicate GPU");
        assert_eq!(said(Some(c"internal error"), Some(c"")), "internal error");
        assert_eq!(said(None, None), "no reason was given");
    }
}
