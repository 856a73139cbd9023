//! CUDA's functions, bound when a GPU is asked for: one program runs with and without CUDA.
//!
//! The tensor library calls these functions by name and expects the system's linker to find them, so a program built against them would not
//! start where they are not. Here each has a trampoline of that name, which jumps to the address in its slot: an answer "not here" at first,
//! the library's function once [`bind`] has run. Refuses to decide where libraries lie: `search.rs`.

#![allow(non_snake_case, reason = "the functions keep their own names")]

use libloading::Library;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Where a trampoline jumps to: the function once it is bound, else the answer of its library to calls that it cannot take.
#[repr(C)]
pub(super) struct Slot(AtomicUsize, extern "C" fn() -> i32);

/// One function of a library: its name, its slot, and whether the program can do without it.
struct Function {
    name: &'static str,
    slot: &'static Slot,
    needed: bool,
}

/// Declares the functions of one library; both numbers are what its calls answer with while they are not bound.
macro_rules! library {
    ($library:ident, needed $missing:literal { $($needed:ident)* } $(optional $unknown:literal { $($optional:ident)* })?) => {
        mod $library {
            use super::{Function, Slot};
            use std::sync::atomic::AtomicUsize;

            extern "C" fn missing() -> i32 { $missing }
            library!(@trampolines missing, $($needed)*);

            $(
                extern "C" fn unknown() -> i32 { $unknown }
                library!(@trampolines unknown, $($optional)*);
            )?

            pub(super) static FUNCTIONS: &[Function] = &[
                $( Function { name: stringify!($needed), slot: &$needed::SLOT, needed: true }, )*
                $($( Function { name: stringify!($optional), slot: &$optional::SLOT, needed: false }, )*)?
            ];
        }
    };
    (@trampolines $answer:ident, $($name:ident)*) => { $(
        mod $name {
            pub(super) static SLOT: super::Slot = super::Slot(super::AtomicUsize::new(0), super::$answer);

            /// Leaves every register and the stack as the caller set them, so it fits any signature; the scratch registers it uses are
            /// those that a call may destroy anyway.
            #[unsafe(naked)]
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name() {
                #[cfg(target_arch = "x86_64")]
                std::arch::naked_asm!(
                    "mov r11, [rip + {slot}]", "test r11, r11", "jnz 2f", "mov r11, [rip + {slot} + 8]", "2:", "jmp r11", slot = sym SLOT
                );
                #[cfg(target_arch = "aarch64")]
                std::arch::naked_asm!(
                    "adrp x16, {slot}", "add x16, x16, :lo12:{slot}", "ldr x17, [x16]", "cbnz x17, 2f", "ldr x17, [x16, 8]", "2:", "br x17",
                    slot = sym SLOT
                );
            }
        }
    )* };
}

library! { driver,
    needed 100 { // CUDA_ERROR_NO_DEVICE
        cuInit cuDriverGetVersion cuGetErrorName cuGetErrorString
        cuDeviceGet cuDeviceGetCount cuDeviceGetName cuDeviceGetAttribute cuDeviceTotalMem_v2
        cuDevicePrimaryCtxRetain cuDevicePrimaryCtxRelease_v2 cuCtxGetCurrent cuCtxSetCurrent cuCtxSynchronize cuCtxDestroy_v2
        cuDeviceGetDefaultMemPool cuMemPoolSetAttribute cuMemPoolTrimTo
        cuMemAllocAsync cuMemAlloc_v2 cuMemFreeAsync cuMemFree_v2 cuMemGetInfo_v2 cuMemHostAlloc cuMemFreeHost
        cuMemcpyDtoDAsync_v2 cuMemcpyDtoHAsync_v2 cuMemcpyHtoDAsync_v2 cuMemcpyPeerAsync cuMemsetD8Async
        cuStreamCreate cuStreamDestroy_v2 cuStreamSynchronize cuStreamWaitEvent cuStreamIsCapturing
        cuEventCreate cuEventDestroy_v2 cuEventRecord cuEventQuery cuEventSynchronize
        cuModuleLoad cuModuleLoadData cuModuleUnload cuModuleGetFunction cuFuncSetAttribute cuLaunchKernel
    }
    optional 801 { // CUDA_ERROR_NOT_SUPPORTED
        cuFuncGetAttribute cuMemPoolGetAttribute cuEventElapsedTime cuEventElapsedTime_v2 cuLaunchCooperativeKernel
        cuLaunchHostFunc cuStreamCreateWithPriority cuCtxGetStreamPriorityRange cuOccupancyMaxActiveBlocksPerMultiprocessor
        cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags cuOccupancyMaxPotentialBlockSize
        cuOccupancyMaxPotentialBlockSizeWithFlags cuOccupancyAvailableDynamicSMemPerBlock cuOccupancyMaxActiveClusters
        cuOccupancyMaxPotentialClusterSize cuFuncSetCacheConfig cuModuleGetGlobal_v2 cuMemcpyDtoD_v2 cuMemcpyDtoH_v2
        cuMemcpyHtoD_v2 cuMemsetD8_v2 cuProfilerStart cuProfilerStop cuStreamBeginCapture_v2 cuStreamEndCapture
        cuGraphInstantiateWithFlags cuGraphLaunch cuGraphUpload cuGraphDestroy cuGraphExecDestroy cuTensorMapEncodeTiled
    }
}

library! { blas,
    needed 1 { // CUBLAS_STATUS_NOT_INITIALIZED
        cublasCreate_v2 cublasDestroy_v2 cublasSetStream_v2 cublasGemmEx cublasGemmStridedBatchedEx
    }
    optional 15 { // CUBLAS_STATUS_NOT_SUPPORTED
        cublasSetMathMode cublasSetWorkspace_v2 cublasGemmBatchedEx cublasSgemm_v2 cublasDgemm_v2 cublasSgemv_v2 cublasDgemv_v2
        cublasSgemmStridedBatched cublasDgemmStridedBatched cublasSasum_v2 cublasDasum_v2
    }
}

library! { random,
    needed 203 { // CURAND_STATUS_INITIALIZATION_FAILED
        curandCreateGenerator curandDestroyGenerator curandSetStream curandSetPseudoRandomGeneratorSeed
    }
    optional 204 { // CURAND_STATUS_TYPE_ERROR
        curandGenerateUniform curandGenerateUniformDouble curandGenerateNormal curandGenerateNormalDouble
    }
}

library! { collectives,
    needed 3 { // ncclInternalError
        ncclGetVersion ncclGetUniqueId ncclGetErrorString ncclGetLastError
        ncclCommInitRankConfig ncclCommGetAsyncError ncclCommAbort ncclGroupStart ncclGroupEnd ncclAllReduce
    }
}

/// A library of CUDA's that the program calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// The driver's own interface.
    Driver,
    /// Matrix products.
    Blas,
    /// Random numbers, of which the tensor library makes a generator with every device.
    Random,
    /// Sums over the GPUs of several processes: NCCL.
    Collectives,
}

impl Part {
    /// The file names that will do, the preferred one first.
    ///
    /// Versioned names only: an unversioned one may be a toolkit's stub, which answers every call with an error.
    pub(super) fn files(self) -> &'static [&'static str] {
        match self {
            Part::Driver => &["libcuda.so.1"],
            Part::Blas => &["libcublas.so.13", "libcublas.so.12"],
            Part::Random => &["libcurand.so.10"],
            Part::Collectives => &["libnccl.so.2"],
        }
    }

    fn functions(self) -> &'static [Function] {
        match self {
            Part::Driver => driver::FUNCTIONS,
            Part::Blas => blas::FUNCTIONS,
            Part::Random => random::FUNCTIONS,
            Part::Collectives => collectives::FUNCTIONS,
        }
    }
}

/// What a function that older drivers lack was called before, with the same arguments.
const FORMERLY: [(&str, &str); 1] = [("cuEventElapsedTime_v2", "cuEventElapsedTime")];

/// Points the trampolines of one library at its functions, all or none. Error: which needed functions it lacks.
///
/// The library must stay loaded for as long as the process lives, since from here on anybody may call it.
pub(super) fn bind(part: Part, library: &Library) -> Result<(), String> {
    let mut found = Vec::new();
    let mut lacking = Vec::new();
    for function in part.functions() {
        // SAFETY: the symbol is taken as an address and called only by code that was written against CUDA's declaration of it.
        let find = |name: &str| unsafe { library.get::<*const ()>(name) };
        let older = || FORMERLY.iter().find(|(now, _)| *now == function.name).map(|(_, before)| find(before));
        match find(function.name).or_else(|error| older().unwrap_or(Err(error))) {
            Ok(address) => found.push((function.slot, *address as usize)),
            Err(_) if function.needed => lacking.push(function.name),
            Err(_) => {}
        }
    }
    if let [first, others @ ..] = lacking.as_slice() {
        return Err(if others.is_empty() { first.to_string() } else { format!("{first} and {} more", others.len()) });
    }
    for (slot, address) in found {
        slot.0.store(address, Ordering::Release);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The C library is no library of CUDA's: it is refused by the names that it lacks, and nothing is bound.
    #[test]
    fn a_library_without_the_functions_is_refused() {
        // SAFETY: the library that this process runs on already.
        let library = unsafe { Library::new("libc.so.6") }.unwrap();
        let before: Vec<usize> = random::FUNCTIONS.iter().map(|f| f.slot.0.load(Ordering::Acquire)).collect();
        assert_eq!(bind(Part::Collectives, &library).unwrap_err(), "ncclGetVersion and 9 more");
        let lacking = bind(Part::Random, &library).unwrap_err();
        assert_eq!(lacking, "curandCreateGenerator and 3 more");
        let after: Vec<usize> = random::FUNCTIONS.iter().map(|f| f.slot.0.load(Ordering::Acquire)).collect();
        assert_eq!(before, after);
    }

    /// One trampoline for every name, each with a slot of its own.
    #[test]
    fn no_two_functions_share_a_slot() {
        let parts = [Part::Driver, Part::Blas, Part::Random, Part::Collectives];
        let all: Vec<&Function> = parts.iter().flat_map(|part| part.functions()).collect();
        let names: std::collections::BTreeSet<&str> = all.iter().map(|f| f.name).collect();
        let slots: std::collections::BTreeSet<usize> = all.iter().map(|f| std::ptr::from_ref(f.slot) as usize).collect();
        assert_eq!((names.len(), slots.len()), (all.len(), all.len()));
    }
}
