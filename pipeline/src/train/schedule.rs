//! Owns the learning rate as a function of the step. Refuses to hold state: a resumed run asks for the step it is at.

use serde::{Deserialize, Serialize};

/// Shape of the learning rate after linear warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Stays at the peak.
    #[default]
    Constant,
    /// Falls to 0 on half a cosine.
    Cosine,
}

impl Schedule {
    /// The learning rate of update `step`, counted from 0, of a run of `total_steps` updates with W = `warmup_steps`.
    ///
    /// ```text
    /// step < W          peak · (step + 1) / (W + 1)           0 just before the first update, the peak at update W
    /// Constant          peak
    /// Cosine            peak · ½ (1 + cos(π · x)),  x = (step − W) / (total_steps − W), at most 1
    /// ```
    /// No update is spent at a rate of 0. A warm-up longer than the run ends on the way up.
    pub fn rate(&self, step: u64, total_steps: u64, warmup_steps: u64, peak: f64) -> f64 {
        if step < warmup_steps {
            return peak * (step + 1) as f64 / (warmup_steps as f64 + 1.0);
        }
        match self {
            Schedule::Constant => peak,
            Schedule::Cosine => {
                let falling = total_steps.saturating_sub(warmup_steps).max(1) as f64;
                let x = ((step - warmup_steps) as f64 / falling).min(1.0);
                peak * 0.5 * (1.0 + (std::f64::consts::PI * x).cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Schedule::{Constant, Cosine};

    fn near(a: f64, b: f64) {
        // A handful of f64 operations on values of size 1.
        assert!((a - b).abs() < 1e-15, "{a} {b}");
    }

    #[test]
    fn warms_up_on_a_line_through_zero() {
        for schedule in [Constant, Cosine] {
            for (step, rate) in [(0, 0.2), (1, 0.4), (2, 0.6), (3, 0.8), (4, 1.0)] {
                near(schedule.rate(step, 100, 4, 1.0), rate);
            }
            near(schedule.rate(0, 10, 0, 0.5), 0.5);
            near(schedule.rate(9, 10, 99, 1.0), 0.1);
        }
    }

    #[test]
    fn constant_stays_and_cosine_falls_to_zero() {
        near(Constant.rate(1_000, 10, 4, 0.3), 0.3);
        let half = 0.5_f64.sqrt();
        for (step, rate) in [(4, 2.0), (6, 1.0 + half), (8, 1.0), (10, 1.0 - half), (12, 0.0), (99, 0.0)] {
            near(Cosine.rate(step, 12, 4, 2.0), rate);
        }
        near(Cosine.rate(4, 4, 4, 1.0), 1.0);
        near(Cosine.rate(u64::MAX, u64::MAX, 0, 1.0), 0.0);
    }
}
