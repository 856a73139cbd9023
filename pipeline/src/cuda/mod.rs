//! The way to an NVIDIA GPU: opening one, and our kernels on it.
//!
//! Owns the device's start-up and the kernels' functions by name. Refuses to know what a kernel computes. The idea: CUDA is looked for when
//! a GPU is asked for (`bind.rs`), so the same program starts where there is none.

mod absent;
pub(crate) mod attention;
mod bind;
pub(crate) mod blocks;
pub(crate) mod collective;
pub(crate) mod head;
mod launch;
pub(crate) mod linear;
pub(crate) mod loss;
pub(crate) mod optimizer;
pub(crate) mod pinned;
mod placed;
mod product;
pub(crate) mod profile;
mod search;
pub(crate) mod staging;

pub use placed::DeviceWeight;
pub use product::matrix_rate;

use candle_core::cuda_backend::{WrapErr, cudarc};
use candle_core::{CudaDevice, Device};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError, result, sys};
use cudarc::nvrtc::Ptx;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

/// Our kernels as text that a driver compiles, for compute capability 8.0 and newer.
static PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

/// Our kernels as machine code of compute capability 9.0.
static MACHINE_CODE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.cubin"));

/// The oldest driver, as CUDA counts, that takes the machine code of the compiler that the kernels are built with.
const DRIVER_OF_MACHINE_CODE: i32 = 13000;

/// The oldest compute capability that the kernels are built for.
const OLDEST: (i32, i32) = (8, 0);

/// Every GPU that was opened, by its number; open until the process ends, so that nothing is called while the driver ends too.
static OPENED: Mutex<BTreeMap<usize, Opened>> = Mutex::new(BTreeMap::new());

struct Opened {
    device: Device,
    module: Arc<CudaModule>,
    functions: HashMap<&'static str, CudaFunction>,
    pinned: Arc<pinned::Pool>,
}

/// Opens GPU number `ordinal` with our kernels loaded; once a process, later calls give the same device. Error: one sentence about what is
/// missing.
///
/// All work of a device goes over one stream of its own, whichever thread gives it, and in that order. (The tensor library's default is one
/// stream a thread, between which nothing is ordered.) Freed memory stays in the driver's pool instead of going back at every synchronisation.
pub fn open(ordinal: usize) -> Result<Device, String> {
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = opened.get(&ordinal) {
        return Ok(known.device.clone());
    }
    let new = start(ordinal)?;
    let device = new.device.clone();
    opened.insert(ordinal, new);
    Ok(device)
}

/// How many GPUs there are here. Error: one sentence, where the driver is not there or does not answer.
pub fn count() -> Result<usize, String> {
    search::driver()?;
    let no_gpu = sys::CUresult::CUDA_ERROR_NO_DEVICE;
    match CudaContext::device_count() {
        Err(e) if e.0 == no_gpu => Ok(0),
        counted => counted
            .map(|n| usize::try_from(n).unwrap_or(0))
            .map_err(|e| format!("the NVIDIA driver does not answer: {}", plain(&e))),
    }
}

fn start(ordinal: usize) -> Result<Opened, String> {
    let count = count()?;
    if ordinal >= count {
        return Err(match count {
            0 => "the NVIDIA driver finds no GPU here".into(),
            1 => "there is one GPU here, cuda:0".into(),
            _ => format!("there are {count} GPUs here, cuda:0 to cuda:{}", count - 1),
        });
    }
    search::mathematics()?;
    let cannot = |e: candle_core::Error| format!("the GPU cannot be opened: {}", first_line(&e));
    let device = Device::new_cuda_with_stream(ordinal).map_err(cannot)?;
    let cuda = device.as_cuda_device().map_err(cannot)?;
    let context = Arc::clone(cuda.cuda_stream().context());
    let capability = context.compute_capability().map_err(|e| plain(&e))?;
    if capability < OLDEST {
        let (is, wanted) = (format!("{}.{}", capability.0, capability.1), format!("{}.{}", OLDEST.0, OLDEST.1));
        return Err(format!("its compute capability is {is}, expected at least {wanted}"));
    }
    keep_freed_memory(&context).map_err(|e| format!("the GPU's memory pool cannot be set up: {}", plain(&e)))?;
    // SAFETY: events would order the uses of a tensor by several streams. Tensors here are made, used and freed on the device's one stream,
    // which is an order already; whoever adds a second stream for copies orders it against this one with events of their own.
    unsafe { cuda.disable_event_tracking() };
    let refused = |e: DriverError| format!("the GPU does not take this build's kernels: {}", plain(&e));
    let runs_machine_code = capability == (9, 0) && driver_version().map_err(refused)? >= DRIVER_OF_MACHINE_CODE;
    let kernels = if runs_machine_code { Ptx::from_binary(MACHINE_CODE.to_vec()) } else { Ptx::from_src(PTX) };
    let module = context.load_module(kernels).map_err(refused)?;
    Ok(Opened { device, module, functions: HashMap::new(), pinned: Arc::default() })
}

/// The driver's own words for an error.
fn plain(error: &DriverError) -> String {
    error.error_string().map_or_else(|_| format!("{:?}", error.0), |words| words.to_string_lossy().into_owned())
}

/// An error of the tensor library without the backtrace that it may carry.
fn first_line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Has the pool that allocations come from keep what is freed, for the next layer or step.
///
/// Its default is to give everything back to the system whenever somebody waits for the GPU, and to ask for it again right after.
fn keep_freed_memory(context: &Arc<CudaContext>) -> Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    context.bind_to_thread()?;
    let mut all = u64::MAX;
    let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: device and pool are the open context's own; the attribute is a u64 that the call reads before it returns.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        result::mem_pool::set_attribute(pool, threshold, (&raw mut all).cast())
    }
}

/// A kernel of ours by name, on a device that [`open`] gave; found once, then kept. Error: no kernel of that name, or another device.
pub fn function(device: &CudaDevice, name: &'static str) -> candle_core::Result<CudaFunction> {
    of_opened(device, |here| {
        if let Some(function) = here.functions.get(name) {
            return Ok(function.clone());
        }
        let found = here.module.load_function(name);
        let function = found.map_err(|e| candle_core::Error::msg(format!("kernel {name}: {}", plain(&e))))?;
        here.functions.insert(name, function.clone());
        Ok(function)
    })
}

/// The pinned memory of a device that [`open`] gave. Error: another device.
fn pool(device: &CudaDevice) -> candle_core::Result<Arc<pinned::Pool>> {
    of_opened(device, |here| Ok(Arc::clone(&here.pinned)))
}

fn of_opened<T>(device: &CudaDevice, what: impl FnOnce(&mut Opened) -> candle_core::Result<T>) -> candle_core::Result<T> {
    let ordinal = device.cuda_stream().context().ordinal();
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    match opened.get_mut(&ordinal) {
        Some(here) => what(here),
        None => candle_core::bail!("device cuda:{ordinal} was not opened with our kernels"),
    }
}

/// Memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// What nobody holds. What a pool keeps for later counts as held.
    pub free: usize,
    /// All there is.
    pub total: usize,
}

/// How much memory a device has, and has free.
pub fn memory(device: &CudaDevice) -> candle_core::Result<Memory> {
    let (free, total) = device.cuda_stream().context().mem_get_info().w()?;
    Ok(Memory { free, total })
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The product's name.
    pub name: String,
    /// Major and minor number of its instruction set, such as (9, 0).
    pub compute_capability: (i32, i32),
    /// All its memory, in bytes.
    pub memory: usize,
    /// The newest CUDA that its driver speaks, major and minor, such as (13, 0).
    pub driver: (i32, i32),
}

/// The newest CUDA that the driver speaks: 13010 is 13.1.
fn driver_version() -> Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: writes one number to the place that it is given.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result()?;
    Ok(version)
}

/// What a device is.
pub fn describe(device: &CudaDevice) -> candle_core::Result<Description> {
    let stream = device.cuda_stream();
    let context = stream.context();
    let version = driver_version().w()?;
    Ok(Description {
        name: context.name().w()?,
        compute_capability: context.compute_capability().w()?,
        memory: context.total_mem().w()?,
        driver: (version / 1000, version % 1000 / 10),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// With a GPU, or an emulated one, it is opened once; without, one sentence says why, and a call to CUDA is an error and no crash.
    #[test]
    fn a_gpu_is_opened_or_one_sentence_says_why_not() {
        match open(0) {
            Ok(device) => {
                let cuda = device.as_cuda_device().unwrap();
                assert!(device.same_device(&open(0).unwrap()), "a second stream, not ordered with the first");
                assert!(!cuda.is_event_tracking());
                let (memory, description) = (memory(cuda).unwrap(), describe(cuda).unwrap());
                assert!(memory.free <= memory.total && description.memory >= memory.total, "{memory:?} {description:?}");
                assert!(description.compute_capability >= OLDEST && !description.name.is_empty(), "{description:?}");
                let error = function(cuda, "no_such_kernel").unwrap_err().to_string();
                assert!(error.starts_with("kernel no_such_kernel: "), "{error}");
            }
            Err(why) => {
                assert!(!why.is_empty() && !why.contains('\n'), "{why}");
                assert_eq!(open(0).unwrap_err(), why);
                assert!(count().is_ok() || result::device::get(0).is_err(), "a driver that is not bound answered");
            }
        }
    }

    #[test]
    fn a_number_that_is_not_there_is_refused() {
        let Err(why) = open(1000) else { panic!("a thousand GPUs") };
        assert!(count().map_or(!why.is_empty(), |n| why.contains(if n == 0 { "no GPU" } else { "cuda:0" })), "{why}");
    }
}
