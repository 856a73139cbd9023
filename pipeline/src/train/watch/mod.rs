//! What people watch while a run goes on: progress, `metrics.jsonl`, TensorBoard, and held-out evaluation with what follows from it:
//! the best adapter so far, and an early end.
//!
//! Nothing here changes a weight. What an evaluation found is part of the run's progress and lies in the checkpoint, so that a resumed
//! run has the same best adapter and ends at the same step.

mod figures;
mod held_out;
mod probe;
mod tensorboard;

pub use figures::Evaluation;
pub(super) use held_out::{HeldOut, left_out};

use super::checkpoint::{Progress, RunFolder};
use super::metrics::{Metrics, Pace, StepMetrics};
use super::provenance::Provenance;
use super::{BEST_FOLDER, Step, TrainConfig, bad_steps, digests, files};
use crate::Result;
use crate::loss::LossSettings;
use crate::run::RunContext;
use crate::student::Student;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Instant;
use tensorboard::Board;

/// Default for [`TrainConfig::eval_every`], in optimiser steps.
pub const DEFAULT_EVAL_EVERY: u64 = 100;
/// File of the best adapter's folder that says which evaluation it was the best of.
const EVALUATION_FILE: &str = "evaluation.json";
/// Largest such file read, in bytes.
const MAX_EVALUATION_BYTES: u64 = 1 << 16;

/// How evaluations stand; part of a run's progress.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Standing {
    /// Held-out positions.
    positions: u64,
    /// The first, the last, and the best evaluation.
    first: Option<Evaluation>,
    last: Option<Evaluation>,
    best: Option<Evaluation>,
    /// The lowest loss of an evaluation that was due by `eval_every`, as against one at a run's end.
    lowest_due: Option<f32>,
    /// Due evaluations since that one. One at a run's end may become the best, but patience does not see it: the run may be made
    /// longer, and then ends where it would have ended without a stop there.
    without_improvement: u32,
}

impl Standing {
    /// Takes an evaluation in; whether it is the best so far.
    fn take(&mut self, evaluation: Evaluation, positions: u64, every: u64) -> bool {
        let better = self.best.as_ref().is_none_or(|best| evaluation.loss < best.loss);
        if better {
            self.best = Some(evaluation.clone());
        }
        if evaluation.step.is_multiple_of(every) {
            let lower = self.lowest_due.is_none_or(|lowest| evaluation.loss < lowest);
            self.without_improvement = if lower { 0 } else { self.without_improvement + 1 };
            self.lowest_due = if lower { Some(evaluation.loss) } else { self.lowest_due };
        }
        self.positions = positions;
        self.first.get_or_insert_with(|| evaluation.clone());
        self.last = Some(evaluation);
        better
    }

    /// Step of the last evaluation; 0 before the first.
    fn evaluated(&self) -> u64 {
        self.last.as_ref().map_or(0, |last| last.step)
    }

    /// Figures of the evaluation at this step, by name; none where there was none.
    pub(super) fn figures(&self, step: u64) -> Vec<(&'static str, f32)> {
        self.last.as_ref().filter(|last| last.step == step).map(Evaluation::figures).unwrap_or_default()
    }

    /// Whether the run ends because as many evaluations as are borne with brought nothing.
    pub(super) fn ends(&self, config: &TrainConfig) -> bool {
        config.patience > 0 && self.without_improvement >= config.patience
    }
}

/// What evaluations found, for the run's report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeldOutReport {
    /// Rows held out.
    pub rows: u64,
    /// Scored positions in them.
    pub positions: u64,
    /// The first evaluation of the whole run.
    pub first: Evaluation,
    /// The last one.
    pub last: Evaluation,
    /// The one with the lowest loss.
    pub best: Evaluation,
    /// Folder of the best one's adapter.
    pub adapter: PathBuf,
    /// Why the run ended before its last step, if it did.
    pub stopped_early: Option<String>,
}

/// What came of asking for an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Evaluated {
    /// None was due.
    No,
    /// One was due, and a stop was asked for.
    Stopped,
    /// The student is not better than the best so far.
    NotBetter,
    /// It is the best so far.
    Best,
}

impl Evaluated {
    /// Whether there was one.
    pub(super) fn was_made(self) -> bool {
        matches!(self, Evaluated::NotBetter | Evaluated::Best)
    }
}

/// Everything that watches one run.
#[derive(Debug)]
pub(super) struct Watch<'a> {
    config: &'a TrainConfig,
    provenance: Provenance,
    metrics: Metrics,
    board: Option<Board>,
    held_out: Option<HeldOut>,
    best: PathBuf,
    pace: Pace,
    started: Instant,
}

impl<'a> Watch<'a> {
    /// Opens the run's files at `progress`, and puts `best/` where that has it: a folder of a later step is set aside, and one that a
    /// kill kept from being written is written now, from the student restored.
    pub(super) fn open(
        config: &'a TrainConfig,
        provenance: Provenance,
        folder: &RunFolder,
        held_out: Option<HeldOut>,
        (student, progress): (&Student, &Progress),
    ) -> Result<Self> {
        let out = folder.path();
        let metrics = Metrics::open(out, progress.step, progress.standing.evaluated())?;
        let board = config.tensorboard.then(|| Board::create(out, progress.step + 1)).transpose()?;
        let started = Instant::now();
        let best = out.join(BEST_FOLDER);
        let watch = Self { config, provenance, metrics, board, held_out, best, pace: Pace::new(started), started };
        let step = progress.standing.best.as_ref().map(|best| best.step);
        if watch.best.exists() && watch.best_step() != step {
            folder.set_aside(&watch.best)?;
        }
        if step == Some(progress.step) && !watch.best.exists() {
            watch.write_best(student, progress)?;
        }
        Ok(watch)
    }

    /// Counts the step that `progress` has just counted.
    pub(super) fn step(
        &mut self,
        progress: &Progress,
        (step, loss): (&Step, &LossSettings),
        lr: f64,
        grad_norm: f64,
        context: &RunContext,
    ) -> Result<()> {
        let now = Instant::now();
        let speed = self.pace.count(now, step.tokens);
        let line = StepMetrics::new(progress, step, loss, lr, grad_norm, (speed, now.duration_since(self.started)));
        self.metrics.step(&line)?;
        if let Some(board) = &mut self.board {
            board.scalars(progress.step, &tagged("train", &line.figures()))?;
        }
        context.progress.add(1);
        context.progress.note(format!("{}{}", line.remark(loss), bad_steps::remark(progress)));
        Ok(())
    }

    /// Evaluates the student where an evaluation is due at `progress` and was not made yet.
    pub(super) fn evaluate(
        &mut self,
        student: &Student,
        progress: &mut Progress,
        total: u64,
        context: &RunContext,
    ) -> Result<Evaluated> {
        let step = progress.step;
        let due = step > 0 && (step.is_multiple_of(self.config.eval_every) || step == total);
        let Some(held_out) = self.held_out.as_ref().filter(|_| due && progress.standing.evaluated() < step) else {
            return Ok(Evaluated::No);
        };
        let Some((evaluation, positions)) = held_out.evaluate(student, self.config, step, context)? else {
            return Ok(Evaluated::Stopped);
        };
        self.metrics.evaluation(&evaluation)?;
        if let Some(board) = &mut self.board {
            let figures: Vec<_> = evaluation.figures().into_iter().map(|(name, value)| (name, f64::from(value))).collect();
            board.scalars(step, &tagged("eval", &figures))?;
        }
        context.progress.note(format!("held-out loss {:.4}", evaluation.loss));
        self.pace.restart(Instant::now());
        let better = progress.standing.take(evaluation, positions, self.config.eval_every);
        Ok(if better { Evaluated::Best } else { Evaluated::NotBetter })
    }

    /// Makes every line durable; done before a checkpoint of the same step appears.
    pub(super) fn sync(&self) -> Result<()> {
        self.metrics.sync()
    }

    /// Writes the student as the best so far; done after the checkpoint of the same step, which says that it is.
    pub(super) fn write_best(&self, student: &Student, progress: &Progress) -> Result<()> {
        self.provenance.save(&self.best, student, progress)?;
        let path = self.best.join(EVALUATION_FILE);
        let text = serde_json::to_vec_pretty(&progress.standing.best).map_err(|e| files::io(&path)(e.into()))?;
        files::write(&path, &text)?;
        digests::write(&self.best)
    }

    /// What an adapter's folder tells of the run.
    pub(super) fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// Which step's adapter `best/` holds whole.
    fn best_step(&self) -> Option<u64> {
        #[derive(Deserialize)]
        struct Best {
            step: u64,
        }
        // A folder without its digests was being written when a kill came.
        digests::check(&self.best, &[EVALUATION_FILE]).ok()?;
        let text = crate::bounded::read(&self.best.join(EVALUATION_FILE), MAX_EVALUATION_BYTES).ok()?;
        serde_json::from_slice::<Best>(&text).ok().map(|best| best.step)
    }

    /// What evaluations found; `None` where nothing was held out.
    pub(super) fn report(&self, progress: &Progress, total: u64) -> Option<HeldOutReport> {
        let Standing { positions, first, last, best, without_improvement, .. } = progress.standing.clone();
        let early = progress.standing.ends(self.config) && progress.step < total;
        let best = best?;
        let stopped_early = early.then(|| {
            let plural = if without_improvement == 1 { "" } else { "s" };
            format!("at step {} of {total}: no lower held-out loss in {without_improvement} evaluation{plural}", progress.step)
        });
        let rows = self.held_out.as_ref()?.rows();
        Some(HeldOutReport { rows, positions, first: first?, last: last?, best, adapter: self.best.clone(), stopped_early })
    }
}

fn tagged(group: &str, figures: &[(&str, f64)]) -> Vec<(String, f64)> {
    figures.iter().map(|(name, value)| (format!("{group}/{name}"), *value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluation(step: u64, loss: f32) -> Evaluation {
        Evaluation {
            step,
            positions_not_finite: 0,
            loss,
            kd: None,
            ce: loss,
            perplexity: loss.exp(),
            agreement: None,
            kept_mass: None,
            teacher_kept_mass: None,
            ece: 0.0,
            angle: None,
            teacher_ece: None,
        }
    }

    #[test]
    fn an_evaluation_that_was_not_due_moves_the_best_and_not_the_end() {
        let config = TrainConfig { patience: 2, ..TrainConfig::default() };
        let standing = |losses: &[(u64, f32)]| {
            let mut standing = Standing::default();
            let better = |(step, loss): &(u64, f32)| standing.take(evaluation(*step, *loss), 9, 100);
            let better: Vec<bool> = losses.iter().map(better).collect();
            (standing, better)
        };
        let (cut, better) = standing(&[(100, 2.0), (150, 1.5), (200, 1.8), (300, 1.6)]);
        assert_eq!(better, [true, true, false, false]);
        assert_eq!((cut.best.as_ref().map(|best| best.step), cut.ends(&config)), (Some(150), false));
        let (whole, better) = standing(&[(100, 2.0), (200, 1.8), (300, 1.6)]);
        assert_eq!(better, [true; 3]);
        assert_eq!(whole.without_improvement, cut.without_improvement, "where it ends does not depend on a stop at 150");
        let (worse, _) = standing(&[(100, 2.0), (150, 2.5), (200, 2.1), (250, 2.2), (300, 2.0)]);
        assert!(worse.ends(&config), "two that were due and not lower");
    }
}
