//! STAGE TWO: cache → packs → NF4 student + LoRA → loss → adapter. The loop a newcomer reads second.
//!
//! Owns the order of things. A step takes `batch_size` rows in the sampler's order, cuts them into packs, adds up their gradients
//! and divides by the step's scored positions, so that how rows fall into packs changes no more than last bits. Everything a step does is a
//! function of (settings, cache, step), which is what makes an exact resume possible: a checkpoint holds adapter, optimiser
//! state and the step, and nothing else is needed.

mod checkpoint;
mod config;
mod error;
mod identity;
mod metrics;
pub mod optimizer;
mod reading;
pub mod schedule;
mod watch;

pub use checkpoint::SMOOTHED;
pub use config::*;
pub use error::TrainError;
pub use watch::{BINS, DEFAULT_EVAL_EVERY, Evaluation, HeldOutReport};

use crate::adapter::{self, AdapterConfig, Scaling, Surroundings};
use crate::data::ChatTokenizer;
use crate::data::pack::{self, Pack, Sequence};
use crate::loss::{self, Batch, LossSettings, LossSums};
use crate::model::config::ModelConfig;
use crate::model::layer::PROJECTIONS;
use crate::run::{RUN_AGAIN, RunContext};
use crate::student::Student;
use crate::{Error, Result, device};
use candle_core::Tensor;
use checkpoint::{Progress, RunFolder};
use optimizer::AdamW;
use potstill_cache::{Batches, Cache, Order, Record, Sampler, SoftTargets};
use reading::Reading;
use std::sync::Arc;
use watch::{Evaluated, HeldOut, Watch};

/// Name of the folder of the finished adapter within `out`.
pub const ADAPTER_FOLDER: &str = "adapter";
/// Name of the folder of the adapter with the lowest held-out loss within `out`.
pub const BEST_FOLDER: &str = "best";

/// Runs stage two.
///
/// Errors: bad settings, a cache that is incomplete or made with another vocabulary, a model folder that does not fit, a run
/// folder in use or of another run, a loss that is not finite, a stop asked for by `context` (after a durable checkpoint).
pub fn run(config: &TrainConfig, context: &RunContext) -> Result<TrainReport> {
    let mut loss = config.loss_settings()?;
    let device = device::pick(&config.device)?;
    // What can be refused at once is refused before weights are hashed and read.
    let cache = Arc::new(open_cache(config)?);
    let reading = Reading::of(config, &cache, &mut loss)?;
    let targets = reading.in_words(&cache.manifest().description, &loss);
    let left_out = watch::left_out(config, &cache)?;
    let held_out = HeldOut::open(config, &cache, &left_out, (&loss, &reading))?;
    let rows = cache.len() - left_out.len() as u64;
    let total = config.total_steps(rows);
    let folder = RunFolder::open(config)?;
    let found = folder.find(config, total)?;
    let identity = identity::of(config, (&loss, &reading), &cache, total, context)?;
    found.as_ref().map_or(Ok(()), |checkpoint| checkpoint.check_identity(&identity))?;
    let mut student = Student::from_folder(&config.student, &config.lora(), &device, context)?;
    let mut adamw = AdamW::new(config.optimizer(), &student.parameters())?;
    let mut progress = match found {
        Some(checkpoint) => folder.restore(checkpoint, &mut student, &mut adamw)?,
        None => Progress::default(),
    };
    folder.write_settings(config)?;
    let mut watch = Watch::open(config, loss, &folder, held_out, (&student, &progress))?;
    let sampler = Sampler::new(rows, config.seed, if config.shuffle { Order::Seeded } else { Order::Sequential });
    let mut batches = Batches::start_without(cache, left_out, sampler, progress.step, u64::from(config.batch_size))
        .map_err(|source| TrainError::Io { path: config.cache.clone(), source })?;
    let rate = |step: u64| config.schedule.rate(step, total, config.warmup_steps, config.lr);

    let (first_step, first_tokens) = (progress.step, progress.tokens);
    let (mut saved, mut stopping) = (progress.step, false);
    context.progress.begin_at("training", "steps", total, first_step);
    loop {
        let evaluated = watch.evaluate(&student, &mut progress, total, context)?;
        let over = progress.step >= total || progress.standing.ends(config);
        stopping |= evaluated == Evaluated::Stopped || context.stopping() && !over;
        // A better student is saved at once, so that checkpoint and best/ speak of the same evaluation.
        let due = stopping || over || evaluated == Evaluated::Best || config.checkpoint_due(progress.step);
        if due && (progress.step > saved || evaluated.was_made()) {
            watch.sync()?;
            folder.save(config, &identity, &student, &adamw, &progress)?;
            saved = progress.step;
        }
        if evaluated == Evaluated::Best {
            watch.write_best(&student, &progress)?;
        }
        if stopping {
            return Err(interrupted(config, &progress));
        }
        if over {
            break;
        }
        let Some(records) = batches.next().transpose()? else {
            return Err(TrainError::ReaderGone { cache: config.cache.clone() }.into());
        };
        let Some(mut step) = accumulate(&student, records, config, (&loss, &reading), context)? else {
            stopping = true;
            continue;
        };
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
        watch.step(&progress, &step, lr, grad_norm, context)?;
    }
    context.progress.end();
    let adapter = folder.path().join(ADAPTER_FOLDER);
    save_adapter(&adapter, config, &student, &progress)?;
    Ok(TrainReport {
        targets,
        steps: progress.step,
        resumed_from: first_step,
        first_loss: progress.first_loss(),
        last_loss: progress.last_loss(),
        highest_lr: (0..progress.step).map(rate).fold(0.0, f64::max),
        tokens: progress.tokens - first_tokens,
        parameters: student.parameters().iter().map(|(_, t)| t.elem_count() as u64).sum(),
        seconds: watch.seconds(),
        adapter,
        held_out: watch.report(&progress, total),
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

/// Writes the PEFT folder of the student's adapter.
fn save_adapter(folder: &std::path::Path, config: &TrainConfig, student: &Student, progress: &Progress) -> Result<()> {
    let modules = PROJECTIONS.iter().filter_map(|p| p.rsplit('.').next()).map(String::from).collect();
    let adapter = AdapterConfig {
        rank: config.rank,
        alpha: config.alpha,
        scaling: Scaling::Standard,
        base_model: crate::hub::name_of(&config.student).unwrap_or_else(|| config.student.display().to_string()),
        target_modules: modules,
    };
    let facts = [
        ("objective".to_string(), config.objective.to_string()),
        ("cache".to_string(), config.cache.display().to_string()),
        ("temperature".to_string(), config.temperature.to_string()),
        ("steps".to_string(), progress.step.to_string()),
        ("tokens".to_string(), progress.tokens.to_string()),
        ("loss at last (nats a scored position)".to_string(), format!("{:.4}", progress.last_loss())),
    ];
    adapter::save(folder, &adapter, &student.parameters(), &Surroundings { base: &config.student, facts: &facts })?;
    Ok(())
}
