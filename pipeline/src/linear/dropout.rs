//! LoRA's dropout: which inputs of A a training step leaves out. Owns the mask alone; refuses to know layers, tensors or engines.
//!
//! The one idea: whether an input is left out is a pure function of its place, so the way back, or a second way there (activation
//! recomputation), finds the same mask without anything having been kept, on any number of threads and however rows fall into packs.
//!
//! ```text
//! key      64 bits of (seed, step, layer, projection)             every projection draws for itself, as PEFT's modules do
//! word     Philox4x32-7 of key and counter (32 · group + lane …)  32 bits for (row, column): 8 blocks of 4 words make 32 columns
//! out      0 where word < threshold, else x / (1 - p)             threshold = p · 2^32, to the nearest whole
//! ```
//! With the mask M, the adapter of a layer is y += scale · B (A (M ∘ x)); on the way back dA takes M ∘ x for x, and dx += M ∘ (Aᵀ du).
//!
//! Source: J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); seven rounds are the
//! fewest of Philox4x32 that pass BigCrush there.

use crate::kernel::vectorised;
use rayon::prelude::*;

/// Counters that go through the rounds together.
const BLOCKS: usize = 8;
/// Words of a counter and of what comes out.
const WORDS: usize = 4;
/// Columns of one round of blocks: column `GROUP · g + BLOCKS · w + i` takes word w of the block with counter `BLOCKS · g + i`.
const GROUP: usize = BLOCKS * WORDS;
/// Rounds of Philox.
const ROUNDS: usize = 7;
/// Philox4x32's multipliers.
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// What is added to the key between rounds: the golden ratio and √3 − 1, as in the publication.
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
/// Increment and multipliers of SplitMix64, which makes keys.
const SPLIT_MIX: [u64; 3] = [0x9E37_79B9_7F4A_7C15, 0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB];

/// Where a mask is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The run's seed.
    pub seed: u64,
    /// The optimiser's step.
    pub step: u64,
    /// The decoder layer.
    pub layer: usize,
    /// The projection within it.
    pub projection: usize,
}

/// What a decoder layer leaves out of the rows of a pack.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Share of the inputs that is left out, 0 ≤ p < 1.
    pub p: f64,
    /// The run's seed.
    pub seed: u64,
    /// The optimiser's step.
    pub step: u64,
    /// The decoder layer.
    pub layer: usize,
    /// Number, in the step, of the first row.
    pub first_row: usize,
}

impl Dropout {
    /// The same for rows that begin `rows` later.
    pub fn later(self, rows: usize) -> Self {
        Self { first_row: self.first_row + rows, ..self }
    }

    /// The masks of N neighbouring projections.
    pub fn masks<const N: usize>(dropout: Option<Self>, first_projection: usize) -> [Option<RowMask>; N] {
        std::array::from_fn(|i| {
            let Self { p, seed, step, layer, first_row } = dropout?;
            let mask = Mask::new(p, Place { seed, step, layer, projection: first_projection + i })?;
            Some(RowMask { mask, first_row })
        })
    }
}

/// A mask, and the number of the first row that it is laid on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowMask {
    mask: Mask,
    first_row: usize,
}

/// Rows that a thread takes at a time.
const ROWS_AT_ONCE: usize = 32;

impl RowMask {
    /// The mask, and the number of the first row that it is laid on.
    pub fn parts(&self) -> (Mask, usize) {
        (self.mask, self.first_row)
    }

    /// M ∘ x for rows of `width` columns.
    pub fn of(&self, x: &[f32], width: usize) -> Vec<f32> {
        let mut out = vec![0f32; x.len()];
        let size = (ROWS_AT_ONCE * width).max(1);
        out.par_chunks_mut(size).zip(x.par_chunks(size)).enumerate().for_each(|(i, (out, x))| {
            self.mask.apply(x, width, self.first_row + i * ROWS_AT_ONCE, out);
        });
        out
    }

    /// out += M ∘ x for rows of `width` columns.
    pub fn add(&self, x: &[f32], width: usize, out: &mut [f32]) {
        let size = (ROWS_AT_ONCE * width).max(1);
        out.par_chunks_mut(size).zip(x.par_chunks(size)).enumerate().for_each(|(i, (out, x))| {
            self.mask.add(x, width, self.first_row + i * ROWS_AT_ONCE, out);
        });
    }
}

/// Which of a projection's inputs are left out in a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mask {
    /// What all its words depend on.
    pub key: u64,
    /// Words below it leave their input out.
    pub threshold: u32,
    /// 1 / (1 - p), the factor of inputs that stay.
    pub scale: f32,
}

impl Mask {
    /// The mask that leaves out a share `p` of the inputs, 0 ≤ p < 1. `None` for 0, which leaves nothing out, and for what is no
    /// such share.
    pub fn new(p: f64, place: Place) -> Option<Self> {
        if !(p > 0.0 && p < 1.0) {
            return None;
        }
        let parts = [place.seed, place.step, place.layer as u64, place.projection as u64];
        let key = parts.into_iter().fold(0, |key, part| split_mix(key ^ part));
        let threshold = (p * 2f64.powi(32)).round() as u32;
        Some(Self { key, threshold, scale: (1.0 / (1.0 - p)) as f32 })
    }

    /// out = M ∘ x for rows of `width` columns, the first of which is row `first_row` of the step. Both are as long; what is beyond
    /// whole rows, or beyond the shorter of both, is left alone.
    ///
    /// Rows are numbered through all packs of a step, so that two packs of a step do not draw alike.
    pub fn apply(&self, x: &[f32], width: usize, first_row: usize, out: &mut [f32]) {
        self.rows(x, width, first_row, out, write_row);
    }

    /// out += M ∘ x; otherwise as [`apply`](Self::apply).
    pub fn add(&self, x: &[f32], width: usize, first_row: usize, out: &mut [f32]) {
        self.rows(x, width, first_row, out, add_row);
    }

    fn rows(&self, x: &[f32], width: usize, first_row: usize, out: &mut [f32], row: fn(&Mask, u64, &[f32], &mut [f32])) {
        let width = width.max(1);
        for ((number, x), out) in (first_row as u64..).zip(x.chunks_exact(width)).zip(out.chunks_exact_mut(width)) {
            row(self, number, x, out);
        }
    }

    /// The words of a group of columns.
    #[inline(always)]
    fn words(&self, row: u64, group: usize) -> [[u32; BLOCKS]; WORDS] {
        let first = (group * BLOCKS) as u32;
        let mut counter = [[0; BLOCKS], [row as u32; BLOCKS], [(row >> 32) as u32; BLOCKS], [0; BLOCKS]];
        for (i, block) in counter[0].iter_mut().enumerate() {
            *block = first.wrapping_add(i as u32);
        }
        philox(counter, [self.key as u32, (self.key >> 32) as u32])
    }
}

vectorised! {
    fn write_row(mask: &Mask, row: u64, x: &[f32], out: &mut [f32]) {
        for (group, (x, out)) in x.chunks(GROUP).zip(out.chunks_mut(GROUP)).enumerate() {
            let words = mask.words(row, group);
            for (word, (x, out)) in words.as_flattened().iter().zip(x.iter().zip(out)) {
                *out = if *word < mask.threshold { 0.0 } else { *x * mask.scale };
            }
        }
    }
}

vectorised! {
    fn add_row(mask: &Mask, row: u64, x: &[f32], out: &mut [f32]) {
        for (group, (x, out)) in x.chunks(GROUP).zip(out.chunks_mut(GROUP)).enumerate() {
            let words = mask.words(row, group);
            for (word, (x, out)) in words.as_flattened().iter().zip(x.iter().zip(out)) {
                *out += if *word < mask.threshold { 0.0 } else { *x * mask.scale };
            }
        }
    }
}

/// Philox4x32 of several counters with one key: word by word, block by block.
#[inline(always)]
fn philox(mut c: [[u32; BLOCKS]; WORDS], mut key: [u32; 2]) -> [[u32; BLOCKS]; WORDS] {
    for _ in 0..ROUNDS {
        let [c0, c1, c2, c3] = &mut c;
        for (((c0, c1), c2), c3) in c0.iter_mut().zip(c1).zip(c2).zip(c3) {
            let first = u64::from(MULTIPLIERS[0]) * u64::from(*c0);
            let second = u64::from(MULTIPLIERS[1]) * u64::from(*c2);
            *c0 = (second >> 32) as u32 ^ *c1 ^ key[0];
            *c1 = second as u32;
            *c2 = (first >> 32) as u32 ^ *c3 ^ key[1];
            *c3 = first as u32;
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    c
}

fn split_mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(SPLIT_MIX[0]);
    z = (z ^ z >> 30).wrapping_mul(SPLIT_MIX[1]);
    z = (z ^ z >> 27).wrapping_mul(SPLIT_MIX[2]);
    z ^ z >> 31
}

#[cfg(test)]
#[path = "dropout_tests.rs"]
mod tests;
