//! Text from outside, made fit for a terminal: nothing printed can move the cursor, change a colour or reorder a line.
//!
//! Model output, chats and file names are hostile; every one of them passes through here before it is shown.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// What stands for a space at places where it must be seen.
const SPACE: char = '␣';
/// What carries a combining mark that has no letter to sit on.
const CARRIER: char = '◌';

/// `text` with every control, format and direction character written as an escape. Letters, spaces and marks stay.
pub fn visible(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        push_visible(&mut out, c);
        out
    })
}

/// A token as it is shown alone: as [`visible`], spaces drawn, a backslash doubled (so that every escape is one), a leading
/// combining mark given something to sit on, and nothing at all shown as `(empty)`.
pub fn token(text: &str) -> String {
    if text.is_empty() {
        return "(empty)".into();
    }
    let mut out = String::with_capacity(text.len() + 4);
    if text.chars().next().is_some_and(|c| c.width() == Some(0) && !must_escape(c)) {
        out.push(CARRIER);
    }
    for c in text.chars() {
        match c {
            ' ' => out.push(SPACE),
            '\\' => out.push_str("\\\\"),
            other => push_visible(&mut out, other),
        }
    }
    out
}

/// Columns `text` takes on a terminal; wide (CJK) characters take two.
pub fn width(text: &str) -> usize {
    text.width()
}

/// `text` cut to at most `columns` columns, the cut shown by `…`.
pub fn fit(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_string();
    }
    let mut out = String::new();
    let mut used = 0;
    for c in text.chars() {
        let wide = c.width().unwrap_or(0);
        if used + wide + 1 > columns {
            break;
        }
        used += wide;
        out.push(c);
    }
    if columns > 0 {
        out.push('…');
    }
    out
}

fn push_visible(out: &mut String, c: char) {
    match c {
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        c if must_escape(c) => out.extend(c.escape_unicode()),
        c => out.push(c),
    }
}

/// Control characters (C0, DEL, C1), line separators, invisible format characters, direction changes, variation selectors,
/// tags and private characters: all that a reader cannot see or that acts on what stands around it.
fn must_escape(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{00ad}' | '\u{034f}' | '\u{061c}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}'
            | '\u{e000}'..='\u{f8ff}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffb}'
            | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{10ffff}')
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn nothing_that_acts_on_a_terminal_survives() {
        let hostile = "\u{1b}]0;title\u{7}\u{9b}31m a\u{202e}b\u{200b}\r\n\t\u{7f}\u{2028}\u{feff}\u{e0041}";
        let shown = visible(hostile);
        assert!(shown.chars().all(|c| !must_escape(c)), "{shown}");
        assert_eq!(visible("a\tb\n"), "a\\tb\\n");
        assert_eq!(visible("\u{1b}[0m"), "\\u{1b}[0m");
    }

    #[test]
    fn letters_and_marks_stay() {
        for kept in ["naïve café", "中文字符", "नमस्ते", "Ünïcödé 🙂", "e\u{301}"] {
            assert_eq!(visible(kept), kept);
        }
    }

    #[test]
    fn tokens_show_spaces_and_lone_marks() {
        assert_eq!(token(" the"), "␣the");
        assert_eq!(token("\\n\n"), "\\\\n\\n");
        assert_eq!(token("\u{301}"), "◌\u{301}");
        assert_eq!(token(""), "(empty)");
    }

    #[test]
    fn wide_characters_count_two_columns_and_are_never_cut_in_half() {
        assert_eq!(width("中文"), 4);
        assert_eq!(fit("中文字", 6), "中文字");
        assert_eq!(fit("中文字", 5), "中文…");
        assert_eq!(fit("中文字", 4), "中…");
        for columns in 0..12 {
            assert!(width(&fit("a中b文c字d", columns)) <= columns);
        }
    }
}
