//! Owns the learning rate as a function of the step. Refuses to hold state: a resumed run asks for the step it is at.

use super::{DEFAULT_DECAY_PART, TrainConfig};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Shape of the learning rate after linear warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Stays at the peak.
    #[default]
    Constant,
    /// Falls on half a cosine.
    Cosine,
    /// Falls on a line.
    Linear,
    /// Stays at the peak, and falls on a line over the last steps (warm-up, stable, decay).
    Wsd,
}

/// The learning rate of every update of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// The shape.
    pub schedule: Schedule,
    /// Updates in all.
    pub total_steps: u64,
    /// W, updates of warm-up.
    pub warmup_steps: u64,
    /// D, updates of [`Schedule::Wsd`]'s fall.
    pub decay_steps: u64,
    /// The rate at warm-up's end.
    pub peak: f64,
    /// The rate that the falling shapes fall to.
    pub floor: f64,
}

impl Rates {
    /// The learning rate of update `step`, counted from 0, of N = `total_steps`.
    ///
    /// ```text
    /// step < W          peak · (step + 1) / (W + 1)           0 just before the first update, the peak at update W
    /// Constant          peak
    /// Cosine            floor + (peak − floor) · ½ (1 + cos(π · x)),   x = (step − W) / (N − W), at most 1
    /// Linear            floor + (peak − floor) · (1 − x)
    /// Wsd               the same with x = (step − S) / (N − S), from S = max(W, N − D) on; before it peak
    /// ```
    /// No update of a run of N is spent at the floor. A warm-up longer than the run ends on the way up.
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.peak * (step + 1) as f64 / (self.warmup_steps as f64 + 1.0);
        }
        let start = match self.schedule {
            Schedule::Wsd => self.warmup_steps.max(self.total_steps.saturating_sub(self.decay_steps)),
            _ => self.warmup_steps,
        };
        let falling = self.total_steps.saturating_sub(start).max(1) as f64;
        let x = (step.saturating_sub(start) as f64 / falling).min(1.0);
        let height = match self.schedule {
            Schedule::Constant => 1.0,
            Schedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * x).cos()),
            Schedule::Linear | Schedule::Wsd => 1.0 - x,
        };
        self.floor + (self.peak - self.floor) * height
    }
}

impl TrainConfig {
    /// The learning rate of every step of a run of `total_steps`.
    pub fn rates(&self, total_steps: u64) -> Rates {
        Rates {
            schedule: self.schedule,
            total_steps,
            warmup_steps: self.warmup_steps,
            decay_steps: self.decay_steps.unwrap_or_else(|| total_steps.div_ceil(DEFAULT_DECAY_PART)),
            peak: self.lr,
            floor: self.lr * self.min_lr_ratio,
        }
    }

    /// Errors: a setting of another schedule than the one chosen, or out of its range.
    pub fn check_schedule(&self) -> Result<()> {
        let refuse = |name, found: String, expected: &str| Err(Error::Setting { name, found, expected: expected.into() });
        if !(0.0..1.0).contains(&self.min_lr_ratio) {
            return refuse("min_lr_ratio", self.min_lr_ratio.to_string(), "a number from 0 to below 1");
        }
        if self.min_lr_ratio > 0.0 && self.schedule == Schedule::Constant {
            let expected = "no such setting with the schedule constant, which does not fall";
            return refuse("min_lr_ratio", self.min_lr_ratio.to_string(), expected);
        }
        match self.decay_steps {
            Some(0) => refuse("decay_steps", "0".into(), "at least 1"),
            Some(steps) if self.schedule != Schedule::Wsd => {
                refuse("decay_steps", steps.to_string(), "such a setting with the schedule wsd alone")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Schedule::{Constant, Cosine, Linear, Wsd};
    use super::*;

    fn rates(schedule: Schedule, total_steps: u64, warmup_steps: u64, peak: f64) -> Rates {
        Rates { schedule, total_steps, warmup_steps, decay_steps: 4, peak, floor: 0.0 }
    }

    fn near(a: f64, b: f64) {
        // A handful of f64 operations on values of size 1.
        assert!((a - b).abs() < 1e-15, "{a} {b}");
    }

    #[test]
    fn warms_up_on_a_line_through_zero() {
        for schedule in [Constant, Cosine, Linear, Wsd] {
            for (step, rate) in [(0, 0.2), (1, 0.4), (2, 0.6), (3, 0.8), (4, 1.0)] {
                near(rates(schedule, 100, 4, 1.0).at(step), rate);
            }
            near(rates(schedule, 10, 0, 0.5).at(0), 0.5);
            near(rates(schedule, 10, 99, 1.0).at(9), 0.1);
        }
    }

    #[test]
    fn constant_stays_and_the_others_fall_to_the_floor() {
        near(rates(Constant, 10, 4, 0.3).at(1_000), 0.3);
        let half = 0.5_f64.sqrt();
        for (step, rate) in [(4, 2.0), (6, 1.0 + half), (8, 1.0), (10, 1.0 - half), (12, 0.0), (99, 0.0)] {
            near(rates(Cosine, 12, 4, 2.0).at(step), rate);
        }
        near(rates(Cosine, 4, 4, 1.0).at(4), 1.0);
        near(rates(Cosine, u64::MAX, 0, 1.0).at(u64::MAX), 0.0);
        for (step, rate) in [(4, 2.0), (6, 1.5), (8, 1.0), (11, 0.25), (12, 0.0), (99, 0.0)] {
            near(rates(Linear, 12, 4, 2.0).at(step), rate);
        }
        // The fall of 4 updates begins at update 8, or at warm-up's end.
        for (step, rate) in [(4, 2.0), (7, 2.0), (8, 2.0), (9, 1.5), (11, 0.5), (12, 0.0), (99, 0.0)] {
            near(rates(Wsd, 12, 4, 2.0).at(step), rate);
        }
        for (step, rate) in [(10, 1.0), (11, 0.5)] {
            near(rates(Wsd, 12, 10, 1.0).at(step), rate);
        }
        for schedule in [Cosine, Linear, Wsd] {
            let rates = Rates { floor: 0.5, ..rates(schedule, 12, 4, 2.0) };
            near(
                rates.at(10),
                if schedule == Cosine {
                    0.5 + 0.75 * (1.0 - half)
                } else if schedule == Linear {
                    0.875
                } else {
                    1.25
                },
            );
            near(rates.at(12), 0.5);
        }
    }

    #[test]
    fn a_setting_of_another_schedule_is_refused() {
        let of =
            |schedule, decay_steps, min_lr_ratio| TrainConfig { schedule, decay_steps, min_lr_ratio, ..TrainConfig::default() };
        let rates = of(Wsd, None, 0.1).rates(1001);
        assert_eq!((rates.decay_steps, rates.floor), (101, 2e-4 * 0.1), "a tenth, rounded up");
        assert_eq!(of(Wsd, Some(7), 0.0).rates(1001).decay_steps, 7);
        assert!(of(Cosine, None, 0.1).check_schedule().is_ok() && of(Wsd, Some(7), 0.1).check_schedule().is_ok());
        for (config, words) in [
            (of(Cosine, Some(7), 0.0), "decay_steps = 7: expected such a setting with the schedule wsd alone"),
            (of(Wsd, Some(0), 0.0), "decay_steps = 0: expected at least 1"),
            (of(Constant, None, 0.1), "min_lr_ratio = 0.1: expected no such setting with the schedule constant"),
            (of(Linear, None, 1.0), "min_lr_ratio = 1: expected a number from 0 to below 1"),
            (of(Linear, None, f64::NAN), "min_lr_ratio = NaN"),
        ] {
            let error = config.check_schedule().err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.contains(words), "{error:?} {words}");
        }
    }
}
