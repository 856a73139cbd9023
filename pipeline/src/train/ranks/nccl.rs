//! Gradients from GPU to GPU: how ranks that talk over TCP come by a communicator of NCCL's, and what becomes of one that is gone.
//!
//! Refuses to let NCCL find out about ranks: it waits for one that died as for one that is slow. So whoever waits for it looks at the links,
//! which notice, and what is said at the end is what they say.

use super::backend::DistBackend;
use super::error::RankError;
use super::link::Link;
use super::message::Message;
use super::{Links, Ranks};
use crate::cuda::collective::{self, Communicator, Failure};
use crate::run::RunContext;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::thread;
use std::time::{Duration, Instant};

/// How long a rank whose NCCL has failed waits to hear whether that was for another rank's sake.
const HEARSAY: Duration = Duration::from_secs(5);
/// Between two looks meanwhile.
const LOOK: Duration = Duration::from_millis(10);

impl Ranks {
    /// Connects the ranks' GPUs, where gradients are to cross by NCCL: rank 0 makes an id, which the others get over their links. Errors:
    /// NCCL's; a rank that has failed or is gone meanwhile; a stop.
    pub(in crate::train) fn connect(&self, backend: DistBackend, device: &Device, context: &RunContext) -> Result<()> {
        const WHAT: &str = "connect the ranks' GPUs";
        if backend == DistBackend::Tcp {
            return Ok(());
        }
        let id = match &self.links {
            Links::First(link) => link.id()?,
            Links::Alone | Links::Others(_) => collective::new_id().map_err(|why| RankError::Nccl { what: WHAT, why })?,
        };
        if let Links::Others(links) = &self.links {
            links.iter().try_for_each(|link| link.send(&Message::Id(id)))?;
        }
        let lost = || self.failure().map(Error::from).or_else(|| context.stopping().then(Error::stopped));
        let made = Communicator::connect(device, id, (self.rank, self.of), &lost);
        let communicator = made.map_err(|failure| self.in_words(failure, WHAT))?;
        // The only one: ranks are of one run.
        let _ = self.by_gpu.set(communicator);
        Ok(())
    }

    /// Puts the sums over all ranks in the place of the gradients' values. Errors: as [`connect`](Self::connect).
    pub(super) fn all_reduce(&self, communicator: &Communicator, gradients: &[Tensor]) -> Result<()> {
        let added = communicator.all_reduce(gradients, &|| self.failure().map(Error::from));
        added.map_err(|failure| self.in_words(failure, "add up the ranks' gradients"))
    }

    /// What another rank has failed with by now, if one has.
    fn failure(&self) -> Option<RankError> {
        match &self.links {
            Links::Alone => None,
            Links::Others(links) => links.iter().find_map(Link::failure),
            Links::First(link) => link.failure(),
        }
    }

    /// What is said of a failure: of a rank that is gone TCP tells more than NCCL, if perhaps a moment later.
    fn in_words(&self, failure: Failure<Error>, what: &'static str) -> Error {
        let why = match failure {
            Failure::Lost(error) => return error,
            Failure::Nccl(why) => why,
        };
        let begun = Instant::now();
        while !matches!(self.links, Links::Alone) && begun.elapsed() < HEARSAY {
            if let Some(error) = self.failure() {
                return error.into();
            }
            thread::sleep(LOOK);
        }
        RankError::Nccl { what, why }.into()
    }
}
