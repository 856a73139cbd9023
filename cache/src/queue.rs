//! Writing beside the teacher: a thread that owns the [`CacheWriter`] behind a queue of bounded length.
//!
//! Whoever sends records is held up only when the queue is full, which is when the disk or zstd are slower than the teacher for long;
//! memory stays bounded. The first error ends the thread, comes back from the next `send`, and is never lost.

use crate::{CacheWriter, Error, Record, Result};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Batches of records that may wait. Two keep the thread busy; more would only hold memory.
const BATCHES_WAITING: usize = 2;

/// What is durable of a cache that is being written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Written {
    /// Rows.
    pub rows: u64,
    /// Scored positions in them.
    pub scored: u64,
    /// Bytes of the shards and pieces that hold them.
    pub bytes: u64,
}

impl Written {
    fn by(writer: &CacheWriter) -> Self {
        let manifest = writer.manifest();
        let files = || manifest.shards.iter().chain(&manifest.parts);
        let (scored, bytes) = (files().map(|file| file.scored).sum(), files().map(|file| file.bytes).sum());
        Self { rows: writer.committed_rows(), scored, bytes }
    }
}

/// A [`CacheWriter`] at work in a thread of its own. Not to be waited for by a thread of rayon's pool, which encodes for it.
pub struct WriterQueue {
    sender: Option<SyncSender<Vec<Record>>>,
    thread: Option<JoinHandle<Result<CacheWriter>>>,
    written: Arc<Mutex<Written>>,
    dir: std::path::PathBuf,
}

impl WriterQueue {
    /// Moves `writer` to a thread. Rows become durable at least every `seal_every` while records keep coming.
    pub fn start(writer: CacheWriter, seal_every: Duration) -> Result<Self> {
        let (sender, receiver) = mpsc::sync_channel(BATCHES_WAITING);
        let written = Arc::new(Mutex::new(Written::by(&writer)));
        let (shared, dir) = (written.clone(), writer.dir().to_path_buf());
        let work = move || write_all(writer, &receiver, seal_every, &shared);
        let thread = std::thread::Builder::new().name("cache-writer".into()).spawn(work).map_err(Error::io(&dir))?;
        Ok(Self { sender: Some(sender), thread: Some(thread), written, dir })
    }

    /// What is durable.
    pub fn written(&self) -> Written {
        *self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands records on in order, as [`CacheWriter::extend`] takes them; waits while the queue is full. Errors: what the writer
    /// failed with, for these records or earlier ones.
    pub fn send(&mut self, records: Vec<Record>) -> Result<()> {
        match &self.sender {
            Some(sender) if sender.send(records).is_ok() => Ok(()),
            _ => Err(self.join().err().unwrap_or(Error::WriterFailed { dir: self.dir.clone() })),
        }
    }

    /// Waits until everything sent is written and gives the writer back, or its error.
    pub fn close(mut self) -> Result<CacheWriter> {
        self.join()
    }

    fn join(&mut self) -> Result<CacheWriter> {
        self.sender = None;
        let failed = || Error::WriterFailed { dir: self.dir.clone() };
        match self.thread.take() {
            Some(thread) => thread.join().unwrap_or_else(|_| Err(failed())),
            None => Err(failed()),
        }
    }
}

impl Drop for WriterQueue {
    fn drop(&mut self) {
        // The writer's lock is free when this returns; an error nobody asked for is gone with the rows that it concerned.
        let _ = self.join();
    }
}

fn write_all(
    mut writer: CacheWriter,
    receiver: &Receiver<Vec<Record>>,
    seal_every: Duration,
    written: &Mutex<Written>,
) -> Result<CacheWriter> {
    while let Ok(records) = receiver.recv() {
        writer.extend(&records)?;
        writer.seal_after(seal_every)?;
        *written.lock().unwrap_or_else(PoisonError::into_inner) = Written::by(&writer);
    }
    Ok(writer)
}
