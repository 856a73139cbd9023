//! Counters of a scan over a whole cache. The scan only counts; drawing is the caller's business.

use std::sync::atomic::{AtomicU64, Ordering};

/// How far a scan is. Share it between the scanning thread and the drawing one.
#[derive(Debug, Default)]
pub struct ScanProgress {
    rows_total: AtomicU64,
    rows_done: AtomicU64,
    bytes_total: AtomicU64,
    bytes_done: AtomicU64,
}

impl ScanProgress {
    /// Rows checked or counted, of how many.
    pub fn rows(&self) -> (u64, u64) {
        (self.rows_done.load(Ordering::Relaxed), self.rows_total.load(Ordering::Relaxed))
    }

    /// Bytes digested, of how many.
    pub fn bytes(&self) -> (u64, u64) {
        (self.bytes_done.load(Ordering::Relaxed), self.bytes_total.load(Ordering::Relaxed))
    }

    pub(crate) fn begin(&self, rows: u64, bytes: u64) {
        self.rows_total.store(rows, Ordering::Relaxed);
        self.bytes_total.store(bytes, Ordering::Relaxed);
        self.rows_done.store(0, Ordering::Relaxed);
        self.bytes_done.store(0, Ordering::Relaxed);
    }

    pub(crate) fn add_rows(&self, rows: u64) {
        self.rows_done.fetch_add(rows, Ordering::Relaxed);
    }

    pub(crate) fn add_bytes(&self, bytes: u64) {
        self.bytes_done.fetch_add(bytes, Ordering::Relaxed);
    }
}
