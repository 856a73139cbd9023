//! The exponential and the logistic function in f32, written out so that the compiler turns a loop over them into vectors. Refuses
//! slices and sums: those belong to whoever needs them.
//!
//! The one idea: multiplications, additions and a shift, without a table, a branch or a fused step, give the same bits on every
//! machine.

/// 1.5 · 2²³: adding it rounds an f32 of moderate size to the nearest integer, kept in the low bits.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; a small integer times the first is exact in f32.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Below this e^x is next to no normal f32; it is taken as 0.
const SMALLEST: f32 = -87.0;

/// e^x for x ≤ 0 within 2 units in the last place, and 0 for x < −87; NaN stays NaN. Above 88 it means nothing.
///
/// x = n ln 2 + r with |r| ≤ ln 2 / 2, e^r by its Taylor series to r⁷ (remainder below 6e-9, a tenth of f32's unit).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
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

/// 1 / (1 + e^−x) within 4 units in the last place for every x, 0 for x < −87; NaN stays NaN.
///
/// With t = e^−|x| it is 1 / (1 + t) or t / (1 + t): nothing overflows, and the small side keeps all its digits.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    let t = exp(-x.abs());
    (if x < 0.0 { t } else { 1.0 }) / (1.0 + t)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One unit in the last place is 2^-23 relative at most.
    const UNIT: f64 = 1.0 / (1 << 23) as f64;

    /// Largest relative difference from `exact` over x = i · 1e-4.
    fn worst(range: std::ops::Range<i32>, f: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> f64 {
        let off = |i| {
            let x = i as f32 * 1e-4;
            let exact = exact(f64::from(x));
            (f64::from(f(x)) - exact).abs() / exact
        };
        range.map(off).fold(0.0, f64::max)
    }

    #[test]
    fn exp_agrees_with_f64_within_two_units() {
        let worst = worst(-870_000..1, exp, f64::exp);
        assert!(worst < 2.0 * UNIT, "{worst:e}");
        assert_eq!((exp(0.0), exp(-0.0), exp(-1000.0), exp(-f32::MAX), exp(f32::NEG_INFINITY)), (1.0, 1.0, 0.0, 0.0, 0.0));
        assert!(exp(f32::NAN).is_nan());
        assert!((f64::from(exp(-f32::MIN_POSITIVE)) - 1.0).abs() <= UNIT);
    }

    /// Two units of e^x, and half of one each for the sum and the quotient.
    #[test]
    fn sigmoid_agrees_with_f64_within_four_units() {
        let worst = worst(-870_000..200_000, sigmoid, |x| 1.0 / (1.0 + (-x).exp()));
        assert!(worst < 4.0 * UNIT, "{worst:e}");
        assert_eq!((sigmoid(0.0), sigmoid(200.0), sigmoid(-200.0)), (0.5, 1.0, 0.0));
        assert_eq!((sigmoid(f32::INFINITY), sigmoid(f32::NEG_INFINITY)), (1.0, 0.0));
        assert!(sigmoid(f32::NAN).is_nan());
    }
}
