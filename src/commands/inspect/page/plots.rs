//! The plots of a page as inline SVG, made of numbers alone. Colours and letters are the style sheet's; every mark says its number
//! in a title, which browsers show on hover and screen readers read.

use super::super::summary;
use potstill_cache::{Distributions, Histogram, Kept, Summary};
use std::fmt::Write as _;

/// Size of a plot in its own units, about CSS pixels.
const WIDTH: f64 = 340.0;
const HEIGHT: f64 = 200.0;
/// Room for the labels left of the body and below it.
const LEFT: f64 = 40.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 26.0;

/// The section of all plots that the figures allow.
pub fn section(figures: &Summary) -> String {
    let Some(distributions) = &figures.distributions else { return String::new() };
    let mut out = String::from("<section id=\"plots\" aria-label=\"Figures\">\n");
    match &distributions.kept {
        Some(kept) => out.push_str(&of_kept(kept, distributions)),
        None => out.push_str(&tail(distributions)),
    }
    out.push_str("</section>\n");
    out
}

fn of_kept(kept: &Kept, distributions: &Distributions) -> String {
    let (entropies, nats) = summary::entropies(kept);
    let shown = Histogram { from: 0.0, to: nats, counts: entropies.to_vec() };
    let whole: Vec<(f64, String)> = (0..=4).map(|i| f64::from(i) / 4.0).map(|at| (at, short(at * nats))).collect();
    let percents: Vec<(f64, String)> = [0, 25, 50, 75, 100].map(|p| (f64::from(p) / 100.0, format!("{p}%"))).to_vec();
    [
        figure(
            "Entropy of the teacher",
            &format!("nats; mean {:.2}, at least", kept.mean_entropy),
            &histogram(&shown, &whole, |low, high| format!("{low:.2} to {high:.2} nats")),
        ),
        figure(
            "Probability of its first choice",
            &format!("mean {:.1}%, median {:.1}%", 100.0 * kept.mean_top1, 100.0 * kept.median_top1),
            &histogram(&kept.top1_histogram, &percents, |low, high| format!("{:.0} to {:.0}%", 100.0 * low, 100.0 * high)),
        ),
        tail(distributions),
        figure("What a smaller k would keep", "of all probability, and of the data's tokens", &by_k(kept)),
        figure("Place of the data's token", "among the kept, most likely first", &ranks(kept)),
        figure(
            "Calibration",
            &format!("of its first choice: said →, came ↑; error {:.2}%", 100.0 * kept.calibration_error),
            &calibration(kept),
        ),
    ]
    .concat()
}

fn tail(distributions: &Distributions) -> String {
    let decades: Vec<(f64, String)> =
        [-9, -7, -5, -3, -1].map(|e| (f64::from(e + 9) / 9.0, format!("1e{e}"))).into_iter().chain([(1.0, "1".into())]).collect();
    figure(
        "Probability of the tail",
        &format!("what was not kept; mean {:.2}%", 100.0 * distributions.mean_tail_mass),
        &histogram(&distributions.tail_log10_histogram, &decades, |low, high| format!("1e{low:.1} to 1e{high:.1}")),
    )
}

fn figure(title: &str, note: &str, body: &str) -> String {
    format!(
        "<figure>\n<figcaption><b>{title}</b> <span>{note}</span></figcaption>\n\
         <svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}: {note}\">\n{body}</svg>\n</figure>\n"
    )
}

/// Columns and rows of the body: where a share of its width and of its height lies.
fn x(share: f64) -> f64 {
    LEFT + share * (WIDTH - LEFT - RIGHT)
}

fn y(share: f64) -> f64 {
    HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)
}

/// A number without superfluous digits.
fn short(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

fn label(out: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>");
}

fn line(out: &mut String, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
    let _ = writeln!(out, "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>");
}

/// Lines and labels of a body whose top is `top` (a share of all).
fn axes(out: &mut String, top: f64, ticks: &[(f64, String)]) {
    for share in [0.0, 0.5, 1.0] {
        line(out, if share == 0.0 { "axis" } else { "grid" }, (x(0.0), y(share)), (x(1.0), y(share)));
        let value = 100.0 * share * top;
        let digits = usize::from(top < 0.1 && share > 0.0);
        label(out, x(0.0) - 6.0, y(share) + 4.0, "end", &format!("{value:.digits$}%"));
    }
    for (at, text) in ticks {
        let anchor = if *at >= 1.0 { "end" } else { "middle" };
        label(out, x(*at) + if *at >= 1.0 { RIGHT - 2.0 } else { 0.0 }, HEIGHT - 8.0, anchor, text);
    }
}

fn histogram(histogram: &Histogram, ticks: &[(f64, String)], name: impl Fn(f64, f64) -> String) -> String {
    let all = histogram.counts.iter().sum::<u64>().max(1) as f64;
    let most = histogram.counts.iter().copied().max().unwrap_or(0).max(1) as f64;
    let bins = histogram.counts.len().max(1) as f64;
    let edge = |i: usize| histogram.from + (histogram.to - histogram.from) * i as f64 / bins;
    let mut out = String::new();
    axes(&mut out, most / all, ticks);
    for (i, &count) in histogram.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
        let (left, width) = (x(i as f64 / bins), (WIDTH - LEFT - RIGHT) / bins);
        // A bin that is not empty is seen.
        let height = (y(0.0) - y(count as f64 / most)).max(1.0);
        let _ = writeln!(
            out,
            "<rect class=\"bar\" x=\"{:.2}\" y=\"{:.2}\" width=\"{:.2}\" height=\"{height:.2}\"><title>{}: {:.2}%, {count} positions\
             </title></rect>",
            left + 0.5,
            y(0.0) - height,
            (width - 1.0).max(0.5),
            name(edge(i), edge(i + 1)),
            100.0 * count as f64 / all
        );
    }
    out
}

fn by_k(kept: &Kept) -> String {
    let last = kept.by_k.len().saturating_sub(1).max(1) as f64;
    let at = |i: usize| i as f64 / last;
    // Labels of many k would touch each other.
    let step = kept.by_k.len().div_ceil(8).max(1);
    let ticks: Vec<(f64, String)> = kept
        .by_k
        .iter()
        .enumerate()
        .filter(|(i, _)| i % step == 0 || at(*i) == 1.0)
        .map(|(i, k)| (at(i), k.k.to_string()))
        .collect();
    let mut out = String::new();
    axes(&mut out, 1.0, &ticks);
    let series = [("mass", "probability", kept.by_k.iter().map(|k| k.mean_mass).collect::<Vec<f64>>())];
    let next = ("next", "the data's token", kept.by_k.iter().map(|k| k.next_is_kept).collect());
    for (class, name, values) in series.into_iter().chain([next]) {
        let points: Vec<String> =
            values.iter().enumerate().map(|(i, value)| format!("{:.1},{:.1}", x(at(i)), y(value.min(1.0)))).collect();
        let _ = writeln!(out, "<polyline class=\"{class}\" points=\"{}\"/>", points.join(" "));
        for (i, (value, k)) in values.iter().zip(&kept.by_k).enumerate() {
            let _ = writeln!(
                out,
                "<circle class=\"{class}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3\"><title>k = {}: {:.2}% of {name}</title></circle>",
                x(at(i)),
                y(value.min(1.0)),
                k.k,
                100.0 * value
            );
        }
    }
    for (row, class, name) in [(0.0, "mass", "probability"), (1.0, "next", "the data's token")] {
        let (left, up) = (x(1.0) - 98.0, y(0.0) - 26.0 + 15.0 * row);
        let _ = writeln!(out, "<circle class=\"{class}\" cx=\"{left:.1}\" cy=\"{:.1}\" r=\"3\"/>", up - 4.0);
        label(&mut out, left + 8.0, up, "start", name);
    }
    out
}

fn ranks(kept: &Kept) -> String {
    let all = kept.top1_histogram.counts.iter().sum::<u64>();
    let placed: u64 = kept.next_rank.iter().map(|bin| bin.positions).sum();
    let name = |from: u64, to: u64| if from == to { from.to_string() } else { format!("{from}–{to}") };
    let mut rows: Vec<(String, u64)> = kept.next_rank.iter().map(|bin| (name(bin.from, bin.to), bin.positions)).collect();
    rows.push(("not kept".into(), all.saturating_sub(placed)));
    let each = (HEIGHT - TOP) / rows.len().max(1) as f64;
    let most = rows.iter().map(|(_, positions)| *positions).max().unwrap_or(0).max(1) as f64;
    let (left, room) = (70.0, WIDTH - 70.0 - 58.0);
    let mut out = String::new();
    for (i, (name, positions)) in rows.iter().enumerate() {
        let (up, share) = (TOP + each * i as f64, *positions as f64 / all.max(1) as f64);
        let width = if *positions > 0 { (room * *positions as f64 / most).max(1.0) } else { 0.0 };
        label(&mut out, left - 8.0, up + each / 2.0 + 4.0, "end", name);
        let class = if i + 1 == rows.len() { "bar unkept" } else { "bar" };
        let _ = writeln!(
            out,
            "<rect class=\"{class}\" x=\"{left}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{:.1}\"><title>{name}: {positions} positions\
             </title></rect>",
            up + 1.5,
            (each - 3.0).max(1.0)
        );
        label(&mut out, left + width + 6.0, up + each / 2.0 + 4.0, "start", &format!("{:.2}%", 100.0 * share));
    }
    out
}

fn calibration(kept: &Kept) -> String {
    let ticks: Vec<(f64, String)> = [0, 25, 50, 75, 100].map(|p| (f64::from(p) / 100.0, format!("{p}%"))).to_vec();
    let mut out = String::new();
    axes(&mut out, 1.0, &ticks);
    line(&mut out, "diagonal", (x(0.0), y(0.0)), (x(1.0), y(1.0)));
    let most = kept.calibration.iter().map(|bin| bin.positions).max().unwrap_or(0).max(1) as f64;
    let known = kept.calibration.iter().filter_map(|bin| Some((bin.mean_top1?, bin.top1_is_next?, bin.positions)));
    let known: Vec<(f64, f64, u64)> = known.collect();
    let points: Vec<String> = known.iter().map(|(said, came, _)| format!("{:.1},{:.1}", x(*said), y(*came))).collect();
    let _ = writeln!(out, "<polyline class=\"mass\" points=\"{}\"/>", points.join(" "));
    for (said, came, positions) in known {
        let radius = 2.5 + 5.5 * (positions as f64 / most).sqrt();
        let _ = writeln!(
            out,
            "<circle class=\"mass\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"{radius:.1}\"><title>said {:.1}%, came {:.1}%, {positions} positions\
             </title></circle>",
            x(said),
            y(came),
            100.0 * said,
            100.0 * came
        );
    }
    out
}
