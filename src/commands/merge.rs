//! `potstill merge`: resolve settings, merge, say what was written.

use super::{drawn, interruptible};
use crate::cli::{Manner, Merge};
use crate::config::{self, Sources};
use crate::exit::Outcome;
use crate::print::{self, Table};
use crate::settings;
use potstill_pipeline::adapter::{self, MergeConfig, MergeReport};
use potstill_pipeline::hub::Hub;
use std::io::Write;

/// Merges an adapter into its base model.
pub fn run(flags: Merge, manner: Manner) -> anyhow::Result<Outcome> {
    let sources = Sources::of_process(flags.config.clone(), &flags)?;
    let config: MergeConfig = config::resolve(&settings::MERGE, &sources)?;

    let context = interruptible()?;
    let report = drawn(&context, manner, || {
        let student = Hub::of_process().model_folder(&config.student, &context)?;
        Ok(adapter::merge(&MergeConfig { student, ..config.clone() }, &context)?)
    })?;

    if manner.json {
        print::json(&report)?;
    } else {
        let mut out = print::out();
        facts(&report).write(&mut out)?;
        out.flush()?;
    }
    Ok(Outcome::Done)
}

/// What was written.
pub fn facts(report: &MergeReport) -> Table {
    let mut table = Table::of_facts();
    table
        .fact("adapted layers", print::count(report.adapted))
        .fact(
            "written",
            format!(
                "{}, {} in {}",
                print::plural(report.tensors, "tensor"),
                print::bytes(report.bytes),
                print::plural(report.files, "file")
            ),
        )
        .fact("model", report.out.display());
    table
}
