//! A cut of power, worked out for the crate's own tests from what `durable.rs` says it did. The rule is the hardest one that a file
//! system may follow: of a file's bytes those before its last sync are there, of later ones any number; of a folder's names those
//! before its last sync are as they were left, and of later changes any of them happened, alone or not.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Something that was done.
pub(crate) enum Done<'a> {
    Created(&'a Path, &'a File),
    Wrote(&'a File, &'a [u8]),
    Synced(&'a File),
    Renamed(&'a Path, &'a Path),
    Removed(&'a Path),
    FolderMade(&'a Path),
    FolderSynced(&'a Path),
}

/// A change of a folder's names.
#[derive(Debug, Clone)]
enum Change {
    Link(PathBuf, usize),
    Rename(PathBuf, PathBuf),
    Unlink(PathBuf),
    Folder(PathBuf),
}

impl Change {
    fn folder(&self) -> Option<&Path> {
        match self {
            Change::Link(path, _) | Change::Rename(_, path) | Change::Unlink(path) | Change::Folder(path) => path.parent(),
        }
    }
}

/// A name's meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    File(usize),
    Folder,
}

#[derive(Debug, Clone, Default)]
struct Body {
    bytes: Vec<u8>,
    synced: usize,
}

/// All that was done, as far as it matters after a cut.
#[derive(Debug, Clone, Default)]
pub(crate) struct Disk {
    bodies: Vec<Body>,
    /// The body that an inode is at present.
    inodes: BTreeMap<u64, usize>,
    durable: BTreeMap<PathBuf, Entry>,
    pending: Vec<Change>,
}

thread_local! {
    static JOURNAL: RefCell<Option<(Disk, Vec<Disk>)>> = const { RefCell::new(None) };
}

/// Takes down something that was done, where somebody listens.
pub(crate) fn note(done: Done<'_>) {
    JOURNAL.with_borrow_mut(|journal| {
        if let Some((disk, states)) = journal {
            disk.apply(done);
            states.push(disk.clone());
        }
    });
}

/// Runs `work`; gives what a disk might hold after each thing that was done, and what `work` gave.
pub(crate) fn recorded<T>(work: impl FnOnce() -> T) -> (Vec<Disk>, T) {
    JOURNAL.set(Some(Default::default()));
    let result = work();
    let states = JOURNAL.take().map(|(_, states)| states);
    (states.unwrap_or_default(), result)
}

/// How much has been taken down so far.
pub(crate) fn noted() -> usize {
    JOURNAL.with_borrow(|journal| journal.as_ref().map_or(0, |(_, states)| states.len()))
}

impl Disk {
    fn apply(&mut self, done: Done<'_>) {
        let inode = |file: &File| file.metadata().map(|info| info.ino()).unwrap_or_default();
        match done {
            Done::Created(path, file) => {
                self.bodies.push(Body::default());
                self.inodes.insert(inode(file), self.bodies.len() - 1);
                self.pending.push(Change::Link(path.into(), self.bodies.len() - 1));
            }
            Done::Wrote(file, bytes) => {
                if let Some(&body) = self.inodes.get(&inode(file)) {
                    self.bodies[body].bytes.extend_from_slice(bytes);
                }
            }
            Done::Synced(file) => {
                if let Some(&body) = self.inodes.get(&inode(file)) {
                    self.bodies[body].synced = self.bodies[body].bytes.len();
                }
            }
            Done::Renamed(from, to) => self.pending.push(Change::Rename(from.into(), to.into())),
            Done::Removed(path) => self.pending.push(Change::Unlink(path.into())),
            Done::FolderMade(path) => self.pending.push(Change::Folder(path.into())),
            Done::FolderSynced(dir) => {
                let (here, elsewhere) = std::mem::take(&mut self.pending).into_iter().partition(|c| c.folder() == Some(dir));
                self.pending = elsewhere;
                let here: Vec<Change> = here;
                here.into_iter().for_each(|change| happen(&mut self.durable, change));
            }
        }
    }

    /// Lays out under `root` what is left of the files below `within`; `choose(n)` gives a number below `n`.
    pub(crate) fn cut(&self, within: &Path, root: &Path, choose: &mut dyn FnMut(usize) -> usize) -> std::io::Result<()> {
        let mut names = self.durable.clone();
        for change in &self.pending {
            if choose(2) == 0 {
                happen(&mut names, change.clone());
            }
        }
        let mut made = vec![within.to_path_buf()];
        for (path, entry) in names {
            // In a folder that is gone nothing is found; parents come first.
            let Some(inner) =
                path.strip_prefix(within).ok().filter(|_| path.parent().is_some_and(|p| made.iter().any(|m| m == p)))
            else {
                continue;
            };
            let there = root.join(inner);
            match entry {
                Entry::Folder => {
                    std::fs::create_dir(&there)?;
                    made.push(path);
                }
                Entry::File(body) => {
                    let Body { bytes, synced } = &self.bodies[body];
                    let kept = synced + choose(bytes.len() - synced + 1);
                    std::fs::write(there, &bytes[..kept])?;
                }
            }
        }
        Ok(())
    }
}

/// A change that reached the disk. One whose file's name did not is without effect.
fn happen(names: &mut BTreeMap<PathBuf, Entry>, change: Change) {
    match change {
        Change::Link(path, body) => drop(names.insert(path, Entry::File(body))),
        Change::Rename(from, to) => {
            if let Some(entry) = names.remove(&from) {
                names.insert(to, entry);
            }
        }
        Change::Unlink(path) => drop(names.remove(&path)),
        Change::Folder(path) => drop(names.insert(path, Entry::Folder)),
    }
}
