//! `metrics.jsonl`: one object a step, and one an evaluation (`{"step": N, "eval": {…}}`, after the line of step N), appended and
//! flushed, in rising steps. After a resume, lines beyond the checkpoint are dropped first, so that none stands there twice; so is
//! everything from the first line on that a crash tore.

use super::checkpoint::Progress;
use super::watch::Evaluation;
use super::{Step, TrainError};
use crate::Result;
use crate::loss::LossSettings;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long back "the last while" reaches when a speed is given; a step that takes longer stands alone.
const LAST_WHILE: Duration = Duration::from_secs(30);

const METRICS_FILE: &str = "metrics.jsonl";

/// One line.
#[derive(Debug, Serialize)]
pub(super) struct StepMetrics {
    /// Counted from 1.
    step: u64,
    /// Nats a scored position: kd_alpha · T² · kd + kd_ce_alpha · ce. Null where it is not finite, and of a step
    /// without a scored position, as are both terms.
    loss: f64,
    /// The divergence, absent without a distillation term.
    #[serde(skip_serializing_if = "Option::is_none")]
    kd: Option<f64>,
    /// The cross entropy with the data's tokens.
    ce: f64,
    lr: f64,
    /// L2, before clipping.
    grad_norm: f64,
    /// Tokens of this step.
    tokens: u64,
    /// Scored positions of this step.
    scored: u64,
    /// Whether the step was skipped, because loss or gradient is not finite; absent where it was taken.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    skipped: bool,
    /// Speed of the last [`LAST_WHILE`], evaluations left out.
    tokens_per_second: f64,
    /// Since this process began to train.
    seconds: f64,
}

/// The line of an evaluation.
#[derive(Debug, Serialize)]
struct EvaluationLine<'a> {
    step: u64,
    #[serde(serialize_with = "figures_alone")]
    eval: &'a Evaluation,
}

/// The figures by their names, without the step.
fn figures_alone<S: serde::Serializer>(evaluation: &&Evaluation, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_map(evaluation.figures())
}

impl StepMetrics {
    /// The line of the step that `progress` has just counted.
    pub(super) fn new(
        progress: &Progress,
        step: &Step,
        settings: &LossSettings,
        lr: f64,
        grad_norm: f64,
        (tokens_per_second, elapsed): (f64, Duration),
    ) -> Self {
        let mean = |sum: f64| if step.scored > 0 { sum } else { f64::NAN };
        Self {
            step: progress.step,
            loss: mean(step.mean.total),
            kd: (settings.kd_alpha > 0.0).then_some(mean(step.mean.kd)),
            ce: mean(step.mean.ce),
            lr,
            grad_norm,
            tokens: step.tokens,
            scored: step.scored,
            skipped: progress.skipped_in_a_row > 0,
            tokens_per_second,
            seconds: elapsed.as_secs_f64(),
        }
    }

    /// Every figure that is worth a curve, by its name.
    pub(super) fn figures(&self) -> Vec<(&'static str, f64)> {
        let mut all = vec![("lr", self.lr), ("grad_norm", self.grad_norm), ("tokens_per_second", self.tokens_per_second)];
        if self.scored > 0 {
            all.extend([("loss", self.loss), ("ce", self.ce)]);
            all.extend(self.kd.map(|kd| ("kd", kd)));
        }
        all
    }

    /// What progress says of the step: the loss, its terms where there are two, and the speed.
    pub(super) fn remark(&self, settings: &LossSettings) -> String {
        let both = self.kd.filter(|_| settings.kd_ce_alpha > 0.0);
        let terms = both.map(|kd| format!(" (kd {kd:.4}, ce {:.4})", self.ce)).unwrap_or_default();
        let digits = usize::from(self.tokens_per_second < 10.0);
        let loss = if self.scored > 0 { format!("loss {:.4}{terms}", self.loss) } else { "no scored position".into() };
        format!("{loss}, {:.digits$} tokens/s", self.tokens_per_second)
    }
}

/// Tokens a second over the last while.
#[derive(Debug)]
pub(super) struct Pace {
    /// Moments, with the tokens since the one before.
    marks: VecDeque<(Instant, u64)>,
}

impl Pace {
    /// Begins to count.
    pub(super) fn new(now: Instant) -> Self {
        Self { marks: VecDeque::from([(now, 0)]) }
    }

    /// Begins anew: what was done since the last step was no training.
    pub(super) fn restart(&mut self, now: Instant) {
        *self = Self::new(now);
    }

    /// Counts tokens done by `now`, and gives the speed.
    pub(super) fn count(&mut self, now: Instant, tokens: u64) -> f64 {
        self.marks.push_back((now, tokens));
        // The first mark is only the beginning of the next; it goes when that alone reaches back far enough.
        while self.marks.len() > 2 && self.marks.get(1).is_some_and(|(then, _)| now.duration_since(*then) >= LAST_WHILE) {
            self.marks.pop_front();
        }
        let seconds = self.marks.front().map_or(0.0, |(then, _)| now.duration_since(*then).as_secs_f64());
        self.marks.iter().skip(1).map(|(_, tokens)| *tokens).sum::<u64>() as f64 / seconds.max(1e-6)
    }
}

/// The open file.
#[derive(Debug)]
pub(super) struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Opens the file, keeping lines of steps up to `step` and of evaluations up to the one at step `evaluated`.
    pub(super) fn open(out: &Path, step: u64, evaluated: u64) -> Result<Self> {
        #[derive(Deserialize)]
        struct Line {
            step: u64,
            eval: Option<serde::de::IgnoredAny>,
        }
        let path = out.join(METRICS_FILE);
        let io = |source| TrainError::Io { path: path.clone(), source };
        let old = match std::fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            read => read.map_err(io)?,
        };
        let last = |line: &Line| if line.eval.is_some() { evaluated } else { step };
        // As text first: what is no UTF-8 is torn, wherever in the line it stands.
        let parsed = |line: &[u8]| serde_json::from_str::<Line>(std::str::from_utf8(line).ok()?).ok();
        let kept = |line: &&[u8]| parsed(line).is_some_and(|line| line.step <= last(&line));
        let text = old.split(|byte| *byte == b'\n').take_while(kept).flat_map(|line| [line, b"\n"]).collect::<Vec<_>>().concat();
        if text != old {
            let partial = out.join(format!(".{METRICS_FILE}.partial"));
            std::fs::write(&partial, text).map_err(io)?;
            File::open(&partial).and_then(|f| f.sync_all()).map_err(io)?;
            std::fs::rename(&partial, &path).map_err(io)?;
        }
        let file = File::options().create(true).append(true).open(&path).map_err(io)?;
        Ok(Self { path, file })
    }

    /// Appends the line of a step.
    pub(super) fn step(&mut self, metrics: &StepMetrics) -> Result<()> {
        self.append(metrics)
    }

    /// Appends the line of an evaluation.
    pub(super) fn evaluation(&mut self, evaluation: &Evaluation) -> Result<()> {
        self.append(&EvaluationLine { step: evaluation.step, eval: evaluation })
    }

    fn append(&mut self, line: &impl Serialize) -> Result<()> {
        let io = |source| TrainError::Io { path: self.path.clone(), source };
        let mut line = serde_json::to_vec(line).map_err(|e| io(e.into()))?;
        line.push(b'\n');
        Ok(self.file.write_all(&line).map_err(io)?)
    }

    /// Makes every line durable; done before a checkpoint of the same step appears.
    pub(super) fn sync(&self) -> Result<()> {
        let io = |source| TrainError::Io { path: self.path.clone(), source };
        Ok(self.file.sync_data().map_err(io)?)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_speed_is_that_of_the_last_while() {
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut pace = Pace::new(start);
        assert_eq!(pace.count(at(10), 1_000), 100.0);
        assert_eq!(pace.count(at(20), 3_000), 200.0);
        // From second 10 on: what came before is more than 30 seconds ago.
        assert_eq!(pace.count(at(40), 6_000), 300.0);
        // A step longer than the while stands alone.
        assert_eq!(pace.count(at(140), 1_000), 10.0);
        pace.restart(at(1_000));
        assert_eq!(pace.count(at(1_001), 7), 7.0);
    }

    #[test]
    fn a_remark_names_both_terms_where_there_are_two() {
        let mut line = StepMetrics {
            step: 1,
            loss: 1.5,
            kd: Some(1.0),
            ce: 2.0,
            lr: 2e-4,
            grad_norm: 0.1,
            tokens: 10,
            scored: 5,
            skipped: false,
            tokens_per_second: 1_234_567.8,
            seconds: 1.0,
        };
        let mixed = LossSettings { kd_alpha: 0.5, kd_ce_alpha: 0.5, ..LossSettings::default() };
        assert_eq!(line.remark(&mixed), "loss 1.5000 (kd 1.0000, ce 2.0000), 1234568 tokens/s");
        line.tokens_per_second = 9.94;
        assert_eq!(line.remark(&LossSettings::default()), "loss 1.5000, 9.9 tokens/s");
    }

    #[test]
    fn a_step_without_a_scored_position_has_no_loss() {
        let mut progress = Progress::default();
        assert!(progress.first_loss().is_nan() && progress.last_loss().is_nan());
        progress.advance(Some(2.0), 10);
        progress.advance(None, 0);
        assert_eq!((progress.step, progress.tokens, progress.first_loss(), progress.last_loss()), (2, 10, 2.0, 2.0));

        let line = |step: &Step| {
            let settings = LossSettings { kd_alpha: 1.0, ..LossSettings::default() };
            StepMetrics::new(&progress, step, &settings, 1e-4, 0.0, (100.0, Duration::from_secs(1)))
        };
        let none = line(&Step::default());
        let json = serde_json::to_value(&none).unwrap();
        assert!(["loss", "kd", "ce"].iter().all(|name| json.get(name).is_some_and(|value| value.is_null())), "{json}");
        assert_eq!(none.remark(&LossSettings::default()), "no scored position, 100 tokens/s");
        let names = |line: &StepMetrics| line.figures().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(&none), ["lr", "grad_norm", "tokens_per_second"]);
        let some = line(&Step { scored: 1, ..Step::default() });
        assert_eq!(serde_json::to_value(&some).unwrap()["loss"], 0.0);
        assert_eq!(names(&some), ["lr", "grad_norm", "tokens_per_second", "loss", "ce", "kd"]);
    }

    #[test]
    fn what_a_crash_tore_is_dropped_with_all_that_follows() {
        let out = tempfile::tempdir().unwrap();
        let path = out.path().join(METRICS_FILE);
        for torn in [&b"{\"step\":2,\"lo\xff\xfe"[..], b"{\"step\":2,\"\xff\":1}", b"\0\0\0\0", b""] {
            std::fs::write(&path, [b"{\"step\":1}\n", torn, b"\n{\"step\":2}\n"].concat()).unwrap();
            Metrics::open(out.path(), 9, 9).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"{\"step\":1}\n", "{torn:?}");
        }
    }

    #[test]
    fn lines_beyond_a_checkpoint_are_dropped() {
        let out = tempfile::tempdir().unwrap();
        let path = out.path().join(METRICS_FILE);
        let lines = ["{\"step\":1}", "{\"step\":2}", "{\"step\":2,\"eval\":{}}", "{\"step\":3}", "{\"step\":3,\"ev"];
        for (step, evaluated, kept) in [(0, 0, 0), (1, 0, 1), (2, 0, 2), (2, 2, 3), (3, 2, 4), (9, 9, 4)] {
            std::fs::write(&path, lines.join("\n")).unwrap();
            Metrics::open(out.path(), step, evaluated).unwrap();
            let expected: String = lines[..kept].iter().flat_map(|line| [line, "\n"]).collect();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), expected, "step {step}, evaluated {evaluated}");
        }
    }
}
