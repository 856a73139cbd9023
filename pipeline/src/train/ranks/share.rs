//! Which rows of a step are a rank's: a stretch of them, with about as many tokens as every other rank's. A pure function of the rows'
//! lengths, so that ranks need not talk about it.
//!
//! Stretches, and not every R-th row: the rows keep their places in the step, so that dropout, whose masks are a function of a row's
//! number in the step, leaves out the same on any number of ranks.

use std::ops::Range;

/// A rank's rows of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::train) struct Share {
    /// Places in the list of rows.
    pub rows: Range<usize>,
    /// Tokens of the rows before them.
    pub first_token: usize,
}

/// The rows of rank `rank` of `of`, of rows with these lengths in tokens.
///
/// A row belongs to the rank in whose part of the tokens its middle lies, so a stretch is off its `of`-th of them by a row at most.
pub(in crate::train) fn of(lengths: &[usize], rank: u32, of: u32) -> Share {
    let total: usize = lengths.iter().sum();
    let owner = |before: usize, length: usize| {
        let middle = 2 * before as u128 + length as u128;
        (middle * u128::from(of) / (2 * total as u128).max(1)).min(u128::from(of) - 1) as u32
    };
    let mut share = Share { rows: 0..0, first_token: 0 };
    let mut before = 0;
    for (row, length) in lengths.iter().enumerate() {
        let owner = owner(before, *length);
        if owner < rank {
            share = Share { rows: row + 1..row + 1, first_token: before + length };
        } else if owner == rank {
            share.rows.end = row + 1;
        }
        before += length;
    }
    share
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rows_of_one_length_are_dealt_evenly() {
        let shares: Vec<_> = (0..3).map(|rank| of(&[5; 6], rank, 3)).collect();
        let expected = |first: usize| Share { rows: first..first + 2, first_token: 5 * first };
        assert_eq!(shares, [0, 2, 4].map(expected));
        assert_eq!(of(&[], 1, 2).rows.len(), 0);
        assert_eq!(of(&[9], 0, 1), Share { rows: 0..1, first_token: 0 });
    }

    proptest! {
        #[test]
        fn every_row_is_one_ranks_and_stretches_follow_each_other(lengths in proptest::collection::vec(1usize..300, 0..40), ranks in 1u32..9) {
            let (mut next, total) = (0, lengths.iter().sum::<usize>() as f64);
            let longest = lengths.iter().copied().max().unwrap_or(0) as f64;
            for rank in 0..ranks {
                let Share { rows, first_token } = of(&lengths, rank, ranks);
                if !rows.is_empty() {
                    prop_assert_eq!(rows.start, next);
                    next = rows.end;
                }
                prop_assert_eq!(first_token, lengths[..rows.start].iter().sum::<usize>());
                let tokens = lengths[rows].iter().sum::<usize>() as f64;
                prop_assert!((tokens - total / f64::from(ranks)).abs() <= longest);
            }
            prop_assert_eq!(next, lengths.len());
        }
    }
}
