//! `potstill train`: resolve settings, run stage two, say what came out; or, with `--dry-run`, what it will need.

use super::{drawn, interruptible};
use crate::cli::{Manner, Train};
use crate::config::{self, Sources};
use crate::exit::Outcome;
use crate::print::{self, Side, Table};
use crate::settings;
use potstill_pipeline::hub::{Hub, HubSettings, Network};
use potstill_pipeline::run::RunContext;
use potstill_pipeline::train::outlook::{self, Outlook, Place, When};
use potstill_pipeline::train::{self, TrainConfig, TrainReport};
use std::io::Write;

/// Runs stage two.
pub fn run(flags: Train, manner: Manner) -> anyhow::Result<Outcome> {
    let sources = Sources::of_process(flags.config.clone(), &flags)?;
    if flags.dry_run {
        return dry_run(&sources, manner);
    }
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

/// Says what a run will need. Nothing is written, nothing is fetched.
fn dry_run(sources: &Sources, manner: Manner) -> anyhow::Result<Outcome> {
    let config: TrainConfig = config::resolve_needing(&settings::TRAIN, sources, &["student"])?;
    let mut offline = HubSettings::of_process();
    offline.network = Network::Offline;
    let student = Hub::new(offline).model_folder(&config.student, &RunContext::default())?;
    let outlook = outlook::look(&TrainConfig { student, ..config })?;
    if manner.json {
        print::json(&outlook)?;
        return Ok(Outcome::Done);
    }
    let mut out = print::out();
    memory(&outlook).write(&mut out)?;
    writeln!(out)?;
    needs(&outlook).write(&mut out)?;
    out.flush()?;
    Ok(Outcome::Done)
}

/// What is held, part by part.
fn memory(outlook: &Outlook) -> Table {
    let mut table = Table::with_heads(&[("held", Side::Left), ("when", Side::Left), ("memory", Side::Right)]);
    for part in &outlook.memory.parts {
        let when = match (part.place, part.when) {
            (Place::Host, _) => "on the host, in its file".to_string(),
            (Place::Device, when) => moment(when).into(),
        };
        table.row([part.name.to_string(), when, print::bytes(part.bytes)]);
    }
    let peak = format!("always and {}", moment(outlook.memory.peak));
    table.row(["PEAK ON THE DEVICE".into(), peak, print::bytes(outlook.memory.device)]);
    table
}

fn moment(when: When) -> &'static str {
    match when {
        When::Always => "always",
        When::Pass => "loss and backward",
        When::Loss => "loss",
        When::Backward => "backward",
        When::Update => "update",
    }
}

/// What that is computed for, and how long the run is.
fn needs(outlook: &Outlook) -> Table {
    let mut table = Table::of_facts();
    table
        .fact("computed for", format!("packs of {} tokens, all of them scored", print::count(outlook.pack_tokens)))
        .fact("adapter", format!("rank {} on {}", outlook.rank, outlook.target_modules))
        .fact("trainable numbers", print::count(outlook.memory.trainable));
    if let Some(run) = &outlook.run {
        table
            .fact("conversations", format!("{}, of at most {} tokens", print::count(run.rows), print::count(run.max_length)))
            .fact("steps", format!("{}, {:.2} passes over the cache", print::count(run.steps), run.epochs))
            .fact("tokens in a step", format!("{} on average", print::count(run.tokens_per_step as u64)))
            .fact("scored positions", format!("{} of them", print::count(run.scored_per_step as u64)));
    }
    table
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
