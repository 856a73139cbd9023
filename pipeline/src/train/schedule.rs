//! The learning rate as a function of the step.

use serde::{Deserialize, Serialize};

/// Shape of the learning rate after linear warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Stays at the peak.
    #[default]
    Constant,
    /// Falls to 0 on half a cosine.
    Cosine,
}
