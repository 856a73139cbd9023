//! `potstill train`: resolve settings, run stage two, say what came out.

use super::{drawn, interruptible};
use crate::cli::{Manner, Train};
use crate::config::{self, Sources};
use crate::exit::Outcome;
use crate::print::{self, Table};
use crate::settings;
use potstill_pipeline::hub::Hub;
use potstill_pipeline::train::{self, TrainConfig, TrainReport};
use std::io::Write;

/// Runs stage two.
pub fn run(flags: Train, manner: Manner) -> anyhow::Result<Outcome> {
    let sources = Sources::of_process(flags.config.clone(), &flags)?;
    let config: TrainConfig = config::resolve(&settings::TRAIN, &sources)?;
    manner.remark(&config::to_toml(&settings::TRAIN, &config)?);

    config.check_rows()?;
    let context = interruptible()?;
    let report = drawn(&context, manner, || {
        let hub = Hub::of_process();
        let student = hub.model_folder(&config.student, &context)?;
        let data = if config.data.is_empty() { Vec::new() } else { hub.data_files(&config.data, &context)? };
        Ok(train::run(&TrainConfig { student, data, ..config.clone() }, &context)?)
    })?;

    if manner.json {
        print::json(&report)?;
    } else {
        let mut out = print::out();
        facts(&report, config.lr).write(&mut out)?;
        out.flush()?;
    }
    Ok(if report.skipped.is_empty() { Outcome::Done } else { Outcome::Skipped })
}

/// What a run did.
pub fn facts(report: &TrainReport, lr: f64) -> Table {
    let from = if report.resumed_from == 0 {
        String::new()
    } else {
        format!(", resumed from step {}", print::count(report.resumed_from))
    };
    let mut table = Table::of_facts();
    if report.highest_lr < lr {
        let share = 100.0 * report.highest_lr / lr;
        table.fact("learning rate", format!("at most {share:.0} % of --lr: the run ended within its warm-up"));
    }
    table.fact("targets", &report.targets).fact("steps", format!("{}{from}", print::count(report.steps)));
    if report.skipped_steps > 0 {
        table.fact("not finite", format!("{} steps, skipped", print::count(report.skipped_steps)));
    }
    for (reason, conversations) in &report.skipped {
        table.fact("left out", format!("{} conversations: {reason}", print::count(*conversations)));
    }
    table
        .fact("loss", format!("{:.4} → {:.4} nats a scored position (means of 10 steps)", report.first_loss, report.last_loss))
        .fact("trainable numbers", print::count(report.parameters))
        .fact("tokens", print::count(report.tokens))
        .fact("time", print::duration(report.seconds))
        .fact("speed", print::rate(report.tokens, report.seconds, "tokens"))
        .fact("adapter", report.adapter.display());
    table
}
