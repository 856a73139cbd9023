//! Dense weights as they are stored: f32, f16 or bf16, row-major [out, in]. Owns turning them into f32; refuses to copy them.

use crate::kernel::vectorised;
use bytes::Bytes;
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::ops::Range;

/// How an element is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// Four bytes.
    F32,
    /// Two bytes, IEEE.
    F16,
    /// Two bytes, the upper half of an f32.
    Bf16,
}

impl Stored {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Stored::F32 => 4,
            Stored::F16 | Stored::Bf16 => 2,
        }
    }
}

/// A dense weight, [out, in], in little-endian bytes that may lie in a mapped file.
#[derive(Debug, Clone)]
pub struct DenseWeight {
    outputs: usize,
    inputs: usize,
    stored: Stored,
    bytes: Bytes,
}

impl DenseWeight {
    /// A weight of `outputs` · `inputs` elements. `None` when the bytes are not exactly as many as these take.
    pub fn new(outputs: usize, inputs: usize, stored: Stored, bytes: Bytes) -> Option<Self> {
        let expected = outputs.checked_mul(inputs)?.checked_mul(stored.size())?;
        (bytes.len() == expected).then_some(Self { outputs, inputs, stored, bytes })
    }

    /// A weight of f32 values. `None` when there are not exactly `outputs` · `inputs`.
    pub fn from_f32(outputs: usize, inputs: usize, values: &[f32]) -> Option<Self> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self::new(outputs, inputs, Stored::F32, bytes.into())
    }

    /// Output features.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Input features.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// How an element is stored.
    pub fn stored(&self) -> Stored {
        self.stored
    }

    /// All of it as it is stored.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The first `outputs` rows, if there are so many.
    pub fn first_rows(&self, outputs: usize) -> Option<Self> {
        self.rows(0..outputs)
    }

    /// Some of the rows, if they are there, where they lie.
    pub fn rows(&self, rows: Range<usize>) -> Option<Self> {
        let place = |row: usize| row.checked_mul(self.inputs)?.checked_mul(self.stored.size());
        let (start, end) = (place(rows.start)?, place(rows.end)?);
        let there = rows.start <= rows.end && rows.end <= self.outputs;
        there.then(|| Self { outputs: rows.len(), bytes: self.bytes.slice(start..end), ..self.clone() })
    }

    /// Row `output` from input `first` on, as many values as `out` takes, exact.
    pub fn decode(&self, output: usize, first: usize, out: &mut [f32]) {
        let size = self.stored.size();
        let bytes = &self.bytes[(output * self.inputs + first) * size..][..out.len() * size];
        match self.stored {
            Stored::F32 => widen_f32(bytes, out),
            Stored::Bf16 => widen_bf16(bytes, out),
            Stored::F16 => {
                let mut halves = [f16::ZERO; 256];
                for (bytes, out) in bytes.chunks(2 * halves.len()).zip(out.chunks_mut(halves.len())) {
                    let halves = &mut halves[..out.len()];
                    for (half, b) in halves.iter_mut().zip(bytes.chunks_exact(2)) {
                        *half = f16::from_le_bytes([b[0], b[1]]);
                    }
                    halves.convert_to_f32_slice(out);
                }
            }
        }
    }

    /// All of it in f32, row-major [out, in].
    pub fn dequantize(&self) -> Vec<f32> {
        let mut all = vec![0f32; self.outputs * self.inputs];
        for (output, row) in all.chunks_mut(self.inputs.max(1)).enumerate() {
            self.decode(output, 0, row);
        }
        all
    }
}

vectorised! {
    fn widen_f32(bytes: &[u8], out: &mut [f32]) {
        for (out, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
            *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }
    }
}

vectorised! {
    fn widen_bf16(bytes: &[u8], out: &mut [f32]) {
        for (out, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
            *out = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
        }
    }
}
