//! What rounding costs: KL(given, stored) of one position, both normalised over the kept tokens and the tail.
//!
//! With p the given probabilities divided by their sum and δ = given − stored log-probability,
//!
//! ```text
//! KL = A + ln(1 − A + R),   A = Σ p δ,   R = Σ p (exp(−δ) − 1 + δ)
//! ```
//!
//! R is summed from its series, so nothing cancels where KL is a millionth; one exponential an entry, in f32 lanes that the compiler
//! turns into vector instructions.

/// Independent partial sums; fixed, so that every machine adds in the same order.
const LANES: usize = 8;
/// Beyond this |δ| the series is left for the exponential itself (few mantissa bits only).
const SERIES_BELOW: f32 = 0.5;

/// KL(given, stored) in nats: falling log-probabilities of the same entries, and the tail's before and after.
pub(super) fn kl(given: &[f32], stored: &[f32], (tail, stored_tail): (f32, f32)) -> f64 {
    let (mut sum, mut a, mut r) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
    let mut chunks = given.chunks_exact(LANES).zip(stored.chunks_exact(LANES));
    for (given, stored) in &mut chunks {
        for lane in 0..LANES {
            let p = exp(given[lane].min(0.0));
            let delta = given[lane] - stored[lane];
            sum[lane] += p;
            a[lane] += p * delta;
            r[lane] += p * excess(delta);
        }
    }
    let whole = given.len() / LANES * LANES;
    let (mut sum, mut a, mut r) = (total(&sum), total(&a), total(&r));
    for (&given, &stored) in given[whole..].iter().zip(&stored[whole..]) {
        let (p, delta) = (f64::from(exp(given.min(0.0))), given - stored);
        sum += p;
        a += p * f64::from(delta);
        r += p * f64::from(excess(delta));
    }
    if tail.is_finite() {
        let (p, delta) = (f64::from(tail).exp(), tail - stored_tail);
        sum += p;
        a += p * f64::from(delta);
        r += p * f64::from(excess(delta));
    } else {
        // Nothing became the least that is stored.
        r += f64::from(stored_tail).exp();
    }
    if sum <= 0.0 {
        return 0.0;
    }
    let (a, r) = (a / sum, r / sum);
    let u = r - a;
    (a + u.ln_1p()).max(0.0)
}

/// Probability of the kept entries and the tail together.
pub(crate) fn mass(logprobs: &[f32], tail: f32) -> f64 {
    let mut lanes = [0f32; LANES];
    let mut chunks = logprobs.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &l) in lanes.iter_mut().zip(chunk) {
            *lane += exp(l.min(0.0));
        }
    }
    let rest: f64 = chunks.remainder().iter().map(|&l| f64::from(l).exp()).sum();
    total(&lanes) + rest + f64::from(tail).exp()
}

fn total(lanes: &[f32; LANES]) -> f64 {
    lanes.iter().map(|&lane| f64::from(lane)).sum()
}

/// exp(−δ) − 1 + δ without cancellation: δ²/2 (1 − δ/3 (1 − δ/4 (… (1 − δ/8)))).
#[inline(always)]
fn excess(delta: f32) -> f32 {
    if delta.abs() > SERIES_BELOW {
        return ((-f64::from(delta)).exp_m1() + f64::from(delta)) as f32;
    }
    let mut series = 1.0;
    for n in [8.0, 7.0, 6.0, 5.0, 4.0, 3.0] {
        series = 1.0 - delta / n * series;
    }
    0.5 * delta * delta * series
}

/// 1.5 · 2²³: adding it rounds an f32 of moderate size to the nearest integer, kept in the low bits.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; a small integer times the first is exact in f32.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Below this e^x is no normal f32; it is taken as 0.
const SMALLEST: f32 = -87.0;

/// e^x for x ≤ 0 within 2 units in the last place: x = n ln 2 + r, e^r by its Taylor series to r⁷.
#[inline(always)]
fn exp(x: f32) -> f32 {
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut series = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = series * r + coefficient;
    }
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    if x < SMALLEST { 0.0 } else { series * power }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::codec::{stored_logprob, stored_tail_logprob};

    /// The definition, in f64.
    fn by_definition(given: &[f32], stored: &[f32], tail: (f32, f32)) -> f64 {
        let p: Vec<f64> = given.iter().chain([&tail.0]).map(|&l| f64::from(l).exp()).collect();
        let q: Vec<f64> = stored.iter().chain([&tail.1]).map(|&l| f64::from(l).exp()).collect();
        let (p_sum, q_sum): (f64, f64) = (p.iter().sum(), q.iter().sum());
        p.iter().zip(&q).filter(|(p, _)| **p > 0.0).map(|(p, q)| p / p_sum * ((p / p_sum) / (q / q_sum)).ln()).sum()
    }

    #[test]
    fn agrees_with_the_definition_at_every_width() {
        for bits in 1..=12u8 {
            for entries in [1usize, 2, 7, 8, 9, 64] {
                let weights: Vec<f64> = (0..=entries).map(|i| (-(i as f64).sqrt() * 1.7).exp()).collect();
                let total: f64 = weights.iter().sum();
                let given: Vec<f32> = weights[..entries].iter().map(|w| (w / total).ln() as f32).collect();
                let stored: Vec<f32> = given.iter().map(|&l| stored_logprob(l, bits)).collect();
                let tail = (weights[entries] / total).ln() as f32;
                for tail in [tail, f32::NEG_INFINITY] {
                    let tail = (tail, stored_tail_logprob(tail, bits));
                    let (ours, exact) = (kl(&given, &stored, tail), by_definition(&given, &stored, tail));
                    // Terms of R are f32, a few units of 2^-24 each; where nearly all mass is one entry, KL is far below R.
                    let r: f64 = given.iter().zip(&stored).map(|(g, s)| f64::from(g.exp()) * f64::from(g - s).powi(2)).sum();
                    let bound = 1e-5 * exact + 1e-6 * r + 1e-13;
                    assert!((ours - exact).abs() <= bound, "{bits} bits, {entries}: {ours:e} {exact:e}");
                    assert_eq!(kl(&stored, &stored, (tail.1, tail.1)), 0.0);
                }
                let sum = mass(&given, tail);
                assert!((sum - 1.0).abs() < 1e-5, "{sum}");
            }
        }
    }
}
