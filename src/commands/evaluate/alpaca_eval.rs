//! `potstill evaluate alpaca-eval`: win rates against a baseline.

use super::judging::{add_calls, digest_of, number, with_error, write_outlook, write_remarks};
use crate::cli::{AlpacaEval, Manner};
use crate::commands::{drawn, interruptible};
use crate::exit::{Outcome, UsageError};
use crate::print::{self, Out, Side, Table};
use potstill_pipeline::evaluate::alpaca_eval::length_controlled::is_extreme;
use potstill_pipeline::evaluate::alpaca_eval::{
    self, AlpacaEvalConfig, AlpacaEvalReport, Choices, LengthControl, Orders, Scored, figures::Winners,
};
use potstill_pipeline::evaluate::judge::chat::Logprobs;
use potstill_pipeline::evaluate::judge::{Endpoint, endpoint};
use std::io::Write;

/// Judges pairs, scores judgements that are there, or says what judging would take.
pub fn run(flags: &AlpacaEval, manner: Manner) -> anyhow::Result<Outcome> {
    if let Some(annotations) = &flags.annotations {
        let scored = alpaca_eval::scored(annotations, control(flags).as_ref()).map_err(potstill_pipeline::Error::from)?;
        if manner.json {
            print::json(&scored)?;
        } else {
            let mut out = print::out();
            write_scored(&mut out, &scored, |_| {})?;
            out.flush()?;
        }
        return Ok(if scored.figures.left_out == 0 { Outcome::Done } else { Outcome::Skipped });
    }
    let config = config(flags)?;
    if flags.asking.dry_run {
        let outlook = alpaca_eval::outlook(&config).map_err(potstill_pipeline::Error::from)?;
        return write_outlook(&outlook.judge, &outlook.answers, manner, &outlook);
    }
    let judge = Endpoint::of_process(endpoint::JUDGE).map_err(potstill_pipeline::Error::from)?;
    let model = flags.answering.endpoint()?;
    let context = interruptible()?;
    let report = drawn(&context, manner, || {
        Ok(alpaca_eval::run(&config, &judge, model.as_ref(), &context).map_err(potstill_pipeline::Error::from)?)
    })?;
    if manner.json {
        print::json(&report)?;
    } else {
        write(&report, &config)?;
    }
    let whole = report.left_out.is_empty() && report.unanswered.is_empty();
    Ok(if whole { Outcome::Done } else { Outcome::Skipped })
}

fn control(flags: &AlpacaEval) -> Option<LengthControl> {
    let (coefficients, difficulties) = flags.lc_coefficients.zip(flags.lc_difficulty.clone())?;
    Some(LengthControl { coefficients, difficulties })
}

fn config(flags: &AlpacaEval) -> anyhow::Result<AlpacaEvalConfig> {
    let missing = |flag: &str| UsageError(format!("{flag} is missing"));
    let (judge, out, replies) = flags.asking.places()?;
    Ok(AlpacaEvalConfig {
        baseline: flags.baseline.clone().ok_or_else(|| missing("--baseline"))?,
        prompt: flags.prompt.clone().ok_or_else(|| missing("--prompt"))?,
        answers: flags.answering.source(&flags.asking)?,
        judge,
        max_tokens: flags.max_tokens,
        limit_field: flags.asking.limit_field,
        logprobs: if flags.no_logprobs { Logprobs::None } else { Logprobs::Top },
        orders: if flags.orders == 1 { Orders::One(flags.seed) } else { Orders::Both },
        first: flags.asking.first,
        length_control: control(flags),
        out,
        replies,
        patience: flags.asking.patience(),
    })
}

/// Figures and the table without ties; `more` adds facts.
fn write_scored(out: &mut Out, scored: &Scored, more: impl FnOnce(&mut Table)) -> anyhow::Result<()> {
    let figures = &scored.figures;
    let mut facts = Table::of_facts();
    facts
        .fact("model", &scored.model)
        .fact("baseline", &scored.baseline)
        .fact("judge", &scored.judge)
        .fact("judged", format!("{}, {} left out", print::count(figures.judged), print::count(figures.left_out)))
        .fact("win rate, %", with_error(figures.win_rate, figures.standard_error, 4));
    if let Some(controlled) = &scored.length_controlled {
        facts
            .fact("length-controlled, %", with_error(Some(controlled.win_rate), controlled.standard_error, 4))
            .fact("  with lengths, %", number(controlled.with_lengths, 4));
    }
    let lengths = &figures.lengths;
    let characters = [lengths.model, lengths.baseline].map(|n| number(n, 0));
    let draws = print::plural(figures.draws, "draw");
    facts
        .fact("discrete win rate, %", number(figures.discrete_win_rate, 4))
        .fact("wins : losses", format!("{} : {}, {draws}", print::count(figures.wins), print::count(figures.losses)))
        .fact("characters, mean", format!("{}, the baseline's {}, x {}", characters[0], characters[1], number(lengths.ratio, 2)));
    more(&mut facts);
    facts.write(out)?;
    writeln!(out)?;
    winners(scored).write(out)?;
    let forced = print::plural(figures.no_ties.forced, "draw");
    writeln!(out, "Wins without ties: {forced} decided by a coin; p is exact and two-sided.")?;
    if let (Some(plain), Some(controlled)) = (figures.win_rate, &scored.length_controlled)
        && is_extreme(plain, controlled.win_rate)
    {
        writeln!(
            out,
            "The length-controlled rate is far from the plain one: are the coefficients
those of this model and this baseline?"
        )?;
    }
    Ok(())
}

fn winners(scored: &Scored) -> Table {
    let mut table = Table::with_heads(&[
        ("dataset", Side::Left),
        ("judged", Side::Right),
        ("win rate", Side::Right),
        ("wins", Side::Right),
        ("losses", Side::Right),
        ("wins, %", Side::Right),
        ("95 % interval", Side::Right),
        ("p", Side::Right),
    ]);
    let no_ties = &scored.figures.no_ties;
    let mut row = |winners: &Winners| {
        let share = (winners.judged > 0).then(|| 100.0 * winners.wins as f64 / winners.judged as f64);
        table.row([
            winners.dataset.clone(),
            print::count(winners.judged),
            number(winners.win_rate, 2),
            print::count(winners.wins),
            print::count(winners.losses),
            number(share, 1),
            winners.interval.map_or_else(|| "-".into(), |[low, high]| format!("{low:.1} to {high:.1}")),
            if winners.p < 1e-4 { format!("{:.0e}", winners.p) } else { format!("{:.4}", winners.p) },
        ]);
    };
    no_ties.datasets.iter().for_each(&mut row);
    row(&no_ties.total);
    table
}

/// How the judge chose, as facts.
fn add_choices(table: &mut Table, choices: &Choices) {
    let (sure, labels) = (print::count(choices.by_probability), print::count(choices.by_label));
    table.fact("choices", format!("{sure} by probability, {labels} by label alone"));
    if choices.identical > 0 {
        table.fact("  equal outputs", format!("{}, a draw without a call", print::count(choices.identical)));
    }
    let percent = |part: u64, of: u64| if of == 0 { "-".into() } else { print::percent(part as f64 / of as f64) };
    if choices.both_orders > 0 {
        let flips = percent(choices.flips, choices.both_orders);
        table.fact("  flips", format!("{flips} of {} have another winner in the other order", print::count(choices.both_orders)));
    }
    let decided = choices.first_wins + choices.second_wins;
    table.fact("  first one wins", percent(choices.first_wins, decided));
}

fn write(report: &AlpacaEvalReport, config: &AlpacaEvalConfig) -> anyhow::Result<()> {
    let mut out = print::out();
    write_scored(&mut out, &report.scored, |facts| {
        add_choices(facts, &report.choices);
        facts.fact("prompt", digest_of(&report.prompt_blake3, &config.prompt));
        add_calls(facts, "judgements", &report.judge_calls);
        if let Some(calls) = &report.answer_calls {
            add_calls(facts, "answers", calls);
        }
        facts.fact("results", config.out.display());
    })?;
    write_remarks(&mut out, "left out", &report.left_out)?;
    write_remarks(&mut out, "instructions without an answer", &report.unanswered)?;
    if report.cut_answers.is_some_and(|n| n > 0) {
        writeln!(out, "answers cut at their greatest length: {}", print::count(report.cut_answers.unwrap_or(0)))?;
    }
    if report.choices.by_probability > 0 && report.choices.by_label > 0 {
        writeln!(out, "some choices are probabilities and some are labels: their mean is of neither kind")?;
    }
    if report.judge_calls.models.len() > 1 {
        writeln!(out, "several models judged: these choices are not of one judge")?;
    }
    out.flush()?;
    Ok(())
}
