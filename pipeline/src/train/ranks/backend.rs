//! By which way gradients cross between ranks: TCP through rank 0, or NCCL from GPU to GPU (`nccl.rs`). Everything else that ranks say goes
//! over TCP in any case.
//!
//! Refuses to fall back: a run goes by the way that was asked for, or says why it cannot and ends.

use super::error::RankError;
use crate::Result;
#[cfg(feature = "cuda")]
use crate::cuda::collective::version;
use candle_core::Device;
use serde::{Deserialize, Serialize};

/// By which way gradients cross between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum DistBackend {
    /// TCP through rank 0.
    #[default]
    Tcp,
    /// NCCL, from GPU to GPU.
    Nccl,
}

impl std::fmt::Display for DistBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DistBackend::Tcp => "tcp",
            DistBackend::Nccl => "nccl",
        })
    }
}

impl DistBackend {
    /// The version of NCCL, where that is asked for. Errors: this device is no GPU, or NCCL is not here.
    pub(in crate::train) fn check(self, device: &Device) -> Result<Option<String>> {
        let version = match self {
            DistBackend::Tcp => return Ok(None),
            DistBackend::Nccl if cfg!(feature = "cuda") && !device.is_cuda() => {
                Err("NCCL adds up on NVIDIA GPUs, and the device is the CPU".into())
            }
            DistBackend::Nccl => version(),
        };
        version.map(Some).map_err(|why| RankError::NoNccl { why }.into())
    }
}

#[cfg(not(feature = "cuda"))]
fn version() -> std::result::Result<String, String> {
    Err("NCCL adds up on NVIDIA GPUs, and this build computes on the CPU only".into())
}
