//! `--find TEXT`: which conversations contain a text, and what the teacher expected there.
//!
//! Tokens are searched as the bytes that they spell, one after another, so that a match may begin and end within tokens.

use super::conversation::Conversation;
use super::vocabulary::Vocabulary;
use crate::cli::{self, Manner};
use crate::commands::scanned;
use crate::exit::{Outcome, UsageError};
use crate::ink::{Ink, Line, Shade};
use crate::print::{self, COLUMNS};
use crate::text;
use potstill_cache::{Cache, Record};
use serde::Serialize;
use std::io::Write;
use std::ops::Range;

/// Conversations that are listed; the search ends there.
const LISTED: usize = 20;
/// Bytes of text shown before a match.
const BEFORE: usize = 24;
/// Bytes of text shown from a match on, at most.
const AFTER: usize = 160;
/// Tokens shown before the first match's own, and after them.
const TOKENS_AROUND: usize = 4;

/// What was found.
#[derive(Serialize)]
struct Found<'a> {
    find: &'a str,
    /// Whether the search ended before the last row.
    may_be_more: bool,
    rows: &'a [Hit],
    /// The first of them, token by token.
    conversation: &'a Conversation,
}

/// A conversation that contains the text.
#[derive(Debug, PartialEq, Serialize)]
struct Hit {
    row: u64,
    seq_id: u64,
    key: String,
    /// How often, without overlaps.
    times: usize,
    /// Positions of the first match's tokens: from, up to but without.
    first: Range<usize>,
    /// The text around it.
    around: String,
    /// Where in `around` the match begins, in bytes.
    #[serde(skip)]
    at: usize,
}

/// Looks for `wanted` and shows what was found.
pub fn run(cache: &Cache, wanted: &str, flags: &cli::Inspect, manner: Manner) -> anyhow::Result<Outcome> {
    if wanted.is_empty() {
        return Err(UsageError("--find: expected a text to look for, found none".into()).into());
    }
    let vocabulary = Vocabulary::required(cache)?;
    let look = |row, record: &Record| Hit::of(row, record, wanted, |id| vocabulary.bytes(id));
    let mut hits = scanned("searching", manner, |scan| potstill_cache::search(cache, LISTED + 1, scan, look))?;
    let may_be_more = hits.len() > LISTED;
    hits.truncate(LISTED);
    let Some(first) = hits.first() else {
        return Err(UsageError(format!("{}: no conversation contains {wanted:?}", flags.cache.display())).into());
    };
    let conversation = Conversation::of(first.row, &cache.row(first.row)?, |id| vocabulary.bytes(id));
    if manner.json {
        print::json(&Found { find: wanted, may_be_more, rows: &hits, conversation: &conversation })?;
        return Ok(Outcome::Done);
    }
    let (ink, mut out) = (Ink::of_stdout(), print::out());
    ink.write_all(&list(&hits, wanted, may_be_more), &mut out)?;
    ink.write_all(&[Line::default()], &mut out)?;
    ink.write_all(&conversation.head(), &mut out)?;
    ink.write_all(&[Line::default()], &mut out)?;
    // The first token's own chances stand in the line before it.
    let shown = first.first.start.saturating_sub(TOKENS_AROUND)..first.first.end + TOKENS_AROUND;
    conversation.write_positions(shown, flags.top, ink, &mut out)?;
    writeln!(out, "\nAll of it: potstill inspect {} --row {}", text::visible(&flags.cache.display().to_string()), first.row)?;
    out.flush()?;
    Ok(Outcome::Done)
}

fn list(hits: &[Hit], wanted: &str, may_be_more: bool) -> Vec<Line> {
    let rows = print::plural(hits.len() as u64, "conversation");
    let many = if may_be_more { format!("{rows} and perhaps in more") } else { rows };
    let title = text::fit(&format!("{} is in {many}", text::visible(&format!("{wanted:?}"))), COLUMNS);
    let mut lines = vec![Line::of(Shade::Strong, title), Line::default()];
    lines.push(Line::of(Shade::Faint, format!("{:>8} {:>6}  first", "row", "times")));
    for hit in hits {
        let numbers = format!("{:>8} {:>6}  ", hit.row, hit.times);
        let mut room = COLUMNS.saturating_sub(text::width(&numbers));
        let mut line = Line::of(Shade::Plain, numbers);
        let (before, rest) = hit.around.split_at_checked(hit.at).unwrap_or(("", &hit.around));
        let (there, after) = rest.split_at_checked(wanted.len()).unwrap_or((rest, ""));
        for (shade, part) in [(Shade::Faint, before), (Shade::Strong, there), (Shade::Faint, after)] {
            let shown = text::fit(&text::visible(part), room);
            room = room.saturating_sub(text::width(&shown));
            line.push(shade, shown);
        }
        lines.push(line);
    }
    lines
}

impl Hit {
    fn of(row: u64, record: &Record, wanted: &str, bytes_of: impl Fn(u32) -> Vec<u8>) -> Option<Self> {
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(record.input_ids.len()));
        for &id in &record.input_ids {
            bytes.extend(bytes_of(id));
            ends.push(bytes.len());
        }
        let places = places(&bytes, wanted.as_bytes());
        let &from = places.first()?;
        let to = from + wanted.len();
        // The token that holds a byte is the first one that ends after it.
        let holder = |byte: usize| ends.partition_point(|&end| end <= byte);
        // Whole characters before the match; behind it, the last one may be cut.
        let start = (from.saturating_sub(BEFORE)..=from).find(|&i| bytes.get(i).is_none_or(|b| b & 0xc0 != 0x80)).unwrap_or(from);
        let part = |range: Range<usize>| String::from_utf8_lossy(bytes.get(range).unwrap_or_default()).into_owned();
        let before = part(start..from);
        let after = part(to..to.saturating_add(AFTER).min(bytes.len()));
        Some(Self {
            row,
            seq_id: record.seq_id,
            key: record.key().to_string(),
            times: places.len(),
            first: holder(from)..holder(to.saturating_sub(1)) + 1,
            at: before.len(),
            around: format!("{before}{wanted}{after}"),
        })
    }
}

/// Where `wanted` (not empty) begins in `bytes`, matches not overlapping.
fn places(bytes: &[u8], wanted: &[u8]) -> Vec<usize> {
    let mut places = Vec::new();
    let mut from = 0;
    while let Some(at) = bytes.get(from..).and_then(|rest| rest.windows(wanted.len().max(1)).position(|part| part == wanted)) {
        places.push(from + at);
        from += at + wanted.len().max(1);
    }
    places
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use potstill_cache::SoftTargets;

    #[test]
    fn matches_begin_and_end_within_tokens() {
        assert_eq!(places(b"ababa", b"aba"), [0]);
        assert_eq!(places(b"aaaa", b"aa"), [0, 2]);
        assert_eq!(places(b"a", b"aa"), [0usize; 0]);
        let record = Record {
            seq_id: 9,
            input_ids: (0..5).collect(),
            positions: Vec::new(),
            targets: SoftTargets::default(),
            codec: Default::default(),
        };
        // 你 is split over two tokens.
        let spelled: [&[u8]; 5] = [b"say ", &[0xe4, 0xbd], &[0xa0, b'!'], b"", b" you"];
        let bytes_of = |id: u32| spelled[id as usize].to_vec();
        let hit = Hit::of(7, &record, "你! y", bytes_of).expect("found");
        assert_eq!((hit.row, hit.seq_id, hit.times, hit.first), (7, 9, 1, 1..5));
        assert_eq!((hit.around.as_str(), hit.at), ("say 你! you", 4));
        assert_eq!(Hit::of(7, &record, "ay", bytes_of).expect("found").first, 0..1);
        assert_eq!(Hit::of(7, &record, "Say", bytes_of), None);
    }
}
