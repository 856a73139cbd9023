//! Which device a run computes on.

use crate::{Error, Result};
use candle_core::Device;

/// Picks the device named by `--device`: `auto`, `cpu`, `cuda` or `cuda:N`.
///
/// `auto` takes a GPU when this build has one to offer, else the CPU. Errors: an unknown name, or a GPU that is not there.
pub fn pick(name: &str) -> Result<Device> {
    let number = match name {
        "auto" | "cpu" => return Ok(Device::Cpu),
        "cuda" => Some("0"),
        other => other.strip_prefix("cuda:"),
    };
    match number.map(str::parse::<u16>) {
        Some(Ok(_)) => {
            Err(Error::Device { asked: name.into(), why: "this build computes on the CPU only; use --device cpu or auto".into() })
        }
        _ => Err(Error::Device { asked: name.into(), why: "expected auto, cpu, cuda or cuda:N".into() }),
    }
}
