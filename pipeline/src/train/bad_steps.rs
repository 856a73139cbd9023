//! Steps whose loss or gradient is not finite: what is written down about them, and when a run gives up.
//!
//! The one idea: such a step changes nothing. Parameters, moments and the optimiser's count stay as they were, so no checkpoint can
//! hold a trace of it but the number of them; its rows are named in `bad-step-N.json`. A few in a thousand are a matter of the
//! data; several in a row are a matter of the run, and end it.

use super::checkpoint::Progress;
use super::files::{self, io};
use super::{Step, TrainError};
use crate::Result;
use crate::ops::with_f32;
use crate::student::Student;
use candle_core::Device;
use potstill_cache::Record;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Skipped steps in a row after which a run stops.
pub const MOST_IN_A_ROW: u64 = 5;
/// Skipped steps of a run that get a file.
const MOST_FILES: u64 = 100;
/// Tensors named in a file.
const MOST_TENSORS: usize = 20;

/// What `bad-step-N.json` holds. Numbers that are not finite are words, which JSON has none for.
#[derive(Debug, Serialize)]
struct BadStep<'a> {
    /// Counted from 1.
    step: u64,
    /// Mean loss over the step's scored positions.
    loss: String,
    /// L2 norm of the gradient, before clipping.
    grad_norm: String,
    /// Tensors whose own gradient is not finite, [`MOST_TENSORS`] at most.
    tensors: Vec<&'a str>,
    /// The conversations that the step was made of.
    rows: Vec<Row>,
}

/// A conversation.
#[derive(Debug, Serialize)]
struct Row {
    /// Its number in the data, from 0.
    seq_id: u64,
    /// The key that a cache knows it by.
    key: String,
    tokens: usize,
}

/// Counts a step as skipped and writes down its rows. Errors: the file cannot be written.
pub(super) fn skip(
    out: &Path,
    progress: &mut Progress,
    (step, grad_norm): (&Step, f64),
    records: &[Record],
    student: &Student,
) -> Result<()> {
    progress.skip(step.tokens);
    if progress.skipped > MOST_FILES && progress.skipped_in_a_row < MOST_IN_A_ROW {
        return Ok(());
    }
    let parameters = student.parameters();
    let mut tensors = Vec::new();
    for ((name, _), gradient) in parameters.iter().zip(&step.gradients) {
        let finite = with_f32(&gradient.to_device(&Device::Cpu)?, |g| Ok(g.iter().all(|g| g.is_finite())))?;
        if !finite && tensors.len() < MOST_TENSORS {
            tensors.push(name.as_str());
        }
    }
    let row = |r: &Record| Row { seq_id: r.seq_id, key: r.key().to_string(), tokens: r.input_ids.len() };
    let bad = BadStep {
        step: progress.step,
        loss: step.mean.total.to_string(),
        grad_norm: grad_norm.to_string(),
        tensors,
        rows: records.iter().map(row).collect(),
    };
    let path = file(out, progress.step);
    files::write(&path, &serde_json::to_vec_pretty(&bad).map_err(|e| io(&path)(e.into()))?)
}

/// Errors: too many steps in a row were skipped.
pub(super) fn check(out: &Path, progress: &Progress, (step, grad_norm): (&Step, f64)) -> Result<()> {
    if progress.skipped_in_a_row < MOST_IN_A_ROW {
        return Ok(());
    }
    Err(TrainError::NotFinite {
        step: progress.step,
        in_a_row: progress.skipped_in_a_row,
        loss: step.mean.total,
        grad_norm,
        taken: progress.step - progress.skipped,
        rows: file(out, progress.step),
    }
    .into())
}

/// What is said beside the loss.
pub(super) fn remark(progress: &Progress) -> String {
    match progress.skipped {
        0 => String::new(),
        n => format!(", {n} not finite and skipped"),
    }
}

fn file(out: &Path, step: u64) -> PathBuf {
    out.join(format!("bad-step-{step}.json"))
}
