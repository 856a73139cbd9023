//! `potstill precompute`: resolve settings, run stage one, say what the cache holds now.

use super::{drawn, interruptible};
use crate::cli::{Manner, Precompute};
use crate::cluster::{self, Wish};
use crate::config::{self, Sources};
use crate::exit::Outcome;
use crate::print::{self, Out, Side, Table};
use crate::settings;
use potstill_cache::{ManifestState, RepairReport, Sameness};
use potstill_pipeline::hub::Hub;
use potstill_pipeline::precompute::{self, PrecomputeConfig, PrecomputeReport};
use std::io::Write;

/// Runs stage one. Skipped conversations are counted and end in [`Outcome::Skipped`].
pub fn run(flags: Precompute, manner: Manner) -> anyhow::Result<Outcome> {
    let sources = Sources::of_process(flags.scoring.config.clone(), &flags.scoring)?;
    let mut config = settled(&sources, &["teacher", "data", "cache"], manner)?;
    config.repair = flags.repair;
    let cache = config.placed()?.cache.clone();
    // The echo goes to stderr: the folder of a cache holds only what decides its bytes, which its manifest names.
    manner.remark(&config::to_toml(&settings::PRECOMPUTE, &config)?);

    let context = interruptible()?;
    let report = drawn(&context, manner, || {
        let hub = Hub::of_process();
        let teacher = hub.model_folder(&config.teacher, &context)?;
        let data = hub.data_files(&config.data, &context)?;
        Ok(precompute::run(&PrecomputeConfig { teacher, data, ..config.clone() }, &context)?)
    })?;

    if manner.json {
        print::json(&report)?;
    } else {
        let mut out = print::out();
        facts(&report).fact("cache", cache.display()).write(&mut out)?;
        if report.rows == 0 && (config.part.is_some() || config.worker.is_some()) {
            writeln!(out, "nothing to do: the data make fewer shards than there are shares,")?;
            writeln!(out, "and this share has none; its cache is empty and complete")?;
        }
        if let Some(repair) = &report.repair {
            writeln!(out)?;
            write_repair(repair, &mut out)?;
        }
        if !report.skipped.is_empty() {
            writeln!(out)?;
            skipped(&report).write(&mut out)?;
            for row in &report.left_out {
                writeln!(out, "{row}")?;
            }
        }
        out.flush()?;
    }
    // Which conversations are skipped is a matter of the data, the same for all workers, and no failure of any of them.
    Ok(if report.skipped.is_empty() || config.worker.is_some() { Outcome::Done } else { Outcome::Skipped })
}

/// The settings, of which `needed` have to be given, with a worker that the engine names put in the place of `auto`.
pub fn settled(sources: &Sources, needed: &[&str], manner: Manner) -> anyhow::Result<PrecomputeConfig> {
    let mut table = config::layered_needing::<PrecomputeConfig>(&settings::PRECOMPUTE, sources, needed)?;
    if let Some(Wish::Auto(stated)) = table.get("worker").and_then(toml::Value::as_str).and_then(Wish::of) {
        let variable = |name: &str| sources.variables.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone());
        let said = cluster::worker(stated, &variable)?;
        manner.remark(&format!("worker {} of {}, by {}", said.worker.index, said.worker.of, said.by));
        table.insert("worker".into(), said.worker.to_string().into());
    }
    Ok(config::typed(&settings::PRECOMPUTE, table)?)
}

/// What a cache holds after a run.
pub fn facts(report: &PrecomputeReport) -> Table {
    let per_position =
        if report.scored == 0 { "-".into() } else { format!("{:.1} B", report.bytes as f64 / report.scored as f64) };
    let mut table = Table::of_facts();
    table
        .fact("conversations", format!("{} ({} were there before)", print::count(report.rows), print::count(report.resumed_rows)))
        .fact("tokens", print::count(report.tokens))
        .fact("scored positions", print::count(report.scored))
        .fact("size", format!("{}, {per_position} a scored position", print::bytes(report.bytes)))
        .fact("truncated tokens", print::count(report.truncated_tokens))
        .fact("time", print::duration(report.seconds))
        .fact("teacher's speed", print::rate(report.scored_tokens, report.seconds, "tokens"));
    if let Some(saved) = saved(report) {
        table.fact("not computed", saved);
    }
    table
}

/// What it saved to run head and selection only where a token is trained on. The last position of a conversation never has a target.
fn saved(report: &PrecomputeReport) -> Option<String> {
    let positions = report.tokens.saturating_sub(report.rows + report.scored);
    if positions == 0 || report.scored_now == 0 {
        return None;
    }
    let bytes = report.bytes as f64 / report.scored.max(1) as f64 * positions as f64;
    let seconds = report.head_seconds / report.scored_now as f64 * positions as f64;
    let (positions, bytes, seconds) = (print::count(positions), print::bytes(bytes as u64), print::duration(seconds));
    Some(format!("{positions} positions not trained on: {bytes} and {seconds} saved"))
}

/// What was mended, and whether it is what it was.
fn write_repair(repair: &RepairReport, out: &mut Out) -> std::io::Result<()> {
    if repair.manifest != ManifestState::Good {
        let adopted = print::plural(repair.adopted_shards, "good shard");
        writeln!(out, "the manifest has been rebuilt, with {adopted} as they were")?;
    }
    if repair.dropped_parts > 0 {
        writeln!(out, "{} of the shard under way given up and scored again", print::plural(repair.dropped_parts, "piece"))?;
    }
    if repair.shards.is_empty() {
        return writeln!(out, "no shard had to be mended");
    }
    let mut table = Table::with_heads(&[
        ("mended", Side::Left),
        ("scored again", Side::Right),
        ("kept rows", Side::Right),
        ("bytes", Side::Left),
    ]);
    for shard in &repair.shards {
        let sameness = match shard.sameness {
            Sameness::Identical => "as before the damage",
            Sameness::Different => "others: the teacher's arithmetic differs",
            Sameness::Unknown => "no manifest to compare with",
        };
        table.row([shard.file.clone(), print::count(shard.recomputed_rows), print::count(shard.kept_rows), sameness.into()]);
    }
    table.write(out)
}

fn skipped(report: &PrecomputeReport) -> Table {
    let mut table = Table::with_heads(&[("skipped", Side::Right), ("reason", Side::Left), ("first", Side::Left)]);
    for (reason, n) in &report.skipped {
        table.row([print::count(*n), reason.clone(), report.first_skipped.get(reason).cloned().unwrap_or_default()]);
    }
    table
}
