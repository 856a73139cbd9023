//! One row of a cache, decoded: each token with the teacher's distribution after it.
//!
//! The one idea: the record is turned into plain numbers once ([`Conversation`]); people and machines see the same ones.

use crate::print::{self, COLUMNS};
use crate::text;
use potstill_cache::{Record, RowKey};
use serde::Serialize;
use std::io::Write;

/// Columns of a token in its own column, and in a list of alternatives.
const TOKEN_COLUMNS: usize = 18;
const ALTERNATIVE_COLUMNS: usize = 16;

/// A row, decoded.
#[derive(Debug, Serialize)]
pub struct Conversation {
    /// Its row number.
    pub row: u64,
    /// Its key.
    pub key: String,
    /// Number of the conversation in the data.
    pub seq_id: u64,
    /// Tokens.
    pub tokens: usize,
    /// Positions with a distribution.
    pub scored: usize,
    /// Mean of −ln p(next) over the scored positions whose next token was kept, in nats.
    pub mean_kept_loss: Option<f64>,
    /// One entry a token.
    pub positions: Vec<Position>,
}

/// A token and what the teacher expects after it.
#[derive(Debug, Serialize)]
pub struct Position {
    /// Its place, from 0.
    pub position: usize,
    /// Its id.
    pub id: u32,
    /// Its text.
    pub token: String,
    /// Whether the distribution after it was kept.
    pub scored: bool,
    /// The distribution after it.
    pub after: Option<Distribution>,
}

/// A teacher's distribution at one position.
#[derive(Debug, Serialize)]
pub struct Distribution {
    /// The id that follows in the data.
    pub next_id: u32,
    /// Its log-probability; absent when it lies in the tail.
    pub next_logprob: Option<f32>,
    /// Its probability; absent when it lies in the tail.
    pub next_probability: Option<f64>,
    /// ln of the probability of all tokens not kept.
    pub tail_logprob: f32,
    /// The probability of all tokens not kept.
    pub tail_probability: f64,
    /// Kept tokens, most likely first.
    pub kept: Vec<Kept>,
}

/// One kept token.
#[derive(Debug, Serialize)]
pub struct Kept {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub token: String,
    /// Its log-probability.
    pub logprob: f32,
    /// Its probability.
    pub probability: f64,
}

impl Conversation {
    /// Decodes `record`; `text_of` gives a token's text.
    pub fn of(row: u64, record: &Record, text_of: impl Fn(u32) -> String) -> Self {
        let mut targets = record.positions.iter().zip((0..record.targets.len()).map(|i| record.targets.position(i))).peekable();
        let positions: Vec<Position> = record
            .input_ids
            .iter()
            .enumerate()
            .map(|(position, &id)| {
                let target = targets.next_if(|(at, _)| **at as usize == position).map(|(_, target)| target);
                // A scored position is never the last one (`Record`), so there is a next token.
                let after = target.zip(record.input_ids.get(position + 1)).map(|(target, &next_id)| {
                    let kept: Vec<Kept> = target
                        .ids
                        .iter()
                        .zip(target.logprobs)
                        .map(|(&id, &logprob)| Kept { id, token: text_of(id), logprob, probability: f64::from(logprob).exp() })
                        .collect();
                    let next_logprob = kept.iter().find(|k| k.id == next_id).map(|k| k.logprob);
                    Distribution {
                        next_id,
                        next_logprob,
                        next_probability: next_logprob.map(|l| f64::from(l).exp()),
                        tail_logprob: target.tail_logprob,
                        tail_probability: f64::from(target.tail_logprob).exp(),
                        kept,
                    }
                });
                Position { position, id, token: text_of(id), scored: after.is_some(), after }
            })
            .collect();
        let losses: Vec<f64> =
            positions.iter().filter_map(|p| p.after.as_ref()?.next_logprob).map(|logprob| -f64::from(logprob)).collect();
        Self {
            row,
            key: RowKey::of(&record.input_ids, &record.positions).to_string(),
            seq_id: record.seq_id,
            tokens: positions.len(),
            scored: positions.iter().filter(|p| p.scored).count(),
            mean_kept_loss: (!losses.is_empty()).then(|| losses.iter().sum::<f64>() / losses.len() as f64),
            positions,
        }
    }

    /// Writes all positions for people, `top` alternatives each.
    pub fn write(&self, top: usize, out: &mut impl Write) -> std::io::Result<()> {
        let loss = self.mean_kept_loss.map_or_else(|| "-".into(), |nats| format!("{nats:.3} nats"));
        writeln!(out, "row {} · conversation {} of the data · key {}", self.row, self.seq_id, self.key)?;
        writeln!(out, "{} tokens, {} scored; mean -ln p(next) where it was kept: {loss}", self.tokens, self.scored)?;
        writeln!(out)?;
        self.write_positions(0..self.positions.len(), top, out)
    }

    /// Writes some positions for people, under column heads.
    pub fn write_positions(&self, range: std::ops::Range<usize>, top: usize, out: &mut impl Write) -> std::io::Result<()> {
        let style = if print::colours() { Style { dim: "\u{1b}[2m", end: "\u{1b}[0m" } } else { Style { dim: "", end: "" } };
        let places = self.positions.len().to_string().len().max(3);
        writeln!(out, "{:>places$}  {:<TOKEN_COLUMNS$}  {:>7}  {:>7}  most likely next", "pos", "token", "p(next)", "tail")?;
        self.positions.iter().skip(range.start).take(range.len()).try_for_each(|p| p.write(places, top, &style, out))
    }
}

/// Escape codes, empty where there are no colours.
struct Style {
    dim: &'static str,
    end: &'static str,
}

impl Position {
    fn write(&self, places: usize, top: usize, style: &Style, out: &mut impl Write) -> std::io::Result<()> {
        let token = text::fit(&text::token(&self.token), TOKEN_COLUMNS);
        let Some(after) = &self.after else {
            return writeln!(out, "{}{:>places$}  {token}{}", style.dim, self.position, style.end);
        };
        let space = " ".repeat(TOKEN_COLUMNS.saturating_sub(text::width(&token)));
        let next = after.next_probability.map_or_else(|| "in tail".into(), print::percent);
        let head =
            format!("{:>places$}  {token}{space}  {next:>7}  {:>7}  ", self.position, print::percent(after.tail_probability));
        let indent = text::width(&head);
        let mut line = head;
        for (i, kept) in after.kept.iter().take(top).enumerate() {
            let mark = if kept.id == after.next_id { "▸" } else { "" };
            let name = text::fit(&text::token(&kept.token), ALTERNATIVE_COLUMNS);
            let chance = if kept.probability < 0.0005 { "<0.1%".into() } else { format!("{:.1}%", kept.probability * 100.0) };
            let shown = format!("{mark}{name} {chance}");
            if i > 0 && text::width(&line) + 2 + text::width(&shown) > COLUMNS {
                writeln!(out, "{}", line.trim_end())?;
                line = " ".repeat(indent) + &shown;
            } else {
                line = if i == 0 { line + &shown } else { line + "  " + &shown };
            }
        }
        writeln!(out, "{}", line.trim_end())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use potstill_cache::SoftTargets;

    fn example() -> Conversation {
        let mut targets = SoftTargets::default();
        targets.push(&[2, 7], &[0.5f32.ln(), 0.25f32.ln()], 0.25f32.ln());
        targets.push(&[9, 8], &[0.75f32.ln(), 0.125f32.ln()], 0.125f32.ln());
        let record = Record { seq_id: 4, input_ids: vec![1, 2, 3, 5], positions: vec![0, 2], targets, codec: Default::default() };
        Conversation::of(6, &record, |id| if id == 3 { "\u{1b}[31m 中".into() } else { format!(" t{id}") })
    }

    #[test]
    fn entry_i_stands_beside_token_i_and_speaks_of_the_next() {
        let row = example();
        assert_eq!(row.positions.iter().map(|p| p.scored).collect::<Vec<_>>(), [true, false, true, false]);
        let first = row.positions[0].after.as_ref().expect("scored");
        // f32 logarithms are off by up to half a unit in the last place: 3e-8 of the probability.
        assert!(first.next_id == 2 && first.next_probability.is_some_and(|p| (p - 0.5).abs() < 1e-7), "{first:?}");
        assert!((first.tail_probability - 0.25).abs() < 1e-7, "{first:?}");
        let third = row.positions[2].after.as_ref().expect("scored");
        assert_eq!((third.next_id, third.next_logprob, third.kept[0].id), (5, None, 9));
        assert!((row.mean_kept_loss.expect("one was kept") - std::f64::consts::LN_2).abs() < 1e-6);
        assert_eq!((row.row, row.seq_id, row.tokens, row.scored), (6, 4, 4, 2));
    }

    #[test]
    fn what_people_see_fits_and_cannot_act_on_the_terminal() {
        let mut shown = Vec::new();
        example().write(5, &mut shown).expect("memory");
        let shown = String::from_utf8(shown).expect("UTF-8");
        assert!(shown.chars().all(|c| c == '\n' || !c.is_control()), "{shown}");
        assert!(shown.lines().all(|line| text::width(line) <= COLUMNS), "{shown}");
        assert!(shown.contains("▸␣t2 50.0%  ␣t7 25.0%") && shown.contains("in tail"), "{shown}");
        assert!(shown.contains("\\u{1b}[31m␣中"), "{shown}");
    }

    #[test]
    fn long_lists_of_alternatives_wrap() {
        let mut targets = SoftTargets::default();
        let ids: Vec<u32> = (10..74).collect();
        targets.push(&ids, &[(1.0f32 / 128.0).ln(); 64], 0.5f32.ln());
        let record = Record { seq_id: 0, input_ids: vec![1, 2], positions: vec![0], targets, codec: Default::default() };
        let mut shown = Vec::new();
        Conversation::of(0, &record, |id| format!(" quite a long token {id}")).write(64, &mut shown).expect("memory");
        let shown = String::from_utf8(shown).expect("UTF-8");
        assert!(shown.lines().all(|line| text::width(line) <= COLUMNS), "{shown}");
        assert_eq!(shown.matches("0.8%").count(), 64);
    }
}
