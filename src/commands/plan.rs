//! `potstill plan`: the settings of a run of stage one, and what that run will take: data, time, size on disk by preset and k, memory.

use super::{drawn, precompute};
use crate::cli::{Manner, Plan};
use crate::config::Sources;
use crate::exit::Outcome;
use crate::print::{self, Side, Table};
use potstill_cache::{DEFAULT_DRAWS, Preset, SizeEstimate, Values};
use potstill_pipeline::hub::{Hub, HubSettings, Network};
use potstill_pipeline::precompute::{
    self as stage, Measure, Measured, Memory, Moment, PlanConfig, PlanReport, PlannedSize, PrecomputeConfig,
};
use potstill_pipeline::run::RunContext;
use potstill_pipeline::teacher::Residency;
use std::collections::BTreeSet;
use std::io::Write;
use std::time::Duration;

/// Standard errors on either side of an estimate that a 95 % interval has.
const NORMAL_95: f64 = 1.96;
/// The presets that are columns.
const COLUMNS: [Preset; 4] = [Preset::Exact, Preset::Standard, Preset::Compact, Preset::Small];

/// Says what a run will take. Nothing is written, nothing is fetched; conversations that will be skipped are no failure of a plan.
pub fn run(flags: Plan, manner: Manner) -> anyhow::Result<Outcome> {
    let sources = Sources::of_process(flags.scoring.config.clone(), &flags.scoring)?;
    let run = precompute::settled(&sources, &["teacher", "data"], manner)?;
    let measure = if flags.no_run { Measure::No } else { Measure::For(Duration::from_secs_f64(flags.seconds)) };
    let compare_k: BTreeSet<u16> = flags.compare_k.into_iter().collect();
    // Nobody waits for a durable stop here: a signal ends the process.
    let context = RunContext::default();
    let report = drawn(&context, manner, || {
        let mut offline = HubSettings::of_process();
        offline.network = Network::Offline;
        let hub = Hub::new(offline);
        let (teacher, data) = (hub.model_folder(&run.teacher, &context)?, hub.data_files(&run.data, &context)?);
        let run = PrecomputeConfig { teacher, data, ..run.clone() };
        Ok(stage::plan(&PlanConfig { run, measure, compare_k: compare_k.into_iter().collect() }, &context)?)
    })?;
    if manner.json {
        print::json(&report)?;
        return Ok(Outcome::Done);
    }
    let mut out = print::out();
    write(&report, &mut out)?;
    out.flush()?;
    Ok(Outcome::Done)
}

fn write(report: &PlanReport, out: &mut impl Write) -> std::io::Result<()> {
    facts(report).write(out)?;
    write_sizes(report, out)?;
    write_memory(report, out)
}

/// What is scored, how long that takes, and what the cache as it is set takes.
fn facts(report: &PlanReport) -> Table {
    let PlanReport { extent, part, .. } = report;
    let mut table = Table::of_facts();
    let weights = format!("{}, {} of weights", report.weights, print::bytes(report.stored.total));
    let share = part.map_or(String::new(), |part| format!(", of share {} of {}", part.number, part.of));
    table
        .fact("teacher", weights)
        .fact("conversations", format!("{}{share}; the data have {}", print::count(extent.rows), print::count(report.data_rows)));
    for (reason, n) in &report.skipped {
        table.fact("skipped", format!("{}: {reason}", print::count(*n)));
        if let Some(place) = report.first_skipped.get(reason) {
            // The folders before it are those that were asked for.
            table.fact("  the first", place.rsplit('/').next().unwrap_or(place));
        }
    }
    table.fact("tokens", format!("{}; the longest has {}", print::count(extent.tokens), print::count(report.longest)));
    if report.truncated_rows > 0 {
        let rows = print::plural(report.truncated_rows, "conversation");
        table.fact("cut", format!("{rows}, by {} tokens", print::count(report.truncated_tokens)));
    }
    table.fact("scored positions", print::count(extent.scored)).fact("shards", print::count(report.shards));
    time(report, &mut table);
    if let Some(size) = &report.size {
        stored(report, size, &mut table);
    } else {
        disk(report, None, &mut table);
    }
    table
}

fn time(report: &PlanReport, table: &mut Table) {
    let (Some(measured), Some(seconds)) = (&report.measured, report.seconds) else {
        let why = if report.extent.rows == 0 { "nothing to score" } else { "not measured (--no-run)" };
        table.fact("time", why);
        return;
    };
    let speed = print::rate(measured.extent.tokens, measured.seconds, "tokens");
    table.fact("time", format!("{} on this machine, at {speed}", print::duration(seconds)));
    let rows = print::plural(measured.extent.rows, "conversation");
    let passes = if measured.passes == 1 { "1 pass".into() } else { format!("{} passes", print::count(measured.passes)) };
    let tokens = print::count(measured.extent.tokens);
    table.fact("  measured", format!("{} on {tokens} tokens of {rows} in {passes}", print::duration(measured.seconds)));
    for note in notes(measured) {
        table.fact("", note);
    }
}

/// What a reader should know of a measurement.
fn notes(measured: &Measured) -> Vec<String> {
    let mut notes = Vec::new();
    match measured.warm_up_seconds {
        Some(seconds) if seconds < 0.5 => {}
        Some(seconds) => notes.push(format!("after a first pass of {} that brought the weights in", print::duration(seconds))),
        None => notes.push("a first pass, which brought the weights in: others are faster".into()),
    }
    if 2 * measured.pack_tokens < measured.run_pack_tokens {
        let (here, there) = (print::count(measured.pack_tokens), print::count(measured.run_pack_tokens));
        notes.push(format!("at most {here} tokens at once; the run's {there} are no slower"));
    } else if measured.residency == Residency::Streamed {
        notes.push("weights streamed; the run's blocks may be longer: no slower".into());
    }
    if measured.not_finite > 0 {
        let rows = print::plural(measured.not_finite, "conversation");
        notes.push(format!("{rows} with logits that are not finite (--max-bad)"));
    }
    notes
}

fn stored(report: &PlanReport, size: &PlannedSize, table: &mut Table) {
    let PlannedSize { selection, mantissa_bits, zstd_level, estimate, mean_entries, .. } = size;
    let values = match size.values {
        Values::Logprob => format!("{mantissa_bits} mantissa bits"),
        Values::LogitBf16 => "bf16 logits".into(),
    };
    let entries = format!("{mean_entries:.1} entries a position");
    table.fact("stored as", format!("{selection}, {values}, zstd {zstd_level}: {entries}")).fact(
        "size",
        format!(
            "{}{}, {:.1} B a scored position",
            print::bytes(estimate.bytes),
            interval(estimate).map_or(String::new(), |share| format!(" ± {share}")),
            estimate.per_scored
        ),
    );
    disk(report, Some(estimate), table);
}

fn disk(report: &PlanReport, estimate: Option<&SizeEstimate>, table: &mut Table) {
    let disk = &report.disk;
    let free = disk.free.map_or("unknown".into(), print::bytes);
    let needs = match estimate.map(|estimate| disk.needs(estimate.bytes)) {
        Some(needs) if disk.free.is_some_and(|free| needs > free) => format!("TOO LITTLE, {} are needed", print::bytes(needs)),
        Some(needs) => format!("{} are needed at most", print::bytes(needs)),
        None => "not known what is needed".into(),
    };
    table.fact("disk", format!("{free} free in {}; {needs}", disk.folder.display()));
}

/// Half of an estimate's 95 % interval, as a share of it.
fn interval(estimate: &SizeEstimate) -> Option<String> {
    let half = NORMAL_95 * estimate.standard_error? / estimate.bytes.max(1) as f64;
    Some(format!("{:.1}%", half * 100.0))
}

fn write_sizes(report: &PlanReport, out: &mut impl Write) -> std::io::Result<()> {
    let fits = |bytes: u64| report.disk.free.is_none_or(|free| report.disk.needs(bytes) <= free);
    let mut too_large = false;
    let mut cell = |bytes: u64| {
        too_large |= !fits(bytes);
        format!("{}{}", print::bytes(bytes), if fits(bytes) { " " } else { "*" })
    };
    let preset_heads = COLUMNS.map(|preset| (preset.name(), Side::Right));
    if !report.compared.is_empty() {
        let rows = report.measured.as_ref().map_or(0, |measured| measured.sampled.rows);
        writeln!(out, "\nsize by k and preset, of what the teacher said of {}", print::plural(rows, "conversation"))?;
        let mut table = Table::with_heads(&[&[("k", Side::Right), ("mass", Side::Right)][..], &preset_heads].concat());
        for (k, mass) in &report.kept_mass {
            let of = |preset: Preset| report.compared.iter().find(|c| c.preset == preset && c.k == Some(*k));
            let [a, b, c, d] = COLUMNS.map(|preset| of(preset).map_or(String::new(), |found| cell(found.estimate.bytes)));
            table.row([print::count((*k).into()), print::percent(*mass), a, b, c, d]);
        }
        let widest = |preset: Preset| {
            let of = report.compared.iter().filter(|c| c.preset == preset && c.k.is_some()).map(|c| &c.estimate);
            of.max_by(|a, b| off(a).total_cmp(&off(b))).and_then(interval).map_or("-  ".into(), |share| format!("{share}  "))
        };
        let [a, b, c, d] = COLUMNS.map(widest);
        table.row([String::new(), "±".into(), a, b, c, d]);
        table.write(out)?;
        if let Some(drawn) = report.compared.iter().find(|c| c.k.is_none()) {
            let drawn = &drawn.estimate;
            let off = interval(drawn).map_or(String::new(), |share| format!(" ± {share}"));
            writeln!(out, "sampled, {} draws: {}{off}", DEFAULT_DRAWS, cell(drawn.bytes).trim_end())?;
        }
    } else if !report.typical.is_empty() {
        writeln!(out, "\nsize by k and preset, if distributions are those of the benchmark (--help)")?;
        let mut table = Table::with_heads(&[&[("k", Side::Right)][..], &preset_heads].concat());
        let ks: BTreeSet<u16> = report.typical.iter().map(|typical| typical.k).collect();
        for k in ks {
            let of = |preset: Preset| report.typical.iter().find(|typical| typical.preset == preset && typical.k == k);
            let [a, b, c, d] = COLUMNS.map(|preset| of(preset).map_or(String::new(), |found| cell(found.bytes)));
            table.row([print::count(k.into()), a, b, c, d]);
        }
        table.write(out)?;
    }
    if too_large {
        writeln!(out, "* more than the disk has")?;
    }
    Ok(())
}

/// Standard error as a share.
fn off(estimate: &SizeEstimate) -> f64 {
    estimate.standard_error.unwrap_or(0.0) / estimate.bytes.max(1) as f64
}

fn write_memory(report: &PlanReport, out: &mut impl Write) -> std::io::Result<()> {
    let memory = &report.memory;
    writeln!(out)?;
    let heads = [("memory", Side::Left), ("when", Side::Left), ("resident", Side::Right), ("streamed", Side::Right)];
    let mut table = Table::with_heads(&heads);
    let (first, rest) = memory.resident.parts.split_at(memory.resident.parts.len().min(2));
    let mut named: Vec<(&str, Moment)> = Vec::new();
    for part in first.iter().chain(&memory.streamed.parts).chain(rest) {
        if !named.contains(&(part.name, part.when)) {
            named.push((part.name, part.when));
        }
    }
    let of = |memory: &Memory, name: &str| {
        memory.parts.iter().find(|part| part.name == name).map_or(String::new(), |part| print::bytes(part.bytes))
    };
    for (name, when) in named {
        table.row([name.into(), moment(when).into(), of(&memory.resident, name), of(&memory.streamed, name)]);
    }
    let (resident, streamed) = (print::bytes(memory.resident.peak), print::bytes(memory.streamed.peak));
    table.row(["PEAK".into(), "always and the larger".into(), resident, streamed]);
    table.write(out)?;
    let chosen = match memory.chosen {
        Residency::Resident => "resident",
        Residency::Streamed => "streamed",
    };
    let free = memory.available.map_or(String::new(), |bytes| format!("; {} are available now", print::bytes(bytes)));
    writeln!(out, "the run would hold its weights {chosen}{free}")
}

fn moment(when: Moment) -> &'static str {
    match when {
        Moment::Always => "always",
        Moment::Layers => "layers",
        Moment::Head => "head",
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
