//! The settings of the distillation term as users write them, and their defaults: which divergence, what becomes of the tail, how
//! weights and temperature change. Refuses to know caches; what a cache cannot give is refused by `reading`.

use super::{MAX_TEMPERATURE, MIN_TEMPERATURE, TrainConfig};
use crate::loss::{Divergence, LossSettings, Tail};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Default for [`TrainConfig::max_unknown_mass`].
///
/// At T = 1 forward KL's gradient at a position is Q − P, at most 2 in sum of absolute values. A teacher off by u in total variation
/// moves it by at most 2 u: a twentieth of that at this bound. The tail that 64 entries leave is of the same size.
pub const DEFAULT_MAX_UNKNOWN_MASS: f64 = 0.05;

/// How the student is compared with the teacher, by name; formulas at [`Divergence`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum DivergenceName {
    /// Forward KL.
    #[default]
    ForwardKl,
    /// Reverse KL.
    ReverseKl,
    /// Generalised Jensen-Shannon divergence, with [`TrainConfig::beta`].
    Jsd,
    /// Skewed KL, with [`TrainConfig::skew`].
    SkewedKl,
    /// Skewed reverse KL, with [`TrainConfig::skew`].
    SkewedReverseKl,
    /// Total variation.
    TotalVariation,
}

impl DivergenceName {
    /// The name in settings.
    pub(super) fn name(self) -> String {
        setting(self)
    }
}

/// What becomes of the probability outside the kept ids, by name; formulas at [`Tail`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum TailName {
    /// The best that the cache gives: formed at T where it declares `lse_t` at T, estimates where tokens were drawn, else one bucket.
    #[default]
    Auto,
    /// One bucket, the ghost token of the literature (which is read as a name too).
    #[serde(alias = "ghost")]
    Bucket,
    /// Left out, teacher and student renormalised.
    Renorm,
    /// Left out of the teacher, who is renormalised; the student keeps it.
    StudentFull,
    /// The unnormalised top-k loss: biased and perhaps below 0, forward KL alone.
    None,
}

impl TailName {
    /// The name in settings.
    pub(super) fn name(self) -> String {
        setting(self)
    }
}

/// A value's name in settings.
fn setting(value: impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(String::from)).unwrap_or_default()
}

/// How weights and temperature go from their first values to those of the last step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum LossSchedule {
    /// They stay.
    Constant,
    /// On a line.
    #[default]
    Linear,
    /// On half a cosine: slowly, fast in the middle, slowly.
    Cosine,
}

impl LossSchedule {
    /// The value at update `step`, counted from 0, of a run of `total`: `from` at the first, `to` at the last and ever after.
    ///
    /// ```text
    /// x = step / (total − 1), at most 1      w = 1 (constant), 1 − x (linear), ½ (1 + cos(π x)) (cosine)
    /// value = w · from + (1 − w) · to
    /// ```
    pub fn value(&self, step: u64, total: u64, from: f64, to: f64) -> f64 {
        if from == to {
            return from;
        }
        let last = total.saturating_sub(1);
        let x = if last == 0 { 0.0 } else { (step.min(last) as f64) / last as f64 };
        let w = match self {
            LossSchedule::Constant => 1.0,
            LossSchedule::Linear => 1.0 - x,
            LossSchedule::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * x).cos()),
        };
        w * from + (1.0 - w) * to
    }
}

impl TrainConfig {
    /// The divergence with its parameter.
    pub fn divergence(&self) -> Divergence {
        match self.divergence {
            DivergenceName::ForwardKl => Divergence::ForwardKl,
            DivergenceName::ReverseKl => Divergence::ReverseKl,
            DivergenceName::Jsd => Divergence::Jsd { beta: self.beta },
            DivergenceName::SkewedKl => Divergence::SkewedKl { skew: self.skew },
            DivergenceName::SkewedReverseKl => Divergence::SkewedReverseKl { skew: self.skew },
            DivergenceName::TotalVariation => Divergence::TotalVariation,
        }
    }

    /// The tail as far as it does not depend on a cache: `auto` is one bucket.
    pub(super) fn tail(&self) -> Tail {
        match self.tail {
            TailName::Auto | TailName::Bucket => Tail::Bucket,
            TailName::Renorm => Tail::Renorm,
            TailName::StudentFull => Tail::StudentFull,
            TailName::None => Tail::None,
        }
    }

    /// The loss of every step. Errors: as [`loss_settings`](Self::loss_settings), for the last step's values too, and values of a last
    /// step with a schedule that does not lead there.
    pub fn loss_plan(&self) -> Result<LossPlan> {
        let refuse = |name, found: String, expected: String| Err(Error::Setting { name, found, expected });
        let start = self.loss_settings()?;
        let end = LossSettings {
            temperature: self.temperature_end.unwrap_or(start.temperature),
            kd_alpha: self.kd_alpha_end.unwrap_or(start.kd_alpha),
            kd_ce_alpha: self.kd_ce_alpha_end.unwrap_or(start.kd_ce_alpha),
            ..start
        };
        for (name, weight) in [("kd_alpha_end", end.kd_alpha), ("kd_ce_alpha_end", end.kd_ce_alpha)] {
            if !(weight.is_finite() && weight >= 0.0) {
                return refuse(name, weight.to_string(), "a finite number, 0 or above".into());
            }
        }
        if !(MIN_TEMPERATURE..=MAX_TEMPERATURE).contains(&end.temperature) {
            let expected = format!("a number from {MIN_TEMPERATURE} to {MAX_TEMPERATURE}");
            return refuse("temperature_end", end.temperature.to_string(), expected);
        }
        if end.kd_alpha == 0.0 && end.kd_ce_alpha == 0.0 {
            let found = "0, and kd_ce_alpha_end 0".into();
            return refuse("kd_alpha_end", found, "a last step with something to train on".into());
        }
        if !(0.0..=1.0).contains(&self.max_unknown_mass) {
            return refuse("max_unknown_mass", self.max_unknown_mass.to_string(), "a number from 0 to 1".into());
        }
        if start != end && self.loss_schedule == LossSchedule::Constant {
            let expected = "linear or cosine, for weights or temperature of the last step are not those of the first".into();
            return refuse("loss_schedule", "constant".into(), expected);
        }
        let mut plan = LossPlan { start, end, schedule: self.loss_schedule };
        if !plan.distils() {
            // Without a distillation term the temperature is that of nothing, and its change no change.
            plan.end.temperature = start.temperature;
        }
        Ok(plan)
    }
}

/// The loss of every step of a run: a function of the step and the number of steps alone, so that a resumed run goes on exactly.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossPlan {
    start: LossSettings,
    end: LossSettings,
    schedule: LossSchedule,
}

impl LossPlan {
    /// The loss of update `step`, counted from 0, of a run of `total`.
    pub fn at(&self, step: u64, total: u64) -> LossSettings {
        let value = |from, to| self.schedule.value(step, total, from, to);
        LossSettings {
            temperature: value(self.start.temperature, self.end.temperature),
            kd_alpha: value(self.start.kd_alpha, self.end.kd_alpha),
            kd_ce_alpha: value(self.start.kd_ce_alpha, self.end.kd_ce_alpha),
            ..self.start
        }
    }

    /// The first step's loss.
    pub fn start(&self) -> &LossSettings {
        &self.start
    }

    /// The last step's loss.
    pub fn end(&self) -> &LossSettings {
        &self.end
    }

    /// Whether every step has the same loss.
    pub fn is_constant(&self) -> bool {
        self.start == self.end
    }

    /// Whether any step looks at the teacher's distributions.
    pub fn distils(&self) -> bool {
        self.start.kd_alpha > 0.0 || self.end.kd_alpha > 0.0
    }

    /// The temperature of all steps; `None` where it changes.
    pub fn temperature(&self) -> Option<f64> {
        (self.start.temperature == self.end.temperature).then_some(self.start.temperature)
    }

    /// Temperatures from the first step's to the last's, evenly spaced; one where it does not change.
    pub(super) fn temperatures(&self, number: u32) -> Vec<f64> {
        match self.temperature() {
            Some(t) => vec![t],
            None => {
                let at = |i| LossSchedule::Linear.value(i, number.into(), self.start.temperature, self.end.temperature);
                (0..u64::from(number)).map(at).collect()
            }
        }
    }

    /// Temperature in words: `2`, or `4 to 1`.
    pub(super) fn temperature_in_words(&self) -> String {
        match self.temperature() {
            Some(t) => t.to_string(),
            None => format!("{} to {}", self.start.temperature, self.end.temperature),
        }
    }

    /// Settles the tail of all steps.
    pub(super) fn set_tail(&mut self, tail: Tail) {
        self.start.tail = tail;
        self.end.tail = tail;
    }

    /// What makes this another run than one with the same weights at the first step and everything else by default, as names and
    /// values. What the loss of no step looks at is not among them.
    pub(super) fn identity(&self, config: &TrainConfig) -> Vec<(&'static str, String)> {
        let mut names = Vec::new();
        if self.distils() {
            names.push(("temperature", self.start.temperature.to_string()));
        }
        if self.distils() && self.start.divergence != Divergence::ForwardKl {
            names.push(("divergence", self.start.divergence.to_string()));
        }
        if self.distils() && config.tail != TailName::Auto {
            names.push(("tail", self.start.tail.name().to_string()));
        }
        if self.is_constant() {
            return names;
        }
        names.push(("loss_schedule", format!("{:?}", self.schedule).to_lowercase()));
        for (name, from, to) in [
            ("temperature_end", self.start.temperature, self.end.temperature),
            ("kd_alpha_end", self.start.kd_alpha, self.end.kd_alpha),
            ("kd_ce_alpha_end", self.start.kd_ce_alpha, self.end.kd_ce_alpha),
        ] {
            if from != to {
                names.push((name, to.to_string()));
            }
        }
        names
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::train::Objective;

    #[test]
    fn schedules_go_from_end_to_end_and_stay_there() {
        let at = |schedule: LossSchedule, step| schedule.value(step, 5, 3.0, 1.0);
        for (schedule, values) in [
            (LossSchedule::Constant, [3.0; 6]),
            (LossSchedule::Linear, [3.0, 2.5, 2.0, 1.5, 1.0, 1.0]),
            (LossSchedule::Cosine, [3.0, 2.0 + 0.5_f64.sqrt(), 2.0, 2.0 - 0.5_f64.sqrt(), 1.0, 1.0]),
        ] {
            for (step, value) in (0..).zip(values) {
                // A few operations in f64.
                assert!((at(schedule, step) - value).abs() < 1e-14, "{schedule:?} at {step}: {}", at(schedule, step));
            }
            // Ends are exact, whatever is between: 0.1 and 0.7 have no exact sums.
            assert_eq!(schedule.value(0, 7, 0.1, 0.7), 0.1);
            assert!(schedule == LossSchedule::Constant || schedule.value(6, 7, 0.1, 0.7) == 0.7);
            assert_eq!([schedule.value(0, 1, 0.1, 0.7), schedule.value(3, 0, 0.1, 0.1)], [0.1, 0.1]);
        }
    }

    #[test]
    fn a_plan_moves_what_has_an_end() {
        let config =
            TrainConfig { kd_alpha: Some(1.0), kd_alpha_end: Some(0.0), kd_ce_alpha_end: Some(1.0), ..Default::default() };
        let plan = config.loss_plan().unwrap();
        let weights = |step| (plan.at(step, 11).kd_alpha, plan.at(step, 11).kd_ce_alpha, plan.at(step, 11).temperature);
        assert_eq!([weights(0), weights(5), weights(10)], [(1.0, 0.0, 1.0), (0.5, 0.5, 1.0), (0.0, 1.0, 1.0)]);
        assert!(plan.distils() && !plan.is_constant() && plan.temperature() == Some(1.0));
        let names: Vec<&str> = plan.identity(&config).iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["temperature", "loss_schedule", "kd_alpha_end", "kd_ce_alpha_end"]);

        let plain = TrainConfig { temperature: 2.0, temperature_end: Some(2.0), ..Default::default() };
        let plan = plain.loss_plan().unwrap();
        assert!(plan.is_constant(), "an end that is the start changes nothing");
        assert_eq!(plan.identity(&plain), [("temperature", "2".to_string())]);
        let falling = TrainConfig { temperature: 4.0, temperature_end: Some(1.0), ..Default::default() }.loss_plan().unwrap();
        assert_eq!(falling.temperatures(4), [4.0, 3.0, 2.0, 1.0]);
    }

    #[test]
    fn what_no_step_looks_at_makes_no_other_run() {
        let plain = TrainConfig { objective: Objective::Sft, ..Default::default() };
        let adorned = TrainConfig {
            temperature: 2.0,
            temperature_end: Some(1.0),
            divergence: DivergenceName::Jsd,
            beta: 0.1,
            tail: TailName::Renorm,
            ..plain.clone()
        };
        let plan = adorned.loss_plan().unwrap();
        assert!(plan.is_constant());
        assert_eq!(plan.identity(&adorned), plain.loss_plan().unwrap().identity(&plain));
        // With a distillation term at either end they are seen.
        let learning = TrainConfig { kd_alpha_end: Some(0.5), ..adorned };
        let names: Vec<&str> = learning.loss_plan().unwrap().identity(&learning).iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["temperature", "divergence", "tail", "loss_schedule", "temperature_end", "kd_alpha_end"]);
    }

    #[test]
    fn plans_that_lead_nowhere_are_refused() {
        let default = TrainConfig::default;
        for (config, words) in [
            (TrainConfig { kd_alpha_end: Some(0.0), ..default() }, "kd_alpha_end = 0, and kd_ce_alpha_end 0"),
            (TrainConfig { kd_alpha_end: Some(-1.0), ..default() }, "kd_alpha_end = -1: expected a finite number, 0 or above"),
            (TrainConfig { kd_ce_alpha_end: Some(f64::NAN), ..default() }, "kd_ce_alpha_end = NaN"),
            (
                TrainConfig { temperature_end: Some(0.01), ..default() },
                "temperature_end = 0.01: expected a number from 0.05 to 100",
            ),
            (TrainConfig { max_unknown_mass: 1.5, ..default() }, "max_unknown_mass = 1.5: expected a number from 0 to 1"),
            (
                TrainConfig { temperature_end: Some(2.0), loss_schedule: LossSchedule::Constant, ..default() },
                "loss_schedule = constant: expected linear or cosine",
            ),
            (TrainConfig { divergence: DivergenceName::Jsd, beta: 1.0, ..default() }, "beta = 1: expected"),
            (TrainConfig { divergence: DivergenceName::SkewedKl, skew: 0.0, ..default() }, "skew = 0: expected"),
            (TrainConfig { divergence: DivergenceName::ReverseKl, tail: TailName::None, ..default() }, "tail = none: expected"),
        ] {
            let error = config.loss_plan().unwrap_err().to_string();
            assert!(error.contains(words), "{words:?} is not in {error:?}");
        }
    }
}
