//! STAGE TWO: cache → packs → NF4 student + LoRA → loss → adapter. The loop a newcomer reads second.
//!
//! Owns the order of things. A step takes `batch_size` rows in the sampler's order, cuts them into packs, adds up their gradients
//! and divides by the step's scored positions, so that how rows fall into packs changes no more than last bits. Everything a step does is a
//! function of (settings, cache, step), which is what makes an exact resume possible: a checkpoint holds adapter, optimiser
//! state and the step, and nothing else is needed.

mod accumulation;
mod bad_steps;
mod checkpoint;
mod config;
mod digests;
mod distillation;
mod error;
mod files;
mod identity;
mod metrics;
pub mod optimizer;
pub mod outlook;
mod provenance;
pub mod ranks;
mod reading;
mod report;
mod rows;
pub mod schedule;
mod watch;

pub use bad_steps::MOST_IN_A_ROW;
pub use checkpoint::SMOOTHED;
pub use config::*;
pub use distillation::{DEFAULT_MAX_UNKNOWN_MASS, DivergenceName, LossPlan, LossSchedule, TailName};
pub use error::TrainError;
pub use report::{Objective, Resume, TrainReport};
pub use watch::{DEFAULT_EVAL_EVERY, Evaluation, HeldOutReport};

use crate::model::config::ModelConfig;
use crate::pairing;
use crate::run::{RUN_AGAIN, RunContext};
use crate::student::{Student, Walk};
use crate::{Error, Result, device};
use accumulation::{Step, accumulate};
use checkpoint::{Checkpoint, Found, Progress, RunFolder};
use optimizer::AdamW;
use potstill_cache::{Cache, Record};
use provenance::Provenance;
use ranks::{Next, RankError, Ranks};
use reading::Reading;
use rows::{Rows, Steps};
use schedule::Rates;
use std::time::Instant;
use watch::{Evaluated, HeldOut, Watch};

/// Name of the folder of the finished adapter within `out`.
pub const ADAPTER_FOLDER: &str = "adapter";
/// Name of the folder of the adapter with the lowest held-out loss within `out`.
pub const BEST_FOLDER: &str = "best";

/// Runs stage two in this process alone.
///
/// A step whose loss or gradient is not finite is skipped and counted. Errors: bad settings, a cache that is incomplete or made with
/// another vocabulary, chats that cannot be read, a model folder that does not fit, a run folder in use or of another run,
/// [`MOST_IN_A_ROW`] such steps in a row, a stop asked for by `context` (after a durable checkpoint).
pub fn run(config: &TrainConfig, context: &RunContext) -> Result<TrainReport> {
    run_as(config, &Ranks::alone(), context)
}

/// Runs stage two as one of several processes, each of which is given the same settings. Rank 0 alone evaluates and writes, and its
/// report alone knows of evaluations.
///
/// Errors: as [`run`]; a rank that differs, fails or is gone ends all of them.
pub fn run_as(config: &TrainConfig, ranks: &Ranks, context: &RunContext) -> Result<TrainReport> {
    train(config, ranks, context).map_err(|error| ranks.fail(error, context))
}

fn train(config: &TrainConfig, ranks: &Ranks, context: &RunContext) -> Result<TrainReport> {
    let (mut run, mut steps) = prepare(config, ranks, context)?;
    let (first_step, first_tokens) = (run.progress.step, run.progress.tokens);
    let (mut saved, mut stopping) = (first_step, false);
    context.progress.begin_at("training", "steps", run.total, first_step);
    loop {
        let evaluated = run.evaluate(context);
        if evaluated.is_err() && run.progress.step > saved {
            // What was trained is kept, whatever the evaluation of it came to.
            run.save()?;
        }
        let evaluated = evaluated?;
        let step = run.progress.step;
        let over = step >= run.total || run.progress.standing.ends(config);
        stopping |= evaluated == Evaluated::Stopped || context.stopping() && !over;
        // A better student is saved at once, so that checkpoint and best/ speak of the same evaluation.
        let due = stopping || over || evaluated == Evaluated::Best || config.checkpoint_due(step);
        let saves = due && (step > saved || evaluated.was_made());
        let next = if stopping {
            Next::Stop
        } else if over {
            Next::End
        } else {
            Next::Step
        };
        let next = run.keeping(saved, ranks.word(next, saves || step == first_step, step, || run.digest()))?;
        if saves {
            run.save()?;
            saved = step;
        }
        if evaluated == Evaluated::Best {
            run.write_best()?;
        }
        match next {
            Next::Step => {}
            Next::End => break,
            Next::Stop => {
                ranks.part(context)?;
                return Err(interrupted(config, &run.progress));
            }
        }
        let walked = run.step(&steps.next(config)?, context);
        stopping = run.keeping(saved, walked)? == Walk::Stopped;
    }
    context.progress.end();
    run.finish(first_step, first_tokens, context)
}

/// A run under way.
struct Run<'a> {
    config: &'a TrainConfig,
    ranks: &'a Ranks,
    plan: LossPlan,
    reading: Option<Reading>,
    rates: Rates,
    /// Steps it will have.
    total: u64,
    student: Student,
    adamw: AdamW,
    progress: Progress,
    /// Rank 0's alone.
    ledger: Option<Ledger<'a>>,
    /// What its report says and no step changes.
    report: TrainReport,
    started: Instant,
}

/// What is written of a run: its folder, and what is watched.
struct Ledger<'a> {
    folder: RunFolder,
    watch: Watch<'a>,
}

/// Opens everything a run needs and puts it where its checkpoint was. What can be refused at once is refused before weights are hashed
/// and read.
fn prepare<'a>(config: &'a TrainConfig, ranks: &'a Ranks, context: &RunContext) -> Result<(Run<'a>, Steps)> {
    let mut plan = config.loss_plan()?;
    config.check_schedule()?;
    let device = device::pick(&config.device, context)?;
    let nccl = config.dist_backend.check(&device)?;
    let rows = Rows::open(config, context)?;
    config.check_layers(ModelConfig::from_folder(&config.student)?.layers)?;
    let reading = rows.cache().map(|cache| Reading::of(config, cache, &mut plan)).transpose()?;
    let (mut left_out, mut held_out, mut targets) = (Vec::new(), None, "the data's tokens".to_string());
    if let Some((cache, reading)) = rows.cache().zip(reading.as_ref()) {
        targets = reading.in_words(&cache.manifest().description, &plan);
        left_out = watch::left_out(config, cache)?;
        // Held-out losses are those of the first step's loss, so that they stay comparable.
        held_out = HeldOut::open(config, cache, &left_out, (plan.start(), reading))?;
    }
    let total = config.total_steps(rows.len() - left_out.len() as u64);
    let folder = ranks.writes().then(|| RunFolder::open(config)).transpose()?;
    let found = folder.as_ref().map(|folder| folder.find(config, total)).transpose()?;
    let Found { checkpoint: mut found, passed_over } = found.unwrap_or_default();
    let identity = identity::of(config, (&plan, reading.as_ref()), &rows, (total, ranks.of()), context)?;
    found.as_ref().map_or(Ok(()), |checkpoint| checkpoint.check_identity(&identity))?;
    passed_over.iter().for_each(|sentence| context.warn(sentence));
    let from = ranks.agree(&identity, (total, config.dist_backend), found.as_ref().map(Checkpoint::step))?;
    if folder.is_none() {
        found = from.map(|step| Checkpoint::of_step(config, step, &identity)).transpose()?;
    }
    ranks.connect(config.dist_backend, &device, context)?;
    let mut student = Student::from_folder(&config.student, &config.lora(), config.compute, &device, context)?;
    student.keep_layers(config.keep_layers as usize);
    let mut adamw = AdamW::new(config.optimizer(), &student.parameters())?;
    let progress = found.map(|checkpoint| checkpoint.restore(&mut student, &mut adamw)).transpose()?.unwrap_or_default();
    let mut ledger = None;
    if let Some(folder) = folder {
        folder.begin(config, progress.step)?;
        let provenance = Provenance::of(config, (&plan, &targets), &rows, identity);
        let watch = Watch::open(config, provenance, &folder, held_out, (&student, &progress))?;
        ledger = Some(Ledger { folder, watch });
    }
    let report = TrainReport { targets, nccl, skipped: rows.skipped(), passed_over, ..TrainReport::default() };
    let steps = rows.steps(config, left_out, progress.step)?;
    let (rates, started) = (config.rates(total), Instant::now());
    Ok((Run { config, ranks, plan, reading, rates, total, student, adamw, progress, ledger, report, started }, steps))
}

impl Run<'_> {
    /// Evaluates where that is due, and this is the rank that does.
    fn evaluate(&mut self, context: &RunContext) -> Result<Evaluated> {
        let Some(ledger) = &mut self.ledger else { return Ok(Evaluated::No) };
        ledger.watch.evaluate(&self.student, &mut self.progress, self.total, context)
    }

    /// One step over these rows.
    fn step(&mut self, records: &[Record], context: &RunContext) -> Result<Walk> {
        let number = self.progress.step;
        let loss = self.plan.at(number, self.total);
        let learned = (&loss, self.reading.as_ref());
        let accumulated = accumulate((&self.student, number), records, self.config, learned, (self.ranks, context))?;
        let Some(mut step) = accumulated else { return Ok(Walk::Stopped) };
        let grad_norm = optimizer::clip(&mut step.gradients, self.config.max_grad_norm)?;
        let lr = self.rates.at(number);
        let taken = step.mean.total.is_finite() && grad_norm.is_finite();
        // Of rows that were all left out nothing is learned, and no weight decays.
        if taken && step.scored > 0 {
            self.adamw.step(&self.student.parameters(), &step.gradients, lr)?;
        }
        match (taken, &self.ledger) {
            (true, _) => self.progress.advance((step.scored > 0).then_some(step.mean.total), step.tokens),
            (false, None) => self.progress.skip(step.tokens),
            (false, Some(ledger)) => {
                bad_steps::skip(ledger.folder.path(), &mut self.progress, (&step, grad_norm), records, &self.student)?;
            }
        }
        match &mut self.ledger {
            Some(ledger) => ledger.watch.step(&self.progress, (&step, &loss), lr, grad_norm, context)?,
            None => context.progress.add(1),
        }
        bad_steps::check(&self.config.out, &self.progress, (&step, grad_norm))?;
        Ok(Walk::Done)
    }

    /// Writes a checkpoint of where the run is.
    fn save(&self) -> Result<()> {
        let Some(Ledger { folder, watch }) = &self.ledger else { return Ok(()) };
        watch.sync()?;
        folder.save(self.config, watch.provenance(), &self.student, &self.adamw, &self.progress)
    }

    /// Writes the student as the best so far.
    fn write_best(&self) -> Result<()> {
        self.ledger.as_ref().map_or(Ok(()), |ledger| ledger.watch.write_best(&self.student, &self.progress))
    }

    /// Passes on what came of talking to other ranks. Where that has ended, what was trained since the checkpoint of step `saved` is kept.
    fn keeping<T>(&self, saved: u64, result: Result<T>) -> Result<T> {
        let ended =
            matches!(result, Err(Error::Ranks(RankError::Gone { .. } | RankError::Ended { .. } | RankError::Nccl { .. })));
        if ended && self.progress.step > saved {
            self.save()?;
        }
        result
    }

    /// What all ranks' adapters must have in common.
    fn digest(&self) -> Result<[u8; 32]> {
        ranks::digest(&self.student.parameters(), self.adamw.steps())
    }

    /// Writes the finished adapter and says what the run did, which began at a step and with so many tokens.
    fn finish(self, first_step: u64, first_tokens: u64, context: &RunContext) -> Result<TrainReport> {
        let Self { progress, rates, student, ledger, ranks, .. } = self;
        let adapter = self.config.out.join(ADAPTER_FOLDER);
        if let Some(ledger) = &ledger {
            ledger.watch.provenance().save(&adapter, &student, &progress)?;
            digests::write(&adapter)?;
        }
        ranks.part(context)?;
        Ok(TrainReport {
            skipped_steps: progress.skipped,
            steps: progress.step,
            resumed_from: first_step,
            first_loss: progress.first_loss(),
            last_loss: progress.last_loss(),
            highest_lr: (0..progress.step).map(|step| rates.at(step)).fold(0.0, f64::max),
            tokens: progress.tokens - first_tokens,
            parameters: student.parameters().iter().map(|(_, t)| t.elem_count() as u64).sum(),
            seconds: self.started.elapsed().as_secs_f64(),
            held_out: ledger.as_ref().and_then(|ledger| ledger.watch.report(&progress, self.total)),
            ranks: Some(ranks.of()).filter(|ranks| *ranks > 1),
            adapter,
            ..self.report
        })
    }
}

/// What a stop leaves, and how to go on from it.
fn interrupted(config: &TrainConfig, progress: &Progress) -> Error {
    let kept = match progress.step {
        0 => "no step was finished".into(),
        step => format!("checkpoint-{step} is durable"),
    };
    let again = if config.resume == Resume::Latest { RUN_AGAIN } else { "continue with --resume latest" };
    Error::Interrupted { kept, again }
}

/// Opens the cache and checks that the student can be trained from it.
fn open_cache(config: &TrainConfig) -> Result<Cache> {
    let cache = pairing::open(&config.student, &config.cache)?;
    ModelConfig::from_folder(&config.student)?.check_dense(&config.student)?;
    Ok(cache)
}

#[cfg(test)]
#[path = "crash_tests.rs"]
mod tests;
