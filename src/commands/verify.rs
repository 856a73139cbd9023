//! `potstill verify`: every byte of a cache, shard by shard; exit 4 when anything is wrong.

use super::scanned;
use crate::cli::{self, Manner};
use crate::exit::Outcome;
use crate::print::{self, Out, Side, Table};
use potstill_cache::{Manifest, VerifyReport};
use std::io::Write;

/// Most problems printed for people; `--json` has more.
const SHOWN: usize = 50;

/// Checks a cache.
pub fn run(flags: &cli::Verify, manner: Manner) -> anyhow::Result<Outcome> {
    let report = scanned("checking", manner, |scan| potstill_cache::verify(&flags.cache, scan))?;
    if manner.json {
        print::json(&report)?;
    } else {
        let mut out = print::out();
        // Where the manifest itself is damaged there are no shards to name; the report says so.
        if let Ok(manifest) = Manifest::load(&flags.cache) {
            shards(&manifest, &report).write(&mut out)?;
            writeln!(out)?;
        }
        write_verdict(&report, &mut out)?;
        out.flush()?;
    }
    Ok(if report.is_good() { Outcome::Done } else { Outcome::Corrupt })
}

fn shards(manifest: &Manifest, report: &VerifyReport) -> Table {
    let mut table = Table::with_heads(&[
        ("shard", Side::Left),
        ("rows", Side::Right),
        ("tokens", Side::Right),
        ("scored", Side::Right),
        ("size", Side::Right),
        ("state", Side::Left),
    ]);
    for shard in &manifest.shards {
        let wrong = report.problems.iter().filter(|problem| problem.file == shard.file).count();
        let state = if wrong == 0 { "good".into() } else { format!("{wrong} wrong") };
        table.row([
            shard.file.clone(),
            print::count(shard.rows),
            print::count(shard.tokens),
            print::count(shard.scored),
            print::bytes(shard.bytes),
            state,
        ]);
    }
    table
}

fn write_verdict(report: &VerifyReport, out: &mut Out) -> std::io::Result<()> {
    for problem in report.problems.iter().take(SHOWN) {
        let group = problem.row_group.map(|n| format!(", row group {n}")).unwrap_or_default();
        let row = problem.row.map(|n| format!(", row {n}")).unwrap_or_default();
        let sentence = format!("{}{group}{row}: expected {}, found {}", problem.file, problem.expected, problem.found);
        writeln!(out, "wrong: {}", crate::text::visible(&sentence))?;
    }
    let more = report.problem_count.saturating_sub(report.problems.len().min(SHOWN) as u64);
    if more > 0 {
        writeln!(out, "wrong: {} more", print::count(more))?;
    }
    for name in &report.unlisted {
        writeln!(out, "not listed, and ignored by readers: {}", crate::text::visible(name))?;
    }
    if report.repeated_rows > 0 {
        writeln!(out, "{} rows repeat an earlier conversation of the data", print::count(report.repeated_rows))?;
    }
    let whole = match (report.complete, report.is_good()) {
        (true, _) => "complete",
        (false, true) => "not complete yet: run the same precompute again",
        (false, false) if report.shards == 0 => "without a good manifest nothing is known of the rows",
        (false, false) => "not complete",
    };
    let verdict = if report.is_good() { "all good".into() } else { print::plural(report.problem_count, "problem") };
    let (good, rows) = (print::count(report.good_rows), print::count(report.rows));
    writeln!(
        out,
        "{verdict}: {good} of {rows} rows, {}, {}; {whole}",
        print::plural(report.shards, "shard"),
        print::bytes(report.bytes)
    )
}
