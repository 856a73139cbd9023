//! Filling a cache: append records, roll shards, resume, finish. It refuses a record that breaks a rule, a folder that holds
//! something else, and a second writer.
//!
//! The one idea is the order of events. A shard exists for others only after each step before it is durable:
//!
//! ```text
//! shard-00042.parquet.tmp ─ write, close, sync ─ reopen, check every row ─ rename, sync folder ─ manifest names it, sync
//!             a kill up to here loses this shard only ──┘                                 └── from here on it is kept
//! ```
//!
//! The bytes depend on the description and the records alone, so a resumed run ends equal to one never interrupted.

mod companion;
mod folder;

pub use companion::Companion;
pub(crate) use folder::{LOCK_FILE, names};

use crate::error::Flaw;
use crate::manifest::{Manifest, ShardEntry};
use crate::rules::{Form, Rules};
use crate::shard::read::{Expected, Shard};
use crate::shard::write::ShardWriter;
use crate::shard::{file_name, footer};
use crate::{Description, Error, Record, Result, RowKey, codec, durable, reader};
use rayon::prelude::*;
use std::fs::File;
use std::path::{Path, PathBuf};

/// What a cache holds beside its rows.
#[derive(Debug, Clone, Default)]
pub struct WriterOptions {
    /// Small files stored in the cache's folder and listed in its manifest, such as the tokenizer.
    pub companions: Vec<Companion>,
}

/// The only writer of one cache; holds its lock until dropped. Dropped without [`finish`](Self::finish) it leaves a partial
/// cache that can be opened again.
#[derive(Debug)]
pub struct CacheWriter {
    dir: PathBuf,
    manifest: Manifest,
    rules: Rules,
    open: Option<OpenShard>,
    last_seq_id: Option<u64>,
    failed: bool,
    _lock: File,
}

/// The shard under way.
struct OpenShard {
    writer: ShardWriter,
    tmp: PathBuf,
    entry: ShardEntry,
}

impl CacheWriter {
    /// Creates the cache in `dir`, or continues the one there after its last whole shard.
    ///
    /// Errors: another writer has it (`Locked`), it was made from something else (`Mismatch`), the folder holds other files
    /// (`ForeignFolder`), a setting is out of range, what is there is damaged, or I/O.
    pub fn open(dir: &Path, description: &Description, options: WriterOptions) -> Result<Self> {
        description.validate()?;
        let companions = companion::entries(&options.companions)?;
        folder::prepare(dir, &options.companions)?;
        let lock = durable::lock(dir, &dir.join(LOCK_FILE))?;
        let manifest = match Manifest::load(dir) {
            Err(Error::NoManifest { .. }) => {
                companion::store(dir, &options.companions)?;
                let manifest = Manifest::new(description.clone(), companions);
                manifest.save(dir)?;
                manifest
            }
            found => {
                let manifest = found?;
                folder::compare(dir, &manifest, description, &companions)?;
                companion::store(dir, &options.companions)?;
                manifest
            }
        };
        folder::clean(dir, &manifest)?;
        let last_seq_id = last_seq_id(dir, &manifest)?;
        Ok(Self { dir: dir.into(), rules: Rules::of(description), manifest, open: None, last_seq_id, failed: false, _lock: lock })
    }

    /// Rows in durable shards. Append from this one on.
    pub fn committed_rows(&self) -> u64 {
        self.manifest.rows()
    }

    /// Rows appended so far, those of the open shard included.
    pub fn rows(&self) -> u64 {
        self.committed_rows() + self.open.as_ref().map_or(0, |open| open.entry.rows)
    }

    /// Keys of the committed rows in order, with which a caller proves that they are its first rows. Checks the shards' BLAKE3.
    pub fn committed_keys(&self) -> Result<Vec<RowKey>> {
        let mut keys = Vec::new();
        for (index, entry) in self.manifest.shards.iter().enumerate() {
            check_digest(&self.dir.join(&entry.file), &entry.file, &entry.blake3)?;
            keys.extend(reader::open_shard(&self.dir, &self.manifest, index)?.keys()?);
        }
        Ok(keys)
    }

    /// The manifest as it is on disk.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Adds one row: log-probabilities and tails unrounded, entries by falling log-probability, ties by rising id.
    ///
    /// A record that breaks a rule is refused with `BadRecord` and changes nothing. After any other error the writer is spent.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        if self.failed {
            return Err(Error::WriterFailed { dir: self.dir.clone() });
        }
        let (row, expected) = (self.rows(), self.manifest.description.expected_rows);
        if row >= expected {
            return Err(Error::RowCount { dir: self.dir.clone(), expected, found: row + 1 });
        }
        let stored = self.checked(record).map_err(|flaw| Error::BadRecord {
            row,
            seq_id: record.seq_id,
            expected: flaw.expected,
            found: flaw.found,
        })?;
        let written = self.write(&stored);
        self.failed = written.is_err();
        self.last_seq_id = Some(record.seq_id);
        written
    }

    /// Closes the last shard and marks the cache complete. Of a complete cache it only gives the manifest.
    ///
    /// Errors: `RowCount` when more or fewer rows were appended than the description announces; I/O.
    pub fn finish(mut self) -> Result<Manifest> {
        let expected = self.manifest.description.expected_rows;
        if self.failed {
            return Err(Error::WriterFailed { dir: self.dir.clone() });
        }
        if self.rows() != expected {
            return Err(Error::RowCount { dir: self.dir.clone(), expected, found: self.rows() });
        }
        if !self.manifest.complete {
            if let Some(open) = self.open.take() {
                self.publish(open)?;
            }
            self.manifest.complete = true;
            self.manifest.save(&self.dir)?;
        }
        Ok(self.manifest)
    }

    /// The record in stored form, proven to be one that every reader accepts.
    fn checked(&self, record: &Record) -> std::result::Result<Record, Flaw> {
        if let Some(last) = self.last_seq_id
            && record.seq_id <= last
        {
            return Err(Flaw::new(format!("a seq_id above {last}, that of the row before"), record.seq_id));
        }
        self.rules.check(record, Form::Given)?;
        let stored = codec::encode(record, self.rules.mantissa_bits);
        self.rules.check(&stored, Form::Stored).map(|()| stored)
    }

    fn write(&mut self, record: &Record) -> Result<()> {
        let mut open = match self.open.take() {
            Some(open) => open,
            None => self.start()?,
        };
        open.writer.append(record)?;
        open.entry.rows += 1;
        open.entry.tokens += record.input_ids.len() as u64;
        open.entry.scored += record.positions.len() as u64;
        if open.entry.rows < u64::from(self.manifest.description.rows_per_shard) {
            self.open = Some(open);
            return Ok(());
        }
        self.publish(open)?;
        self.manifest.save(&self.dir)
    }

    fn start(&self) -> Result<OpenShard> {
        let (file, first_row) = (file_name(self.manifest.shards.len()), self.manifest.rows());
        let tmp = durable::tmp_of(&self.dir.join(&file));
        let description = &self.manifest.description;
        let footer = footer::entries(description, first_row);
        let writer = ShardWriter::create(&tmp, &footer, description.zstd_level, self.rules.k)?;
        let entry = ShardEntry { file, first_row, rows: 0, tokens: 0, scored: 0, bytes: 0, blake3: String::new() };
        Ok(OpenShard { writer, tmp, entry })
    }

    /// Closes, checks and renames a shard and adds it to the manifest in memory.
    fn publish(&mut self, open: OpenShard) -> Result<()> {
        let OpenShard { writer, tmp, mut entry } = open;
        writer.close()?;
        entry.bytes = self.check_written(&tmp, &entry)?;
        entry.blake3 = digest_of(&tmp)?;
        durable::publish(&tmp, &self.dir.join(&entry.file))?;
        self.manifest.shards.push(entry);
        Ok(())
    }

    /// Reads back every row of a shard that was just written; gives its size.
    fn check_written(&self, tmp: &Path, entry: &ShardEntry) -> Result<u64> {
        let footer = footer::entries(&self.manifest.description, entry.first_row);
        let expected = Expected { file: &entry.file, first_row: entry.first_row, rows: entry.rows, bytes: None, footer };
        let shard = Shard::open(tmp, expected, self.rules.clone())?;
        (0..entry.rows).into_par_iter().try_for_each(|row| shard.row(row).map(|_| ()))?;
        Ok(shard.bytes())
    }
}

impl std::fmt::Debug for OpenShard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenShard").field("tmp", &self.tmp).field("entry", &self.entry).finish_non_exhaustive()
    }
}

/// BLAKE3 (hex) of a file's bytes.
pub(crate) fn digest_of(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_mmap_rayon(path).map_err(Error::io(path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

pub(crate) fn check_digest(path: &Path, file: &str, expected: &str) -> Result<()> {
    match digest_of(path)? {
        found if found != expected => {
            Err(Flaw::new(format!("contents with BLAKE3 {expected}"), format!("contents with {found}")).damage(file, None, None))
        }
        _ => Ok(()),
    }
}

fn last_seq_id(dir: &Path, manifest: &Manifest) -> Result<Option<u64>> {
    let Some(index) = manifest.shards.len().checked_sub(1) else { return Ok(None) };
    let shard = reader::open_shard(dir, manifest, index)?;
    shard.row(shard.rows().saturating_sub(1)).map(|record| Some(record.seq_id))
}
