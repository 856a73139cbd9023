//! Owns the passes over a whole row of logits: largest value, sum of exponentials, exponentials in place. Refuses to know
//! what the sums are for.
//!
//! The one idea: the exponential is written out so that the compiler turns a row into vector instructions; a row of a
//! real vocabulary is 150,000 of them. Sums are f64 in [`LANES`] fixed lanes, so they do not depend on the machine.

/// Independent partial sums; fixed, so that every machine adds in the same order.
const LANES: usize = 8;
/// 1.5 · 2²³: adding it rounds an f32 of moderate size to the nearest integer, kept in the low bits.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; a small integer times the first is exact in f32.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Below this e^x is no normal f32; it is taken as 0.
const SMALLEST: f32 = -87.0;

/// e^x for x ≤ 0 within 2 units in the last place; NaN stays NaN.
///
/// x = n ln 2 + r with |r| ≤ ln 2 / 2, e^r by its Taylor series to r⁷ (remainder below 6e-9, a tenth of f32's unit).
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut series = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = series * r + coefficient;
    }
    // The integer n sits in the low bits; with the exponent's bias added it moves to the exponent field.
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < SMALLEST { 0.0 } else { series * power }
}

/// The largest value of a row; −∞ when it is empty. NaN is passed over here and shows in the sums.
pub(super) fn largest(row: &[f32]) -> f32 {
    row.iter().copied().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
}

/// Σ exp(z · factor − largest · factor) with `largest` = max z.
pub(super) fn sum(row: &[f32], largest: f32, factor: f32) -> f64 {
    let mut lanes = [0.0_f64; LANES];
    let mut chunks = row.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &z) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(exp((z - largest) * factor));
        }
    }
    for (lane, &z) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane += f64::from(exp((z - largest) * factor));
    }
    lanes.iter().sum()
}

/// Replaces every z by `weight · exp(z − largest) + tempered · exp((z − largest) · factor)`.
pub(super) fn replace(row: &mut [f32], largest: f32, weight: f64, tempered: f64, factor: f32) {
    let (weight, tempered) = (weight as f32, tempered as f32);
    if tempered == 0.0 {
        row.iter_mut().for_each(|z| *z = weight * exp(*z - largest));
    } else {
        row.iter_mut().for_each(|z| *z = weight * exp(*z - largest) + tempered * exp((*z - largest) * factor));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_f64_within_two_units() {
        let worst = (0..870_000)
            .map(|i| {
                let x = -(i as f32) * 1e-4;
                let exact = f64::from(x).exp();
                (f64::from(exp(x)) - exact).abs() / exact
            })
            .fold(0.0, f64::max);
        // One unit in the last place is 2^-23 relative at most.
        assert!(worst < 2.0 * f64::powi(2.0, -23), "{worst:e}");
        assert_eq!((exp(0.0), exp(-1000.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn a_row_with_nan_sums_to_nan() {
        let row = [1.0, f32::NAN, 2.0];
        assert_eq!(largest(&row), 2.0);
        assert!(sum(&row, 2.0, 1.0).is_nan());
        assert_eq!(largest(&[]), f32::NEG_INFINITY);
    }
}
