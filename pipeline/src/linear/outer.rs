//! xᵀ y summed over tokens: the gradients of an adapter's factors. Owns the sum; refuses to know which factor it is.
//!
//! ```text
//! x [T, m], y [T, n]   ─►   out[i, j] += Σ_t x[t, i] · y[t, j]          n is a rank: small; m a layer's width
//! ```
//! Twelve columns of x and 32 of y make a tile, the token is the step: 512 tokens, in order, are a stretch, stretches are added in order.
//! So a value depends on its two columns alone, not on threads.

use crate::kernel::{Isa, TILE_COLUMNS, TILE_ROWS, add_row, panels};
use rayon::prelude::*;
use std::cell::RefCell;

/// Tokens of a stretch: 24 KiB of twelve columns.
const STRETCH: usize = 512;
/// Most columns of x that a piece of work takes, in blocks of 12.
const MOST_BLOCKS: usize = 8;
/// Pieces of work a thread should have.
const PIECES_A_THREAD: usize = 4;
/// Values of a tile.
const TILE: usize = TILE_ROWS * TILE_COLUMNS;

/// How the result lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lies {
    /// [m, n].
    Straight,
    /// [n, m].
    Turned,
}

/// The place of the result, [m, n] or [n, m].
struct Target {
    start: *mut f32,
    m: usize,
    n: usize,
    lies: Lies,
}

// SAFETY: pieces of work write disjoint values, and nobody reads before all are done.
unsafe impl Sync for Target {}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What a thread keeps between pieces of work.
#[derive(Default)]
struct Scratch {
    /// Columns of x, [block][token][12].
    columns: Vec<f32>,
    /// Sums, [block][panel][12][32].
    sums: Vec<f32>,
}

/// Adds Σ_t x[t, i] · y[t, j] to `out`, m · n values. x is [T, m] and y [T, n], row-major. Panics where lengths do not fit: that is
/// for callers to check.
pub fn add_outer((x, m): (&[f32], usize), (y, n): (&[f32], usize), lies: Lies, out: &mut [f32]) {
    assert_eq!(out.len(), m * n, "an outer product of other sizes");
    if m == 0 || n == 0 {
        return;
    }
    let tokens = x.len() / m;
    assert_eq!((x.len(), y.len()), (tokens * m, tokens * n), "outer product: factors of other sizes");
    let panels = panels((y, n), (tokens, n));
    let (target, blocks) = (Target { start: out.as_mut_ptr(), m, n, lies }, m.div_ceil(TILE_ROWS));
    let group = (blocks / (PIECES_A_THREAD * rayon::current_num_threads())).clamp(1, MOST_BLOCKS);
    (0..blocks.div_ceil(group)).into_par_iter().with_max_len(1).for_each(|piece| {
        let columns = piece * group * TILE_ROWS..m.min((piece + 1) * group * TILE_ROWS);
        SCRATCH.with_borrow_mut(|scratch| work(x, &panels, columns, tokens, &target, scratch));
    });
}

fn work(x: &[f32], panels: &[f32], columns: std::ops::Range<usize>, tokens: usize, target: &Target, scratch: &mut Scratch) {
    let (isa, m) = (Isa::best(), target.m);
    let (blocks, count) = (columns.len().div_ceil(TILE_ROWS), target.n.div_ceil(TILE_COLUMNS));
    let Scratch { columns: packed, sums } = scratch;
    packed.resize(MOST_BLOCKS * STRETCH * TILE_ROWS, 0.0);
    sums.clear();
    sums.resize(blocks * count * TILE, 0.0);
    let mut tile = [0f32; TILE];
    for start in (0..tokens).step_by(STRETCH) {
        let length = STRETCH.min(tokens - start);
        for (block, packed) in packed.chunks_exact_mut(STRETCH * TILE_ROWS).enumerate().take(blocks) {
            let first = columns.start + block * TILE_ROWS;
            let width = TILE_ROWS.min(columns.end - first);
            let rows = x[start * m..(start + length) * m].chunks_exact(m);
            for (row, packed) in rows.zip(packed.as_chunks_mut::<TILE_ROWS>().0) {
                // A width known beforehand is a register, not a call.
                match row[first..first + width].as_array::<TILE_ROWS>() {
                    Some(whole) => *packed = *whole,
                    None => {
                        let (values, beyond) = packed.split_at_mut(width);
                        values.copy_from_slice(&row[first..first + width]);
                        beyond.fill(0.0);
                    }
                }
            }
        }
        for panel in 0..count {
            let b = &panels[(panel * tokens + start) * TILE_COLUMNS..][..length * TILE_COLUMNS];
            for (block, a) in packed.chunks_exact(STRETCH * TILE_ROWS).enumerate().take(blocks) {
                isa.tile(length, (a, TILE_ROWS), (b, TILE_COLUMNS), &mut tile);
                let sums = &mut sums[(block * count + panel) * TILE..][..TILE];
                add_row(sums, &tile);
            }
        }
    }
    for (i, sums) in sums.chunks_exact(TILE).enumerate() {
        let (block, panel) = (i / count, i % count);
        target.add(columns.start + block * TILE_ROWS, columns.end, panel * TILE_COLUMNS, sums);
    }
}

impl Target {
    /// Adds a tile whose first value is (`row`, `column`); rows end at `end`.
    fn add(&self, row: usize, end: usize, column: usize, tile: &[f32]) {
        for (i, tile) in (row..end).zip(tile.chunks_exact(TILE_COLUMNS)) {
            for (j, value) in (column..self.n).zip(tile) {
                let at = if self.lies == Lies::Straight { i * self.n + j } else { j * self.m + i };
                // SAFETY: i < m and j < n, and this piece alone has the rows of its columns of x.
                unsafe { *self.start.add(at) += value };
            }
        }
    }
}
