//! `potstill demo`: everything once, on tiny models made on the spot.
//!
//! Owns the folder it works in: `demo.json` in it says that a demo made it, and whether it came to its end. What an interrupted demo
//! left is made anew; a finished demo and any other content are refused, so that nothing of worth is ever deleted.

use super::inspect::{Conversation, Vocabulary, summary_lines};
use super::{drawn, interruptible, merge, precompute, scanned, train};
use crate::cli::{self, Manner};
use crate::config;
use crate::exit::{Outcome, UsageError};
use crate::ink::Ink;
use crate::print::{self, Out, Table};
use crate::settings;
use anyhow::Context;
use potstill_cache::{Cache, Summary};
use potstill_pipeline::adapter::{self, MergeConfig, MergeReport};
use potstill_pipeline::miniature::{self, Miniature, MiniatureConfig};
use potstill_pipeline::precompute::{PrecomputeConfig, PrecomputeReport};
use potstill_pipeline::run::RunContext;
use potstill_pipeline::train::{Resume, TrainConfig, TrainReport};
use serde::Serialize;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Says that a demo made the folder.
const MARKER: &str = "demo.json";
/// Where a demo works when no folder is named.
const DEFAULT_FOLDER: &str = "potstill-demo";
/// What a demo makes beside the marker.
const PARTS: [&str; 4] = ["miniature", "cache", "run", "merged"];
/// Entries kept at a position: the tiny vocabulary needs no more.
const TOP_K: u16 = 16;
/// Settings of the student's training.
const RECIPE: &str = include_str!("../../pipeline/recipes/tiny.toml");
/// Positions of a conversation that are shown.
const SHOWN: usize = 12;

/// What the demo made.
#[derive(Debug, Serialize)]
struct Made {
    chats: PathBuf,
    teacher: PathBuf,
    student: PathBuf,
    cache: PathBuf,
    run: PathBuf,
    merged: PathBuf,
    precompute: PrecomputeReport,
    train: TrainReport,
}

/// Runs the demo.
pub fn run(flags: &cli::Demo, manner: Manner) -> anyhow::Result<Outcome> {
    let folder = &flags.out.clone().unwrap_or_else(|| free_folder(DEFAULT_FOLDER));
    prepare(folder, &PARTS)?;
    let context = interruptible()?;
    let say = |step: &str| manner.remark(&format!("\n── {step}"));

    say("1/5  making a tokenizer, a teacher and a student");
    let tiny =
        drawn(&context, manner, || Ok(miniature::build(&folder.join("miniature"), &MiniatureConfig::default(), &context)?))?;
    show(manner, |out| models(&tiny).write(out))?;

    say("2/5  stage one: the teacher scores the chats, its distributions go to disk");
    let cache = folder.join("cache");
    let filled = drawn(&context, manner, || Ok(potstill_pipeline::precompute::run(&stage_one(&tiny, &cache), &context)?))?;
    show(manner, |out| precompute::facts(&filled).write(out))?;

    say("3/5  checking every byte of the cache, then looking into it");
    let checked = scanned("checking", manner, |scan| potstill_cache::verify(&cache, scan))?;
    anyhow::ensure!(checked.is_good(), "the cache just written does not verify: run potstill verify {}", cache.display());
    show(manner, |out| writeln!(out, "all good: every byte of {} rows", print::count(checked.rows)))?;
    look_into(&cache, manner)?;

    say("4/5  stage two: the student learns the teacher's distributions through LoRA");
    let config = stage_two(&tiny, &cache, &folder.join("run"))?;
    let trained = drawn(&context, manner, || Ok(potstill_pipeline::train::run(&config, &context)?))?;
    show(manner, |out| train::facts(&trained, config.lr).write(out))?;

    say("5/5  merging the adapter into the student");
    let merged = drawn(&context, manner, || merge_adapter(&tiny, &trained, &folder.join("merged"), &context))?;
    show(manner, |out| merge::facts(&merged).write(out))?;

    mark(folder, &PARTS, true)?;

    let made = Made {
        chats: tiny.chats,
        teacher: tiny.teacher,
        student: tiny.student,
        cache,
        run: folder.join("run"),
        merged: folder.join("merged"),
        precompute: filled,
        train: trained,
    };
    if manner.json {
        print::json(&made)?
    } else {
        conclude(&made)?
    }
    Ok(Outcome::Done)
}

/// The first of NAME, NAME-2, … that is not there, or holds a demo that did not come to its end.
pub(super) fn free_folder(name: &str) -> PathBuf {
    let names = (1u32..).map(|n| if n == 1 { name.into() } else { format!("{name}-{n}") });
    let free = |path: &PathBuf| !path.exists() || path.join(MARKER).is_file() && !is_finished(&path.join(MARKER));
    names.map(PathBuf::from).find(free).unwrap_or_else(|| name.into())
}

/// Whether the marker says that its demo came to its end.
fn is_finished(marker: &Path) -> bool {
    std::fs::read_to_string(marker)
        .is_ok_and(|text| serde_json::from_str::<serde_json::Value>(&text).is_ok_and(|marker| marker["finished"] == true))
}

/// Writes the marker.
pub(super) fn mark(folder: &Path, parts: &[&str], finished: bool) -> anyhow::Result<()> {
    let marker = folder.join(MARKER);
    let version = env!("CARGO_PKG_VERSION");
    let text = serde_json::json!({ "made_by": "potstill demo", "version": version, "parts": parts, "finished": finished });
    std::fs::write(&marker, format!("{text}\n")).with_context(|| format!("{}: cannot write", marker.display()))
}

/// Makes the folder fit to work in: new, empty, or an interrupted demo's, whose parts are removed.
pub(super) fn prepare(folder: &Path, parts: &[&str]) -> anyhow::Result<()> {
    let shown = folder.display();
    let marker = folder.join(MARKER);
    let empty = match std::fs::read_dir(folder) {
        Ok(mut entries) => entries.next().is_none(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => true,
        Err(e) => return Err(UsageError(format!("{shown}: {e}")).into()),
    };
    if !empty && !marker.is_file() {
        return Err(UsageError(format!("{shown}: holds something that no demo made; name a new folder with --out")).into());
    }
    if is_finished(&marker) {
        return Err(UsageError(format!("{shown}: holds a finished demo; name a new folder with --out")).into());
    }
    for part in parts.iter().map(|part| folder.join(part)) {
        // A link is not followed: what it points at is none of the demo's.
        match std::fs::symlink_metadata(&part) {
            Ok(found) if found.is_dir() => std::fs::remove_dir_all(&part),
            Ok(_) => std::fs::remove_file(&part),
            Err(_) => Ok(()),
        }
        .with_context(|| format!("{}: cannot remove what an earlier demo made", part.display()))?;
    }
    std::fs::create_dir_all(folder).with_context(|| format!("{shown}: cannot make this folder"))?;
    mark(folder, parts, false)
}

fn stage_one(tiny: &Miniature, cache: &Path) -> PrecomputeConfig {
    PrecomputeConfig {
        teacher: tiny.teacher.clone(),
        data: vec![tiny.chats.clone()],
        cache: cache.to_path_buf(),
        top_k: Some(TOP_K),
        // The tiny models' context; no chat is nearly as long.
        max_length: miniature::CONTEXT,
        rows_per_shard: 128,
        ..PrecomputeConfig::default()
    }
}

fn stage_two(tiny: &Miniature, cache: &Path, out: &Path) -> anyhow::Result<TrainConfig> {
    Ok(TrainConfig {
        student: tiny.student.clone(),
        cache: cache.to_path_buf(),
        out: out.to_path_buf(),
        resume: Resume::Never,
        ..config::recipe(&settings::TRAIN, "pipeline/recipes/tiny.toml", RECIPE)?
    })
}

fn merge_adapter(tiny: &Miniature, trained: &TrainReport, out: &Path, context: &RunContext) -> anyhow::Result<MergeReport> {
    let config = MergeConfig {
        student: tiny.student.clone(),
        adapter: trained.adapter.clone(),
        out: out.to_path_buf(),
        ..MergeConfig::default()
    };
    Ok(adapter::merge(&config, context)?)
}

/// Prints part of the account, unless the result is to be one JSON object.
fn show(manner: Manner, write: impl FnOnce(&mut Out) -> std::io::Result<()>) -> anyhow::Result<()> {
    if manner.json {
        return Ok(());
    }
    let mut out = print::out();
    write(&mut out)?;
    out.flush()?;
    Ok(())
}

fn models(tiny: &Miniature) -> Table {
    let mut table = Table::of_facts();
    let loss = |(first, last): (f64, f64)| format!("{first:.2} → {last:.2} nats a token");
    table
        .fact("vocabulary", print::count(tiny.vocabulary as u64))
        .fact("teacher's loss", loss(tiny.teacher_loss))
        .fact("student's loss", loss(tiny.student_loss));
    table
}

/// The summary of the cache, and some positions of its first conversation.
fn look_into(folder: &Path, manner: Manner) -> anyhow::Result<()> {
    let cache = Cache::open(folder)?;
    let summary = scanned("reading", manner, |scan| Summary::of(&cache, scan))?;
    let vocabulary = Vocabulary::of(&cache)?;
    let row = Conversation::of(0, &cache.row(0)?, |id| vocabulary.bytes(id));
    let first = row.positions.iter().position(|p| p.scored).unwrap_or(0);
    let (lines, ink) = (summary_lines(&cache, &summary)?, Ink::of_stdout());
    show(manner, |out| {
        ink.write_all(&lines, out)?;
        writeln!(out)?;
        row.write_positions(first..first + SHOWN, 3, ink, out)
    })
}

/// What was made, where, and what to try next.
fn conclude(made: &Made) -> anyhow::Result<()> {
    let mut table = Table::of_facts();
    table
        .fact("chats", made.chats.display())
        .fact("teacher (AWQ)", made.teacher.display())
        .fact("student", made.student.display())
        .fact("cache", made.cache.display())
        .fact("adapter (PEFT)", made.train.adapter.display())
        .fact("merged model", made.merged.display());
    let (cache, student) = (made.cache.display(), made.student.display());
    let again = made.run.with_file_name("run-both");
    let mut out = print::out();
    writeln!(out, "\nMade:\n")?;
    table.write(&mut out)?;
    writeln!(out, "\nNext, for example:\n")?;
    writeln!(out, "  potstill inspect {cache} --row 3")?;
    writeln!(out, "  potstill verify {cache}")?;
    writeln!(out, "  potstill train --student {student} \\")?;
    writeln!(out, "      --cache {cache} \\")?;
    writeln!(out, "      --out {} --objective distill+sft --steps 60 \\", again.display())?;
    writeln!(out, "      --lr 5e-3 --warmup-steps 5")?;
    out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn only_new_empty_and_own_folders_are_used() {
        let top = tempfile::tempdir().expect("a temporary folder");
        let folder = top.path().join("demo");
        prepare(&folder, &PARTS).expect("a new folder");
        std::fs::create_dir_all(folder.join("cache/deep")).expect("a part");
        std::fs::write(folder.join("mine.txt"), "kept").expect("a file of the user's");
        prepare(&folder, &PARTS).expect("an earlier demo");
        assert!(!folder.join("cache").exists());
        assert!(folder.join("mine.txt").exists(), "what the demo did not make stays");

        let foreign = top.path().join("foreign");
        std::fs::create_dir_all(foreign.join("cache")).expect("somebody's folder");
        let error = prepare(&foreign, &PARTS).expect_err("refused");
        assert!(error.is::<UsageError>() && error.to_string().contains("no demo made"), "{error}");
        assert!(foreign.join("cache").exists());
    }
}
