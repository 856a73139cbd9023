//! Which device a run computes on.

use crate::{Error, Result};
use candle_core::Device;

/// Picks the device named by `--device`: `auto`, `cpu`, `cuda` or `cuda:N`.
///
/// `auto` takes a GPU when this build has one to offer and one answers, else the CPU. Errors: an unknown name, or a GPU that is not there.
pub fn pick(name: &str) -> Result<Device> {
    let refuse = |why: String| Error::Device { asked: name.into(), why };
    let number = match name {
        "auto" if AUTO_TAKES_A_GPU => return Ok(open(0).unwrap_or(Device::Cpu)),
        "auto" | "cpu" => return Ok(Device::Cpu),
        "cuda" => Some("0"),
        other => other.strip_prefix("cuda:"),
    };
    match number.map(str::parse::<u16>) {
        Some(Ok(number)) => open(number.into()).map_err(|why| refuse(format!("{why}; use --device cpu or auto"))),
        _ => Err(refuse("expected auto, cpu, cuda or cuda:N".into())),
    }
}

/// Whether `auto` looks for a GPU. It must not before every operation of both stages runs on one.
const AUTO_TAKES_A_GPU: bool = false;

#[cfg(feature = "cuda")]
use crate::cuda::open;

#[cfg(not(feature = "cuda"))]
fn open(_: usize) -> std::result::Result<Device, String> {
    Err("this build computes on the CPU only".into())
}
