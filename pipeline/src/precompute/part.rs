//! One of several shares of the data, scored apart: on another machine, at another time. The shares are cut at borders of shards, so
//! that the shards of all of them, combined, are those of a single run.

use crate::data::Example;
use crate::{Error, Result};
use potstill_cache::Part;
use serde::{Deserialize, Serialize};

/// The share to be scored, written `N/T`: the N-th of T.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Share {
    /// Which one, from 1.
    pub number: u32,
    /// Of how many.
    pub of: u32,
}

impl std::str::FromStr for Share {
    type Err = String;

    /// Reads `N/T` with N from 1 to T.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let numbers = text.split_once('/').and_then(|(n, t)| Some((n.trim().parse().ok()?, t.trim().parse().ok()?)));
        match numbers {
            Some((number, of)) if number >= 1 && number <= of => Ok(Self { number, of }),
            _ => Err(format!("{text:?}: expected N/T with N from 1 to T")),
        }
    }
}

impl TryFrom<String> for Share {
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

impl std::fmt::Display for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.number, self.of)
    }
}

/// Leaves the share's conversations in `examples`, and says which part of the data they are: nothing where they are all of it.
///
/// Errors: more shares than there are shards, so that some would be empty.
pub(super) fn cut(examples: &mut Vec<Example>, share: Option<Share>, rows_per_shard: u32) -> Result<Option<Part>> {
    let Some(Share { number, of }) = share.filter(|share| share.of > 1) else { return Ok(None) };
    let part = Part { number, of };
    let rows = part.rows(examples.len() as u64, rows_per_shard);
    let shards = (examples.len() as u64).div_ceil(u64::from(rows_per_shard.max(1)));
    if u64::from(of) > shards {
        let expected = format!("at most {shards} parts, for {} conversations make {shards} shards", examples.len());
        return Err(Error::Setting { name: "part", found: format!("{number}/{of}"), expected });
    }
    examples.truncate(rows.end as usize);
    examples.drain(..rows.start as usize);
    Ok(Some(part))
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
        for (rows, per_shard) in [(1u64, 1u32), (10, 3), (39, 8), (64, 8), (7, 100)] {
            let shards = rows.div_ceil(u64::from(per_shard)) as u32;
            for of in 1..=shards {
                let mut all = Vec::new();
                for number in 1..=of {
                    let mut share = examples(rows);
                    let part = cut(&mut share, Some(Share { number, of }), per_shard).unwrap();
                    assert_eq!(part, (of > 1).then_some(Part { number, of }));
                    assert!(number == of || (share.len() as u64).is_multiple_of(u64::from(per_shard)), "{number}/{of} of {rows}");
                    all.extend(share);
                }
                assert_eq!(all, examples(rows), "{of} parts of {rows} rows, {per_shard} a shard");
            }
            for number in [1, shards + 1] {
                let error = cut(&mut examples(rows), Some(Share { number, of: shards + 1 }), per_shard).unwrap_err();
                assert!(error.to_string().contains(&format!("at most {shards} parts")), "{error}");
            }
        }
    }

    #[test]
    fn a_share_is_written_as_n_of_t() {
        assert_eq!("2/3".parse::<Share>().unwrap(), Share { number: 2, of: 3 });
        assert_eq!(Share { number: 2, of: 3 }.to_string(), "2/3");
        for wrong in ["", "2", "0/3", "4/3", "-1/3", "1/0", "1/2/3", "a/b"] {
            assert!(wrong.parse::<Share>().is_err(), "{wrong}");
        }
    }
}
