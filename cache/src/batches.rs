//! Reading beside the student: batches of rows in a sampler's order, decoded in parallel and ahead of the caller.
//!
//! A thread asks the system for the pages of the batch after the next while it decodes the next one on rayon; finished batches wait
//! in a queue of bounded length. The order is a function of (seed, epoch, place), so memory does not depend on the cache's size.

use crate::{Cache, Record, Result, Sampler};
use rayon::prelude::*;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;

/// Decoded batches that may wait for the caller.
const BATCHES_AHEAD: usize = 2;

/// An endless sequence of batches: pass after pass over the cache, each with its own order. Not to be waited for by a thread of
/// rayon's pool, which decodes for it.
pub struct Batches {
    receiver: Option<Receiver<Result<Vec<Record>>>>,
    thread: Option<JoinHandle<()>>,
}

impl Batches {
    /// Batches of `size` rows (1 or more) from batch number `first` on. Batch b holds places `b · size` to `(b + 1) · size` of the
    /// endless order, in which place i is place `i mod rows` of epoch `i / rows`.
    ///
    /// A cache without rows has no batches.
    pub fn start(cache: Arc<Cache>, sampler: Sampler, first: u64, size: u64) -> std::io::Result<Self> {
        let (sender, receiver) = mpsc::sync_channel(BATCHES_AHEAD);
        let work = move || {
            let (rows, size) = (cache.len(), size.max(1));
            if rows == 0 {
                return;
            }
            let places = |batch: u64| (batch * size..(batch + 1) * size).map(|i| sampler.row(i / rows, i % rows));
            places(first).for_each(|row| cache.will_need(row));
            for batch in first.. {
                places(batch + 1).for_each(|row| cache.will_need(row));
                let rows: Vec<u64> = places(batch).collect();
                let records: Vec<Result<Record>> = rows.into_par_iter().map(|row| cache.row(row)).collect();
                // The caller has gone when nobody takes it.
                if sender.send(records.into_iter().collect()).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("cache-reader".into()).spawn(work)?;
        Ok(Self { receiver: Some(receiver), thread: Some(thread) })
    }
}

impl Iterator for Batches {
    type Item = Result<Vec<Record>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.receiver.as_ref()?.recv().ok()
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        self.receiver = None;
        if let Some(thread) = self.thread.take() {
            // It ends at its next send; a panic in it was seen as the end of the sequence.
            let _ = thread.join();
        }
    }
}
