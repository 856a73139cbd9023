//! A row through the Arrow reader: how pages of version 1 are read, whose tokens are delta-coded, and an independent witness of
//! [`super::page`] in tests.

use super::read::Trouble;
use crate::error::Flaw;
use crate::layout::{Column, Layout, Shape};
use crate::schema::{self, Lists, RowHead};
use crate::{CodecError, Record, RowKey};
use arrow_array::types::{ArrowPrimitiveType, Float32Type, UInt16Type, UInt32Type, UInt64Type};
use arrow_array::{Array, ArrayRef, ListArray, PrimitiveArray, RecordBatch, StringArray};
use arrow_schema::DataType;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder, RowSelection, RowSelector,
};
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaData};
use std::fs::File;
use std::sync::Arc;

/// A shard's metadata as the Arrow reader wants it.
pub(crate) struct ArrowShard {
    meta: ArrowReaderMetadata,
    layout: Layout,
}

/// Reads the metadata of an open file.
pub(crate) fn load(file: &File, layout: &Layout) -> Result<ArrowShard, Trouble> {
    let options = options().with_offset_index_policy(PageIndexPolicy::Required).with_column_index_policy(PageIndexPolicy::Skip);
    let meta = ArrowReaderMetadata::load(file, options).map_err(|e| Flaw::new("a readable Parquet footer", e))?;
    Ok(ArrowShard { meta, layout: layout.clone() })
}

fn options() -> ArrowReaderOptions {
    ArrowReaderOptions::new().with_skip_arrow_metadata(true)
}

impl ArrowShard {
    pub(crate) fn new(meta: ParquetMetaData, layout: &Layout) -> Result<Self, Flaw> {
        let meta = ArrowReaderMetadata::try_new(Arc::new(meta), options());
        Ok(Self { meta: meta.map_err(|e| Flaw::new("a readable Parquet footer", e))?, layout: layout.clone() })
    }

    /// Row `within` of row group `group`, its checksum, key and alignment checked.
    pub(crate) fn row(&self, file: &File, group: usize, within: usize) -> Result<Record, Trouble> {
        let batch = self.batch(file, group, within, 1, ProjectionMask::all())?;
        let head = self.head(&batch)?;
        Ok(schema::assemble(&self.layout, &head, |column| lists(&batch, &self.layout.name(column), column))?)
    }

    /// The keys of a row group's rows.
    pub(crate) fn keys(&self, file: &File, group: usize) -> Result<Vec<RowKey>, Trouble> {
        let mask = ProjectionMask::columns(self.meta.parquet_schema(), [crate::layout::KEY]);
        let rows = self.meta.metadata().row_groups().get(group).map_or(0, |g| g.num_rows());
        let batch = self.batch(file, group, 0, usize::try_from(rows).unwrap_or(0), mask)?;
        Ok((0..batch.num_rows()).map(|row| key_at(&batch, row)).collect::<Result<_, Flaw>>()?)
    }

    fn head(&self, batch: &RecordBatch) -> Result<RowHead, Flaw> {
        let name = |column| self.layout.name(column);
        let codec = if self.layout.version == 1 {
            CodecError::default()
        } else {
            let words = text(batch, &name(Column::Selection), 0)?;
            if words != self.layout.selection_text.as_bytes() {
                let found = String::from_utf8_lossy(words).into_owned();
                return Err(Flaw::new(format!("selection {:?}", self.layout.selection_text), format!("{found:?}")));
            }
            CodecError {
                kl_sum: scalar::<Float32Type>(batch, &name(Column::CodecKlSum))?,
                kl_max: scalar::<Float32Type>(batch, &name(Column::CodecKlMax))?,
            }
        };
        Ok(RowHead {
            key: key_at(batch, 0)?,
            seq_id: scalar::<UInt64Type>(batch, &name(Column::SeqId))?,
            k: scalar::<UInt16Type>(batch, &name(Column::K))?,
            codec,
            crc32: scalar::<UInt32Type>(batch, &name(Column::Crc32))?,
        })
    }

    /// Rows `from..from + rows` of a row group as one batch. Only the pages of those rows are read.
    fn batch(&self, file: &File, group: usize, from: usize, rows: usize, mask: ProjectionMask) -> Result<RecordBatch, Trouble> {
        let bad = |e: &dyn std::fmt::Display| Flaw::new("pages that decode", e);
        let selection = RowSelection::from(vec![RowSelector::skip(from), RowSelector::select(rows)]);
        let file = file.try_clone().map_err(Trouble::Io)?;
        let mut reader = ParquetRecordBatchReaderBuilder::new_with_metadata(file, self.meta.clone())
            .with_row_groups(vec![group])
            .with_projection(mask)
            .with_row_selection(selection)
            .with_batch_size(rows)
            .build()
            .map_err(|e| bad(&e))?;
        let batch = reader.next().ok_or_else(|| Flaw::new(format!("{rows} rows"), "none"))?.map_err(|e| bad(&e))?;
        match batch.num_rows() {
            n if n == rows => Ok(batch),
            n => Err(Flaw::new(format!("{rows} rows"), n).into()),
        }
    }
}

fn key_at(batch: &RecordBatch, row: usize) -> Result<RowKey, Flaw> {
    let digits = text(batch, crate::layout::KEY, row)?;
    RowKey::from_hex(digits).ok_or_else(|| Flaw::new("a key of 32 hexadecimal digits", "something else"))
}

/// The bytes of a text; they need not be UTF-8 in a damaged file.
fn text<'a>(batch: &'a RecordBatch, name: &str, row: usize) -> Result<&'a [u8], Flaw> {
    let texts = column(batch, name)?.as_any().downcast_ref::<StringArray>();
    let texts = texts.ok_or_else(|| Flaw::new(format!("a text column {name}"), "another type"))?;
    let bytes = match texts.value_offsets().get(row..row + 2) {
        Some(&[a, b]) => usize::try_from(a).ok().zip(usize::try_from(b).ok()).and_then(|(a, b)| texts.value_data().get(a..b)),
        _ => None,
    };
    bytes.ok_or_else(|| Flaw::new(format!("a text in {name}"), "none"))
}

fn column<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef, Flaw> {
    batch.column_by_name(name).ok_or_else(|| Flaw::new(format!("a column {name}"), "none"))
}

fn scalar<T: ArrowPrimitiveType>(batch: &RecordBatch, name: &str) -> Result<T::Native, Flaw> {
    values::<T>(column(batch, name)?, name)?.first().copied().ok_or_else(|| Flaw::new(format!("a value in {name}"), "none"))
}

fn values<'a, T: ArrowPrimitiveType>(array: &'a ArrayRef, name: &str) -> Result<&'a [T::Native], Flaw> {
    let array = array.as_any().downcast_ref::<PrimitiveArray<T>>();
    match array {
        Some(array) if array.null_count() == 0 => Ok(array.values()),
        _ => Err(Flaw::new(format!("{name} of type {} without nulls", T::DATA_TYPE), "something else")),
    }
}

/// The values of an array of any of our types, as bits.
fn words(array: &ArrayRef, name: &str) -> Result<Vec<u32>, Flaw> {
    match array.data_type() {
        DataType::Float32 => Ok(values::<Float32Type>(array, name)?.iter().map(|v| v.to_bits()).collect()),
        DataType::UInt16 => Ok(values::<UInt16Type>(array, name)?.iter().map(|&v| u32::from(v)).collect()),
        _ => Ok(values::<UInt32Type>(array, name)?.to_vec()),
    }
}

/// A list column's part of the only row.
fn lists(batch: &RecordBatch, name: &str, which: Column) -> Result<Lists, Flaw> {
    let outer = list_at(column(batch, name)?, name, 0)?;
    if which.shape() != Shape::Nested {
        return Ok(Lists { words: words(&outer, name)?, ends: Vec::new() });
    }
    let inner = outer.as_any().downcast_ref::<ListArray>();
    let inner = inner.ok_or_else(|| Flaw::new(format!("lists of lists in {name}"), "lists"))?;
    let offsets = inner.value_offsets();
    let (first, last) = (offsets.first().copied().unwrap_or(0), offsets.last().copied().unwrap_or(0));
    let rising = first >= 0 && inner.null_count() == 0 && offsets.windows(2).all(|w| w[0] <= w[1]);
    if !rising || last as usize > inner.values().len() {
        return Err(Flaw::new(format!("rising list bounds inside {name}"), "bounds that do not rise or lie outside"));
    }
    let kept = inner.values().slice(first as usize, (last - first) as usize);
    Ok(Lists { words: words(&kept, name)?, ends: offsets.iter().skip(1).map(|&end| (end - first) as u32).collect() })
}

fn list_at(array: &ArrayRef, name: &str, row: usize) -> Result<ArrayRef, Flaw> {
    let lists = array.as_any().downcast_ref::<ListArray>();
    let lists = lists.ok_or_else(|| Flaw::new(format!("lists in {name}"), "another type"))?;
    match lists.value_offsets().get(row..row + 2) {
        Some(&[a, b]) if lists.null_count() == 0 && 0 <= a && a <= b && b as usize <= lists.values().len() => {
            Ok(lists.values().slice(a as usize, (b - a) as usize))
        }
        _ => Err(Flaw::new(format!("a list in {name}, row {row}"), "none, or one beyond its column")),
    }
}
