//! How well a distribution's confidence is kept: expected calibration error, with bins of equal mass.
//!
//! Naeini, Cooper and Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning", 2015: the N positions, sorted by
//! confidence c = max q, are cut into [`BINS`] stretches of equal length; ECE = Σ over bins |Σ over their positions (hit − c)| / N with
//! hit = 1 where argmax q is the data's next token, else 0. It is 0 where confidence is kept in every bin, and at most 1.

/// Bins of a calibration error (fewer positions than that leave some empty).
pub const BINS: usize = 15;

/// ECE of (confidence, hit), with [`BINS`] bins of equal mass; 0 of no positions.
pub(crate) fn calibration_error(mut positions: Vec<(f64, bool)>) -> f64 {
    // A stable sort, so that equal confidences stay in the positions' order.
    positions.sort_by(|a, b| a.0.total_cmp(&b.0));
    let n = positions.len();
    let bin = |b: usize| &positions[b * n / BINS..(b + 1) * n / BINS];
    let gap = |bin: &[(f64, bool)]| bin.iter().map(|(c, hit)| f64::from(u8::from(*hit)) - c).sum::<f64>().abs();
    (0..BINS).map(|b| gap(bin(b))).sum::<f64>() / n.max(1) as f64
}

/// Place and value of the first of the largest values; place 0 of none.
pub(crate) fn top(values: impl Iterator<Item = f32>) -> (usize, f32) {
    values.enumerate().fold((0, f32::NEG_INFINITY), |best, (i, value)| if value > best.1 { (i, value) } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calibration_is_measured_in_bins_of_equal_mass() {
        // 30 positions, two a bin: confidences i/30, of which each second one is right. A bin's gap is |1 − (c_even + c_odd)|.
        let positions: Vec<(f64, bool)> = (0..30).map(|i| (f64::from(i) / 30.0, i % 2 == 0)).collect();
        let expected: f64 = (0..15).map(|b| (1.0 - f64::from(4 * b + 1) / 30.0).abs()).sum::<f64>() / 30.0;
        assert!((calibration_error(positions.clone()) - expected).abs() < 1e-15);
        let backwards: Vec<(f64, bool)> = positions.into_iter().rev().collect();
        assert!((calibration_error(backwards) - expected).abs() < 1e-15, "the order does not matter");
        // Five bins of 0.1 and ten of 0.9, each off by 0.9; one bin with everything would say 0.3.
        let split: Vec<(f64, bool)> = (0..300).map(|i| if i % 3 == 0 { (0.1, true) } else { (0.9, false) }).collect();
        assert!((calibration_error(split) - 0.9).abs() < 1e-12);
        // Calibrated: of 10 positions at 0.9 in each bin, 9 are right.
        let right: Vec<(f64, bool)> = (0..150).map(|i| (0.9, i % 10 != 3)).collect();
        assert!(calibration_error(right) < 1e-12);
        // Fewer positions than bins.
        assert!((calibration_error(vec![(0.75, true), (0.25, false)]) - 0.25).abs() < 1e-15);
        assert_eq!(calibration_error(Vec::new()), 0.0);
    }
}
