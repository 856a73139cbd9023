//! File operations that survive a crash: write, sync, rename, sync the folder. Every write of this crate goes through here; nothing
//! else creates, renames or removes files.
//!
//! Each call to the system passes [`call`] or [`write_some`], so that the crate's own tests can have any one of them fail
//! (`faults.rs`), and what was done is told to those that work out what a cut of power may leave (`power.rs`). In every other
//! build there is the call itself and nothing else.

use crate::shard::write::Written;
use crate::{Error, Result};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Suffix of a file that is being written.
pub(crate) const TMP_SUFFIX: &str = ".tmp";

/// `path` with [`TMP_SUFFIX`] appended.
pub(crate) fn tmp_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(TMP_SUFFIX);
    PathBuf::from(name)
}

/// Tells the crate's own tests what was done.
macro_rules! done {
    ($($what:tt)*) => {
        #[cfg(test)]
        crate::power::note(crate::power::Done::$($what)*);
    };
}

/// One call to the system.
pub(crate) fn call<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    #[cfg(test)]
    return crate::faults::call(work);
    #[cfg(not(test))]
    work()
}

/// One write, which may take fewer bytes than it is given.
fn write_some(file: &mut File, bytes: &[u8]) -> io::Result<usize> {
    #[cfg(test)]
    return crate::faults::write(bytes, |bytes| file.write(bytes));
    #[cfg(not(test))]
    file.write(bytes)
}

/// Writes `bytes` so that `path` holds either what it held before or all of `bytes`, durably.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let tmp = tmp_of(path);
    let file = call(|| File::create(&tmp)).map_err(Error::io(&tmp))?;
    done!(Created(&tmp, &file));
    let mut file = HashedFile::new(file);
    file.write_all(bytes).map_err(Error::io(&tmp))?;
    file.finish(&tmp)?;
    call(|| std::fs::rename(&tmp, path)).map_err(Error::io(path))?;
    done!(Renamed(&tmp, path));
    sync_parent(path)
}

/// A new file that must not exist yet.
pub(crate) fn create_new(path: &Path) -> Result<File> {
    let file = call(|| OpenOptions::new().write(true).create_new(true).open(path)).map_err(Error::io(path))?;
    done!(Created(path, &file));
    Ok(file)
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
        call(|| self.file.sync_all()).map_err(Error::io(path))?;
        done!(Synced(&self.file));
        Ok(Written { bytes: self.bytes, blake3: self.hasher.finalize().to_hex().to_string() })
    }
}

impl Write for HashedFile {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = write_some(&mut self.file, buffer)?;
        done!(Wrote(&self.file, &buffer[..written]));
        self.hasher.update(&buffer[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Gives `tmp` its final name, never over an existing file, durably.
pub(crate) fn publish(tmp: &Path, path: &Path) -> Result<()> {
    let file = tempfile::TempPath::try_from_path(tmp).map_err(Error::io(tmp))?;
    call(|| file.persist_noclobber(path).map_err(|e| e.error)).map_err(Error::io(path))?;
    done!(Renamed(tmp, path));
    sync_parent(path)
}

/// Gives `tmp` the name of the file whose place it takes, durably.
pub(crate) fn supersede(tmp: &Path, path: &Path) -> Result<()> {
    call(|| std::fs::rename(tmp, path)).map_err(Error::io(path))?;
    done!(Renamed(tmp, path));
    sync_parent(path)
}

/// Removes a file that may not be there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    match call(|| std::fs::remove_file(path)) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        removed => {
            removed.map_err(Error::io(path))?;
            done!(Removed(path));
            Ok(())
        }
    }
}

/// Makes the folder `dir`, and those above it that are missing, durably.
pub(crate) fn create_folder(dir: &Path) -> Result<()> {
    let missing = dir.ancestors().take_while(|above| !above.as_os_str().is_empty() && !above.exists());
    let mut missing: Vec<&Path> = missing.collect();
    while let Some(next) = missing.pop() {
        match call(|| std::fs::create_dir(next)) {
            // Another process was quicker; a file in its place is found when the folder is used.
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            made => {
                made.map_err(Error::io(next))?;
                done!(FolderMade(next));
            }
        }
        sync_parent(next)?;
    }
    // A run that was killed may have made it without getting here.
    sync_parent(dir)
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
        let folder = call(|| File::open(dir)).map_err(Error::io(dir))?;
        call(|| folder.sync_all()).map_err(Error::io(dir))?;
        done!(FolderSynced(dir));
    }
    Ok(())
}

/// The lock of one cache, held until dropped.
#[derive(Debug)]
pub(crate) struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing the file is not enough: a process that was forked a moment ago has it open until it becomes another program.
        let _ = self.0.unlock();
    }
}

/// Takes the lock file `path` of the cache `dir`. The empty file is left behind: removing
/// it would let two processes hold locks on two files of the same name.
pub(crate) fn lock(dir: &Path, path: &Path) -> Result<Lock> {
    let file = call(|| OpenOptions::new().write(true).create(true).truncate(false).open(path)).map_err(Error::io(path))?;
    done!(Created(path, &file));
    match file.try_lock() {
        Ok(()) => Ok(Lock(file)),
        Err(TryLockError::WouldBlock) => Err(Error::Locked { dir: dir.to_path_buf() }),
        Err(TryLockError::Error(e)) => Err(Error::io(path)(e)),
    }
}
