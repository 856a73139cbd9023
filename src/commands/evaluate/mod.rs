//! `potstill evaluate`: one file a sub-verb.

mod generate;
mod held_out;

use crate::cli::{Evaluate, Manner};
use crate::exit::Outcome;

/// Carries out a sub-verb.
pub fn run(what: Evaluate, manner: Manner) -> anyhow::Result<Outcome> {
    match what {
        Evaluate::HeldOut(flags) => held_out::run(&flags, manner),
        Evaluate::Generate(flags) => generate::run(&flags, manner),
    }
}
