//! What a cache is and how it looks, on one screen of 80 columns. Every number of it is in the JSON, too.

use super::vocabulary::Vocabulary;
use crate::ink::{Line, Shade};
use crate::plot::{self, PANEL};
use crate::print::{self, COLUMNS, Side, Table};
use crate::text;
use potstill_cache::{
    Cache, Cutoff, Description, Distributions, IdEncoding, Kept, Record, RowFigures, Selection, Summary, Values,
};
use serde::Serialize;

/// Hexadecimal digits of a digest that people are shown.
const DIGEST_SHOWN: usize = 12;
/// Rows that are shown as the most surprising; the JSON has all that are ranked.
const SURPRISING_SHOWN: usize = 5;
/// Most scored tokens whose text is shown of such a row.
const OPENING_TOKENS: usize = 64;

/// What a cache is and how it looks, for machines.
#[derive(Serialize)]
pub struct Whole<'a> {
    format_version: u32,
    description: &'a Description,
    /// KL of the stored distributions from the teacher's, in nats, as measured while writing; absent in format version 1.
    codec_kl: Option<CodecKl>,
    summary: &'a Summary,
}

/// What storing cost.
#[derive(Serialize)]
struct CodecKl {
    /// Mean over scored positions.
    mean: f64,
    /// Largest of one position.
    largest: f64,
}

impl<'a> Whole<'a> {
    /// All that is known of `cache`, whose figures are `summary`.
    pub fn of(cache: &'a Cache, summary: &'a Summary) -> Self {
        let manifest = cache.manifest();
        Self {
            format_version: manifest.format_version,
            description: &manifest.description,
            codec_kl: manifest.codec_kl().map(|(mean, largest)| CodecKl { mean, largest }),
            summary,
        }
    }
}

/// The one screen.
pub fn lines(cache: &Cache, summary: &Summary) -> anyhow::Result<Vec<Line>> {
    let mut table = Table::of_facts();
    facts(cache, summary).iter().for_each(|(name, value)| {
        table.fact(name, value);
    });
    let mut lines = Line::of_table(&table);
    if let Some(distributions) = &summary.distributions {
        lines.push(Line::default());
        lines.extend(plots(distributions));
        if let Some(kept) = distributions.kept.as_ref().filter(|kept| !kept.most_surprising.is_empty()) {
            lines.push(Line::default());
            lines.extend(surprising(cache, kept, &Vocabulary::of(cache)?)?);
        }
    }
    lines.extend([Line::default(), Line::of(Shade::Strong, "Size by column")]);
    lines.extend(Line::of_table(&columns(summary)));
    Ok(lines)
}

/// Names and values of all that is said in words.
pub fn facts(cache: &Cache, summary: &Summary) -> Vec<(&'static str, String)> {
    let mut facts = identity(cache);
    facts.extend(size(summary));
    if let Some(distributions) = &summary.distributions {
        facts.extend(figures(distributions));
    }
    facts
}

fn identity(cache: &Cache) -> Vec<(&'static str, String)> {
    let what = &cache.manifest().description;
    let short = |digest: &str| digest.chars().take(DIGEST_SHOWN).collect::<String>();
    let files = what.data.files.len();
    let first = what.data.files.first().map_or("no file", |file| file.name.as_str());
    let skipped: u64 = what.data.skipped.values().sum();
    let teacher = &what.teacher;
    let mut facts = vec![
        ("cache", cache.dir().display().to_string()),
        ("teacher", format!("{}, {} in {}, {}", teacher.name, teacher.weights, teacher.compute, short(&teacher.weights_blake3))),
        ("tokenizer", format!("{} ids, {}", print::count(what.tokenizer.size.into()), short(&what.tokenizer.blake3))),
        ("template", format!("{}, {}", what.template.source, short(&what.template.blake3))),
        (
            "data",
            if files > 1 { format!("{first} and {} more", print::plural(files as u64 - 1, "file")) } else { first.to_string() },
        ),
        ("conversations", format!("{} read, {} skipped", print::count(what.data.rows), print::count(skipped))),
        (
            "longest",
            format!("{} tokens; longer ones cut by {}", print::count(what.encoding.max_length.into()), what.encoding.truncation),
        ),
        ("kept", kept_in_words(&what.selection)),
        ("stored as", stored_as(what)),
    ];
    if let Some(part) = what.part {
        facts.push(("part", format!("{} of {} of these conversations", part.number, part.of)));
    }
    if !what.lse_temperatures.is_empty() {
        let all: Vec<String> = what.lse_temperatures.iter().map(ToString::to_string).collect();
        facts.push(("tail known", format!("also at temperature {}", all.join(", "))));
    }
    match cache.manifest().codec_kl() {
        // Counts are exact; what drawing costs is variance and no divergence of the stored from the given.
        Some((mean, largest)) if what.selection.head() > 0 => {
            let cost =
                if largest == 0.0 { "none".into() } else { format!("KL {mean:.1e} nats on average, {largest:.1e} at most") };
            facts.push(("rounding", cost));
        }
        _ => {}
    }
    facts
}

fn kept_in_words(selection: &Selection) -> String {
    match *selection {
        Selection::TopK { k } => format!("the {k} most likely tokens and the rest as one (the tail)"),
        Selection::Cutoff { k, rule: Cutoff::MinProb(p) } => format!("tokens of at least {p:e}, {k} at most, and the tail"),
        Selection::Cutoff { k, rule: Cutoff::MinMass(mass) } => {
            format!("the fewest tokens that make up {mass}, {k} at most, and the tail")
        }
        Selection::Sampled { draws, .. } => format!("{draws} draws from the distribution, as counts"),
        Selection::Hybrid { k, draws, .. } => format!("the {k} most likely tokens, the tail, and {draws} draws from it"),
    }
}

fn stored_as(what: &Description) -> String {
    let values = match (what.selection.head(), what.values) {
        (0, _) => "ids and counts".to_string(),
        (_, Values::LogitBf16) => "bf16 logits and their log-sum-exp".to_string(),
        _ => format!("log-probabilities, {} mantissa bits", what.mantissa_bits),
    };
    let plain = if what.id_encoding == IdEncoding::Plain { ", plain ids" } else { "" };
    format!("{values}, zstd level {}{plain}", what.zstd_level)
}

fn size(summary: &Summary) -> Vec<(&'static str, String)> {
    let state = if summary.complete { "complete" } else { "not complete: run the same precompute again" };
    let each = summary.bytes_per_scored.map_or_else(|| "-".into(), |bytes| format!("{bytes:.1} B"));
    let ratio = summary.raw_ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.2} : 1"));
    let mut facts =
        vec![("rows", format!("{} in {}; {state}", print::count(summary.rows), print::plural(summary.shards, "shard")))];
    if summary.left_out > 0 {
        facts.push(("left out", format!("{} of them: the teacher's logits are not finite", print::count(summary.left_out))));
    }
    facts.push(("tokens", format!("{}, {} scored", print::count(summary.tokens), print::count(summary.scored))));
    facts.push(("size", format!("{}, {each} a scored position", print::bytes(summary.bytes))));
    facts.push(("compression", format!("{ratio} against plain arrays of ids and 16-bit values")));
    facts
}

fn figures(d: &Distributions) -> Vec<(&'static str, String)> {
    let mut facts = Vec::new();
    let tail = print::percent(d.mean_tail_mass);
    if let Some(kept) = &d.kept {
        let where_kept = kept.perplexity_where_kept.map_or_else(|| "-".into(), |p| format!("{p:.3}"));
        let (top1, median) = (print::percent(kept.mean_top1), print::percent(kept.median_top1));
        facts.push(("most likely token", format!("{top1} on average, median {median}")));
        facts.push(("kept mass", format!("{} on average, tail {tail}", print::percent(kept.mean_kept_mass))));
        facts.push(("entropy", format!("{:.3} nats on average, at least", kept.mean_entropy)));
        let (first, among) = (print::percent(kept.top1_is_next), print::percent(kept.next_is_kept));
        facts.push(("the data's token", format!("most likely at {first}, kept at {among}")));
        facts.push((
            "perplexity",
            format!("{:.3} at least; {where_kept} where the data's token was kept", kept.perplexity_at_least),
        ));
    }
    if let Some(drawn) = &d.drawn {
        let outside = if d.kept.is_none() { format!(", {tail} lies outside them") } else { String::new() };
        let (often, chance) = (print::percent(drawn.next_is_drawn), print::percent(drawn.mean_next_probability));
        facts.push(("drawn", format!("{:.1} different tokens on average{outside}", drawn.mean_ids)));
        facts.push(("the data's token", format!("drawn at {often}; its probability, estimated: {chance} on average")));
    }
    facts
}

/// The panels, two beside each other.
fn plots(d: &Distributions) -> Vec<Line> {
    let tail = plot::histogram("Probability of the tail", &d.tail_log10_histogram.counts, ["1e-9", "", "1"]);
    let Some(kept) = &d.kept else { return tail };
    let (entropies, most) = entropies(kept);
    let entropy = plot::histogram("Entropy, nats", entropies, ["0", "", &format!("{most:.0}")]);
    let top1 = plot::histogram("Probability of the most likely token", &kept.top1_histogram.counts, ["0", "50%", "100%"]);
    let mut lines = plot::beside(entropy, top1);
    lines.push(Line::default());
    lines.extend(plot::beside(tail, by_k(kept)));
    lines.push(Line::default());
    lines.extend(plot::beside(ranks(kept), calibration(kept)));
    lines
}

/// The bins of the entropy up to the last that is not empty, and its upper edge.
pub fn entropies(kept: &Kept) -> (&[u64], f64) {
    let histogram = &kept.entropy_histogram;
    let width = (histogram.to - histogram.from) / histogram.counts.len().max(1) as f64;
    // Whole nats, so that the edge is a short number.
    let last = histogram.counts.iter().rposition(|&count| count > 0).map_or(1, |last| last + 1);
    let nats = (last as f64 * width).ceil().max(1.0);
    let bins = ((nats / width) as usize).min(histogram.counts.len());
    (histogram.counts.get(..bins).unwrap_or_default(), nats)
}

fn by_k(kept: &Kept) -> Vec<Line> {
    let mut lines = vec![
        Line::of(Shade::Strong, "What a smaller k would keep"),
        Line::of(Shade::Faint, format!("{:>4} {:>7} {:>7} {:>7} {:>8}", "k", "mass", "99% at", "data's", "entropy")),
    ];
    for at in &kept.by_k {
        let [mass, nearly_all, next] = [at.mean_mass, at.nearly_all, at.next_is_kept].map(print::percent);
        lines.push(Line::of(Shade::Plain, format!("{:>4} {mass:>7} {nearly_all:>7} {next:>7} {:>8.2}", at.k, at.mean_entropy)));
    }
    lines
}

fn ranks(kept: &Kept) -> Vec<Line> {
    let placed: u64 = kept.next_rank.iter().map(|bin| bin.positions).sum();
    let all: u64 = kept.top1_histogram.counts.iter().sum();
    let name = |from: u64, to: u64| if from == to { from.to_string() } else { format!("{from}-{to}") };
    let rows = kept.next_rank.iter().map(|bin| (name(bin.from, bin.to), bin.positions));
    let rows = rows.chain([("not kept".to_string(), all.saturating_sub(placed))]);
    let mut lines = vec![Line::of(Shade::Strong, "Place of the data's token among the kept")];
    lines.extend(rows.map(|(name, positions)| {
        let share = positions as f64 / all.max(1) as f64;
        Line::of(Shade::Plain, format!("{name:>11} {:>7}  ", print::percent(share))).then(Shade::Bar, plot::bar(share, 17))
    }));
    lines
}

fn calibration(kept: &Kept) -> Vec<Line> {
    let error = print::percent(kept.calibration_error);
    let mut lines = vec![
        Line::of(Shade::Strong, format!("Calibration (error {error})")),
        Line::of(Shade::Faint, format!("{:>7} {:>7}  ┃ said, █ came", "said", "came")),
    ];
    for bin in &kept.calibration {
        let (Some(said), Some(came)) = (bin.mean_top1, bin.top1_is_next) else { continue };
        let bar = plot::bar_with_mark(came, said, PANEL - 17);
        let numbers = format!("{:>7} {:>7}  ", print::percent(said), print::percent(came));
        lines.push(Line::of(Shade::Plain, numbers).then(Shade::Bar, bar));
    }
    lines
}

/// The rows that surprised the teacher most, with the opening of what was scored in them.
fn surprising(cache: &Cache, kept: &Kept, vocabulary: &Vocabulary) -> anyhow::Result<Vec<Line>> {
    let head = format!("{:>8} {:>7} {:>11} {:>8}  {}", "row", "scored", "perplexity", "1st came", "what was scored begins");
    let mut lines = vec![Line::of(Shade::Strong, "Most surprising conversations"), Line::of(Shade::Faint, head)];
    for row in kept.most_surprising.iter().take(SURPRISING_SHOWN) {
        lines.push(surprising_line(row, &opening(&cache.row(row.row)?, vocabulary)));
    }
    Ok(lines)
}

fn surprising_line(row: &RowFigures, begins: &str) -> Line {
    let (scored, came) = (print::count(row.scored), print::percent(row.top1_is_next));
    let numbers = format!("{:>8} {scored:>7} {:>11} {came:>8}  ", row.row, perplexity(row.perplexity_at_least));
    let room = COLUMNS.saturating_sub(text::width(&numbers));
    Line::of(Shade::Plain, numbers).then(Shade::Plain, text::fit(begins, room))
}

/// A perplexity in at most 9 columns.
pub fn perplexity(p: f64) -> String {
    if p < 1e6 { format!("{p:.2}") } else { format!("{p:.1e}") }
}

/// The first scored tokens of a row as harmless text of one line; dots stand for what was not scored between.
fn opening(record: &Record, vocabulary: &Vocabulary) -> String {
    let mut bytes = Vec::new();
    let mut expected = record.positions.first().copied();
    for (&position, (next, _)) in record.positions.iter().zip(record.scored()).take(OPENING_TOKENS) {
        if expected != Some(position) {
            bytes.extend(" … ".bytes());
        }
        bytes.extend(vocabulary.bytes(next));
        expected = position.checked_add(1);
    }
    let text = String::from_utf8_lossy(&bytes);
    text::visible(&text.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn columns(summary: &Summary) -> Table {
    let heads = [
        ("column", Side::Left),
        ("in the files", Side::Right),
        ("share", Side::Right),
        ("", Side::Left),
        ("before zstd", Side::Right),
        ("ratio", Side::Right),
    ];
    let mut table = Table::with_heads(&heads);
    let share = |bytes: u64| if summary.bytes == 0 { 0.0 } else { bytes as f64 / summary.bytes as f64 };
    let ratio = |before: u64, after: u64| if after == 0 { "-".into() } else { format!("{:.2}", before as f64 / after as f64) };
    for c in &summary.columns {
        let share = share(c.compressed);
        table.row([
            c.name.clone(),
            print::bytes(c.compressed),
            print::percent(share),
            plot::bar(share, 16),
            print::bytes(c.uncompressed),
            ratio(c.uncompressed, c.compressed),
        ]);
    }
    let (bytes, share) = (summary.other_bytes, share(summary.other_bytes));
    table.row([
        "(footers)".into(),
        print::bytes(bytes),
        print::percent(share),
        plot::bar(share, 16),
        String::new(),
        String::new(),
    ]);
    table
}
