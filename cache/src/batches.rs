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
        Self::start_without(cache, Vec::new(), sampler, first, size)
    }

    /// As [`start`](Self::start), of the cache without the rows `left_out` (rising, each once): what the sampler, of that many
    /// rows fewer, calls row j is the j-th of those that remain.
    pub fn start_without(
        cache: Arc<Cache>,
        left_out: Vec<u64>,
        sampler: Sampler,
        first: u64,
        size: u64,
    ) -> std::io::Result<Self> {
        let (sender, receiver) = mpsc::sync_channel(BATCHES_AHEAD);
        let work = move || {
            let (rows, size) = (cache.len().saturating_sub(left_out.len() as u64), size.max(1));
            if rows == 0 {
                return;
            }
            let row = |i: u64| remaining(&left_out, sampler.row(i / rows, i % rows));
            let places = |batch: u64| (batch * size..(batch + 1) * size).map(row);
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

/// The `j`-th row (from 0) of those that are not in the rising list `left_out`.
fn remaining(left_out: &[u64], j: u64) -> u64 {
    // The list's entry i has i of its own below it, so `entry - i` rows that remain.
    let mut below = (0, left_out.len());
    while below.0 < below.1 {
        let middle = below.0.midpoint(below.1);
        if left_out[middle].saturating_sub(middle as u64) <= j { below.0 = middle + 1 } else { below.1 = middle }
    }
    j + below.0 as u64
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
