//! `potstill evaluate mt-bench`: the judge's grades by turn and category.

use super::judging::{add_calls, digest_of, number, with_error, write_outlook, write_remarks};
use crate::cli::{Manner, MtBench};
use crate::commands::{drawn, interruptible};
use crate::exit::{Outcome, UsageError};
use crate::print::{self, Side, Table};
use potstill_pipeline::evaluate::judge::{Endpoint, endpoint};
use potstill_pipeline::evaluate::mt_bench::{self, MtBenchConfig, MtBenchReport};
use std::io::Write;

/// Grades answers, or says what that would take.
pub fn run(flags: &MtBench, manner: Manner) -> anyhow::Result<Outcome> {
    let config = config(flags)?;
    if flags.asking.dry_run {
        let outlook = mt_bench::outlook(&config).map_err(potstill_pipeline::Error::from)?;
        return write_outlook(&outlook.judge, &outlook.answers, manner, &outlook);
    }
    let judge = Endpoint::of_process(endpoint::JUDGE).map_err(potstill_pipeline::Error::from)?;
    let model = flags.answering.endpoint()?;
    let context = interruptible()?;
    let report = drawn(&context, manner, || {
        Ok(mt_bench::run(&config, &judge, model.as_ref(), &context).map_err(potstill_pipeline::Error::from)?)
    })?;
    if manner.json {
        print::json(&report)?;
    } else {
        write(&report, &config)?;
    }
    let whole = report.scores.ungraded.is_empty() && report.unanswered.is_empty();
    Ok(if whole { Outcome::Done } else { Outcome::Skipped })
}

fn config(flags: &MtBench) -> anyhow::Result<MtBenchConfig> {
    const PROMPTS: &str = "judge_prompts.jsonl";
    let (judge, out, replies) = flags.asking.places()?;
    let above = flags.data.join("..").join(PROMPTS);
    let found = [flags.data.join(PROMPTS), above].into_iter().find(|path| path.exists());
    let prompts = flags.prompts.clone().or(found).ok_or_else(|| {
        let data = flags.data.display();
        UsageError(format!("{data}: expected {PROMPTS} in it or in the folder above, found none; --prompts names another file"))
    })?;
    let references = flags.references.clone().unwrap_or_else(|| flags.data.join("reference_answer").join("gpt-4.jsonl"));
    Ok(MtBenchConfig {
        questions: flags.data.join("question.jsonl"),
        prompts,
        references,
        answers: flags.answering.source(&flags.asking)?,
        judge,
        max_tokens: flags.max_tokens,
        limit_field: flags.asking.limit_field,
        first: flags.asking.first,
        out,
        replies,
        patience: flags.asking.patience(),
    })
}

/// Scores by category and turn.
fn scores(report: &MtBenchReport) -> Table {
    let mut table = Table::with_heads(&[
        ("category", Side::Left),
        ("turn 1", Side::Right),
        ("turn 2", Side::Right),
        ("both", Side::Right),
        ("graded", Side::Right),
    ]);
    for category in &report.scores.categories {
        table.row([
            category.category.clone(),
            number(category.first.mean, 2),
            number(category.second.mean, 2),
            number(category.both.mean, 2),
            print::count(category.both.graded),
        ]);
    }
    let (first, second, overall) = (report.scores.first, report.scores.second, report.scores.overall);
    table.row([
        "ALL".into(),
        with_error(first.mean, first.standard_error, 2),
        with_error(second.mean, second.standard_error, 2),
        with_error(overall.mean, overall.standard_error, 2),
        print::count(overall.graded),
    ]);
    table
}

fn write(report: &MtBenchReport, config: &MtBenchConfig) -> anyhow::Result<()> {
    let mut out = print::out();
    let mut facts = Table::of_facts();
    facts
        .fact("model", &report.model)
        .fact("judge", &report.judge)
        .fact("questions", print::count(report.questions))
        .fact("prompts", digest_of(&report.prompts_blake3, &config.prompts));
    add_calls(&mut facts, "judgements", &report.judge_calls);
    if let Some(calls) = &report.answer_calls {
        add_calls(&mut facts, "answers", calls);
    }
    facts.fact("results", config.out.display());
    facts.write(&mut out)?;
    writeln!(out)?;
    scores(report).write(&mut out)?;
    writeln!(out, "± is the standard error; the two turns of a question count as one draw.")?;
    write_remarks(&mut out, "without a grade", &report.scores.ungraded)?;
    write_remarks(&mut out, "questions without an answer", &report.unanswered)?;
    if report.error_answers > 0 {
        writeln!(out, "answers that are only an error's mark, graded as they stand: {}", print::count(report.error_answers))?;
    }
    if report.cut_turns.is_some_and(|n| n > 0) {
        writeln!(out, "answers cut at their greatest length: {}", print::count(report.cut_turns.unwrap_or(0)))?;
    }
    if report.judge_calls.models.len() > 1 {
        writeln!(out, "several models judged: these grades are not of one scale")?;
    }
    out.flush()?;
    Ok(())
}
