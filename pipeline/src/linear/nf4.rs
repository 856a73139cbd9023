//! NF4 with double quantisation, in bitsandbytes' layout.
//!
//! Owns quantising, dequantising and the two code tables; knows nothing of products or devices. Blocks run over the flat
//! row-major tensor: element *i* belongs to block *i / 64* whatever its row, so a row length that is no multiple of 64 is fine.
//!
//! ```text
//! codes     u8 [ceil(n/2)]       two 4-bit codes a byte, the first in the high nibble
//! absmax    u8 [ceil(n/64)]      index into the 256-entry dynamic map, one a block
//! nested    f32 [blocks/256]     scale of 256 absmax values;   offset f32: mean of all absmax values
//! value(i) = NF4[code(i)] * (MAP[absmax[i/64]] * nested[i/64/256] + offset)
//! ```
//! Source of the formulas: QLoRA (arXiv 2305.14314) and the stored format of bitsandbytes; compared with its files in the tests.

use crate::dynamic_map::{self, Sign, midpoints, nearest};
use crate::kernel::Isa;
use bytes::Bytes;
use rayon::prelude::*;
use std::sync::{Arc, OnceLock};

/// Elements that share one absolute maximum.
pub const BLOCK: usize = 64;
/// Absolute maxima that share one nested scale.
pub const NESTED_BLOCK: usize = 256;

/// The sixteen NF4 levels: quantiles of a normal distribution, with an exact zero, scaled to [-1, 1].
pub const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Code of zero, also written for a block of zeros (as bitsandbytes does on a CPU) and of numbers below 3e-39, and as padding of an odd
/// length.
const ZERO_CODE: u8 = 7;

/// A weight of `rows * columns` elements in NF4 with double quantisation.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4Weight {
    rows: usize,
    columns: usize,
    // Shared by copies of the weight.
    codes: Bytes,
    absmax: Bytes,
    nested_absmax: Arc<[f32]>,
    nested_offset: f32,
}

impl Nf4Weight {
    /// Quantises `values`, row-major [rows, columns] (a linear layer's [out, in]). `None` unless there are exactly rows · columns
    /// values and all are finite: there is no code for another one.
    pub fn quantize(values: &[f32], rows: usize, columns: usize) -> Option<Self> {
        let n = values.len();
        if rows.checked_mul(columns) != Some(n) || !values.par_iter().all(|v| v.is_finite()) {
            return None;
        }
        let blocks = n.div_ceil(BLOCK);
        let mut codes = vec![(ZERO_CODE << 4) | ZERO_CODE; n.div_ceil(2)];
        let mut maxima = vec![0f32; blocks];
        values.par_chunks(BLOCK).zip(codes.par_chunks_mut(BLOCK / 2)).zip(maxima.par_iter_mut()).for_each(
            |((block, codes), maximum)| {
                *maximum = block.iter().fold(0f32, |m, v| m.max(v.abs()));
                quantize_block(block, *maximum, codes);
            },
        );
        let (absmax, nested_absmax, nested_offset) = quantize_maxima(&maxima);
        let (codes, absmax, nested_absmax) = (codes.into(), absmax.into(), nested_absmax.into());
        Some(Self { rows, columns, codes, absmax, nested_absmax, nested_offset })
    }

    /// The weight, row-major [rows, columns], in f32 (one f32 product an element, not rounded further).
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0f32; self.rows * self.columns];
        out.par_chunks_mut(self.columns.max(1)).enumerate().for_each(|(row, out)| self.decode(row, 0, out));
        out
    }

    /// Values of row `row` from column `first` on, as many as `out` takes; as [`dequantize`](Self::dequantize) gives them.
    pub fn decode(&self, row: usize, first: usize, out: &mut [f32]) {
        self.decode_on(Isa::best(), row, first, out);
    }

    /// [`decode`](Self::decode) with the instructions given: the same bits.
    pub fn decode_on(&self, isa: Isa, row: usize, first: usize, out: &mut [f32]) {
        let mut at = row * self.columns + first;
        let mut rest = out;
        while !rest.is_empty() {
            let (here, later) = rest.split_at_mut((BLOCK - at % BLOCK).min(rest.len()));
            let scale = self.block_scale(at / BLOCK);
            let length = here.len();
            let mut done = 0;
            #[cfg(target_arch = "x86_64")]
            if isa.has_avx512() && at.is_multiple_of(2) {
                let codes = &self.codes[at / 2..][..length / 16 * 8];
                done = 2 * codes.len();
                // SAFETY: the processor has AVX-512.
                unsafe { x86::decode(codes, scale, &mut here[..done]) };
            }
            for (at, value) in (at + done..).zip(&mut here[done..]) {
                let byte = self.codes[at / 2];
                *value = LEVELS[usize::from(if at.is_multiple_of(2) { byte >> 4 } else { byte & 15 })] * scale;
            }
            at += length;
            rest = later;
        }
        let _ = isa;
    }

    /// Output features of a linear layer.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features of a linear layer.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Packed codes, two a byte, the first in the high nibble: u8 [ceil(n/2)].
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Quantised absolute maxima: u8 [ceil(n/64)].
    pub fn absmax(&self) -> &[u8] {
        &self.absmax
    }

    /// Scales of the absolute maxima: f32 [ceil(blocks/256)].
    pub fn nested_absmax(&self) -> &[f32] {
        &self.nested_absmax
    }

    /// Mean of the absolute maxima.
    pub fn nested_offset(&self) -> f32 {
        self.nested_offset
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.codes.len() + self.absmax.len() + 4 * self.nested_absmax.len() + 4
    }

    fn block_scale(&self, block: usize) -> f32 {
        dynamic_map()[self.absmax[block] as usize] * self.nested_absmax[block / NESTED_BLOCK] + self.nested_offset
    }
}

/// Codes of one block: the number of midpoints between neighbouring levels that lie below x / maximum.
fn quantize_block(block: &[f32], maximum: f32, codes: &mut [u8]) {
    let inverse = 1.0 / maximum;
    // Of 0, or of a number so near to it that its inverse is none: all of the block is 0, as its codes are already.
    if !inverse.is_finite() {
        return;
    }
    for (pair, byte) in block.chunks(2).zip(codes.iter_mut()) {
        let code = |v: Option<&f32>| v.map_or(ZERO_CODE, |v| nearest(level_midpoints(), v * inverse));
        *byte = (code(pair.first()) << 4) | code(pair.get(1));
    }
}

/// Second level: (codes, scales of 256 codes, offset).
fn quantize_maxima(maxima: &[f32]) -> (Vec<u8>, Vec<f32>, f32) {
    let offset = (maxima.iter().map(|v| f64::from(*v)).sum::<f64>() / maxima.len().max(1) as f64) as f32;
    let mut codes = vec![0u8; maxima.len()];
    let mut scales = Vec::with_capacity(maxima.len().div_ceil(NESTED_BLOCK));
    let thresholds = dynamic_midpoints();
    for (block, codes) in maxima.chunks(NESTED_BLOCK).zip(codes.chunks_mut(NESTED_BLOCK)) {
        let scale = block.iter().fold(0f32, |m, v| m.max((v - offset).abs()));
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        for (value, code) in block.iter().zip(codes) {
            *code = nearest(thresholds, (value - offset) * inverse);
        }
        scales.push(scale);
    }
    (codes, scales, offset)
}

fn level_midpoints() -> &'static [f32] {
    static MIDPOINTS: OnceLock<Vec<f32>> = OnceLock::new();
    MIDPOINTS.get_or_init(|| midpoints(&LEVELS))
}

fn dynamic_midpoints() -> &'static [f32] {
    static MIDPOINTS: OnceLock<Vec<f32>> = OnceLock::new();
    MIDPOINTS.get_or_init(|| midpoints(dynamic_map()))
}

/// The map of the absolute maxima, 256 rising values.
pub fn dynamic_map() -> &'static [f32] {
    dynamic_map::values(Sign::Signed)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::LEVELS;
    use std::arch::x86_64::*;

    /// Eight bytes at a time: spread over sixteen lanes, shifted to their nibbles, looked up and scaled.
    #[target_feature(enable = "avx512f")]
    pub(super) fn decode(codes: &[u8], scale: f32, out: &mut [f32]) {
        // SAFETY: there are sixteen levels.
        let levels = unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) };
        let (scale, low) = (_mm512_set1_ps(scale), _mm512_set1_epi64(0x0000_0000_0000_000f));
        let high = _mm512_set1_epi64(0x0000_000f_0000_0000);
        for (bytes, out) in codes.as_chunks::<8>().0.iter().zip(out.as_chunks_mut::<16>().0) {
            // A 64-bit lane a byte: its high nibble belongs in the lower half, its low nibble in the upper.
            let bytes = _mm512_cvtepu8_epi64(_mm_cvtsi64_si128(i64::from_le_bytes(*bytes)));
            let first = _mm512_and_si512(_mm512_srli_epi64::<4>(bytes), low);
            let second = _mm512_and_si512(_mm512_slli_epi64::<32>(bytes), high);
            let values = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_or_si512(first, second), levels), scale);
            // SAFETY: sixteen values.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), values) };
        }
    }
}
