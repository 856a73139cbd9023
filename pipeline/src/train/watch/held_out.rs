//! Held-out rows: which they are, and the walk over them.
//!
//! `eval_rows` rows of the run's own cache are never trained on: the first of the order that the sampler gives for an epoch that no run
//! reaches, so that they follow from the seed and the number of rows alone. Or all rows of another cache, `eval_cache`. They are read again
//! at each evaluation, a batch at a time; the student goes forward only, and its head by chunks: no [T, V] exists here either.

use super::super::reading::Reading;
use super::super::{TrainConfig, TrainError, open_cache};
use super::figures::{Evaluation, Expected, Row, Tally};
use super::probe::{self, Look, Looks};
use crate::data::pack::{self, Pack, Sequence};
use crate::loss::LossSettings;
use crate::run::RunContext;
use crate::student::{Student, Walk};
use crate::{Error, Result};
use potstill_cache::{Cache, Order, Record, Sampler, SoftTargets};
use rayon::prelude::*;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

/// The epoch whose order says which rows are held out; no run is that long.
const NO_EPOCH: u64 = u64::MAX;

/// Rows of a cache and how they are read.
#[derive(Debug)]
struct Sample {
    cache: Arc<Cache>,
    /// Rising.
    rows: Vec<u64>,
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

/// Which of `rows` rows are held out, rising.
fn choose(rows: u64, held_out: u64, seed: u64) -> Vec<u64> {
    let order = Sampler::new(rows, seed, Order::Seeded);
    let mut chosen: Vec<u64> = (0..held_out.min(rows)).map(|i| order.row(NO_EPOCH, i)).collect();
    chosen.sort_unstable();
    chosen
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
            Ok(Sample { rows: (0..cache.len()).collect(), cache: Arc::new(cache), reading })
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
            (None, rows) => Sample { cache: own.clone(), rows: rows.to_vec(), reading: reading.clone() },
        };
        if config.eval_every == 0 {
            return refuse("eval_every", "0".into(), "at least 1 step");
        }
        if sample.first_scored()?.is_none() {
            return Err(TrainError::NothingHeldOut { cache: sample.cache.dir().to_path_buf(), rows: sample.rows.len() }.into());
        }
        let dense = config.probe_cache.as_deref().map(of_other).transpose()?;
        if let Some(dense) = &dense {
            dense.check_dense()?;
        }
        Ok(Some(Self { sample, dense, loss: *loss }))
    }

    /// Rows held out.
    pub(in crate::train) fn rows(&self) -> u64 {
        self.sample.rows.len() as u64
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
            0 => TrainError::NothingHeldOut { cache: self.sample.cache.dir().to_path_buf(), rows: self.sample.rows.len() },
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
        self.cache.manifest().description.vocab_size
    }

    /// The first row with a scored position.
    fn first_scored(&self) -> Result<Option<Record>> {
        for row in &self.rows {
            let record = self.cache.row(*row)?;
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
                found: format!("{} ({})", self.cache.dir().display(), self.cache.manifest().description.selection),
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
        mut visit: impl FnMut(Chunk<'_>) -> Result<ControlFlow<()>>,
    ) -> Result<Walk> {
        let mut done = 0;
        for rows in self.rows.chunks(config.batch_size.max(1) as usize) {
            context.progress.note(format!("evaluating, row {done} of {}", self.rows.len()));
            let records = rows.par_iter().map(|row| Ok(self.cache.row(*row)?)).collect::<Result<Vec<Record>>>()?;
            let records: Vec<Record> = records.into_iter().filter(|r| !r.positions.is_empty()).collect();
            for range in pack::plan(records.iter().map(|r| r.input_ids.len()), config.pack_tokens as usize) {
                let records = &records[range];
                if let ControlFlow::Break(end) = self.pack(student, records, config.head_chunk as usize, context, &mut visit)? {
                    return Ok(end);
                }
            }
            done += rows.len();
        }
        Ok(Walk::Done)
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

    /// One pack of a walk; breaks off with how the walk ends.
    fn pack(
        &self,
        student: &Student,
        records: &[Record],
        head_chunk: usize,
        context: &RunContext,
        visit: &mut impl FnMut(Chunk<'_>) -> Result<ControlFlow<()>>,
    ) -> Result<ControlFlow<Walk>> {
        let pack = Pack::new(records.iter().map(|r| Sequence { input_ids: &r.input_ids, positions: &r.positions }));
        let targets = self.targets(records);
        let stopped = Ok(ControlFlow::Break(Walk::Stopped));
        let Some(hidden) = student.hidden(&pack, context)? else { return stopped };
        for first in (0..pack.labels().len()).step_by(head_chunk.max(1)) {
            if context.stopping() {
                return stopped;
            }
            let n = head_chunk.max(1).min(pack.labels().len() - first);
            let (logits, vocab) = {
                let logits = student.decoder().logits(&hidden.narrow(0, first, n)?)?;
                (logits.flatten_all()?.to_vec1::<f32>()?, logits.dim(1)?)
            };
            let labels = &pack.labels()[first..first + n];
            let chunk = Chunk { logits, vocab, labels, first, targets: targets.as_ref() };
            if visit(chunk)?.is_break() {
                return Ok(ControlFlow::Break(Walk::Done));
            }
        }
        Ok(ControlFlow::Continue(()))
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
struct Chunk<'a> {
    /// `[n, vocab]`.
    logits: Vec<f32>,
    vocab: usize,
    /// n next tokens.
    labels: &'a [u32],
    /// Place of the chunk's first position in the pack's targets.
    first: usize,
    targets: Option<&'a Targets>,
}

impl Chunk<'_> {
    /// Figures of all positions, in order; the logits are used up.
    fn rows(mut self, settings: &LossSettings) -> Result<Vec<Row>> {
        let mut logits = std::mem::take(&mut self.logits);
        let row = |(i, z): (usize, &mut [f32])| {
            let label = self.labels[i];
            let Some(targets) = self.targets else {
                return Row::of(z, &Expected { label, read: None, drawn: false, lse_t: None, stored: None }, settings);
            };
            let (read, lse_t) = targets.read(self.first + i);
            // Draws are comparable only as training takes them.
            let comparable = settings.kd_alpha > 0.0 || !targets.drawn;
            let (read, stored) = (comparable.then_some(&read), Some(targets.stored.position(self.first + i)));
            Row::of(z, &Expected { label, read, drawn: targets.drawn, lse_t, stored }, settings)
        };
        logits.par_chunks_exact_mut(self.vocab.max(1)).enumerate().map(row).collect()
    }

    /// Looks at those positions that keep all of the cache's `vocabulary`, as many as are still wanted.
    fn look(&self, settings: &LossSettings, vocabulary: u32, looks: &mut Looks) -> Result<()> {
        let Some(targets) = self.targets else { return Ok(()) };
        let dense = |i: &usize| probe::is_dense(targets.stored.position(self.first + i), vocabulary);
        let dense: Vec<usize> = (0..self.labels.len()).filter(dense).take(looks.wanted()).collect();
        let look = |i: usize| {
            let (read, lse_t) = targets.read(self.first + i);
            let read = (settings.kd_alpha > 0.0).then_some(&read);
            let z = &self.logits[i * self.vocab..(i + 1) * self.vocab];
            Look::of(z, targets.stored.position(self.first + i), (self.labels[i], read, lse_t), settings)
        };
        let found: Vec<Look> = dense.into_par_iter().map(look).collect::<Result<_>>()?;
        found.iter().for_each(|look| looks.add(look));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_held_out_follow_from_seed_and_number() {
        for (rows, held_out) in [(1000, 0), (1000, 37), (20, 19), (2, 1)] {
            let chosen = choose(rows, held_out, 7);
            assert!(chosen.len() as u64 == held_out && chosen.is_sorted_by(|a, b| a < b), "{chosen:?}");
            assert!(chosen.iter().all(|row| *row < rows), "{chosen:?}");
            assert_eq!(chosen, choose(rows, held_out, 7));
        }
        assert_ne!(choose(1000, 37, 7), choose(1000, 37, 8));
        // More of them are those and others.
        let more = choose(1000, 60, 7);
        assert!(choose(1000, 37, 7).iter().all(|row| more.contains(row)));
        // A checkpoint does not name them, so they are part of it.
        assert_eq!(choose(10, 3, 42), [0, 3, 7]);
    }
}
