//! What may be typed: one struct a verb.
//!
//! Flags of the stages only carry text and numbers to [`crate::config`], which knows what is allowed; their defaults are
//! read from the settings themselves, so that the help cannot drift from the code.
// What follows `///` here is help text; the tables of a config file stand in brackets in it.
#![allow(rustdoc::broken_intra_doc_links)]

mod caches;
mod evaluate;
mod judging;
mod scoring;
mod stages;

pub use caches::{Combine, Diff, Inspect, Repack, Storing, Verify};
pub use evaluate::{Evaluate, Generate, HeldOut};
pub use judging::{AlpacaEval, Answering, Asking, MtBench};
pub use scoring::{Plan, Precompute};
pub use stages::{DEFAULT_PROOF_STEPS, DEFAULT_SEEDS, Demo, MOST_SEEDS, Merge, Train};

use crate::settings::{self, Section};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use potstill_pipeline::adapter::MergeConfig;
use potstill_pipeline::precompute::PrecomputeConfig;
use potstill_pipeline::train::TrainConfig;

/// Widest line of the help, in columns.
const HELP_COLUMNS: usize = 96;

/// Offline distillation of language models: a teacher fills a cache of soft labels once, students train from it.
#[derive(Debug, Parser)]
#[command(name = "potstill", version, max_term_width = HELP_COLUMNS, subcommand_required = true, arg_required_else_help = true)]
pub struct Invocation {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
    /// How to print.
    #[command(flatten)]
    pub manner: Manner,
}

/// How to print.
#[derive(Debug, Clone, Copy, Args)]
pub struct Manner {
    /// Print the result as one JSON object on stdout
    #[arg(long, global = true)]
    pub json: bool,
    /// Print no progress, only the result and errors
    #[arg(long, short, global = true)]
    pub quiet: bool,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// What stage one will take: sizes on disk by preset and k, time, memory
    Plan(Box<Plan>),
    /// Stage one: run a teacher over chats and write a cache of its distributions
    Precompute(Box<Precompute>),
    /// Show what a cache holds, or one conversation token by token
    Inspect(Inspect),
    /// Say how far two caches of the same conversations lie apart
    Diff(Diff),
    /// Check every byte of a cache, or a share of it
    Verify(Verify),
    /// Store a cache anew without the teacher: smaller, never finer
    Repack(Repack),
    /// Join caches: parts of the same data, interrupted runs, other data
    Combine(Combine),
    /// Stage two: train a LoRA adapter on an NF4 student from a cache, or on plain chats
    Train(Box<Train>),
    /// Merge an adapter into its base model and write a plain model folder
    Merge(Merge),
    /// Say how good a student is: beside its teacher on a held-out cache, and by its answers, which a judge looks at
    #[command(subcommand)]
    Evaluate(Evaluate),
    /// Make tiny models and run everything on them, with no network, in minutes
    Demo(Demo),
}

/// Parses the process's arguments. Ends the process with code 2 on a wrong one, 0 after help.
pub fn parse() -> Invocation {
    let matches = command().get_matches();
    let mut invocation = Invocation::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    match &mut invocation.verb {
        Verb::Train(train) => {
            train.shuffle = if train.no_shuffle { Some(false) } else { train.shuffle };
            train.rslora = if train.no_rslora { Some(false) } else { train.rslora };
            train.tensorboard = if train.no_tensorboard { Some(false) } else { train.tensorboard };
        }
        Verb::Precompute(precompute) if precompute.scoring.no_compat => precompute.scoring.compat = Some(false),
        Verb::Plan(plan) if plan.scoring.no_compat => plan.scoring.compat = Some(false),
        _ => {}
    }
    invocation
}

/// The whole command with the settings' defaults in its help.
fn command() -> clap::Command {
    let with_defaults = |command: clap::Command, verb: &str, section: &Section, defaults: Option<toml::Table>| {
        let defaults = defaults.unwrap_or_default();
        command.mut_subcommand(verb, |verb| {
            section.settings.iter().fold(verb, |verb, setting| match defaults.get(setting.key).map(shown) {
                Some(text) if !text.is_empty() => verb.mut_arg(setting.key, |arg| {
                    let help = format!("{} [default: {text}]", arg.get_help().cloned().unwrap_or_default());
                    arg.help(help)
                }),
                _ => verb,
            })
        })
    };
    let stage_one = toml::Table::try_from(PrecomputeConfig::default()).ok();
    let stage_two = toml::Table::try_from(TrainConfig::default()).ok();
    let merge = toml::Table::try_from(MergeConfig::default()).ok();
    let command = with_defaults(Invocation::command(), "precompute", &settings::PRECOMPUTE, stage_one.clone());
    let command = with_defaults(command, "plan", &settings::PRECOMPUTE, stage_one);
    let command = with_defaults(command, "train", &settings::TRAIN, stage_two);
    with_defaults(command, "merge", &settings::MERGE, merge)
}

/// Reads one of the words that name a value.
fn word<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    T::deserialize(toml::Value::String(text.to_string())).map_err(|e: toml::de::Error| e.message().to_string())
}

/// A default as help shows it; empty where there is none.
fn shown(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Float(x) if *x != 0.0 && x.abs() < 1e-3 => format!("{x:e}"),
        toml::Value::Float(x) => x.to_string(),
        // A switch says itself which way it stands.
        toml::Value::Boolean(_) | toml::Value::Array(_) | toml::Value::Table(_) => String::new(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn every_setting_has_a_flag_and_every_default_is_shown() {
        let command = command();
        for (verb, section) in
            settings::SECTIONS.map(|section| (section.name, section)).into_iter().chain([("plan", &settings::PRECOMPUTE)])
        {
            let verb = command.find_subcommand(verb).expect("the verb exists");
            for setting in section.settings {
                let flag = setting.key.replace('_', "-");
                assert!(verb.get_arguments().any(|arg| arg.get_long() == Some(&flag)), "{} lacks --{flag}", section.name);
            }
        }
        let help = command.clone().find_subcommand_mut("train").expect("train").render_help().to_string();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(help.contains("[default: 2e-4]") && help.contains("[default: 0.3]") && help.contains("[default: 42]"), "{help}");
    }

    #[test]
    fn the_command_is_well_formed() {
        command().debug_assert();
    }
}
