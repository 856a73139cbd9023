//! Attention's forward in tiles. A piece of work is 32 queries of a conversation and the heads that share keys and values.
//!
//! ```text
//! Sᵀ [keys][32 queries] = K · Qᵀ      tiles of 12 keys by 32 queries, keys up to the last query only
//! P  [keys][32 queries] = exp(S/√d − max), 0 above the diagonal         a lane is a query: no sum across lanes
//! O  [32 queries][d]    = Pᵀ · V / Σ P                                  tiles of 12 queries by 32 dimensions
//! ```
//! Queries are cut into groups of 32 from the conversation's first on, so a conversation's bits do not depend on the pack.

use super::{Attended, Segments, Shape, pairs};
#[cfg(feature = "cuda")]
use crate::cuda::attention as gpu;
use crate::device::on_gpu;
use crate::kernel::{Isa, Precision, TILE_COLUMNS, TILE_ROWS, panels, transpose, vectorised};
use crate::ops::exponential::exp;
use crate::ops::with_f32;
use candle_core::{Result, Tensor};
use rayon::prelude::*;
use std::cell::RefCell;

/// Queries of a piece of work: as many as a tile has columns.
pub(super) const QUERIES: usize = TILE_COLUMNS;

/// Keys and values of one conversation and key/value head, in the layouts of tiles.
struct Panels {
    /// Keys in blocks of 12: [block][d][12].
    keys: Vec<f32>,
    /// Dimensions in panels of 32: [panel][key][32].
    values: Vec<f32>,
    /// Whether all values are finite, so that a probability of 0 makes nothing of them.
    finite: bool,
}

/// 32 queries: their conversation, its key/value head, and the first of them, counted in the conversation.
struct Piece {
    segment: (usize, usize),
    kv: usize,
    first: usize,
    panels: usize,
}

/// The places of o and lse, written by pieces.
struct Target {
    o: *mut f32,
    lse: *mut f32,
}

// SAFETY: pieces write disjoint places, and nobody reads before all are done.
unsafe impl Sync for Target {}

/// o [T, heads, d] of q [T, heads, d], k and v [T, kv_heads, d]; `segments` are cumulative lengths from 0 to T.
pub fn forward(q: &Tensor, k: &Tensor, v: &Tensor, segments: &[u32]) -> Result<Attended> {
    forward_at(q, k, v, &Segments::new(segments.to_vec()), Precision::F32)
}

/// The same with factors rounded to `precision` on a GPU. The CPU's are f32 whatever it says.
pub fn forward_at(q: &Tensor, k: &Tensor, v: &Tensor, segments: &Segments, precision: Precision) -> Result<Attended> {
    let shape = Shape::of(q, k, v, segments.bounds())?;
    on_gpu!(q => gpu::forward((q, k, v), segments, shape, precision).map(|(output, lse)| Attended { output, lse: Some(lse) }));
    let _ = precision;
    let size = shape.tokens * shape.heads;
    let (mut o, mut lse): (Vec<f32>, Vec<f32>) = (Vec::with_capacity(size * shape.d), Vec::with_capacity(size));
    let target = Target { o: o.as_mut_ptr(), lse: lse.as_mut_ptr() };
    with_f32(q, |q| {
        with_f32(k, |k| {
            with_f32(v, |v| {
                write((q, k, v), &pairs(segments.bounds()).collect::<Vec<_>>(), shape, &target);
                Ok(())
            })
        })
    })?;
    // SAFETY: the segments cover all tokens, and the pieces all queries and heads: every place was written once.
    unsafe {
        o.set_len(size * shape.d);
        lse.set_len(size);
    }
    let lse = Tensor::from_vec(lse, size, q.device())?;
    Ok(Attended { output: Tensor::from_vec(o, q.dims(), q.device())?, lse: Some(lse) })
}

/// Writes o and lse of the rows of these conversations, given as (begin, end), into o [T, heads, d] and lse [heads · T].
pub(super) fn attend(
    values: (&[f32], &[f32], &[f32]),
    conversations: &[(usize, usize)],
    shape: Shape,
    (o, lse): (&mut [f32], &mut [f32]),
) {
    let size = shape.tokens * shape.heads;
    assert!((o.len(), lse.len()) == (size * shape.d, size) && conversations.iter().all(|c| c.0 <= c.1 && c.1 <= shape.tokens));
    write(values, conversations, shape, &Target { o: o.as_mut_ptr(), lse: lse.as_mut_ptr() });
}

/// The same into places that may hold nothing yet. Conversations are disjoint and within the rows.
fn write((q, k, v): (&[f32], &[f32], &[f32]), conversations: &[(usize, usize)], shape: Shape, target: &Target) {
    let filled = conversations.iter().copied().filter(|(begin, end)| begin < end);
    let heads: Vec<((usize, usize), usize)> = filled.flat_map(|s| (0..shape.kv_heads).map(move |kv| (s, kv))).collect();
    let panels: Vec<Panels> = heads.par_iter().map(|&(segment, kv)| Panels::new(k, v, segment, kv, shape)).collect();
    let mut pieces: Vec<Piece> = heads
        .iter()
        .enumerate()
        .flat_map(|(panels, &(segment, kv))| {
            (0..segment.1 - segment.0).step_by(QUERIES).map(move |first| Piece { segment, kv, first, panels })
        })
        .collect();
    // The longest first, so that threads end at about the same time.
    pieces.sort_by_key(|piece| std::cmp::Reverse(piece.first));
    pieces.into_par_iter().with_max_len(1).for_each(|piece| {
        SCRATCH.with_borrow_mut(|scratch| piece.attend(q, &panels[piece.panels], shape, target, scratch));
    });
}

impl Panels {
    fn new(k: &[f32], v: &[f32], segment: (usize, usize), kv: usize, shape: Shape) -> Self {
        let place = (segment, kv, shape.kv_heads, shape.d);
        let (keys, values) = (blocks_of_rows(k, place), panels_of_columns(v, place));
        let finite = values.iter().all(|v| v.is_finite());
        Self { keys, values, finite }
    }
}

/// Which part of x [T, heads, d] is taken: a conversation, a head, the number of heads, d.
pub(super) type Place = ((usize, usize), usize, usize, usize);

/// The part's rows in blocks of 12, the last one filled up with zeros: [block][d][12].
pub(super) fn blocks_of_rows(x: &[f32], ((begin, end), head, heads, d): Place) -> Vec<f32> {
    let (isa, count, step) = (Isa::best(), end - begin, heads * d);
    let mut blocks = vec![0f32; count.div_ceil(TILE_ROWS) * TILE_ROWS * d];
    for (block, out) in blocks.chunks_exact_mut(TILE_ROWS * d).enumerate() {
        let rows = TILE_ROWS.min(count - block * TILE_ROWS);
        let from = &x[(begin + block * TILE_ROWS) * step + head * d..];
        transpose(isa, (from, step), (rows, d), TILE_ROWS, (out, TILE_ROWS));
    }
    blocks
}

/// The part's dimensions in panels of 32, the last one filled up with zeros: [panel][row][32].
pub(super) fn panels_of_columns(x: &[f32], ((begin, end), head, heads, d): Place) -> Vec<f32> {
    let step = heads * d;
    panels((&x[begin * step + head * d..], step), (end - begin, d))
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What a thread keeps between pieces of work.
#[derive(Default)]
struct Scratch {
    /// Qᵀ [d][32].
    queries: Vec<f32>,
    /// Scores, then probabilities: [keys in whole tiles][32].
    scores: Vec<f32>,
}

impl Piece {
    fn attend(&self, q: &[f32], panels: &Panels, shape: Shape, target: &Target, scratch: &mut Scratch) {
        let (isa, d, heads) = (Isa::best(), shape.d, shape.heads);
        let (begin, end) = self.segment;
        let queries = QUERIES.min(end - begin - self.first);
        let keys = self.first + queries;
        let group = heads / shape.kv_heads;
        scratch.queries.resize(d * QUERIES, 0.0);
        // Rows of 12 queries are read from row 24 on too: four places more than there are.
        scratch.scores.resize(keys.next_multiple_of(TILE_ROWS) * QUERIES + TILE_ROWS, 0.0);
        for head in self.kv * group..(self.kv + 1) * group {
            let from = &q[(begin + self.first) * heads * d + head * d..];
            transpose(isa, (from, heads * d), (queries, d), QUERIES, (&mut scratch.queries, QUERIES));
            let scores = &mut scratch.scores[..];
            for (block, out) in scores.chunks_exact_mut(TILE_ROWS * QUERIES).enumerate() {
                let keys = &panels.keys[block * TILE_ROWS * d..][..TILE_ROWS * d];
                isa.tile(d, (keys, TILE_ROWS), (&scratch.queries, QUERIES), out);
            }
            let (mut sums, mut lse) = ([0f32; QUERIES], [0f32; QUERIES]);
            softmax(&mut scores[..keys * QUERIES], self.first, shape.scale, &mut sums, &mut lse);
            self.weigh(scores, panels, shape, (head, queries), &sums, target);
            for (query, lse) in lse.iter().enumerate().take(queries) {
                // SAFETY: this query and head are this piece's alone.
                unsafe { target.lse.add(head * shape.tokens + begin + self.first + query).write(*lse) };
            }
        }
    }

    /// O = Pᵀ V / Σ P of one head.
    fn weigh(
        &self,
        scores: &[f32],
        panels: &Panels,
        shape: Shape,
        (head, queries): (usize, usize),
        sums: &[f32; QUERIES],
        target: &Target,
    ) {
        let (isa, d, count) = (Isa::best(), shape.d, self.segment.1 - self.segment.0);
        let mut tile = [0f32; TILE_ROWS * TILE_COLUMNS];
        for panel in 0..d.div_ceil(TILE_COLUMNS) {
            let values = &panels.values[panel * count * TILE_COLUMNS..][..count * TILE_COLUMNS];
            let width = TILE_COLUMNS.min(d - panel * TILE_COLUMNS);
            // 0 · NaN is NaN: where there is one, each query is given its own keys alone.
            let rows = if panels.finite { TILE_ROWS } else { 1 };
            for row in (0..queries).step_by(rows) {
                let keys = self.first + if panels.finite { queries } else { row + 1 };
                isa.tile(keys, (&scores[row..], QUERIES), (values, TILE_COLUMNS), &mut tile);
                for (query, tile) in (row..queries.min(row + rows)).zip(tile.chunks_exact_mut(TILE_COLUMNS)) {
                    tile.iter_mut().for_each(|o| *o /= sums[query]);
                    let token = self.segment.0 + self.first + query;
                    let at = (token * shape.heads + head) * d + panel * TILE_COLUMNS;
                    // SAFETY: these dimensions of this query and head are this piece's alone.
                    unsafe { std::ptr::copy_nonoverlapping(tile.as_ptr(), target.o.add(at), width) };
                }
            }
        }
    }
}

vectorised! {
    /// Turns scores [keys][32] of queries `first`.. into exp(s·scale − max·scale), 0 for keys after the query; the sums of each query,
    /// and ln Σ exp(s·scale).
    fn softmax(scores: &mut [f32], first: usize, scale: f32, sums: &mut [f32; QUERIES], lse: &mut [f32; QUERIES]) {
        let mut largest = [f32::NEG_INFINITY; QUERIES];
        for (key, row) in scores.chunks_exact_mut(QUERIES).enumerate() {
            for lane in 0..QUERIES {
                // A query sees keys up to itself. Lanes without a query see whatever; nobody reads them.
                let seen = key <= first + lane;
                row[lane] = if seen { row[lane] } else { f32::NEG_INFINITY };
                largest[lane] = if row[lane] > largest[lane] { row[lane] } else { largest[lane] };
            }
        }
        *sums = [0.0; QUERIES];
        for row in scores.chunks_exact_mut(QUERIES) {
            for lane in 0..QUERIES {
                row[lane] = exp((row[lane] - largest[lane]) * scale);
                sums[lane] += row[lane];
            }
        }
        for lane in 0..QUERIES {
            lse[lane] = largest[lane] * scale + sums[lane].ln();
        }
    }
}
