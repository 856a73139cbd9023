//! `potstill train`: resolve settings, run stage two, say what came out.

use super::{drawn, interruptible};
use crate::cli::{Manner, Train};
use crate::config::{self, Sources};
use crate::exit::Outcome;
use crate::print::{self, Table};
use crate::settings;
use anyhow::Context;
use potstill_pipeline::Error;
use potstill_pipeline::run::RunContext;
use potstill_pipeline::train::{self, TrainConfig, TrainReport};
use std::io::Write;

/// The settings as they were used, in `--out`; the file can be given to `--config`.
const RESOLVED: &str = "config.resolved.toml";

/// Runs stage two.
pub fn run(flags: Train, manner: Manner) -> anyhow::Result<Outcome> {
    let sources = Sources::of_process(flags.config.clone(), &flags)?;
    let config: TrainConfig = config::resolve(&settings::TRAIN, &sources)?;
    manner.remark(&config::to_toml(&settings::TRAIN, &config)?);

    let context = interruptible()?;
    let report = drawn(&context, manner, || train_and_record(&config, &context))?;

    if manner.json {
        print::json(&report)?;
    } else {
        let mut out = print::out();
        facts(&report).write(&mut out)?;
        out.flush()?;
    }
    Ok(Outcome::Done)
}

/// Runs stage two and leaves its settings beside what it wrote, also when it was stopped on the way.
///
/// They are written afterwards because a run that is refused must not touch an earlier run's folder.
pub fn train_and_record(config: &TrainConfig, context: &RunContext) -> anyhow::Result<TrainReport> {
    let report = train::run(config, context);
    if matches!(report, Ok(_) | Err(Error::Interrupted { .. })) {
        let path = config.out.join(RESOLVED);
        let text = config::to_toml(&settings::TRAIN, config)?;
        std::fs::write(&path, text).with_context(|| format!("{}: cannot write", path.display()))?;
    }
    Ok(report?)
}

/// What a run did.
pub fn facts(report: &TrainReport) -> Table {
    let from = if report.resumed_from == 0 {
        String::new()
    } else {
        format!(", resumed from step {}", print::count(report.resumed_from))
    };
    let mut table = Table::of_facts();
    table
        .fact("steps", format!("{}{from}", print::count(report.steps)))
        .fact("loss", format!("{:.4} at first, {:.4} at last (nats a scored position)", report.first_loss, report.last_loss))
        .fact("trainable numbers", print::count(report.parameters))
        .fact("tokens", print::count(report.tokens))
        .fact("time", print::duration(report.seconds))
        .fact("speed", print::rate(report.tokens, report.seconds, "tokens"))
        .fact("adapter", report.adapter.display());
    table
}
