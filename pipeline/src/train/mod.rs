//! STAGE TWO: cache → packs → NF4 student + LoRA → loss → adapter. The loop a newcomer reads second.
//!
//! Owns the order of things. A step takes `batch_size` rows in the sampler's order, cuts them into packs, adds up their gradients
//! and divides by the step's scored positions, so that how rows fall into packs changes no more than last bits. Everything a step does is a
//! function of (settings, cache, step), which is what makes an exact resume possible: a checkpoint holds adapter, optimiser
//! state and the step, and nothing else is needed.

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

use crate::data::pack::{self, Pack, Sequence};
use crate::loss::{self, Batch, LossSettings, LossSums};
use crate::model::config::ModelConfig;
use crate::pairing;
use crate::run::{RUN_AGAIN, RunContext};
use crate::student::{Moment, Student, Walk};
use crate::{Error, Result, device};
use candle_core::Tensor;
use checkpoint::{Found, Progress, RunFolder};
use optimizer::AdamW;
use potstill_cache::{Cache, Record, SoftTargets};
use provenance::Provenance;
use reading::Reading;
use rows::{Rows, Steps};
use schedule::Rates;
use watch::{Evaluated, HeldOut, Watch};

/// Name of the folder of the finished adapter within `out`.
pub const ADAPTER_FOLDER: &str = "adapter";
/// Name of the folder of the adapter with the lowest held-out loss within `out`.
pub const BEST_FOLDER: &str = "best";

/// Runs stage two.
///
/// A step whose loss or gradient is not finite is skipped and counted. Errors: bad settings, a cache that is incomplete or made with
/// another vocabulary, chats that cannot be read, a model folder that does not fit, a run folder in use or of another run,
/// [`MOST_IN_A_ROW`] such steps in a row, a stop asked for by `context` (after a durable checkpoint).
pub fn run(config: &TrainConfig, context: &RunContext) -> Result<TrainReport> {
    let (mut run, mut steps) = prepare(config, context)?;
    let (first_step, first_tokens) = (run.progress.step, run.progress.tokens);
    let (mut saved, mut stopping) = (first_step, false);
    context.progress.begin_at("training", "steps", run.total, first_step);
    loop {
        let evaluated = run.watch.evaluate(&run.student, &mut run.progress, run.total, context);
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
        if due && (step > saved || evaluated.was_made()) {
            run.save()?;
            saved = step;
        }
        if evaluated == Evaluated::Best {
            run.watch.write_best(&run.student, &run.progress)?;
        }
        if stopping {
            return Err(interrupted(config, &run.progress));
        }
        if over {
            break;
        }
        stopping = run.step(&steps.next(config)?, context)? == Walk::Stopped;
    }
    context.progress.end();
    run.finish(first_step, first_tokens)
}

/// A run under way.
struct Run<'a> {
    config: &'a TrainConfig,
    plan: LossPlan,
    reading: Option<Reading>,
    rates: Rates,
    /// Steps it will have.
    total: u64,
    folder: RunFolder,
    student: Student,
    adamw: AdamW,
    progress: Progress,
    watch: Watch<'a>,
    /// What its report says and no step changes.
    report: TrainReport,
}

/// Opens everything a run needs and puts it where its checkpoint was. What can be refused at once is refused before weights are hashed
/// and read.
fn prepare<'a>(config: &'a TrainConfig, context: &RunContext) -> Result<(Run<'a>, Steps)> {
    let mut plan = config.loss_plan()?;
    config.check_schedule()?;
    let device = device::pick(&config.device, context)?;
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
    let folder = RunFolder::open(config)?;
    let Found { checkpoint: found, passed_over } = folder.find(config, total)?;
    let identity = identity::of(config, (&plan, reading.as_ref()), &rows, total, context)?;
    found.as_ref().map_or(Ok(()), |checkpoint| checkpoint.check_identity(&identity))?;
    passed_over.iter().for_each(|sentence| context.warn(sentence));
    let mut student = Student::from_folder(&config.student, &config.lora(), config.compute, &device, context)?;
    student.keep_layers(config.keep_layers as usize);
    let mut adamw = AdamW::new(config.optimizer(), &student.parameters())?;
    let progress = match found {
        Some(checkpoint) => folder.restore(checkpoint, &mut student, &mut adamw)?,
        None => Progress::default(),
    };
    folder.write_settings(config)?;
    let provenance = Provenance::of(config, (&plan, &targets), &rows, identity);
    // A run that was killed after its last checkpoint appeared has not got as far.
    folder.prune(config.keep_checkpoints as usize)?;
    let watch = Watch::open(config, provenance, &folder, held_out, (&student, &progress))?;
    let report = TrainReport { targets, skipped: rows.skipped(), passed_over, ..TrainReport::default() };
    let steps = rows.steps(config, left_out, progress.step)?;
    let rates = config.rates(total);
    Ok((Run { config, plan, reading, rates, total, folder, student, adamw, progress, watch, report }, steps))
}

impl Run<'_> {
    /// One step over these rows.
    fn step(&mut self, records: &[Record], context: &RunContext) -> Result<Walk> {
        let number = self.progress.step;
        let loss = self.plan.at(number, self.total);
        let accumulated = accumulate((&self.student, number), records, self.config, (&loss, self.reading.as_ref()), context)?;
        let Some(mut step) = accumulated else { return Ok(Walk::Stopped) };
        let grad_norm = optimizer::clip(&mut step.gradients, self.config.max_grad_norm)?;
        let lr = self.rates.at(number);
        let taken = step.mean.total.is_finite() && grad_norm.is_finite();
        // Of rows that were all left out nothing is learned, and no weight decays.
        if taken && step.scored > 0 {
            self.adamw.step(&self.student.parameters(), &step.gradients, lr)?;
        }
        let out = self.folder.path();
        match taken {
            true => self.progress.advance((step.scored > 0).then_some(step.mean.total), step.tokens),
            false => bad_steps::skip(out, &mut self.progress, (&step, grad_norm), records, &self.student)?,
        }
        self.watch.step(&self.progress, (&step, &loss), lr, grad_norm, context)?;
        bad_steps::check(out, &self.progress, (&step, grad_norm))?;
        Ok(Walk::Done)
    }

    /// Writes a checkpoint of where the run is.
    fn save(&self) -> Result<()> {
        self.watch.sync()?;
        self.folder.save(self.config, self.watch.provenance(), &self.student, &self.adamw, &self.progress)
    }

    /// Writes the finished adapter and says what the run did, which began at a step and with so many tokens.
    fn finish(self, first_step: u64, first_tokens: u64) -> Result<TrainReport> {
        let Self { progress, rates, watch, student, .. } = self;
        let adapter = self.folder.path().join(ADAPTER_FOLDER);
        watch.provenance().save(&adapter, &student, &progress)?;
        digests::write(&adapter)?;
        Ok(TrainReport {
            skipped_steps: progress.skipped,
            steps: progress.step,
            resumed_from: first_step,
            first_loss: progress.first_loss(),
            last_loss: progress.last_loss(),
            highest_lr: (0..progress.step).map(|step| rates.at(step)).fold(0.0, f64::max),
            tokens: progress.tokens - first_tokens,
            parameters: student.parameters().iter().map(|(_, t)| t.elem_count() as u64).sum(),
            seconds: watch.seconds(),
            held_out: watch.report(&progress, self.total),
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

/// What the packs of a step add up to.
#[derive(Debug, Default)]
struct Step {
    /// Losses, as means over the step's scored positions.
    mean: LossSums,
    /// Gradients of that mean, in the order of the parameters.
    gradients: Vec<Tensor>,
    tokens: u64,
    scored: u64,
}

/// Mean loss over the step's scored positions, and its gradients: a sum over packs. `None` when a stop was asked for.
fn accumulate(
    (student, number): (&Student, u64),
    records: &[Record],
    config: &TrainConfig,
    (settings, reading): (&LossSettings, Option<&Reading>),
    context: &RunContext,
) -> Result<Option<Step>> {
    // A row without scored positions is a conversation that the teacher could not score.
    let records: Vec<&Record> = records.iter().filter(|r| !r.positions.is_empty()).collect();
    let scored: usize = records.iter().map(|r| r.positions.len()).sum();
    let scale = 1.0 / scored.max(1) as f64;
    let mut step = Step { scored: scored as u64, ..Step::default() };
    for range in pack::plan(records.iter().map(|r| r.input_ids.len()), config.pack_tokens as usize) {
        if context.stopping() {
            return Ok(None);
        }
        let records = &records[range];
        let pack = Pack::new(records.iter().map(|r| Sequence { input_ids: &r.input_ids, positions: &r.positions }));
        // Without a distillation term the distributions are not looked at.
        let reading = reading.filter(|_| settings.kd_alpha > 0.0);
        let targets = reading.map(|reading| {
            let mut targets = SoftTargets::with_capacity(pack.scored().len(), 0);
            records.iter().for_each(|r| targets.extend(&reading.targets(&r.targets)));
            targets
        });
        let lse_t = targets.as_ref().zip(reading).and_then(|(targets, reading)| reading.lse_t(targets));
        let (targets, lse_t) = (targets.as_ref(), lse_t.as_deref());
        let batch = Batch { labels: pack.labels(), targets, lse_t, settings, scale };
        let moment = Moment { step: number, first_row: step.tokens as usize };
        let Some((hidden, tape)) = student.forward_training(&pack, moment, context)? else { return Ok(None) };
        let fused = loss::fused_batch(&hidden, student.head(), &batch, config.head_chunk as usize, context)?;
        let Some((sums, d_hidden)) = fused else { return Ok(None) };
        if student.backward_training(tape, &d_hidden, &mut step.gradients, context)? == Walk::Stopped {
            return Ok(None);
        }
        step.mean.total += sums.total * scale;
        step.mean.kd += sums.kd * scale;
        step.mean.ce += sums.ce * scale;
        step.tokens += pack.input_ids().len() as u64;
    }
    Ok(Some(step))
}

#[cfg(test)]
#[path = "crash_tests.rs"]
mod tests;
