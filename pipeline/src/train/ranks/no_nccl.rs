//! What stands in for `nccl.rs` in a build that computes on the CPU only: nothing, since such a build refuses to be asked for NCCL.

use super::Ranks;
use super::backend::DistBackend;
use crate::Result;
use crate::run::RunContext;
use candle_core::{Device, Tensor};

/// There is none.
#[derive(Debug)]
pub(super) enum Communicator {}

impl Ranks {
    /// Gradients cross over TCP.
    pub(in crate::train) fn connect(&self, _: DistBackend, _: &Device, _: &RunContext) -> Result<()> {
        Ok(())
    }

    /// Never called.
    pub(super) fn all_reduce(&self, communicator: &Communicator, _: &[Tensor]) -> Result<()> {
        match *communicator {}
    }
}
