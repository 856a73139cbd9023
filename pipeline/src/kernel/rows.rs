//! Rows of activations in the layout of tiles: made once, used by every product they take part in.

use super::{Isa, Precision, TILE_COLUMNS, TILE_ROWS, transpose, vectorised};
use rayon::prelude::*;
use std::ops::Range;

/// x [T, K] in blocks of 12 rows, k by k; a last block is filled up with zeros.
#[derive(Debug, Clone)]
pub struct Rows {
    count: usize,
    width: usize,
    precision: Precision,
    packed: Packed,
}

#[derive(Debug, Clone)]
enum Packed {
    F32(Vec<f32>),
    Pairs(Vec<u32>),
}

/// A block of 12 rows.
#[derive(Debug, Clone, Copy)]
pub enum Block<'a> {
    /// f32, rounded or not, `[K][12]`.
    F32(&'a [f32]),
    /// Pairs of bf16, `[K/2 rounded up][12]`.
    Pairs(&'a [u32]),
}

impl Rows {
    /// Packs x, row-major [T, `width`]; what does not fill a row is left out.
    pub fn pack(x: &[f32], width: usize, precision: Precision) -> Self {
        Self::pack_columns(x, width, 0..width, precision)
    }

    /// Packs some columns of x, row-major [T, `row`].
    pub fn pack_columns(x: &[f32], row: usize, columns: Range<usize>, precision: Precision) -> Self {
        let isa = Isa::best();
        let (count, width) = (x.len().checked_div(row).unwrap_or(0), columns.len());
        // A product over no columns has no rows here: nobody asks for one.
        let count = if width == 0 { 0 } else { count };
        let (blocks, rows) = (count.div_ceil(TILE_ROWS), x[..count * row].par_chunks((TILE_ROWS * row).max(1)));
        let packed = match (precision, isa.multiplies_pairs()) {
            (Precision::F32, _) | (Precision::Bf16, false) => {
                let mut packed = vec![0f32; blocks * TILE_ROWS * width];
                packed.par_chunks_mut((TILE_ROWS * width).max(1)).zip(rows).for_each(|(out, rows)| {
                    transpose(isa, (&rows[columns.start..], row), (rows.len() / row, width), TILE_ROWS, (out, TILE_ROWS));
                    if precision == Precision::Bf16 {
                        round_all(out);
                    }
                });
                Packed::F32(packed)
            }
            (Precision::Bf16, true) => {
                let pairs = width.div_ceil(2);
                let mut packed = vec![0u32; blocks * TILE_ROWS * pairs];
                let blocks = packed.par_chunks_mut((TILE_ROWS * pairs).max(1)).zip(rows);
                blocks.for_each_init(
                    || vec![0u32; TILE_ROWS * pairs],
                    |rounded, (out, rows)| {
                        for (values, rounded) in rows.chunks_exact(row).zip(rounded.chunks_exact_mut(pairs)) {
                            round_to_pairs(&values[columns.clone()], rounded);
                        }
                        transpose(isa, (rounded, pairs), (rows.len() / row, pairs), TILE_ROWS, (out, TILE_ROWS));
                    },
                );
                Packed::Pairs(packed)
            }
        };
        Self { count, width, precision, packed }
    }

    /// T.
    pub fn count(&self) -> usize {
        self.count
    }

    /// K.
    pub fn width(&self) -> usize {
        self.width
    }

    /// What the values were rounded to.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Rows 12i to 12i + 11.
    pub fn block(&self, i: usize) -> Block<'_> {
        match &self.packed {
            Packed::F32(values) => Block::F32(&values[i * TILE_ROWS * self.width..][..TILE_ROWS * self.width]),
            Packed::Pairs(words) => {
                let size = TILE_ROWS * self.width.div_ceil(2);
                Block::Pairs(&words[i * size..][..size])
            }
        }
    }
}

/// Some columns of rows, in panels of 32, the last one filled up with zeros: `[panel][row][32]`. Row r is `width` values from
/// `r · step` on.
pub fn panels((rows, step): (&[f32], usize), (count, width): (usize, usize)) -> Vec<f32> {
    let mut panels = vec![0f32; width.div_ceil(TILE_COLUMNS) * count * TILE_COLUMNS];
    panels.par_chunks_mut((count * TILE_COLUMNS).max(1)).enumerate().for_each(|(panel, out)| {
        let first = panel * TILE_COLUMNS;
        let here = TILE_COLUMNS.min(width - first);
        for (row, out) in out.chunks_exact_mut(TILE_COLUMNS).enumerate() {
            out[..here].copy_from_slice(&rows[row * step + first..][..here]);
        }
    });
    panels
}

vectorised! {
    /// Adds a row to sums as long.
    pub fn add_row(sums: &mut [f32], row: &[f32]) {
        for (sum, value) in sums.iter_mut().zip(row) {
            *sum += value;
        }
    }
}

vectorised! {
    /// Rounds f32 to pairs of bf16 (to nearest, ties to even; NaN stays NaN), the first of each in the low half. An odd last value is
    /// paired with 0.
    pub fn round_to_pairs(values: &[f32], out: &mut [u32]) {
        let whole = values.len() / 2;
        for (pair, out) in values.chunks_exact(2).zip(out.iter_mut()) {
            *out = round(pair[0]) | round(pair[1]) << 16;
        }
        if let ([last], Some(out)) = (&values[2 * whole..], out.get_mut(whole)) {
            *out = round(*last);
        }
    }
}

vectorised! {
    /// Rounds f32 to the nearest bf16, in place.
    pub fn round_all(values: &mut [f32]) {
        for value in values {
            *value = f32::from_bits(round(*value) << 16);
        }
    }
}

vectorised! {
    /// A panel of f32 `[K][32]` as pairs of bf16 `[K/2 rounded up][32]`: k even in the low half, an odd last k with 0.
    pub fn pair_panel(panel: &[f32], out: &mut [u32]) {
        for (both, out) in panel.chunks(2 * TILE_COLUMNS).zip(out.chunks_exact_mut(TILE_COLUMNS)) {
            match both.split_at_checked(TILE_COLUMNS) {
                Some((even, odd)) if odd.len() == TILE_COLUMNS => {
                    for c in 0..TILE_COLUMNS {
                        out[c] = round(even[c]) | round(odd[c]) << 16;
                    }
                }
                _ => {
                    for (out, even) in out.iter_mut().zip(both) {
                        *out = round(*even);
                    }
                }
            }
        }
    }
}

/// The sixteen bits of the nearest bf16, in the low half.
#[inline(always)]
fn round(value: f32) -> u32 {
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // A NaN's payload must not carry over into the sign.
    let nan = bits >> 16 | 0x40;
    if value.is_nan() { nan } else { nearest }
}
