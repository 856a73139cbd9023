//! `potstill repack`: a cache stored anew, without the teacher; and what all rewritings say of themselves.

use super::scanned;
use crate::cli::{self, Manner};
use crate::exit::Outcome;
use crate::print::{self, Table};
use potstill_cache::{IdEncoding, Knobs, Reshape, Rewritten, Stored, Values};
use std::io::Write;
use std::path::Path;

/// Rewrites a cache.
pub fn run(flags: &cli::Repack, manner: Manner) -> anyhow::Result<Outcome> {
    let reshape = flags.storing.reshape();
    let report = scanned("rewriting", manner, |scan| potstill_cache::repack(&flags.source, &flags.out, &reshape, scan))?;
    conclude(&report, &flags.out, manner)
}

/// Prints what a rewriting did.
pub fn conclude(report: &Rewritten, folder: &Path, manner: Manner) -> anyhow::Result<Outcome> {
    if manner.json {
        print::json(report)?;
        return Ok(Outcome::Done);
    }
    let mut out = print::out();
    facts(report).fact("cache", folder.display()).write(&mut out)?;
    if !report.complete {
        let missing = report.expected_rows.saturating_sub(report.rows);
        writeln!(out, "not complete yet, {} missing:", print::plural(missing, "row"))?;
        writeln!(out, "the precompute command of a single run continues it")?;
    }
    out.flush()?;
    Ok(Outcome::Done)
}

fn facts(report: &Rewritten) -> Table {
    let mut table = Table::of_facts();
    let resumed = match report.resumed_rows {
        0 => String::new(),
        n => format!(" ({} were there before)", print::count(n)),
    };
    table.fact("conversations", format!("{}{resumed}", print::count(report.rows)));
    if report.shared_rows > 0 {
        table.fact("kept once", format!("{} that several caches hold alike", print::plural(report.shared_rows, "row")));
    }
    if report.duplicates > 0 {
        let text = format!("{} of earlier data", print::plural(report.duplicates, "conversation"));
        table.fact("left out", format!("{text}, counted as skipped"));
    }
    if report.piece_rows > 0 {
        let text = print::plural(report.piece_rows, "row");
        table.fact("not read", format!("{text} in pieces of unfinished shards"));
    }
    let (before, after) = (&report.before, &report.after);
    let change = |of: &dyn Fn(&Stored) -> String| match (of(before), of(after)) {
        (a, b) if a == b => b,
        (a, b) => format!("{a} -> {b}"),
    };
    let percent = 100.0 * report.bytes as f64 / (report.bytes_before as f64).max(1.0);
    let each = if report.scored == 0 { "-".into() } else { format!("{:.1} B", report.bytes as f64 / report.scored as f64) };
    table
        .fact("selection", change(&|s| s.selection.clone()))
        .fact("values", change(&values))
        .fact("pages", change(&pages))
        .fact("rows in a shard", change(&|s| print::count(s.rows_per_shard.into())))
        .fact("size", format!("{} -> {} ({percent:.0}%)", print::bytes(report.bytes_before), print::bytes(report.bytes)))
        .fact("a position", format!("{each} of {}", print::plural(report.scored, "scored position")));
    let kl = report.codec_kl.map(|(mean, most)| format!("{mean:.1e} nats on average, {most:.1e} at most"));
    table.fact("lost in rounding", kl.unwrap_or_else(|| "not measured by every step (format version 1)".into()));
    table
}

fn values(stored: &Stored) -> String {
    match stored.values {
        Values::LogitBf16 => "bf16 logits".into(),
        Values::Logprob => format!("{} mantissa bits", stored.mantissa_bits),
    }
}

fn pages(stored: &Stored) -> String {
    let ids = if stored.id_encoding == IdEncoding::Plain { ", ids for all readers" } else { "" };
    format!("zstd {}{ids}", stored.zstd_level)
}

impl cli::Storing {
    /// The flags as the cache takes them.
    pub fn reshape(&self) -> Reshape {
        let knobs = Knobs {
            selection: self.selection,
            top_k: self.top_k,
            min_prob: self.min_prob,
            min_mass: self.min_mass,
            draws: None,
            sample_seed: None,
            values: self.values,
            mantissa_bits: self.mantissa_bits,
            zstd_level: self.zstd_level,
            id_encoding: self.compat.then_some(IdEncoding::Plain),
        };
        Reshape { preset: self.preset, knobs, rows_per_shard: self.rows_per_shard }
    }
}
