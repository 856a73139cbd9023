//! The rows of JSON text: one object a line, or one list of objects; plain, gzip or zstd.
//!
//! Nothing is parsed here: a line ends at its newline, an item of a list at the comma or bracket outside strings and brackets,
//! and the parser sees each row alone. A byte order mark, CRLF and blank lines are accepted; a row and zstd's window are bounded;
//! gzip's is by its format, and so is what its headers may hold.

use super::DataError;
use super::rows::{Body, MAX_ROW_BYTES, Place, Row, Unit};
use super::source::{Container, Packing, SourceFile};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Largest zstd window accepted, as a power of two (128 MiB).
const MAX_ZSTD_WINDOW_LOG: u32 = 27;

const LINE: &str = "one JSON object a line";
const LIST: &str = "a JSON list of objects";

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
    /// Opens `file`. Errors: I/O, a zstd stream that cannot be set up.
    pub(super) fn open(file: &SourceFile) -> Result<Self, DataError> {
        let io = |source| DataError::Io { path: file.path.clone(), source };
        let read = Arc::new(AtomicU64::new(0));
        let counted =
            BufReader::with_capacity(1 << 16, Counted { file: File::open(&file.path).map_err(io)?, read: read.clone() });
        let input: Box<dyn BufRead + Send> = match file.packing {
            Packing::Plain => Box::new(counted),
            // One member after another, as `cat a.gz b.gz` makes them.
            Packing::Gzip => Box::new(BufReader::with_capacity(1 << 16, flate2::bufread::MultiGzDecoder::new(counted))),
            Packing::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(counted).map_err(io)?;
                decoder.window_log_max(MAX_ZSTD_WINDOW_LOG).map_err(io)?;
                Box::new(BufReader::with_capacity(1 << 16, decoder))
            }
        };
        let path: Arc<Path> = file.path.as_path().into();
        Ok(Self { file: path, input, read, container: file.container, shape: Shape::Unknown, line: 1 })
    }

    /// The next row; `None` after the last one or after an error.
    pub(super) fn next(&mut self) -> Result<Option<Row>, DataError> {
        let row = self.next_row();
        if !matches!(row, Ok(Some(_))) {
            self.shape = Shape::End;
        }
        row
    }

    /// Bytes of the file read so far.
    pub(super) fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
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
