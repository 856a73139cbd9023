//! Where every page of a shard lies: all that is kept of its footer.

use super::page::Span;
use crate::error::Flaw;
use crate::layout::{Column, Layout, Shape};
use crate::schema::RowHead;
use parquet::file::metadata::ParquetMetaData;
use std::sync::OnceLock;

/// Most bytes of one page: what a row's page can be at the very most.
const MAX_PAGE_BYTES: u32 = 1 << 30;

/// A row group: where its pages lie, and its single values once somebody asked for them.
pub(super) struct Group {
    pub(super) first: u64,
    pub(super) rows: u32,
    /// For each column of the layout: a page a row, or one page where the column holds single values.
    pub(super) pages: Vec<Box<[Span]>>,
    pub(super) heads: OnceLock<Box<[RowHead]>>,
}

/// Where every page lies; refuses pages that do not fall one to a row, or lie outside the file.
pub(super) fn groups(meta: &ParquetMetaData, layout: &Layout, columns: &[Column], bytes: u64) -> Result<Vec<Group>, Flaw> {
    let mut groups = Vec::with_capacity(meta.num_row_groups());
    let mut first = 0u64;
    for (index, group) in meta.row_groups().iter().enumerate() {
        let rows = u32::try_from(group.num_rows()).map_err(|_| Flaw::new("a row group of few rows", group.num_rows()))?;
        let indexes = meta.page_index_for_row_group(index);
        let mut pages = Vec::with_capacity(columns.len());
        for (number, column) in columns.iter().enumerate() {
            let locations = indexes.page_locations(number);
            let locations = locations.ok_or_else(|| Flaw::new("an offset index of every column", "none"))?;
            let expected = if column.shape() == Shape::Scalar { 1 } else { rows as usize };
            let named = |what: &str| format!("row group {index}, {}: {what}", layout.name(*column));
            if locations.len() != expected {
                return Err(Flaw::new(named(&format!("{expected} pages")), locations.len()));
            }
            let spans = locations.iter().enumerate().map(|(row, page)| {
                let span = u64::try_from(page.offset).ok().zip(u32::try_from(page.compressed_page_size).ok());
                let inside = span.filter(|(offset, length)| {
                    *length <= MAX_PAGE_BYTES && offset.checked_add(u64::from(*length)).is_some_and(|end| end <= bytes)
                });
                match inside {
                    Some((offset, length)) if i64::try_from(row) == Ok(page.first_row_index) => Ok(Span { offset, length }),
                    _ => Err(Flaw::new(named(&format!("page {row} of row {row} inside the file")), format!("{page:?}"))),
                }
            });
            pages.push(spans.collect::<Result<Box<[Span]>, Flaw>>()?);
        }
        groups.push(Group { first, rows, pages, heads: OnceLock::new() });
        first += u64::from(rows);
    }
    Ok(groups)
}
