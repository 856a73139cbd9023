//! AWQ int4 weights in the GEMM layout, with zero points.
//!
//! Owns packing order and unpacking; knows nothing of products or files. A layer with `in` inputs, `out` outputs and groups of
//! g inputs has `qweight` [in, out/8], `qzeros` [in/g, out/8] (32-bit words) and `scales` [in/g, out]:
//!
//! ```text
//! bits 4i..4i+3 of word c  =  output column 8c + [0, 2, 4, 6, 1, 3, 5, 7][i]        (qweight and qzeros alike)
//! W[i][o] = (q[i][o] - z[i/g][o]) * scale[i/g][o]                                  (nothing is added to z)
//! ```
//! The product is exact in f32: q - z has 5 bits and a scale 11.

use crate::kernel::{Isa, TILE_COLUMNS};
use bytes::Bytes;
use half::f16;
use rayon::prelude::*;
use std::ops::Range;

/// Output columns in a packed word.
pub const PER_WORD: usize = 8;
/// `ORDER[i]` is the column, within its eight, of nibble i of a word.
pub const ORDER: [usize; PER_WORD] = [0, 2, 4, 6, 1, 3, 5, 7];

/// An AWQ weight, [in, out], in little-endian bytes that may lie in a mapped file.
#[derive(Debug, Clone)]
pub struct AwqWeight {
    inputs: usize,
    outputs: usize,
    group: usize,
    qweight: Bytes,
    qzeros: Bytes,
    scales: Bytes,
}

impl AwqWeight {
    /// A weight from its stored parts, row-major. `None` when a length does not fit: `outputs` must be a multiple of 8, `inputs` of
    /// `group`, and the parts have in·out/8 words, in/g·out/8 words and in/g·out halves.
    pub fn new(inputs: usize, outputs: usize, group: usize, qweight: Bytes, qzeros: Bytes, scales: Bytes) -> Option<Self> {
        if group == 0 || !outputs.is_multiple_of(PER_WORD) || !inputs.is_multiple_of(group) {
            return None;
        }
        let bytes = |rows: usize, columns: usize, each: usize| rows.checked_mul(columns)?.checked_mul(each);
        let (groups, words) = (inputs / group, outputs / PER_WORD);
        let fits = bytes(inputs, words, 4) == Some(qweight.len())
            && bytes(groups, words, 4) == Some(qzeros.len())
            && bytes(groups, outputs, 2) == Some(scales.len());
        fits.then_some(Self { inputs, outputs, group, qweight, qzeros, scales })
    }

    /// The same from numbers.
    pub fn from_values(
        inputs: usize,
        outputs: usize,
        group: usize,
        qweight: &[u32],
        qzeros: &[u32],
        scales: &[f16],
    ) -> Option<Self> {
        let words = |words: &[u32]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>().into();
        let scales = scales.iter().flat_map(|s| s.to_le_bytes()).collect::<Vec<u8>>().into();
        Self::new(inputs, outputs, group, words(qweight), words(qzeros), scales)
    }

    /// Input features.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Output features.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// The weight row-major as [in, out] in f32, exact; y = x · W without a transpose.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0f32; self.inputs * self.outputs];
        out.par_chunks_mut(self.outputs.max(1)).enumerate().for_each(|(i, row)| {
            for (c, values) in row.chunks_exact_mut(PER_WORD).enumerate() {
                self.word(i, c, values);
            }
        });
        out
    }

    /// Columns `first` to `first` + 31 of the inputs given, zeros beyond the last column: out f32 `[inputs][32]`. `first` is a multiple
    /// of 8.
    pub fn panel(&self, isa: Isa, first: usize, inputs: Range<usize>, out: &mut [f32]) {
        let words = (self.outputs - first).min(TILE_COLUMNS) / PER_WORD;
        #[cfg(target_arch = "x86_64")]
        if isa.has_avx512() && words * PER_WORD == TILE_COLUMNS {
            // SAFETY: the processor has AVX-512. The lengths of the parts were checked when the weight was made, and all 32 columns
            // are there.
            return unsafe { x86::panel(self, first, inputs, out) };
        }
        let _ = isa;
        for (i, row) in inputs.zip(out.chunks_exact_mut(TILE_COLUMNS)) {
            for (c, values) in row.chunks_exact_mut(PER_WORD).enumerate() {
                if c < words { self.word(i, first / PER_WORD + c, values) } else { values.fill(0.0) }
            }
        }
    }

    /// The eight values of word `c` of input `i`.
    fn word(&self, i: usize, c: usize, values: &mut [f32]) {
        let (group, words) = (i / self.group, self.outputs / PER_WORD);
        let (q, z) = (unpack(word_at(&self.qweight, i * words + c)), unpack(word_at(&self.qzeros, group * words + c)));
        let scales = &self.scales[2 * (group * self.outputs + c * PER_WORD)..][..2 * PER_WORD];
        for (j, (value, scale)) in values.iter_mut().zip(scales.chunks_exact(2)).enumerate() {
            *value = f32::from(q[j] as i8 - z[j] as i8) * f16::from_le_bytes([scale[0], scale[1]]).to_f32();
        }
    }

    /// Inputs that share a scale and a zero point.
    pub fn group(&self) -> usize {
        self.group
    }

    /// The stored parts: `qweight`, `qzeros` and `scales`.
    pub fn parts(&self) -> [&[u8]; 3] {
        [&self.qweight, &self.qzeros, &self.scales]
    }

    /// Codes 0..15, row-major [in, out].
    pub fn codes(&self) -> Vec<u8> {
        (0..self.qweight.len() / 4).flat_map(|i| unpack(word_at(&self.qweight, i))).collect()
    }

    /// Zero points 0..15, row-major [in/g, out].
    pub fn zeros(&self) -> Vec<u8> {
        (0..self.qzeros.len() / 4).flat_map(|i| unpack(word_at(&self.qzeros, i))).collect()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.qweight.len() + self.qzeros.len() + self.scales.len()
    }
}

fn word_at(bytes: &[u8], i: usize) -> u32 {
    let b = &bytes[4 * i..4 * i + 4];
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

/// The eight codes of a word, in column order.
pub fn unpack(word: u32) -> [u8; PER_WORD] {
    let mut columns = [0; PER_WORD];
    for (i, column) in ORDER.iter().enumerate() {
        columns[*column] = (word >> (4 * i) & 15) as u8;
    }
    columns
}

/// The word that holds eight codes (0..15) given in column order.
pub fn pack(columns: [u8; PER_WORD]) -> u32 {
    ORDER.iter().enumerate().fold(0, |word, (i, column)| word | u32::from(columns[*column] & 15) << (4 * i))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{AwqWeight, PER_WORD};
    use crate::kernel::TILE_COLUMNS;
    use half::f16;
    use std::arch::x86_64::*;
    use std::ops::Range;

    /// Four words at a time: each spread over eight lanes, shifted to its column's nibble.
    ///
    /// SAFETY: columns `first..first + 32` and the inputs must be there, and `out` must hold 32 values for each input.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn panel(weight: &AwqWeight, first: usize, inputs: Range<usize>, out: &mut [f32]) {
        let out = &mut out[..inputs.len() * TILE_COLUMNS];
        let words = weight.outputs / PER_WORD;
        let column = |row: usize| 4 * (row * words + first / PER_WORD);
        let mut i = inputs.start;
        for group in inputs.start / weight.group..inputs.end.div_ceil(weight.group) {
            let mut scales = [0f32; TILE_COLUMNS];
            let stored = &weight.scales[2 * (group * weight.outputs + first)..][..2 * TILE_COLUMNS];
            for (scale, b) in scales.iter_mut().zip(stored.chunks_exact(2)) {
                *scale = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
            // SAFETY: four words of this group's zero points, 32 scales, four words of each input, 32 values of each in `out`.
            unsafe {
                let (z0, z1) = spread(weight.qzeros[column(group)..][..16].as_ptr());
                let (s0, s1) = (_mm512_loadu_ps(scales.as_ptr()), _mm512_loadu_ps(scales.as_ptr().add(16)));
                while i < inputs.end.min((group + 1) * weight.group) {
                    let (q0, q1) = spread(weight.qweight[column(i)..][..16].as_ptr());
                    let (w0, w1) = (_mm512_cvtepi32_ps(_mm512_sub_epi32(q0, z0)), _mm512_cvtepi32_ps(_mm512_sub_epi32(q1, z1)));
                    let out = out[(i - inputs.start) * TILE_COLUMNS..][..TILE_COLUMNS].as_mut_ptr();
                    _mm512_storeu_ps(out, _mm512_mul_ps(w0, s0));
                    _mm512_storeu_ps(out.add(16), _mm512_mul_ps(w1, s1));
                    i += 1;
                }
            }
        }
    }

    /// The 32 codes of four words, in column order.
    ///
    /// SAFETY: `words` must point at 16 bytes.
    #[target_feature(enable = "avx512f")]
    unsafe fn spread(words: *const u8) -> (__m512i, __m512i) {
        // SAFETY: the caller's promise.
        let words = _mm512_castsi128_si512(unsafe { _mm_loadu_si128(words.cast()) });
        let low = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        let high = _mm512_add_epi32(low, _mm512_set1_epi32(2));
        // Column j sits in nibble [0, 4, 1, 5, 2, 6, 3, 7][j]: the inverse of `ORDER`.
        let shifts = _mm512_set_epi32(28, 12, 24, 8, 20, 4, 16, 0, 28, 12, 24, 8, 20, 4, 16, 0);
        let codes = |lanes| {
            let spread = _mm512_permutexvar_epi32(lanes, words);
            _mm512_and_si512(_mm512_srlv_epi32(spread, shifts), _mm512_set1_epi32(15))
        };
        (codes(low), codes(high))
    }
}
