//! Which device a run computes on.

use crate::run::RunContext;
use crate::{Error, Result};
use candle_core::{Device, Shape, Tensor, WithDType};

/// The variable that names folders in which CUDA's libraries are looked for first, separated by colons.
pub const CUDA_LIBRARIES: &str = "POTSTILL_CUDA_LIBRARIES";

/// The variable that asks for a table of where a GPU's time went.
pub const CUDA_PROFILE: &str = "POTSTILL_CUDA_PROFILE";

/// What a GPU spent on one kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelTime {
    /// The kernel's name, or what a library or a copy is called by.
    pub name: &'static str,
    /// How often it was launched.
    pub launches: u64,
    /// Seconds that the GPU took for all of them.
    pub seconds: f64,
    /// Multiplications and additions of matrix products; 0 of anything else.
    pub operations: f64,
}

/// From now on the time of every kernel, product and copy that is launched here on a GPU is taken; not of the few copies that the tensor
/// library makes itself. It costs two events a launch, some microseconds of the host's.
pub fn begin_profile() {
    #[cfg(feature = "cuda")]
    crate::cuda::profile::begin();
}

/// Where the GPU's time went since, the longest first; waits for it. Nothing where none was used.
pub fn take_profile() -> candle_core::Result<Vec<KernelTime>> {
    #[cfg(feature = "cuda")]
    return crate::cuda::profile::take();
    #[cfg(not(feature = "cuda"))]
    Ok(Vec::new())
}

/// Picks the device named by `--device`: `auto`, `cpu`, `cuda` or `cuda:N`.
///
/// `auto` takes a GPU when this build has one to offer and one answers, else the CPU; where a GPU is there and cannot be used, `context` is
/// warned. Errors: an unknown name, or a GPU that is not there.
pub fn pick(name: &str, context: &RunContext) -> Result<Device> {
    let refuse = |why: String| Error::Device { asked: name.into(), why };
    let number = match name {
        "auto" => return Ok(gpu_if_one_answers(context)),
        "cpu" => return Ok(Device::Cpu),
        "cuda" => Some("0"),
        other => other.strip_prefix("cuda:"),
    };
    match number.map(str::parse::<u16>) {
        Some(Ok(number)) => open(number.into()).map_err(|why| refuse(format!("{why}; use --device cpu or auto"))),
        _ => Err(refuse("expected auto, cpu, cuda or cuda:N".into())),
    }
}

/// The device that `name` means in one of several processes on a machine, which is to have GPU number `gpu` there: `cuda` is `cuda:gpu`,
/// and so is `auto` where there are GPUs.
pub fn of_process(name: &str, gpu: u16) -> String {
    match name {
        "cuda" => format!("cuda:{gpu}"),
        "auto" if count() > 0 => format!("cuda:{gpu}"),
        other => other.into(),
    }
}

/// Whether a name means a GPU, as far as can be said without opening one.
pub(crate) fn means_gpu(name: &str) -> bool {
    name.starts_with("cuda") || name == "auto" && count() > 0
}

/// Gives the result of an operation's launch on the GPU that this tensor is on; goes on with what follows where it is on the CPU.
macro_rules! on_gpu {
    ($tensor:expr => $launch:expr) => {
        #[cfg(feature = "cuda")]
        if $tensor.device().is_cuda() {
            return $launch;
        }
    };
}
pub(crate) use on_gpu;

/// A tensor of these values on a device. A GPU gets them in its own time, before whatever is launched later.
pub(crate) fn tensor<T: WithDType>(values: &[T], shape: impl Into<Shape>, device: &Device) -> candle_core::Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(gpu) = device {
        return crate::cuda::pinned::send(values, shape, gpu);
    }
    let shape: Shape = shape.into();
    Tensor::from_slice(values, shape, device)
}

/// A machine without a GPU is no matter to speak of; one that sits idle for want of a library is.
fn gpu_if_one_answers(context: &RunContext) -> Device {
    if count() == 0 {
        return Device::Cpu;
    }
    open(0).unwrap_or_else(|why| {
        context.warn(format!("computing on the CPU, although there is a GPU: {why}"));
        Device::Cpu
    })
}

#[cfg(feature = "cuda")]
use crate::cuda::open;

#[cfg(feature = "cuda")]
fn count() -> usize {
    crate::cuda::count().unwrap_or(0)
}

#[cfg(not(feature = "cuda"))]
fn open(_: usize) -> std::result::Result<Device, String> {
    Err("this build computes on the CPU only".into())
}

#[cfg(not(feature = "cuda"))]
fn count() -> usize {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let context = RunContext::default();
        assert!(matches!(pick("cpu", &context), Ok(Device::Cpu)));
        // Whatever this machine has.
        assert!(pick("auto", &context).is_ok());
        for name in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:70000", "cuda0"] {
            let said = pick(name, &context).map(|_| ()).map_err(|e| e.to_string());
            assert_eq!(said, Err(format!("device {name:?}: expected auto, cpu, cuda or cuda:N")));
        }
        assert!(context.take_warnings().is_empty());
    }

    /// No machine has that many, so this is refused whatever the build.
    #[test]
    fn a_gpu_that_is_not_there() {
        let said = pick("cuda:65535", &RunContext::default()).map(|_| ()).map_err(|e| e.to_string());
        let Err(said) = said else { panic!("opened") };
        assert!(said.starts_with("device \"cuda:65535\": ") && said.ends_with("; use --device cpu or auto"), "{said}");
    }
}
