//! Held-out rows of a run: which they are, and what an evaluation looks at on the walk over them.
//!
//! `eval_rows` rows of the run's own cache are never trained on ([`choose`]). Or all rows of another cache, `eval_cache`. They are read again
//! at each evaluation, a batch at a time; the student goes forward only, and its head by chunks: no [T, V] exists here either.

use super::super::reading::Reading;
use super::super::{TrainConfig, TrainError, open_cache};
use super::figures::{Evaluation, Expected, Row, Tally};
use super::probe::{self, Look, Looks};
use crate::evaluate::walk::{CacheRows, Chunk, Portions, choose};
use crate::loss::LossSettings;
use crate::run::RunContext;
use crate::student::{Student, Walk};
use crate::{Error, Result};
use potstill_cache::{Cache, Record, SoftTargets};
use rayon::prelude::*;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

/// Rows of a cache and how they are read.
#[derive(Debug)]
struct Sample {
    of: CacheRows,
    reading: Reading,
}

/// What evaluations look at.
#[derive(Debug)]
pub(in crate::train) struct HeldOut {
    sample: Sample,
    /// Where distributions are whole, if that is another cache.
    dense: Option<Sample>,
    loss: LossSettings,
}

/// The rows of the run's own cache that are not trained on, rising. Errors: as many as there are, or more.
pub(in crate::train) fn left_out(config: &TrainConfig, cache: &Cache) -> Result<Vec<u64>> {
    let held_out = u64::from(config.eval_rows);
    if held_out > 0 && held_out >= cache.len() {
        let expected = format!("fewer than the {} rows of {}", cache.len(), config.cache.display());
        return Err(Error::Setting { name: "eval_rows", found: held_out.to_string(), expected });
    }
    Ok(choose(cache.len(), held_out, config.seed))
}

impl HeldOut {
    /// What the settings say is held out; `None` where nothing is. `own` is the run's cache, `left_out` are the rows of the run's own cache.
    ///
    /// Errors: settings that contradict each other, another cache that does not fit the run, rows without a scored position.
    pub(in crate::train) fn open(
        config: &TrainConfig,
        own: &Arc<Cache>,
        left_out: &[u64],
        (loss, reading): (&LossSettings, &Reading),
    ) -> Result<Option<Self>> {
        let refuse = |name, found: String, expected: &str| Err(Error::Setting { name, found, expected: expected.into() });
        let of_other = |path: &Path| -> Result<Sample> {
            let cache = open_cache(&TrainConfig { cache: path.to_path_buf(), ..config.clone() })?;
            check_teacher(own, &cache)?;
            let reading = reading.of_other(&cache, path, loss)?;
            Ok(Sample { of: CacheRows { rows: (0..cache.len()).collect(), cache: Arc::new(cache) }, reading })
        };
        let sample = match (&config.eval_cache, left_out) {
            (Some(path), []) => of_other(path)?,
            (Some(path), _) => return refuse("eval_cache", path.display().to_string(), "either this or eval_rows"),
            (None, []) => {
                let without = "either eval_rows or eval_cache beside it";
                return match (&config.probe_cache, config.patience) {
                    (None, 0) => Ok(None),
                    (Some(path), _) => refuse("probe_cache", path.display().to_string(), without),
                    (None, patience) => refuse("patience", patience.to_string(), without),
                };
            }
            (None, rows) => Sample { of: CacheRows { cache: own.clone(), rows: rows.to_vec() }, reading: reading.clone() },
        };
        if config.eval_every == 0 {
            return refuse("eval_every", "0".into(), "at least 1 step");
        }
        if sample.first_scored()?.is_none() {
            return Err(
                TrainError::NothingHeldOut { cache: sample.of.cache.dir().to_path_buf(), rows: sample.of.rows.len() }.into()
            );
        }
        let dense = config.probe_cache.as_deref().map(of_other).transpose()?;
        if let Some(dense) = &dense {
            dense.check_dense()?;
        }
        Ok(Some(Self { sample, dense, loss: *loss }))
    }

    /// Rows held out.
    pub(in crate::train) fn rows(&self) -> u64 {
        self.sample.of.rows.len() as u64
    }

    /// The student's figures after `step` steps; `None` when a stop was asked for.
    pub(super) fn evaluate(
        &self,
        student: &Student,
        config: &TrainConfig,
        step: u64,
        context: &RunContext,
    ) -> Result<Option<(Evaluation, u64)>> {
        let (mut tally, mut looks) = (Tally::default(), Looks::default());
        let vocabulary = self.sample.vocabulary();
        let flow = self.sample.walk(student, config, context, |chunk| {
            if self.dense.is_none() {
                chunk.look(&self.loss, vocabulary, &mut looks)?;
            }
            for row in chunk.rows(&self.loss)? {
                tally.add(&row);
            }
            Ok(ControlFlow::Continue(()))
        })?;
        if flow == Walk::Stopped {
            return Ok(None);
        }
        if let Some(dense) = &self.dense {
            let flow = dense.walk(student, config, context, |chunk| {
                chunk.look(&self.loss, dense.vocabulary(), &mut looks)?;
                Ok(if looks.wanted() == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
            })?;
            if flow == Walk::Stopped {
                return Ok(None);
            }
        }
        let positions = tally.positions();
        let nothing = || match positions {
            0 => TrainError::NothingHeldOut { cache: self.sample.of.cache.dir().to_path_buf(), rows: self.sample.of.rows.len() },
            _ => TrainError::EvaluationNotFinite { step, loss: f32::NAN },
        };
        let mut evaluation = tally.close(step).ok_or_else(nothing)?;
        let (angle, teacher_ece) = looks.close();
        (evaluation.angle, evaluation.teacher_ece) = (angle.map(|x| x as f32), teacher_ece.map(|x| x as f32));
        match evaluation.figures().iter().all(|(_, value)| value.is_finite()) {
            true => Ok(Some((evaluation, positions))),
            false => Err(TrainError::EvaluationNotFinite { step, loss: evaluation.loss }.into()),
        }
    }
}

/// Errors: distributions of another teacher than that of the run's own cache, which figures would take for its.
fn check_teacher(own: &Cache, other: &Cache) -> Result<()> {
    let teacher = |cache: &Cache| {
        let teacher = &cache.manifest().description.teacher;
        (format!("{}, weights BLAKE3 {}", teacher.name, teacher.weights_blake3), teacher.weights_blake3.clone())
    };
    let ((expected, ours), (found, theirs)) = (teacher(own), teacher(other));
    match ours == theirs {
        true => Ok(()),
        false => Err(TrainError::OtherTeacher { cache: other.dir().to_path_buf(), expected, found }.into()),
    }
}

impl Sample {
    fn vocabulary(&self) -> u32 {
        self.of.cache.manifest().description.vocab_size
    }

    /// The first row with a scored position.
    fn first_scored(&self) -> Result<Option<Record>> {
        for row in &self.of.rows {
            let record = self.of.cache.row(*row)?;
            if !record.positions.is_empty() {
                return Ok(Some(record));
            }
        }
        Ok(None)
    }

    /// Errors: the cache does not keep whole distributions.
    fn check_dense(&self) -> Result<()> {
        let first = self.first_scored()?;
        let dense =
            |record: &Record| (0..record.targets.len()).all(|i| probe::is_dense(record.targets.position(i), self.vocabulary()));
        match first.is_some_and(|record| dense(&record)) {
            true => Ok(()),
            false => Err(Error::Setting {
                name: "probe_cache",
                found: format!("{} ({})", self.of.cache.dir().display(), self.of.cache.manifest().description.selection),
                expected: format!("a cache that keeps all {} ids at each position", self.vocabulary()),
            }),
        }
    }

    /// Takes the student over all rows, in packs as in training, and shows `visit` chunk after chunk of logits.
    fn walk(
        &self,
        student: &Student,
        config: &TrainConfig,
        context: &RunContext,
        mut visit: impl FnMut(Seen<'_>) -> Result<ControlFlow<()>>,
    ) -> Result<Walk> {
        let portions = Portions {
            rows: config.batch_size as usize,
            pack_tokens: config.pack_tokens as usize,
            positions: config.head_chunk as usize,
        };
        let mut done = 0;
        let open = |records: &[Record]| {
            context.progress.note(format!("evaluating, row {done} of {}", self.of.rows.len()));
            done += records.len();
            Ok(self.targets(records))
        };
        self.of.walk(student, portions, context, open, |chunk, targets| visit(Seen { chunk, targets: targets.as_ref() }))
    }

    /// What a pack's positions are compared with; `None` where the rows have no distributions.
    fn targets(&self, records: &[Record]) -> Option<Targets> {
        let reading = &self.reading;
        let (mut stored, mut read) = (SoftTargets::default(), SoftTargets::default());
        for record in records.iter().filter(|record| record.targets.len() == record.positions.len()) {
            stored.extend(&record.targets);
            read.extend(&reading.targets(&record.targets));
        }
        let all = stored.len() == records.iter().map(|record| record.positions.len()).sum::<usize>();
        all.then(|| Targets { lse_t: reading.lse_t(&read), drawn: reading.drawn(), stored, read })
    }
}

/// The distributions of a pack's positions.
struct Targets {
    /// As the cache has them.
    stored: SoftTargets,
    /// As they are read.
    read: SoftTargets,
    lse_t: Option<Vec<f32>>,
    drawn: bool,
}

impl Targets {
    /// What is read at position `i`, alone, and ln Z_T there.
    fn read(&self, i: usize) -> (SoftTargets, Option<f32>) {
        (self.read.slice(i..i + 1), self.lse_t.as_ref().and_then(|all| all.get(i).copied()))
    }
}

/// Logits of a few positions beside what they are compared with.
struct Seen<'a> {
    chunk: Chunk<'a>,
    targets: Option<&'a Targets>,
}

impl Seen<'_> {
    /// Figures of all positions, in order; the logits are used up.
    fn rows(mut self, settings: &LossSettings) -> Result<Vec<Row>> {
        let mut logits = std::mem::take(&mut self.chunk.logits);
        let (vocab, first) = (self.chunk.vocab, self.chunk.first);
        let row = |(i, z): (usize, &mut [f32])| {
            let label = self.chunk.labels[i];
            let Some(targets) = self.targets else {
                return Row::of(z, &Expected { label, read: None, drawn: false, lse_t: None, stored: None }, settings);
            };
            let (read, lse_t) = targets.read(first + i);
            // Draws are comparable only as training takes them.
            let comparable = settings.kd_alpha > 0.0 || !targets.drawn;
            let (read, stored) = (comparable.then_some(&read), Some(targets.stored.position(first + i)));
            Row::of(z, &Expected { label, read, drawn: targets.drawn, lse_t, stored }, settings)
        };
        logits.par_chunks_exact_mut(vocab.max(1)).enumerate().map(row).collect()
    }

    /// Looks at those positions that keep all of the cache's `vocabulary`, as many as are still wanted.
    fn look(&self, settings: &LossSettings, vocabulary: u32, looks: &mut Looks) -> Result<()> {
        let Some(targets) = self.targets else { return Ok(()) };
        let Chunk { logits, vocab, labels, first } = &self.chunk;
        let dense = |i: &usize| probe::is_dense(targets.stored.position(first + i), vocabulary);
        let dense: Vec<usize> = (0..labels.len()).filter(dense).take(looks.wanted()).collect();
        let look = |i: usize| {
            let (read, lse_t) = targets.read(first + i);
            let read = (settings.kd_alpha > 0.0).then_some(&read);
            let z = &logits[i * vocab..(i + 1) * vocab];
            Look::of(z, targets.stored.position(first + i), (labels[i], read, lse_t), settings)
        };
        let found: Vec<Look> = dense.into_par_iter().map(look).collect::<Result<_>>()?;
        found.iter().for_each(|look| looks.add(look));
        Ok(())
    }
}
