//! Every operation on the run folder's files that must survive a crash. In tests each of them can be the last that a process does
//! ([`kill`]); in every other build there is the call itself and nothing else.

use super::TrainError;
use crate::{Error, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// One call to the system.
fn call<T>(path: &Path, work: impl FnOnce() -> std::io::Result<T>) -> Result<T> {
    #[cfg(test)]
    kill::next().map_err(io(path))?;
    work().map_err(io(path))
}

/// A moment at which a process can end, before other rooms' work on `path`.
pub(super) fn moment(path: &Path) -> Result<()> {
    call(path, || Ok(()))
}

/// Writes `bytes`, durably, so that `path` holds either what it held before or all of them.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let partial = path.with_file_name(format!(".{name}.partial"));
    let mut file = call(&partial, || File::create(&partial))?;
    call(&partial, || file.write_all(bytes))?;
    call(&partial, || file.sync_all())?;
    rename(&partial, path)
}

/// Writes a new file, durably but for its name.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    call(path, || fs::write(path, bytes))?;
    sync(path)
}

/// Makes a file's bytes or a folder's names durable.
pub(super) fn sync(path: &Path) -> Result<()> {
    call(path, || File::open(path).and_then(|file| file.sync_all()))
}

/// Gives `from` another name, durably.
pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    call(to, || fs::rename(from, to))?;
    match to.parent() {
        Some(folder) if folder.as_os_str().is_empty() => sync(Path::new(".")),
        Some(folder) => sync(folder),
        None => Ok(()),
    }
}

/// Removes a folder with all that is in it.
pub(super) fn remove_folder(path: &Path) -> Result<()> {
    // Under its own name it would for a while be a folder that lacks files.
    let hidden = path.with_file_name(format!(".{}.partial", path.file_name().unwrap_or_default().to_string_lossy()));
    if hidden.is_dir() {
        call(&hidden, || fs::remove_dir_all(&hidden))?;
    }
    call(path, || fs::rename(path, &hidden))?;
    call(&hidden, || fs::remove_dir_all(&hidden))
}

/// A failed access to `path`.
pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    move |source| Error::Train(TrainError::Io { path, source })
}

/// An end on order: from the n-th call of this thread on, none is made any more, as if the process had been killed before it.
#[cfg(test)]
pub(super) mod kill {
    use std::cell::Cell;

    thread_local! {
        static LAST: Cell<u64> = const { Cell::new(u64::MAX) };
        static CALLS: Cell<u64> = const { Cell::new(0) };
    }

    /// Runs `work`, of whose calls only the first `calls` are made. Gives what it gave and how many it came to.
    pub(in crate::train) fn after<T>(calls: u64, work: impl FnOnce() -> T) -> (T, u64) {
        CALLS.set(0);
        LAST.set(calls);
        let result = work();
        LAST.set(u64::MAX);
        (result, CALLS.get())
    }

    pub(super) fn next() -> std::io::Result<()> {
        let number = CALLS.get() + 1;
        CALLS.set(number);
        if number <= LAST.get() { Ok(()) } else { Err(std::io::Error::other("killed")) }
    }
}
