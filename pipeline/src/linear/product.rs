//! Sums of products of rows with frozen or trained matrices, on the CPU. Owns how they are cut into pieces of work; refuses to know
//! what a layer is.
//!
//! ```text
//! y  = x · Wᵀ + s·u · Bᵀ + b                       a layer and its adapter
//! dx = dy₁ · W₁ + du₁ · A₁ + dy₂ · W₂ + …          the gradient of what several layers read
//! ```
//! The one idea: a weight is never unpacked as a whole. A thread unpacks 32 columns, a stretch of K at a time, into a panel that stays in
//! its cache, and multiplies it by all rows before it unpacks the next; so 4-bit weights cost a few parts in a hundred at a thousand rows,
//! and memory holds the packed weight alone. The terms of a sum go one after the other into the same place, so an adapter costs its
//! products and not one more pass over memory.
//!
//! A value is the sum over terms and stretches of K, in order, of sums in order within the stretch (then + b): it depends on the rows'
//! row and the matrices' column, not on how many rows there are, nor on threads.

use super::panel::Factor;
use crate::kernel::{Block, Isa, Precision, Rows, TILE_COLUMNS, TILE_ROWS, add_row, pair_panel, round_all};
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

/// One term of a sum: rows times a matrix.
#[derive(Debug, Clone, Copy)]
pub struct Term<'a> {
    /// x, as wide as the factor is deep.
    pub rows: &'a Rows,
    /// What it is multiplied by.
    pub factor: Factor<'a>,
}

/// A sum of terms of the same size, [T, width].
#[derive(Debug, Clone)]
pub struct Product<'a> {
    /// At least one.
    pub terms: Vec<Term<'a>>,
    /// b, f32 `[width]`.
    pub bias: Option<&'a [f32]>,
}

impl<'a> Product<'a> {
    /// x times one factor.
    pub fn of(rows: &'a Rows, factor: Factor<'a>) -> Self {
        Self { terms: vec![Term { rows, factor }], bias: None }
    }

    /// T.
    pub fn count(&self) -> usize {
        self.terms.first().map_or(0, |term| term.rows.count())
    }

    /// Width of the result.
    pub fn width(&self) -> usize {
        self.terms.first().map_or(0, |term| term.factor.width())
    }

    fn fits(&self) -> bool {
        let fits =
            |t: &Term| (t.rows.count(), t.rows.width(), t.factor.width()) == (self.count(), t.factor.depth(), self.width());
        self.terms.iter().all(fits) && self.bias.is_none_or(|b| b.len() == self.width())
    }
}

/// A piece of work: panels of one product, and the blocks of rows they are multiplied by.
struct Piece {
    product: usize,
    panels: Range<usize>,
    blocks: Range<usize>,
}

/// The values of one product, [T, width], written tile by tile.
struct Target {
    start: *mut f32,
    rows: usize,
    columns: usize,
    /// Whether values are there already, to be added to.
    adds: bool,
}

// SAFETY: pieces of work write disjoint tiles, and nobody reads before all are done.
unsafe impl Sync for Target {}

/// The products' values, row-major [T, width]. Panics where a product's terms do not fit each other: that is for callers to check.
pub fn products(products: &[Product]) -> Vec<Vec<f32>> {
    let mut outputs: Vec<Vec<f32>> = products.iter().map(|_| Vec::new()).collect();
    write_products(products, &mut outputs);
    outputs
}

/// The same into room that is there already.
pub fn write_products(products: &[Product], outputs: &mut [Vec<f32>]) {
    assert_eq!(products.len(), outputs.len(), "one place a product");
    let target = |(values, product): (&mut Vec<f32>, &Product)| {
        values.clear();
        values.reserve_exact(product.count() * product.width());
        Target::new(values.as_mut_ptr(), product, false)
    };
    let targets: Vec<Target> = outputs.iter_mut().zip(products).map(target).collect();
    multiply(products, &targets);
    for (values, product) in outputs.iter_mut().zip(products) {
        // A product without terms has width 0, one over no columns no rows, so nothing is claimed that was not written.
        // SAFETY: the pieces cover every panel and every row, and each wrote its tiles; that much room was reserved.
        unsafe { values.set_len(product.count() * product.width()) };
    }
}

/// Adds a product to values [T, width]. The same bits as one product of more terms. Panics as [`products`].
pub fn add_product(product: &Product, values: &mut [f32]) {
    assert_eq!(values.len(), product.count() * product.width(), "values of another size than the product");
    multiply(std::slice::from_ref(product), &[Target::new(values.as_mut_ptr(), product, true)]);
}

fn multiply(products: &[Product], targets: &[Target]) {
    assert!(products.iter().all(Product::fits), "terms that do not fit each other");
    pieces(products).into_par_iter().with_max_len(1).for_each(|piece| {
        let (product, target) = (&products[piece.product], &targets[piece.product]);
        SCRATCH.with_borrow_mut(|scratch| work(product, target, &piece, scratch));
    });
}

/// Cuts the products into pieces: by columns as far as that makes enough of them, then by rows too.
fn pieces(products: &[Product]) -> Vec<Piece> {
    let wanted = PIECES_A_THREAD * rayon::current_num_threads();
    let panels: usize = products.iter().map(|p| p.width().div_ceil(TILE_COLUMNS)).sum();
    let group = (panels / wanted).clamp(1, MOST_PANELS);
    let mut pieces = Vec::new();
    for (number, product) in products.iter().enumerate() {
        let (rows, panels) = (product.count(), product.width().div_ceil(TILE_COLUMNS));
        let blocks = rows.div_ceil(TILE_ROWS);
        let parts = wanted.div_ceil((panels / group).max(1)).min((rows / LEAST_ROWS).max(1));
        let part = blocks.div_ceil(parts).max(1);
        for first in (0..panels).step_by(group) {
            for block in (0..blocks).step_by(part) {
                let (panels, blocks) = (first..panels.min(first + group), block..blocks.min(block + part));
                pieces.push(Piece { product: number, panels, blocks });
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
    /// Rows of a matrix before they are turned.
    rows: Vec<f32>,
}

fn work(product: &Product, target: &Target, piece: &Piece, scratch: &mut Scratch) {
    for (i, term) in product.terms.iter().enumerate() {
        let begins = i == 0 && !target.adds;
        let bias = product.bias.filter(|_| i + 1 == product.terms.len());
        add_term(term, begins, bias, target, piece, scratch);
    }
}

/// Adds a term to the piece's tiles, or begins them; and the bias, where it is given.
fn add_term(term: &Term, begins: bool, bias: Option<&[f32]>, target: &Target, piece: &Piece, scratch: &mut Scratch) {
    let (isa, rows) = (Isa::best(), term.rows);
    let pairs = matches!(rows.block(piece.blocks.start), Block::Pairs(_));
    let (stretch, size) = (PANEL_STEPS * if pairs { 2 } else { 1 }, PANEL_STEPS * TILE_COLUMNS);
    let Scratch { values, words, rows: unturned } = scratch;
    values.resize(if pairs { 2 * size } else { piece.panels.len() * size }, 0.0);
    words.resize(if pairs { piece.panels.len() * size } else { 0 }, 0);
    let mut tile = [0f32; TILE_ROWS * TILE_COLUMNS];
    for k in (0..rows.width()).step_by(stretch) {
        let depth = k..rows.width().min(k + stretch);
        for (i, panel) in piece.panels.clone().enumerate() {
            let out = if pairs { &mut values[..] } else { &mut values[i * size..][..size] };
            let out = &mut out[..depth.len() * TILE_COLUMNS];
            term.factor.panel(isa, panel, depth.clone(), unturned, out);
            match (pairs, rows.precision()) {
                (true, _) => pair_panel(out, &mut words[i * size..][..size]),
                (false, Precision::Bf16) => round_all(out),
                (false, Precision::F32) => {}
            }
        }
        let (first, last) = (begins && k == 0, depth.end == rows.width());
        for block in piece.blocks.clone() {
            let a = rows.block(block);
            for (i, panel) in piece.panels.clone().enumerate() {
                match a {
                    Block::F32(a) => {
                        let (a, b) = (&a[k * TILE_ROWS..], &values[i * size..][..size]);
                        isa.tile(depth.len(), (a, TILE_ROWS), (b, TILE_COLUMNS), &mut tile);
                    }
                    Block::Pairs(a) => {
                        let (a, b) = (&a[k / 2 * TILE_ROWS..], &words[i * size..][..size]);
                        isa.tile_pairs(depth.len().div_ceil(2), (a, TILE_ROWS), (b, TILE_COLUMNS), &mut tile);
                    }
                }
                target.put(block, panel, &tile, first, bias.filter(|_| last));
            }
        }
    }
}

impl Target {
    fn new(start: *mut f32, product: &Product, adds: bool) -> Self {
        Self { start, rows: product.count(), columns: product.width(), adds }
    }

    /// Writes (`first`) or adds a tile, and the bias with the last one.
    fn put(&self, block: usize, panel: usize, tile: &[f32], first: bool, bias: Option<&[f32]>) {
        let (row, column) = (block * TILE_ROWS, panel * TILE_COLUMNS);
        let width = TILE_COLUMNS.min(self.columns - column);
        let bias = bias.map(|bias| &bias[column..column + width]);
        for (r, tile) in tile.chunks_exact(TILE_COLUMNS).enumerate().take(self.rows - row) {
            // SAFETY: rows and columns of the tile that lie in the target are its piece's alone; those written first are not read.
            let values = unsafe {
                let start = self.start.add((row + r) * self.columns + column);
                match (first, width) {
                    // A width known beforehand is a few registers, not a call.
                    (true, TILE_COLUMNS) => std::ptr::copy_nonoverlapping(tile.as_ptr(), start, TILE_COLUMNS),
                    (true, _) => std::ptr::copy_nonoverlapping(tile.as_ptr(), start, width),
                    _ => {}
                }
                std::slice::from_raw_parts_mut(start, width)
            };
            if !first {
                add_row(values, tile);
            }
            if let Some(bias) = bias {
                add_row(values, bias);
            }
        }
    }
}
