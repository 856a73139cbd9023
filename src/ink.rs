//! Lines of shaded text. Layout counts columns before any colour is there, so a line is as wide with colours as without; what a
//! shade says, the text beside it says too.

use crate::print::Table;
use crate::text;
use std::io::Write;

/// Levels of surprise, 0 for none to the last for most.
pub const LEVELS: usize = 5;

/// How a piece of text stands out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shade {
    /// Not at all.
    Plain,
    /// A title.
    Strong,
    /// What may be passed over.
    Faint,
    /// The body of a plot.
    Bar,
    /// A surprise of this level.
    Surprise(usize),
}

/// A line of shaded pieces. Text from outside has been through [`crate::text`] before it comes here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Line(Vec<(Shade, String)>);

impl Line {
    /// A line of one piece.
    pub fn of(shade: Shade, text: impl Into<String>) -> Self {
        Self(vec![(shade, text.into())])
    }

    /// The lines of a table, none of it standing out.
    pub fn of_table(table: &Table) -> Vec<Self> {
        table.lines().into_iter().map(|line| Self::of(Shade::Plain, line)).collect()
    }

    /// With another piece at its end.
    pub fn then(mut self, shade: Shade, text: impl Into<String>) -> Self {
        self.push(shade, text);
        self
    }

    /// Adds a piece at the end.
    pub fn push(&mut self, shade: Shade, text: impl Into<String>) {
        self.0.push((shade, text.into()));
    }

    /// Columns it takes.
    pub fn width(&self) -> usize {
        self.0.iter().map(|(_, text)| text::width(text)).sum()
    }

    /// With spaces up to `columns`, and `other` after them.
    pub fn beside(mut self, columns: usize, other: Line) -> Self {
        self.push(Shade::Plain, " ".repeat(columns.saturating_sub(self.width())));
        self.0.extend(other.0);
        self
    }
}

/// Whether shades are colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ink {
    /// They are.
    Colours,
    /// Nothing but the text.
    Plain,
}

impl Ink {
    /// What stdout wants.
    pub fn of_stdout() -> Self {
        if crate::print::colours() { Ink::Colours } else { Ink::Plain }
    }

    /// Writes `line` without spaces at its end.
    pub fn write(self, line: &Line, out: &mut impl Write) -> std::io::Result<()> {
        let last = line.0.iter().rposition(|(_, text)| !text.trim_end_matches(' ').is_empty());
        for (i, (shade, text)) in line.0.iter().enumerate().take(last.map_or(0, |i| i + 1)) {
            // Coloured spaces at the end are seen.
            let trimmed = Some(i) == last && (self == Ink::Plain || shade.code().is_none());
            let shown = if trimmed { text.trim_end_matches(' ') } else { text };
            match (self, shade.code()) {
                (Ink::Colours, Some(code)) => write!(out, "\u{1b}[{code}m{shown}\u{1b}[0m")?,
                _ => write!(out, "{shown}")?,
            }
        }
        writeln!(out)
    }

    /// Writes lines.
    pub fn write_all(self, lines: &[Line], out: &mut impl Write) -> std::io::Result<()> {
        lines.iter().try_for_each(|line| self.write(line, out))
    }
}

impl Shade {
    /// The parameters of the escape sequence. Surprise sets both colours, so it reads on light and dark terminals alike.
    fn code(self) -> Option<&'static str> {
        const SURPRISE: [Option<&str>; LEVELS] =
            [None, Some("38;5;16;48;5;230"), Some("38;5;16;48;5;222"), Some("38;5;16;48;5;215"), Some("38;5;231;48;5;160")];
        match self {
            Shade::Plain => None,
            Shade::Strong => Some("1"),
            Shade::Faint => Some("2"),
            Shade::Bar => Some("36"),
            Shade::Surprise(level) => SURPRISE.get(level.min(LEVELS - 1)).copied().flatten(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn written(ink: Ink, line: &Line) -> String {
        let mut out = Vec::new();
        ink.write(line, &mut out).expect("memory");
        String::from_utf8(out).expect("UTF-8")
    }

    #[test]
    fn colours_add_nothing_but_escapes() {
        let line = Line::of(Shade::Strong, "中")
            .then(Shade::Surprise(0), "a")
            .then(Shade::Bar, "██")
            .beside(8, Line::of(Shade::Faint, "x"));
        assert_eq!((line.width(), written(Ink::Plain, &line).as_str()), (9, "中a██   x\n"));
        let coloured = written(Ink::Colours, &line);
        assert_eq!(coloured, "\u{1b}[1m中\u{1b}[0ma\u{1b}[36m██\u{1b}[0m   \u{1b}[2mx\u{1b}[0m\n");
    }

    #[test]
    fn no_line_ends_in_spaces() {
        let line = Line::of(Shade::Plain, "a  ").beside(9, Line::default());
        assert_eq!(written(Ink::Plain, &line), "a\n");
        assert_eq!(written(Ink::Colours, &Line::default()), "\n");
    }
}
