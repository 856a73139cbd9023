//! `metrics.jsonl`: one object a step, appended and flushed, in rising steps. After a resume, lines beyond the checkpoint are
//! dropped first, so that no step stands there twice.

use super::checkpoint::Progress;
use super::{Step, TrainError};
use crate::Result;
use crate::loss::LossSettings;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

const METRICS_FILE: &str = "metrics.jsonl";

/// One line.
#[derive(Debug, Serialize)]
pub(super) struct StepMetrics {
    /// Counted from 1.
    step: u64,
    /// Nats a scored position: kd_alpha · T² · kd + kd_ce_alpha · ce. Null where it is not finite.
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
    /// Since this process began to train.
    seconds: f64,
}

impl StepMetrics {
    /// The line of the step that `progress` has just counted.
    pub(super) fn new(
        progress: &Progress,
        step: &Step,
        settings: &LossSettings,
        lr: f64,
        grad_norm: f64,
        elapsed: Duration,
    ) -> Self {
        Self {
            step: progress.step,
            loss: step.mean.total,
            kd: (settings.kd_alpha > 0.0).then_some(step.mean.kd),
            ce: step.mean.ce,
            lr,
            grad_norm,
            tokens: step.tokens,
            scored: step.scored,
            skipped: progress.skipped_in_a_row > 0,
            seconds: elapsed.as_secs_f64(),
        }
    }
}

/// The open file.
#[derive(Debug)]
pub(super) struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Opens the file, keeping lines of steps up to `step`.
    pub(super) fn open(out: &Path, step: u64) -> Result<Self> {
        #[derive(Deserialize)]
        struct Line {
            step: u64,
        }
        let path = out.join(METRICS_FILE);
        let io = |source| TrainError::Io { path: path.clone(), source };
        let old = match std::fs::read_to_string(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            read => read.map_err(io)?,
        };
        let kept = |line: &&str| serde_json::from_str::<Line>(line).is_ok_and(|l| l.step <= step);
        let text: String = old.lines().take_while(kept).flat_map(|line| [line, "\n"]).collect();
        if text != old {
            let partial = out.join(format!(".{METRICS_FILE}.partial"));
            std::fs::write(&partial, text).map_err(io)?;
            File::open(&partial).and_then(|f| f.sync_all()).map_err(io)?;
            std::fs::rename(&partial, &path).map_err(io)?;
        }
        let file = File::options().create(true).append(true).open(&path).map_err(io)?;
        Ok(Self { path, file })
    }

    /// Appends one line.
    pub(super) fn append(&mut self, metrics: &StepMetrics) -> Result<()> {
        let io = |source| TrainError::Io { path: self.path.clone(), source };
        let mut line = serde_json::to_vec(metrics).map_err(|e| io(e.into()))?;
        line.push(b'\n');
        Ok(self.file.write_all(&line).map_err(io)?)
    }

    /// Makes every line durable; done before a checkpoint of the same step appears.
    pub(super) fn sync(&self) -> Result<()> {
        let io = |source| TrainError::Io { path: self.path.clone(), source };
        Ok(self.file.sync_data().map_err(io)?)
    }
}
