//! `potstill evaluate held-out`: run the library, lay its figures out as llama.cpp's report of the KL divergence does.

use crate::cli::{self, Manner};
use crate::commands::{drawn, interruptible};
use crate::exit::Outcome;
use crate::print::{self, Side, Table};
use potstill_pipeline::evaluate::held_out::{self, Figures, HeldOutConfig, HeldOutReport};
use potstill_pipeline::evaluate::{BasePrecision, Estimate, Mean, Spread, Subject};
use potstill_pipeline::hub::Hub;
use potstill_pipeline::kernel::Precision;
use std::io::Write;

/// Evaluates on a held-out cache.
pub fn run(flags: &cli::HeldOut, manner: Manner) -> anyhow::Result<Outcome> {
    let config = flags.config();
    let context = interruptible()?;
    let report = drawn(&context, manner, || {
        let student = Hub::of_process().model_folder(&config.subject.student, &context)?;
        let subject = Subject { student, ..config.subject.clone() };
        Ok(held_out::run(&HeldOutConfig { subject, ..config.clone() }, &context)?)
    })?;
    if manner.json {
        print::json(&report)?;
    } else {
        write(&report, &mut print::out())?;
    }
    Ok(Outcome::Done)
}

/// The whole report.
fn write(report: &HeldOutReport, out: &mut impl Write) -> std::io::Result<()> {
    facts(report).write(out)?;
    writeln!(out)?;
    tokens(&report.figures).write(out)?;
    if let Some(spreads) = spreads(&report.figures) {
        writeln!(out)?;
        spreads.write(out)?;
        writeln!(out, "coarse: over the kept ids and one entry for the rest; p teacher, q student. In")?;
        writeln!(out, "truth KL, JSD and TV are at least this, accepted at most. KL and JSD in nats, TV")?;
        writeln!(out, "and accepted are shares, q(y)-p(y) is in points of per cent.")?;
    }
    out.flush()
}

/// What was evaluated, and on what.
fn facts(report: &HeldOutReport) -> Table {
    let held = match report.base_precision {
        BasePrecision::Nf4 => "NF4",
        BasePrecision::Stored | BasePrecision::Auto => "as stored",
    };
    let compute = match report.compute {
        Precision::F32 => "f32",
        Precision::Bf16 => "bf16",
    };
    let figures = &report.figures;
    let mut table = Table::of_facts();
    table.fact("student", format!("{}; {held}, computed in {compute}", report.student.display()));
    if let Some(adapter) = &report.adapter {
        table.fact("adapter", adapter.display());
    }
    table.fact("cache", format!("{}; {}", report.cache.display(), report.selection)).fact("teacher", &report.teacher).fact(
        "looked at",
        format!("{}, {} scored positions", print::plural(figures.rows, "row"), print::count(figures.positions)),
    );
    if figures.positions_not_finite > 0 {
        let left_out = format!("{} positions, left out of every figure", print::count(figures.positions_not_finite));
        table.fact("not finite", left_out);
    }
    table
}

/// What is said of tokens: perplexities, agreement, calibration.
fn tokens(figures: &Figures) -> Table {
    let mut table = Table::with_heads(&[
        ("of the data's tokens y", Side::Left),
        ("", Side::Right),
        ("±", Side::Right),
        ("± rows", Side::Right),
    ]);
    let number = |x: f64| format!("{x:.6}");
    let error = |error: Option<f64>, shown: &dyn Fn(f64) -> String| error.map_or_else(|| "-".into(), shown);
    let estimate = |table: &mut Table, name: &str, estimate: &Estimate| {
        let Estimate { value, standard_error } = estimate;
        table.row([name.into(), number(*value), error(*standard_error, &number), String::new()]);
    };
    let share = |table: &mut Table, name: &str, mean: &Mean| {
        let shown = |share: f64| format!("{:.3} %", 100.0 * share);
        let errors = [mean.standard_error, mean.standard_error_by_row].map(|e| error(e, &shown));
        let [independent, by_row] = errors;
        table.row([name.into(), shown(mean.mean), independent, by_row]);
    };
    estimate(&mut table, "perplexity of the student", &figures.perplexity);
    let nll = &figures.nll;
    let errors = [nll.standard_error, nll.standard_error_by_row].map(|e| error(e, &number));
    let [independent, by_row] = errors;
    table.row(["-ln q(y), nats".into(), number(nll.mean), independent, by_row]);
    if let Some(kept) = &figures.where_kept {
        let kept_at = kept.positions as f64 / figures.positions.max(1) as f64;
        table.row([
            format!("where p(y) is kept, {} of positions:", print::percent(kept_at)),
            String::new(),
            String::new(),
            String::new(),
        ]);
        estimate(&mut table, "  PPL(student)", &kept.student);
        estimate(&mut table, "  PPL(teacher)", &kept.teacher);
        if let Some(correlation) = kept.correlation {
            table.row(["  correlation of their logs".into(), print::percent(correlation), String::new(), String::new()]);
        }
        estimate(&mut table, "  ln(PPL(student)/PPL(teacher))", &kept.ln_ratio);
        estimate(&mut table, "  PPL(student)/PPL(teacher)", &kept.ratio);
        estimate(&mut table, "  PPL(student)-PPL(teacher)", &kept.difference);
    }
    if let Some(rms) = &figures.probability_difference_rms {
        let points = |x: f64| format!("{:.3} %", 100.0 * x);
        table.row(["  RMS of q(y)-p(y)".into(), points(rms.value), error(rms.standard_error, &points), String::new()]);
    }
    if let Some(same) = &figures.same_top_token {
        share(&mut table, "same top token as the teacher", same);
    }
    if let (Some(most), Some(least)) = (&figures.acceptance, &figures.acceptance_at_least) {
        share(&mut table, "accepted as drafter, at most", &most.mean);
        share(&mut table, "accepted as drafter, at least", least);
    }
    if let Some(mass) = &figures.kept_mass {
        table.row(["mass of the kept ids, student".into(), print::percent(mass.student), String::new(), String::new()]);
        table.row(["mass of the kept ids, teacher".into(), print::percent(mass.teacher), String::new(), String::new()]);
    }
    table.row([
        "calibration error (ECE), student".into(),
        number(figures.calibration_error.student),
        String::new(),
        String::new(),
    ]);
    if let Some(teacher) = figures.calibration_error.teacher {
        table.row(["calibration error (ECE), teacher".into(), number(teacher), String::new(), String::new()]);
    }
    table
}

/// What is said of distributions: a column a figure, a line a statistic. `None` where the cache has none to compare with.
fn spreads(figures: &Figures) -> Option<Table> {
    let Figures { kl, reverse_kl, jsd, total_variation, acceptance, probability_difference, .. } = figures;
    let columns = [Some((*kl)?), *reverse_kl, *jsd, *total_variation, *acceptance, *probability_difference];
    let mut table = Table::with_heads(&[
        ("coarse", Side::Left),
        ("KL(p,q)", Side::Right),
        ("KL(q,p)", Side::Right),
        ("JSD", Side::Right),
        ("TV", Side::Right),
        ("accepted", Side::Right),
        ("q(y)-p(y)", Side::Right),
    ]);
    let mut line = |name: &str, of: &dyn Fn(&Spread) -> Option<f64>| {
        let cells = columns.iter().enumerate().map(|(i, column)| match column.as_ref().and_then(of) {
            None => "-".to_string(),
            Some(x) if i + 1 == columns.len() => format!("{:.3}", 100.0 * x),
            Some(x) => format!("{x:.6}"),
        });
        let cells: Vec<String> = cells.collect();
        if let Ok([a, b, c, d, e, f]) = <[String; 6]>::try_from(cells) {
            table.row([name.to_string(), a, b, c, d, e, f]);
        }
    };
    line("mean", &|s| Some(s.mean.mean));
    line("±", &|s| s.mean.standard_error);
    line("± rows", &|s| s.mean.standard_error_by_row);
    line("maximum", &|s| Some(s.maximum));
    line("99.9 %", &|s| Some(s.p99_9));
    line("99 %", &|s| Some(s.p99));
    line("95 %", &|s| Some(s.p95));
    line("90 %", &|s| Some(s.p90));
    line("75 %", &|s| Some(s.p75));
    line("median", &|s| Some(s.median));
    line("25 %", &|s| Some(s.p25));
    line("10 %", &|s| Some(s.p10));
    line("5 %", &|s| Some(s.p5));
    line("1 %", &|s| Some(s.p1));
    line("0.1 %", &|s| Some(s.p0_1));
    line("minimum", &|s| Some(s.minimum));
    Some(table)
}
