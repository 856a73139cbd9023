//! What held-out positions say of the student: figures of one row of logits, and what they add up to.
//!
//! Every figure is a mean over scored positions, added in f64 in their order, row by row, so that it depends on no thread and on no
//! chunk. A position of which a value is not finite is left out of them all, and counted. q is the student's distribution at temperature 1, y the data's next token, p the teacher's.
//!
//! | figure | of a position |
//! |---|---|
//! | `loss`, `kd` | what training computes: the weighted loss; the divergence from what is read of the cache, without T² and weight |
//! | `ce` | −ln q(y); perplexity = exp(mean) |
//! | `agreement` | whether argmax q = argmax p; ties go to the smaller id |
//! | `kept_mass`, `teacher_kept_mass` | Σ q and Σ p over the ids that are read |
//! | `ece` | [`calibration_error`] |

use crate::Result;
use crate::evaluate::calibration::{calibration_error, top};
use crate::loss::{self, LossSettings, LossSums};
use potstill_cache::{SoftTargets, Target};
use serde::{Deserialize, Serialize};

/// What an evaluation found. Figures are f32: that much comes back to the bit from a checkpoint's JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// Optimiser steps done before it.
    pub step: u64,
    /// Positions that no figure counts, because one of their own is not finite.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub positions_not_finite: u64,
    /// The run's loss, nats a scored position.
    pub loss: f32,
    /// The divergence at the run's settings, nats a scored position; absent where there are no distributions to compare with, and
    /// where only draws are, which training does not look at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kd: Option<f32>,
    /// Cross entropy with the data's tokens, nats a scored position.
    pub ce: f32,
    /// exp(ce).
    pub perplexity: f32,
    /// Share of positions at which student and teacher find the same token most likely; absent where that of the teacher is not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f32>,
    /// Mean probability that the student gives to the ids read; absent where ids were drawn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_mass: Option<f32>,
    /// Mean probability that the teacher gives to them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher_kept_mass: Option<f32>,
    /// Expected calibration error against the data's tokens, 0 to 1.
    pub ece: f32,
    /// Mean angle in degrees at the logits between the gradient of the run's loss and that of forward KL against the teacher's
    /// whole distribution; absent without a dense sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub angle: Option<f32>,
    /// Calibration error against the teacher's whole distribution, 0 to 2; absent without a dense sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher_ece: Option<f32>,
}

impl Evaluation {
    /// Every figure that is there, by its name.
    pub(in crate::train) fn figures(&self) -> Vec<(&'static str, f32)> {
        let all = [
            ("loss", Some(self.loss)),
            ("kd", self.kd),
            ("ce", Some(self.ce)),
            ("perplexity", Some(self.perplexity)),
            ("agreement", self.agreement),
            ("kept_mass", self.kept_mass),
            ("teacher_kept_mass", self.teacher_kept_mass),
            ("ece", Some(self.ece)),
            ("angle", self.angle),
            ("teacher_ece", self.teacher_ece),
            ("positions_not_finite", Some(self.positions_not_finite as f32).filter(|positions| *positions > 0.0)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

fn is_zero(count: &u64) -> bool {
    *count == 0
}

/// What a position's row of logits is compared with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expected<'a> {
    /// The data's next token.
    pub label: u32,
    /// What is read of the cache at this position, alone; absent where there is nothing to compare with.
    pub read: Option<&'a SoftTargets>,
    /// Whether the ids read were drawn.
    pub drawn: bool,
    /// ln Z_T of the teacher, where the loss needs it.
    pub lse_t: Option<f32>,
    /// The entries as the cache stores them.
    pub stored: Option<Target<'a>>,
}

/// Figures of one position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Row {
    pub sums: LossSums,
    kd: bool,
    confidence: f64,
    hit: bool,
    agrees: Option<bool>,
    masses: Option<(f64, f64)>,
}

impl Row {
    /// Figures of a row of logits `[V]`, whose place the loss's scratch takes. Errors: as [`loss::rows`].
    pub(super) fn of(z: &mut [f32], expected: &Expected<'_>, settings: &LossSettings) -> Result<Self> {
        let (top, largest) = top(z.iter().copied());
        let lse = f64::from(largest) + z.iter().map(|z| (f64::from(*z) - f64::from(largest)).exp()).sum::<f64>().ln();
        let mass = |ids: &[u32]| ids.iter().filter_map(|id| z.get(*id as usize)).map(|z| (f64::from(*z) - lse).exp()).sum();
        let exact = expected.read.filter(|_| !expected.drawn).map(|read| read.position(0));
        let masses = exact.map(|read| (mass(read.ids), read.logprobs.iter().map(|l| f64::from(*l).exp()).sum()));
        let teacher = expected.stored.filter(|stored| !stored.ids.is_empty());
        let agrees = teacher.map(|stored| {
            // Rounded values may tie; the ids of a cache then fall to the smaller one first.
            let (at, _) = self::top(stored.logprobs.iter().copied());
            stored.ids.get(at).is_some_and(|id| *id as usize == top)
        });
        let vocab = z.len();
        let lse_t = expected.lse_t.as_ref().map(std::slice::from_ref);
        let sums = loss::rows(z, vocab, &[expected.label], expected.read, lse_t, settings, 0.0)?;
        let (kd, hit) = (expected.read.is_some(), top == expected.label as usize);
        Ok(Self { sums, kd, confidence: (f64::from(largest) - lse).exp(), hit, agrees, masses })
    }
}

impl Row {
    /// Whether every number is one.
    fn is_finite(&self) -> bool {
        let (student, teacher) = self.masses.unwrap_or_default();
        [self.sums.total, self.sums.kd, self.sums.ce, self.confidence, student, teacher].iter().all(|x| x.is_finite())
    }
}

/// A mean over those positions that have a value.
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    sum: f64,
    count: u64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }

    fn value(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

/// Positions so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Tally {
    loss: Mean,
    kd: Mean,
    ce: Mean,
    agreement: Mean,
    masses: (Mean, Mean),
    /// Confidence of each position, and whether it was right.
    confidences: Vec<(f64, bool)>,
    not_finite: u64,
}

impl Tally {
    /// Counts the next position.
    pub(super) fn add(&mut self, row: &Row) {
        if !row.is_finite() {
            self.not_finite += 1;
            return;
        }
        self.loss.add(row.sums.total);
        self.ce.add(row.sums.ce);
        if row.kd {
            self.kd.add(row.sums.kd);
        }
        if let Some(agrees) = row.agrees {
            self.agreement.add(f64::from(u8::from(agrees)));
        }
        if let Some((student, teacher)) = row.masses {
            self.masses.0.add(student);
            self.masses.1.add(teacher);
        }
        self.confidences.push((row.confidence, row.hit));
    }

    /// Positions seen, those left out among them.
    pub(super) fn positions(&self) -> u64 {
        self.loss.count + self.not_finite
    }

    /// The means after `step` steps; `None` where no position has any.
    pub(super) fn close(self, step: u64) -> Option<Evaluation> {
        let ce = self.ce.value()?;
        let rounded = |mean: Mean| mean.value().map(|value| value as f32);
        Some(Evaluation {
            step,
            positions_not_finite: self.not_finite,
            loss: rounded(self.loss)?,
            kd: rounded(self.kd),
            ce: ce as f32,
            // Beyond the range of f32 there is no number that JSON could hold.
            perplexity: (ce.exp() as f32).min(f32::MAX),
            agreement: rounded(self.agreement),
            kept_mass: rounded(self.masses.0),
            teacher_kept_mass: rounded(self.masses.1),
            ece: calibration_error(self.confidences) as f32,
            angle: None,
            teacher_ece: None,
        })
    }
}

#[cfg(test)]
#[path = "figures_tests.rs"]
mod tests;
