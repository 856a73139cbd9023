//! Where a run's conversations come from: a cache, or chats that are encoded at the start and held in memory. Both give the same
//! records in the same order, so that a run of the cross entropy alone gives the same adapter from either.

use super::{DivergenceName, Objective, TailName, TrainConfig, TrainError, identity};
use crate::data::{self, ChatTokenizer, DataOptions, Dataset, Example, Truncation};
use crate::model::config::ModelConfig;
use crate::run::RunContext;
use crate::{Error, Result};
use potstill_cache::{Batches, Cache, DataFingerprint, Order, Record, Sampler, SoftTargets};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A run's conversations.
pub(super) enum Rows {
    /// A cache.
    Cached(Arc<Cache>),
    /// Chats, encoded with the student's own tokenizer and template.
    Encoded(Box<Encoded>),
}

/// Encoded chats.
pub(super) struct Encoded {
    dataset: Dataset,
    tokenizer: String,
    template: String,
}

impl Rows {
    /// Opens what the settings name. Errors: none or both of cache and data, a distillation without a cache, a student that does not
    /// fit, and what is wrong with either.
    pub(super) fn open(config: &TrainConfig, context: &RunContext) -> Result<Self> {
        config.check_rows()?;
        match config.data.as_slice() {
            [] => Ok(Rows::Cached(Arc::new(super::open_cache(config)?))),
            _ => Ok(Rows::Encoded(Box::new(Encoded::of(config, context)?))),
        }
    }

    /// How many they are.
    pub(super) fn len(&self) -> u64 {
        match self {
            Rows::Cached(cache) => cache.len(),
            Rows::Encoded(encoded) => encoded.dataset.examples.len() as u64,
        }
    }

    /// The cache, where it is one.
    pub(super) fn cache(&self) -> Option<&Arc<Cache>> {
        match self {
            Rows::Cached(cache) => Some(cache),
            Rows::Encoded(_) => None,
        }
    }

    /// The chats that they were made from.
    pub(super) fn data(&self) -> &DataFingerprint {
        match self {
            Rows::Cached(cache) => &cache.manifest().description.data,
            Rows::Encoded(encoded) => &encoded.dataset.fingerprint,
        }
    }

    /// Conversations of the data that were skipped, by reason.
    pub(super) fn skipped(&self) -> BTreeMap<String, u64> {
        match self {
            Rows::Cached(_) => BTreeMap::new(),
            Rows::Encoded(encoded) => encoded.dataset.fingerprint.skipped.clone(),
        }
    }

    /// What decides the rows, by name. Where files lie and what they are called decides nothing.
    pub(super) fn identity(&self, config: &TrainConfig) -> Result<Vec<(&'static str, String)>> {
        match self {
            Rows::Cached(cache) => Ok(vec![("cache_blake3", identity::digest(cache.dir())?)]),
            Rows::Encoded(encoded) => {
                let mut files = blake3::Hasher::new();
                for file in &encoded.dataset.fingerprint.files {
                    files.update(file.blake3.as_bytes()).update(b"\n");
                }
                let truncate = match config.truncate {
                    Truncation::Turns => "turns",
                    Truncation::Right => "right",
                };
                Ok(vec![
                    ("data_blake3", files.finalize().to_hex().to_string()),
                    ("tokenizer_blake3", encoded.tokenizer.clone()),
                    ("template_blake3", encoded.template.clone()),
                    ("max_length", config.max_length.to_string()),
                    ("truncate", truncate.into()),
                ])
            }
        }
    }

    /// The rows of step after step, from step number `first` on, in the order that the settings say.
    ///
    /// Rows `left_out` (rising; of a cache) are not among them.
    pub(super) fn steps(self, config: &TrainConfig, left_out: Vec<u64>, first: u64) -> Result<Steps> {
        let order = if config.shuffle { Order::Seeded } else { Order::Sequential };
        let rows = self.len() - left_out.len() as u64;
        let (sampler, size) = (Sampler::new(rows, config.seed, order), u64::from(config.batch_size));
        match self {
            Rows::Cached(cache) => Ok(Steps::Cached(
                Batches::start_without(cache, left_out, sampler, first, size)
                    .map_err(|source| TrainError::Io { path: config.cache.clone(), source })?,
            )),
            Rows::Encoded(encoded) => {
                Ok(Steps::Encoded { examples: encoded.dataset.examples, sampler, place: first.saturating_mul(size), size })
            }
        }
    }
}

impl Encoded {
    fn of(config: &TrainConfig, context: &RunContext) -> Result<Self> {
        let student = ModelConfig::from_folder(&config.student)?;
        student.check_dense(&config.student)?;
        if config.max_length as usize > student.context {
            let expected = format!("at most the student's context of {} tokens", student.context);
            return Err(Error::Setting { name: "max_length", found: config.max_length.to_string(), expected });
        }
        let tokenizer = ChatTokenizer::from_folder(&config.student)?;
        let size = tokenizer.tokenizer_fingerprint().size;
        if student.vocab_size < size as usize {
            let (expected, found) = (size, student.vocab_size);
            return Err(TrainError::OwnTokenizer { student: config.student.clone(), expected, found }.into());
        }
        let options =
            DataOptions { max_length: config.max_length, truncation: config.truncate, on_bad_roles: config.on_bad_roles };
        let dataset = data::load(&config.data, &tokenizer, &options, context)?;
        let template = tokenizer.template_fingerprint().map(|template| template.blake3.clone()).unwrap_or_default();
        Ok(Self { dataset, tokenizer: tokenizer.tokenizer_fingerprint().blake3.clone(), template })
    }
}

impl TrainConfig {
    /// Whether the settings name one place that rows come from. Errors: none or both of cache and data; with data, a setting that
    /// asks for a teacher's distributions, which chats alone have none of.
    pub fn check_rows(&self) -> Result<()> {
        let found = match (!self.cache.as_os_str().is_empty(), !self.data.is_empty()) {
            (true, true) => "both cache and data are given",
            (false, false) => "neither cache nor data is given",
            (true, false) => return Ok(()),
            (false, true) => return self.refuse_distillation(),
        };
        Err(TrainError::RowSource { found }.into())
    }

    fn refuse_distillation(&self) -> Result<()> {
        let of = |name: &'static str, value: Option<String>| value.map(|value| (name, value));
        let expected = "no such setting with data, only with a cache".to_string();
        let asked = [
            of("kd_alpha", self.kd_alpha.filter(|weight| *weight != 0.0).map(|weight| weight.to_string())),
            of("kd_alpha_end", self.kd_alpha_end.filter(|weight| *weight != 0.0).map(|weight| weight.to_string())),
            of("temperature_end", self.temperature_end.map(|t| t.to_string())),
            of("divergence", (self.divergence != DivergenceName::default()).then(|| self.divergence.name())),
            of("tail", (self.tail != TailName::Auto).then(|| self.tail.name())),
            of("top_k", self.top_k.map(|k| k.to_string())),
            of("min_prob", self.min_prob.map(|p| p.to_string())),
            of("min_mass", self.min_mass.map(|mass| mass.to_string())),
            of("eval_rows", Some(self.eval_rows).filter(|rows| *rows > 0).map(|rows| rows.to_string())),
            of("eval_cache", self.eval_cache.as_ref().map(|path| path.display().to_string())),
            of("patience", Some(self.patience).filter(|patience| *patience > 0).map(|patience| patience.to_string())),
            of("probe_cache", self.probe_cache.as_ref().map(|path| path.display().to_string())),
        ];
        if self.objective != Objective::Sft {
            let expected = "sft with data: chats alone hold no distributions of a teacher".into();
            return Err(Error::Setting { name: "objective", found: self.objective.to_string(), expected });
        }
        match asked.into_iter().flatten().next() {
            Some((name, found)) => Err(Error::Setting { name, found, expected }),
            None => Ok(()),
        }
    }
}

/// The rows of step after step, without an end.
pub(super) enum Steps {
    /// Read beside the student.
    Cached(Batches),
    /// Taken from memory.
    Encoded {
        /// All of them, in the data's order.
        examples: Vec<Example>,
        /// The order they are taken in.
        sampler: Sampler,
        /// Place in the endless order of the next step's first row.
        place: u64,
        /// Rows of a step.
        size: u64,
    },
}

impl Steps {
    /// The next step's rows. Errors: a row that cannot be read; the thread that reads has ended.
    pub(super) fn next(&mut self, config: &TrainConfig) -> Result<Vec<Record>> {
        match self {
            Steps::Cached(batches) => match batches.next().transpose()? {
                Some(records) => Ok(records),
                None => Err(TrainError::ReaderGone { cache: config.cache.clone() }.into()),
            },
            Steps::Encoded { examples, sampler, place, size } => {
                let places = *place..place.saturating_add(*size);
                *place = places.end;
                let rows = sampler.rows().max(1);
                let taken = places.filter_map(|i| examples.get(sampler.row(i / rows, i % rows) as usize));
                Ok(taken.map(record).collect())
            }
        }
    }
}

/// The row as a cache would hold it, without distributions.
fn record(example: &Example) -> Record {
    Record {
        seq_id: example.seq_id,
        input_ids: example.input_ids.clone(),
        positions: example.positions(),
        targets: SoftTargets::default(),
        codec: Default::default(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn chats_alone_are_refused_what_needs_a_teacher_or_rows_held_out() {
        let plain = || TrainConfig { objective: Objective::Sft, data: vec![PathBuf::from("chats")], ..TrainConfig::default() };
        plain().check_rows().unwrap();
        TrainConfig { kd_alpha_end: Some(0.0), kd_ce_alpha_end: Some(0.5), ..plain() }.check_rows().unwrap();
        for (config, words) in [
            (TrainConfig { kd_alpha: Some(0.5), ..plain() }, "kd_alpha = 0.5"),
            (TrainConfig { kd_alpha_end: Some(0.5), ..plain() }, "kd_alpha_end = 0.5"),
            (TrainConfig { temperature_end: Some(2.0), ..plain() }, "temperature_end = 2"),
            (TrainConfig { divergence: DivergenceName::SkewedReverseKl, ..plain() }, "divergence = skewed-reverse-kl"),
            (TrainConfig { tail: TailName::StudentFull, ..plain() }, "tail = studentfull"),
            (TrainConfig { patience: 3, ..plain() }, "patience = 3"),
        ] {
            let error = config.check_rows().unwrap_err().to_string();
            assert_eq!(error, format!("{words}: expected no such setting with data, only with a cache"));
        }
    }
}
