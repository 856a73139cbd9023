//! One page: header, levels, values. It owns the bytes of a data page (version 1) as this crate writes it and believes none of its
//! numbers; it refuses every encoding that is not ours.
//!
//! The Arrow reader does the same three times slower, most of it on list levels: a row's lists are runs of equal levels, and only
//! where a run breaks is there anything to know. It also takes the page header's word for the size of its output.
//!
//! ```text
//! header (Thrift compact) | zstd( repetition levels | definition levels | values )
//!                                 length u32, runs     the same            byte planes, or plain little-endian
//! ```

use super::header::{Header, varint};
use crate::error::Flaw;
use crate::layout::Shape;
use crate::schema::Lists;
use std::cell::RefCell;

/// Parquet's number of a data page among page types.
const DATA_PAGE: i64 = 0;
/// Parquet's numbers of the encodings that pages of ours use.
const PLAIN: i64 = 0;
const RLE: i64 = 3;
const BYTE_STREAM_SPLIT: i64 = 9;

/// Most bytes of a buffer that a thread keeps for its next page.
const KEPT_BYTES: usize = 16 << 20;

/// Where a page lies, its header included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) offset: u64,
    pub(crate) length: u32,
}

/// Buffers of one thread, used again for every page.
struct Scratch {
    zstd: zstd::bulk::Decompressor<'static>,
    plain: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Option<Scratch>> = const { RefCell::new(None) };
}

/// Levels already understood: the columns of one list share theirs.
#[derive(Debug, Default)]
pub(crate) struct KnownLevels {
    bytes: Vec<u8>,
    values: usize,
    ends: Vec<u32>,
}

/// How many numbers of a row's pages are believed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Most {
    /// Tokens.
    pub(crate) tokens: usize,
    /// Values of one column.
    pub(crate) values: usize,
}

impl Most {
    /// Levels that a page may have: one a value, and one a token without values.
    fn levels(self, shape: Shape) -> usize {
        if shape == Shape::Nested { self.values.saturating_add(self.tokens) } else { self.tokens }
    }

    /// Bytes that a page may have before compression: values, and two blocks of levels of at most a byte each.
    fn bytes(self, shape: Shape) -> usize {
        let values = if shape == Shape::Nested { self.values } else { self.tokens };
        values.saturating_mul(4).saturating_add(self.levels(shape).saturating_mul(2)).saturating_add(1024)
    }
}

/// Refuses a page whose header claims more than a row of that size can have.
pub(crate) fn check_size(page: &[u8], shape: Shape, most: Most) -> Result<(), Flaw> {
    plain_size(&Header::read(page)?, most.bytes(shape)).map(|_| ())
}

/// The row in a page of a list column of 32-bit values.
pub(crate) fn lists(page: &[u8], shape: Shape, most: Most, known: &mut KnownLevels) -> Result<Lists, Flaw> {
    with_plain(page, most.bytes(shape), |header, plain| {
        let levels = count(header.values, most.levels(shape))?;
        let (repetition, rest) = level_block(plain)?;
        let (definition, values) = level_block(rest)?;
        let level_bytes = &plain[..plain.len() - values.len()];
        if known.bytes != level_bytes || known.values != levels {
            known.ends = match shape {
                Shape::Nested => nested_ends(repetition, definition, levels, most.tokens)?,
                _ => flat_ends(repetition, definition, levels)?,
            };
            known.bytes.clear();
            known.bytes.extend_from_slice(level_bytes);
            known.values = levels;
        }
        let n = match shape {
            Shape::Nested => known.ends.last().copied().unwrap_or(0) as usize,
            _ => levels,
        };
        let words = words(values, header.encoding, n)?;
        Ok(Lists { words, ends: if shape == Shape::Nested { known.ends.clone() } else { Vec::new() } })
    })
}

/// The bytes of a page of single values, one for each of `rows` rows: PLAIN, no levels.
pub(crate) fn scalars<T>(
    page: &[u8],
    rows: usize,
    max_width: usize,
    read: impl FnOnce(&[u8]) -> Result<T, Flaw>,
) -> Result<T, Flaw> {
    with_plain(page, rows.saturating_mul(max_width).saturating_add(1024), |header, plain| {
        if header.encoding != PLAIN || usize::try_from(header.values) != Ok(rows) {
            let found = format!("{} values in encoding {}", header.values, header.encoding);
            return Err(Flaw::new(format!("a page of {rows} plain values"), found));
        }
        read(plain)
    })
}

/// Decompresses a page and hands its bytes on.
fn with_plain<T>(page: &[u8], most: usize, read: impl FnOnce(&Header, &[u8]) -> Result<T, Flaw>) -> Result<T, Flaw> {
    let header = Header::read(page)?;
    if header.kind != DATA_PAGE || header.definition != RLE || header.repetition != RLE {
        return Err(Flaw::new("a data page of version 1 with RLE levels", format!("{header:?}")));
    }
    let body = page.get(header.length..).unwrap_or_default();
    if usize::try_from(header.compressed) != Ok(body.len()) {
        return Err(Flaw::new(format!("a page of {} bytes after its header", body.len()), header.compressed));
    }
    let size = plain_size(&header, most)?;
    SCRATCH.with(|scratch| {
        // Held by a caller further up only if `read` came back here, which it does not; then a fresh one serves.
        let mut own = None;
        let mut borrowed = scratch.try_borrow_mut();
        let slot = borrowed.as_deref_mut().unwrap_or(&mut own);
        let scratch = match slot {
            Some(scratch) => scratch,
            None => slot.insert(Scratch {
                zstd: zstd::bulk::Decompressor::new().map_err(|e| Flaw::new("a zstd context", e))?,
                plain: Vec::new(),
            }),
        };
        // Memory is asked for and not touched: what the header claims costs nothing until zstd delivers it.
        scratch.plain.clear();
        scratch.plain.try_reserve(size).map_err(|e| Flaw::new(format!("memory for a page of {size} bytes"), e))?;
        let read = match scratch.zstd.decompress_to_buffer(body, &mut scratch.plain) {
            Ok(n) if n == size => read(&header, &scratch.plain),
            Ok(n) => Err(Flaw::new(format!("a page of {size} bytes uncompressed"), n)),
            Err(e) => Err(Flaw::new("a zstd frame", e)),
        };
        if scratch.plain.capacity() > KEPT_BYTES {
            scratch.plain = Vec::new();
        }
        read
    })
}

/// A page's size before compression, as far as it is believed.
fn plain_size(header: &Header, most: usize) -> Result<usize, Flaw> {
    let size = usize::try_from(header.uncompressed).ok().filter(|&size| size <= most);
    size.ok_or_else(|| Flaw::new(format!("a page of at most {most} bytes uncompressed"), header.uncompressed))
}

/// A block of levels and what follows it.
fn level_block(bytes: &[u8]) -> Result<(&[u8], &[u8]), Flaw> {
    let split = bytes.split_first_chunk::<4>();
    let block = split.and_then(|(length, rest)| rest.split_at_checked(u32::from_le_bytes(*length) as usize));
    block.ok_or_else(|| Flaw::new("a block of levels inside its page", format!("{} bytes", bytes.len())))
}

/// Where each inner list ends among the values. Levels of a list of lists without nulls:
///
/// ```text
/// repetition   0 a row starts   1 an inner list starts   2 it goes on
/// definition   2 a value        1 the inner list is empty
/// ```
fn nested_ends(repetition: &[u8], definition: &[u8], levels: usize, tokens: usize) -> Result<Vec<u32>, Flaw> {
    let starts = exceptions(repetition, 2, levels, (2, tokens))?;
    let empties = exceptions(definition, 2, levels, (2, tokens))?;
    let one_row = starts.first() == Some(&(0, 0)) && starts.iter().skip(1).all(|&(_, level)| level == 1);
    if !one_row || empties.iter().any(|&(_, level)| level != 1) {
        return Err(Flaw::new("the levels of one row of lists without nulls", "others"));
    }
    let mut ends = Vec::with_capacity(starts.len());
    let (mut empties, mut skipped) = (empties.into_iter().peekable(), 0u32);
    for (i, &(start, _)) in starts.iter().enumerate() {
        let next = starts.get(i + 1).map_or(levels as u32, |&(next, _)| next);
        if empties.next_if(|&(at, _)| at == start).is_some() {
            if next != start + 1 {
                return Err(Flaw::new("an empty list to hold nothing", format!("{} levels", next - start)));
            }
            skipped += 1;
        }
        ends.push(next - skipped);
    }
    match empties.next() {
        Some((at, _)) => Err(Flaw::new("values in a list that is not empty", format!("a gap at level {at}"))),
        None => Ok(ends),
    }
}

/// A list of one value a token has nothing to say: it starts once and is never empty.
fn flat_ends(repetition: &[u8], definition: &[u8], levels: usize) -> Result<Vec<u32>, Flaw> {
    let (starts, empties) = (exceptions(repetition, 1, levels, (1, 1))?, exceptions(definition, 1, levels, (1, 1))?);
    match starts[..] == [(0, 0)] && empties.is_empty() {
        true => Ok(Vec::new()),
        false => Err(Flaw::new("the levels of one list without nulls", "others")),
    }
}

/// All levels that are not `usual`, with their places, from Parquet's hybrid of runs and bit-packed groups of 8. More than `most`
/// are refused before there is room for them: a run of a few bytes can claim thousands of millions.
fn exceptions(mut bytes: &[u8], width: u32, levels: usize, (usual, most): (u8, usize)) -> Result<Vec<(u32, u8)>, Flaw> {
    let short = || Flaw::new(format!("{levels} levels"), "fewer");
    let too_many = || Flaw::new(format!("at most {most} levels other than {usual}"), "more");
    let mask = (1u8 << width) - 1;
    let mut found = Vec::new();
    let mut at = 0usize;
    while at < levels {
        let header = varint(&mut bytes).ok_or_else(short)? as usize;
        if header & 1 == 0 {
            let (&level, rest) = bytes.split_first().ok_or_else(short)?;
            bytes = rest;
            let run = (header >> 1).min(levels - at);
            if run == 0 {
                return Err(short());
            }
            if level != usual {
                if found.len() + run > most {
                    return Err(too_many());
                }
                found.extend((at..at + run).map(|i| (i as u32, level)));
            }
            at += run;
            continue;
        }
        let packed = (header >> 1).checked_mul(width as usize).and_then(|n| bytes.split_at_checked(n)).ok_or_else(short)?;
        bytes = packed.1;
        if packed.0.is_empty() {
            return Err(short());
        }
        // Levels are 1 or 2 bits wide, so they never cross a byte; a byte of usual ones has nothing to say.
        let all_usual = (0..8).step_by(width as usize).fold(0u8, |byte, shift| byte | (usual & mask) << shift);
        let per_byte = 8 / width as usize;
        for &byte in packed.0 {
            if byte == all_usual {
                at += per_byte;
                continue;
            }
            for shift in (0..8).step_by(width as usize) {
                let level = byte >> shift & mask;
                if at < levels && level != usual {
                    found.push((at as u32, level));
                }
                at += 1;
            }
            if found.len() > most {
                return Err(too_many());
            }
        }
    }
    Ok(found)
}

/// `n` 32-bit values.
fn words(bytes: &[u8], encoding: i64, n: usize) -> Result<Vec<u32>, Flaw> {
    if n.checked_mul(4) != Some(bytes.len()) {
        return Err(Flaw::new(format!("{n} values of 4 bytes"), format!("{} bytes", bytes.len())));
    }
    match encoding {
        PLAIN => Ok(bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()),
        BYTE_STREAM_SPLIT => {
            let (low, rest) = bytes.split_at(n);
            let (second, rest) = rest.split_at(n);
            let (third, high) = rest.split_at(n);
            // Rounded values have two planes of zeros, ids one; a plane of zeros needs no looking at value by value.
            let zero = |plane: &[u8]| plane.iter().fold(0, |bits, byte| bits | byte) == 0;
            let word = |byte: &u8, place: u32| u32::from(*byte) << (8 * place);
            Ok(match (zero(low) && zero(second), zero(high)) {
                (true, _) => third.iter().zip(high).map(|(c, d)| word(c, 2) | word(d, 3)).collect(),
                (_, true) => low.iter().zip(second).zip(third).map(|((a, b), c)| word(a, 0) | word(b, 1) | word(c, 2)).collect(),
                _ => {
                    let planes = low.iter().zip(second).zip(third).zip(high);
                    planes.map(|(((a, b), c), d)| word(a, 0) | word(b, 1) | word(c, 2) | word(d, 3)).collect()
                }
            })
        }
        other => Err(Flaw::new("values byte by byte or plain", format!("encoding {other}"))),
    }
}

fn count(stated: i64, most: usize) -> Result<usize, Flaw> {
    let levels = u32::try_from(stated).ok().map(|n| n as usize).filter(|&n| n <= most);
    levels.ok_or_else(|| Flaw::new(format!("at most {most} levels"), stated))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use proptest::prelude::*;

    /// Levels one by one, from runs and packed groups as Parquet's specification defines them.
    fn all_levels(bytes: &[u8], width: u32, levels: usize) -> Option<Vec<u8>> {
        let (mut at, mut found) = (0, Vec::new());
        while found.len() < levels {
            let mut header = 0usize;
            for shift in (0..63).step_by(7) {
                let byte = *bytes.get(at)?;
                at += 1;
                header |= usize::from(byte & 0x7f) << shift;
                if byte < 0x80 {
                    break;
                }
            }
            if header & 1 == 0 {
                found.extend(std::iter::repeat_n(*bytes.get(at)?, (header >> 1).min(levels)));
                at += 1;
            } else {
                let bits = (header >> 1).min(bytes.len()) * 8 * width as usize;
                for bit in (0..bits).step_by(width as usize) {
                    found.push(*bytes.get(at + bit / 8)? >> (bit % 8) & ((1 << width) - 1));
                }
                at += bits / 8;
            }
        }
        found.truncate(levels);
        Some(found)
    }

    #[test]
    fn exceptions_are_the_levels_that_differ() {
        // A run of nine 2s, a packed group of 8, a run of three 1s: 20 levels of 2 bits.
        let bytes = [18, 2, 3, 0b10_01_10_00, 0b10_10_01_10, 6, 1];
        for levels in [1, 9, 12, 17, 20] {
            let all = all_levels(&bytes, 2, levels).unwrap();
            let expected: Vec<(u32, u8)> = (0..).zip(all).filter(|(_, level)| *level != 2).collect();
            assert_eq!(exceptions(&bytes, 2, levels, (2, 20)).unwrap(), expected, "{levels}");
        }
        assert!(exceptions(&bytes, 2, 21, (2, 20)).is_err());
    }

    #[test]
    fn a_run_that_claims_thousands_of_millions_costs_nothing() {
        // A run of 2^30 levels 0, then of 2^30 levels 1: six bytes.
        let run = [0x80, 0x80, 0x80, 0x80, 0x08, 0];
        let claimed = u32::MAX as usize;
        assert!(exceptions(&run, 2, claimed, (2, 1024)).unwrap_err().expected.contains("at most 1024 levels"));
        assert!(nested_ends(&run, &run, claimed, 1024).is_err() && flat_ends(&run, &run, claimed).is_err());
        let most = Most { tokens: 1024, values: 65_536 };
        assert!(count(i64::from(u32::MAX), most.levels(Shape::Nested)).is_err());
        assert!(count(1025, most.levels(Shape::List)).is_err() && count(66_560, most.levels(Shape::Nested)).is_ok());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_alike_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..40), levels in 0usize..300) {
            for width in [1, 2] {
                // Endless headers and runs longer than any page are refused earlier here than by the definition.
                if let (Ok(found), Some(all)) = (exceptions(&bytes, width, levels, (1, 300)), all_levels(&bytes[..], width, levels)) {
                    let expected: Vec<(u32, u8)> = (0..).zip(all).filter(|(_, level)| *level != 1).collect();
                    prop_assert_eq!(found, expected);
                }
            }
        }

        #[test]
        fn no_page_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), shape in 0usize..2) {
            let shape = [Shape::List, Shape::Nested][shape];
            let _ = lists(&bytes, shape, Most { tokens: 1000, values: 1000 }, &mut KnownLevels::default());
            let _ = scalars(&bytes, 3, 100, |plain| Ok(plain.len()));
            let _ = nested_ends(&bytes, &bytes, bytes.len(), 1000);
            let _ = flat_ends(&bytes, &bytes, bytes.len());
        }
    }
}
