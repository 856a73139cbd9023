//! `potstill evaluate generate`: run the library, say what was answered.

use crate::cli::{self, Manner};
use crate::commands::{drawn, interruptible};
use crate::exit::Outcome;
use crate::print::{self, Table};
use potstill_pipeline::evaluate::Subject;
use potstill_pipeline::evaluate::generate::{self, Form, GenerateConfig, GenerateReport};
use potstill_pipeline::hub::Hub;
use std::io::Write;

/// Lets a student answer. Prompts that leave no room end in [`Outcome::Skipped`].
pub fn run(flags: &cli::Generate, manner: Manner) -> anyhow::Result<Outcome> {
    let config = flags.config();
    let context = interruptible()?;
    let report = drawn(&context, manner, || {
        let student = Hub::of_process().model_folder(&config.subject.student, &context)?;
        let subject = Subject { student, ..config.subject.clone() };
        Ok(generate::run(&GenerateConfig { subject, ..config.clone() }, &context)?)
    })?;
    if manner.json {
        print::json(&report)?;
    } else {
        let mut out = print::out();
        facts(&report, &config).write(&mut out)?;
        out.flush()?;
    }
    Ok(if report.too_long == 0 { Outcome::Done } else { Outcome::Skipped })
}

/// What was answered.
fn facts(report: &GenerateReport, config: &GenerateConfig) -> Table {
    let form = match report.form {
        Form::MtBench => "MT-Bench",
        Form::AlpacaEval => "AlpacaEval",
        Form::Plain => "plain prompts",
    };
    let resumed = match report.resumed {
        0 => String::new(),
        resumed => format!(", {} of them by an earlier run", print::count(resumed as u64)),
    };
    let stops: Vec<String> = report.stop_ids.iter().map(u32::to_string).collect();
    let mut table = Table::of_facts();
    table
        .fact("questions", format!("{} ({form})", print::count(report.questions as u64)))
        .fact("answers", format!("{}{resumed}", print::count(report.answers as u64)))
        .fact("called", &config.model_id);
    if report.cut > 0 {
        let most = print::count(config.max_new_tokens.into());
        table.fact("cut", format!("{} answers at {most} tokens or the model's context", print::count(report.cut as u64)));
    }
    if report.too_long > 0 {
        table.fact(
            "not answered",
            format!("{} prompts that leave no room in the model's context", print::count(report.too_long as u64)),
        );
    }
    table
        .fact("stop tokens", stops.join(", "))
        .fact("tokens", format!("{}, after {} of prompts", print::count(report.tokens), print::count(report.prompt_tokens)))
        .fact("time", print::duration(report.seconds))
        .fact("speed", print::rate(report.tokens, report.seconds, "tokens"))
        .fact("written", report.out.display());
    table
}
