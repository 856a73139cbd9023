//! Opening a cache and reading any row of it. Reading needs no lock: shards never change, and a manifest names only whole ones.

use crate::error::{Flaw, Place};
use crate::manifest::{Manifest, ShardEntry};
use crate::shard::read::{Family, Shard};
use crate::{Error, Record, Result, RowKey};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::OnceLock;

/// An open cache, finished or partial. Cheap to share: every method takes `&self`, and rows may be read from many threads.
pub struct Cache {
    dir: PathBuf,
    manifest: Manifest,
    shards: Vec<Shard>,
    /// Every row by its key, rising, then by its number: 24 bytes a row, made when somebody first asks.
    by_key: OnceLock<Box<[(RowKey, u64)]>>,
}

impl Cache {
    /// Reads the manifest, maps every shard and checks its size, columns and footer. Rows are checked when they are read.
    ///
    /// Errors: no such folder, no manifest, a damaged manifest or shard, a newer format version.
    pub fn open(dir: &Path) -> Result<Self> {
        let manifest = Manifest::load(dir)?;
        let opener = Opener::of(dir, &manifest)?;
        let shards = manifest.shards.iter().map(|entry| opener.open(entry)).collect::<Result<Vec<_>>>()?;
        Ok(Self { dir: dir.to_path_buf(), manifest, shards, by_key: OnceLock::new() })
    }

    /// Rows in the cache.
    pub fn len(&self) -> u64 {
        self.manifest.rows()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether all expected rows are there.
    pub fn is_complete(&self) -> bool {
        self.manifest.complete
    }

    /// What the cache is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The cache's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Row `row` (0-based). Checksum, key, alignment and all rules of the format are checked on every read.
    pub fn row(&self, row: u64) -> Result<Record> {
        let (shard, within) = self.locate(row)?;
        shard.row(within)
    }

    /// Asks the system to fetch the pages of row `row`, without waiting. A row that is not there is passed over.
    pub fn will_need(&self, row: u64) {
        if let Ok((shard, within)) = self.locate(row) {
            shard.will_need(within);
        }
    }

    /// Bytes that a read of row `row` fetches, once the single values of its row group are known; 0 for a row that is not there.
    pub fn row_bytes(&self, row: u64) -> u64 {
        self.locate(row).map_or(0, |(shard, within)| shard.row_bytes(within))
    }

    /// The same row through the Arrow reader: several times slower, and an independent witness of what [`row`](Self::row) decodes.
    pub fn row_by_arrow(&self, row: u64) -> Result<Record> {
        let (shard, within) = self.locate(row)?;
        shard.row_by_arrow(within)
    }

    /// Key of row `row`, checked like the row itself.
    pub fn key(&self, row: u64) -> Result<RowKey> {
        self.row(row).map(|record| record.key())
    }

    /// The first row with this key. The first call reads the key column of every shard; each call reads the row found.
    pub fn find(&self, key: &RowKey) -> Result<Option<u64>> {
        let rows = self.by_key()?;
        let first = rows.partition_point(|(other, _)| other < key);
        match rows.get(first) {
            // A key column says nothing about damage; the row does.
            Some(&(found, row)) if found == *key => self.row(row).map(|_| Some(row)),
            _ => Ok(None),
        }
    }

    /// Every row by its key, rising, then by its number.
    pub(crate) fn by_key(&self) -> Result<&[(RowKey, u64)]> {
        if let Some(rows) = self.by_key.get() {
            return Ok(rows);
        }
        let mut rows = Vec::new();
        for shard in &self.shards {
            rows.extend(shard.keys()?.into_iter().zip(rows.len() as u64..));
        }
        rows.sort_unstable();
        Ok(self.by_key.get_or_init(|| rows.into_boxed_slice()))
    }

    /// A companion file's bytes, checked against the manifest.
    pub fn companion(&self, path: &str) -> Result<Vec<u8>> {
        read_companion(&self.dir, &self.manifest, path)
    }

    pub(crate) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    fn locate(&self, row: u64) -> Result<(&Shard, u64)> {
        let entries = &self.manifest.shards;
        let index = entries.partition_point(|entry| entry.first_row <= row).checked_sub(1);
        let found = index.and_then(|i| Some((entries.get(i)?, self.shards.get(i)?)));
        match found {
            Some((entry, shard)) if row - entry.first_row < entry.rows => Ok((shard, row - entry.first_row)),
            _ => Err(Error::NoRow { row, rows: self.len() }),
        }
    }
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("dir", &self.dir).field("rows", &self.len()).finish_non_exhaustive()
    }
}

/// What the shards of one cache have in common, worked out once.
pub(crate) struct Opener {
    dir: PathBuf,
    family: Arc<Family>,
}

impl Opener {
    pub(crate) fn of(dir: &Path, manifest: &Manifest) -> Result<Self> {
        let family = Family::of(&manifest.description, manifest.format_version);
        let family = family.map_err(|source| Error::Parquet { path: dir.to_path_buf(), source })?;
        Ok(Self { dir: dir.to_path_buf(), family: Arc::new(family) })
    }

    /// Opens a shard, or a piece of one.
    pub(crate) fn open(&self, entry: &ShardEntry) -> Result<Shard> {
        self.open_at(&self.dir.join(&entry.file), entry)
    }

    /// Opens the file `path` as the shard that `entry` describes.
    pub(crate) fn open_at(&self, path: &Path, entry: &ShardEntry) -> Result<Shard> {
        Shard::open(path, entry, Place::new(&self.dir, &entry.file), self.family.clone())
    }
}

/// Opens a shard, or a piece of one, of the cache in `dir`.
pub(crate) fn open_entry(dir: &Path, manifest: &Manifest, entry: &ShardEntry) -> Result<Shard> {
    Opener::of(dir, manifest)?.open(entry)
}

/// Reads and checks the companion `path`.
pub(crate) fn read_companion(dir: &Path, manifest: &Manifest, path: &str) -> Result<Vec<u8>> {
    let listed = manifest.companions.iter().find(|c| c.path == path);
    let entry = listed.ok_or_else(|| Error::NoCompanion { dir: dir.to_path_buf(), path: path.to_string() })?;
    let damage = |expected: String, found: String| Flaw::new(expected, found).damage(&Place::new(dir, path), None, None);
    let file = dir.join(path);
    let info = match std::fs::metadata(&file) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(damage("this file".into(), "no such file".into())),
        info => info.map_err(Error::io(&file))?,
    };
    if !info.is_file() || info.len() != entry.bytes {
        return Err(damage(format!("a plain file of {} bytes", entry.bytes), format!("{} bytes", info.len())));
    }
    let bytes = std::fs::read(&file).map_err(Error::io(&file))?;
    match blake3::hash(&bytes).to_hex().to_string() {
        found if found != entry.blake3 => {
            Err(damage(format!("contents with BLAKE3 {}", entry.blake3), format!("contents with {found}")))
        }
        _ => Ok(bytes),
    }
}
