//! Sequences that grow together: a step takes each one's new tokens (its whole prompt at first, then one) through the model at once, and
//! chooses a next token for each.
//!
//! A row's bits do not depend on the rows beside it and every sequence has its own random numbers, so an answer does not depend on what
//! it was decoded with, nor on when it came into the batch.

use crate::Result;
use crate::evaluate::error::EvaluateError;
use crate::model::kv_cache::KvCache;
use crate::run::RunContext;
use crate::student::Student;
use candle_core::Tensor;
use candle_transformers::generation::LogitsProcessor;
use rayon::prelude::*;
use std::collections::BTreeSet;

/// A prompt that waits.
pub(super) struct Job {
    /// Which one it is.
    pub(super) number: usize,
    pub(super) prompt: Vec<u32>,
    /// Most tokens of the answer, at least 1.
    pub(super) most: usize,
    pub(super) sampler: LogitsProcessor,
}

/// An answer that came to its end.
pub(super) struct Finished {
    pub(super) number: usize,
    pub(super) prompt_tokens: usize,
    /// Without the token that ended it.
    pub(super) ids: Vec<u32>,
    /// Whether a token ended it, not its length.
    pub(super) stopped: bool,
}

/// How much may be in the batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Sequences.
    pub(super) sequences: usize,
    /// New tokens of a step.
    pub(super) tokens: usize,
    /// Bytes of all keys and values, each sequence counted at its longest.
    pub(super) bytes: u64,
}

/// The batch.
pub(super) struct Batch<'a> {
    student: &'a Student,
    stop_ids: &'a BTreeSet<u32>,
    /// Ids that the tokenizer has; a head may be wider.
    ids: usize,
    limits: Limits,
    active: Vec<Active>,
}

struct Active {
    job: Job,
    kept: KvCache,
    ids: Vec<u32>,
}

impl Active {
    /// What the model has not seen yet.
    fn new_tokens(&self) -> &[u32] {
        match self.ids.len() {
            0 => &self.job.prompt,
            n => &self.ids[n - 1..],
        }
    }
}

impl<'a> Batch<'a> {
    pub(super) fn new(student: &'a Student, stop_ids: &'a BTreeSet<u32>, ids: usize, limits: Limits) -> Self {
        Self { student, stop_ids, ids, limits, active: Vec::new() }
    }

    /// Sequences in it.
    pub(super) fn len(&self) -> usize {
        self.active.len()
    }

    /// Whether there is room for this one beside the others; an empty batch has room for any.
    pub(super) fn has_room(&self, job: &Job) -> bool {
        let config = &self.student.decoder().config;
        let bytes = |job: &Job| KvCache::token_bytes(config).saturating_mul((job.prompt.len() + job.most) as u64);
        let tokens: usize = self.active.iter().map(|active| active.new_tokens().len()).sum();
        let held: u64 = self.active.iter().map(|active| bytes(&active.job)).sum();
        let fits = self.active.len() < self.limits.sequences
            && tokens + job.prompt.len() <= self.limits.tokens
            && held.saturating_add(bytes(job)) <= self.limits.bytes;
        self.active.is_empty() || fits
    }

    /// Takes it in.
    pub(super) fn add(&mut self, job: Job) {
        let kept = KvCache::new(&self.student.decoder().config, job.prompt.len() + job.most);
        self.active.push(Active { job, kept, ids: Vec::new() });
    }

    /// One token more for each sequence; gives those that came to their end. `None` when a stop was asked for: the batch means nothing then.
    ///
    /// Errors: logits that are not finite.
    pub(super) fn step(&mut self, context: &RunContext) -> Result<Option<Vec<Finished>>> {
        let decoder = self.student.decoder();
        let news: Vec<Vec<u32>> = self.active.iter().map(|active| active.new_tokens().to_vec()).collect();
        let mut rows: Vec<(&[u32], &mut KvCache)> =
            news.iter().map(Vec::as_slice).zip(self.active.iter_mut().map(|active| &mut active.kept)).collect();
        let Some(hidden) = decoder.hidden_cached(&mut rows, context)? else { return Ok(None) };
        let logits = decoder.logits(&decoder.final_norm(&hidden)?)?;
        let (ids, width) = (self.ids, logits.dim(1)?);
        let logits = logits.flatten_all()?.to_vec1::<f32>()?;
        let rows = self.active.par_iter_mut().zip(logits.par_chunks_exact(width.max(1)));
        let chosen = rows.map(|(active, row)| active.choose(&row[..ids.min(width)])).collect::<Result<Vec<u32>>>()?;
        let (mut finished, mut active) = (Vec::new(), Vec::with_capacity(self.active.len()));
        for (mut one, id) in self.active.drain(..).zip(chosen) {
            let stopped = self.stop_ids.contains(&id);
            if !stopped {
                one.ids.push(id);
            }
            if stopped || one.ids.len() >= one.job.most {
                let Active { job, ids, .. } = one;
                finished.push(Finished { number: job.number, prompt_tokens: job.prompt.len(), ids, stopped });
            } else {
                active.push(one);
            }
        }
        self.active = active;
        Ok(Some(finished))
    }
}

impl Active {
    /// The next token by its row of logits. Errors: logits that are not finite.
    fn choose(&mut self, row: &[f32]) -> Result<u32> {
        if !row.iter().all(|z| z.is_finite()) {
            return Err(EvaluateError::Logits { number: self.job.number, token: self.ids.len() }.into());
        }
        let row = Tensor::new(row, &candle_core::Device::Cpu)?;
        Ok(self.job.sampler.sample(&row)?)
    }
}
