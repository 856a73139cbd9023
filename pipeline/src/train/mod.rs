//! STAGE TWO: cache → packs → NF4 student + LoRA → loss → adapter. The loop a newcomer reads second.
//!
//! Owns the order of things. A step takes `batch_size` rows in the sampler's order, cuts them into packs, adds up their gradients
//! and divides by the step's scored positions, so that how rows fall into packs changes no more than last bits. Everything a step does is a
//! function of (settings, cache, step), which is what makes an exact resume possible: a checkpoint holds adapter, optimiser
//! state and the step, and nothing else is needed.

mod checkpoint;
mod config;
mod distillation;
mod error;
mod identity;
mod metrics;
pub mod optimizer;
pub mod outlook;
mod provenance;
mod reading;
pub mod schedule;

pub use config::*;
pub use distillation::{DEFAULT_MAX_UNKNOWN_MASS, DivergenceName, LossPlan, LossSchedule, TailName};
pub use error::TrainError;

use crate::data::ChatTokenizer;
use crate::data::pack::{self, Pack, Sequence};
use crate::loss::{self, Batch, LossSettings, LossSums};
use crate::model::config::ModelConfig;
use crate::run::{RUN_AGAIN, RunContext};
use crate::student::Student;
use crate::{Error, Result, device};
use candle_core::Tensor;
use checkpoint::{Progress, RunFolder};
use metrics::{Metrics, StepMetrics};
use optimizer::AdamW;
use potstill_cache::{Batches, Cache, Order, Record, Sampler, SoftTargets};
use provenance::Provenance;
use reading::Reading;
use std::sync::Arc;
use std::time::Instant;

/// Name of the folder of the finished adapter within `out`.
pub const ADAPTER_FOLDER: &str = "adapter";

/// Runs stage two.
///
/// Errors: bad settings, a cache that is incomplete or made with another vocabulary, a model folder that does not fit, a run
/// folder in use or of another run, a loss that is not finite, a stop asked for by `context` (after a durable checkpoint).
pub fn run(config: &TrainConfig, context: &RunContext) -> Result<TrainReport> {
    let mut plan = config.loss_plan()?;
    let device = device::pick(&config.device)?;
    // What can be refused at once is refused before weights are hashed and read.
    let cache = open_cache(config)?;
    let reading = Reading::of(config, &cache, &mut plan)?;
    let targets = reading.in_words(&cache.manifest().description, &plan);
    let total = config.total_steps(cache.len());
    let folder = RunFolder::open(config)?;
    let found = folder.find(config, total)?;
    let identity = identity::of(config, (&plan, &reading), &cache, total, context)?;
    found.as_ref().map_or(Ok(()), |checkpoint| checkpoint.check_identity(&identity))?;
    let mut student = Student::from_folder(&config.student, &config.lora(), config.compute, &device, context)?;
    let mut adamw = AdamW::new(config.optimizer(), &student.parameters())?;
    let mut progress = match found {
        Some(checkpoint) => folder.restore(checkpoint, &mut student, &mut adamw)?,
        None => Progress::default(),
    };
    folder.write_settings(config)?;
    let provenance = Provenance::of(config, (plan.start(), &targets), cache.manifest(), identity);
    let mut metrics = Metrics::open(folder.path(), progress.step)?;
    let sampler = Sampler::new(cache.len(), config.seed, if config.shuffle { Order::Seeded } else { Order::Sequential });
    let mut batches = Batches::start(Arc::new(cache), sampler, progress.step, u64::from(config.batch_size))
        .map_err(|source| TrainError::Io { path: config.cache.clone(), source })?;
    let rate = |step: u64| config.schedule.rate(step, total, config.warmup_steps, config.lr);

    let (started, first_step, first_tokens) = (Instant::now(), progress.step, progress.tokens);
    let mut saved = progress.step;
    context.progress.begin_at("training", "steps", total, first_step);
    while progress.step < total {
        let Some(records) = batches.next().transpose()? else {
            return Err(TrainError::ReaderGone { cache: config.cache.clone() }.into());
        };
        let loss = plan.at(progress.step, total);
        let step = accumulate(&student, records, config, (&loss, &reading), context)?;
        let stopping = step.is_none();
        if let Some(mut step) = step {
            let grad_norm = optimizer::clip(&mut step.gradients, config.max_grad_norm)?;
            if !(step.mean.total.is_finite() && grad_norm.is_finite()) {
                return Err(TrainError::NotFinite { step: progress.step + 1, loss: step.mean.total, grad_norm }.into());
            }
            let lr = rate(progress.step);
            // Of rows that were all left out nothing is learned, and no weight decays.
            if step.scored > 0 {
                let mut parameters = student.parameters();
                adamw.step(&mut parameters, &step.gradients, lr)?;
                student.set_parameters(&parameters)?;
            }
            progress.advance(step.mean.total, step.tokens);
            metrics.append(&StepMetrics::new(&progress, &step, &loss, lr, grad_norm, started.elapsed()))?;
            context.progress.add(1);
            context.progress.note(format!("loss {:.4}", step.mean.total));
        }
        let due = stopping || progress.step == total || config.checkpoint_due(progress.step);
        if due && progress.step > saved {
            metrics.sync()?;
            folder.save(config, &provenance, &student, &adamw, &progress)?;
            saved = progress.step;
        }
        if stopping {
            return Err(interrupted(config, &progress));
        }
    }
    context.progress.end();
    let adapter = folder.path().join(ADAPTER_FOLDER);
    provenance.save(&adapter, &student, &progress)?;
    Ok(TrainReport {
        targets,
        steps: progress.step,
        resumed_from: first_step,
        first_loss: progress.first_loss(),
        last_loss: progress.last_loss(),
        highest_lr: (0..progress.step).map(rate).fold(0.0, f64::max),
        tokens: progress.tokens - first_tokens,
        parameters: student.parameters().iter().map(|(_, t)| t.elem_count() as u64).sum(),
        seconds: started.elapsed().as_secs_f64(),
        adapter,
    })
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
    let cache = Cache::open(&config.cache)?;
    let description = &cache.manifest().description;
    if !cache.is_complete() {
        let (rows, expected) = (cache.len(), description.expected_rows);
        return Err(TrainError::Incomplete { cache: config.cache.clone(), rows, expected }.into());
    }
    if cache.manifest().scored() == 0 {
        return Err(TrainError::Empty { cache: config.cache.clone() }.into());
    }
    let student = ModelConfig::from_folder(&config.student)?;
    student.check_dense(&config.student)?;
    let tokenizer = ChatTokenizer::tokenizer_only(&config.student)?;
    let (ours, theirs) = (tokenizer.tokenizer_fingerprint(), &description.tokenizer);
    if ours.vocabulary_blake3 != theirs.vocabulary_blake3 {
        return Err(TrainError::OtherTokenizer {
            student: config.student.clone(),
            cache: config.cache.clone(),
            expected: format!("{} ids, vocabulary {}", theirs.size, theirs.vocabulary_blake3),
            found: format!("{} ids, vocabulary {}", ours.size, ours.vocabulary_blake3),
        }
        .into());
    }
    let (student_folder, cache_folder) = (config.student.clone(), config.cache.clone());
    if student.vocab_size < description.vocab_size as usize {
        let (expected, found) = (description.vocab_size, student.vocab_size);
        return Err(TrainError::Narrow { student: student_folder, cache: cache_folder, expected, found }.into());
    }
    if student.context < description.encoding.max_length as usize {
        let (expected, found) = (description.encoding.max_length, student.context);
        return Err(TrainError::Short { student: student_folder, cache: cache_folder, expected, found }.into());
    }
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
    student: &Student,
    records: Vec<Record>,
    config: &TrainConfig,
    (settings, reading): (&LossSettings, &Reading),
    context: &RunContext,
) -> Result<Option<Step>> {
    // A row without scored positions is a conversation that the teacher could not score.
    let records: Vec<Record> = records.into_iter().filter(|r| !r.positions.is_empty()).collect();
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
        let targets = (settings.kd_alpha > 0.0).then(|| {
            let mut targets = SoftTargets::with_capacity(pack.scored().len(), 0);
            records.iter().for_each(|r| targets.extend(&reading.targets(&r.targets)));
            targets
        });
        let lse_t = targets.as_ref().and_then(|targets| reading.lse_t(targets));
        let (targets, lse_t) = (targets.as_ref(), lse_t.as_deref());
        let batch = Batch { labels: pack.labels(), targets, lse_t, settings, scale };
        let (hidden, tape) = student.forward(&pack)?;
        let (sums, d_hidden) = loss::fused_batch(&hidden, student.head(), &batch, config.head_chunk as usize)?;
        let gradients = student.backward(tape, &d_hidden)?;
        if step.gradients.is_empty() {
            step.gradients = gradients;
        } else {
            for (sum, gradient) in step.gradients.iter_mut().zip(&gradients) {
                *sum = (&*sum + gradient)?;
            }
        }
        step.mean.total += sums.total * scale;
        step.mean.kd += sums.kd * scale;
        step.mean.ce += sums.ce * scale;
        step.tokens += pack.input_ids().len() as u64;
    }
    Ok(Some(step))
}
