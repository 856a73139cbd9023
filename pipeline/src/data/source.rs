//! Which files a list of paths means: files, folders (their supported files, by name) and globs (their matches, by name).

use super::DataError;
use potstill_cache::DataFile;
use std::fs::File;
use std::path::{Path, PathBuf};

/// The endings of supported files, for messages.
pub(super) const SUPPORTED: &str = ".jsonl, .json (both also with .gz or .zst) or .parquet";

/// How a file holds rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Container {
    /// One JSON object a line.
    Lines,
    /// One JSON list of objects, or one object a line.
    ListOrLines,
    /// Columns.
    Parquet,
}

/// How a file's bytes are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    /// As they are.
    Plain,
    /// gzip members.
    Gzip,
    /// zstd frames.
    Zstd,
}

/// One file of the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SourceFile {
    /// Where it is.
    pub path: PathBuf,
    /// How it holds rows.
    pub container: Container,
    /// How its bytes are packed.
    pub packing: Packing,
}

impl SourceFile {
    /// By the ending of the name; `None` for another kind of file.
    fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_string_lossy().to_ascii_lowercase();
        let (stem, packing) = match name.rsplit_once('.')? {
            (stem, "zst") => (stem, Packing::Zstd),
            (stem, "gz") => (stem, Packing::Gzip),
            _ => (name.as_str(), Packing::Plain),
        };
        let container = match (stem.rsplit_once('.')?.1, packing) {
            ("jsonl", _) => Container::Lines,
            ("json", _) => Container::ListOrLines,
            ("parquet", Packing::Plain) => Container::Parquet,
            _ => return None,
        };
        Some(Self { path: path.to_path_buf(), container, packing })
    }

    /// Name, size and digest of the bytes.
    pub(super) fn fingerprint(&self) -> Result<DataFile, DataError> {
        let io = |source| DataError::Io { path: self.path.clone(), source };
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open(&self.path).map_err(io)?).map_err(io)?;
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(DataFile { name, bytes: hasher.count(), blake3: hasher.finalize().to_hex().to_string() })
    }
}

/// Whether a file of this name is one of the kinds that are read.
pub(crate) fn holds_chats(name: &str) -> bool {
    SourceFile::of(Path::new(name)).is_some()
}

/// The files that `paths` mean, in reading order.
///
/// Errors: a path that leads nowhere, a folder or glob without a supported file, a file of another kind.
pub(super) fn files(paths: &[PathBuf]) -> Result<Vec<SourceFile>, DataError> {
    let mut files = Vec::new();
    for path in paths {
        if path.is_dir() {
            files.extend(some_files(path, in_folder(path)?)?);
        } else if path.exists() {
            files.push(one_file(path)?);
        } else if path.to_string_lossy().contains(['*', '?', '[']) {
            files.extend(some_files(path, in_glob(path)?)?);
        } else {
            return Err(DataError::NoSuchPath { path: path.clone() });
        }
    }
    Ok(files)
}

fn one_file(path: &Path) -> Result<SourceFile, DataError> {
    let file = SourceFile::of(path).filter(|_| path.is_file());
    file.ok_or_else(|| DataError::UnsupportedFile { path: path.to_path_buf() })
}

fn some_files(path: &Path, files: Vec<SourceFile>) -> Result<Vec<SourceFile>, DataError> {
    if files.is_empty() { Err(DataError::NoFiles { path: path.to_path_buf() }) } else { Ok(files) }
}

/// Files of other kinds are left alone in a folder, hidden ones too; folders in it are not entered.
fn in_folder(folder: &Path) -> Result<Vec<SourceFile>, DataError> {
    let io = |source| DataError::Io { path: folder.to_path_buf(), source };
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths.iter().filter(|path| path.is_file()).filter_map(|path| SourceFile::of(path)).collect())
}

fn in_glob(pattern: &Path) -> Result<Vec<SourceFile>, DataError> {
    let text = pattern.to_string_lossy();
    let matches = glob::glob(&text).map_err(|e| DataError::BadGlob { pattern: text.to_string(), why: e.to_string() })?;
    let mut paths = Vec::new();
    for path in matches {
        paths.push(path.map_err(|e| DataError::Io { path: e.path().to_path_buf(), source: e.into() })?);
    }
    paths.sort();
    Ok(paths.iter().filter(|path| path.is_file()).filter_map(|path| SourceFile::of(path)).collect())
}
