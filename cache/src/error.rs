//! Every way a cache can be wrong, with both sides of each disagreement, and the class that decides an exit code.

use crate::Misalignment;
use std::path::{Path, PathBuf};

/// What kind of failure an error is; the command line turns it into an exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// Something failed while running (I/O, malformed input): exit 1.
    Runtime,
    /// The request itself cannot be carried out as written: exit 2.
    Usage,
    /// Stored bytes are not what was written: exit 4.
    Integrity,
    /// Another process holds the lock: exit 5.
    Locked,
    /// Teacher, tokenizer, template, data or settings differ: exit 6.
    Mismatch,
    /// Stopped by a signal after durable progress: exit 75.
    Interrupted,
}

/// This crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Errors of the cache.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing a file failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The Parquet library could not write.
    #[error("{path}: cannot write this shard: {source}", path = path.display())]
    Parquet {
        /// The file being written.
        path: PathBuf,
        /// What the library said.
        source: parquet::errors::ParquetError,
    },
    /// The folder of a cache is not there.
    #[error("{dir}: no such folder; expected the folder of a cache", dir = dir.display())]
    NoFolder {
        /// The folder asked for.
        dir: PathBuf,
    },
    /// The folder is there, but it is not a cache.
    #[error("{dir}: no manifest.json in this folder; expected the folder of a cache", dir = dir.display())]
    NoManifest {
        /// The folder asked for.
        dir: PathBuf,
    },
    /// The folder is one of workers' parts, which have yet to become a cache.
    #[error("{dir}: holds workers' parts and is no cache itself; join them first: combine --out OUT {dir}", dir = dir.display())]
    OnlyParts {
        /// The folder asked for.
        dir: PathBuf,
    },
    /// A new cache was to be written over somebody's files.
    #[error("{dir}: holds {found:?} but no manifest.json; a new cache needs an empty folder{hint}",
            dir = dir.display(), hint = what_it_is(found))]
    ForeignFolder {
        /// The folder asked for.
        dir: PathBuf,
        /// One of the files found there.
        found: String,
    },
    /// A manifest was to be rebuilt where no shard says that it is of this cache.
    #[error("{dir}: no manifest.json, and no shard in it (such as {found:?}) states the description of this cache, {expected}; \
             nothing is written over what may be somebody's files: give another folder", dir = dir.display())]
    ForeignShards {
        /// The folder asked for.
        dir: PathBuf,
        /// One of the files found there.
        found: String,
        /// The digest of this run's description.
        expected: String,
    },
    /// Stored bytes are not what was written.
    #[error("{file}{place}: expected {expected}, found {found}; the cache is damaged",
            file = dir.join(file).display(), place = place(*row_group, *row))]
    Damaged {
        /// The cache's folder.
        dir: Box<Path>,
        /// The file, relative to the cache's folder.
        file: String,
        /// Row group of the file (0-based), where one is to blame.
        row_group: Option<u64>,
        /// Row of the cache (0-based), where one is to blame.
        row: Option<u64>,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// The cache was written by a later version of this program.
    #[error("{file}: format version {found}, but this program knows versions up to {known}; use a newer program", file = file.display())]
    NewerFormat {
        /// The manifest.
        file: PathBuf,
        /// The version it names.
        found: u64,
        /// The newest version known here.
        known: u32,
    },
    /// The cache was begun by an earlier version of this program.
    #[error("{dir}: begun in format version {found}, which this program reads but does not continue (it writes {known}); \
             repack what is there, or give another folder", dir = dir.display())]
    OlderFormat {
        /// The cache's folder.
        dir: PathBuf,
        /// The version of the cache.
        found: u32,
        /// The version that is written here.
        known: u32,
    },
    /// The folder holds a cache made from something else.
    #[error("{dir}: holds a cache made from something else ({differences}); give it another folder, or use what it was made from",
            dir = dir.display(), differences = join(differences))]
    Mismatch {
        /// The cache's folder.
        dir: PathBuf,
        /// Every field that differs.
        differences: Vec<Difference>,
    },
    /// Another process writes this cache.
    #[error("{dir}: another process is writing this cache; wait for it or stop it", dir = dir.display())]
    Locked {
        /// The cache's folder.
        dir: PathBuf,
    },
    /// A setting out of its range.
    #[error("{name} = {found}: expected {expected}")]
    Setting {
        /// The setting's name.
        name: &'static str,
        /// What was given.
        found: String,
        /// What is allowed.
        expected: String,
    },
    /// A record that no cache may hold.
    #[error("row {row} (seq_id {seq_id}): expected {expected}, found {found}")]
    BadRecord {
        /// The row it would have become (0-based).
        row: u64,
        /// The record's own number.
        seq_id: u64,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// The rows appended are not as many as were announced.
    #[error("{dir}: expected {expected} rows in the finished cache, found {found}", dir = dir.display())]
    RowCount {
        /// The cache's folder.
        dir: PathBuf,
        /// Rows announced by the description.
        expected: u64,
        /// Rows appended.
        found: u64,
    },
    /// An earlier append failed; the open shard is lost and the writer must be opened again.
    #[error("{dir}: writing failed before; open the cache again to continue after its last whole shard", dir = dir.display())]
    WriterFailed {
        /// The cache's folder.
        dir: PathBuf,
    },
    /// Something would have to be known that a cache does not hold.
    #[error(
        "{what}: the cache has {has}, which cannot become {asked} without the teacher; ask for less than it has, or precompute again"
    )]
    Raise {
        /// What would be raised.
        what: &'static str,
        /// What the cache has.
        has: String,
        /// What was asked for.
        asked: String,
    },
    /// Rows are missing that no way of joining can supply.
    #[error("{dir}: {missing}; {advice}", dir = dir.display())]
    Incomplete {
        /// The cache's folder.
        dir: PathBuf,
        /// Which rows or parts are missing.
        missing: String,
        /// What to do.
        advice: &'static str,
    },
    /// Caches that cannot become one, for they were not made alike.
    #[error("{second}: cannot be combined with {first}: {differences}", first = first.display(), second = second.display(),
            differences = both(differences))]
    Unlike {
        /// The cache given first.
        first: PathBuf,
        /// The other cache.
        second: PathBuf,
        /// Every field that differs; `cache` is the first's value, `here` the other's.
        differences: Vec<Difference>,
    },
    /// Two caches of the same data hold one row with different distributions, or one number for two conversations.
    #[error("{second}: row {second_row} (seq_id {seq_id}, key {key}) has other {what} than row {first_row} of {first}; \
             they do not come from the same teacher and data", first = first.display(), second = second.display())]
    Conflict {
        /// The cache given first.
        first: PathBuf,
        /// Its row.
        first_row: u64,
        /// The other cache.
        second: PathBuf,
        /// Its row.
        second_row: u64,
        /// Number of the conversation in the second cache's data.
        seq_id: u64,
        /// Key of the second cache's row.
        key: String,
        /// What differs: tokens or targets.
        what: &'static str,
    },
    /// A list of repairs that cannot be used as it is.
    #[error("{list}: {place}: expected {expected}, found {found}", list = list.display())]
    RepairList {
        /// The list.
        list: PathBuf,
        /// Which part of it.
        place: String,
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// A list of repairs made for another cache.
    #[error("{list}: made for the cache with description {found}, but these settings make {expected}; \
             run verify --repair-list on this cache, or repair with the settings it was made with", list = list.display())]
    OtherCache {
        /// The list.
        list: PathBuf,
        /// The digest of this run's description.
        expected: String,
        /// The digest in the list.
        found: String,
    },
    /// A row is not that of the tokens at hand.
    #[error("{dir}: row {row}: {what}", dir = dir.display())]
    Misaligned {
        /// The cache's folder.
        dir: PathBuf,
        /// The row (0-based).
        row: u64,
        /// What is wrong.
        what: Box<Misalignment>,
    },
    /// A row number beyond the end.
    #[error("row {row}: the cache has {rows} rows, numbered from 0")]
    NoRow {
        /// The row asked for.
        row: u64,
        /// Rows there are.
        rows: u64,
    },
    /// Text that is no row key.
    #[error("{text:?} is not a row key: expected 32 hexadecimal digits")]
    BadKey {
        /// The text.
        text: String,
    },
    /// A companion file that the cache does not list.
    #[error("{dir}: this cache has no companion file {path:?}", dir = dir.display())]
    NoCompanion {
        /// The cache's folder.
        dir: PathBuf,
        /// The path asked for.
        path: String,
    },
}

impl Error {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        match self {
            Error::Io { .. } | Error::Parquet { .. } | Error::NoFolder { .. } | Error::NoManifest { .. } => ErrorClass::Runtime,
            Error::BadRecord { .. } | Error::RowCount { .. } | Error::WriterFailed { .. } => ErrorClass::Runtime,
            Error::NoCompanion { .. } | Error::RepairList { .. } => ErrorClass::Runtime,
            Error::ForeignFolder { .. }
            | Error::OnlyParts { .. }
            | Error::ForeignShards { .. }
            | Error::Raise { .. }
            | Error::Incomplete { .. }
            | Error::Setting { .. }
            | Error::NoRow { .. }
            | Error::BadKey { .. } => ErrorClass::Usage,
            Error::Damaged { .. } => ErrorClass::Integrity,
            Error::Locked { .. } => ErrorClass::Locked,
            Error::Conflict { .. } | Error::OtherCache { .. } | Error::Unlike { .. } => ErrorClass::Mismatch,
            Error::Mismatch { .. } | Error::Misaligned { .. } | Error::NewerFormat { .. } | Error::OlderFormat { .. } => {
                ErrorClass::Mismatch
            }
        }
    }

    /// Wraps a system error with the path it is about.
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { path, source }
    }
}

/// One field in which two descriptions differ.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Difference {
    /// Dotted path of the field, e.g. `teacher.weights_blake3`.
    pub field: String,
    /// The cache's value.
    pub cache: String,
    /// The value at hand.
    pub here: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: the cache has {}, here it is {}", self.field, self.cache, self.here)
    }
}

/// A rule broken by a record or a row, before it is known whose row it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Flaw {
    pub(crate) expected: String,
    pub(crate) found: String,
}

impl Flaw {
    pub(crate) fn new(expected: impl Into<String>, found: impl ToString) -> Self {
        Self { expected: expected.into(), found: found.to_string() }
    }

    /// This flaw as damage at a place of a file.
    pub(crate) fn damage(self, place: &Place, row_group: Option<u64>, row: Option<u64>) -> Error {
        let Place { dir, file } = place.clone();
        Error::Damaged { dir, file, row_group, row, expected: self.expected, found: self.found }
    }
}

/// What to do where the folder is that of a cache without its manifest, or of parts.
fn what_it_is(found: &str) -> &'static str {
    if crate::WorkerFolder::from_name(found).is_some() {
        return "; it is a folder of workers' parts: give --worker too, or another folder";
    }
    match found.starts_with("shard-") && found.ends_with(".parquet") {
        true => "; if it is a cache that lost its manifest: `verify --repair-list FILE`, then `precompute --repair FILE`",
        false => "",
    }
}

/// A file of a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The cache's folder.
    pub(crate) dir: Box<Path>,
    /// The file, relative to it.
    pub(crate) file: String,
}

impl Place {
    pub(crate) fn new(dir: &Path, file: &str) -> Self {
        Self { dir: dir.into(), file: file.to_string() }
    }
}

fn place(row_group: Option<u64>, row: Option<u64>) -> String {
    let group = row_group.map(|g| format!(", row group {g}")).unwrap_or_default();
    let row = row.map(|r| format!(", row {r}")).unwrap_or_default();
    group + &row
}

fn both(differences: &[Difference]) -> String {
    let said = |d: &Difference| format!("{} is {} there and {} here", d.field, d.cache, d.here);
    differences.iter().map(said).collect::<Vec<_>>().join("; ")
}

fn join(differences: &[Difference]) -> String {
    differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
