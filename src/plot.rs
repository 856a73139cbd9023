//! Plots of text for 80 columns: panels of half a line each, made of block elements and read without any colour.

use crate::ink::{Line, Shade};
use crate::text;

/// Columns of a panel; two of them and a gap make a line.
pub const PANEL: usize = 38;
/// Columns between two panels.
const GAP: usize = 4;
/// Lines of a histogram's body.
const HEIGHT: usize = 5;
/// Columns of the label left of it, and of the body.
const LABEL: usize = 5;
const BODY: usize = PANEL - LABEL - 1;
/// Columns of the body that a histogram should use.
const ENOUGH: usize = BODY * 3 / 4;
/// Blocks that fill a cell from below and from the left, by eighths.
const FROM_BELOW: [&str; 9] = [" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"];
const FROM_LEFT: [&str; 9] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉", "█"];

/// A bar of `share` (0 to 1) of `columns` columns; one that is not 0 is seen.
pub fn bar(share: f64, columns: usize) -> String {
    let eighths = in_eighths(share, columns);
    let rest = FROM_LEFT.get(eighths % 8).copied().unwrap_or_default();
    "█".repeat(eighths / 8) + rest
}

/// A bar with a mark where another share lies; the mark wins where both are.
pub fn bar_with_mark(share: f64, mark: f64, columns: usize) -> String {
    let at = ((mark.clamp(0.0, 1.0) * columns as f64) as usize).min(columns.saturating_sub(1));
    let mut cells: Vec<String> = bar(share, columns).chars().map(String::from).collect();
    cells.resize(cells.len().max(at + 1), " ".into());
    if let Some(cell) = cells.get_mut(at) {
        *cell = "┃".into();
    }
    cells.concat()
}

fn in_eighths(share: f64, cells: usize) -> usize {
    let eighths = (share.clamp(0.0, 1.0) * (8 * cells) as f64).round() as usize;
    if share > 0.0 { eighths.max(1) } else { 0 }
}

/// Two panels beside each other.
pub fn beside(left: Vec<Line>, right: Vec<Line>) -> Vec<Line> {
    let lines = left.len().max(right.len());
    let (mut left, mut right) = (left.into_iter(), right.into_iter());
    let line = |_| left.next().unwrap_or_default().beside(PANEL + GAP, right.next().unwrap_or_default());
    (0..lines).map(line).collect()
}

/// A histogram of `counts` as a panel; `ends` are written below its ends, `middle` between them.
pub fn histogram(title: &str, counts: &[u64], [first, middle, last]: [&str; 3]) -> Vec<Line> {
    let (merged, wide) = spread(counts.len());
    let bars: Vec<u64> = counts.chunks(merged).map(|bins| bins.iter().sum()).collect();
    let all: u64 = counts.iter().sum();
    let most = bars.iter().copied().max().unwrap_or(0).max(1);
    let heights: Vec<usize> = bars.iter().map(|&bar| in_eighths(bar as f64 / most as f64, HEIGHT)).collect();
    let mut lines = vec![Line::of(Shade::Strong, text::fit(title, PANEL))];
    for level in (0..HEIGHT).rev() {
        let label = if level + 1 == HEIGHT { share(most as f64 / all.max(1) as f64) } else { String::new() };
        let cell =
            |height: &usize| FROM_BELOW.get(height.saturating_sub(8 * level).min(8)).copied().unwrap_or_default().repeat(wide);
        let body: String = heights.iter().map(cell).collect();
        lines.push(Line::of(Shade::Faint, format!("{label:>LABEL$}│")).then(Shade::Bar, body));
    }
    let columns = wide * bars.len();
    lines.push(Line::of(Shade::Faint, format!("{:>LABEL$}└{}", "0", "─".repeat(columns))));
    lines.push(Line::of(Shade::Faint, format!("{:LABEL$} {}", "", scale(columns, first, middle, last))));
    lines
}

/// How many bins make a bar and how many columns it takes: as few bins as use [`ENOUGH`] of the body, else as use most of it.
fn spread(bins: usize) -> (usize, usize) {
    let used = |(merged, wide): (usize, usize)| wide * bins.div_ceil(merged);
    let ways = (1..=bins.max(1)).map(|merged| (merged, BODY / bins.div_ceil(merged).max(1)));
    let best = ways.max_by_key(|&way| (used(way).min(ENOUGH), std::cmp::Reverse(way.0)));
    best.filter(|(_, wide)| *wide > 0).unwrap_or((bins.div_ceil(BODY).max(1), 1))
}

fn scale(columns: usize, first: &str, middle: &str, last: &str) -> String {
    let mut line = first.to_string();
    for (label, end) in [(middle, (columns + text::width(middle)) / 2), (last, columns)] {
        let start = end.saturating_sub(text::width(label)).max(text::width(&line) + 1);
        line += &" ".repeat(start - text::width(&line));
        line += label;
    }
    line
}

/// A share in at most 4 columns.
fn share(p: f64) -> String {
    if p < 0.0995 { format!("{:.1}%", p * 100.0) } else { format!("{:.0}%", p * 100.0) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::ink::Ink;

    fn shown(lines: &[Line]) -> String {
        let mut out = Vec::new();
        Ink::Plain.write_all(lines, &mut out).expect("memory");
        String::from_utf8(out).expect("UTF-8")
    }

    #[test]
    fn bars_are_as_long_as_their_share_and_never_vanish() {
        assert_eq!([bar(0.0, 4), bar(1e-9, 4), bar(0.5, 4), bar(1.0, 4), bar(7.0, 4)], ["", "▏", "██", "████", "████"]);
        assert_eq!(bar(f64::NAN, 4), "");
        assert_eq!(
            [bar_with_mark(0.25, 0.75, 4), bar_with_mark(1.0, 0.0, 4), bar_with_mark(0.0, 1.0, 4)],
            ["█  ┃", "┃███", "   ┃"]
        );
    }

    #[test]
    fn a_histogram_has_the_heights_of_its_counts() {
        let lines = histogram("title", &[400, 1, 999, 100], ["a", "b", "c"]);
        let (none, full) = (" ".repeat(8), "█".repeat(8));
        // Fortieths of the largest count: 16, 1 (0.04, but seen), 40 and 4.
        let expected = [
            "title".into(),
            format!("  67%│{none}{none}{full}"),
            format!("     │{none}{none}{full}"),
            format!("     │{none}{none}{full}"),
            format!("     │{full}{none}{full}"),
            format!("     │{full}{}{full}{}", "▁".repeat(8), "▄".repeat(8)),
            format!("    0└{}", "─".repeat(32)),
            format!("      a{}b{}c", " ".repeat(14), " ".repeat(15)),
        ];
        assert_eq!(shown(&lines).lines().collect::<Vec<_>>(), expected);
        // Bins are put together only where they would leave much of the body empty.
        let ways = [4, 12, 18, 20, 24, 48, 200].map(spread);
        assert_eq!(ways, [(1, 8), (1, 2), (2, 3), (2, 3), (1, 1), (2, 1), (7, 1)]);
        for counts in [&[][..], &[0, 0], &[5; 48], &[1; 200]] {
            let lines = histogram("t", counts, ["0", "1", "2"]);
            assert!(lines.iter().all(|line| line.width() <= PANEL), "{}", shown(&lines));
        }
    }

    #[test]
    fn panels_stand_beside_each_other() {
        let line = |text: &str| Line::of(Shade::Plain, text);
        let both = beside(vec![line("a")], vec![line("b"), line("c")]);
        assert_eq!(shown(&both), format!("a{}b\n{}c\n", " ".repeat(41), " ".repeat(42)));
    }
}
