//! The single values of a row group's rows: one small page a column, read once and kept.

use super::page::{self, Span};
use super::read::{Trouble, fetch};
use super::table::Group;
use crate::error::Flaw;
use crate::layout::{Column, Layout, Shape};
use crate::schema::RowHead;
use crate::{CodecError, RowKey};
use std::fs::File;

/// Longest value of a column of single values: the words of a selection.
const MAX_SCALAR_BYTES: usize = 128;

/// Reads the pages of single values of one row group.
pub(super) fn read(file: &File, layout: &Layout, columns: &[Column], group: &Group) -> Result<Vec<RowHead>, Trouble> {
    let rows = group.rows as usize;
    let fetched = fetch_all(file, columns, group)?;
    let page = |column: Column| -> Result<Vec<u8>, Trouble> {
        let buffer = fetched.iter().find(|(c, _)| *c == column).map(|(_, bytes)| bytes.as_slice());
        let buffer = buffer.ok_or_else(|| Flaw::new(format!("a page of {}", layout.name(column)), "none"))?;
        let within = |flaw: Flaw| Flaw::new(format!("{}: {}", layout.name(column), flaw.expected), flaw.found);
        Ok(page::scalars(buffer, rows, MAX_SCALAR_BYTES, |plain| Ok(plain.to_vec())).map_err(within)?)
    };
    let keys = texts(&page(Column::Key)?, rows)?;
    let selections = texts(&page(Column::Selection)?, rows)?;
    if let Some(other) = selections.iter().find(|words| words.as_slice() != layout.selection_text.as_bytes()) {
        let found = String::from_utf8_lossy(other).into_owned();
        return Err(Flaw::new(format!("selection {:?}", layout.selection_text), format!("{found:?}")).into());
    }
    let seq_ids = numbers::<8>(&page(Column::SeqId)?, rows)?;
    let [ks, sums, maxima, crcs] = [Column::K, Column::CodecKlSum, Column::CodecKlMax, Column::Crc32];
    let words = |column| -> Result<Vec<u32>, Trouble> {
        Ok(numbers::<4>(&page(column)?, rows)?.into_iter().map(u32::from_le_bytes).collect())
    };
    let (ks, sums, maxima, crcs) = (words(ks)?, words(sums)?, words(maxima)?, words(crcs)?);
    let mut heads = Vec::with_capacity(rows);
    for row in 0..rows {
        let key = RowKey::from_hex(&keys[row]).ok_or_else(|| Flaw::new("a key of 32 hexadecimal digits", "something else"))?;
        heads.push(RowHead {
            key,
            seq_id: u64::from_le_bytes(seq_ids[row]),
            k: u16::try_from(ks[row]).map_err(|_| Flaw::new("k of 16 bits", ks[row]))?,
            codec: CodecError { kl_sum: f32::from_bits(sums[row]), kl_max: f32::from_bits(maxima[row]) },
            crc32: crcs[row],
        });
    }
    Ok(heads)
}

/// The pages of single values. Those that lie end to end, as ours do at both ends of a row group, are fetched with one read.
fn fetch_all(file: &File, columns: &[Column], group: &Group) -> Result<Vec<(Column, Vec<u8>)>, Trouble> {
    let single = |column: &Column| column.shape() == Shape::Scalar;
    let pages = columns.iter().zip(&group.pages).filter(|(column, _)| single(column));
    let mut runs: Vec<(Span, Vec<(Column, u32)>)> = Vec::new();
    for (column, span) in pages.filter_map(|(column, pages)| Some((*column, *pages.first()?))) {
        match runs.last_mut() {
            Some((run, inside)) if run.offset + u64::from(run.length) == span.offset => {
                run.length = run.length.saturating_add(span.length);
                inside.push((column, span.length));
            }
            _ => runs.push((span, vec![(column, span.length)])),
        }
    }
    let mut fetched = Vec::new();
    for (run, inside) in runs {
        let mut buffer = Vec::new();
        let mut rest = fetch(file, &run, &mut buffer).map_err(Trouble::reading)?;
        for (column, length) in inside {
            let (page, after) = rest.split_at_checked(length as usize).unwrap_or((rest, &[]));
            fetched.push((column, page.to_vec()));
            rest = after;
        }
    }
    Ok(fetched)
}

/// `rows` numbers of `N` bytes.
fn numbers<const N: usize>(plain: &[u8], rows: usize) -> Result<Vec<[u8; N]>, Flaw> {
    match plain.as_chunks::<N>() {
        (chunks, []) if chunks.len() == rows => Ok(chunks.to_vec()),
        _ => Err(Flaw::new(format!("{rows} values of {N} bytes"), format!("{} bytes", plain.len()))),
    }
}

/// `rows` texts, each with its length before it.
fn texts(mut plain: &[u8], rows: usize) -> Result<Vec<Vec<u8>>, Flaw> {
    let mut texts = Vec::with_capacity(rows);
    for _ in 0..rows {
        let split = plain.split_first_chunk::<4>();
        let text = split.and_then(|(length, rest)| rest.split_at_checked(u32::from_le_bytes(*length) as usize));
        let (text, rest) = text.ok_or_else(|| Flaw::new(format!("{rows} texts"), "fewer"))?;
        texts.push(text.to_vec());
        plain = rest;
    }
    match plain {
        [] => Ok(texts),
        more => Err(Flaw::new(format!("{rows} texts"), format!("{} bytes more", more.len()))),
    }
}
