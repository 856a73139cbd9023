//! The order of the entries inside one position's list: stored log-probability falling, ties by rising id.
//!
//! Rounding makes runs of equal values; sorting ids inside a run loses nothing and compresses better.

use std::cmp::Ordering;

/// Sorts (id, stored log-probability) pairs into the canonical order.
pub(super) fn sort(entries: &mut [(u32, f32)]) {
    entries.sort_by(|a, b| compare(*a, *b));
}

fn compare(a: (u32, f32), b: (u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}
