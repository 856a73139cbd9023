//! The rows of a Parquet file as JSON values: only the columns a schema knows, one row at a time.
//!
//! Parquet's own bytes carry no proof of integrity, and its reader may panic on damaged ones; so every step is guarded and a
//! row's texts are bounded like a line's.

use super::DataError;
use super::guard::guard;
use super::rows::{Body, MAX_ROW_BYTES, Place, Row, Unit, text_bytes};
use super::schema::COLUMNS;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::reader::RowIter;
use parquet::schema::types::Type;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

/// Rows of a Parquet file.
pub(super) struct ParquetRows {
    file: Arc<Path>,
    rows: Option<RowIter<'static>>,
    number: u64,
    total: u64,
    bytes: u64,
}

impl ParquetRows {
    /// Opens the file at `path`. Errors: I/O, a footer that cannot be read, no column that a schema knows.
    pub(super) fn open(path: &Path) -> Result<Self, DataError> {
        let io = |source| DataError::Io { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(io)?;
        let bytes = file.metadata().map_err(io)?.len();
        let failed = |found: String| DataError::Parquet { place: path.display().to_string(), found };
        let reader = guard(|| SerializedFileReader::new(file)).map_err(failed)?.map_err(|e| failed(message(&e)))?;
        let metadata = reader.metadata().file_metadata();
        let total = u64::try_from(metadata.num_rows()).unwrap_or_default();
        let root = metadata.schema();
        let fields: Vec<_> = root.get_fields().iter().filter(|f| COLUMNS.contains(&f.name())).cloned().collect();
        if fields.is_empty() {
            let names: Vec<&str> = root.get_fields().iter().map(|field| field.name()).take(8).collect();
            return Err(DataError::Schema {
                place: path.display().to_string(),
                expected: "a column messages, conversations, conversation, or instruction and output".into(),
                found: super::tokenizer_json::shorten(&format!("the columns {}", names.join(", "))),
            });
        }
        let projection = Type::group_type_builder(root.name()).with_fields(fields).build().map_err(|e| failed(message(&e)))?;
        let rows = guard(|| RowIter::from_file_into(Box::new(reader)).project(Some(projection)));
        let rows = rows.map_err(failed)?.map_err(|e| failed(message(&e)))?;
        Ok(Self { file: path.into(), rows: Some(rows), number: 0, total, bytes })
    }

    /// The next row; `None` after the last one or after an error.
    pub(super) fn next(&mut self) -> Result<Option<Row>, DataError> {
        let Some(rows) = self.rows.as_mut() else { return Ok(None) };
        let place = Place { file: self.file.clone(), unit: Unit::Row, number: self.number + 1 };
        let failed = |found: String| DataError::Parquet { place: place.to_string(), found };
        let next = guard(|| rows.next().transpose().map(|row| row.map(|row| row.to_json_value())));
        match next.map_err(failed).and_then(|next| next.map_err(|e| failed(message(&e)))) {
            Ok(Some(value)) if text_bytes(&value) <= MAX_ROW_BYTES => {
                self.number += 1;
                Ok(Some(Row { place, body: Body::Table(value) }))
            }
            other => {
                self.rows = None;
                other.and_then(|row| match row {
                    Some(_) => Err(DataError::RowTooLong { place: place.to_string(), limit: MAX_ROW_BYTES }),
                    None => Ok(None),
                })
            }
        }
    }

    /// The share of the file's bytes that the rows read so far stand for.
    pub(super) fn bytes_read(&self) -> u64 {
        match self.rows {
            None => self.bytes,
            Some(_) => (u128::from(self.bytes) * u128::from(self.number.min(self.total)) / u128::from(self.total.max(1))) as u64,
        }
    }
}

/// The reader's words without its prefix.
fn message(error: &parquet::errors::ParquetError) -> String {
    let text = error.to_string();
    text.strip_prefix("Parquet error: ").unwrap_or(&text).to_string()
}
