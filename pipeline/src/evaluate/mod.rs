//! What became of a student: figures on a held-out cache, and its answers.
//!
//! Knows data, student, loss, adapter and cache; nothing here changes a weight.

pub(crate) mod calibration;
mod error;
pub mod generate;
pub mod held_out;
mod statistics;
mod subject;
pub(crate) mod walk;

pub use calibration::BINS;
pub use error::EvaluateError;
pub use statistics::{Estimate, Mean, Perplexities, Spread};
pub use subject::{BasePrecision, Subject};
