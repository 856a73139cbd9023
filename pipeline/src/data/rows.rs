//! The rows of one file, in order, each with its place.
//!
//! Reading is bounded and yields JSON as raw bytes: parsing them is left to whoever has many threads.

use super::DataError;
use super::json_rows::JsonRows;
use super::parquet_rows::ParquetRows;
use super::source::{Container, SourceFile};
use serde_json::Value;
use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

/// Longest row, in bytes.
pub(super) const MAX_ROW_BYTES: usize = 16 << 20;

/// Where a row stands. Shown as `file:line` or `file:row N`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// The file.
    pub file: Arc<Path>,
    /// What `number` counts.
    pub unit: Unit,
    /// From 1.
    pub number: u64,
}

/// What a place counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// Lines of text.
    Line,
    /// Rows of a table.
    Row,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.unit {
            Unit::Line => write!(f, "{}:{}", self.file.display(), self.number),
            Unit::Row => write!(f, "{}:row {}", self.file.display(), self.number),
        }
    }
}

/// One row, not yet parsed.
#[derive(Debug)]
pub(super) struct Row {
    /// Where it stands.
    pub place: Place,
    /// What it holds.
    pub body: Body,
}

/// What a row holds.
#[derive(Debug)]
pub(super) enum Body {
    /// JSON text.
    Json(Vec<u8>),
    /// Columns, converted.
    Table(Value),
}

impl Row {
    /// Its size: JSON text, or the texts of its columns.
    pub(super) fn bytes(&self) -> usize {
        match &self.body {
            Body::Json(bytes) => bytes.len(),
            Body::Table(value) => text_bytes(value),
        }
    }

    /// The row as a JSON value. Errors: invalid UTF-8 or JSON, with line and column.
    pub(super) fn value(&self) -> Result<Cow<'_, Value>, DataError> {
        let bytes = match &self.body {
            Body::Table(value) => return Ok(Cow::Borrowed(value)),
            Body::Json(bytes) => bytes,
        };
        let line = |extra: usize| Place { number: self.place.number + extra as u64, ..self.place.clone() }.to_string();
        let text = std::str::from_utf8(bytes).map_err(|e| {
            let before = bytes.get(..e.valid_up_to()).unwrap_or_default();
            let column = before.iter().rev().take_while(|&&byte| byte != b'\n').count() + 1;
            let place = line(before.iter().filter(|&&byte| byte == b'\n').count());
            DataError::Utf8 { place, byte: bytes.get(e.valid_up_to()).copied().unwrap_or_default(), column }
        })?;
        serde_json::from_str(text).map(Cow::Owned).map_err(|e| {
            let full = e.to_string();
            let what = full.rfind(" at line ").and_then(|end| full.get(..end)).unwrap_or(&full);
            let found = format!("{what} at column {}", e.column());
            DataError::Json { place: line(e.line().saturating_sub(1)), expected: "a JSON object", found }
        })
    }
}

/// The rows of one file.
pub(super) enum RowReader {
    /// JSON text.
    Json(JsonRows),
    /// Parquet.
    Parquet(ParquetRows),
}

impl RowReader {
    /// Opens `file`. Errors: I/O, a zstd frame or Parquet footer that cannot be read.
    pub(super) fn open(file: &SourceFile) -> Result<Self, DataError> {
        match file.container {
            Container::Parquet => ParquetRows::open(&file.path).map(Self::Parquet),
            Container::Lines | Container::ListOrLines => JsonRows::open(file).map(Self::Json),
        }
    }

    /// The next row; `None` after the last one. After an error there is nothing more.
    pub(super) fn next(&mut self) -> Option<Result<Row, DataError>> {
        match self {
            Self::Json(rows) => rows.next().transpose(),
            Self::Parquet(rows) => rows.next().transpose(),
        }
    }

    /// Bytes of the file read so far (for Parquet, the share of its rows).
    pub(super) fn bytes_read(&self) -> u64 {
        match self {
            Self::Json(rows) => rows.bytes_read(),
            Self::Parquet(rows) => rows.bytes_read(),
        }
    }
}

/// Bytes of all texts in a value (its depth is bounded by the file's schema, which the reader has accepted).
pub(super) fn text_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(items) => items.iter().map(text_bytes).sum(),
        Value::Object(fields) => fields.values().map(text_bytes).sum(),
        _ => 0,
    }
}
