//! What the ids of a row of logits weigh: exp((z − shift) · factor), block by block, with some ids left out. Refuses to keep weights:
//! sums of blocks are kept, and a block's weights are computed again where they are looked at.
//!
//! The one idea: weights are f32, sums of them f64 in fixed lanes within a block and in the order of blocks over the row; so they
//! depend on the row alone. What is left out weighs nothing in its block's sum; it is never subtracted.

use super::exponential::exp;
use super::vectors::vectorised;

/// Ids of a block.
pub(super) const BLOCK: usize = 128;
/// Independent partial sums of a block; fixed, so that every machine adds in the same order.
const LANES: usize = 16;
/// Where all weights are at most 1, a sum above this has lost nothing to weights below e^−87 that are taken as 0: of a million ids
/// these are 1e-32 together, far below an f64's last place of 1e-18.
const SURE: f64 = 1e-15;

/// A row's weights.
pub(super) struct Weights<'a> {
    z: &'a [f32],
    /// Ids that weigh nothing, rising.
    left_out: &'a [u32],
    shift: f32,
    /// The sums of blocks.
    sums: &'a mut Vec<f64>,
    total: f64,
}

impl<'a> Weights<'a> {
    /// Weights exp(z − largest) of all ids of a row whose largest value is `largest`.
    pub(super) fn of(z: &'a [f32], largest: f32, sums: &'a mut Vec<f64>) -> Self {
        sums.clear();
        block_sums(z, largest, 1.0, sums);
        let total = sums.iter().sum();
        Self { z, left_out: &[], shift: largest, sums, total }
    }

    /// The same row but for `left_out` (rising). Where little is left, weights are taken from its own largest value.
    pub(super) fn without(self, left_out: &'a [u32]) -> Self {
        let mut rest = Self { left_out, ..self };
        for ids in left_out.chunk_by(|a, b| *a as usize / BLOCK == *b as usize / BLOCK) {
            let block = ids[0] as usize / BLOCK;
            rest.sums[block] = block_sum(&rest.block(block), rest.shift, 1.0);
        }
        rest.total = rest.sums.iter().sum();
        if rest.total < SURE {
            rest.shift = (0..rest.sums.len()).flat_map(|b| rest.block(b)).fold(f32::NEG_INFINITY, f32::max);
            for block in 0..rest.sums.len() {
                rest.sums[block] = block_sum(&rest.block(block), rest.shift, 1.0);
            }
            // Of nothing but −∞ there is no difference from the largest.
            rest.total = if rest.shift == f32::NEG_INFINITY { 0.0 } else { rest.sums.iter().sum() };
        }
        rest
    }

    /// What is taken from z before it is raised to a weight.
    pub(super) fn shift(&self) -> f64 {
        f64::from(self.shift)
    }

    /// The sums of blocks, added up in their order.
    pub(super) fn total(&self) -> f64 {
        self.total
    }

    /// The sum of each block of [`BLOCK`] ids.
    pub(super) fn sums(&self) -> &[f64] {
        self.sums
    }

    /// The weights of a block; beyond the row they are 0.
    pub(super) fn weights(&self, block: usize) -> [f32; BLOCK] {
        let mut weights = self.block(block);
        raise(&mut weights, self.shift);
        weights
    }

    /// The values of a block; −∞ for what is left out and beyond the row.
    fn block(&self, block: usize) -> [f32; BLOCK] {
        let start = block * BLOCK;
        let mut values = padded(&self.z[start..self.z.len().min(start + BLOCK)]);
        let first = self.left_out.partition_point(|id| (*id as usize) < start);
        for id in self.left_out[first..].iter().map(|id| *id as usize).take_while(|id| *id < start + BLOCK) {
            values[id - start] = f32::NEG_INFINITY;
        }
        values
    }
}

/// Σ exp((z − largest) · factor) over a row whose largest value is `largest`. `sums` is overwritten.
pub(super) fn tempered_total(z: &[f32], largest: f32, factor: f32, sums: &mut Vec<f64>) -> f64 {
    sums.clear();
    block_sums(z, largest, factor, sums);
    sums.iter().sum()
}

#[inline(always)]
fn padded(values: &[f32]) -> [f32; BLOCK] {
    let mut block = [f32::NEG_INFINITY; BLOCK];
    block[..values.len()].copy_from_slice(values);
    block
}

#[inline(always)]
fn sum_of(block: &[f32; BLOCK], shift: f32, factor: f32) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    for row in block.as_chunks::<LANES>().0 {
        for (lane, z) in lanes.iter_mut().zip(row) {
            *lane += f64::from(exp((z - shift) * factor));
        }
    }
    let mut half = LANES / 2;
    while half > 0 {
        let (low, high) = lanes.split_at_mut(half);
        for (low, high) in low.iter_mut().zip(high) {
            *low += *high;
        }
        half /= 2;
    }
    lanes[0]
}

vectorised! {
    /// Appends the sum of each block of a row.
    fn block_sums(z: &[f32], shift: f32, factor: f32, sums: &mut Vec<f64>) {
        let (blocks, rest) = z.as_chunks::<BLOCK>();
        sums.extend(blocks.iter().map(|block| sum_of(block, shift, factor)));
        if !rest.is_empty() {
            sums.push(sum_of(&padded(rest), shift, factor));
        }
    }
}

vectorised! {
    fn block_sum(block: &[f32; BLOCK], shift: f32, factor: f32) -> f64 {
        sum_of(block, shift, factor)
    }
}

vectorised! {
    fn raise(block: &mut [f32; BLOCK], shift: f32) {
        block.iter_mut().for_each(|z| *z = exp(*z - shift));
    }
}
