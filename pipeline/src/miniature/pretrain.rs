//! Training a small decoder from nothing: next-token loss over rendered chats, AdamW, warm-up and cosine.
//!
//! Owns the loop and its schedule. Refuses LoRA, caches and checkpoints: that is stage two's business. The loss covers every
//! token of a chat but the first, questions included, as in pretraining.

use super::MiniatureError;
use super::decoder::{Decoder, DecoderShape};
use super::dice::Dice;
use crate::run::RunContext;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};

/// Default for [`PretrainConfig::learning_rate`].
pub const DEFAULT_LEARNING_RATE: f64 = 5e-3;
/// Default for [`PretrainConfig::final_share`].
pub const DEFAULT_FINAL_SHARE: f64 = 0.1;
/// Default for [`PretrainConfig::warmup`].
pub const DEFAULT_WARMUP: u64 = 10;
/// Sequences over which the loss is measured before and after training.
pub const SAMPLE: usize = 24;
/// Chats drawn at once and sorted by length before they are cut into batches, in batches: little padding, still mixed.
const SORTED_BATCHES: usize = 8;
/// Second-moment decay: short runs need a short memory.
const BETA2: f64 = 0.98;

/// Settings of [`train`].
#[derive(Debug, Clone, PartialEq)]
pub struct PretrainConfig {
    /// Optimiser steps.
    pub steps: u64,
    /// Sequences in a step.
    pub batch: usize,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Share of it that is left at the last step.
    pub final_share: f64,
    /// Steps over which the learning rate rises from 0.
    pub warmup: u64,
}

impl Default for PretrainConfig {
    fn default() -> Self {
        Self {
            steps: 0,
            batch: super::DEFAULT_BATCH,
            learning_rate: DEFAULT_LEARNING_RATE,
            final_share: DEFAULT_FINAL_SHARE,
            warmup: DEFAULT_WARMUP,
        }
    }
}

/// A trained decoder.
#[derive(Debug, Clone)]
pub struct Trained {
    /// The decoder, its weights no longer variables.
    pub decoder: Decoder,
    /// Loss before and after training, in nats a token over the first [`SAMPLE`] sequences.
    pub loss: (f64, f64),
}

/// Trains a decoder of `shape` on `sequences`; `model` names it in progress and errors.
///
/// Sequences shorter than two ids are left out. Errors: no sequence left, an id beyond the vocabulary, a loss that is no
/// number, a stop asked for.
pub fn train(
    model: &str,
    shape: &DecoderShape,
    sequences: &[Vec<u32>],
    config: &PretrainConfig,
    dice: &mut Dice,
    context: &RunContext,
) -> Result<Trained> {
    let sequences: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).filter(|ids| ids.len() > 1).collect();
    if sequences.is_empty() {
        return Err(MiniatureError::Shape { what: "sequences to train on".into(), expected: vec![1], found: vec![0] }.into());
    }
    let (decoder, variables) = Decoder::random(shape, dice)?;
    let before = sample_loss(&decoder, &sequences)?;
    let mut optimizer = AdamW::new(variables, ParamsAdamW { beta2: BETA2, ..ParamsAdamW::default() })?;
    let lengths = sequences.iter().map(|ids| ids.len()).collect();
    let mut order = Order { dice, batch: config.batch.max(1), lengths, queue: Vec::new() };

    context.progress.begin(&format!("training the {model}"), "steps", config.steps);
    for step in 1..=config.steps {
        if context.stopping() {
            return Err(Error::Interrupted {
                kept: format!("the {model} is not written yet"),
                again: "run the same command again to begin anew",
            });
        }
        let batch: Vec<&[u32]> = order.next().iter().map(|&index| sequences[index]).collect();
        let loss = batch_loss(&decoder, &batch)?;
        let value = loss.to_scalar::<f32>()?;
        if !value.is_finite() {
            return Err(MiniatureError::Diverged { model: model.into(), step, loss: value }.into());
        }
        optimizer.set_learning_rate(learning_rate(config, step));
        optimizer.backward_step(&loss)?;
        context.progress.add(1);
        context.progress.note(format!("loss {value:.3}"));
    }
    context.progress.end();

    let after = sample_loss(&decoder, &sequences)?;
    let tensors = decoder.tensors().map(|(name, tensor)| Ok((name.to_string(), tensor.detach()))).collect::<Result<_>>()?;
    Ok(Trained { decoder: Decoder::from_tensors(shape, &tensors)?, loss: (before, after) })
}

/// Mean next-token loss of some sequences in nats a token, each of at least two ids; a scalar tensor that can be
/// differentiated. Shorter rows are padded on the right; what is predicted at padding is not computed.
pub fn batch_loss(decoder: &Decoder, batch: &[&[u32]]) -> Result<Tensor> {
    let length = batch.iter().map(|ids| ids.len().saturating_sub(1)).max().unwrap_or(0);
    let mut inputs = Vec::with_capacity(batch.len() * length);
    let (mut places, mut targets) = (Vec::new(), Vec::new());
    for (row, ids) in batch.iter().enumerate() {
        let Some((_, next)) = ids.split_first() else { continue };
        inputs.extend_from_slice(&ids[..next.len()]);
        inputs.resize((row + 1) * length, 0);
        places.extend((0..next.len()).map(|position| (row * length + position) as u32));
        targets.extend_from_slice(next);
    }
    let vocabulary = decoder.shape().vocabulary;
    if let Some(&id) = inputs.iter().chain(&targets).find(|&&id| id as usize >= vocabulary) {
        let (expected, found) = (vec![vocabulary], vec![id as usize]);
        return Err(MiniatureError::Shape { what: "an id beyond the vocabulary".into(), expected, found }.into());
    }
    let inputs = Tensor::from_vec(inputs, (batch.len(), length), &Device::Cpu)?;
    let hidden = decoder.hidden(&inputs)?.index_select(&Tensor::new(places, &Device::Cpu)?, 0)?;
    Ok(candle_nn::loss::cross_entropy(&decoder.logits(&hidden)?, &Tensor::new(targets, &Device::Cpu)?)?)
}

fn sample_loss(decoder: &Decoder, sequences: &[&[u32]]) -> Result<f64> {
    Ok(f64::from(batch_loss(decoder, &sequences[..sequences.len().min(SAMPLE)])?.to_scalar::<f32>()?))
}

/// Linear warm-up, then half a cosine down to `final_share`; `step` counts from 1.
fn learning_rate(config: &PretrainConfig, step: u64) -> f64 {
    if step < config.warmup {
        return config.learning_rate * step as f64 / config.warmup as f64;
    }
    let length = config.steps.saturating_sub(config.warmup).max(1) as f64;
    let done = ((step - config.warmup) as f64 / length).min(1.0);
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
    config.learning_rate * (config.final_share + (1.0 - config.final_share) * cosine)
}

/// Which sequences come in which step: each once an epoch, in an order drawn anew, alike in length within a step.
struct Order<'a> {
    dice: &'a mut Dice,
    batch: usize,
    lengths: Vec<usize>,
    queue: Vec<Vec<usize>>,
}

impl Order<'_> {
    /// Indices of the next batch; some batches of an epoch may be smaller than the others.
    fn next(&mut self) -> Vec<usize> {
        if self.queue.is_empty() {
            let mut indices: Vec<usize> = (0..self.lengths.len()).collect();
            self.dice.shuffle(&mut indices);
            for stretch in indices.chunks_mut(self.batch.saturating_mul(SORTED_BATCHES)) {
                stretch.sort_by_key(|&index| self.lengths[index]);
                self.queue.extend(stretch.chunks(self.batch).map(<[usize]>::to_vec));
            }
            self.dice.shuffle(&mut self.queue);
        }
        self.queue.pop().unwrap_or_default()
    }
}
