//! Every way chats, a template or a tokenizer can be wrong, each as one sentence with the place, what was expected and found.

use potstill_cache::ErrorClass;
use std::path::PathBuf;

/// Ways data can be wrong.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// Reading or writing a file failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A path of the data that leads nowhere.
    #[error("{path}: expected a file, a folder or a glob of chats, found nothing there", path = path.display())]
    NoSuchPath {
        /// As it was given.
        path: PathBuf,
    },
    /// A glob that cannot be read.
    #[error("{pattern}: expected a glob, found {why}")]
    BadGlob {
        /// As it was given.
        pattern: String,
        /// What is wrong with it.
        why: String,
    },
    /// A folder or glob without a supported file.
    #[error("{path}: expected at least one file ending in {SUPPORTED}, found none", path = path.display(), SUPPORTED = super::source::SUPPORTED)]
    NoFiles {
        /// The folder or glob.
        path: PathBuf,
    },
    /// A file of another kind.
    #[error("{path}: expected a file ending in {SUPPORTED}", path = path.display(), SUPPORTED = super::source::SUPPORTED)]
    UnsupportedFile {
        /// The file.
        path: PathBuf,
    },
    /// A file beyond its limit.
    #[error("{path}: expected at most {limit} bytes, found {found}", path = path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
        /// The file's size in bytes, at least.
        found: u64,
    },
    /// A row beyond the limit.
    #[error("{place}: expected a row of at most {limit} bytes, found a longer one")]
    RowTooLong {
        /// `file:line`.
        place: String,
        /// The limit in bytes.
        limit: usize,
    },
    /// Bytes that are no UTF-8.
    #[error("{place}: expected UTF-8 text, found an invalid byte 0x{byte:02x} at column {column}")]
    Utf8 {
        /// `file:line`.
        place: String,
        /// The offending byte.
        byte: u8,
        /// Its place in the row, counted in bytes from 1.
        column: usize,
    },
    /// Text that is no JSON.
    #[error("{place}: expected {expected}, found {found}")]
    Json {
        /// `file:line`.
        place: String,
        /// What should stand there.
        expected: &'static str,
        /// What the parser saw, with its column.
        found: String,
    },
    /// A row of no known schema.
    #[error("{place}: expected {expected}, found {found}")]
    Schema {
        /// `file:line` or `file:row N`.
        place: String,
        /// What should stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A Parquet file that cannot be read.
    #[error("{place}: expected readable Parquet, found {found}")]
    Parquet {
        /// The file, or `file:row N`.
        place: String,
        /// What the reader said.
        found: String,
    },
    /// A role nobody knows, under [`BadRoles::Error`](super::BadRoles::Error).
    #[error("{place}: expected one of the roles {expected}, found {found:?} in message {index}")]
    UnknownRole {
        /// `file:line` or `file:row N`.
        place: String,
        /// The roles of this schema.
        expected: &'static str,
        /// The role in the data.
        found: String,
        /// Number of the message, from 0.
        index: usize,
    },
    /// Known roles in an order that cannot be trained on, under [`BadRoles::Error`](super::BadRoles::Error).
    #[error("{place}: expected {expected}, found the role {found:?} in message {index}")]
    RoleOrder {
        /// `file:line` or `file:row N`.
        place: String,
        /// Which roles may stand there.
        expected: &'static str,
        /// The role that stands there.
        found: &'static str,
        /// Number of the message, from 0.
        index: usize,
    },
    /// A failure with its place in the data.
    #[error("{place}: {source}")]
    At {
        /// `file:line` or `file:row N`.
        place: String,
        /// What failed there.
        source: Box<DataError>,
    },
    /// No rows at all.
    #[error("{paths}: expected at least one conversation, found no rows")]
    Empty {
        /// The data as it was given.
        paths: String,
    },
    /// Rows, but none to learn from.
    #[error("{paths}: expected at least one conversation to learn from, found {rows} rows, all skipped ({reasons})")]
    NothingToLearn {
        /// The data as it was given.
        paths: String,
        /// Rows read.
        rows: u64,
        /// How many for which reason.
        reasons: String,
    },
    /// A `tokenizer.json` or `tokenizer_config.json` that cannot be used.
    #[error("{path}: expected {expected}, found {found}", path = path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What should stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A text the tokenizer fails on.
    #[error("expected the tokenizer to encode the text, found: {found}")]
    Encode {
        /// What it said.
        found: String,
    },
    /// A model folder without a template.
    #[error(
        "{folder}: expected a chat template in chat_template.jinja or under chat_template in tokenizer_config.json, found {found}",
        folder = folder.display()
    )]
    NoTemplate {
        /// The model folder.
        folder: PathBuf,
        /// What is there instead.
        found: String,
    },
    /// A template that does not compile or fails while rendering.
    #[error("chat template {name}: {found}")]
    Template {
        /// The file it came from.
        name: String,
        /// What the engine said, with the template's line.
        found: String,
    },
    /// A template that called `raise_exception`.
    #[error("chat template {name} refuses the conversation: {found}")]
    Refused {
        /// The file it came from.
        name: String,
        /// The template's own words.
        found: String,
    },
    /// A template that works too long.
    #[error("chat template {name}: expected at most {limit} steps, found more (an endless or very long loop)")]
    TemplateSteps {
        /// The file it came from.
        name: String,
        /// The limit.
        limit: u64,
    },
    /// A template that writes too much.
    #[error("chat template {name}: expected at most {limit} bytes of text, found more")]
    TemplateOutput {
        /// The file it came from.
        name: String,
        /// The limit.
        limit: usize,
    },
    /// A template that changes what the assistant says so that it cannot be found in the text.
    #[error("chat template {name}: expected every assistant message whole in the text, found {found}")]
    LostSpan {
        /// The file it came from.
        name: String,
        /// What became of it.
        found: String,
    },
    /// A signal asked for a stop.
    #[error("stopped by a signal while reading the data; nothing was written; run the same command again")]
    Interrupted,
}

impl DataError {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        match self {
            DataError::Interrupted => ErrorClass::Interrupted,
            DataError::At { source, .. } => source.class(),
            _ => ErrorClass::Runtime,
        }
    }
}
