//! y = x Wᵀ + b for any encoding of W, on the CPU. Owns how a product is cut into pieces of work; refuses to know what a layer is.
//!
//! The one idea: a weight is never unpacked as a whole. A thread unpacks 32 columns of W, a stretch of K at a time, into a panel that
//! stays in its cache, and multiplies it by all rows before it unpacks the next; so int4 costs about one part in a hundred at a
//! thousand rows, and memory holds the packed weight alone.
//!
//! A value is the sum over stretches of K, in order, of sums in order within the stretch (then + b): it depends on x's row and W's
//! column, not on how many rows there are, nor on threads.

use super::Weight;
use crate::kernel::{Block, Isa, Precision, Rows, TILE_COLUMNS, TILE_ROWS, pair_panel, round_all, transpose};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Steps (values in f32, pairs in bf16) of K that a panel holds: 64 KiB.
const PANEL_STEPS: usize = 512;
/// Panels that a piece of work unpacks beside each other: together they stay in a core's second cache.
const MOST_PANELS: usize = 4;
/// Pieces of work a thread should have, so that threads end at about the same time.
const PIECES_A_THREAD: usize = 6;
/// Fewest rows of a piece: below that, unpacking costs more than balance is worth.
const LEAST_ROWS: usize = 32 * TILE_ROWS;

/// One of several products of the same rows.
#[derive(Debug, Clone, Copy)]
pub struct Factor<'a> {
    /// W, [out, in].
    pub weight: &'a Weight,
    /// b, f32 `[out]`.
    pub bias: Option<&'a [f32]>,
}

/// A piece of work: panels of one product, and the blocks of rows they are multiplied by.
struct Piece {
    product: usize,
    panels: Range<usize>,
    blocks: Range<usize>,
}

/// The values of one product, [T, out], written tile by tile.
struct Target {
    start: *mut f32,
    rows: usize,
    columns: usize,
}

// SAFETY: pieces of work write disjoint tiles, and nobody reads before all are done.
unsafe impl Sync for Target {}

/// The products of x's rows [T, in] with each of `factors`, row-major [T, out]. All weights must have x's width as their inputs.
pub fn products(rows: &Rows, factors: &[Factor]) -> Vec<Vec<f32>> {
    debug_assert!(factors.iter().all(|f| f.weight.inputs() == rows.width()));
    let mut outputs: Vec<Vec<f32>> = factors.iter().map(|f| Vec::with_capacity(rows.count() * f.weight.outputs())).collect();
    let targets: Vec<Target> = outputs
        .iter_mut()
        .zip(factors)
        .map(|(values, f)| Target { start: values.as_mut_ptr(), rows: rows.count(), columns: f.weight.outputs() })
        .collect();
    pieces(rows.count(), factors).into_par_iter().with_max_len(1).for_each(|piece| {
        let (factor, target) = (&factors[piece.product], &targets[piece.product]);
        SCRATCH.with_borrow_mut(|scratch| work(rows, factor, target, &piece, scratch));
    });
    for (values, target) in outputs.iter_mut().zip(&targets) {
        // SAFETY: the pieces cover every panel and every row, and each wrote its tiles; the capacity is exactly this.
        unsafe { values.set_len(target.rows * target.columns) };
    }
    outputs
}

/// Cuts the products into pieces: by columns as far as that makes enough of them, then by rows too.
fn pieces(rows: usize, factors: &[Factor]) -> Vec<Piece> {
    let (wanted, blocks) = (PIECES_A_THREAD * rayon::current_num_threads(), rows.div_ceil(TILE_ROWS));
    let panels: usize = factors.iter().map(|f| f.weight.outputs().div_ceil(TILE_COLUMNS)).sum();
    let group = (panels / wanted).clamp(1, MOST_PANELS);
    let parts = wanted.div_ceil((panels / group).max(1)).min((rows / LEAST_ROWS).max(1));
    let part = blocks.div_ceil(parts).max(1);
    let mut pieces = Vec::new();
    for (product, factor) in factors.iter().enumerate() {
        let panels = factor.weight.outputs().div_ceil(TILE_COLUMNS);
        for first in (0..panels).step_by(group) {
            for block in (0..blocks).step_by(part) {
                let (panels, blocks) = (first..panels.min(first + group), block..blocks.min(block + part));
                pieces.push(Piece { product, panels, blocks });
            }
        }
    }
    pieces
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What a thread keeps between pieces of work.
#[derive(Default)]
struct Scratch {
    /// f32 [K][32]: panels of f32, or one that is about to become pairs.
    values: Vec<f32>,
    /// Panels of pairs.
    words: Vec<u32>,
    /// Rows of W before they are turned.
    rows: Vec<f32>,
}

fn work(rows: &Rows, factor: &Factor, target: &Target, piece: &Piece, scratch: &mut Scratch) {
    let isa = Isa::best();
    let pairs = matches!(rows.block(piece.blocks.start), Block::Pairs(_));
    let (stretch, size) = (PANEL_STEPS * if pairs { 2 } else { 1 }, PANEL_STEPS * TILE_COLUMNS);
    let Scratch { values, words, rows: unturned } = scratch;
    values.resize(if pairs { 2 * size } else { piece.panels.len() * size }, 0.0);
    words.resize(if pairs { piece.panels.len() * size } else { 0 }, 0);
    let mut tile = [0f32; TILE_ROWS * TILE_COLUMNS];
    for k in (0..rows.width()).step_by(stretch) {
        let inputs = k..rows.width().min(k + stretch);
        for (i, panel) in piece.panels.clone().enumerate() {
            let out = if pairs { &mut values[..] } else { &mut values[i * size..][..size] };
            factor.weight.panel(isa, panel, inputs.clone(), unturned, out);
            let out = &mut out[..inputs.len() * TILE_COLUMNS];
            match (pairs, rows.precision()) {
                (true, _) => pair_panel(out, &mut words[i * size..][..size]),
                (false, Precision::Bf16) => round_all(out),
                (false, Precision::F32) => {}
            }
        }
        let last = inputs.end == rows.width();
        for block in piece.blocks.clone() {
            let a = rows.block(block);
            for (i, panel) in piece.panels.clone().enumerate() {
                match a {
                    Block::F32(a) => {
                        let (a, b) = (&a[k * TILE_ROWS..], &values[i * size..][..size]);
                        isa.tile(inputs.len(), (a, TILE_ROWS), (b, TILE_COLUMNS), &mut tile);
                    }
                    Block::Pairs(a) => {
                        let (a, b) = (&a[k / 2 * TILE_ROWS..], &words[i * size..][..size]);
                        isa.tile_pairs(inputs.len().div_ceil(2), (a, TILE_ROWS), (b, TILE_COLUMNS), &mut tile);
                    }
                }
                target.put(block, panel, &tile, k == 0, factor.bias.filter(|_| last));
            }
        }
    }
}

impl Target {
    /// Writes (`first`) or adds a tile, and the bias with the last one.
    fn put(&self, block: usize, panel: usize, tile: &[f32], first: bool, bias: Option<&[f32]>) {
        let (row, column) = (block * TILE_ROWS, panel * TILE_COLUMNS);
        let width = TILE_COLUMNS.min(self.columns - column);
        let bias = bias.map(|bias| &bias[column..column + width]);
        for (r, tile) in tile.chunks_exact(TILE_COLUMNS).enumerate().take(self.rows - row) {
            // SAFETY: rows and columns of the tile that lie in the target are its piece's alone; those written first are not read.
            let values = unsafe {
                let start = self.start.add((row + r) * self.columns + column);
                if first {
                    std::ptr::copy_nonoverlapping(tile.as_ptr(), start, width);
                }
                std::slice::from_raw_parts_mut(start, width)
            };
            if !first {
                values.iter_mut().zip(tile).for_each(|(value, tile)| *value += tile);
            }
            if let Some(bias) = bias {
                values.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
            }
        }
    }
}

impl Weight {
    /// Unpacks columns 32 · `panel` to 32 · `panel` + 31 (zeros beyond the last one) of the inputs given: out f32 [inputs][32].
    fn panel(&self, isa: Isa, panel: usize, inputs: Range<usize>, rows: &mut Vec<f32>, out: &mut [f32]) {
        let first = panel * TILE_COLUMNS;
        let count = TILE_COLUMNS.min(self.outputs() - first);
        if let Weight::Awq(weight) = self {
            return weight.panel(isa, first, inputs, out);
        }
        rows.resize(TILE_COLUMNS * inputs.len(), 0.0);
        for (i, row) in rows.chunks_exact_mut(inputs.len()).enumerate().take(count) {
            match self {
                Weight::Dense(weight) => weight.decode(first + i, inputs.start, row),
                Weight::Nf4(weight) => weight.decode(first + i, inputs.start, row),
                Weight::Awq(_) => {}
            }
        }
        transpose(isa, (rows, inputs.len()), (count, inputs.len()), TILE_COLUMNS, (out, TILE_COLUMNS));
    }
}
