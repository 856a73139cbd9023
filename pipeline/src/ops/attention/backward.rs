//! Attention's backward in tiles. A piece of work is one query head of one conversation; it owns its dQ, and a dK and dV of its own,
//! which are added up over the heads that share keys and values, in the heads' order. So no sum depends on threads.
//!
//! ```text
//! of 32 queries:  Sᵀ  [keys][32] = K · Qᵀ,  dPᵀ [keys][32] = V · dOᵀ         tiles of 12 keys by 32 queries
//!                 Pᵀ  = exp(S/√d − lse), 0 above the diagonal;   dSᵀ = P ∘ (dP − D) / √d
//!                 dQ  [32][d]  = dS · K                                      tiles of 12 queries by 32 dimensions
//!                 dV  [keys][d] += Pᵀ · dO,  dK [keys][d] += dSᵀ · Q         tiles of 12 keys by 32 dimensions
//! ```

use super::forward::{QUERIES, blocks_of_rows, panels_of_columns};
use super::{Attended, Segments, Shape, pairs};
#[cfg(feature = "cuda")]
use crate::cuda::attention as gpu;
use crate::device::on_gpu;
use crate::kernel::{Isa, Precision, TILE_COLUMNS, TILE_ROWS, add_row, transpose, vectorised};
use crate::ops::exponential::exp;
use crate::ops::floats;
use candle_core::{Result, Tensor};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Values of a tile.
const TILE: usize = TILE_ROWS * TILE_COLUMNS;

/// Keys and values of one conversation and key/value head, in the layouts of tiles.
struct Panels {
    /// Keys in blocks of 12: [block][d][12]; values likewise.
    keys: Vec<f32>,
    values: Vec<f32>,
    /// Dimensions of keys in panels of 32: [panel][key][32].
    turned: Vec<f32>,
}

/// What came in.
struct Given<'a> {
    q: &'a [f32],
    o: &'a [f32],
    dy: &'a [f32],
    lse: &'a [f32],
    shape: Shape,
}

/// One query head of one conversation.
struct Piece {
    segment: (usize, usize),
    head: usize,
    panels: usize,
}

/// Gradients of a piece: dQ [tokens][d] of its own, dK and dV as far as its queries make them.
struct Gradients {
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// (dQ, dK, dV), shaped as q, k and v.
pub fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    attended: &Attended,
    dy: &Tensor,
    segments: &[u32],
) -> Result<(Tensor, Tensor, Tensor)> {
    backward_at(q, k, v, attended, dy, &Segments::new(segments.to_vec()), Precision::F32)
}

/// The same after [`forward_at`](super::forward_at).
pub fn backward_at(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    attended: &Attended,
    dy: &Tensor,
    segments: &Segments,
    precision: Precision,
) -> Result<(Tensor, Tensor, Tensor)> {
    let shape = Shape::of(q, k, v, segments.bounds())?;
    let lse = attended.log_sums(dy, q, shape)?;
    on_gpu!(q => gpu::backward((q, k, v), (&attended.output, lse), dy, segments, (shape, precision)));
    let _ = precision;
    let (qs, ks, vs, os, dys) = (floats(q)?, floats(k)?, floats(v)?, floats(&attended.output)?, floats(dy)?);
    let lse = floats(lse)?;
    let given = Given { q: &qs, o: &os, dy: &dys, lse: &lse, shape };
    let (ks, vs) = (&ks[..], &vs[..]);

    let spans: Vec<((usize, usize), usize)> = pairs(segments.bounds())
        .filter(|(begin, end)| begin < end)
        .flat_map(|s| (0..shape.kv_heads).map(move |kv| (s, kv)))
        .collect();
    let panels: Vec<Panels> = spans.par_iter().map(|&(segment, kv)| Panels::new(ks, vs, segment, kv, shape)).collect();
    let group = shape.heads / shape.kv_heads;
    let mut pieces: Vec<Piece> = spans
        .iter()
        .enumerate()
        .flat_map(|(panels, &(segment, kv))| (kv * group..(kv + 1) * group).map(move |head| Piece { segment, head, panels }))
        .collect();
    // The longest first, so that threads end at about the same time; of equal ones the earlier, which keeps heads in order.
    pieces.sort_by_key(|piece| std::cmp::Reverse(piece.segment.1 - piece.segment.0));
    let made: Vec<Gradients> = pieces
        .par_iter()
        .with_max_len(1)
        .map(|piece| SCRATCH.with_borrow_mut(|scratch| piece.gradients(&given, &panels[piece.panels], scratch)))
        .collect();

    let mut dq = vec![0f32; qs.len()];
    let (mut dk, mut dv) = (vec![0f32; ks.len()], vec![0f32; vs.len()]);
    for (piece, made) in pieces.iter().zip(&made) {
        let (begin, _) = piece.segment;
        scatter(&made.dq, &mut dq, (begin, shape.heads, piece.head), shape.d, set);
        scatter(&made.dk, &mut dk, (begin, shape.kv_heads, piece.head / group), shape.d, add_row);
        scatter(&made.dv, &mut dv, (begin, shape.kv_heads, piece.head / group), shape.d, add_row);
    }
    let tensor = |values: Vec<f32>, like: &Tensor| Tensor::from_vec(values, like.dims(), like.device());
    Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
}

/// Works rows [tokens][d] of a head into [T, heads, d] from token `begin` on.
fn scatter(rows: &[f32], all: &mut [f32], (begin, heads, head): (usize, usize, usize), d: usize, put: fn(&mut [f32], &[f32])) {
    let places = all[begin * heads * d..].par_chunks_exact_mut(heads * d);
    rows.par_chunks_exact(d).zip(places).with_min_len(64).for_each(|(row, place)| put(&mut place[head * d..][..d], row));
}

fn set(place: &mut [f32], row: &[f32]) {
    place.copy_from_slice(row);
}

impl Panels {
    fn new(k: &[f32], v: &[f32], segment: (usize, usize), kv: usize, shape: Shape) -> Self {
        let place = (segment, kv, shape.kv_heads, shape.d);
        Self { keys: blocks_of_rows(k, place), values: blocks_of_rows(v, place), turned: panels_of_columns(k, place) }
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What a thread keeps between pieces of work.
#[derive(Default)]
struct Scratch {
    /// Qᵀ and dOᵀ, [d][32].
    queries: Vec<f32>,
    dy: Vec<f32>,
    /// Q and dO in panels, [panel][32][32].
    query_panels: Vec<f32>,
    dy_panels: Vec<f32>,
    /// Scores, then probabilities; dP, then dS: [keys in whole tiles][32].
    p: Vec<f32>,
    ds: Vec<f32>,
}

/// 32 queries: those given of a conversation's, and D = dO · O and lse of each.
struct Queries {
    first: usize,
    count: usize,
    delta: [f32; QUERIES],
    lse: [f32; QUERIES],
}

impl Piece {
    fn gradients(&self, given: &Given, panels: &Panels, scratch: &mut Scratch) -> Gradients {
        let (begin, end) = self.segment;
        let (tokens, d) = (end - begin, given.shape.d);
        let padded = tokens.div_ceil(TILE_ROWS) * TILE_ROWS;
        let mut made = Gradients { dq: vec![0.0; tokens * d], dk: vec![0.0; padded * d], dv: vec![0.0; padded * d] };
        let size = d * QUERIES;
        let panel_size = d.div_ceil(TILE_COLUMNS) * QUERIES * TILE_COLUMNS;
        for (values, size) in [
            (&mut scratch.queries, size),
            (&mut scratch.dy, size),
            (&mut scratch.query_panels, panel_size),
            (&mut scratch.dy_panels, panel_size),
            // Rows of 12 queries are read from row 24 on too: four places more than there are.
            (&mut scratch.p, padded * QUERIES + TILE_ROWS),
            (&mut scratch.ds, padded * QUERIES + TILE_ROWS),
        ] {
            values.resize(size, 0.0);
        }
        for first in (0..tokens).step_by(QUERIES) {
            let queries = self.take(given, first, QUERIES.min(tokens - first), scratch);
            self.scores(&queries, panels, given.shape, scratch);
            self.spread(&queries, panels, given.shape, scratch, &mut made);
        }
        made.dk.truncate(tokens * d);
        made.dv.truncate(tokens * d);
        made
    }

    /// Lays 32 queries and their dO out, both ways.
    fn take(&self, given: &Given, first: usize, count: usize, scratch: &mut Scratch) -> Queries {
        let (isa, d, heads) = (Isa::best(), given.shape.d, given.shape.heads);
        let (begin, _) = self.segment;
        let at = (begin + first) * heads * d + self.head * d;
        let rows = |x: &[f32], row: usize| -> Range<usize> {
            let start = at + row * heads * d;
            debug_assert!(start + d <= x.len());
            start..start + d
        };
        for (from, turned, panels) in
            [(given.q, &mut scratch.queries, &mut scratch.query_panels), (given.dy, &mut scratch.dy, &mut scratch.dy_panels)]
        {
            transpose(isa, (&from[at..], heads * d), (count, d), QUERIES, (turned, QUERIES));
            for (panel, out) in panels.chunks_exact_mut(QUERIES * TILE_COLUMNS).enumerate() {
                let width = TILE_COLUMNS.min(d - panel * TILE_COLUMNS);
                for (row, out) in out.chunks_exact_mut(TILE_COLUMNS).enumerate() {
                    let filled = if row < count { width } else { 0 };
                    let (values, beyond) = out.split_at_mut(filled);
                    if row < count {
                        values.copy_from_slice(&from[rows(from, row)][panel * TILE_COLUMNS..][..width]);
                    }
                    beyond.fill(0.0);
                }
            }
        }
        // Lanes without a query: nothing is added, as exp(s − ∞) is 0.
        let (mut delta, mut lse) = ([0f32; QUERIES], [f32::INFINITY; QUERIES]);
        for row in 0..count {
            delta[row] = dot(&given.dy[rows(given.dy, row)], &given.o[rows(given.o, row)]);
            lse[row] = given.lse[self.head * given.shape.tokens + begin + first + row];
        }
        Queries { first, count, delta, lse }
    }

    /// P and dS of the queries and every key they see, in `scratch`.
    fn scores(&self, queries: &Queries, panels: &Panels, shape: Shape, scratch: &mut Scratch) {
        let (isa, d) = (Isa::best(), shape.d);
        let keys = queries.first + queries.count;
        let tiles = keys.div_ceil(TILE_ROWS);
        for block in 0..tiles {
            let place = block * TILE_ROWS * QUERIES..(block + 1) * TILE_ROWS * QUERIES;
            let (k, v) = (&panels.keys[block * TILE_ROWS * d..], &panels.values[block * TILE_ROWS * d..]);
            isa.tile(d, (k, TILE_ROWS), (&scratch.queries, QUERIES), &mut scratch.p[place.clone()]);
            isa.tile(d, (v, TILE_ROWS), (&scratch.dy, QUERIES), &mut scratch.ds[place]);
        }
        let size = tiles * TILE_ROWS * QUERIES;
        differentiate(&mut scratch.p[..size], &mut scratch.ds[..size], queries.first, shape.scale, &queries.lse, &queries.delta);
    }

    /// What P and dS add to dQ, dK and dV.
    fn spread(&self, queries: &Queries, panels: &Panels, shape: Shape, scratch: &Scratch, made: &mut Gradients) {
        let (isa, d) = (Isa::best(), shape.d);
        let (tokens, keys) = (self.segment.1 - self.segment.0, queries.first + queries.count);
        let mut tile = [0f32; TILE];
        for panel in 0..d.div_ceil(TILE_COLUMNS) {
            let (start, width) = (panel * TILE_COLUMNS, TILE_COLUMNS.min(d - panel * TILE_COLUMNS));
            let turned = &panels.turned[panel * tokens * TILE_COLUMNS..][..tokens * TILE_COLUMNS];
            for row in (0..queries.count).step_by(TILE_ROWS) {
                isa.tile(keys, (&scratch.ds[row..], QUERIES), (turned, TILE_COLUMNS), &mut tile);
                let rows = (row..queries.count).zip(tile.chunks_exact(TILE_COLUMNS));
                for (query, tile) in rows.take(TILE_ROWS) {
                    made.dq[(queries.first + query) * d + start..][..width].copy_from_slice(&tile[..width]);
                }
            }
        }
        let mut turned = [0f32; QUERIES * TILE_ROWS];
        for (sums, weights, factors) in
            [(&mut made.dv, &scratch.p, &scratch.dy_panels), (&mut made.dk, &scratch.ds, &scratch.query_panels)]
        {
            for block in 0..keys.div_ceil(TILE_ROWS) {
                let weights = &weights[block * TILE_ROWS * QUERIES..][..TILE_ROWS * QUERIES];
                transpose(isa, (weights, QUERIES), (TILE_ROWS, QUERIES), TILE_ROWS, (&mut turned, TILE_ROWS));
                for (panel, factors) in factors.chunks_exact(QUERIES * TILE_COLUMNS).enumerate() {
                    let (start, width) = (panel * TILE_COLUMNS, TILE_COLUMNS.min(d - panel * TILE_COLUMNS));
                    isa.tile(queries.count, (&turned, TILE_ROWS), (factors, TILE_COLUMNS), &mut tile);
                    for (key, tile) in (block * TILE_ROWS..).zip(tile.chunks_exact(TILE_COLUMNS)) {
                        add_row(&mut sums[key * d + start..][..width], &tile[..width]);
                    }
                }
            }
        }
    }
}

vectorised! {
    /// Turns scores and dP, [keys][32] of queries `first`.., into P and dS; 0 for keys after the query.
    fn differentiate(
        p: &mut [f32],
        ds: &mut [f32],
        first: usize,
        scale: f32,
        lse: &[f32; QUERIES],
        delta: &[f32; QUERIES],
    ) {
        for (key, (p, ds)) in p.chunks_exact_mut(QUERIES).zip(ds.chunks_exact_mut(QUERIES)).enumerate() {
            for lane in 0..QUERIES {
                let seen = key <= first + lane;
                let score = p[lane] * scale - lse[lane];
                // A rounding of the sums may put a score a little above lse.
                let weight = if seen { exp(score) } else { 0.0 };
                p[lane] = weight;
                ds[lane] = if seen { weight * (ds[lane] - delta[lane]) * scale } else { 0.0 };
            }
        }
    }
}

/// Eight running sums, so that the compiler may use vector registers without changing the order of additions between runs.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f32 = a8.remainder().iter().zip(b8.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a8.zip(b8) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + rest
}
