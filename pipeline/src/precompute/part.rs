//! One of several shares of the data, scored apart: on another machine, at another time. The shares are cut at borders of shards, so
//! that the shards of all of them, combined, are those of a single run. Who has which share follows from two numbers and the data
//! alone: nobody asks anybody.
//!
//! A part is chosen by a person, who counts from 1 and names its folder; a worker is started by an engine, which counts from 0, and
//! writes into a folder of its own below the one that all workers are given. A worker is a part: there is one way to cut.

use super::PrecomputeConfig;
use crate::data::Example;
use crate::{Error, Result};
use potstill_cache::{Part, WorkerFolder};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// The share to be scored, written `N/T`: the N-th of T.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Share {
    /// Which one, from 1.
    pub number: u32,
    /// Of how many.
    pub of: u32,
}

/// One of several processes that share the data, written `I/N`: worker I, from 0, of N.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Worker {
    /// Which one, from 0.
    pub index: u32,
    /// Of how many.
    pub of: u32,
}

impl std::str::FromStr for Share {
    type Err = String;

    /// Reads `N/T` with N from 1 to T.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match pair(text) {
            Some((number, of)) if number >= 1 && number <= of => Ok(Self { number, of }),
            _ => Err(format!("{text:?}: expected N/T with N from 1 to T")),
        }
    }
}

impl std::str::FromStr for Worker {
    type Err = String;

    /// Reads `I/N` with I from 0 to N - 1.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match pair(text) {
            Some((index, of)) if index < of => Ok(Self { index, of }),
            _ => Err(format!("{text:?}: expected I/N with I from 0 to N - 1")),
        }
    }
}

fn pair(text: &str) -> Option<(u32, u32)> {
    let (a, b) = text.split_once('/')?;
    Some((a.trim().parse().ok()?, b.trim().parse().ok()?))
}

impl TryFrom<String> for Share {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl TryFrom<String> for Worker {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl From<Share> for String {
    fn from(share: Share) -> Self {
        share.to_string()
    }
}

impl From<Worker> for String {
    fn from(worker: Worker) -> Self {
        worker.to_string()
    }
}

impl std::fmt::Display for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.number, self.of)
    }
}

impl std::fmt::Display for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.index, self.of)
    }
}

impl Worker {
    /// The share that this worker scores.
    pub fn share(self) -> Share {
        Share { number: self.index + 1, of: self.of }
    }
}

impl PrecomputeConfig {
    /// The settings with the worker made what it is: a part, in a folder of its own below [`cache`](Self::cache).
    ///
    /// Errors: a part and a worker at once; a folder that is itself a cache, or that another number of workers writes into.
    pub fn placed(&self) -> Result<Cow<'_, Self>> {
        match (self.worker, self.part) {
            (None, _) => Ok(Cow::Borrowed(self)),
            (Some(worker), Some(part)) => {
                let expected = format!("no part beside it (part = {part}): both say which share of the data is scored");
                Err(Error::Setting { name: "worker", found: worker.to_string(), expected })
            }
            (Some(worker), None) => {
                let cache = WorkerFolder { index: worker.index, of: worker.of }.place(&self.cache)?;
                Ok(Cow::Owned(Self { cache, part: Some(worker.share()), worker: None, ..self.clone() }))
            }
        }
    }
}

/// Leaves the share's conversations in `examples`, and says which part of the data they are: nothing where they are all of it. Where
/// there are more shares than shards, some are empty.
pub(super) fn cut(examples: &mut Vec<Example>, share: Option<Share>, rows_per_shard: u32) -> Option<Part> {
    let Share { number, of } = share.filter(|share| share.of > 1)?;
    let part = Part { number, of };
    let rows = part.rows(examples.len() as u64, rows_per_shard);
    examples.truncate(rows.end as usize);
    examples.drain(..rows.start as usize);
    Some(part)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn examples(n: u64) -> Vec<Example> {
        (0..n).map(|seq_id| Example { seq_id, input_ids: vec![1, 2], scored: vec![false, true] }).collect()
    }

    #[test]
    fn shares_are_contiguous_whole_shards_and_cover_all_once() {
        for rows in 0..=24u64 {
            for per_shard in [1u32, 2, 3, 5, 8, 24, 100] {
                let shards = rows.div_ceil(u64::from(per_shard));
                for of in 1..=30 {
                    let at = format!("{of} parts of {rows} rows, {per_shard} a shard");
                    let mut all = Vec::new();
                    let mut filled = 0;
                    for index in 0..of {
                        let mut share = examples(rows);
                        let part = cut(&mut share, Some(Worker { index, of }.share()), per_shard);
                        assert_eq!(part, (of > 1).then_some(Part { number: index + 1, of }));
                        let begins = all.len() as u64;
                        assert!(share.is_empty() || begins.is_multiple_of(u64::from(per_shard)), "{index}: {at}");
                        // No share has a shard more than it must: the largest decides how long all of it takes.
                        let own = (share.len() as u64).div_ceil(u64::from(per_shard));
                        assert!(own <= shards.div_ceil(u64::from(of)) && own >= shards / u64::from(of), "{index}: {at}");
                        filled += u64::from(!share.is_empty());
                        all.extend(share);
                    }
                    assert_eq!(all, examples(rows), "{at}");
                    assert_eq!(filled, shards.min(u64::from(of)), "{at}");
                }
            }
        }
    }

    #[test]
    fn a_share_is_written_as_n_of_t_and_a_worker_counts_from_0() {
        assert_eq!("2/3".parse::<Share>().unwrap(), Share { number: 2, of: 3 });
        assert_eq!(Share { number: 2, of: 3 }.to_string(), "2/3");
        for wrong in ["", "2", "0/3", "4/3", "-1/3", "1/0", "1/2/3", "a/b"] {
            assert!(wrong.parse::<Share>().is_err(), "{wrong}");
        }
        assert_eq!("0/1".parse::<Worker>().unwrap(), Worker { index: 0, of: 1 });
        assert_eq!("2/3".parse::<Worker>().unwrap().share(), Share { number: 3, of: 3 });
        for wrong in ["", "auto", "3/3", "-1/3", "0/0", "1/2/3", "0"] {
            assert!(wrong.parse::<Worker>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_worker_is_a_part_in_a_folder_of_its_own() {
        let bench = tempfile::tempdir().unwrap();
        let base = PrecomputeConfig { cache: bench.path().join("run"), ..PrecomputeConfig::default() };
        assert!(matches!(base.placed().unwrap(), Cow::Borrowed(same) if *same == base));
        let worker = PrecomputeConfig { worker: Some(Worker { index: 2, of: 8 }), ..base.clone() };
        let placed = worker.placed().unwrap().into_owned();
        let expected =
            PrecomputeConfig { cache: base.cache.join("worker-00002-of-00008"), part: "3/8".parse().ok(), ..base.clone() };
        assert_eq!(placed, expected);
        let both = PrecomputeConfig { part: "1/8".parse().ok(), ..worker };
        let error = both.placed().unwrap_err().to_string();
        let expected = "worker = 2/8: expected no part beside it (part = 1/8): both say which share of the data is scored";
        assert_eq!(error, expected);
    }
}
