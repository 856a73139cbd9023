//! Tests of a conversation as text to read.
#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::*;
use potstill_cache::{Record, SoftTargets};

/// A conversation of these tokens; each but the first was expected with the probability beside it, or not scored.
fn of(tokens: &[(&[u8], Option<f32>)]) -> Conversation {
    let mut targets = SoftTargets::default();
    let mut positions = Vec::new();
    for (next, (_, probability)) in tokens.iter().enumerate().skip(1) {
        if let Some(p) = probability {
            // A token of probability 0 is one that was not kept.
            let (id, kept) = if *p > 0.0 { (next as u32, *p) } else { (9999, 0.5) };
            targets.push(&[id], &[kept.ln()], 0.25f32.ln());
            positions.push(next as u32 - 1);
        }
    }
    let input_ids = (0..tokens.len() as u32).collect();
    let record = Record { seq_id: 0, input_ids, positions, targets, codec: Default::default() };
    Conversation::of(0, &record, |id| tokens.get(id as usize).map(|(bytes, _)| bytes.to_vec()).unwrap_or_default())
}

fn shown(conversation: &Conversation, ink: Ink) -> Vec<String> {
    let mut out = Vec::new();
    ink.write_all(&lines(conversation, ink), &mut out).expect("memory");
    // Legend and blank line apart.
    String::from_utf8(out).expect("UTF-8").lines().skip(2).map(String::from).collect()
}

#[test]
fn levels_are_powers_of_ten_below_a_half() {
    let levels = [1.0, 0.5, 0.49, 0.1, 0.09, 0.01, 0.009, 0.001, 0.0009, 0.0].map(|p| level(Some(p)));
    assert_eq!(levels, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]);
    assert_eq!(level(None), 4);
}

#[test]
fn blocks_and_colours_say_the_same() {
    let row = of(&[
        (b"ask", None),
        (b" one", Some(0.75)),
        (b" two", Some(0.25)),
        (b"!", Some(0.0)),
        (b"\n", Some(0.005)),
        (b"end", None),
    ]);
    assert_eq!(shown(&row, Ink::Plain), ["ask one two!⏎", "   ▁▁▁▁▂▂▂▂█▆", "end"]);
    let coloured = shown(&row, Ink::Colours);
    // Faint what was not scored, plain what was expected, then rising levels; as text the same.
    let expected = "\u{1b}[2mask\u{1b}[0m one\u{1b}[38;5;16;48;5;230m two\u{1b}[0m\u{1b}[38;5;231;48;5;160m!\u{1b}[0m\u{1b}[38;5;16;48;5;215m⏎\u{1b}[0m";
    assert_eq!(coloured, [expected, "\u{1b}[2mend\u{1b}[0m"]);
}

#[test]
fn a_split_character_stands_once_and_is_as_surprising_as_its_worst_part() {
    let smile = "🙂".as_bytes();
    let row =
        of(&[(b"a", None), (&smile[..2], Some(0.75)), (&smile[2..3], Some(0.0)), (&smile[3..], Some(0.75)), (b"b", Some(0.75))]);
    assert_eq!(shown(&row, Ink::Plain), ["a🙂b", " ██▁"]);
    // One that is never ended is shown as its bytes.
    let row = of(&[(b"a", None), (&smile[..2], Some(0.75))]);
    assert_eq!(shown(&row, Ink::Plain), [r"a\xF0\x9F", " ▁▁▁▁▁▁▁▁"]);
}

#[test]
fn lines_break_after_spaces_and_never_pass_80_columns() {
    let long = "x".repeat(200);
    for text in [
        "word ".repeat(60),
        format!("short {long} after"),
        "中".repeat(90),
        format!("{} \u{1d173}\u{202e}", "y".repeat(78)),
        " ".repeat(170),
    ] {
        let row = of(&[(b"?", None), (text.as_bytes(), Some(0.75))]);
        let found = shown(&row, Ink::Plain);
        assert!(found.iter().all(|line| text::width(line) <= COLUMNS), "{found:#?}");
        let letters: String = found.iter().step_by(2).flat_map(|line| line.chars()).filter(|c| !c.is_whitespace()).collect();
        let expected: String = text::visible(&format!("?{text}")).chars().filter(|c| !c.is_whitespace()).collect();
        // Lines of blocks stand between the lines of text, but for lines of spaces.
        assert!(text.trim().is_empty() || letters == expected, "{found:#?}");
    }
    let row = of(&[(b"a combining mark: e", None), ("\u{301}".as_bytes(), Some(0.75)), (b"!", Some(0.75))]);
    assert_eq!(shown(&row, Ink::Plain), ["a combining mark: e\u{301}!", &format!("{}▁", " ".repeat(19))]);
}
