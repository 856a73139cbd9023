//! `potstill verify`: a cache shard by shard; exit 4 when anything is wrong, and on request a list of what to compute again.

use super::scanned;
use crate::cli::{self, Manner};
use crate::exit::{Outcome, UsageError};
use crate::print::{self, Out, Side, Table};
use crate::text;
use potstill_cache::{Manifest, ManifestState, Problem, RepairList, VerifyMode, VerifyReport};
use std::io::Write;
use std::path::Path;

/// Most lines about problems printed for people; `--json` has more.
const SHOWN: usize = 50;

/// Checks a cache.
pub fn run(flags: &cli::Verify, manner: Manner) -> anyhow::Result<Outcome> {
    let mode = match (flags.quick, flags.sample) {
        (true, _) => VerifyMode::Quick,
        (false, Some(share)) => VerifyMode::Sample { number: share.number, of: share.of },
        (false, None) => VerifyMode::Full,
    };
    if let Some(path) = &flags.repair_list {
        check_target(path, &flags.cache)?;
    }
    let report = scanned("checking", manner, |scan| potstill_cache::verify_as(&flags.cache, mode, scan))?;
    let list = RepairList::of(&report);
    if let Some(path) = &flags.repair_list {
        list.save(path)?;
    }
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
        if let Some(path) = &flags.repair_list {
            let manifest = Manifest::load(&flags.cache).ok();
            let derived_by = manifest.and_then(|m| m.description.derived.last().map(|step| step.verb.clone()));
            write_advice(&report, &list, &path.display().to_string(), derived_by, &mut out)?;
        }
        out.flush()?;
    }
    Ok(if report.is_good() { Outcome::Done } else { Outcome::Corrupt })
}

/// A list may replace an earlier list and nothing else, and has no place among a cache's files.
fn check_target(path: &Path, cache: &Path) -> Result<(), UsageError> {
    let shown = path.display();
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).canonicalize();
    if let (Ok(folder), Ok(cache)) = (folder, cache.canonicalize())
        && folder.starts_with(&cache)
    {
        return Err(UsageError(format!("--repair-list {shown}: lies in the cache; expected a file outside its folder")));
    }
    if path.exists() && RepairList::load(path).is_err() {
        return Err(UsageError(format!("--repair-list {shown}: is there already and is no repair list; give another name")));
    }
    Ok(())
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
    let damages = || report.damaged_shards.iter().chain(&report.damaged_parts);
    for shard in manifest.shards.iter().chain(&manifest.parts) {
        let state = match damages().find(|damage| damage.file == shard.file) {
            None => "good".to_string(),
            Some(damage) if damage.whole => "lost".into(),
            Some(damage) if damage.damaged.is_empty() => "damaged".into(),
            Some(damage) => format!("{} damaged", print::plural(damage.damaged.len() as u64, "row")),
        };
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

/// The problems of consecutive rows of one row group, as one.
fn runs(problems: &[Problem]) -> Vec<&[Problem]> {
    let follows = |a: &Problem, b: &Problem| {
        (&a.file, a.row_group) == (&b.file, b.row_group) && a.row.is_some() && a.row.map(|row| row + 1) == b.row
    };
    problems.chunk_by(follows).collect()
}

fn sentence(run: &[Problem]) -> String {
    let (Some(first), Some(last)) = (run.first(), run.last()) else { return String::new() };
    let group = first.row_group.map(|n| format!(", row group {n}")).unwrap_or_default();
    let rows = match (first.row, last.row) {
        (Some(a), Some(b)) if a != b => format!(", rows {a} to {b}"),
        (Some(a), _) => format!(", row {a}"),
        _ => String::new(),
    };
    let same = run.iter().all(|p| (&p.expected, &p.found) == (&first.expected, &first.found));
    let of_first = if same { "" } else { " (the first of them)" };
    format!("{}{group}{rows}: expected {}, found {}{of_first}", first.file, first.expected, first.found)
}

fn write_verdict(report: &VerifyReport, out: &mut Out) -> std::io::Result<()> {
    let runs = runs(&report.problems);
    for run in runs.iter().take(SHOWN) {
        writeln!(out, "wrong: {}", text::visible(&sentence(run)))?;
    }
    let shown: usize = runs.iter().take(SHOWN).map(|run| run.len()).sum();
    let more = report.problem_count.saturating_sub(shown as u64);
    if more > 0 {
        writeln!(out, "wrong: {} more", print::count(more))?;
    }
    for name in &report.unlisted {
        writeln!(out, "not listed, and ignored by readers: {}", text::visible(name))?;
    }
    if report.repeated_rows > 0 {
        writeln!(out, "{} rows repeat an earlier conversation of the data", print::count(report.repeated_rows))?;
    }
    let whole = match (report.complete, report.is_good()) {
        (true, _) => "complete",
        (false, true) => "not complete yet: run the same precompute again",
        (false, false) if report.manifest == ManifestState::Stale => "later shards are not looked at",
        (false, false) if report.manifest != ManifestState::Good => "without a good manifest nothing is known of the rows",
        (false, false) => "not complete",
    };
    let verdict = if report.is_good() { "all good".into() } else { print::plural(report.problem_count, "problem") };
    let rows = match report.mode {
        VerifyMode::Full => format!("{} of {} rows", print::count(report.good_rows), print::count(report.rows)),
        VerifyMode::Quick => format!("{} rows, none of them read (--quick)", print::count(report.rows)),
        VerifyMode::Sample { number, of } => {
            let (good, read, rows) =
                (print::count(report.good_rows), print::count(report.checked_rows), print::count(report.rows));
            format!("{good} of the {read} rows in sample {number}/{of} of {rows}")
        }
    };
    writeln!(out, "{verdict}: {rows}, {}, {}; {whole}", print::plural(report.shards, "shard"), print::bytes(report.bytes))
}

/// What to do with the list.
fn write_advice(
    report: &VerifyReport,
    list: &RepairList,
    path: &str,
    derived_by: Option<String>,
    out: &mut Out,
) -> std::io::Result<()> {
    let path = text::visible(path);
    if report.is_good() {
        return writeln!(out, "{path}: nothing to compute again");
    }
    let what = match list.manifest {
        ManifestState::Good => format!("{} of {} to compute again", print::plural(list.rows(), "row"), {
            print::plural((list.shards.len() + list.parts.len()) as u64, "file")
        }),
        _ => "the manifest to rebuild from the shards".into(),
    };
    writeln!(out, "{path}: {what}:")?;
    match derived_by {
        // Its rows came out of other caches; a teacher cannot give them.
        Some(verb) => writeln!(out, "{verb} made this cache: remove its folder and {verb} again"),
        None => writeln!(out, "the precompute command that made the cache does it with --repair {path}"),
    }
}
