//! What the ids of a row of logits weigh: exp((z − shift) · factor), block by block, with some ids left out. Refuses to keep weights:
//! sums of blocks are kept, and a block's weights are computed again where they are looked at.
//!
//! The one idea: weights are f32, sums of them f64 in fixed lanes within a block and in the order of blocks over the row; so they
//! depend on the row alone. What is left out weighs nothing in its block's sum; it is never subtracted.

use super::exponential::exp;
use crate::kernel::vectorised;

/// Ids of a block.
pub(super) const BLOCK: usize = 128;
/// Independent partial sums of a block; fixed, so that every machine adds in the same order.
const LANES: usize = 16;
/// Weights below e^−87 are taken as 0: of a million ids that is 2e-32 at most, less than the last place of an f64 sum above this.
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
            let largest = (0..rest.sums.len()).flat_map(|b| rest.block(b)).fold(f32::NEG_INFINITY, f32::max);
            // Where nothing is left, all sums are 0 as they are.
            if largest > f32::NEG_INFINITY {
                rest.shift = largest;
                for block in 0..rest.sums.len() {
                    rest.sums[block] = block_sum(&rest.block(block), largest, 1.0);
                }
                rest.total = rest.sums.iter().sum();
            }
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
        weights_of(&self.block(block), self.shift)
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
fn raised(block: &[f32; BLOCK], shift: f32, factor: f32) -> [f32; BLOCK] {
    let mut weights = [0.0; BLOCK];
    for (weight, z) in weights.iter_mut().zip(block) {
        *weight = exp((z - shift) * factor);
    }
    weights
}

#[inline(always)]
fn sum_of(block: &[f32; BLOCK], shift: f32, factor: f32) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    for row in raised(block, shift, factor).as_chunks::<LANES>().0 {
        for (lane, weight) in lanes.iter_mut().zip(row) {
            *lane += f64::from(*weight);
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
    /// The sum of each block of a row; `sums` is overwritten.
    fn block_sums(z: &[f32], shift: f32, factor: f32, sums: &mut Vec<f64>) {
        let (blocks, rest) = z.as_chunks::<BLOCK>();
        sums.clear();
        sums.resize(blocks.len(), 0.0);
        for (sum, block) in sums.iter_mut().zip(blocks) {
            *sum = sum_of(block, shift, factor);
        }
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
    fn weights_of(block: &[f32; BLOCK], shift: f32) -> [f32; BLOCK] {
        raised(block, shift, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919) % 1009) as f32 * -0.03).collect()
    }

    /// One id after another, with nothing that could become a vector.
    fn twin(z: &[f32], shift: f32, factor: f32) -> Vec<f64> {
        let sum = |block: &[f32]| {
            let mut lanes = [0.0; LANES];
            for (i, z) in block.iter().enumerate() {
                lanes[i % LANES] += f64::from(exp(std::hint::black_box((z - shift) * factor)));
            }
            for half in [8, 4, 2, 1] {
                for i in 0..half {
                    lanes[i] += lanes[i + half];
                }
            }
            lanes[0]
        };
        z.chunks(BLOCK).map(sum).collect()
    }

    /// To the bit: the width of this machine's vectors decides nothing.
    #[test]
    fn vectors_change_no_bit() {
        for n in [1, 15, 127, 128, 129, 5000] {
            let (z, mut sums) = (row(n), Vec::new());
            let weights = Weights::of(&z, 0.5, &mut sums);
            assert_eq!(weights.sums(), twin(&z, 0.5, 1.0), "{n}");
            let last = weights.weights(n / BLOCK - usize::from(n % BLOCK == 0));
            let want = z.chunks(BLOCK).next_back().unwrap_or_default();
            assert!(last.iter().zip(want).all(|(w, z)| w.to_bits() == exp(std::hint::black_box(z - 0.5)).to_bits()), "{n}");
            assert!(last[want.len()..].iter().all(|w| *w == 0.0));
            assert_eq!(tempered_total(&z, 0.5, 0.7, &mut Vec::new()), twin(&z, 0.5, 0.7).iter().sum::<f64>(), "{n}");
        }
    }

    #[test]
    fn what_is_left_out_weighs_nothing_whatever_is_left() {
        for n in [1, 128, 400] {
            let z = row(n);
            for left_out in
                [vec![], vec![0], (0..n as u32).step_by(3).collect(), (1..n as u32).collect(), (0..n as u32).collect()]
            {
                let mut masked = z.clone();
                left_out.iter().for_each(|id| masked[*id as usize] = f32::NEG_INFINITY);
                let mut sums = Vec::new();
                let rest = Weights::of(&z, 0.0, &mut sums).without(&left_out);
                let want: f64 = masked.iter().map(|z| f64::from(*z).exp()).sum();
                // Two units, and a rounding of an exponent of up to 30.
                assert!((rest.total() * rest.shift().exp() - want).abs() <= 3e-6 * want, "{n}: {left_out:?}");
                let weighed = rest.weights(0);
                assert!(left_out.iter().take_while(|id| **id < BLOCK as u32).all(|id| weighed[*id as usize] == 0.0));
            }
        }
        // All that is left lies 200 below: 0 in f32 against the largest, all digits against its own.
        let mut sums = Vec::new();
        let rest = Weights::of(&[200.0, 0.0, -1.0], 200.0, &mut sums).without(&[0]);
        assert_eq!(rest.shift(), 0.0);
        assert!((rest.total() - (1.0 + (-1f64).exp())).abs() < 3e-7);
    }
}
