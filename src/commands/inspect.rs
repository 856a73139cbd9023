//! `potstill inspect`: what a cache is and how it looks on one screen, or one conversation token by token.
//!
//! The tokenizer needed to show tokens lies in the cache itself, so a cache can be read without any model.

use super::conversation::Conversation;
use super::scanned;
use crate::cli::{self, Manner};
use crate::exit::{Outcome, UsageError};
use crate::print::{self, Side, Table};
use anyhow::Context;
use potstill_cache::{Cache, Cutoff, Description, Distributions, IdEncoding, RowKey, Selection, Summary, Values};
use potstill_pipeline::data::ChatTokenizer;
use serde::Serialize;
use std::io::Write;

/// Where a cache keeps the tokenizer that made its ids.
const TOKENIZER: &str = "tokenizer/tokenizer.json";
/// Hexadecimal digits of a digest that people are shown.
const DIGEST_SHOWN: usize = 12;

/// What a cache is and how it looks, for machines.
#[derive(Serialize)]
struct Whole<'a> {
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

/// Shows a cache, or one of its rows.
pub fn run(flags: &cli::Inspect, manner: Manner) -> anyhow::Result<Outcome> {
    let cache = Cache::open(&flags.cache)?;
    match wanted_row(&cache, flags)? {
        Some(row) => {
            let conversation = Conversation::of(row, &cache.row(row)?, vocabulary(&cache)?);
            if manner.json {
                print::json(&conversation)?;
            } else {
                let mut out = print::out();
                conversation.write(flags.top, &mut out)?;
                out.flush()?;
            }
        }
        None => {
            let summary = scanned("reading", manner, |scan| Summary::of(&cache, scan))?;
            if manner.json {
                let manifest = cache.manifest();
                print::json(&Whole {
                    format_version: manifest.format_version,
                    description: &manifest.description,
                    codec_kl: manifest.codec_kl().map(|(mean, largest)| CodecKl { mean, largest }),
                    summary: &summary,
                })?;
            } else {
                let mut out = print::out();
                write_summary(&cache, &summary, &mut out)?;
                out.flush()?;
            }
        }
    }
    Ok(Outcome::Done)
}

fn wanted_row(cache: &Cache, flags: &cli::Inspect) -> anyhow::Result<Option<u64>> {
    let Some(key) = &flags.key else { return Ok(flags.row) };
    let key: RowKey = key.parse()?;
    match cache.find(&key)? {
        Some(row) => Ok(Some(row)),
        None => Err(UsageError(format!("{}: no row has the key {key}", flags.cache.display())).into()),
    }
}

/// What turns an id into its token's text, read from the cache.
pub fn vocabulary(cache: &Cache) -> anyhow::Result<impl Fn(u32) -> String> {
    // The tokenizer is read from a copy: its bytes were checked against the manifest, and the file may not be touched.
    let folder = tempfile::tempdir().context("making a temporary folder for the tokenizer")?;
    let copy = folder.path().join("tokenizer.json");
    std::fs::write(&copy, cache.companion(TOKENIZER)?).with_context(|| format!("{}: cannot write", copy.display()))?;
    let tokenizer = ChatTokenizer::tokenizer_only(folder.path()).map_err(potstill_pipeline::Error::from)?;
    Ok(move |id| tokenizer.token_text(id))
}

/// The one screen.
pub fn write_summary(cache: &Cache, summary: &Summary, out: &mut impl Write) -> std::io::Result<()> {
    let mut table = identity(cache);
    size(&mut table, summary);
    if let Some(distributions) = &summary.distributions {
        figures(&mut table, distributions);
    }
    table.write(out)?;
    writeln!(out)?;
    columns(summary).write(out)
}

fn identity(cache: &Cache) -> Table {
    let what = &cache.manifest().description;
    let short = |digest: &str| digest.chars().take(DIGEST_SHOWN).collect::<String>();
    let files = what.data.files.len();
    let first = what.data.files.first().map_or("no file", |file| file.name.as_str());
    let skipped: u64 = what.data.skipped.values().sum();
    let kept = match what.selection {
        Selection::TopK { k } => format!("the {k} most likely tokens and the rest as one (the tail)"),
        Selection::Cutoff { k, rule: Cutoff::MinProb(p) } => format!("tokens of at least {p:e}, {k} at most, and the tail"),
        Selection::Cutoff { k, rule: Cutoff::MinMass(mass) } => {
            format!("the fewest tokens that make up {mass}, {k} at most, and the tail")
        }
        Selection::Sampled { draws, .. } => format!("{draws} draws from the distribution, as counts"),
        Selection::Hybrid { k, draws, .. } => format!("the {k} most likely tokens, the tail, and {draws} draws from it"),
    };
    let mut table = Table::of_facts();
    table
        .fact("cache", cache.dir().display())
        .fact(
            "teacher",
            format!(
                "{}, {} in {}, {}",
                what.teacher.name,
                what.teacher.weights,
                what.teacher.compute,
                short(&what.teacher.weights_blake3)
            ),
        )
        .fact("tokenizer", format!("{} ids, {}", print::count(what.tokenizer.size.into()), short(&what.tokenizer.blake3)))
        .fact("template", format!("{}, {}", what.template.source, short(&what.template.blake3)))
        .fact(
            "data",
            if files > 1 { format!("{first} and {} more", print::plural(files as u64 - 1, "file")) } else { first.to_string() },
        )
        .fact("conversations", format!("{} read, {} skipped", print::count(what.data.rows), print::count(skipped)))
        .fact(
            "longest",
            format!("{} tokens; longer ones cut by {}", print::count(what.encoding.max_length.into()), what.encoding.truncation),
        )
        .fact("kept", kept)
        .fact("stored as", stored_as(what));
    if let Some(part) = what.part {
        table.fact("part", format!("{} of {} of these conversations", part.number, part.of));
    }
    if !what.lse_temperatures.is_empty() {
        let all: Vec<String> = what.lse_temperatures.iter().map(ToString::to_string).collect();
        table.fact("tail known", format!("also at temperature {}", all.join(", ")));
    }
    match cache.manifest().codec_kl() {
        // Counts are exact; what drawing costs is variance and no divergence of the stored from the given.
        Some((mean, largest)) if what.selection.head() > 0 => {
            let cost =
                if largest == 0.0 { "none".into() } else { format!("KL {mean:.1e} nats on average, {largest:.1e} at most") };
            table.fact("rounding", cost);
        }
        _ => {}
    }
    table
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

fn size(table: &mut Table, summary: &Summary) {
    let state = if summary.complete { "complete" } else { "not complete: run the same precompute again" };
    let each = summary.bytes_per_scored.map_or_else(|| "-".into(), |bytes| format!("{bytes:.1} B"));
    let ratio = summary.raw_ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.2} : 1"));
    table.fact("rows", format!("{} in {}; {state}", print::count(summary.rows), print::plural(summary.shards, "shard")));
    if summary.left_out > 0 {
        table.fact("left out", format!("{} of them: the teacher's logits are not finite", print::count(summary.left_out)));
    }
    table
        .fact("tokens", format!("{}, {} scored", print::count(summary.tokens), print::count(summary.scored)))
        .fact("size", format!("{}, {each} a scored position", print::bytes(summary.bytes)))
        .fact("compression", format!("{ratio} against plain arrays of ids and 16-bit values"));
}

fn figures(table: &mut Table, d: &Distributions) {
    let tail = print::percent(d.mean_tail_mass);
    if let Some(kept) = &d.kept {
        let perplexity = kept.perplexity_where_kept.map_or_else(|| "-".into(), |p| format!("{p:.3}"));
        let (top1, median) = (print::percent(kept.mean_top1), print::percent(kept.median_top1));
        table
            .fact("most likely token", format!("{top1} on average, median {median}"))
            .fact("kept mass", format!("{} on average, tail {tail}", print::percent(kept.mean_kept_mass)))
            .fact("entropy", format!("{:.3} nats on average, at least", kept.mean_entropy))
            .fact(
                "the data's token",
                format!("most likely at {}, kept at {}", print::percent(kept.top1_is_next), print::percent(kept.next_is_kept)),
            )
            .fact("perplexity", format!("{perplexity} where the data's token was kept"));
    }
    if let Some(drawn) = &d.drawn {
        let outside = if d.kept.is_none() { format!(", {tail} lies outside them") } else { String::new() };
        table.fact("drawn", format!("{:.1} different tokens on average{outside}", drawn.mean_ids)).fact(
            "the data's token",
            format!(
                "drawn at {}; its probability, estimated: {} on average",
                print::percent(drawn.next_is_drawn),
                print::percent(drawn.mean_next_probability)
            ),
        );
    }
}

fn columns(summary: &Summary) -> Table {
    let heads = [("column", Side::Left), ("in the files", Side::Right), ("before zstd", Side::Right), ("ratio", Side::Right)];
    let mut table = Table::with_heads(&heads);
    let ratio = |before: u64, after: u64| if after == 0 { "-".into() } else { format!("{:.2}", before as f64 / after as f64) };
    for c in &summary.columns {
        table.row([
            c.name.clone(),
            print::bytes(c.compressed),
            print::bytes(c.uncompressed),
            ratio(c.uncompressed, c.compressed),
        ]);
    }
    table.row(["(footers)".into(), print::bytes(summary.other_bytes), String::new(), String::new()]);
    table
}
