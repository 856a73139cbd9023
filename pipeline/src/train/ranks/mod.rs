//! Training by several processes, "ranks", each with the whole student and a stretch of every step's rows.
//!
//! Owns everything that ranks say to each other; refuses to know a loss or a layer. The idea: all ranks do the same with the same bits, and
//! only sums cross between them, added by rank 0 in the ranks' order. So weights never have to be sent, every rank could write what rank 0
//! writes, and a run is a function of its settings and the number of ranks.
//!
//! ```text
//! start    identity ──► rank 0, which compares ──► the checkpoint to go on from          the id of their GPUs' group ◄── rank 0
//! a step   word ◄── rank 0 (evaluates, saves; step, end or stop)      now and then a digest of the adapter ──► rank 0, which compares
//!          pass over the rank's own rows
//!          part (losses) ──► rank 0 ──► sums          gradients ──► rank 0 ──► sums          clip, AdamW: the same everywhere
//! the end  done ◄── rank 0, when all is on disk; farewell ──► rank 0
//! ```
//! All of it goes over TCP through rank 0 ([`Meeting`]), but that the gradients of GPUs may be added up by NCCL ([`DistBackend`]). A stop at one rank is passed on at once: all give up the pass under way, and rank 0
//! says stop. A rank that fails says so, and one that is gone is found out, by the end of its connection or its silence.

mod backend;
mod error;
mod link;
mod meeting;
mod message;
#[cfg(feature = "cuda")]
mod nccl;
#[cfg(not(feature = "cuda"))]
mod no_nccl;
pub(super) mod share;
mod sums;

pub use backend::DistBackend;
pub use error::RankError;
pub use meeting::Meeting;
pub(super) use message::Next;
pub(super) use sums::digest;

use super::accumulation::Step;
use super::identity::{Identity, differences};
#[cfg(feature = "cuda")]
use crate::cuda::collective::Communicator;
use crate::run::RunContext;
use crate::{Error, Result};
use candle_core::Tensor;
use link::Link;
use message::{Message, Part};
#[cfg(not(feature = "cuda"))]
use no_nccl::Communicator;
use potstill_cache::ErrorClass;
use std::cell::{Cell, OnceCell};
use std::sync::atomic::Ordering;

/// Most ranks.
pub const MOST_RANKS: u32 = 1024;

/// One process of several that train together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Its number, from 0.
    pub rank: u32,
    /// How many there are, 2 to [`MOST_RANKS`].
    pub of: u32,
    /// Name or address of rank 0's machine, at which it listens.
    pub host: String,
    /// The port there.
    pub port: u16,
}

impl Place {
    fn address(&self) -> String {
        let v6 = self.host.contains(':');
        if v6 { format!("[{}]:{}", self.host, self.port) } else { format!("{}:{}", self.host, self.port) }
    }
}

/// The ranks of a run as one of them sees them.
#[derive(Debug)]
pub struct Ranks {
    rank: u32,
    of: u32,
    /// Where gradients cross by NCCL. Before the links: what hangs on a rank that is gone ends before they close.
    by_gpu: OnceCell<Communicator>,
    links: Links,
    /// Whether all is said.
    parted: Cell<bool>,
}

/// Connections.
#[derive(Debug)]
enum Links {
    /// None: a run of one process.
    Alone,
    /// Rank 0's, to all others by rising rank.
    Others(Vec<Link>),
    /// Another's, to rank 0.
    First(Box<Link>),
}

impl Ranks {
    /// A run of one process.
    pub fn alone() -> Self {
        Self { rank: 0, of: 1, by_gpu: OnceCell::new(), links: Links::Alone, parted: Cell::new(false) }
    }

    fn first(links: Vec<Link>) -> Self {
        Self { of: links.len() as u32 + 1, links: Links::Others(links), ..Self::alone() }
    }

    fn other(place: Place, link: Link) -> Self {
        Self { rank: place.rank, of: place.of, links: Links::First(Box::new(link)), ..Self::alone() }
    }

    /// This process's number, from 0.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// How many there are.
    pub fn of(&self) -> u32 {
        self.of
    }

    /// Whether this is the one that evaluates and writes.
    pub fn writes(&self) -> bool {
        self.rank == 0
    }

    /// Makes sure that all ranks are of the same run, and gives the step of the checkpoint to go on from, which rank 0 has found.
    ///
    /// Errors: a rank that differs, at rank 0 with its differences, at all others as rank 0's end.
    pub(super) fn agree(
        &self,
        identity: &Identity,
        (total, backend): (u64, DistBackend),
        found: Option<u64>,
    ) -> Result<Option<u64>> {
        let mut own = identity.clone();
        // Of a constant schedule the number of steps is no part of the identity; by which way gradients cross never is.
        own.insert("steps".into(), total.to_string());
        own.insert("dist_backend".into(), backend.to_string());
        match &self.links {
            Links::Alone => Ok(found),
            Links::Others(links) => {
                for link in links {
                    let theirs = serde_json::from_slice(&link.identity()?).unwrap_or_default();
                    let said = |name: &str, ours: &str, theirs: &str| format!("{name}: rank 0 has {ours}, it has {theirs}");
                    if let Some(differences) = differences(&own, &theirs, said) {
                        return Err(RankError::Other { rank: link.rank(), differences }.into());
                    }
                }
                links.iter().try_for_each(|link| link.send(&Message::Start(found)))?;
                Ok(found)
            }
            Links::First(link) => {
                // Names and values that were made here can be written.
                link.send(&Message::Identity(serde_json::to_vec(&own).unwrap_or_default()))?;
                Ok(link.start()?)
            }
        }
    }

    /// What comes next: rank 0's word is everybody's. Where rank 0 wants it the adapters are compared by their digests.
    ///
    /// Errors: an adapter of other bits than rank 0's after `step` steps.
    pub(super) fn word(&self, next: Next, prove: bool, step: u64, digest: impl FnOnce() -> Result<[u8; 32]>) -> Result<Next> {
        match &self.links {
            Links::Alone => Ok(next),
            Links::Others(links) => {
                // A stop that a failure has brought about is no stop.
                if let Some(error) = links.iter().find_map(Link::failure) {
                    return Err(error.into());
                }
                links.iter().try_for_each(|link| link.send(&Message::Word { next, prove }))?;
                if prove {
                    let own = digest()?;
                    for link in links {
                        if link.proof()? != own {
                            return Err(RankError::Diverged { rank: link.rank(), step }.into());
                        }
                    }
                }
                Ok(next)
            }
            Links::First(link) => {
                let (next, prove) = link.word()?;
                if prove {
                    link.send(&Message::Proof(digest()?))?;
                }
                Ok(next)
            }
        }
    }

    /// Puts the sums over all ranks in the place of this rank's sums of step number `number`; `None` where any rank has given up its pass.
    ///
    /// `parameters` give the gradients' shapes. Errors: a rank at another step, or at other rows.
    pub(super) fn add_up(&self, number: u64, own: Own, parameters: &[(String, Tensor)]) -> Result<Option<Step>> {
        if matches!(self.links, Links::Alone) && self.by_gpu.get().is_none() {
            return Ok(own.step);
        }
        let sums = own.step.as_ref().map(|step| [step.mean.total, step.mean.kd, step.mean.ce]);
        let part = Part { step: number, scored: own.scored, tokens: own.tokens, sums };
        let sums = match &self.links {
            Links::Alone => sums,
            Links::Others(links) => sums::of_parts(part, links)?,
            Links::First(link) => {
                link.send(&Message::Part(part))?;
                link.sums()?
            }
        };
        let (Some([total, kd, ce]), Some(mut step)) = (sums, own.step) else { return Ok(None) };
        (step.mean.total, step.mean.kd, step.mean.ce) = (total, kd, ce);
        if own.scored > 0 {
            if step.gradients.is_empty() {
                step.gradients = parameters.iter().map(|(_, tensor)| tensor.zeros_like()).collect::<candle_core::Result<_>>()?;
            }
            match (self.by_gpu.get(), &self.links) {
                (Some(communicator), _) => self.all_reduce(communicator, &step.gradients)?,
                (None, Links::Alone) => {}
                (None, Links::Others(links)) => sums::add_up(&mut step.gradients, links)?,
                (None, Links::First(link)) => sums::hand_in(&mut step.gradients, link)?,
            }
        }
        Ok(Some(step))
    }

    /// At a run's end: rank 0 says that all is on disk, and the others wait for that.
    ///
    /// Errors, at the others: rank 0 failed before it was. A rank that goes without a farewell now costs nothing, and is told of.
    pub(super) fn part(&self, context: &RunContext) -> Result<()> {
        match &self.links {
            Links::Alone => {}
            Links::Others(links) => {
                for link in links {
                    if let Err(error) = link.send(&Message::Done) {
                        context.warn(format!("at the end: {error}"));
                    }
                }
                for link in links {
                    if let Err(error) = link.last(&Message::Bye) {
                        context.warn(format!("at the end: {error}"));
                    }
                }
            }
            Links::First(link) => {
                link.last(&Message::Done)?;
                // Rank 0 needs no answer to what it did.
                let _ = link.send(&Message::Bye);
            }
        }
        self.parted.set(true);
        Ok(())
    }

    /// Ends with an error: tells the others of it, and gives what is to be said here. Where something other than a pass was given up because
    /// another rank has failed, that is the other's failure, and not that it was given up.
    pub(super) fn fail(&self, error: Error, context: &RunContext) -> Error {
        if self.parted.get() {
            return error;
        }
        let own = error.class() != ErrorClass::Interrupted || context.stop.load(Ordering::Relaxed);
        let error = match &self.links {
            Links::Others(links) if !own => {
                let mut failures = links.iter().filter_map(Link::failure);
                failures.find(|failure| failure.class() != ErrorClass::Interrupted).map_or(error, Error::from)
            }
            _ => error,
        };
        self.abort(&error);
        match &self.links {
            // Rank 0 knows why, and tells when it has heard from here; unless that is what it told.
            Links::First(link) if !own && !matches!(error, Error::Ranks(_)) => {
                std::iter::repeat_with(|| link.receive()).find_map(|word| word.err()).map_or(error, Error::from)
            }
            _ => error,
        }
    }

    /// Tells the others of a failure.
    fn abort(&self, error: &Error) {
        let (rank, sentence) = match error {
            Error::Ranks(RankError::Ended { rank, sentence, .. }) => (*rank, sentence.clone()),
            other => (self.rank, other.to_string()),
        };
        let abort = Message::Abort { rank, class: error.class(), sentence };
        // Whoever cannot be told finds out.
        match &self.links {
            Links::Alone => {}
            Links::Others(links) => links.iter().for_each(|link| drop(link.send(&abort))),
            Links::First(link) => drop(link.send(&abort)),
        }
    }
}

/// What a rank's pass over its own rows came to.
#[derive(Debug)]
pub(super) struct Own {
    /// Sums over its rows; `None` where it was given up.
    pub step: Option<Step>,
    /// Scored positions of the step's rows, all ranks'.
    pub scored: u64,
    /// Tokens of the step's rows, all ranks'.
    pub tokens: u64,
}

#[cfg(test)]
#[path = "ranks_tests.rs"]
mod tests;
