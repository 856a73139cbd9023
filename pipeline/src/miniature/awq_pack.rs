//! Float weights → AWQ GEMM int4.
//!
//! Owns the zero-point quantiser and the packed layout. Refuses activation-aware scaling (the "A" of AWQ): plain rounding is
//! enough for a miniature, and the files are the same. Layout, for W [out, in] and groups of g inputs:
//!
//! ```text
//! qweight i32 [in, out/8]     qzeros i32 [in/g, out/8]     scales f16 [in/g, out]
//! word c, bits 4i..4i+3  =  output column 8c + [0, 2, 4, 6, 1, 3, 5, 7][i]
//! W[o][i] = (q[i][o] - z[i/g][o]) · scale[i/g][o]
//! ```

use super::MiniatureError;
use half::f16;

/// Output column, counted from the word's first, that nibble i (bits 4i..4i+3) of a word holds.
pub const NIBBLE_COLUMNS: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
/// Largest code.
const TOP: f32 = 15.0;

/// One quantised linear layer.
#[derive(Debug, Clone, PartialEq)]
pub struct AwqMatrix {
    /// Inputs of the layer.
    pub inputs: usize,
    /// Outputs of the layer; a multiple of 8.
    pub outputs: usize,
    /// Inputs that share a scale; divides `inputs`.
    pub group: usize,
    /// Codes, [inputs, outputs/8].
    pub qweight: Vec<i32>,
    /// Zero points, [inputs/group, outputs/8].
    pub qzeros: Vec<i32>,
    /// Scales, [inputs/group, outputs].
    pub scales: Vec<f16>,
}

/// Quantises `weight` [outputs, inputs] (row-major) in groups of `group` inputs.
///
/// The range of a group is stretched to hold 0 and its scale is rounded up to f16, so that no weight is cut off: the error of
/// each is at most half a scale. Errors: counts that do not fit; a weight that is not finite or too large for an f16 scale.
pub fn quantise(weight: &[f32], outputs: usize, inputs: usize, group: usize) -> Result<AwqMatrix, MiniatureError> {
    if group == 0 || !inputs.is_multiple_of(group) || !outputs.is_multiple_of(8) || weight.len() != outputs * inputs {
        return Err(MiniatureError::Shape {
            what: "AWQ weight [outputs, inputs, values], inputs in whole groups and outputs in whole words".into(),
            expected: vec![outputs.next_multiple_of(8), inputs.next_multiple_of(group.max(1)), outputs * inputs],
            found: vec![outputs, inputs, weight.len()],
        });
    }
    let groups = inputs / group;
    let mut codes = vec![0u8; inputs * outputs];
    let mut zeros = vec![0u8; groups * outputs];
    let mut scales = vec![f16::ZERO; groups * outputs];
    for output in 0..outputs {
        for part in 0..groups {
            let first = part * group;
            let row = &weight[output * inputs + first..][..group];
            let (scale, zero) =
                range(row).map_err(|found| MiniatureError::Unscalable { output, first, last: first + group, found })?;
            scales[part * outputs + output] = scale;
            zeros[part * outputs + output] = zero;
            for (offset, &value) in row.iter().enumerate() {
                let code = (value / scale.to_f32()).round() + f32::from(zero);
                codes[(first + offset) * outputs + output] = code.clamp(0.0, TOP) as u8;
            }
        }
    }
    Ok(AwqMatrix { inputs, outputs, group, qweight: pack(&codes)?, qzeros: pack(&zeros)?, scales })
}

/// Packs codes (0..=15), eight to a word, in the layout above. The codes' rows are whole words, so rows do not matter here.
pub fn pack(codes: &[u8]) -> Result<Vec<i32>, MiniatureError> {
    if let Some((index, &found)) = codes.iter().enumerate().find(|(_, code)| **code > 15) {
        return Err(MiniatureError::Code { index, found });
    }
    let (words, rest) = codes.as_chunks::<8>();
    if !rest.is_empty() {
        let expected = vec![codes.len().next_multiple_of(8)];
        return Err(MiniatureError::Shape { what: "codes in whole words".into(), expected, found: vec![codes.len()] });
    }
    let word = |codes: &[u8; 8]| {
        let nibbles = NIBBLE_COLUMNS.iter().enumerate().map(|(i, &column)| u32::from(codes[column]) << (4 * i));
        nibbles.fold(0, |word, nibble| word | nibble).cast_signed()
    };
    Ok(words.iter().map(word).collect())
}

/// Scale and zero point of a group, or the number that allows none.
fn range(row: &[f32]) -> Result<(f16, u8), f32> {
    if let Some(&wrong) = row.iter().find(|value| !value.is_finite()) {
        return Err(wrong);
    }
    let low = row.iter().copied().fold(0.0, f32::min);
    let high = row.iter().copied().fold(0.0, f32::max);
    let step = (high - low) / TOP;
    let scale = round_up(step);
    if !scale.is_finite() {
        return Err(step);
    }
    let zero = (-low / scale.to_f32()).round().clamp(0.0, TOP) as u8;
    Ok((scale, zero))
}

/// The smallest positive f16 that is not below `step` (for 0 the smallest of all: any scale is exact there).
fn round_up(step: f32) -> f16 {
    let nearest = f16::from_f32(step);
    if nearest.to_f32() >= step && nearest > f16::ZERO { nearest } else { f16::from_bits(nearest.to_bits() + 1) }
}
