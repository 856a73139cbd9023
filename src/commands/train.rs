//! `potstill train`: resolve settings, run stage two, say what came out.

use super::{drawn, interruptible};
use crate::cli::{Manner, Train};
use crate::config::{self, Sources};
use crate::exit::Outcome;
use crate::print::{self, Table};
use crate::settings;
use potstill_pipeline::hub::Hub;
use potstill_pipeline::train::{self, Evaluation, HeldOutReport, SMOOTHED, TrainConfig, TrainReport};
use std::io::Write;

/// Runs stage two.
pub fn run(flags: Train, manner: Manner) -> anyhow::Result<Outcome> {
    let sources = Sources::of_process(flags.config.clone(), &flags)?;
    let config: TrainConfig = config::resolve(&settings::TRAIN, &sources)?;
    manner.remark(&config::to_toml(&settings::TRAIN, &config)?);

    let context = interruptible()?;
    let report = drawn(&context, manner, || {
        let student = Hub::of_process().model_folder(&config.student, &context)?;
        Ok(train::run(&TrainConfig { student, ..config.clone() }, &context)?)
    })?;

    if manner.json {
        print::json(&report)?;
    } else {
        let mut out = print::out();
        facts(&report, config.lr).write(&mut out)?;
        out.flush()?;
    }
    Ok(Outcome::Done)
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
    table
        .fact("targets", &report.targets)
        .fact("steps", format!("{}{from}", print::count(report.steps)))
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
