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

/// A token of bytes as it is shown alone, after `before`, the bytes of a character that the tokens before it left unfinished. Bytes
/// that are no whole character are shown as `\xE4`; those that end a character are followed by a space and that character.
pub fn piece(before: &[u8], bytes: &[u8]) -> String {
    let mut out = String::new();
    let rest = match character_ended(before, bytes) {
        Some((c, end, rest)) => {
            escape_bytes(&mut out, end);
            out.push(' ');
            out.push_str(&token(c.encode_utf8(&mut [0; 4])));
            rest
        }
        None => bytes,
    };
    if rest.is_empty() && out.is_empty() {
        return token("");
    }
    for chunk in rest.utf8_chunks() {
        if !chunk.valid().is_empty() {
            out.push_str(&token(chunk.valid()));
        }
        escape_bytes(&mut out, chunk.invalid());
    }
    out
}

/// JSON with every character that acts on a terminal written as `\u202e`. Such characters stand in strings alone.
pub fn json(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if must_escape(c) {
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
        } else {
            out.push(c);
        }
    }
    out
}

/// A stretch of text as a page shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Letters, spaces and line breaks as they are.
    Text(String),
    /// What is written as an escape in place of a character or byte.
    Escape(String),
}

/// As [`piece`], with spaces and line breaks as they are, and told apart from escapes.
pub fn parts(before: &[u8], bytes: &[u8]) -> Vec<Part> {
    let mut parts = Vec::new();
    let rest = match character_ended(before, bytes) {
        Some((c, end, rest)) => {
            let mut shown = String::new();
            escape_bytes(&mut shown, end);
            parts.push(Part::Escape(shown));
            push_part(&mut parts, c);
            rest
        }
        None => bytes,
    };
    for chunk in rest.utf8_chunks() {
        chunk.valid().chars().for_each(|c| push_part(&mut parts, c));
        if !chunk.invalid().is_empty() {
            let mut shown = String::new();
            escape_bytes(&mut shown, chunk.invalid());
            parts.push(Part::Escape(shown));
        }
    }
    parts
}

fn push_part(parts: &mut Vec<Part>, c: char) {
    if c != '\n' && must_escape(c) {
        let mut shown = String::new();
        push_visible(&mut shown, c);
        parts.push(Part::Escape(shown));
    } else if let Some(Part::Text(text)) = parts.last_mut() {
        text.push(c);
    } else {
        parts.push(Part::Text(c.into()));
    }
}

/// The character that `before` began and `bytes` ends, what of `bytes` it took, and the rest.
fn character_ended<'a>(before: &[u8], bytes: &'a [u8]) -> Option<(char, &'a [u8], &'a [u8])> {
    if before.is_empty() {
        return None;
    }
    let whole = [before, bytes].concat();
    let c = whole.utf8_chunks().next()?.valid().chars().next()?;
    let (end, rest) = bytes.split_at_checked(c.len_utf8().checked_sub(before.len())?)?;
    Some((c, end, rest))
}

/// What of `before` and then `bytes` is the beginning of a character that has not come to its end.
pub fn unfinished(before: &[u8], bytes: &[u8]) -> Vec<u8> {
    let whole = [before, bytes].concat();
    let last = whole.utf8_chunks().last().map(|chunk| chunk.invalid()).unwrap_or_default();
    match std::str::from_utf8(last) {
        Err(e) if e.error_len().is_none() => last.to_vec(),
        _ => Vec::new(),
    }
}

fn escape_bytes(out: &mut String, bytes: &[u8]) {
    bytes.iter().for_each(|byte| out.push_str(&format!("\\x{byte:02X}")));
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
    fn characters_split_over_tokens_are_shown_where_they_end() {
        let you = "你".as_bytes();
        assert_eq!(piece(&[], &you[..2]), "\\xE4\\xBD");
        let before = unfinished(&[], &you[..2]);
        assert_eq!((before.as_slice(), piece(&before, &you[2..])), (&you[..2], "\\xA0 你".to_string()));
        assert!(unfinished(&before, &you[2..]).is_empty());
        // One byte at a time, with text before and after.
        let smile = "🙂".as_bytes();
        let mut before = unfinished(&[], &[b" a", &smile[..1]].concat());
        assert_eq!((piece(&[], &[b" a", &smile[..1]].concat()), before.as_slice()), ("␣a\\xF0".to_string(), &smile[..1]));
        for (i, shown) in [(1, "\\x9F"), (2, "\\x99")] {
            assert_eq!(piece(&before, &smile[i..=i]), shown);
            before = unfinished(&before, &smile[i..=i]);
        }
        assert_eq!(piece(&before, &[&smile[3..], b" b\n"].concat()), "\\x82 🙂␣b\\n");
        // What does not go on with the character is shown as it is, and bytes that can begin none are not waited for.
        assert_eq!(piece(&before, b"x"), "x");
        assert_eq!((unfinished(&before, b"x"), unfinished(&[], b"\xff"), unfinished(&[], b"\x80")), (vec![], vec![], vec![]));
        assert_eq!((piece(&[], b"\xff\\x41"), piece(&[], b"")), ("\\xFF\\\\x41".to_string(), "(empty)".to_string()));
        let text = |text: &str| Part::Text(text.into());
        let escape = |shown: &str| Part::Escape(shown.into());
        assert_eq!(parts(&before, &[&smile[3..], b" b\n"].concat()), [escape("\\x82"), text("🙂 b\n")]);
        let hostile = "a\u{202e}</script>\u{2028}\t".as_bytes();
        assert_eq!(parts(&[], hostile), [text("a"), escape("\\u{202e}"), text("</script>"), escape("\\u{2028}"), escape("\\t")]);
        assert_eq!((parts(&[], b""), parts(&[], b"x\xff")), (vec![], vec![text("x"), escape("\\xFF")]));
        // What ends may be a character that acts on a terminal.
        assert_eq!(piece(&[0xe2, 0x80], &[0xae]), "\\xAE \\u{202e}");
    }

    #[test]
    fn json_means_the_same_when_it_is_harmless() {
        let hostile = "a\u{202e}\u{1b}\u{9b}\u{e0041}\u{7f} 中\\\"";
        let written = json(&serde_json::to_string(hostile).expect("JSON"));
        assert!(written.chars().all(|c| !must_escape(c)), "{written}");
        assert!(written.contains("a\\u202e\\u001b\\u009b\\udb40\\udc41\\u007f 中"), "{written}");
        assert_eq!(serde_json::from_str::<String>(&written).expect("JSON"), hostile);
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
