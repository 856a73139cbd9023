//! How a student stands on a cache that it was not trained on: beside the teacher's distributions, and on the data's own tokens.
//!
//! Owns what is measured at a scored position and what each figure means ([`DEFINITIONS`]); statistics are `statistics.rs`'s. Layout and
//! standard errors follow llama.cpp's report of the KL divergence. A cache keeps k ids and the mass of the rest, so divergences are
//! *coarse*: over k + 1 entries. By the data-processing inequality each is at most that of the whole distributions.
//!
//! Every position counts alike, in the cache's order, so that figures depend on no thread, pack or chunk. One with a value that is not
//! finite is left out of all of them, and counted.

use super::calibration::{calibration_error, top};
use super::error::EvaluateError;
use super::statistics::{self, Estimate, Mean, Perplexities, Spread, Values};
use super::subject::{BasePrecision, Subject};
use super::walk::{CacheRows, Chunk, Portions, choose};
use crate::kernel::Precision;
use crate::loss::{Comparison, Divergence};
use crate::run::RunContext;
use crate::student::Walk;
use crate::{Error, Result, pairing};
use potstill_cache::{Record, SoftTargets};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

/// Default for [`HeldOutConfig::pack_tokens`]; as in training.
pub const DEFAULT_PACK_TOKENS: u32 = 4096;
/// Default for [`HeldOutConfig::head_chunk`], in positions; as in training.
pub const DEFAULT_HEAD_CHUNK: u32 = 256;
/// Default for [`HeldOutConfig::seed`]; as in training, so that the rows are those that it held out.
pub const DEFAULT_SEED: u64 = 42;
/// Rows read together.
const ROWS_AT_ONCE: usize = 16;

/// What each figure is, by its name in the report. p is the teacher's distribution as the cache keeps it, q the student's, at temperature
/// 1; y is the data's next token; natural logarithms.
pub const DEFINITIONS: [(&str, &str); 13] = [
    ("perplexity", "exp of the mean of -ln q(y) over all scored positions (the assistant's tokens)"),
    ("nll", "-ln q(y), nats, over all scored positions"),
    (
        "where_kept",
        "perplexities of student and teacher over the positions at which the cache keeps the teacher's p(y); elsewhere it is unknown",
    ),
    ("kl", "coarse KL(p, q) = sum p (ln p - ln q), nats, over the kept ids and one entry for the rest, both normalised"),
    ("reverse_kl", "coarse KL(q, p) = sum q (ln q - ln p), nats, over the same entries"),
    ("jsd", "coarse Jensen-Shannon divergence, (KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2, nats, over the same entries"),
    ("total_variation", "coarse total variation, half the sum of |p - q|, 0 to 1, over the same entries"),
    (
        "acceptance",
        "sum of min(p, q) over the same entries: the most that speculative decoding with this student as drafter can accept",
    ),
    ("acceptance_at_least", "sum of min(p, q) over the kept ids alone: the least that it accepts"),
    ("probability_difference", "q(y) - p(y), over the positions at which the cache keeps p(y)"),
    ("same_top_token", "share of positions at which argmax q = argmax p"),
    (
        "calibration_error",
        "expected calibration error of max q (max p) against whether argmax q (argmax p) is y; 15 bins of equal mass, 0 to 1",
    ),
    ("kept_mass", "probability of the kept ids, by the teacher and by the student"),
];

/// What is evaluated, and on what.
#[derive(Debug, Clone, PartialEq)]
pub struct HeldOutConfig {
    /// The model.
    pub subject: Subject,
    /// Folder of the cache.
    pub cache: PathBuf,
    /// Rows looked at; all where not given. Of fewer, those that a training run on this cache with this seed holds out.
    pub rows: Option<u64>,
    /// Which rows, where not all.
    pub seed: u64,
    /// Tokens that go through the model at once.
    pub pack_tokens: u32,
    /// Scored positions whose logits exist at once.
    pub head_chunk: u32,
}

impl Default for HeldOutConfig {
    fn default() -> Self {
        let (subject, cache) = (Subject::default(), PathBuf::new());
        Self { subject, cache, rows: None, seed: DEFAULT_SEED, pack_tokens: DEFAULT_PACK_TOKENS, head_chunk: DEFAULT_HEAD_CHUNK }
    }
}

/// How a student stands. Figures that the cache cannot give are absent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HeldOutReport {
    /// The model's folder.
    pub student: PathBuf,
    /// The adapter's folder.
    pub adapter: Option<PathBuf>,
    /// How the linear layers were held.
    pub base_precision: BasePrecision,
    /// What the factors of products were rounded to.
    pub compute: Precision,
    /// The cache's folder.
    pub cache: PathBuf,
    /// Its teacher.
    pub teacher: String,
    /// What it keeps of each distribution.
    pub selection: String,
    /// What was found.
    #[serde(flatten)]
    pub figures: Figures,
    /// What each figure is.
    pub definitions: BTreeMap<&'static str, &'static str>,
}

/// What was found at all positions together; [`DEFINITIONS`] says what each figure is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// Rows with scored positions.
    pub rows: u64,
    /// Positions that figures count.
    pub positions: u64,
    /// Positions that none counts, because a value of theirs is not finite.
    pub positions_not_finite: u64,
    /// exp of the mean of −ln q(y).
    pub perplexity: Estimate,
    /// −ln q(y).
    pub nll: Mean,
    /// Perplexities where the cache keeps p(y).
    pub where_kept: Option<Perplexities>,
    /// KL(p, q).
    pub kl: Option<Spread>,
    /// KL(q, p).
    pub reverse_kl: Option<Spread>,
    /// Jensen-Shannon divergence.
    pub jsd: Option<Spread>,
    /// Total variation.
    pub total_variation: Option<Spread>,
    /// Σ min(p, q).
    pub acceptance: Option<Spread>,
    /// The same without the rest.
    pub acceptance_at_least: Option<Mean>,
    /// q(y) − p(y).
    pub probability_difference: Option<Spread>,
    /// Root of its mean square.
    pub probability_difference_rms: Option<Estimate>,
    /// Share of positions with the same top token.
    pub same_top_token: Option<Mean>,
    /// Calibration errors.
    pub calibration_error: Calibration,
    /// Mean probabilities of the kept ids.
    pub kept_mass: Option<KeptMass>,
}

/// Expected calibration errors against the data's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Calibration {
    /// The student's.
    pub student: f64,
    /// The teacher's, where its top token is kept.
    pub teacher: Option<f64>,
}

/// Mean probabilities of the kept ids.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct KeptMass {
    /// By the student.
    pub student: f64,
    /// By the teacher.
    pub teacher: f64,
}

/// Takes the student over the cache's rows. Writes nothing. Counts rows in a phase of `context.progress`.
///
/// Errors: a cache and a student that do not go together, rows without a scored position, a model that cannot be read, figures of which
/// none is finite, a stop.
pub fn run(config: &HeldOutConfig, context: &RunContext) -> Result<HeldOutReport> {
    for (name, value) in [("pack_tokens", config.pack_tokens), ("head_chunk", config.head_chunk)] {
        if value == 0 {
            return Err(Error::Setting { name, found: "0".into(), expected: "at least 1".into() });
        }
    }
    let cache = Arc::new(pairing::open(&config.subject.student, &config.cache)?);
    let rows = match config.rows {
        Some(rows) if rows == 0 || rows > cache.len() => {
            let expected = format!("a whole number from 1 to the {} rows of {}", cache.len(), config.cache.display());
            return Err(Error::Setting { name: "rows", found: rows.to_string(), expected });
        }
        Some(rows) => choose(cache.len(), rows, config.seed),
        None => (0..cache.len()).collect(),
    };
    let of = CacheRows { cache, rows };
    let student = config.subject.load(context)?;
    let portions =
        Portions { rows: ROWS_AT_ONCE, pack_tokens: config.pack_tokens as usize, positions: config.head_chunk as usize };
    let mut tally = Tally::default();
    context.progress.begin("evaluating", "rows", of.rows.len() as u64);
    let open = |records: &[Record]| {
        context.progress.add(records.len() as u64);
        Ok(Beside::of(records))
    };
    let flow = of.walk(&student, portions, context, open, |chunk, beside| {
        measure(chunk, beside)?.iter().for_each(|position| tally.add(position));
        Ok(ControlFlow::Continue(()))
    })?;
    context.progress.end();
    match flow {
        Walk::Done => report(config, &of, tally),
        Walk::Stopped => Err(Error::stopped()),
    }
}

/// What a pack's scored positions are compared with.
struct Beside {
    targets: SoftTargets,
    /// Number of the conversation of each.
    rows: Vec<u64>,
}

impl Beside {
    fn of(records: &[Record]) -> Self {
        let mut beside = Self { targets: SoftTargets::default(), rows: Vec::new() };
        for record in records {
            beside.targets.extend(&record.targets);
            beside.rows.extend(record.positions.iter().map(|_| record.seq_id));
        }
        beside
    }
}

/// What is measured at one position.
#[derive(Debug, Clone, Copy)]
struct Position {
    row: u64,
    /// −ln q(y).
    nll: f64,
    /// max q, and whether its token is y.
    confidence: (f64, bool),
    /// Beside the teacher, where the cache keeps likely ids.
    coarse: Option<Coarse>,
}

/// Beside the teacher.
#[derive(Debug, Clone, Copy)]
struct Coarse {
    kl: f64,
    reverse_kl: f64,
    jsd: f64,
    total_variation: f64,
    acceptance: (f64, f64),
    /// By teacher and student.
    kept_mass: (f64, f64),
    same_top: bool,
    /// max p, and whether its token is y.
    confidence: (f64, bool),
    /// −ln p(y), where it is kept.
    nll: Option<f64>,
}

/// Measures a chunk's positions, in order; the logits are used up.
fn measure(mut chunk: Chunk<'_>, beside: &Beside) -> Result<Vec<Position>> {
    let mut logits = std::mem::take(&mut chunk.logits);
    let rows = logits.par_chunks_exact_mut(chunk.vocab.max(1)).enumerate();
    rows.map(|(i, z)| Position::of(z, chunk.labels[i], beside, chunk.first + i)).collect()
}

impl Position {
    /// Of a row of logits `[V]` and place `at` of the pack's scored positions.
    fn of(z: &mut [f32], label: u32, beside: &Beside, at: usize) -> Result<Self> {
        let row = beside.rows.get(at).copied().unwrap_or_default();
        let (first, largest) = top(z.iter().copied());
        let one = beside.targets.slice(at..at + 1);
        let target = one.position(0);
        // Draws alone are no distribution to compare with.
        let known = !target.ids.is_empty();
        let comparison = Comparison::of(z, label, known.then_some(&one))?;
        let confidence = (f64::from(largest) - comparison.log_sum_exp()).exp();
        let coarse = known.then(|| {
            let (place, logprob) = top(target.logprobs.iter().copied());
            let likeliest = target.ids.get(place).copied();
            let kept = target.ids.iter().position(|id| *id == label).and_then(|place| target.logprobs.get(place));
            Coarse {
                kl: comparison.divergence(Divergence::ForwardKl),
                reverse_kl: comparison.divergence(Divergence::ReverseKl),
                jsd: comparison.divergence(Divergence::Jsd { beta: 0.5 }),
                total_variation: comparison.divergence(Divergence::TotalVariation),
                acceptance: comparison.overlap(),
                kept_mass: comparison.kept_mass(),
                same_top: likeliest == Some(first as u32),
                confidence: (f64::from(logprob).exp(), likeliest == Some(label)),
                nll: kept.map(|logprob| -f64::from(*logprob)),
            }
        });
        Ok(Self { row, nll: comparison.cross_entropy(), confidence: (confidence, first == label as usize), coarse })
    }

    fn is_finite(&self) -> bool {
        let coarse = self.coarse.is_none_or(|c| {
            let all =
                [c.kl, c.reverse_kl, c.jsd, c.total_variation, c.acceptance.0, c.acceptance.1, c.kept_mass.0, c.kept_mass.1];
            all.iter().all(|x| x.is_finite())
        });
        coarse && self.nll.is_finite() && self.confidence.0.is_finite()
    }
}

/// Positions so far.
#[derive(Debug, Default)]
struct Tally {
    nll: Values,
    confidences: Vec<(f64, bool)>,
    not_finite: u64,
    kl: Values,
    reverse_kl: Values,
    jsd: Values,
    total_variation: Values,
    acceptance: Values,
    acceptance_at_least: Values,
    same_top: Values,
    teacher_mass: Values,
    student_mass: Values,
    teacher_confidences: Vec<(f64, bool)>,
    /// −ln q(y) and −ln p(y) where the cache keeps p(y), and q(y) − p(y) and its square there.
    nll_where_kept: Values,
    teacher_nll: Values,
    difference: Values,
    squared_difference: Values,
}

impl Tally {
    fn add(&mut self, position: &Position) {
        if !position.is_finite() {
            self.not_finite += 1;
            return;
        }
        let row = position.row;
        self.nll.push(row, position.nll);
        self.confidences.push(position.confidence);
        let Some(coarse) = &position.coarse else { return };
        self.kl.push(row, coarse.kl);
        self.reverse_kl.push(row, coarse.reverse_kl);
        self.jsd.push(row, coarse.jsd);
        self.total_variation.push(row, coarse.total_variation);
        self.acceptance.push(row, coarse.acceptance.0);
        self.acceptance_at_least.push(row, coarse.acceptance.1);
        self.same_top.push(row, f64::from(u8::from(coarse.same_top)));
        self.teacher_mass.push(row, coarse.kept_mass.0);
        self.student_mass.push(row, coarse.kept_mass.1);
        self.teacher_confidences.push(coarse.confidence);
        if let Some(nll) = coarse.nll {
            self.nll_where_kept.push(row, position.nll);
            self.teacher_nll.push(row, nll);
            let difference = (-position.nll).exp() - (-nll).exp();
            self.difference.push(row, difference);
            self.squared_difference.push(row, difference * difference);
        }
    }

    /// What the positions say together; `None` where no position has figures.
    fn close(self) -> Option<Figures> {
        let nll = self.nll.mean()?;
        let rms = self.squared_difference.mean().map(|square| {
            let value = square.mean.sqrt();
            // To first order: d√x = dx / (2 √x).
            Estimate { value, standard_error: square.standard_error.map(|error| error / (2.0 * value)).filter(|e| e.is_finite()) }
        });
        let masses = self.student_mass.mean().zip(self.teacher_mass.mean());
        Some(Figures {
            rows: self.nll.rows(),
            positions: nll.positions,
            positions_not_finite: self.not_finite,
            perplexity: statistics::exponential(&nll),
            nll,
            where_kept: statistics::perplexities(&self.nll_where_kept, &self.teacher_nll),
            kl: self.kl.spread(),
            reverse_kl: self.reverse_kl.spread(),
            jsd: self.jsd.spread(),
            total_variation: self.total_variation.spread(),
            acceptance: self.acceptance.spread(),
            acceptance_at_least: self.acceptance_at_least.mean(),
            probability_difference: self.difference.spread(),
            probability_difference_rms: rms,
            same_top_token: self.same_top.mean(),
            calibration_error: Calibration {
                student: calibration_error(self.confidences),
                teacher: (!self.teacher_confidences.is_empty()).then(|| calibration_error(self.teacher_confidences)),
            },
            kept_mass: masses.map(|(student, teacher)| KeptMass { student: student.mean, teacher: teacher.mean }),
        })
    }
}

/// The report of figures; where there are none, why.
fn report(config: &HeldOutConfig, of: &CacheRows, tally: Tally) -> Result<HeldOutReport> {
    let (student, not_finite) = (config.subject.student.clone(), tally.not_finite);
    let Some(figures) = tally.close() else {
        return Err(match not_finite {
            0 => EvaluateError::NothingScored { cache: config.cache.clone(), rows: of.rows.len() },
            positions => EvaluateError::NotFinite { student, positions },
        }
        .into());
    };
    let description = &of.cache.manifest().description;
    Ok(HeldOutReport {
        student,
        adapter: config.subject.adapter.clone(),
        base_precision: config.subject.held(),
        compute: config.subject.compute,
        cache: config.cache.clone(),
        teacher: description.teacher.name.clone(),
        selection: description.selection.to_string(),
        figures,
        definitions: BTreeMap::from(DEFINITIONS),
    })
}

#[cfg(test)]
#[path = "held_out_tests.rs"]
mod tests;
