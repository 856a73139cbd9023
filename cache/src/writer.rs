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
//! A shard that takes long is made durable piece by piece ([`CacheWriter::seal`]): pieces are shards of few rows under names of
//! their own, named by the manifest, and joined when the shard is full. So the bytes depend on the description and the records
//! alone, not on the clock, and a resumed run ends equal to one never interrupted.

mod companion;
mod folder;
mod mend;

pub use companion::Companion;
pub(crate) use companion::entries as companion_entries;
pub(crate) use folder::{LOCK_FILE, is_named, names, part_of, stale};
pub(crate) use mend::{MendedShard, compare};

use crate::error::{Flaw, Place};
use crate::manifest::{FORMAT_VERSION, Manifest, ShardCodec, ShardEntry};
use crate::reader::Opener;
use crate::rules::{Form, Rules};
use crate::shard::write::ShardWriter;
use crate::shard::{file_name, footer, part_name};
use crate::{Description, Error, Record, Result, RowKey, codec, durable, reader};
use rayon::prelude::*;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

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
    _lock: durable::Lock,
}

/// The shard, or the piece of one, under way.
struct OpenShard {
    writer: ShardWriter,
    tmp: PathBuf,
    entry: ShardEntry,
    /// The rows' codec errors, summed.
    kl_sum: f64,
    since: Instant,
}

impl CacheWriter {
    /// Creates the cache in `dir`, or continues the one there after its last durable row.
    ///
    /// Errors: another writer has it (`Locked`), it was made from something else (`Mismatch`) or in an older format, the folder
    /// holds other files (`ForeignFolder`), a setting is out of range, what is there is damaged, or I/O.
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
                if manifest.format_version != FORMAT_VERSION && !manifest.complete {
                    let (found, known) = (manifest.format_version, FORMAT_VERSION);
                    return Err(Error::OlderFormat { dir: dir.to_path_buf(), found, known });
                }
                companion::store(dir, &options.companions)?;
                manifest
            }
        };
        folder::clean(dir, &manifest)?;
        let rules = Rules::of(description, manifest.format_version);
        let last_seq_id = last_seq_id(dir, &manifest)?;
        let mut writer = Self { dir: dir.into(), rules, manifest, open: None, last_seq_id, failed: false, _lock: lock };
        writer.join_full()?;
        Ok(writer)
    }

    /// Rows that are durable. Append from this one on.
    pub fn committed_rows(&self) -> u64 {
        self.manifest.rows() + self.manifest.part_rows()
    }

    /// Rows appended so far, those of the open shard included.
    pub fn rows(&self) -> u64 {
        self.committed_rows() + self.open.as_ref().map_or(0, |open| open.entry.rows)
    }

    /// Keys of the committed rows in order, with which a caller proves that they are its first rows. Checks the files' BLAKE3.
    pub fn committed_keys(&self) -> Result<Vec<RowKey>> {
        let (mut keys, opener) = (Vec::new(), Opener::of(&self.dir, &self.manifest)?);
        for entry in self.manifest.shards.iter().chain(&self.manifest.parts) {
            check_digest(&self.dir, entry)?;
            keys.extend(opener.open(entry)?.keys()?);
        }
        Ok(keys)
    }

    /// The cache's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The manifest as it is on disk.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Adds one row: log-probabilities and tails unrounded, entries by falling log-probability, ties by rising id.
    ///
    /// A record that breaks a rule is refused with `BadRecord` and changes nothing. After any other error the writer is spent.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        self.extend(std::slice::from_ref(record))
    }

    /// Adds rows as [`append`](Self::append) does, checking and rounding them in parallel. Of a bad record and those after it
    /// nothing is added.
    pub fn extend(&mut self, records: &[Record]) -> Result<()> {
        self.add(records, Rules::encode)
    }

    /// Adds rows that come out of a cache, narrowed already to this one's selection.
    pub(crate) fn extend_stored(&mut self, records: &[Record]) -> Result<()> {
        self.add(records, |rules, record| {
            let stored = codec::encode(record, &rules.storage);
            rules.check(&stored, Form::Stored).map(|()| stored)
        })
    }

    /// Makes the rows appended so far durable when `interval` has passed since the last time rows became durable. Gives whether
    /// it did.
    pub fn seal_after(&mut self, interval: Duration) -> Result<bool> {
        match &self.open {
            Some(open) if open.since.elapsed() >= interval => self.seal().map(|()| true),
            _ => Ok(false),
        }
    }

    /// Makes the rows appended so far durable, as a piece of the shard under way.
    pub fn seal(&mut self) -> Result<()> {
        if self.failed {
            return Err(Error::WriterFailed { dir: self.dir.clone() });
        }
        let Some(open) = self.open.take() else { return Ok(()) };
        let sealed = self.publish_part(open);
        self.failed |= sealed.is_err();
        sealed
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
            let open = self.open.take();
            self.publish_shard(open)?;
            self.manifest.complete = true;
            self.save_and_remove_parts()?;
        }
        Ok(self.manifest)
    }

    fn add(
        &mut self,
        records: &[Record],
        stored: impl Fn(&Rules, &Record) -> std::result::Result<Record, Flaw> + Sync,
    ) -> Result<()> {
        if self.failed {
            return Err(Error::WriterFailed { dir: self.dir.clone() });
        }
        let rules = &self.rules;
        let stored: Vec<_> = records.par_iter().map(|record| stored(rules, record)).collect();
        for (record, stored) in records.iter().zip(stored) {
            let (row, expected) = (self.rows(), self.manifest.description.expected_rows);
            if row >= expected {
                return Err(Error::RowCount { dir: self.dir.clone(), expected, found: row + 1 });
            }
            let stored = stored.and_then(|stored| check_seq_id(self.last_seq_id, record).map(|()| stored));
            let stored = stored.map_err(|flaw| Error::BadRecord {
                row,
                seq_id: record.seq_id,
                expected: flaw.expected,
                found: flaw.found,
            })?;
            let written = self.write(stored);
            self.failed = written.is_err();
            self.last_seq_id = Some(record.seq_id);
            written?;
        }
        Ok(())
    }

    fn write(&mut self, record: Record) -> Result<()> {
        let mut open = match self.open.take() {
            Some(open) => open,
            None => self.start()?,
        };
        open.count(&record);
        open.writer.append(record)?;
        if self.manifest.part_rows() + open.entry.rows < u64::from(self.manifest.description.rows_per_shard) {
            self.open = Some(open);
            return Ok(());
        }
        self.publish_shard(Some(open))?;
        self.save_and_remove_parts()
    }

    /// Begins the shard under way, or its next piece.
    fn start(&self) -> Result<OpenShard> {
        let shards = self.manifest.shards.len();
        let file = match self.manifest.parts.len() {
            0 => file_name(shards),
            parts => part_name(shards, parts),
        };
        self.start_file(file, self.committed_rows())
    }

    fn start_file(&self, file: String, first_row: u64) -> Result<OpenShard> {
        let tmp = durable::tmp_of(&self.dir.join(&file));
        let description = &self.manifest.description;
        let footer = footer::entries(description, FORMAT_VERSION, first_row);
        let writer = ShardWriter::create(&tmp, &footer, description.zstd_level, &self.rules.layout)?;
        let codec = Some(ShardCodec::default());
        let entry = ShardEntry { file, first_row, rows: 0, tokens: 0, scored: 0, bytes: 0, blake3: String::new(), codec };
        Ok(OpenShard { writer, tmp, entry, kl_sum: 0.0, since: Instant::now() })
    }

    /// Closes a piece and names it in the manifest.
    fn publish_part(&mut self, open: OpenShard) -> Result<()> {
        let name = part_name(self.manifest.shards.len(), self.manifest.parts.len());
        let mut entry = self.publish(open, name)?;
        entry.first_row = self.committed_rows();
        self.manifest.parts.push(entry);
        self.manifest.save(&self.dir)
    }

    /// Closes the shard under way, joins its pieces if there are any, and adds it to the manifest in memory.
    fn publish_shard(&mut self, open: Option<OpenShard>) -> Result<()> {
        let name = file_name(self.manifest.shards.len());
        let whole = match (open, self.manifest.parts.is_empty()) {
            (None, true) => return Ok(()),
            (Some(open), true) => open,
            (open, false) => {
                if let Some(open) = open {
                    self.publish_part(open)?;
                }
                self.join(&name)?
            }
        };
        let entry = self.publish(whole, name)?;
        self.manifest.shards.push(entry);
        Ok(())
    }

    /// Makes the shard of pieces that hold all of its rows: a run may have stopped between the last piece and the joining, and the
    /// next row belongs to another shard.
    fn join_full(&mut self) -> Result<()> {
        if self.manifest.part_rows() < u64::from(self.manifest.description.rows_per_shard) {
            return Ok(());
        }
        self.publish_shard(None)?;
        self.save_and_remove_parts()
    }

    /// The rows of all pieces, written again as one shard: the very bytes of a shard that was never cut.
    fn join(&self, name: &str) -> Result<OpenShard> {
        let mut whole = self.start_file(name.into(), self.manifest.rows())?;
        let opener = Opener::of(&self.dir, &self.manifest)?;
        for part in &self.manifest.parts {
            let shard = opener.open(part)?;
            for row in 0..shard.rows() {
                let record = shard.row(row)?;
                whole.count(&record);
                whole.writer.append(record)?;
            }
        }
        Ok(whole)
    }

    /// Closes, checks and renames a file.
    fn publish(&self, open: OpenShard, name: String) -> Result<ShardEntry> {
        let (tmp, entry) = self.close(open, name)?;
        durable::publish(&tmp, &self.dir.join(&entry.file))?;
        Ok(entry)
    }

    /// Closes a file and checks every row of it. Gives where it is, and what the manifest is to say of it under its name.
    fn close(&self, open: OpenShard, name: String) -> Result<(PathBuf, ShardEntry)> {
        let OpenShard { writer, tmp, mut entry, .. } = open;
        let written = writer.close()?;
        (entry.file, entry.bytes, entry.blake3) = (name, written.bytes, written.blake3);
        let shard = Opener::of(&self.dir, &self.manifest)?.open_at(&tmp, &entry)?;
        (0..entry.rows).into_par_iter().try_for_each(|row| shard.row(row).map(|_| ()))?;
        Ok((tmp, entry))
    }

    /// Saves the manifest, which names the whole shard now, and removes its pieces.
    fn save_and_remove_parts(&mut self) -> Result<()> {
        let parts = std::mem::take(&mut self.manifest.parts);
        self.manifest.save(&self.dir)?;
        parts.iter().try_for_each(|part| durable::remove(&self.dir.join(&part.file)))
    }
}

impl std::fmt::Debug for OpenShard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenShard").field("tmp", &self.tmp).field("entry", &self.entry).finish_non_exhaustive()
    }
}

impl OpenShard {
    /// Adds a stored record to what the manifest will say of its shard.
    fn count(&mut self, record: &Record) {
        count(&mut self.entry, &mut self.kl_sum, record);
    }
}

/// Adds a stored record to what the manifest will say of its shard; `kl_sum` is the sum of its rows' codec errors.
pub(crate) fn count(entry: &mut ShardEntry, kl_sum: &mut f64, record: &Record) {
    entry.rows += 1;
    entry.tokens += record.input_ids.len() as u64;
    entry.scored += record.positions.len() as u64;
    *kl_sum += f64::from(record.codec.kl_sum);
    let kl_max = entry.codec.map_or(0.0, |codec| codec.kl_max).max(record.codec.kl_max);
    // Rows that were rewritten from version 1 do not know what storing them cost; then nothing is known of the shard either.
    entry.codec = (!kl_sum.is_nan()).then_some(ShardCodec { kl_sum: *kl_sum as f32, kl_max });
}

/// Numbers of the data rise from row to row.
fn check_seq_id(last: Option<u64>, record: &Record) -> std::result::Result<(), Flaw> {
    match last {
        Some(last) if record.seq_id <= last => {
            Err(Flaw::new(format!("a seq_id above {last}, that of the row before"), record.seq_id))
        }
        _ => Ok(()),
    }
}

/// BLAKE3 (hex) of a file's bytes.
pub(crate) fn digest_of(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    // Read, not mapped: a file that shrinks meanwhile is an error and not the end of the process.
    let file = durable::call(|| File::open(path)).map_err(Error::io(path))?;
    hasher.update_reader(file).map_err(Error::io(path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Compares a file with the BLAKE3 that the manifest states.
pub(crate) fn check_digest(dir: &Path, entry: &ShardEntry) -> Result<()> {
    let found = match digest_of(&dir.join(&entry.file)) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Err(Flaw::new("this shard", "no such file").damage(&Place::new(dir, &entry.file), None, None));
        }
        found => found?,
    };
    match found {
        found if found != entry.blake3 => {
            let flaw = Flaw::new(format!("contents with BLAKE3 {}", entry.blake3), format!("contents with {found}"));
            Err(flaw.damage(&Place::new(dir, &entry.file), None, None))
        }
        _ => Ok(()),
    }
}

fn last_seq_id(dir: &Path, manifest: &Manifest) -> Result<Option<u64>> {
    let Some(entry) = manifest.parts.last().or(manifest.shards.last()) else { return Ok(None) };
    let shard = reader::open_entry(dir, manifest, entry)?;
    shard.row(shard.rows().saturating_sub(1)).map(|record| Some(record.seq_id))
}
