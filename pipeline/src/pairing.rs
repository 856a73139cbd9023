//! A cache and a student that goes with it. Refuses pairs whose numbers would mean nothing: ids of another tokenizer, a vocabulary or a
//! context that is too small, a cache that is not finished.

use crate::Result;
use crate::data::ChatTokenizer;
use crate::model::config::ModelConfig;
use potstill_cache::{Cache, ErrorClass};
use std::path::{Path, PathBuf};

/// Ways a cache and a student can be unfit for each other.
#[derive(Debug, thiserror::Error)]
pub enum PairingError {
    /// A cache whose writing was not finished.
    #[error("{cache}: holds {rows} of {expected} rows; finish it with the precompute command that began it", cache = cache.display())]
    Incomplete {
        /// The cache.
        cache: PathBuf,
        /// Rows there.
        rows: u64,
        /// Rows it will hold.
        expected: u64,
    },
    /// A cache without rows.
    #[error("{cache}: holds no rows, so there is nothing to compare a student with", cache = cache.display())]
    Empty {
        /// The cache.
        cache: PathBuf,
    },
    /// A student whose ids mean other tokens than the cache's.
    #[error(
        "{student}: its tokenizer is not the one that cache {cache} was made with: expected {expected}, found {found}",
        student = student.display(), cache = cache.display()
    )]
    OtherTokenizer {
        /// The student's folder.
        student: PathBuf,
        /// The cache.
        cache: PathBuf,
        /// The cache's tokenizer.
        expected: String,
        /// The student's.
        found: String,
    },
    /// A student with fewer ids than the cache's tokenizer.
    #[error(
        "{student}: its vocabulary is too small for cache {cache}: expected at least {expected} ids, found {found}",
        student = student.display(), cache = cache.display()
    )]
    Narrow {
        /// The student's folder.
        student: PathBuf,
        /// The cache.
        cache: PathBuf,
        /// Ids of the cache.
        expected: u32,
        /// Rows of the student's embedding.
        found: usize,
    },
    /// A student whose context is shorter than the cache's rows may be.
    #[error(
        "{student}: its context is too short for cache {cache}: expected at least {expected} tokens, found {found}",
        student = student.display(), cache = cache.display()
    )]
    Short {
        /// The student's folder.
        student: PathBuf,
        /// The cache.
        cache: PathBuf,
        /// Longest row of the cache.
        expected: u32,
        /// The student's context.
        found: usize,
    },
}

impl PairingError {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        match self {
            PairingError::OtherTokenizer { .. } | PairingError::Narrow { .. } | PairingError::Short { .. } => {
                ErrorClass::Mismatch
            }
            PairingError::Incomplete { .. } => ErrorClass::Usage,
            PairingError::Empty { .. } => ErrorClass::Runtime,
        }
    }
}

/// Opens the cache and checks that the student of this model folder can be compared with it. Reads config and tokenizer of the folder, no
/// weights.
pub(crate) fn open(student: &Path, cache: &Path) -> Result<Cache> {
    let (student_folder, cache_folder) = (student.to_path_buf(), cache.to_path_buf());
    let cache = Cache::open(cache)?;
    let description = &cache.manifest().description;
    if !cache.is_complete() {
        let (rows, expected) = (cache.len(), description.expected_rows);
        return Err(PairingError::Incomplete { cache: cache_folder, rows, expected }.into());
    }
    if cache.manifest().scored() == 0 {
        return Err(PairingError::Empty { cache: cache_folder }.into());
    }
    let config = ModelConfig::from_folder(student)?;
    let tokenizer = ChatTokenizer::tokenizer_only(student)?;
    let (ours, theirs) = (tokenizer.tokenizer_fingerprint(), &description.tokenizer);
    if ours.vocabulary_blake3 != theirs.vocabulary_blake3 {
        return Err(PairingError::OtherTokenizer {
            student: student_folder,
            cache: cache_folder,
            expected: format!("{} ids, vocabulary {}", theirs.size, theirs.vocabulary_blake3),
            found: format!("{} ids, vocabulary {}", ours.size, ours.vocabulary_blake3),
        }
        .into());
    }
    if config.vocab_size < description.vocab_size as usize {
        let (expected, found) = (description.vocab_size, config.vocab_size);
        return Err(PairingError::Narrow { student: student_folder, cache: cache_folder, expected, found }.into());
    }
    if config.context < description.encoding.max_length as usize {
        let (expected, found) = (description.encoding.max_length, config.context);
        return Err(PairingError::Short { student: student_folder, cache: cache_folder, expected, found }.into());
    }
    Ok(cache)
}
