//! What many positions' values say: mean with standard errors, extremes and percentiles, as llama.cpp's report of the KL divergence has
//! them. Refuses to know what the values are.
//!
//! ```text
//! standard error of a mean       √(Σ (x − x̄)² / n / (n − 1))                  positions taken as independent
//! the same by conversations      √(C / (C − 1) · Σ_c (Σ_{i in c} (x_i − x̄))²) / n     conversations taken as independent: positions of
//!                                one are alike, so this is the one to believe where the two differ
//! percentile f                   linear between the values around place f · (n − 1) of the sorted ones
//! ```

use super::mean;
use serde::Serialize;

/// Values at positions, conversation after conversation.
#[derive(Debug, Clone, Default)]
pub(super) struct Values {
    values: Vec<f64>,
    /// The conversations' numbers, in order, and how many positions each has.
    runs: Vec<(u64, usize)>,
}

/// A mean and how sure it is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Mean {
    /// Over how many positions.
    pub positions: u64,
    /// The mean.
    pub mean: f64,
    /// Its standard error, positions taken as independent; absent for fewer than 2.
    pub standard_error: Option<f64>,
    /// Its standard error, conversations taken as independent; absent for fewer than 2.
    pub standard_error_by_row: Option<f64>,
}

/// A mean and how the values lie around it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The mean.
    #[serde(flatten)]
    pub mean: Mean,
    /// The largest value.
    pub maximum: f64,
    /// 99.9 % of the values are at most this; and so on.
    pub p99_9: f64,
    /// 99 %.
    pub p99: f64,
    /// 95 %.
    pub p95: f64,
    /// 90 %.
    pub p90: f64,
    /// 75 %.
    pub p75: f64,
    /// 50 %.
    pub median: f64,
    /// 25 %.
    pub p25: f64,
    /// 10 %.
    pub p10: f64,
    /// 5 %.
    pub p5: f64,
    /// 1 %.
    pub p1: f64,
    /// 0.1 %.
    pub p0_1: f64,
    /// The smallest value.
    pub minimum: f64,
}

/// Two quantities measured at the same positions, through exp of their means: perplexities.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Perplexities {
    /// Over how many positions.
    pub positions: u64,
    /// exp(mean −ln q), and its standard error.
    pub student: Estimate,
    /// exp(mean −ln p), and its standard error.
    pub teacher: Estimate,
    /// Correlation of −ln q and −ln p over positions, −1 to 1; absent where one of them does not vary.
    pub correlation: Option<f64>,
    /// ln of student's over teacher's, in nats.
    pub ln_ratio: Estimate,
    /// Student's over teacher's.
    pub ratio: Estimate,
    /// Student's less teacher's.
    pub difference: Estimate,
}

/// A figure and its standard error, positions taken as independent.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// The figure.
    pub value: f64,
    /// Its standard error; absent for fewer than 2 positions.
    pub standard_error: Option<f64>,
}

impl Values {
    pub(super) fn push(&mut self, row: u64, value: f64) {
        self.values.push(value);
        match self.runs.last_mut() {
            Some((last, length)) if *last == row => *length += 1,
            _ => self.runs.push((row, 1)),
        }
    }

    /// How many conversations they are of.
    pub(super) fn rows(&self) -> u64 {
        self.runs.len() as u64
    }

    /// `None` of no values.
    pub(super) fn mean(&self) -> Option<Mean> {
        let mean = mean::mean(&self.values)?;
        let n = self.values.len();
        let squares: f64 = self.values.iter().map(|x| (x - mean) * (x - mean)).sum();
        Some(Mean {
            positions: n as u64,
            mean,
            standard_error: (n > 1).then(|| (squares / n as f64 / (n - 1) as f64).sqrt()),
            standard_error_by_row: self.error_by_row(mean),
        })
    }

    fn error_by_row(&self, mean: f64) -> Option<f64> {
        let mut rest = &self.values[..];
        let rows = self.runs.iter().map(|(_, length)| {
            let (row, after) = rest.split_at(*length);
            rest = after;
            row
        });
        mean::grouped_error(rows, mean)
    }

    /// `None` of no values.
    pub(super) fn spread(&self) -> Option<Spread> {
        let mean = self.mean()?;
        let mut sorted = self.values.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let at = |fraction: f64| percentile(&sorted, fraction);
        Some(Spread {
            mean,
            maximum: at(1.0),
            p99_9: at(0.999),
            p99: at(0.99),
            p95: at(0.95),
            p90: at(0.9),
            p75: at(0.75),
            median: at(0.5),
            p25: at(0.25),
            p10: at(0.1),
            p5: at(0.05),
            p1: at(0.01),
            p0_1: at(0.001),
            minimum: at(0.0),
        })
    }
}

/// Of sorted values, at least one.
fn percentile(sorted: &[f64], fraction: f64) -> f64 {
    let place = fraction * (sorted.len() - 1) as f64;
    let below = (place.floor() as usize).min(sorted.len() - 1);
    let above = (below + 1).min(sorted.len() - 1);
    let share = place - below as f64;
    (1.0 - share) * sorted[below] + share * sorted[above]
}

/// exp of a mean; its error to first order.
pub(super) fn exponential(of: &Mean) -> Estimate {
    let value = of.mean.exp();
    Estimate { value, standard_error: of.standard_error.map(|error| value * error) }
}

/// Perplexities of −ln q and −ln p at the same positions; `None` of no positions.
pub(super) fn perplexities(student: &Values, teacher: &Values) -> Option<Perplexities> {
    let (q, p) = (student.mean()?, teacher.mean()?);
    let mut gaps = Values::default();
    student.values.iter().zip(&teacher.values).for_each(|(q, p)| gaps.push(0, q - p));
    let gap = gaps.mean()?;
    let (q_ppl, p_ppl, ratio) = (exponential(&q), exponential(&p), exponential(&gap));
    // Of means: cov = (var q + var p − var(q − p)) / 2.
    let variances = q.standard_error.zip(p.standard_error).zip(gap.standard_error);
    let covariance = variances.map(|((q, p), gap)| (q * q + p * p - gap * gap) / 2.0);
    let correlation = variances.zip(covariance).map(|(((q, p), _), covariance)| covariance / (q * p)).filter(|c| c.is_finite());
    let difference = variances.zip(covariance).map(|(((q, p), _), covariance)| {
        let (a, b) = (q_ppl.value * q, p_ppl.value * p);
        (a * a + b * b - 2.0 * q_ppl.value * p_ppl.value * covariance).max(0.0).sqrt()
    });
    Some(Perplexities {
        positions: q.positions,
        student: q_ppl,
        teacher: p_ppl,
        correlation,
        ln_ratio: Estimate { value: gap.mean, standard_error: gap.standard_error },
        ratio,
        difference: Estimate { value: q_ppl.value - p_ppl.value, standard_error: difference },
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn of(values: &[(u64, f64)]) -> Values {
        let mut all = Values::default();
        values.iter().for_each(|(row, value)| all.push(*row, *value));
        all
    }

    #[test]
    fn a_mean_is_less_sure_where_a_conversation_is_alike() {
        // Mean 2.5, squared deviations 2.25 + 0.25 + 0.25 + 2.25 = 5: √(5 / 4 / 3). By conversations: sums −2 and 2, √(2 · 8) / 4 = 1.
        let mean = of(&[(0, 1.0), (0, 2.0), (1, 3.0), (1, 4.0)]).mean().unwrap();
        assert_eq!((mean.positions, mean.mean, mean.standard_error_by_row), (4, 2.5, Some(1.0)));
        assert!((mean.standard_error.unwrap() - (5.0f64 / 12.0).sqrt()).abs() < 1e-15);
        // Each position its own conversation: the same by both.
        let apart = of(&[(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0)]).mean().unwrap();
        assert!((apart.standard_error.unwrap() - apart.standard_error_by_row.unwrap()).abs() < 1e-15);
        assert_eq!(of(&[(5, 1.0)]).mean().map(|m| (m.standard_error, m.standard_error_by_row)), Some((None, None)));
        assert_eq!(of(&[]).spread(), None);
    }

    #[test]
    fn percentiles_lie_between_values() {
        let spread = of(&[(0, 40.0), (0, 10.0), (0, 30.0), (0, 20.0), (0, 0.0)]).spread().unwrap();
        assert_eq!((spread.minimum, spread.p25, spread.median, spread.p75, spread.maximum), (0.0, 10.0, 20.0, 30.0, 40.0));
        assert!((spread.p90 - 36.0).abs() < 1e-12 && (spread.p0_1 - 0.04).abs() < 1e-12, "{spread:?}");
        let one = of(&[(0, 3.0)]).spread().unwrap();
        assert_eq!((one.p99_9, one.minimum), (3.0, 3.0));
    }
}
