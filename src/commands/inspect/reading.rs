//! A conversation as text to read, each token shaded by how it surprised the teacher. Without colours the same is said by a line of
//! blocks under each line of text: the taller, the more surprising; none where nothing was scored.

use super::conversation::{Conversation, Position};
use crate::ink::{Ink, LEVELS, Line, Shade};
use crate::print::COLUMNS;
use crate::text;

/// A token of at least this probability has the level of its place; one below all of them, or not kept, the last.
const AT_LEAST: [f64; LEVELS - 1] = [0.5, 0.1, 0.01, 0.001];
/// What a level looks like under the text.
const MARKS: [&str; LEVELS] = ["▁", "▂", "▄", "▆", "█"];
/// What stands for a line break.
const BREAK: &str = "⏎";

/// How surprising a token of this probability is.
pub fn level(probability: Option<f64>) -> usize {
    probability.and_then(|p| AT_LEAST.iter().position(|&least| p >= least)).unwrap_or(LEVELS - 1)
}

/// What stands at one place of a line: a character, with marks that sit on it, or an escape.
#[derive(Debug, Clone)]
struct Cell {
    shown: String,
    /// Absent where nothing was scored.
    level: Option<usize>,
    space: bool,
    ends_line: bool,
}

/// The lines of the text, with the legend before them.
pub fn lines(conversation: &Conversation, ink: Ink) -> Vec<Line> {
    let mut lines = vec![legend(ink), Line::default()];
    for row in wrapped(cells(&conversation.positions)) {
        lines.push(text_line(&row));
        let marks = marks_line(&row);
        if ink == Ink::Plain && marks.width() > 0 {
            lines.push(marks);
        }
    }
    lines
}

fn legend(ink: Ink) -> Line {
    let mut line = Line::of(Shade::Plain, "p(token)");
    let names = ["50% and more", "10%", "1%", "0.1%", "less, or not kept"];
    for (level, (name, mark)) in names.into_iter().zip(MARKS).enumerate() {
        line.push(Shade::Plain, "  ");
        match ink {
            Ink::Colours => line.push(Shade::Surprise(level), format!(" {name} ")),
            Ink::Plain => line.push(Shade::Plain, format!("{mark} {name}")),
        }
    }
    line
}

/// A character takes the highest level of the tokens that make it up.
fn cells(positions: &[Position]) -> Vec<Cell> {
    let mut cells: Vec<Cell> = Vec::new();
    let mut unfinished: (Vec<u8>, Option<usize>) = (Vec::new(), None);
    for position in positions {
        let level = position.level.max(if unfinished.0.is_empty() { None } else { unfinished.1 });
        let bytes = [unfinished.0.as_slice(), &position.bytes].concat();
        let left = text::unfinished(&[], &bytes);
        let whole = bytes.get(..bytes.len() - left.len()).unwrap_or_default();
        for chunk in whole.utf8_chunks() {
            chunk.valid().chars().for_each(|c| push(&mut cells, c, level));
            let bytes = chunk.invalid().iter().map(|byte| format!("\\x{byte:02X}"));
            cells.extend(bytes.map(|shown| Cell { shown, level, space: false, ends_line: false }));
        }
        unfinished = (left, level);
    }
    let bytes = unfinished.0.iter().map(|byte| format!("\\x{byte:02X}"));
    cells.extend(bytes.map(|shown| Cell { shown, level: unfinished.1, space: false, ends_line: false }));
    cells
}

fn push(cells: &mut Vec<Cell>, c: char, level: Option<usize>) {
    let ends_line = c == '\n';
    let shown = if ends_line { BREAK.to_string() } else { text::visible(c.encode_utf8(&mut [0; 4])) };
    match cells.last_mut() {
        // A combining mark belongs to what it sits on.
        Some(last) if text::width(&shown) == 0 && !last.ends_line && last.shown.len() < 64 => last.shown.push_str(&shown),
        _ => cells.push(Cell { shown, level, space: c == ' ', ends_line }),
    }
}

/// Lines of at most [`COLUMNS`], broken after spaces where there are any.
fn wrapped(cells: Vec<Cell>) -> Vec<Vec<Cell>> {
    let mut rows = Vec::new();
    let (mut row, mut used, mut after_space): (Vec<Cell>, usize, usize) = (Vec::new(), 0, 0);
    for cell in cells {
        let width = text::width(&cell.shown);
        // The space after a full line is its end.
        if used + width > COLUMNS && cell.space {
            rows.push(std::mem::take(&mut row));
            (used, after_space) = (0, 0);
            continue;
        }
        while used + width > COLUMNS && !row.is_empty() {
            let rest = if after_space > 0 { row.split_off(after_space) } else { Vec::new() };
            rows.push(std::mem::replace(&mut row, rest));
            used = row.iter().map(|cell| text::width(&cell.shown)).sum();
            after_space = 0;
        }
        let (space, ends) = (cell.space, cell.ends_line);
        used += width;
        row.push(cell);
        if space {
            after_space = row.len();
        }
        if ends {
            rows.push(std::mem::take(&mut row));
            (used, after_space) = (0, 0);
        }
    }
    if !row.is_empty() {
        rows.push(row);
    }
    rows
}

fn text_line(row: &[Cell]) -> Line {
    let mut line = Line::default();
    for cells in row.chunk_by(|a, b| a.level == b.level && a.ends_line == b.ends_line) {
        let shade = match cells.first() {
            Some(Cell { level: Some(level), .. }) => Shade::Surprise(*level),
            _ => Shade::Faint,
        };
        line.push(shade, cells.iter().map(|cell| cell.shown.as_str()).collect::<String>());
    }
    line
}

fn marks_line(row: &[Cell]) -> Line {
    let mark = |cell: &Cell| match cell.level.and_then(|level| MARKS.get(level)) {
        Some(mark) => mark.repeat(text::width(&cell.shown)),
        None => " ".repeat(text::width(&cell.shown)),
    };
    let marks: String = row.iter().map(mark).collect();
    match marks.trim_end() {
        "" => Line::default(),
        marks => Line::of(Shade::Bar, marks),
    }
}

#[cfg(test)]
#[path = "reading_tests.rs"]
mod tests;
