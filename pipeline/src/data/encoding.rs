//! A conversation's tokens and which of them are scored.
//!
//! The rendered text is encoded as a whole (a token may straddle a header and a content), nothing is added, and a token is
//! scored when its bytes overlap a span. Truncation cuts whole trailing turns, or tokens on the right.

use super::spans::{Marked, Span};
use super::{ChatTokenizer, DataError, Message, Role, Truncation};

/// An encoded conversation; the three lists have one entry a token.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Encoded {
    /// Tokens.
    pub ids: Vec<u32>,
    /// Whether the token overlaps a span, end marker included.
    pub scored: Vec<bool>,
    /// For each span: how many tokens there are up to the last one that overlaps its content.
    pub content_ends: Vec<usize>,
}

impl Encoded {
    /// Whether a position has something to predict: a scored token that is not the first.
    pub(super) fn is_trainable(&self) -> bool {
        self.scored.iter().skip(1).any(|&scored| scored)
    }

    fn cut(&mut self, length: usize) {
        self.ids.truncate(length);
        self.scored.truncate(length);
    }
}

/// An encoded conversation within the limit.
#[derive(Debug)]
pub(super) struct Fitted {
    /// What is left.
    pub encoded: Encoded,
    /// Tokens cut away.
    pub cut: usize,
}

/// Encodes `messages` whole.
pub(super) fn encode(tokenizer: &ChatTokenizer, messages: &[Message]) -> Result<Encoded, DataError> {
    let Marked { text, spans } = tokenizer.marked(messages)?;
    let (ids, offsets) = tokenizer.encode_text(&text)?;
    let scored = offsets.iter().map(|&token| overlaps(token, &spans, |span| span.content.start..span.end)).collect();
    let end = |span: &Span| offsets.partition_point(|&(start, _)| start < span.content.end);
    Ok(Encoded { ids, scored, content_ends: spans.iter().map(end).collect() })
}

/// Whether a token's bytes overlap one of the rising, disjoint spans; a token without bytes overlaps none.
fn overlaps((start, end): (usize, usize), spans: &[Span], range: impl Fn(&Span) -> std::ops::Range<usize>) -> bool {
    let next = spans.partition_point(|span| range(span).end <= start);
    start < end && spans.get(next..).unwrap_or_default().iter().map(range).find(|r| !r.is_empty()).is_some_and(|r| r.start < end)
}

/// Encodes `messages` within `max_length` tokens.
///
/// `Turns` re-renders ever shorter conversations that end with an assistant message and takes the longest that fits; when
/// not even the shortest does, the whole one is cut on the right.
pub(super) fn fit(
    tokenizer: &ChatTokenizer,
    messages: &[Message],
    max_length: usize,
    truncation: Truncation,
) -> Result<Fitted, DataError> {
    let mut whole = encode(tokenizer, messages)?;
    let length = whole.ids.len();
    if length <= max_length {
        return Ok(Fitted { encoded: whole, cut: 0 });
    }
    if truncation == Truncation::Turns {
        let turns: Vec<usize> =
            messages.iter().enumerate().filter(|(_, m)| m.role == Role::Assistant).map(|(i, _)| i + 1).collect();
        // Where each turn has its span, a turn whose content alone ends beyond the limit need not be rendered again.
        let ends = (whole.content_ends.len() == turns.len()).then_some(whole.content_ends.as_slice());
        for (turn, &count) in turns.iter().enumerate().rev() {
            let too_long = ends.and_then(|ends| ends.get(turn)).is_some_and(|&end| end > max_length);
            if too_long || count == messages.len() {
                continue;
            }
            let encoded = encode(tokenizer, messages.get(..count).unwrap_or_default())?;
            if encoded.ids.len() <= max_length {
                let cut = length.saturating_sub(encoded.ids.len());
                return Ok(Fitted { encoded, cut });
            }
        }
    }
    whole.cut(max_length);
    Ok(Fitted { encoded: whole, cut: length - max_length })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::Value;
    use std::path::Path;

    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden");

    /// The mask without end markers, on every reference row: partial characters, composed text, straddling tokens.
    #[test]
    fn content_mask_equals_the_reference() {
        let tokenizer = ChatTokenizer::from_folder(&Path::new(GOLDEN).join("teacher-awq")).unwrap();
        let lines = std::fs::read_to_string(Path::new(GOLDEN).join("expected/chat_template.jsonl")).unwrap();
        let mut rows = 0;
        for line in lines.lines() {
            let row: Value = serde_json::from_str(line).unwrap();
            let messages: Vec<Message> = serde_json::from_value(row["messages"].clone()).unwrap();
            let Marked { text, spans } = tokenizer.marked(&messages).unwrap();
            let (_, offsets) = tokenizer.encode_text(&text).unwrap();
            let mask: Vec<Value> =
                offsets.iter().map(|&t| Value::from(u8::from(overlaps(t, &spans, |span| span.content.clone())))).collect();
            assert_eq!(Value::Array(mask), row["content_mask"], "{} {}", row["source"], row["index"]);
            rows += 1;
        }
        assert_eq!(rows, 58);
    }
}
