//! What became of a student: figures on a held-out cache, its answers, and what judges say of them.
//!
//! Knows data, student, loss, adapter and cache; nothing here changes a weight. Refuses to ship the texts of a benchmark: they are read from the
//! files of its project, so that what is asked is what others asked.

pub mod alpaca_eval;
mod answers;
pub(crate) mod calibration;
mod error;
mod files;
pub mod generate;
pub mod held_out;
pub mod judge;
pub mod mean;
pub mod mt_bench;
pub mod proportion;
mod statistics;
mod subject;
pub(crate) mod walk;

pub use answers::{AnswerSettings, AnswerSource};
pub use calibration::BINS;
pub use error::EvaluateError;
pub use statistics::{Estimate, Mean, Perplexities, Spread};
pub use subject::{BasePrecision, Subject};
