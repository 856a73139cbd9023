//! The rows of one file, in order, each with its place.
//!
//! JSON lines, a JSON list of objects, or Parquet; plain or zstd. Reading is bounded (a row, zstd's window) and yields raw
//! bytes: parsing them is left to whoever has many threads. A byte order mark, CRLF and blank lines are accepted.

use super::DataError;
use super::parquet_rows::ParquetRows;
use super::source::{Container, Packing, SourceFile};
use serde_json::Value;
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Longest row, in bytes.
pub(super) const MAX_ROW_BYTES: usize = 16 << 20;
/// Largest zstd window accepted, as a power of two (128 MiB).
const MAX_ZSTD_WINDOW_LOG: u32 = 27;

const LINE: &str = "one JSON object a line";
const LIST: &str = "a JSON list of objects";

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
            Self::Json(rows) => rows.read.load(Ordering::Relaxed),
            Self::Parquet(rows) => rows.bytes_read(),
        }
    }
}

/// What a JSON file looks like from here on.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Shape {
    Unknown,
    Lines,
    ListStart,
    ListNext,
    End,
}

/// Rows of JSON text.
pub(super) struct JsonRows {
    file: Arc<Path>,
    input: Box<dyn BufRead + Send>,
    read: Arc<AtomicU64>,
    container: Container,
    shape: Shape,
    line: u64,
}

/// Counts the bytes that pass.
struct Counted {
    file: File,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.read.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

impl JsonRows {
    fn open(file: &SourceFile) -> Result<Self, DataError> {
        let io = |source| DataError::Io { path: file.path.clone(), source };
        let read = Arc::new(AtomicU64::new(0));
        let counted =
            BufReader::with_capacity(1 << 16, Counted { file: File::open(&file.path).map_err(io)?, read: read.clone() });
        let input: Box<dyn BufRead + Send> = match file.packing {
            Packing::Plain => Box::new(counted),
            Packing::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(counted).map_err(io)?;
                decoder.window_log_max(MAX_ZSTD_WINDOW_LOG).map_err(io)?;
                Box::new(BufReader::with_capacity(1 << 16, decoder))
            }
        };
        let path: Arc<Path> = file.path.as_path().into();
        Ok(Self { file: path, input, read, container: file.container, shape: Shape::Unknown, line: 1 })
    }

    fn next(&mut self) -> Result<Option<Row>, DataError> {
        let row = self.next_row();
        if !matches!(row, Ok(Some(_))) {
            self.shape = Shape::End;
        }
        row
    }

    fn next_row(&mut self) -> Result<Option<Row>, DataError> {
        if self.shape == Shape::Unknown {
            self.shape = self.recognise()?;
        }
        match self.shape {
            Shape::Unknown | Shape::End => Ok(None),
            Shape::Lines => self.next_line(),
            Shape::ListStart | Shape::ListNext => self.next_item(),
        }
    }

    /// Passes a byte order mark; a `.json` file that begins with `[` is a list.
    fn recognise(&mut self) -> Result<Shape, DataError> {
        if self.peek()? == Some(0xEF) {
            for expected in [0xEF, 0xBB, 0xBF] {
                match self.peek()? {
                    Some(byte) if byte == expected => self.input.consume(1),
                    _ => return Err(self.wrong(LINE, "the byte 0xef at its start")),
                }
            }
        }
        if self.container == Container::Lines {
            return Ok(Shape::Lines);
        }
        match self.skip_whitespace()? {
            Some(b'[') => {
                self.input.consume(1);
                Ok(Shape::ListStart)
            }
            _ => Ok(Shape::Lines),
        }
    }

    /// The next line that is not blank.
    fn next_line(&mut self) -> Result<Option<Row>, DataError> {
        loop {
            let mut bytes = Vec::new();
            let mut ended = false;
            while !ended {
                let buffer = self.input.fill_buf().map_err(|source| io(&self.file, source))?;
                if buffer.is_empty() {
                    break;
                }
                let newline = buffer.iter().position(|&byte| byte == b'\n');
                let taken = newline.map_or(buffer.len(), |n| n + 1);
                bytes.extend(buffer.iter().take(taken));
                self.input.consume(taken);
                ended = newline.is_some();
                if bytes.len() > MAX_ROW_BYTES {
                    return Err(DataError::RowTooLong { place: self.place(self.line).to_string(), limit: MAX_ROW_BYTES });
                }
            }
            if bytes.is_empty() {
                return Ok(None);
            }
            let line = self.line;
            self.line += u64::from(ended);
            if !bytes.trim_ascii().is_empty() {
                return Ok(Some(Row { place: self.place(line), body: Body::Json(bytes) }));
            }
        }
    }

    /// The next item of a list, without its comma; what stands inside is the parser's business.
    fn next_item(&mut self) -> Result<Option<Row>, DataError> {
        let next = self.skip_whitespace()?;
        match (self.shape, next) {
            (_, Some(b']')) => {
                self.input.consume(1);
                return match self.skip_whitespace()? {
                    None => Ok(None),
                    Some(_) => Err(self.wrong(LIST, "more text after the list")),
                };
            }
            (_, None) => return Err(self.wrong(LIST, "the end of the file inside the list")),
            (Shape::ListStart, Some(_)) => {}
            (_, Some(b',')) => {
                self.input.consume(1);
                self.skip_whitespace()?;
            }
            (_, Some(byte)) => {
                let found = format!("{:?} where a comma or the list's end should be", char::from(byte));
                return Err(self.wrong(LIST, &found));
            }
        }
        self.shape = Shape::ListNext;
        let place = self.place(self.line);
        let bytes = self.item(&place)?;
        Ok(Some(Row { place, body: Body::Json(bytes) }))
    }

    /// Bytes up to the comma or bracket that ends an item.
    fn item(&mut self, place: &Place) -> Result<Vec<u8>, DataError> {
        let mut bytes = Vec::new();
        let (mut depth, mut in_string, mut escaped) = (0u64, false, false);
        loop {
            let buffer = self.input.fill_buf().map_err(|source| io(&self.file, source))?;
            if buffer.is_empty() {
                return Err(self.wrong(LIST, "the end of the file inside the list"));
            }
            let mut taken = 0;
            let mut ended = false;
            for &byte in buffer {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' if in_string => escaped = true,
                    b'"' => in_string = !in_string,
                    _ if in_string => {}
                    b',' | b']' if depth == 0 => {
                        ended = true;
                        break;
                    }
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => depth = depth.saturating_sub(1),
                    _ => {}
                }
                self.line += u64::from(byte == b'\n');
                taken += 1;
            }
            bytes.extend(buffer.iter().take(taken));
            self.input.consume(taken);
            if bytes.len() > MAX_ROW_BYTES {
                return Err(DataError::RowTooLong { place: place.to_string(), limit: MAX_ROW_BYTES });
            }
            if ended {
                return Ok(bytes);
            }
        }
    }

    /// Passes JSON whitespace; the byte after it, or `None` at the end.
    fn skip_whitespace(&mut self) -> Result<Option<u8>, DataError> {
        loop {
            match self.peek()? {
                Some(byte @ (b' ' | b'\t' | b'\r' | b'\n')) => {
                    self.line += u64::from(byte == b'\n');
                    self.input.consume(1);
                }
                other => return Ok(other),
            }
        }
    }

    fn peek(&mut self) -> Result<Option<u8>, DataError> {
        self.input.fill_buf().map(|buffer| buffer.first().copied()).map_err(|source| io(&self.file, source))
    }

    fn place(&self, line: u64) -> Place {
        Place { file: self.file.clone(), unit: Unit::Line, number: line }
    }

    fn wrong(&self, expected: &'static str, found: &str) -> DataError {
        DataError::Json { place: self.place(self.line).to_string(), expected, found: found.to_string() }
    }
}

fn io(file: &Path, source: std::io::Error) -> DataError {
    DataError::Io { path: file.to_path_buf(), source }
}
