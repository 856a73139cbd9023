//! One tensor: what its random bits mean, and how it is drawn and written block by block.

use crate::Failure;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;
use std::fs::File;
use std::io::Write;

/// Bytes drawn from one stream. Part of what a seed means.
const BLOCK: usize = 4 << 20;
/// Blocks drawn at a time.
const ROUND: usize = 16;

/// How a tensor's random bits become values.
pub enum Values {
    /// Sixteen bits choose one of these.
    Chosen(Vec<u16>),
    /// Eight int4 values in each word, all alike.
    Codes,
    /// The same with 7 or 8 only.
    Zeros,
}

pub struct Tensor {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub values: Values,
}

impl Tensor {
    pub fn bytes(&self) -> usize {
        let width = if self.dtype == "I32" { 4 } else { 2 };
        width * self.shape.iter().product::<usize>()
    }

    /// Writes the data, block by block.
    pub fn write(&self, file: &mut File, seed: u64, number: usize) -> Result<(), Failure> {
        let blocks = self.bytes().div_ceil(BLOCK);
        for first in (0..blocks).step_by(ROUND) {
            let round: Vec<Vec<u8>> = (first..blocks.min(first + ROUND))
                .into_par_iter()
                .map(|block| {
                    let mut bytes = vec![0; BLOCK.min(self.bytes() - block * BLOCK)];
                    let mut generator = ChaCha8Rng::seed_from_u64(seed);
                    generator.set_stream((number as u64) << 32 | block as u64);
                    generator.fill_bytes(&mut bytes);
                    self.values.shape(&mut bytes);
                    bytes
                })
                .collect();
            round.iter().try_for_each(|block| file.write_all(block))?;
        }
        Ok(())
    }
}

impl Values {
    fn shape(&self, bytes: &mut [u8]) {
        match self {
            Values::Codes => {}
            Values::Zeros => bytes.iter_mut().for_each(|byte| *byte = 0x77 + (*byte & 0x11)),
            Values::Chosen(from) => bytes.chunks_exact_mut(2).for_each(|pair| {
                let chosen = from[u16::from_le_bytes([pair[0], pair[1]]) as usize % from.len()];
                pair.copy_from_slice(&chosen.to_le_bytes());
            }),
        }
    }
}
