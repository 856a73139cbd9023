//! The right-hand factors of products, unpacked 32 columns at a time. Owns which way a matrix is read; refuses to know what is summed.

use super::Weight;
use crate::kernel::{Isa, TILE_COLUMNS, transpose};
use std::ops::Range;

/// A matrix M [rows, columns] that rows x are multiplied by.
#[derive(Debug, Clone, Copy)]
pub enum Matrix<'a> {
    /// A layer's weight, [out, in].
    Weight(&'a Weight),
    /// f32, row-major.
    Values {
        /// rows · columns of them.
        values: &'a [f32],
        /// Length of a row.
        columns: usize,
    },
}

/// Which way a matrix is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// x [T, columns] · Mᵀ = [T, rows]: what a layer does to its input.
    Forward,
    /// x [T, rows] · M = [T, columns]: what it does to its output's gradient.
    Backward,
}

/// A matrix and the way it is read.
#[derive(Debug, Clone, Copy)]
pub struct Factor<'a> {
    /// M.
    pub matrix: Matrix<'a>,
    /// Which way.
    pub way: Way,
}

impl<'a> Factor<'a> {
    /// x · Wᵀ.
    pub fn forward(weight: &'a Weight) -> Self {
        Self { matrix: Matrix::Weight(weight), way: Way::Forward }
    }

    /// dy · W.
    pub fn backward(weight: &'a Weight) -> Self {
        Self { matrix: Matrix::Weight(weight), way: Way::Backward }
    }

    /// Width of x, the number of terms in a sum.
    pub fn depth(&self) -> usize {
        self.sizes().0
    }

    /// Width of the product.
    pub fn width(&self) -> usize {
        self.sizes().1
    }

    /// (depth, width).
    fn sizes(&self) -> (usize, usize) {
        let (rows, columns) = match self.matrix {
            Matrix::Weight(weight) => (weight.outputs(), weight.inputs()),
            Matrix::Values { values, columns } => (values.len().checked_div(columns).unwrap_or(0), columns),
        };
        match self.way {
            Way::Forward => (columns, rows),
            Way::Backward => (rows, columns),
        }
    }

    /// Columns 32 · `panel` to 32 · `panel` + 31 of the factor (zeros beyond the last one), terms `depth`: out f32 [depth][32].
    /// `scratch` is room to turn values in.
    pub(super) fn panel(&self, isa: Isa, panel: usize, depth: Range<usize>, scratch: &mut Vec<f32>, out: &mut [f32]) {
        let first = panel * TILE_COLUMNS;
        let count = TILE_COLUMNS.min(self.width() - first);
        match self.way {
            Way::Forward => self.rows_panel(isa, first, count, depth, scratch, out),
            Way::Backward => self.columns_panel(isa, first, count, depth, scratch, out),
        }
    }

    /// The panel's columns are rows of M: read along, then turned.
    fn rows_panel(&self, isa: Isa, first: usize, count: usize, depth: Range<usize>, scratch: &mut Vec<f32>, out: &mut [f32]) {
        let width = depth.len();
        let turn = |rows: &[f32], step: usize, out: &mut [f32]| {
            transpose(isa, (rows, step), (count, width), TILE_COLUMNS, (out, TILE_COLUMNS));
        };
        match self.matrix {
            Matrix::Weight(Weight::Awq(weight)) => weight.panel(isa, first, depth, out),
            Matrix::Weight(weight) => {
                scratch.resize(TILE_COLUMNS * width, 0.0);
                for (i, row) in scratch.chunks_exact_mut(width).enumerate().take(count) {
                    weight.decode(isa, first + i, depth.start, row);
                }
                turn(scratch, width, out);
            }
            Matrix::Values { values, columns } => turn(&values[first * columns + depth.start..], columns, out),
        }
    }

    /// The panel's columns are columns of M: a few values of each row, as they lie.
    fn columns_panel(&self, isa: Isa, first: usize, count: usize, depth: Range<usize>, scratch: &mut Vec<f32>, out: &mut [f32]) {
        if let Matrix::Weight(Weight::Awq(weight)) = self.matrix {
            // AWQ lies the other way: squares of 32 are turned.
            scratch.resize(TILE_COLUMNS * TILE_COLUMNS, 0.0);
            for (at, out) in depth.clone().step_by(TILE_COLUMNS).zip(out.chunks_mut(TILE_COLUMNS * TILE_COLUMNS)) {
                weight.panel(isa, at, first..first + count, scratch);
                let width = TILE_COLUMNS.min(depth.end - at);
                transpose(isa, (scratch, TILE_COLUMNS), (count, width), TILE_COLUMNS, (out, TILE_COLUMNS));
            }
            return;
        }
        for (row, out) in depth.zip(out.chunks_exact_mut(TILE_COLUMNS)) {
            let (values, beyond) = out.split_at_mut(count);
            beyond.fill(0.0);
            match self.matrix {
                Matrix::Weight(weight) => weight.decode(isa, row, first, values),
                Matrix::Values { values: all, columns } => values.copy_from_slice(&all[row * columns + first..][..count]),
            }
        }
    }
}

impl Weight {
    /// Output `row`'s weights from input `first` on, as many as `out` takes. AWQ lies the other way and is read by panels alone.
    fn decode(&self, isa: Isa, row: usize, first: usize, out: &mut [f32]) {
        match self {
            Weight::Dense(weight) => weight.decode(row, first, out),
            Weight::Nf4(weight) => weight.decode_on(isa, row, first, out),
            Weight::Awq(_) => {}
        }
    }
}
