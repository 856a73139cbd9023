//! The conversations of a page as JSON of small numbers, which compress well.
//!
//! ```text
//! { "texts": [ "the", ["", "\\xE4\\xBD"], ... ],          texts and, at odd places of a list, escapes
//!   "rows": [ { "row", "seq", "key", "perplexity", "came", "entropy",
//!               "text":   [ number of a text, one a token ],
//!               "runs":   [ first scored position, how many, first, how many, ... ],
//!               "next":   [ probability of what came, one a scored position ],
//!               "rank":   [ its place among the kept, 0 for none ],
//!               "nats":   [ entropy, hundredths ],
//!               "tail":   [ probability of the tail ],
//!               "kept":   [ entries that follow, text, probability, text, probability, ... ] } ] }
//! ```
//!
//! Probabilities are in units of 1/10,000. One that counts estimate is -1 less its value; one that is not known is null.

use super::super::conversation::{Conversation, Distribution};
use super::super::vocabulary::Vocabulary;
use crate::text::{self, Part};
use potstill_cache::{Cache, Summary};
use serde::Serialize;
use std::collections::{BTreeSet, HashMap};

#[derive(Serialize)]
struct Payload {
    texts: Vec<Text>,
    rows: Vec<Row>,
}

/// Text alone, or text and escapes in turns.
#[derive(Serialize, Clone, PartialEq, Eq, Hash)]
#[serde(untagged)]
enum Text {
    Plain(String),
    Mixed(Vec<String>),
}

#[derive(Serialize)]
struct Row {
    row: u64,
    seq: u64,
    key: String,
    perplexity: Option<f64>,
    came: Option<f64>,
    entropy: Option<f64>,
    text: Vec<u32>,
    runs: Vec<usize>,
    next: Vec<Option<i32>>,
    rank: Vec<u32>,
    nats: Vec<Option<i32>>,
    tail: Vec<i32>,
    kept: Vec<i64>,
}

/// The rows of a page with at most `most` conversations: the most surprising ones, and others evenly spaced, in row order.
pub fn chosen(cache: &Cache, figures: &Summary, most: u64) -> Vec<u64> {
    let ranked = figures.distributions.as_ref().and_then(|d| d.kept.as_ref()).map(|kept| kept.most_surprising.as_slice());
    let mut rows: BTreeSet<u64> = ranked.unwrap_or_default().iter().map(|row| row.row).take(most as usize).collect();
    let wanted = most.min(cache.len());
    let evenly = |i: u64| (u128::from(i) * u128::from(cache.len()) / u128::from(wanted.max(1))) as u64;
    for row in (0..wanted).map(evenly).chain(0..cache.len()) {
        if rows.len() as u64 >= wanted {
            break;
        }
        rows.insert(row);
    }
    rows.into_iter().collect()
}

/// The JSON of these rows, with at most `top` alternatives at a position.
pub fn of(cache: &Cache, rows: &[u64], vocabulary: &Vocabulary, top: usize) -> anyhow::Result<String> {
    let mut texts = Texts::default();
    let mut told = Vec::with_capacity(rows.len());
    for &row in rows {
        let conversation = Conversation::of(row, &cache.row(row)?, |id| vocabulary.bytes(id));
        told.push(texts.row(&conversation, vocabulary, top));
    }
    Ok(serde_json::to_string(&Payload { texts: texts.all, rows: told })?)
}

/// Every text once, with its number.
#[derive(Default)]
struct Texts {
    all: Vec<Text>,
    numbers: HashMap<Text, u32>,
}

impl Texts {
    fn number(&mut self, before: &[u8], bytes: &[u8]) -> u32 {
        let text = Text::of(text::parts(before, bytes));
        if let Some(&number) = self.numbers.get(&text) {
            return number;
        }
        let number = self.all.len() as u32;
        self.all.push(text.clone());
        self.numbers.insert(text, number);
        number
    }

    fn row(&mut self, conversation: &Conversation, vocabulary: &Vocabulary, top: usize) -> Row {
        let figures = conversation.figures.as_ref();
        let mut row = Row {
            row: conversation.row,
            seq: conversation.seq_id,
            key: conversation.key.clone(),
            perplexity: figures.map(|f| f.perplexity_at_least),
            came: figures.map(|f| f.top1_is_next),
            entropy: figures.map(|f| f.mean_entropy),
            text: Vec::with_capacity(conversation.positions.len()),
            runs: Vec::new(),
            next: Vec::new(),
            rank: Vec::new(),
            nats: Vec::new(),
            tail: Vec::new(),
            kept: Vec::new(),
        };
        for position in &conversation.positions {
            row.text.push(self.number(&position.before, &position.bytes));
            let Some(after) = &position.after else { continue };
            match row.runs.as_mut_slice() {
                [.., first, many] if *first + *many == position.position => *many += 1,
                _ => row.runs.extend([position.position, 1]),
            }
            let before = text::unfinished(&position.before, &position.bytes);
            self.distribution(&mut row, after, &before, vocabulary, top);
        }
        row
    }

    fn distribution(&mut self, row: &mut Row, after: &Distribution, before: &[u8], vocabulary: &Vocabulary, top: usize) {
        row.next.push(after.next_probability.map(exact).or(after.next_estimate.map(estimated)));
        row.rank.push(after.next_rank.unwrap_or(0));
        row.nats.push(after.entropy.map(|nats| (nats * 100.0).round() as i32));
        row.tail.push(exact(after.tail_probability));
        let kept = after.kept.iter().map(|kept| (kept.id, exact(kept.probability)));
        let drawn = after.drawn.iter().map(|drawn| (drawn.id, estimated(drawn.estimate)));
        let shown: Vec<(u32, i32)> = kept.chain(drawn).take(top).collect();
        row.kept.push(shown.len() as i64);
        for (id, probability) in shown {
            let number = self.number(before, &vocabulary.bytes(id));
            row.kept.extend([i64::from(number), i64::from(probability)]);
        }
    }
}

impl Text {
    fn of(parts: Vec<Part>) -> Self {
        match parts.as_slice() {
            [] => return Text::Plain(String::new()),
            [Part::Text(text)] => return Text::Plain(text.clone()),
            _ => {}
        }
        let mut mixed = Vec::with_capacity(parts.len() + 1);
        for part in parts {
            let even = mixed.len().is_multiple_of(2);
            match part {
                Part::Text(text) if even => mixed.push(text),
                Part::Escape(shown) if !even => mixed.push(shown),
                Part::Text(text) => mixed.extend([String::new(), text]),
                Part::Escape(shown) => mixed.extend([String::new(), shown]),
            }
        }
        Text::Mixed(mixed)
    }
}

/// A probability in units of 1/10,000.
fn exact(probability: f64) -> i32 {
    (probability * 1e4).round() as i32
}

/// One that counts estimate.
fn estimated(probability: f64) -> i32 {
    -1 - exact(probability)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn texts_and_escapes_take_turns() {
        let json = |bytes: &[u8]| serde_json::to_string(&Text::of(text::parts(&[], bytes))).expect("JSON");
        assert_eq!(json(b" the\n"), r#"" the\n""#);
        assert_eq!(json(b""), r#""""#);
        assert_eq!(json(b"a\tb"), r#"["a","\\t","b"]"#);
        assert_eq!(json(b"\xe4\xbd"), r#"["","\\xE4\\xBD"]"#);
        assert_eq!(json("\t\u{202e}x".as_bytes()), r#"["","\\t","","\\u{202e}","x"]"#);
    }

    #[test]
    fn estimates_are_told_from_exact_numbers() {
        assert_eq!((exact(0.25), estimated(0.25), estimated(0.0), exact(1.0)), (2500, -2501, -1, 10000));
    }
}
