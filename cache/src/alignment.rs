//! Whether a row is that of the tokens at hand, and if not, what happened: the mistakes that keep a cache readable and make every
//! target wrong. It refuses to repair; whoever reads rows by anything but their tokens learns which of these it was.
//!
//! ```text
//! token        0    1    2    3    4      entry i of a row is the distribution after token i: it predicts token i + 1
//! positions              2    3           right: tokens 3 and 4 are trained on
//!                             3    4      the mask of the predicted tokens, not shifted: each one too high
//!                   1    2                shifted twice: each one too low
//!                        2                the last one dropped
//! ```

use crate::{Cache, Error, Record, Result, RowKey};

/// Bits that ids have been cut to elsewhere.
const CUT_BITS: [u32; 2] = [16, 17];

/// How a row and the tokens at hand disagree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misalignment {
    /// The row is another conversation's; the right one is elsewhere.
    #[error(
        "it holds another conversation, and row {wanted} holds this one; rows are found by their tokens, not by step or order"
    )]
    OtherRow {
        /// The row of the tokens at hand.
        wanted: u64,
    },
    /// The tokens differ.
    #[error(
        "its tokens differ from place {place} on ({cached} there, {here} here) and no row holds these: another conversation, \
             template or tokenizer"
    )]
    OtherTokens {
        /// The first place (0-based) where they do.
        place: usize,
        /// The row's token there.
        cached: u32,
        /// The token at hand.
        here: u32,
    },
    /// The tokens are equal in their low bits only.
    #[error(
        "token {place} is {cached} there and {here} here, and all tokens are equal in their low {bits} bits: ids were cut to \
             {bits} bits"
    )]
    CutIds {
        /// The first place (0-based) where they differ.
        place: usize,
        /// The row's token there.
        cached: u32,
        /// The token at hand.
        here: u32,
        /// Bits that are left.
        bits: u32,
    },
    /// One side lacks the first token of the other.
    #[error("token i + {cached_more} there is token i + {here_more} here: one side lacks the first token")]
    ShiftedTokens {
        /// 1 where the row has one more token before the others, else 0.
        cached_more: usize,
        /// 1 where the tokens at hand have, else 0.
        here_more: usize,
    },
    /// One side is the beginning of the other.
    #[error("it has {cached} tokens and here are {here}, the same as far as both go: one side was cut off")]
    CutTokens {
        /// The row's tokens.
        cached: usize,
        /// Tokens at hand.
        here: usize,
    },
    /// The mask of the predicted tokens was taken for that of the predicting ones.
    #[error(
        "each scored position here is one higher than there: these are the places of the predicted tokens, and entry i \
             predicts token i + 1; shift the mask by one"
    )]
    UnshiftedMask,
    /// What was shifted was shifted again.
    #[error("each scored position here is one lower than there: entry i predicts token i + 1 already; shift nothing again")]
    ShiftedTwice,
    /// The last position is missing here.
    #[error("its last scored position, {position}, is missing here: it predicts the conversation's last scored token")]
    LastPositionDropped {
        /// The position.
        position: u32,
    },
    /// The last position is missing in the row.
    #[error("the last scored position here, {position}, is missing there: the cache was made without it")]
    LastPositionMissing {
        /// The position.
        position: u32,
    },
    /// The scored positions differ in another way.
    #[error("it has {cached} scored positions and here are {here}, and they differ from number {number} on: another mask")]
    OtherPositions {
        /// The first number (0-based) at which they do.
        number: usize,
        /// The row's positions.
        cached: usize,
        /// Positions at hand.
        here: usize,
    },
}

impl Misalignment {
    /// What is wrong where these tokens and positions are taken for the row's; `None` where nothing is.
    fn between(row: &Record, input_ids: &[u32], positions: &[u32]) -> Option<Self> {
        if row.input_ids == input_ids {
            return Self::of_positions(row, positions);
        }
        let (cached, here) = (row.input_ids.as_slice(), input_ids);
        let place = cached.iter().zip(here).take_while(|(a, b)| a == b).count();
        let Some((&a, &b)) = cached.get(place).zip(here.get(place)) else {
            return Some(Self::CutTokens { cached: cached.len(), here: here.len() });
        };
        let cut =
            |bits: u32| cached.len() == here.len() && cached.iter().zip(here).all(|(a, b)| (a ^ b).trailing_zeros() >= bits);
        if let Some(bits) = CUT_BITS.into_iter().rev().find(|&bits| cut(bits)) {
            return Some(Self::CutIds { place, cached: a, here: b, bits });
        }
        let follows = |longer: &[u32], other: &[u32]| match longer {
            [_, rest @ ..] if rest.len().min(other.len()) >= 2 => rest.iter().zip(other).all(|(a, b)| a == b),
            _ => false,
        };
        Some(match (follows(cached, here), follows(here, cached)) {
            (true, false) => Self::ShiftedTokens { cached_more: 1, here_more: 0 },
            (false, true) => Self::ShiftedTokens { cached_more: 0, here_more: 1 },
            _ => Self::OtherTokens { place, cached: a, here: b },
        })
    }

    fn of_positions(row: &Record, here: &[u32]) -> Option<Self> {
        let cached = row.positions.as_slice();
        if cached == here {
            return None;
        }
        let last = row.input_ids.len().saturating_sub(1);
        // Where a shift pushes a position over an end of the tokens, whoever shifted had to drop it.
        let up = |p: &u32| p.checked_add(1).filter(|&p| (p as usize) < last || here.last() == Some(&p));
        let number = cached.iter().zip(here).take_while(|(a, b)| a == b).count();
        Some(match (cached.split_last(), here.split_last()) {
            _ if !here.is_empty() && cached.iter().filter_map(up).eq(here.iter().copied()) => Self::UnshiftedMask,
            _ if !here.is_empty() && cached.iter().filter_map(|p| p.checked_sub(1)).eq(here.iter().copied()) => {
                Self::ShiftedTwice
            }
            (Some((&position, rest)), _) if rest == here => Self::LastPositionDropped { position },
            (_, Some((&position, rest))) if rest == cached => Self::LastPositionMissing { position },
            _ => Self::OtherPositions { number, cached: cached.len(), here: here.len() },
        })
    }
}

impl Cache {
    /// Row `row`, proven to be that of these tokens and scored positions (0-based, entry i predicts token i + 1).
    ///
    /// Errors: `Misaligned`, with what went wrong and the right row where there is one; those of [`row`](Cache::row).
    pub fn row_for(&self, row: u64, input_ids: &[u32], positions: &[u32]) -> Result<Record> {
        let record = self.row(row)?;
        let Some(what) = Misalignment::between(&record, input_ids, positions) else { return Ok(record) };
        let what = match self.find(&RowKey::of(input_ids, positions))? {
            Some(wanted) => Misalignment::OtherRow { wanted },
            None => what,
        };
        Err(self.misaligned(row, what))
    }

    /// The first row with these tokens and scored positions; `None` where no row has these tokens, as far as can be seen.
    ///
    /// Errors: `Misaligned` where a row has these tokens with the positions of one of the mistakes of [`Misalignment`], or almost these
    /// tokens; those of [`row`](Cache::row).
    pub fn find_for(&self, input_ids: &[u32], positions: &[u32]) -> Result<Option<u64>> {
        if let Some(row) = self.find(&RowKey::of(input_ids, positions))? {
            return Ok(Some(row));
        }
        for (input_ids_meant, positions_meant) in meant(input_ids, positions) {
            let Some(row) = self.find(&RowKey::of(input_ids_meant, &positions_meant))? else { continue };
            if let Some(what) = Misalignment::between(&self.row(row)?, input_ids, positions) {
                return Err(self.misaligned(row, what));
            }
        }
        Ok(None)
    }

    fn misaligned(&self, row: u64, what: Misalignment) -> Error {
        Error::Misaligned { dir: self.dir().to_path_buf(), row, what: Box::new(what) }
    }
}

/// What may have been meant by tokens and positions that no row has. A row is found by its digest alone, so each guess is a whole row.
fn meant<'a>(input_ids: &'a [u32], positions: &[u32]) -> Vec<(&'a [u32], Vec<u32>)> {
    let last = input_ids.len() as u32;
    let down: Vec<u32> = positions.iter().filter_map(|p| p.checked_sub(1)).collect();
    let up: Vec<u32> = positions.iter().map(|p| p.saturating_add(1)).collect();
    let with = |list: &[u32], more: Option<u32>| list.iter().copied().chain(more).collect::<Vec<u32>>();
    let before_end = last.checked_sub(2);
    let mut guesses = vec![
        // An unshifted mask, whole or with the last place dropped.
        (input_ids, down.clone()),
        (input_ids, with(&down, before_end)),
        // A mask shifted twice, whole or with a first place that fell off.
        (input_ids, up.clone()),
        (input_ids, std::iter::once(0).chain(up).collect()),
        // A last position dropped, at the end of the tokens or right after the others; one too many.
        (input_ids, with(positions, before_end)),
        (input_ids, with(positions, positions.last().map(|p| p.saturating_add(1)))),
        (input_ids, positions.split_last().map(|(_, rest)| rest.to_vec()).unwrap_or_default()),
    ];
    if let Some((_, without_first)) = input_ids.split_first() {
        guesses.push((without_first, down));
    }
    guesses
}
