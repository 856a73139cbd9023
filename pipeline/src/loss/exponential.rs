//! Owns the passes over a whole row of logits: largest value, sum of exponentials, exponentials in place. Refuses to know
//! what the sums are for.
//!
//! The one idea: the compiler turns a row into vector instructions; a row of a real vocabulary is 150,000 of them. Sums are f64 in
//! [`LANES`] fixed lanes, so they do not depend on the machine.

use crate::kernel::vectorised;
use crate::ops::exponential::exp;

/// Independent partial sums; fixed, so that every machine adds in the same order.
const LANES: usize = 8;

vectorised! {
    /// The largest value of a row; −∞ when it is empty. NaN is passed over here and shows in the sums.
    pub(super) fn largest(row: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; 2 * LANES];
        let (chunks, rest) = row.as_chunks::<{ 2 * LANES }>();
        for chunk in chunks {
            higher(&mut lanes, chunk);
        }
        higher(&mut lanes, rest);
        lanes.iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
}

#[inline(always)]
fn higher(lanes: &mut [f32; 2 * LANES], values: &[f32]) {
    for (lane, &z) in lanes.iter_mut().zip(values) {
        *lane = if z > *lane { z } else { *lane };
    }
}

vectorised! {
    /// Σ exp(z · factor − largest · factor) with `largest` = max z.
    pub(super) fn sum(row: &[f32], largest: f32, factor: f32) -> f64 {
        let mut lanes = [0.0_f64; LANES];
        let (chunks, rest) = row.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, &z) in lanes.iter_mut().zip(chunk) {
                *lane += f64::from(exp((z - largest) * factor));
            }
        }
        for (lane, &z) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(exp((z - largest) * factor));
        }
        lanes.iter().sum()
    }
}

vectorised! {
    /// Replaces every z by `weight · exp(z − largest) + tempered · exp((z − largest) · factor)`.
    pub(super) fn replace(row: &mut [f32], largest: f32, weight: f64, tempered: f64, factor: f32) {
        let (weight, tempered) = (weight as f32, tempered as f32);
        if tempered == 0.0 {
            for z in row {
                *z = weight * exp(*z - largest);
            }
        } else if weight == 0.0 {
            for z in row {
                *z = tempered * exp((*z - largest) * factor);
            }
        } else {
            for z in row {
                *z = weight * exp(*z - largest) + tempered * exp((*z - largest) * factor);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_with_nan_sums_to_nan() {
        let row = [1.0, f32::NAN, 2.0];
        assert_eq!(largest(&row), 2.0);
        assert!(sum(&row, 2.0, 1.0).is_nan());
        assert_eq!(largest(&[]), f32::NEG_INFINITY);
    }
}
