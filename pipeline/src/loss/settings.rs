//! Owns the names of the losses, their ranges, and every way their inputs can be wrong.

use crate::{Error, Result};
use potstill_cache::ErrorClass;
use serde::{Deserialize, Serialize};

/// Default weight β of the teacher in [`Divergence::Jsd`].
pub const DEFAULT_BETA: f64 = 0.5;

/// How far the student's distribution Q is from the teacher's P, in nats.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, Default)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Divergence {
    /// Σ P (ln P − ln Q).
    #[default]
    ForwardKl,
    /// Σ Q (ln Q − ln P).
    ReverseKl,
    /// β Σ P (ln P − ln M) + (1 − β) Σ Q (ln Q − ln M) with M = β P + (1 − β) Q, the generalised Jensen-Shannon divergence.
    Jsd {
        /// Weight of the teacher, between 0 and 1 (both excluded).
        beta: f64,
    },
}

/// What becomes of the probability outside the kept ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub enum Tail {
    /// One bucket on each side, formed at temperature 1; the K + 1 entries are then tempered and normalised together.
    #[default]
    #[serde(rename = "bucket")]
    Bucket,
    /// None: both sides are renormalised over the kept ids.
    #[serde(rename = "renorm")]
    Renorm,
    /// The teacher is renormalised over the kept ids; the student keeps its whole distribution.
    #[serde(rename = "studentfull")]
    StudentFull,
    /// One bucket on each side, formed at temperature T; needs the teacher's ln Z_T. At T = 1 this is `bucket`.
    ///
    /// The teacher's is what its kept entries leave of Z_T: exact where they are (logits), else as exact as their rounding. By that
    /// difference alone its mass at T = 0.5 would be off by 1.6e-3 (7 mantissa bits) to 1.2e-2 (4 bits) on average. At T < 1 it is
    /// therefore held to be at most the bucket tempered as a whole, which it cannot exceed; where nothing is left, it is that bucket.
    #[serde(rename = "exact_tail")]
    ExactTail,
}

/// Which loss is computed: `total = kd_alpha · T² · divergence + kd_ce_alpha · cross entropy`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LossSettings {
    /// How distributions are compared.
    pub divergence: Divergence,
    /// What becomes of the tail.
    pub tail: Tail,
    /// Temperature T of the divergence, above 0.
    pub temperature: f64,
    /// Weight of the divergence.
    pub kd_alpha: f64,
    /// Weight of the cross entropy.
    pub kd_ce_alpha: f64,
}

impl Default for LossSettings {
    /// Forward KL on the kept ids and one tail bucket, T = 1, no cross entropy.
    fn default() -> Self {
        Self { divergence: Divergence::ForwardKl, tail: Tail::Bucket, temperature: 1.0, kd_alpha: 1.0, kd_ce_alpha: 0.0 }
    }
}

impl LossSettings {
    /// Errors: a value out of its range, or a divergence that is infinite for the tail chosen.
    pub fn check(&self) -> Result<()> {
        let refuse = |name, found: String, expected: &str| Err(Error::Setting { name, found, expected: expected.into() });
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return refuse("temperature", self.temperature.to_string(), "a finite number above 0");
        }
        for (name, weight) in [("kd_alpha", self.kd_alpha), ("kd_ce_alpha", self.kd_ce_alpha)] {
            if !(weight.is_finite() && weight >= 0.0) {
                return refuse(name, weight.to_string(), "a finite number, 0 or above");
            }
        }
        match self.divergence {
            Divergence::Jsd { beta } if !(beta > 0.0 && beta < 1.0) => {
                refuse("beta", beta.to_string(), "a number between 0 and 1, both excluded")
            }
            Divergence::ReverseKl if self.tail == Tail::StudentFull => refuse(
                "tail",
                "studentfull".into(),
                "bucket, renorm or exact_tail with reverse_kl, which is infinite where the teacher's tail counts as 0",
            ),
            _ => Ok(()),
        }
    }

    /// Whether the teacher's ln Z_T is needed.
    pub fn needs_lse_t(&self) -> bool {
        self.tail == Tail::ExactTail && self.temperature != 1.0
    }
}

/// Ways the inputs of a loss can be wrong.
#[derive(Debug, thiserror::Error)]
pub enum LossError {
    /// Two inputs that must go together do not.
    #[error("loss: {what}: expected {expected}, found {found}")]
    Length {
        /// The input.
        what: &'static str,
        /// Its length by the other inputs.
        expected: String,
        /// Its length.
        found: usize,
    },
    /// A tensor of the wrong shape or dtype.
    #[error("loss: {what}: expected {expected}, found {found}")]
    Tensor {
        /// The tensor.
        what: &'static str,
        /// Its shape and dtype by the other inputs.
        expected: String,
        /// Its shape and dtype.
        found: String,
    },
    /// A label beyond the student's vocabulary.
    #[error("loss: position {row}: label {label} is beyond the student's vocabulary of {vocab}")]
    Label {
        /// Row of the batch.
        row: usize,
        /// The label.
        label: u32,
        /// Width of the student's logits.
        vocab: usize,
    },
    /// A teacher's id beyond the student's vocabulary.
    #[error("loss: position {row}: the teacher's id {id} is beyond the student's vocabulary of {vocab}")]
    TargetId {
        /// Row of the batch.
        row: usize,
        /// The id.
        id: u32,
        /// Width of the student's logits.
        vocab: usize,
    },
    /// One id twice in a distribution.
    #[error("loss: position {row}: the teacher's id {id} is listed twice")]
    RepeatedId {
        /// Row of the batch.
        row: usize,
        /// The id.
        id: u32,
    },
    /// A value that is no log-probability.
    #[error("loss: position {row}: expected log-probabilities of at most 0, found {found}")]
    Logprob {
        /// Row of the batch.
        row: usize,
        /// The value.
        found: f32,
    },
    /// A distribution that gives nothing any probability.
    #[error("loss: position {row}: the teacher's {kept} kept ids and tail carry no probability")]
    NoMass {
        /// Row of the batch.
        row: usize,
        /// Kept ids there.
        kept: usize,
    },
}

impl LossError {
    /// The class that decides the exit code.
    pub fn class(&self) -> ErrorClass {
        match self {
            LossError::Label { .. } | LossError::TargetId { .. } => ErrorClass::Mismatch,
            _ => ErrorClass::Runtime,
        }
    }
}
