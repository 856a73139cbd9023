//! Results on stdout: tables of at most 80 columns for people, one JSON object for machines.
//!
//! Every text goes through [`crate::text`]; numbers are in the units people compare (B, KiB, 1,234, 0.12 %).

use crate::text;
use serde::Serialize;
use std::io::{BufWriter, IsTerminal, StdoutLock, Write};

/// Widest line of a table.
pub const COLUMNS: usize = 80;
/// Spaces between two cells.
const GAP: usize = 2;

/// Buffered stdout. What cannot be written (a reader that went away) is an error, never a panic.
pub type Out = BufWriter<StdoutLock<'static>>;

/// Opens stdout.
pub fn out() -> Out {
    BufWriter::new(std::io::stdout().lock())
}

/// Prints `value` as one line of JSON. Characters that would act on a terminal are written as escapes, which mean the same.
pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    let json = serde_json::to_string(value).map_err(std::io::Error::from)?;
    let mut out = out();
    writeln!(out, "{}", text::json(&json))?;
    out.flush()?;
    Ok(())
}

/// Whether stdout is a terminal that wants colours (`NO_COLOR` unset or empty, `TERM` not `dumb`).
pub fn colours() -> bool {
    let unwanted =
        std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty()) || std::env::var_os("TERM").is_some_and(|v| v == "dumb");
    std::io::stdout().is_terminal() && !unwanted
}

/// Which side a column is aligned to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A table: a title, perhaps column heads, rows. Text columns shrink until a line fits [`COLUMNS`].
#[derive(Debug)]
pub struct Table {
    sides: Vec<Side>,
    rows: Vec<Vec<String>>,
    heads: bool,
}

impl Table {
    /// Columns with heads.
    pub fn with_heads(columns: &[(&str, Side)]) -> Self {
        let heads = columns.iter().map(|(head, _)| head.to_string()).collect();
        Self { sides: columns.iter().map(|(_, side)| *side).collect(), rows: vec![heads], heads: true }
    }

    /// Name and value, without heads.
    pub fn of_facts() -> Self {
        Self { sides: vec![Side::Left, Side::Left], rows: Vec::new(), heads: false }
    }

    /// Adds a row. Cells are made harmless here.
    pub fn row<const N: usize>(&mut self, cells: [String; N]) -> &mut Self {
        self.rows.push(cells.iter().map(|cell| text::visible(cell)).collect());
        self
    }

    /// Adds a name and its value.
    pub fn fact(&mut self, name: &str, value: impl ToString) -> &mut Self {
        self.row([name.to_string(), value.to_string()])
    }

    /// The lines, each at most [`COLUMNS`] wide.
    pub fn lines(&self) -> Vec<String> {
        let widths = self.widths();
        let mut lines: Vec<String> = self.rows.iter().map(|row| self.line(row, &widths)).collect();
        if self.heads {
            lines.insert(1, "-".repeat(widths.iter().sum::<usize>() + GAP * widths.len().saturating_sub(1)));
        }
        lines
    }

    /// Writes the lines.
    pub fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        self.lines().iter().try_for_each(|line| writeln!(out, "{line}"))
    }

    fn widths(&self) -> Vec<usize> {
        let cell = |row: &Vec<String>, i: usize| row.get(i).map_or(0, |c| text::width(c));
        let mut widths: Vec<usize> =
            (0..self.sides.len()).map(|i| self.rows.iter().map(|row| cell(row, i)).max().unwrap_or(0)).collect();
        let room = COLUMNS.saturating_sub(GAP * widths.len().saturating_sub(1));
        while widths.iter().sum::<usize>() > room {
            // The widest text column gives way; numbers are never cut unless there is nothing else.
            let widest = |side: Option<Side>| {
                (0..widths.len()).filter(|i| side.is_none_or(|s| self.sides.get(*i) == Some(&s))).max_by_key(|i| widths.get(*i))
            };
            let Some(width) = widest(Some(Side::Left)).or_else(|| widest(None)).and_then(|i| widths.get_mut(i)) else { break };
            if *width == 0 {
                break;
            }
            *width -= 1;
        }
        widths
    }

    fn line(&self, row: &[String], widths: &[usize]) -> String {
        let cells = row.iter().zip(widths).zip(&self.sides).map(|((cell, width), side)| {
            let cell = text::fit(cell, *width);
            let space = " ".repeat(width.saturating_sub(text::width(&cell)));
            match side {
                Side::Left => cell + &space,
                Side::Right => space + &cell,
            }
        });
        cells.collect::<Vec<_>>().join(&" ".repeat(GAP)).trim_end().to_string()
    }
}

/// 1234567 → `1,234,567`.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A number of things: `1 shard`, `2 shards`.
pub fn plural(n: u64, thing: &str) -> String {
    format!("{} {thing}{}", count(n), if n == 1 { "" } else { "s" })
}

/// Bytes in the largest binary unit below them.
pub fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let unit_name = UNITS.get(unit).copied().unwrap_or("B");
    if unit == 0 { format!("{n} B") } else { format!("{value:.1} {unit_name}") }
}

/// A probability as per cent; so small ones that they would read 0 are said to be below the last digit.
pub fn percent(p: f64) -> String {
    if p.is_nan() {
        "-".into()
    } else if p > 0.0 && p < 0.0001 {
        "<0.01%".into()
    } else {
        format!("{:.2}%", p * 100.0)
    }
}

/// Seconds as `12.3 s`, `4 min 05 s` or `3 h 07 min`.
pub fn duration(seconds: f64) -> String {
    let whole = if seconds.is_finite() && seconds > 0.0 { seconds.round() as u64 } else { 0 };
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// A rate, or a dash when nothing was timed.
pub fn rate(n: u64, seconds: f64, unit: &str) -> String {
    if n == 0 || seconds.is_nan() || seconds <= 0.0 {
        "-".into()
    } else {
        format!("{} {unit}/s", count((n as f64 / seconds) as u64))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!([count(0), count(999), count(1000), count(1_234_567)], ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([bytes(1023), bytes(1024), bytes(3 << 30)], ["1023 B", "1.0 KiB", "3.0 GiB"]);
        assert_eq!([percent(1.0), percent(0.12345), percent(1e-9), percent(0.0)], ["100.00%", "12.35%", "<0.01%", "0.00%"]);
        assert_eq!(
            [duration(1.26), duration(59.9), duration(125.0), duration(7260.0)],
            ["1.3 s", "1 min 00 s", "2 min 05 s", "2 h 01 min"]
        );
    }

    #[test]
    fn tables_fit_and_keep_numbers() {
        let mut table = Table::with_heads(&[("file", Side::Left), ("rows", Side::Right), ("problem", Side::Left)]);
        table.row(["x".repeat(70), count(123_456), "中".repeat(40)]);
        table.row(["short\u{1b}[31m".into(), count(7), String::new()]);
        let lines = table.lines();
        assert_eq!(lines.len(), 4);
        assert!(lines.iter().all(|line| text::width(line) <= COLUMNS), "{lines:#?}");
        assert!(lines[2].contains("123,456") && lines[3].contains("      7"), "{lines:#?}");
        assert!(lines[3].starts_with("short\\u{1b}[31m"), "{lines:#?}");
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::with_heads(&[("a", Side::Left), ("n", Side::Right)]);
        table.row(["中文".into(), "10".into()]).row(["abc".into(), "5".into()]);
        assert_eq!(table.lines(), ["a      n", "--------", "中文  10", "abc    5"]);
    }
}
