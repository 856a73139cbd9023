//! Owns the divergences between two coarse distributions and their gradients. Refuses to normalise: both sides sum to 1.
//!
//! Every divergence is a sum of terms that are each at least 0, so none falls below 0 whatever is rounded.

use super::Divergence;

/// What reverse KL reads for a stored probability of 0: ln of the smallest positive f32. The teacher's probability is not
/// known to be less, and an infinite loss teaches nothing.
const LEAST_LOGPROB: f64 = -103.278_929_903_431_85;
/// Below this |x| the series of eˣ − 1 − x is used; above it, subtraction costs at most two digits.
const SERIES_BELOW: f64 = 0.1;

/// The divergence in nats; `slope[i]` becomes dL / d(ln Q_i) with the other ln Q held (the normalisation is the caller's).
pub(super) fn evaluate(kind: Divergence, ln_p: &[f64], ln_q: &[f64], slope: &mut Vec<f64>) -> f64 {
    slope.clear();
    let mut value = 0.0;
    for (&ln_p, &ln_q) in ln_p.iter().zip(ln_q) {
        let (p, q) = (ln_p.exp(), ln_q.exp());
        match kind {
            Divergence::ForwardKl => {
                value += excess(p, ln_p, q, ln_q);
                slope.push(-p);
            }
            Divergence::ReverseKl => {
                let ln_p = ln_p.max(LEAST_LOGPROB);
                value += excess(q, ln_q, ln_p.exp(), ln_p);
                slope.push(weighted(q, ln_q - ln_p + 1.0));
            }
            Divergence::Jsd { beta } => {
                let m = beta * p + (1.0 - beta) * q;
                let ln_m = mixture(ln_p + beta.ln(), ln_q + (-beta).ln_1p());
                value += beta * excess(p, ln_p, m, ln_m) + (1.0 - beta) * excess(q, ln_q, m, ln_m);
                slope.push((1.0 - beta) * weighted(q, ln_q - ln_m));
            }
            Divergence::SkewedKl { skew } => {
                let own = ln_q + (-skew).ln_1p();
                let ln_m = mixture(ln_p + skew.ln(), own);
                value += excess(p, ln_p, skew * p + (1.0 - skew) * q, ln_m);
                // The student's share of M, as a difference of logarithms: at M near 0 a quotient would be 0 / 0.
                slope.push(-weighted(p, (own - ln_m).exp()));
            }
            Divergence::SkewedReverseKl { skew } => {
                let own = ln_q + skew.ln();
                let ln_m = mixture(ln_p + (-skew).ln_1p(), own);
                value += excess(q, ln_q, (1.0 - skew) * p + skew * q, ln_m);
                slope.push(weighted(q, ln_q - ln_m + 1.0 - (own - ln_m).exp()));
            }
            Divergence::TotalVariation => {
                let above = q - p;
                value += 0.5 * above.abs();
                slope.push(0.5 * q * if above == 0.0 { 0.0 } else { above.signum() });
            }
        }
    }
    value
}

/// The unnormalised top-k loss Σ P (ln P − ln Q), P of any sum; the slope as in [`evaluate`]. May be below 0.
pub(super) fn unnormalised(ln_p: &[f64], ln_q: &[f64], slope: &mut Vec<f64>) -> f64 {
    slope.clear();
    slope.extend(ln_p.iter().map(|ln_p| -ln_p.exp()));
    ln_p.iter().zip(ln_q).map(|(ln_p, ln_q)| weighted(ln_p.exp(), ln_p - ln_q)).sum()
}

/// a (ln a − ln b) − a + b, one entry's share of KL(a‖b): the last two terms cancel over a sum and make every share ≥ 0,
/// so that rounding cannot carry a divergence below 0. It is a (eˣ − 1 − x) with x = ln b − ln a.
fn excess(a: f64, ln_a: f64, b: f64, ln_b: f64) -> f64 {
    if a == 0.0 {
        return b;
    }
    let x = ln_b - ln_a;
    if x.abs() >= SERIES_BELOW {
        return b - a - a * x;
    }
    // x²/2 (1 + x/3 (1 + x/4 (… (1 + x/12)))): the next term is below 1e-18 of the sum.
    let series = (3..=12).rev().fold(1.0, |sum, n| 1.0 + x / f64::from(n) * sum);
    a * 0.5 * x * x * series
}

/// 0 · anything = 0, also where the logarithm is −∞.
fn weighted(weight: f64, value: f64) -> f64 {
    if weight == 0.0 { 0.0 } else { weight * value }
}

/// ln(eᵃ + eᵇ).
fn mixture(a: f64, b: f64) -> f64 {
    let (high, low) = if a >= b { (a, b) } else { (b, a) };
    if high == f64::NEG_INFINITY { high } else { high + (low - high).exp().ln_1p() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Divergence; 9] = [
        Divergence::ForwardKl,
        Divergence::ReverseKl,
        Divergence::Jsd { beta: 0.5 },
        Divergence::Jsd { beta: 0.1 },
        Divergence::SkewedKl { skew: 0.1 },
        Divergence::SkewedKl { skew: 0.9 },
        Divergence::SkewedReverseKl { skew: 0.1 },
        Divergence::SkewedReverseKl { skew: 0.9 },
        Divergence::TotalVariation,
    ];

    #[test]
    fn equal_distributions_are_zero_apart_and_none_is_below() {
        let ln_p: Vec<f64> = [0.7_f64, 0.2, 0.06, 0.04].iter().map(|p| p.ln()).collect();
        let mut slope = Vec::new();
        for kind in KINDS {
            // A logarithm off by its last place (1e-16) costs its square.
            let same = evaluate(kind, &ln_p, &ln_p, &mut slope);
            assert!((0.0..1e-30).contains(&same), "{kind:?}: {same:e}");
            for shift in [1e-12, 1e-9, 1e-4, 0.09, 0.11, 3.0] {
                let q = super::super::coarse::student(&[ln_p[0] + shift, ln_p[1], ln_p[2]], Some(ln_p[3]), 1.0);
                let value = evaluate(kind, &ln_p, &q, &mut slope);
                let naive: f64 = ln_p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
                assert!(value >= 0.0, "{kind:?} {shift}: {value:e}");
                if kind == Divergence::ForwardKl {
                    // Sums of four terms of size 1: 1e-15 is a few units in the last place.
                    assert!((value - naive).abs() < 1e-15, "{shift}: {value:e} {naive:e}");
                }
            }
        }
    }

    #[test]
    fn probabilities_of_zero_count_as_zero() {
        let zero = f64::NEG_INFINITY;
        let (half, mut slope) = (0.5_f64.ln(), Vec::new());
        assert!((evaluate(Divergence::ForwardKl, &[0.0, zero], &[half, half], &mut slope) - 2.0_f64.ln()).abs() < 1e-15);
        assert_eq!(slope, [-1.0, 0.0]);
        let reverse = evaluate(Divergence::ReverseKl, &[0.0, zero], &[half, half], &mut slope);
        assert!((reverse - (0.5 * half + 0.5 * (half - LEAST_LOGPROB))).abs() < 1e-13, "{reverse}");
        assert!(slope.iter().all(|s| s.is_finite()));
        let jsd = evaluate(Divergence::Jsd { beta: 0.5 }, &[0.0, zero], &[zero, 0.0], &mut slope);
        assert!((jsd - 2.0_f64.ln()).abs() < 1e-15 && slope.iter().all(|s| s.is_finite()));
        assert_eq!(evaluate(Divergence::ForwardKl, &[half, half], &[0.0, zero], &mut slope), f64::INFINITY);
        // Skewed divergences of what never meets are ln 1/α, and their slopes stay numbers.
        for kind in [Divergence::SkewedKl { skew: 0.1 }, Divergence::SkewedReverseKl { skew: 0.1 }] {
            let apart = evaluate(kind, &[0.0, zero], &[zero, 0.0], &mut slope);
            assert!((apart - 10.0_f64.ln()).abs() < 1e-15 && slope.iter().all(|s| s.is_finite()), "{kind:?}: {apart}");
        }
        assert_eq!(evaluate(Divergence::TotalVariation, &[0.0, zero], &[zero, 0.0], &mut slope), 1.0);
        assert_eq!(slope, [-0.0, 0.5]);
        // Both have nothing there: no NaN comes of it.
        for kind in KINDS {
            let value = evaluate(kind, &[half, half, zero], &[half, half, zero], &mut slope);
            assert!((0.0..1e-30).contains(&value) && slope.iter().all(|s| s.is_finite()), "{kind:?}: {value} {slope:?}");
        }
    }
}
