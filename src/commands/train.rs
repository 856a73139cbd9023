//! `potstill train`: resolve settings, run stage two, say what came out; or, with `--dry-run`, what it will need.

use super::{drawn, interruptible};
use crate::cli::{Manner, Train};
use crate::config::{self, Sources};
use crate::exit::Outcome;
use crate::print::{self, Side, Table};
use crate::ranks::{self, Said};
use crate::settings;
use potstill_pipeline::device;
use potstill_pipeline::hub::{Hub, HubSettings, Network};
use potstill_pipeline::run::RunContext;
use potstill_pipeline::train::outlook::{self, Outlook, Place, When};
use potstill_pipeline::train::ranks::{Meeting, Ranks};
use potstill_pipeline::train::{self, Evaluation, HeldOutReport, SMOOTHED, TrainConfig, TrainReport};
use std::io::Write;

/// Runs stage two.
pub fn run(flags: Train, manner: Manner) -> anyhow::Result<Outcome> {
    let sources = Sources::of_process(flags.config.clone(), &flags)?;
    if flags.dry_run {
        return dry_run(&sources, manner);
    }
    let mut config: TrainConfig = config::resolve(&settings::TRAIN, &sources)?;
    let variable = |name: &str| sources.variables.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
    let said = ranks::said(&variable)?;
    // Ranks do the same; the first of them is enough to look at.
    let manner = if said.as_ref().is_some_and(|said| said.place.rank > 0) { Manner { quiet: true, ..manner } } else { manner };
    manner.remark(&config::to_toml(&settings::TRAIN, &config)?);

    config.check_rows()?;
    let context = interruptible()?;
    let mut meeting = None;
    if let Some(Said { place, gpu }) = said {
        config.device = device::of_process(&config.device, gpu);
        let (rank, of) = (place.rank, place.of);
        let opened = Meeting::open(place)?;
        // Said by every rank: whoever meant to train by one process has to see that it waits for others.
        let at = opened.address();
        let _ = writeln!(std::io::stderr(), "rank {rank} of {of}, by RANK and WORLD_SIZE; rank 0 at {at}");
        meeting = Some(opened);
    }
    let report = drawn(&context, manner, || {
        let ranks = match meeting {
            Some(meeting) => meeting.meet(&context)?,
            None => Ranks::alone(),
        };
        let hub = Hub::of_process();
        let student = hub.model_folder(&config.student, &context)?;
        let data = if config.data.is_empty() { Vec::new() } else { hub.data_files(&config.data, &context)? };
        let report = train::run_as(&TrainConfig { student, data, ..config.clone() }, &ranks, &context)?;
        Ok(ranks.writes().then_some(report))
    })?;
    let Some(report) = report else { return Ok(Outcome::Done) };

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
    match (&report.nccl, report.ranks) {
        (Some(version), ranks) => _ = table.fact("ranks", format!("{}, gradients by NCCL {version}", ranks.unwrap_or(1))),
        (None, Some(ranks)) => _ = table.fact("ranks", ranks),
        (None, None) => {}
    }
    table
        .fact(
            "loss",
            format!("{:.4} → {:.4} nats a scored position ({})", report.first_loss, report.last_loss, means(report.steps)),
        )
        .fact("trainable numbers", print::count(report.parameters))
        .fact("tokens", print::count(report.tokens))
        .fact("time", print::duration(report.seconds))
        .fact("speed", print::rate(report.tokens, report.seconds, "tokens"))
        .fact("adapter", report.adapter.display());
    if let Some(held_out) = &report.held_out {
        held_out_facts(held_out, &mut table);
    }
    table
}

/// What the losses at first and at last are means of.
fn means(steps: u64) -> String {
    match steps {
        1 => "one step".into(),
        steps => format!("means of {} steps", steps.min(SMOOTHED)),
    }
}

/// What evaluations found: first → last, and the best.
fn held_out_facts(report: &HeldOutReport, table: &mut Table) {
    let HeldOutReport { rows, positions, first, last, best, adapter, stopped_early } = report;
    let both = |of: fn(&Evaluation) -> Option<f32>, shown: fn(f64) -> String| {
        Some(format!("{} → {}", shown(of(first)?.into()), shown(of(last)?.into())))
    };
    let facts = [
        ("loss", both(|e| Some(e.loss), |x| format!("{x:.4}")).map(|text| format!("{text} nats a scored position"))),
        ("kd", both(|e| e.kd, |x| format!("{x:.4}")).map(|text| format!("{text} nats"))),
        ("perplexity", both(|e| Some(e.perplexity), |x| format!("{x:.3}"))),
        ("same top token", both(|e| e.agreement, print::percent)),
        ("mass of ids read", both(|e| e.kept_mass, print::percent)),
        ("calibration error", both(|e| Some(e.ece), |x| format!("{x:.4}"))),
        ("gradient's angle", both(|e| e.angle, |x| format!("{x:.2}°"))),
        ("error to teacher", both(|e| e.teacher_ece, |x| format!("{x:.4}"))),
    ];
    table.fact(
        "held out",
        format!("{} rows, {} positions; steps {} → {}", print::count(*rows), print::count(*positions), first.step, last.step),
    );
    if last.positions_not_finite > 0 {
        table.fact(
            "  not finite",
            format!("{} positions of the last evaluation, left out", print::count(last.positions_not_finite)),
        );
    }
    for (name, value) in facts {
        if let Some(value) = value {
            table.fact(&format!("  {name}"), value);
        }
    }
    table.fact("  lowest loss", format!("{:.4} at step {}", best.loss, print::count(best.step)));
    table.fact("  its adapter", adapter.display());
    if let Some(why) = stopped_early {
        table.fact("ended early", why);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_name_how_many_steps_there_were() {
        assert_eq!(
            [1, 2, 9, 10, 11].map(means),
            ["one step", "means of 2 steps", "means of 9 steps", "means of 10 steps", "means of 10 steps"]
        );
    }
}
