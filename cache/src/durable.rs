//! File operations that survive a crash: write, sync, rename, sync the folder. Every write of this crate but the pages of a
//! shard goes through here; nothing else creates, renames or removes files.

use crate::shard::write::Written;
use crate::{Error, Result};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Suffix of a file that is being written.
pub(crate) const TMP_SUFFIX: &str = ".tmp";

/// `path` with [`TMP_SUFFIX`] appended.
pub(crate) fn tmp_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(TMP_SUFFIX);
    PathBuf::from(name)
}

/// Writes `bytes` so that `path` holds either what it held before or all of `bytes`, durably.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let tmp = tmp_of(path);
    let mut file = File::create(&tmp).map_err(Error::io(&tmp))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io(&tmp))?;
    drop(file);
    std::fs::rename(&tmp, path).map_err(Error::io(path))?;
    sync_parent(path)
}

/// A new file that must not exist yet.
pub(crate) fn create_new(path: &Path) -> Result<File> {
    OpenOptions::new().write(true).create_new(true).open(path).map_err(Error::io(path))
}

/// A file under way whose BLAKE3 and size are known when it is finished, without reading it again.
pub(crate) struct HashedFile {
    file: File,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl HashedFile {
    pub(crate) fn new(file: File) -> Self {
        Self { file, hasher: blake3::Hasher::new(), bytes: 0 }
    }

    /// Makes the bytes durable.
    pub(crate) fn finish(self, path: &Path) -> Result<Written> {
        self.file.sync_all().map_err(Error::io(path))?;
        Ok(Written { bytes: self.bytes, blake3: self.hasher.finalize().to_hex().to_string() })
    }
}

impl Write for HashedFile {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(buffer)?;
        self.hasher.update(&buffer[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// Gives `tmp` its final name, never over an existing file, durably.
pub(crate) fn publish(tmp: &Path, path: &Path) -> Result<()> {
    let file = tempfile::TempPath::try_from_path(tmp).map_err(Error::io(tmp))?;
    file.persist_noclobber(path).map_err(|e| Error::io(path)(e.error))?;
    sync_parent(path)
}

/// Gives `tmp` the name of the file whose place it takes, durably.
pub(crate) fn supersede(tmp: &Path, path: &Path) -> Result<()> {
    std::fs::rename(tmp, path).map_err(Error::io(path))?;
    sync_parent(path)
}

/// Removes a file that may not be there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(e)),
        _ => Ok(()),
    }
}

/// Makes the names in `path`'s folder durable.
pub(crate) fn sync_parent(path: &Path) -> Result<()> {
    match path.parent() {
        // The parent of a bare relative name is the empty path, by which the current folder cannot be opened.
        Some(dir) if dir.as_os_str().is_empty() => sync_folder(Path::new(".")),
        Some(dir) => sync_folder(dir),
        None => Ok(()),
    }
}

/// Makes the names in `dir` durable.
pub(crate) fn sync_folder(dir: &Path) -> Result<()> {
    // Folders can be opened and synced on Unix only; elsewhere the rename itself has to do.
    if cfg!(unix) {
        File::open(dir).and_then(|folder| folder.sync_all()).map_err(Error::io(dir))?;
    }
    Ok(())
}

/// Takes the lock file `path` of the cache `dir` for as long as the file stays open. The empty file is left behind: removing
/// it would let two processes hold locks on two files of the same name.
pub(crate) fn lock(dir: &Path, path: &Path) -> Result<File> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).open(path).map_err(Error::io(path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Locked { dir: dir.to_path_buf() }),
        Err(TryLockError::Error(e)) => Err(Error::io(path)(e)),
    }
}
