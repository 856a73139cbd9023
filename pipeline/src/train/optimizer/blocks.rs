//! Owns optimiser state in 8 bits: blocks of [`BLOCK`] values, one code of a map each, scaled by the block's largest magnitude.
//! Refuses to know what the values mean.
//!
//! The one idea (Dettmers, Lewis, Shleifer and Zettlemoyer, "8-bit optimizers via block-wise quantization", 2022): a map whose entries
//! lie densely where they are large and reach down by decades, so that a value is kept to a few parts in a hundred near its block's
//! largest and still to its magnitude far below, and an outlier spoils no block but its own.

use crate::dynamic_map::{self, Sign, midpoints, nearest};
use rayon::prelude::*;
use std::sync::LazyLock;

/// Values that share a scale, as in bitsandbytes.
pub const BLOCK: usize = 256;
/// Smallest scale divided by, so that a block of zeros stays one.
const SMALLEST: f32 = 1e-38;

/// A map from codes to values in [-1, 1].
#[derive(Debug)]
struct Map {
    /// By code, rising.
    values: &'static [f32],
    /// Middles between neighbours.
    borders: Vec<f32>,
    /// The code of 0.
    zero: u8,
    /// The smallest code of a value that is above 0, where 0 stands for nothing but 0.
    least: u8,
}

static SIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(Sign::Signed));
static UNSIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(Sign::Unsigned));

impl Map {
    fn of(sign: Sign) -> &'static Map {
        match sign {
            Sign::Signed => &SIGNED,
            Sign::Unsigned => &UNSIGNED,
        }
    }

    fn new(sign: Sign) -> Map {
        let values = dynamic_map::values(sign);
        let zero = values.partition_point(|value| *value < 0.0) as u8;
        let least = if sign == Sign::Signed { zero } else { zero + 1 };
        Map { values, borders: midpoints(values), zero, least }
    }

    /// The code of the nearest entry, the lower one of two as near.
    ///
    /// A value of the unsigned map that is above 0 never becomes 0: it is a denominator, and a step divided by next to nothing has no
    /// bound.
    fn code(&self, value: f32) -> u8 {
        let nearest = nearest(&self.borders, value);
        if nearest == self.zero && value > 0.0 { self.least } else { nearest }
    }
}

/// A tensor's values in 8 bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Blocks {
    sign: Sign,
    /// One a value.
    pub(super) codes: Vec<u8>,
    /// Largest magnitude of each block.
    pub(super) absmax: Vec<f32>,
}

impl Blocks {
    /// Zeros.
    pub fn zeros(sign: Sign, values: usize) -> Blocks {
        Blocks { sign, codes: vec![Map::of(sign).zero; values], absmax: vec![0.0; values.div_ceil(BLOCK)] }
    }

    /// Codes, one a value, with the scale of each block of [`BLOCK`].
    pub(super) fn of(sign: Sign, codes: Vec<u8>, absmax: Vec<f32>) -> Blocks {
        Blocks { sign, codes, absmax }
    }

    /// The blocks in order, each to be read and written by one thread.
    pub(super) fn each(&mut self) -> impl IndexedParallelIterator<Item = Block<'_>> {
        let map = Map::of(self.sign);
        let parts = self.codes.par_chunks_mut(BLOCK).zip(&mut self.absmax);
        parts.map(move |(codes, absmax)| Block { map, codes, absmax })
    }
}

/// One block.
pub(super) struct Block<'a> {
    map: &'static Map,
    codes: &'a mut [u8],
    absmax: &'a mut f32,
}

impl Block<'_> {
    /// Its values; zeros beyond its length.
    pub(super) fn read(&self) -> [f32; BLOCK] {
        let mut values = [0.0; BLOCK];
        for (value, code) in values.iter_mut().zip(&*self.codes) {
            *value = self.map.values[usize::from(*code)] * *self.absmax;
        }
        values
    }

    /// Keeps `values`, each as the nearest entry times the largest magnitude.
    pub(super) fn write(&mut self, values: &[f32; BLOCK]) {
        let largest = values.iter().take(self.codes.len()).fold(0f32, |largest, value| largest.max(value.abs()));
        let inverse = 1.0 / largest.max(SMALLEST);
        for (code, value) in self.codes.iter_mut().zip(values) {
            *code = self.map.code(value * inverse);
        }
        *self.absmax = largest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn through(sign: Sign, given: &[f32]) -> (Vec<u8>, Vec<f32>) {
        let mut blocks = Blocks::zeros(sign, given.len());
        blocks.each().zip(given.par_chunks(BLOCK)).for_each(|(mut block, given)| {
            let mut values = [0.0; BLOCK];
            values[..given.len()].copy_from_slice(given);
            block.write(&values);
        });
        let back = blocks.each().map(|block| block.read()).collect::<Vec<_>>().concat();
        (blocks.codes, back[..given.len()].to_vec())
    }

    #[test]
    fn a_value_comes_back_to_half_a_step_of_its_decade() {
        let given: Vec<f32> = (0..700).map(|i| (i as f32 * 0.7).sin() * 10f32.powi(-(i % 3))).collect();
        let (_, back) = through(Sign::Signed, &given);
        for (given, back) in given.chunks(BLOCK).zip(back.chunks(BLOCK)) {
            let largest = given.iter().fold(0f32, |a, b| a.max(b.abs()));
            for (given, back) in given.iter().zip(back) {
                let decade = (-(given.abs() / largest).log10()).floor().min(6.0);
                let step = 0.9 * largest * 10f32.powf(-decade) / 2f32.powf(6.0 - decade);
                assert!((given - back).abs() <= 0.501 * step, "{given} {back}");
            }
        }
        let (codes, back) = through(Sign::Signed, &[0.0; 300]);
        assert!(codes.iter().all(|code| *code == 127) && back.iter().all(|value| *value == 0.0));
    }

    #[test]
    fn what_is_divided_by_never_becomes_zero() {
        let (codes, back) = through(Sign::Unsigned, &[1.0, 1e-12, 0.0]);
        assert_eq!((codes, back), (vec![255, 1, 0], vec![1.0, dynamic_map::values(Sign::Unsigned)[1], 0.0]));
        assert_eq!(through(Sign::Signed, &[1.0, 1e-12]).1, [1.0, 0.0]);
    }
}
