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

use half::f16;
use rayon::prelude::*;

/// Output columns in a packed word.
pub const PER_WORD: usize = 8;
/// `ORDER[i]` is the column, within its eight, of nibble i of a word.
pub const ORDER: [usize; PER_WORD] = [0, 2, 4, 6, 1, 3, 5, 7];

/// An AWQ weight, [in, out].
#[derive(Debug, Clone)]
pub struct AwqWeight {
    inputs: usize,
    outputs: usize,
    group: usize,
    qweight: Vec<u32>,
    qzeros: Vec<u32>,
    scales: Vec<f16>,
}

impl AwqWeight {
    /// A weight from its stored parts, row-major. `None` when a length does not fit: `outputs` must be a multiple of 8, `inputs` of
    /// `group`, and the parts have in·out/8, in/g·out/8 and in/g·out elements.
    pub fn new(
        inputs: usize,
        outputs: usize,
        group: usize,
        qweight: Vec<u32>,
        qzeros: Vec<u32>,
        scales: Vec<f16>,
    ) -> Option<Self> {
        let words = outputs / PER_WORD;
        let fits = group > 0
            && outputs.is_multiple_of(PER_WORD)
            && inputs.is_multiple_of(group)
            && qweight.len() == inputs * words
            && qzeros.len() == inputs / group * words
            && scales.len() == inputs / group * outputs;
        fits.then_some(Self { inputs, outputs, group, qweight, qzeros, scales })
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
        let words = self.outputs / PER_WORD;
        out.par_chunks_mut(self.outputs).enumerate().for_each(|(i, row)| {
            let g = i / self.group;
            let packed = &self.qweight[i * words..(i + 1) * words];
            let zeros = &self.qzeros[g * words..(g + 1) * words];
            let scales = &self.scales[g * self.outputs..(g + 1) * self.outputs];
            for (c, values) in row.chunks_exact_mut(PER_WORD).enumerate() {
                let (q, z) = (unpack(packed[c]), unpack(zeros[c]));
                for j in 0..PER_WORD {
                    values[j] = f32::from(q[j] as i8 - z[j] as i8) * scales[c * PER_WORD + j].to_f32();
                }
            }
        });
        out
    }

    /// Codes 0..15, row-major [in, out].
    pub fn codes(&self) -> Vec<u8> {
        self.qweight.iter().flat_map(|word| unpack(*word)).collect()
    }

    /// Zero points 0..15, row-major [in/g, out].
    pub fn zeros(&self) -> Vec<u8> {
        self.qzeros.iter().flat_map(|word| unpack(*word)).collect()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        4 * (self.qweight.len() + self.qzeros.len()) + 2 * self.scales.len()
    }
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
