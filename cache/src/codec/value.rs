//! Log-probabilities as f32 with few mantissa bits: every Parquet reader knows the type, and the zero bits compress away.

/// Smallest tail that is told apart from nothing: ln 1e-9. A smaller tail is stored as this one (rounded).
pub const TAIL_FLOOR_LOGPROB: f32 = -20.723_266;

/// `x` rounded to `bits` mantissa bits (1 to 23; more changes nothing), to nearest, ties to even.
///
/// The relative error is at most 2^-(bits + 1). Infinities and NaN are returned as they are.
#[inline(always)]
pub fn round_to_mantissa(x: f32, bits: u8) -> f32 {
    let drop = 23 - u32::from(bits.clamp(1, 23));
    let raw = x.to_bits();
    // Half of the last kept place, less one where it is even already. Without branches, so that loops become vectors.
    let half = (1u32 << drop) >> 1;
    let odd = (raw >> drop) & 1;
    let rounded = raw.wrapping_add(half.saturating_sub(1) + odd.min(half)) & !((1 << drop) - 1);
    f32::from_bits(if x.is_finite() { rounded } else { raw })
}

/// A kept log-probability as it is stored: never above 0, rounded.
pub fn stored_logprob(logprob: f32, bits: u8) -> f32 {
    // Adding 0.0 turns -0.0 into 0.0, so that equal values have equal bits.
    round_to_mantissa(logprob.min(0.0) + 0.0, bits)
}

/// A tail's log-probability as it is stored: between [`TAIL_FLOOR_LOGPROB`] and 0, rounded. Minus infinity is allowed.
pub fn stored_tail_logprob(logprob: f32, bits: u8) -> f32 {
    stored_logprob(logprob.max(TAIL_FLOOR_LOGPROB), bits)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ties_go_to_the_even_neighbour() {
        // With 2 mantissa bits the neighbours of 1 are 1.25 steps; 1.125 and 1.375 lie half way.
        assert_eq!(round_to_mantissa(1.125, 2), 1.0);
        assert_eq!(round_to_mantissa(1.375, 2), 1.5);
        assert_eq!(round_to_mantissa(1.125_000_1, 2), 1.25);
        assert_eq!(round_to_mantissa(-1.375, 2), -1.5);
        assert_eq!(round_to_mantissa(1.99, 2), 2.0);
    }

    #[test]
    fn seven_bits_are_bfloat16() {
        assert_eq!(round_to_mantissa(-20.723_266, 7), -20.75);
        assert_eq!(stored_tail_logprob(f32::NEG_INFINITY, 7), -20.75);
        assert_eq!(stored_tail_logprob(-0.0, 7).to_bits(), 0);
        assert_eq!(stored_logprob(3e-7, 7).to_bits(), 0);
    }

    #[test]
    fn the_floor_is_ln_of_a_billionth() {
        assert_eq!(TAIL_FLOOR_LOGPROB, (1e-9f64).ln() as f32);
    }

    proptest! {
        #[test]
        fn rounding_is_close_idempotent_and_monotone(a in -1e4f32..0.0, b in -1e4f32..0.0, bits in 1u8..=23) {
            let (ra, rb) = (round_to_mantissa(a, bits), round_to_mantissa(b, bits));
            // Relative half a unit in the last kept place; subnormals are closer than any of these values.
            prop_assert!((ra - a).abs() <= a.abs() * 2f32.powi(-i32::from(bits) - 1) || a.abs() < f32::MIN_POSITIVE);
            prop_assert_eq!(round_to_mantissa(ra, bits).to_bits(), ra.to_bits());
            prop_assert!((a <= b) == (ra <= rb) || ra == rb);
            prop_assert_eq!(ra.to_bits() & ((1u32 << (23 - u32::from(bits))) - 1), 0);
        }
    }
}
