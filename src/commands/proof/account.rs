//! What a trial found: means over seeds with 95 % intervals, and whether one arm is ahead of another.
//!
//! Arms of one seed share everything but the objective, so they are compared seed by seed: the interval is of the differences, by Student's
//! t over the seeds.

use super::{ARMS, CONDITIONS, SWEPT};
use crate::cli::MOST_SEEDS;
use crate::print::{Side, Table};
use potstill_pipeline::evaluate::mean;
use serde::Serialize;
use std::io::Write;

/// Student's t, two-sided 95 %, for 1, 2, … degrees of freedom.
const T: [f64; MOST_SEEDS as usize - 1] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262];

/// How a model does on clean rows that nobody has seen.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Quality {
    /// Mean −ln q(y) of the answers' tokens, nats.
    pub nll: f64,
    /// Mean KL of the good teacher from it, nats.
    pub kl: Option<f64>,
    /// Share of positions where its most likely token is the good teacher's.
    pub same_top_token: Option<f64>,
}

/// One condition of one seed.
#[derive(Debug, Clone, Serialize)]
pub struct Trial {
    /// The seed.
    pub seed: u64,
    /// Which of the conditions.
    pub condition: usize,
    /// The student before training, in NF4.
    pub base: Quality,
    /// The teacher of the condition.
    pub teacher: Quality,
    /// The arms.
    pub arms: Vec<Quality>,
}

/// A student of the sweep.
#[derive(Debug, Clone, Serialize)]
pub struct Variant {
    /// What was changed.
    pub name: &'static str,
    /// How it does.
    pub quality: Quality,
}

/// A mean over seeds and half of its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    mean: f64,
    /// Absent for one seed.
    half_width: Option<f64>,
}

/// An arm under a condition.
#[derive(Debug, Serialize)]
struct Arm {
    objective: String,
    nll: Interval,
    kl: Interval,
    same_top_token: Interval,
    /// (base − arm) / (base − teacher), of the nll.
    gap_closed: Interval,
    /// arm − sft, of the nll.
    nll_less_sft: Interval,
}

/// A condition over all seeds.
#[derive(Debug, Serialize)]
struct Part {
    condition: &'static str,
    words: &'static str,
    base: Interval,
    teacher: Interval,
    arms: Vec<Arm>,
    /// What may be said of distill against sft.
    distill_against_sft: &'static str,
}

/// What was found.
#[derive(Debug, Serialize)]
pub struct Account {
    seeds: usize,
    parts: Vec<Part>,
    trials: Vec<Trial>,
    /// Of the first seed.
    sweep: Vec<Variant>,
}

impl Interval {
    /// Of at least one value and at most [`MOST_SEEDS`].
    fn of(values: impl IntoIterator<Item = f64>) -> Interval {
        let values: Vec<f64> = values.into_iter().collect();
        let t = values.len().checked_sub(2).and_then(|i| T.get(i));
        let half_width = t.zip(mean::standard_error(&values)).map(|(t, error)| t * error);
        Interval { mean: mean::mean(&values).unwrap_or(f64::NAN), half_width }
    }

    /// Whether all of it lies below 0, all above, or neither.
    fn sign(self) -> Option<std::cmp::Ordering> {
        let half = self.half_width?;
        (self.mean.abs() > half).then(|| self.mean.total_cmp(&0.0))
    }

    fn shown(self, digits: usize) -> String {
        let Interval { mean, half_width } = self;
        half_width.map_or(format!("{mean:.digits$}"), |half| format!("{mean:.digits$} ± {half:.digits$}"))
    }
}

/// What the interval of distill − sft allows to say.
fn verdict(difference: Interval) -> &'static str {
    match (difference.half_width, difference.sign()) {
        (None, _) => "one seed: no interval, so nothing is shown",
        (_, Some(std::cmp::Ordering::Less)) => "distill is better than sft",
        (_, Some(_)) => "sft is better than distill",
        (_, None) => "no difference is shown",
    }
}

impl Account {
    /// Of all conditions of at least one seed.
    pub fn of(trials: Vec<Trial>, sweep: Vec<Variant>) -> Account {
        let parts: Vec<Part> = CONDITIONS
            .iter()
            .enumerate()
            .map(|(number, condition)| {
                let ours: Vec<&Trial> = trials.iter().filter(|trial| trial.condition == number).collect();
                let over = |figure: &dyn Fn(&Trial) -> f64| Interval::of(ours.iter().map(|trial| figure(trial)));
                let arms: Vec<Arm> = ARMS
                    .iter()
                    .enumerate()
                    .map(|(arm, objective)| Arm {
                        objective: objective.to_string(),
                        nll: over(&|trial| trial.arms[arm].nll),
                        kl: over(&|trial| trial.arms[arm].kl.unwrap_or(f64::NAN)),
                        same_top_token: over(&|trial| trial.arms[arm].same_top_token.unwrap_or(f64::NAN)),
                        gap_closed: over(&|trial| (trial.base.nll - trial.arms[arm].nll) / (trial.base.nll - trial.teacher.nll)),
                        nll_less_sft: over(&|trial| trial.arms[arm].nll - trial.arms[0].nll),
                    })
                    .collect();
                let distill_against_sft = verdict(arms[1].nll_less_sft);
                let (base, teacher) = (over(&|trial| trial.base.nll), over(&|trial| trial.teacher.nll));
                Part { condition: condition.name, words: condition.words, base, teacher, arms, distill_against_sft }
            })
            .collect();
        Account { seeds: trials.len() / CONDITIONS.len(), parts, trials, sweep }
    }

    /// For people: a table a condition, and what it shows.
    pub fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        for part in &self.parts {
            writeln!(out, "\n{}: {}\n", part.condition, part.words)?;
            let heads = [
                ("", Side::Left),
                ("nats a token", Side::Right),
                ("gap closed, %", Side::Right),
                ("KL to teacher", Side::Right),
                ("− sft", Side::Right),
            ];
            let mut table = Table::with_heads(&heads);
            let plain = |name: &str, nll: Interval| [name.to_string(), nll.shown(3), String::new(), String::new(), String::new()];
            table.row(plain("base", part.base));
            for arm in &part.arms {
                let percent = Interval {
                    mean: 100.0 * arm.gap_closed.mean,
                    half_width: arm.gap_closed.half_width.map(|half| 100.0 * half),
                };
                let difference = if arm.objective == ARMS[0].to_string() { String::new() } else { arm.nll_less_sft.shown(3) };
                table.row([arm.objective.clone(), arm.nll.shown(3), percent.shown(0), arm.kl.shown(3), difference]);
            }
            table.row(plain("teacher", part.teacher));
            table.write(out)?;
            writeln!(out, "\n{}", part.distill_against_sft)?;
        }
        if !self.sweep.is_empty() {
            writeln!(out, "\na sweep from one cache ({}, first seed): no token was scored again\n", CONDITIONS[SWEPT].name)?;
            let heads = [
                ("distill with", Side::Left),
                ("nats a token", Side::Right),
                ("KL to teacher", Side::Right),
                ("same top token, %", Side::Right),
            ];
            let mut table = Table::with_heads(&heads);
            let shown = |figure: Option<f64>, digits: usize| figure.map_or(String::new(), |figure| format!("{figure:.digits$}"));
            for Variant { name, quality } in &self.sweep {
                let same = shown(quality.same_top_token.map(|share| 100.0 * share), 1);
                table.row([name.to_string(), shown(Some(quality.nll), 3), shown(quality.kl, 3), same]);
            }
            table.write(out)?;
        }
        writeln!(out, "\n{} seeds; ± is half of a 95 % interval (Student's t), differences seed by seed.", self.seeds)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn intervals_are_those_of_students_t() {
        // Mean 2, deviation 1: t of two degrees of freedom over √3.
        let interval = Interval::of([1.0, 2.0, 3.0]);
        assert!((interval.mean - 2.0).abs() < 1e-12 && (interval.half_width.unwrap() - 4.303 / 3f64.sqrt()).abs() < 1e-12);
        assert_eq!(Interval::of([5.0]), Interval { mean: 5.0, half_width: None });
        assert_eq!(Interval::of([1.0, 2.0, 3.0]).shown(2), "2.00 ± 2.48");
        // Ten values are the most; the interval of equal ones has no width.
        assert_eq!(Interval::of([4.0; MOST_SEEDS as usize]).half_width, Some(0.0));
    }

    #[test]
    fn a_difference_is_shown_only_where_its_interval_leaves_out_zero() {
        let said = |values: &[f64]| verdict(Interval::of(values.iter().copied()));
        assert_eq!(said(&[-0.5, -0.51, -0.52]), "distill is better than sft");
        assert_eq!(said(&[0.5, 0.51, 0.52]), "sft is better than distill");
        assert_eq!(said(&[-0.5, 0.1, -0.2]), "no difference is shown");
        assert_eq!(said(&[-0.5]), "one seed: no interval, so nothing is shown");
    }

    #[test]
    fn arms_are_compared_within_their_seed() {
        let quality = |nll: f64| Quality { nll, kl: Some(nll / 2.0), same_top_token: Some(0.5) };
        // Seeds differ by far more than arms do.
        let trials: Vec<Trial> = [1.0, 5.0, 9.0]
            .iter()
            .enumerate()
            .flat_map(|(i, at)| {
                (0..CONDITIONS.len()).map(move |condition| Trial {
                    seed: i as u64,
                    condition,
                    base: quality(at + 1.0),
                    teacher: quality(*at),
                    arms: vec![quality(at + 0.5), quality(at + 0.25 + 0.001 * i as f64), quality(at + 0.75)],
                })
            })
            .collect();
        let account = Account::of(trials, vec![Variant { name: "T = 2", quality: quality(1.0) }]);
        assert_eq!(account.seeds, 3);
        for part in &account.parts {
            assert_eq!(part.distill_against_sft, "distill is better than sft");
            assert!((part.arms[0].gap_closed.mean - 0.5).abs() < 1e-12, "{part:?}");
            assert!((part.arms[2].gap_closed.mean - 0.25).abs() < 1e-12, "{part:?}");
            assert!((part.arms[2].nll_less_sft.mean - 0.25).abs() < 1e-12, "{part:?}");
        }
        let mut text = Vec::new();
        account.write(&mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.lines().all(|line| crate::text::width(line) <= 80), "{text}");
    }
}
