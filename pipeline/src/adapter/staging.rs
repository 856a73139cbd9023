//! Owns building a folder beside its place and renaming it into it. Refuses to replace a folder that it was not told to.

use super::{AdapterError, Checked};
use crate::data::COMPANIONS;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Files that are copied where they are, beside [`COMPANIONS`], which make a folder usable by a tokenizer or a generator.
const BESIDE: [&str; 3] = ["tokenizer.json", "LICENSE", "NOTICE"];

/// A folder under construction; removed when dropped before [`publish`](Self::publish).
#[derive(Debug)]
pub(super) struct Staging {
    partial: PathBuf,
    target: PathBuf,
}

impl Staging {
    /// Makes an empty folder beside `target`.
    pub(super) fn beside(target: &Path) -> Checked<Staging> {
        let (parent, name) = place(target)?;
        fs::create_dir_all(&parent).map_err(|source| AdapterError::Io { path: parent.clone(), source })?;
        let partial = parent.join(format!(".{name}.partial-{}", std::process::id()));
        recover(&parent, &name)?;
        if partial.is_dir() {
            // Left by a process of the same number that was killed.
            fs::remove_dir_all(&partial).map_err(|source| AdapterError::Io { path: partial.clone(), source })?;
        }
        fs::create_dir(&partial).map_err(|source| AdapterError::Io { path: partial.clone(), source })?;
        Ok(Staging { partial, target: parent.join(name) })
    }

    /// Path of a file in it.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.partial.join(name)
    }

    /// Writes a small file.
    pub(super) fn write(&self, name: &str, text: &str) -> Checked<()> {
        let path = self.file(name);
        fs::write(&path, text).map_err(|source| AdapterError::Io { path, source })
    }

    /// Copies those companions that `from` has; none may lead out of it.
    pub(super) fn copy_companions(&self, from: &Path) -> Checked<()> {
        let root = from.canonicalize().map_err(|source| AdapterError::Io { path: from.to_path_buf(), source })?;
        for name in COMPANIONS.into_iter().chain(BESIDE).filter(|name| root.join(name).is_file()) {
            let (source, to) = (crate::model::weights::contained(&root, name)?, self.file(name));
            let copied = File::open(&source).and_then(|mut f| std::io::copy(&mut f, &mut File::create(&to)?));
            copied.map_err(|source| AdapterError::Io { path: to, source })?;
        }
        Ok(())
    }

    /// Gives a file the permissions of another one in the folder (temporary files are readable by their owner alone).
    pub(super) fn share(&self, name: &str, like: &str) -> Checked<()> {
        let path = self.file(name);
        let shared = fs::metadata(self.file(like)).and_then(|m| fs::set_permissions(&path, m.permissions()));
        shared.map_err(|source| AdapterError::Io { path, source })
    }

    fn set_aside(&self) -> PathBuf {
        let name = self.target.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        aside(self.target.parent().unwrap_or(Path::new(".")), &name)
    }

    /// Makes everything durable and renames the folder into its place. An adapter folder that stands there gives way; an
    /// empty folder too.
    pub(super) fn publish(self) -> Checked<()> {
        let io = |path: &Path| {
            let path = path.to_path_buf();
            move |source| AdapterError::Io { path, source }
        };
        for entry in fs::read_dir(&self.partial).map_err(io(&self.partial))? {
            let path = entry.map_err(io(&self.partial))?.path();
            File::open(&path).and_then(|f| f.sync_all()).map_err(io(&path))?;
        }
        sync_folder(&self.partial)?;
        let old = self.set_aside();
        let replaces = self.target.exists();
        if replaces {
            fs::rename(&self.target, &old).map_err(io(&self.target))?;
        }
        fs::rename(&self.partial, &self.target).map_err(io(&self.target))?;
        if let Some(parent) = self.target.parent() {
            sync_folder(parent)?;
        }
        if replaces {
            fs::remove_dir_all(&old).map_err(io(&old))?;
        }
        Ok(())
    }
}

/// Where a folder that gives way waits until its successor stands.
fn aside(parent: &Path, name: &str) -> PathBuf {
    parent.join(format!(".{name}.old"))
}

/// Tidies what a process left that was killed while publishing: the older folder goes back where nothing took its place.
fn recover(parent: &Path, name: &str) -> Checked<()> {
    let (old, target) = (aside(parent, name), parent.join(name));
    if !old.is_dir() {
        return Ok(());
    }
    let done = if target.exists() { fs::remove_dir_all(&old) } else { fs::rename(&old, &target) };
    done.map_err(|source| AdapterError::Io { path: old, source })
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After a publish there is nothing left; a failure here only leaves a hidden folder behind.
        let _ = fs::remove_dir_all(&self.partial);
    }
}

/// Whether a folder is absent or empty; else what is in it.
pub(super) fn refuse_occupied(target: &Path) -> Checked<()> {
    let occupied = |found| Err(AdapterError::Occupied { path: target.to_path_buf(), found });
    if target.is_dir() {
        let mut entries = fs::read_dir(target).map_err(|source| AdapterError::Io { path: target.to_path_buf(), source })?;
        return match entries.next() {
            Some(Ok(entry)) => occupied(format!("{:?} in it", entry.file_name())),
            Some(Err(source)) => Err(AdapterError::Io { path: target.to_path_buf(), source }),
            None => Ok(()),
        };
    }
    if target.symlink_metadata().is_ok() { occupied("a file".into()) } else { Ok(()) }
}

/// The parent folder and last name of a folder that may not exist yet.
fn place(target: &Path) -> Checked<(PathBuf, String)> {
    let name = target.file_name().and_then(|n| n.to_str()).map(str::to_string);
    let parent = target.parent().map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p });
    match (parent, name) {
        (Some(parent), Some(name)) => Ok((parent.to_path_buf(), name)),
        _ => Err(AdapterError::Occupied { path: target.to_path_buf(), found: "a path without a plain last name".into() }),
    }
}

fn sync_folder(path: &Path) -> Checked<()> {
    let synced = File::open(path).and_then(|folder| folder.sync_all());
    synced.map_err(|source| AdapterError::Io { path: path.to_path_buf(), source })
}
