//! Reading a shard: map the file, load its footer once, then fetch any row through the offset index. Every row that leaves here
//! has passed its checksum and the rules of its cache; every panic of the decoder has become an error.

use crate::error::Flaw;
use crate::guard::fenced;
use crate::rules::{Form, Rules};
use crate::{Error, Record, Result, RowKey, schema};
use arrow_array::RecordBatch;
use bytes::Bytes;
use memmap2::Mmap;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder, RowSelection, RowSelector,
};
use parquet::file::metadata::PageIndexPolicy;
use std::fs::File;
use std::path::Path;

/// What a shard has to be.
pub(crate) struct Expected<'a> {
    /// File name, for messages.
    pub(crate) file: &'a str,
    /// Row of the cache that its first row is.
    pub(crate) first_row: u64,
    /// Rows in it.
    pub(crate) rows: u64,
    /// Its size, where that is known already.
    pub(crate) bytes: Option<u64>,
    /// Key-values of its footer.
    pub(crate) footer: Vec<(String, String)>,
}

/// Size of one column in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ColumnSize {
    pub(crate) name: String,
    pub(crate) compressed: u64,
    pub(crate) uncompressed: u64,
}

/// An open shard.
pub(crate) struct Shard {
    file: String,
    bytes: Bytes,
    meta: ArrowReaderMetadata,
    /// Row of this shard that each row group starts at, then the number of rows.
    group_starts: Vec<u64>,
    first_row: u64,
    rules: Rules,
}

impl Shard {
    /// Maps `path` and checks size, schema, rows and footer against `expected`.
    pub(crate) fn open(path: &Path, expected: Expected<'_>, rules: Rules) -> Result<Self> {
        let damage = |flaw: Flaw| flaw.damage(expected.file, None, None);
        let bytes = map(path, &expected)?;
        let options = ArrowReaderOptions::new()
            .with_skip_arrow_metadata(true)
            .with_column_index_policy(PageIndexPolicy::Skip)
            .with_offset_index_policy(PageIndexPolicy::Required);
        let loaded = fenced(|| ArrowReaderMetadata::load(&bytes, options).map_err(|e| e.to_string())).and_then(|r| r);
        let meta = loaded.map_err(|e| damage(Flaw::new("a readable Parquet footer", e)))?;
        let group_starts = fenced(|| check_footer(&meta, &expected))
            .unwrap_or_else(|panic| Err(Flaw::new("a readable Parquet footer", panic)))
            .map_err(damage)?;
        Ok(Self { file: expected.file.to_string(), bytes, meta, group_starts, first_row: expected.first_row, rules })
    }

    /// Rows in this shard.
    pub(crate) fn rows(&self) -> u64 {
        self.group_starts.last().copied().unwrap_or(0)
    }

    /// File size in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Row `row` of this shard (0-based), checked.
    pub(crate) fn row(&self, row: u64) -> Result<Record> {
        let cache_row = self.first_row.saturating_add(row);
        let Some((group, within)) = self.locate(row) else {
            return Err(Error::NoRow { row: cache_row, rows: self.first_row + self.rows() });
        };
        let read = || {
            let batch = self.batch(group, within, 1, ProjectionMask::all())?;
            let record = schema::record_of(&batch, self.rules.k)?;
            self.rules.check(&record, Form::Stored).map(|()| record)
        };
        let flat = fenced(read).unwrap_or_else(|panic| Err(Flaw::new("pages that decode", panic)));
        flat.map_err(|flaw| flaw.damage(&self.file, Some(group as u64), Some(cache_row)))
    }

    /// The keys of all rows, from the key column alone: not covered by the rows' checksums.
    pub(crate) fn keys(&self) -> Result<Vec<RowKey>> {
        let mask = ProjectionMask::columns(self.meta.parquet_schema(), [schema::KEY]);
        let mut keys = Vec::new();
        for (group, bounds) in self.group_starts.windows(2).enumerate() {
            let rows = (bounds[1] - bounds[0]) as usize;
            let read = || {
                let batch = self.batch(group, 0, rows, mask.clone())?;
                (0..rows).map(|row| schema::key_at(&batch, row)).collect::<std::result::Result<Vec<_>, Flaw>>()
            };
            let flat = fenced(read).unwrap_or_else(|panic| Err(Flaw::new("pages that decode", panic)));
            keys.extend(flat.map_err(|flaw| flaw.damage(&self.file, Some(group as u64), None))?);
        }
        Ok(keys)
    }

    /// Bytes of every column, summed over row groups, in schema order.
    pub(crate) fn column_sizes(&self) -> Vec<ColumnSize> {
        let mut sizes: Vec<ColumnSize> = Vec::new();
        for group in self.meta.metadata().row_groups() {
            for column in group.columns() {
                let name = column.column_path().parts().first().cloned().unwrap_or_default();
                let (compressed, uncompressed) = (size(column.compressed_size()), size(column.uncompressed_size()));
                match sizes.iter_mut().find(|s| s.name == name) {
                    Some(s) => {
                        s.compressed = s.compressed.saturating_add(compressed);
                        s.uncompressed = s.uncompressed.saturating_add(uncompressed);
                    }
                    None => sizes.push(ColumnSize { name, compressed, uncompressed }),
                }
            }
        }
        sizes
    }

    /// Row group of a row, and the row's place in it.
    fn locate(&self, row: u64) -> Option<(usize, usize)> {
        if row >= self.rows() {
            return None;
        }
        let group = self.group_starts.partition_point(|&start| start <= row).checked_sub(1)?;
        Some((group, (row - self.group_starts.get(group)?) as usize))
    }

    /// Rows `from..from + rows` of a row group as one batch. Only the pages of those rows are read.
    fn batch(&self, group: usize, from: usize, rows: usize, mask: ProjectionMask) -> std::result::Result<RecordBatch, Flaw> {
        let bad = |e: &dyn std::fmt::Display| Flaw::new("pages that decode", e);
        let selection = RowSelection::from(vec![RowSelector::skip(from), RowSelector::select(rows)]);
        let mut reader = ParquetRecordBatchReaderBuilder::new_with_metadata(self.bytes.clone(), self.meta.clone())
            .with_row_groups(vec![group])
            .with_projection(mask)
            .with_row_selection(selection)
            .with_batch_size(rows)
            .build()
            .map_err(|e| bad(&e))?;
        let batch = reader.next().ok_or_else(|| Flaw::new(format!("{rows} rows"), "none"))?.map_err(|e| bad(&e))?;
        match batch.num_rows() {
            n if n == rows => Ok(batch),
            n => Err(Flaw::new(format!("{rows} rows"), n)),
        }
    }
}

fn size(stated: i64) -> u64 {
    u64::try_from(stated).unwrap_or(0)
}

fn map(path: &Path, expected: &Expected<'_>) -> Result<Bytes> {
    let damage = |flaw: Flaw| flaw.damage(expected.file, None, None);
    let info = match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(damage(Flaw::new("this shard", "no such file"))),
        info => info.map_err(Error::io(path))?,
    };
    if !info.is_file() {
        return Err(damage(Flaw::new("a plain file", "something else")));
    }
    if let Some(bytes) = expected.bytes
        && info.len() != bytes
    {
        return Err(damage(Flaw::new(format!("{bytes} bytes"), format!("{} bytes", info.len()))));
    }
    if info.len() == 0 {
        return Err(damage(Flaw::new("a Parquet file", "0 bytes")));
    }
    let file = File::open(path).map_err(Error::io(path))?;
    // SAFETY: shards are immutable once they have their name (they appear by rename and no code of this crate opens one for
    // writing), so the mapped bytes do not change while the map lives.
    let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
    // Rows are read in random order; without this the system reads megabytes ahead for each. It is advice: failing is harmless.
    #[cfg(unix)]
    let _ = map.advise(memmap2::Advice::Random);
    Ok(Bytes::from_owner(map))
}

/// Checks schema, row counts and key-values; gives the row-group starts.
fn check_footer(meta: &ArrowReaderMetadata, expected: &Expected<'_>) -> std::result::Result<Vec<u64>, Flaw> {
    let schema = schema::arrow_schema();
    if meta.schema().fields() != schema.fields() {
        return Err(Flaw::new("the columns of format version 1", format!("{:?}", names(meta))));
    }
    let mut starts = vec![0u64];
    let mut end = 0u64;
    for group in meta.metadata().row_groups() {
        let rows = u64::try_from(group.num_rows()).ok().filter(|&rows| rows > 0 && rows <= expected.rows);
        end = end.saturating_add(rows.ok_or_else(|| Flaw::new("row groups of 1 row or more", group.num_rows()))?);
        starts.push(end);
    }
    let file_rows = meta.metadata().file_metadata().num_rows();
    if end != expected.rows || u64::try_from(file_rows) != Ok(end) {
        return Err(Flaw::new(format!("{} rows", expected.rows), format!("{file_rows} rows, {end} in its row groups")));
    }
    let stored = meta.metadata().file_metadata().key_value_metadata();
    for (key, value) in &expected.footer {
        let found = stored.into_iter().flatten().find(|kv| &kv.key == key).and_then(|kv| kv.value.as_deref());
        if found != Some(value.as_str()) {
            return Err(Flaw::new(format!("{key} = {value:?} in the footer"), format!("{found:?}")));
        }
    }
    Ok(starts)
}

fn names(meta: &ArrowReaderMetadata) -> Vec<&str> {
    meta.schema().fields().iter().map(|field| field.name().as_str()).collect()
}
