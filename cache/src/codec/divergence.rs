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

/// A position's measure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Measure {
    /// KL(given, stored) in nats.
    pub(super) kl: f64,
    /// Given probability of the kept entries and the tail together.
    pub(super) mass: f64,
}

/// Buffers of one record's measures, used again for every position.
#[derive(Debug, Default)]
pub(super) struct Measurer {
    p: Vec<f32>,
    delta: Vec<f32>,
    excess: Vec<f32>,
}

impl Measurer {
    /// Measures falling log-probabilities of the same entries and the tail's, before and after. Given values above 0 count as 0.
    ///
    /// Value by value into buffers, which becomes vector instructions, and then sums of those.
    pub(super) fn measure(&mut self, given: &[f32], stored: &[f32], (tail, stored_tail): (f32, f32)) -> Measure {
        refill(&mut self.p, given.iter().map(|l| exp(l.min(0.0))));
        refill(&mut self.delta, given.iter().zip(stored).map(|(given, stored)| given - stored));
        refill(&mut self.excess, self.delta.iter().map(|&delta| series(delta)));
        for (excess, &delta) in self.excess.iter_mut().zip(&self.delta) {
            if delta.abs() > SERIES_BELOW {
                *excess = excess_beyond(delta);
            }
        }
        let (mut mass, mut a, mut r) = (sum(&self.p), dot(&self.p, &self.delta), dot(&self.p, &self.excess));
        if tail.is_finite() {
            let (p, delta) = (f64::from(tail).exp(), tail - stored_tail);
            mass += p;
            a += p * f64::from(delta);
            r += p * f64::from(if delta.abs() > SERIES_BELOW { excess_beyond(delta) } else { series(delta) });
        } else {
            // Nothing became the least that is stored.
            r += f64::from(stored_tail).exp();
        }
        if mass <= 0.0 {
            return Measure { kl: 0.0, mass };
        }
        let (a, r) = (a / mass, r / mass);
        Measure { kl: (a + (r - a).ln_1p()).max(0.0), mass }
    }
}

/// Probability of the kept entries and the tail together.
pub(crate) fn mass(logprobs: &[f32], tail: f32) -> f64 {
    let mut p = Vec::new();
    refill(&mut p, logprobs.iter().map(|l| exp(l.min(0.0))));
    sum(&p) + f64::from(tail).exp()
}

fn refill(buffer: &mut Vec<f32>, values: impl Iterator<Item = f32>) {
    buffer.clear();
    buffer.extend(values);
}

/// Σ a, in [`LANES`] fixed lanes.
fn sum(a: &[f32]) -> f64 {
    let mut sums = [0f32; LANES];
    let (lanes, rest) = a.as_chunks::<LANES>();
    for lane in lanes {
        for i in 0..LANES {
            sums[i] += lane[i];
        }
    }
    total(&sums) + rest.iter().map(|&x| f64::from(x)).sum::<f64>()
}

/// Σ a b, in the same lanes.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
    }
    total(&sums) + a_rest.iter().zip(b_rest).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>()
}

fn total(lanes: &[f32; LANES]) -> f64 {
    lanes.iter().map(|&lane| f64::from(lane)).sum()
}

/// exp(−δ) − 1 + δ for |δ| up to [`SERIES_BELOW`], without cancellation: δ²/2 (1 − δ/3 (1 − δ/4 (… (1 − δ/8)))).
#[inline(always)]
fn series(delta: f32) -> f32 {
    let mut series = 1.0;
    for n in [8.0, 7.0, 6.0, 5.0, 4.0, 3.0f32] {
        series = 1.0 - delta * n.recip() * series;
    }
    0.5 * delta * delta * series
}

/// The same beyond it.
fn excess_beyond(delta: f32) -> f32 {
    ((-f64::from(delta)).exp_m1() + f64::from(delta)) as f32
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
    let normal = 0u32.wrapping_sub(u32::from(x >= SMALLEST));
    f32::from_bits((series * power).to_bits() & normal)
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
        let mut measurer = Measurer::default();
        for bits in 1..=12u8 {
            for entries in [1usize, 2, 7, 8, 9, 64] {
                let weights: Vec<f64> = (0..=entries).map(|i| (-(i as f64).sqrt() * 1.7).exp()).collect();
                let total: f64 = weights.iter().sum();
                let given: Vec<f32> = weights[..entries].iter().map(|w| (w / total).ln() as f32).collect();
                let stored: Vec<f32> = given.iter().map(|&l| stored_logprob(l, bits)).collect();
                let tail = (weights[entries] / total).ln() as f32;
                for tail in [tail, f32::NEG_INFINITY] {
                    let tail = (tail, stored_tail_logprob(tail, bits));
                    let (ours, exact) = (measurer.measure(&given, &stored, tail).kl, by_definition(&given, &stored, tail));
                    // Terms of R are f32, a few units of 2^-24 each; where nearly all mass is one entry, KL is far below R.
                    let r: f64 = given.iter().zip(&stored).map(|(g, s)| f64::from(g.exp()) * f64::from(g - s).powi(2)).sum();
                    let bound = 1e-5 * exact + 1e-6 * r + 1e-13;
                    assert!((ours - exact).abs() <= bound, "{bits} bits, {entries}: {ours:e} {exact:e}");
                    assert_eq!(measurer.measure(&stored, &stored, (tail.1, tail.1)).kl, 0.0);
                }
                let sums = [mass(&given, tail), measurer.measure(&given, &stored, (tail, tail)).mass];
                assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-5), "{sums:?}");
            }
        }
    }
}
