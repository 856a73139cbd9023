//! `potstill diff`: how far two caches of the same conversations lie apart. Refuses caches that share no row, and says why they do not.

use super::scanned;
use crate::cli::{self, Manner};
use crate::exit::{Outcome, UsageError};
use crate::ink::{Ink, Line, Shade};
use crate::plot;
use crate::print::{self, Side, Table};
use potstill_cache::{Cache, Comparison, Description, Divergences, Spread};
use std::io::Write;

/// Compares the two.
pub fn run(flags: &cli::Diff, manner: Manner) -> anyhow::Result<Outcome> {
    let (first, second) = (Cache::open(&flags.first)?, Cache::open(&flags.second)?);
    comparable(&first, &second)?;
    let found = scanned("comparing", manner, |scan| Comparison::of(&first, &second, scan))?;
    if found.rows == 0 {
        return Err(nothing_shared(&first, &second).into());
    }
    if manner.json {
        print::json(&found)?;
        return Ok(Outcome::Done);
    }
    let mut out = print::out();
    Ink::of_stdout().write_all(&lines(&first, &second, &found), &mut out)?;
    out.flush()?;
    Ok(Outcome::Done)
}

/// Refuses caches whose ids mean different tokens, or that keep nothing exactly.
fn comparable(first: &Cache, second: &Cache) -> Result<(), UsageError> {
    let vocabulary = |cache: &Cache| cache.manifest().description.tokenizer.vocabulary_blake3.clone();
    let (a, b) = (vocabulary(first), vocabulary(second));
    if a != b {
        let (first, second) = (first.dir().display(), second.dir().display());
        return Err(UsageError(format!("their tokens are not the same: {first} has vocabulary {a}, {second} has {b}")));
    }
    for cache in [first, second] {
        if cache.manifest().description.selection.head() == 0 {
            let dir = cache.dir().display();
            return Err(UsageError(format!("{dir}: holds draws alone, of which no divergence is known without bias")));
        }
    }
    Ok(())
}

/// Why two caches hold no row with the same tokens and scored positions: the first thing that differs of what decides these.
fn nothing_shared(first: &Cache, second: &Cache) -> UsageError {
    let (a, b) = (&first.manifest().description, &second.manifest().description);
    let files = |what: &Description| what.data.files.iter().map(|file| file.blake3.clone()).collect::<Vec<_>>();
    let why = if first.is_empty() || second.is_empty() {
        "one of them holds no row".to_string()
    } else if a.template.blake3 != b.template.blake3 {
        format!("their chat templates differ ({} and {})", a.template.blake3, b.template.blake3)
    } else if files(a) != files(b) {
        "they were made from other data".to_string()
    } else if a.encoding != b.encoding {
        "their conversations were cut in other ways".to_string()
    } else if a.part != b.part {
        "they hold other parts of the same data".to_string()
    } else {
        "no row has the same tokens and scored positions".to_string()
    };
    UsageError(format!("{} and {} share no row: {why}", first.dir().display(), second.dir().display()))
}

fn lines(first: &Cache, second: &Cache, found: &Comparison) -> Vec<Line> {
    let mut table = Table::of_facts();
    for (name, cache) in [("first", first), ("second", second)] {
        let what = &cache.manifest().description;
        let teacher = format!("{}, {} in {}", what.teacher.name, what.teacher.weights, what.teacher.compute);
        table.fact(name, format!("{}: {}; {teacher}", cache.dir().display(), what.selection));
    }
    let [only_first, only_second] = [found.only_first, found.only_second].map(print::count);
    table.fact(
        "rows",
        format!("{} in both; {only_first} in the first alone, {only_second} in the second", print::count(found.rows)),
    );
    table.fact("positions", print::count(found.positions));
    let Some(d) = &found.figures else { return Line::of_table(&table) };
    table
        .fact("first choice", format!("the same at {}", print::percent(d.top1_agrees)))
        .fact("ids in both", format!("{:.1} on average", d.mean_shared_ids))
        .fact(
            "all else",
            format!("{} of the first, {} of the second", print::percent(d.mean_rest_first), print::percent(d.mean_rest_second)),
        );
    let mut lines = Line::of_table(&table);
    lines.extend([Line::default(), Line::of(Shade::Strong, "KL in nats, at least")]);
    lines.extend(Line::of_table(&divergences(d)));
    lines.push(Line::default());
    lines.extend(plot::histogram("KL(first, second)", &d.forward_log10_histogram.counts, ["1e-10", "", "1e2"]));
    if !d.most_different.is_empty() {
        lines.extend([Line::default(), Line::of(Shade::Strong, "Rows that differ most")]);
        lines.extend(Line::of_table(&rows(d)));
    }
    lines
}

/// A divergence in at most 8 columns.
fn nats(kl: f64) -> String {
    if kl == 0.0 {
        "0".into()
    } else if kl < 1e-3 {
        format!("{kl:.1e}")
    } else {
        format!("{kl:.4}")
    }
}

fn divergences(d: &Divergences) -> Table {
    let heads = ["", "mean", "median", "90%", "99%", "largest"];
    let mut table = Table::with_heads(&heads.map(|head| (head, if head.is_empty() { Side::Left } else { Side::Right })));
    let mut row = |name: &str, s: &Spread| {
        table.row([name.to_string(), nats(s.mean), nats(s.median), nats(s.p90), nats(s.p99), nats(s.largest)]);
    };
    row("KL(first, second)", &d.forward);
    row("KL(second, first)", &d.backward);
    table
}

fn rows(d: &Divergences) -> Table {
    let heads = ["row of first", "of second", "scored", "KL(first, second)", "KL(second, first)", "1st same"];
    let mut table = Table::with_heads(&heads.map(|head| (head, Side::Right)));
    for pair in &d.most_different {
        table.row([
            pair.first.to_string(),
            pair.second.to_string(),
            print::count(pair.scored),
            nats(pair.mean_forward),
            nats(pair.mean_backward),
            print::percent(pair.top1_agrees),
        ]);
    }
    table
}
