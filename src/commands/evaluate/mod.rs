//! `potstill evaluate`: one file a sub-verb.

mod alpaca_eval;
mod generate;
mod held_out;
mod judging;
mod mt_bench;

use crate::cli::{Evaluate, Manner};
use crate::exit::Outcome;

/// Carries out a sub-verb.
pub fn run(what: Evaluate, manner: Manner) -> anyhow::Result<Outcome> {
    match what {
        Evaluate::HeldOut(flags) => held_out::run(&flags, manner),
        Evaluate::Generate(flags) => generate::run(&flags, manner),
        Evaluate::MtBench(flags) => mt_bench::run(&flags, manner),
        Evaluate::AlpacaEval(flags) => alpaca_eval::run(&flags, manner),
    }
}
