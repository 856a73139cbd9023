//! Owns the names of the losses, their ranges, and every way their inputs can be wrong.

use crate::{Error, Result};
use potstill_cache::ErrorClass;
use serde::{Deserialize, Serialize};

/// Default weight β of the teacher in [`Divergence::Jsd`].
pub const DEFAULT_BETA: f64 = 0.5;
/// Default skew α of [`Divergence::SkewedKl`] and [`Divergence::SkewedReverseKl`], as DistiLLM has it (arXiv 2402.03898).
pub const DEFAULT_SKEW: f64 = 0.1;

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
    /// Σ P (ln P − ln M) with M = α P + (1 − α) Q, skewed KL (DistiLLM, arXiv 2402.03898). At most ln 1/α.
    SkewedKl {
        /// Share α of the teacher in M, between 0 and 1 (both excluded).
        skew: f64,
    },
    /// Σ Q (ln Q − ln M) with M = (1 − α) P + α Q, skewed reverse KL (the same paper). At most ln 1/α, so finite also where the
    /// teacher has nothing.
    SkewedReverseKl {
        /// Share α of the student in M, between 0 and 1 (both excluded).
        skew: f64,
    },
    /// ½ Σ |P − Q|, between 0 and 1 (no nats). Where P = Q the subgradient 0 is taken.
    TotalVariation,
}

impl std::fmt::Display for Divergence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Divergence::ForwardKl => f.write_str("forward KL"),
            Divergence::ReverseKl => f.write_str("reverse KL"),
            Divergence::Jsd { beta } => write!(f, "Jensen-Shannon divergence, beta {beta}"),
            Divergence::SkewedKl { skew } => write!(f, "skewed KL, skew {skew}"),
            Divergence::SkewedReverseKl { skew } => write!(f, "skewed reverse KL, skew {skew}"),
            Divergence::TotalVariation => f.write_str("total variation"),
        }
    }
}

/// What becomes of the probability outside the kept ids.
///
/// | here | elsewhere |
/// |---|---|
/// | `bucket` | ghost token (Sparse Logit Sampling, Megatron-LM); `symmetric_uniform` (DistillKit) |
/// | `renorm` | teacher and student normalised over the kept ids (axolotl's `kd_normalize_topk`, MaxText) |
/// | `studentfull` | missing ids have probability zero, the teacher renormalised: `zero` (DistillKit), axolotl's default |
/// | `none` | top-k KL as it stands: kept probabilities as they are, nothing for the rest; its gradient is M·q − p |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub enum Tail {
    /// One bucket on each side, formed at temperature 1; the K + 1 entries are then tempered and normalised together.
    /// The "ghost token" of the literature, a name that is read too.
    #[default]
    #[serde(rename = "bucket", alias = "ghost")]
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
    /// The unnormalised top-k loss: Σ P (ln P − ln Q) over the kept ids, with P as the cache has it and Q of the student's whole
    /// distribution. Forward KL alone; at T ≠ 1 it needs the teacher's ln Z_T.
    ///
    /// **Biased, and no divergence**: it lacks the tail's term, so it may fall below 0 (to M ln M, M being the kept mass), and does
    /// so at a student that gives the tail nothing. For comparison with others; `bucket` costs the same.
    #[serde(rename = "none")]
    None,
}

impl Tail {
    /// The name in settings.
    pub fn name(&self) -> &'static str {
        match self {
            Tail::Bucket => "bucket",
            Tail::Renorm => "renorm",
            Tail::StudentFull => "studentfull",
            Tail::ExactTail => "exact_tail",
            Tail::None => "none",
        }
    }
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
            Divergence::SkewedKl { skew } | Divergence::SkewedReverseKl { skew } if !(skew > 0.0 && skew < 1.0) => {
                refuse("skew", skew.to_string(), "a number between 0 and 1, both excluded")
            }
            other if self.tail == Tail::None && other != Divergence::ForwardKl => refuse(
                "tail",
                "none".into(),
                &format!("bucket, renorm or exact_tail with {other}; the unnormalised top-k loss is a forward KL"),
            ),
            Divergence::ReverseKl if self.tail == Tail::StudentFull => refuse(
                "tail",
                "studentfull".into(),
                "bucket, renorm or exact_tail with reverse KL, which is infinite where the teacher's tail counts as 0",
            ),
            _ => Ok(()),
        }
    }

    /// Whether the teacher's ln Z_T is needed.
    pub fn needs_lse_t(&self) -> bool {
        matches!(self.tail, Tail::ExactTail | Tail::None) && self.temperature != 1.0
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
    /// A sum at T that is no number.
    #[error("loss: position {row}: expected a finite ln Z_T of the teacher, found {found}")]
    LogSum {
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
