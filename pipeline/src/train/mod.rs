//! STAGE TWO: cache → packs → NF4 student + LoRA → loss → adapter. The loop a newcomer reads second.
//!
//! Owns the order of things. A step takes `batch_size` rows in the sampler's order, cuts them into packs, adds up their gradients
//! and divides by the step's scored positions, so that how rows fall into packs changes nothing. Everything a step does is a
//! function of (settings, cache, step), which is what makes an exact resume possible: a checkpoint holds adapter, optimiser
//! state and the step, and nothing else is needed.

mod checkpoint;
mod config;
mod error;
mod identity;
mod metrics;
pub mod optimizer;
pub mod schedule;

pub use config::*;
pub use error::TrainError;

use crate::adapter::{self, AdapterConfig, Scaling, Surroundings};
use crate::data::ChatTokenizer;
use crate::data::pack::{self, Pack, Sequence};
use crate::loss::{self, LossSettings, LossSums};
use crate::model::layer::PROJECTIONS;
use crate::run::RunContext;
use crate::student::Student;
use crate::{Result, device};
use candle_core::Tensor;
use checkpoint::{Progress, RunFolder};
use metrics::{Metrics, StepMetrics};
use optimizer::{AdamW, AdamWConfig};
use potstill_cache::{Cache, Order, Record, Sampler, SoftTargets};
use rayon::prelude::*;
use std::time::Instant;

/// Name of the folder of the finished adapter within `out`.
pub const ADAPTER_FOLDER: &str = "adapter";

/// Runs stage two.
///
/// Errors: bad settings, a cache that is incomplete or made with another vocabulary, a model folder that does not fit, a run
/// folder in use or of another run, a loss that is not finite, a stop asked for by `context` (after a durable checkpoint).
pub fn run(config: &TrainConfig, context: &RunContext) -> Result<TrainReport> {
    let loss = config.loss_settings()?;
    let device = device::pick(&config.device)?;
    let cache = open_cache(config)?;
    let total = config.total_steps(cache.len());
    let folder = RunFolder::open(config)?;
    let identity = identity::of(config, &loss, &cache, total, context)?;
    let mut student = Student::from_folder(&config.student, &config.lora(), &device, context)?;
    let optimiser = AdamWConfig { beta1: config.beta1, beta2: config.beta2, eps: config.eps, weight_decay: config.weight_decay };
    let mut adamw = AdamW::new(optimiser, &student.parameters())?;
    let mut progress = folder.resume(config, &identity, &mut student, &mut adamw)?;
    if progress.step > total {
        let expected = format!("at least the {} steps that the checkpoint already has", progress.step);
        return Err(crate::Error::Setting { name: "steps", found: total.to_string(), expected });
    }
    folder.write_settings(config)?;
    let mut metrics = Metrics::open(folder.path(), progress.step)?;
    let order = if config.shuffle { Order::Seeded } else { Order::Sequential };
    let sampler = Sampler::new(cache.len(), config.seed, order);

    let (started, first_step, first_tokens) = (Instant::now(), progress.step, progress.tokens);
    context.progress.begin("training", "steps", total.saturating_sub(first_step));
    while progress.step < total {
        let records = batch(&cache, &sampler, progress.step, u64::from(config.batch_size))?;
        let (sums, mut gradients, counts) = accumulate(&student, &records, config, &loss)?;
        let grad_norm = optimizer::clip(&mut gradients, config.max_grad_norm)?;
        if !(sums.total.is_finite() && grad_norm.is_finite()) {
            return Err(TrainError::NotFinite { step: progress.step + 1, loss: sums.total, grad_norm }.into());
        }
        let lr = config.schedule.rate(progress.step, total, config.warmup_steps, config.lr);
        let mut parameters = student.parameters();
        adamw.step(&mut parameters, &gradients, lr)?;
        student.set_parameters(&parameters)?;

        progress.advance(sums.total, counts.tokens);
        metrics.append(&StepMetrics::new(&progress, &sums, &loss, lr, grad_norm, &counts, started.elapsed().as_secs_f64()))?;
        context.progress.add(1);
        context.progress.note(format!("loss {:.4}", sums.total));
        let stopping = context.stopping();
        if stopping || progress.step == total || config.checkpoint_due(progress.step) {
            folder.save(config, &identity, &student, &adamw, &progress)?;
        }
        if stopping && progress.step < total {
            let kept = format!("checkpoint-{} is durable", progress.step);
            return Err(crate::Error::Interrupted { kept });
        }
    }
    context.progress.end();
    let adapter = folder.path().join(ADAPTER_FOLDER);
    save_adapter(&adapter, config, &student, &progress)?;
    Ok(TrainReport {
        steps: progress.step,
        resumed_from: first_step,
        first_loss: progress.first_loss,
        last_loss: progress.last_loss,
        tokens: progress.tokens - first_tokens,
        parameters: student.parameters().iter().map(|(_, t)| t.elem_count() as u64).sum(),
        seconds: started.elapsed().as_secs_f64(),
        adapter,
    })
}

/// Opens the cache and checks that the student can be trained from it.
fn open_cache(config: &TrainConfig) -> Result<Cache> {
    let cache = Cache::open(&config.cache)?;
    let description = &cache.manifest().description;
    if !cache.is_complete() {
        let (rows, expected) = (cache.len(), description.expected_rows);
        return Err(TrainError::Incomplete { cache: config.cache.clone(), rows, expected }.into());
    }
    if cache.is_empty() {
        return Err(TrainError::Empty { cache: config.cache.clone() }.into());
    }
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
    Ok(cache)
}

/// The rows of a step, read in parallel, in order. A pass over the cache follows the other; each has its own order.
fn batch(cache: &Cache, sampler: &Sampler, step: u64, size: u64) -> Result<Vec<Record>> {
    let rows = cache.len();
    let numbers = (step * size..(step + 1) * size).map(|i| sampler.row(i / rows, i % rows));
    let numbers: Vec<u64> = numbers.collect();
    let records: Vec<potstill_cache::Result<Record>> = numbers.par_iter().map(|row| cache.row(*row)).collect();
    Ok(records.into_iter().collect::<potstill_cache::Result<_>>()?)
}

/// What went through the model in a step.
#[derive(Debug, Clone, Copy, Default)]
struct Counts {
    tokens: u64,
    scored: u64,
}

/// Mean loss over the step's scored positions, and its gradients: a sum over packs.
fn accumulate(
    student: &Student,
    records: &[Record],
    config: &TrainConfig,
    settings: &LossSettings,
) -> Result<(LossSums, Vec<Tensor>, Counts)> {
    let scored: usize = records.iter().map(|r| r.positions.len()).sum();
    let scale = 1.0 / scored.max(1) as f64;
    let mut counts = Counts { tokens: 0, scored: scored as u64 };
    let mut mean = LossSums::default();
    let mut total: Option<Vec<Tensor>> = None;
    for range in pack::plan(records.iter().map(|r| r.input_ids.len()), config.pack_tokens as usize) {
        let records = &records[range];
        let pack = Pack::new(records.iter().map(|r| Sequence { input_ids: &r.input_ids, positions: &r.positions }));
        let mut targets = SoftTargets::with_capacity(pack.scored().len(), 0);
        records.iter().for_each(|r| targets.extend(&r.targets));
        // Without a distillation term the distributions are not looked at.
        let targets = (settings.kd_alpha > 0.0).then_some(&targets);
        let (hidden, tape) = student.forward(&pack)?;
        let head = student.decoder().head();
        let (sums, d_hidden) = loss::fused(&hidden, head, pack.labels(), targets, settings, scale, config.head_chunk as usize)?;
        let gradients = student.backward(tape, &d_hidden)?;
        total = Some(match total {
            None => gradients,
            Some(total) => total.iter().zip(&gradients).map(|(a, b)| a + b).collect::<candle_core::Result<_>>()?,
        });
        mean.total += sums.total * scale;
        mean.kd += sums.kd * scale;
        mean.ce += sums.ce * scale;
        counts.tokens += pack.input_ids().len() as u64;
    }
    Ok((mean, total.unwrap_or_default(), counts))
}

/// Writes the PEFT folder of the student's adapter.
fn save_adapter(folder: &std::path::Path, config: &TrainConfig, student: &Student, progress: &Progress) -> Result<()> {
    let modules = PROJECTIONS.iter().filter_map(|p| p.rsplit('.').next()).map(String::from).collect();
    let adapter = AdapterConfig {
        rank: config.rank,
        alpha: config.alpha,
        scaling: Scaling::Standard,
        base_model: config.student.display().to_string(),
        target_modules: modules,
    };
    let facts = [
        ("objective".to_string(), config.objective.to_string()),
        ("cache".to_string(), config.cache.display().to_string()),
        ("temperature".to_string(), config.temperature.to_string()),
        ("steps".to_string(), progress.step.to_string()),
        ("tokens".to_string(), progress.tokens.to_string()),
        ("last loss (nats a scored position)".to_string(), format!("{:.4}", progress.last_loss)),
    ];
    adapter::save(folder, &adapter, &student.parameters(), &Surroundings { base: &config.student, facts: &facts })?;
    Ok(())
}
