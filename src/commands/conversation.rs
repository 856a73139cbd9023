//! One row of a cache, decoded: each token with the teacher's distribution after it.
//!
//! The one idea: the record is turned into plain numbers once ([`Conversation`]); people and machines see the same ones.

use crate::print::{self, COLUMNS};
use crate::text;
use potstill_cache::{Record, RowKey, Target};
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
    /// Its log-probability; absent when it was not kept.
    pub next_logprob: Option<f32>,
    /// Its probability; absent when it was not kept.
    pub next_probability: Option<f64>,
    /// Its probability as counts estimate it; absent when it was not drawn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_estimate: Option<f64>,
    /// ln of the probability of all tokens not kept; of all not drawn where none are kept.
    pub tail_logprob: f32,
    /// That probability.
    pub tail_probability: f64,
    /// ln Σ exp(logit), where logits are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logsumexp: Option<f32>,
    /// ln Σ p^(1/T) at each temperature that the cache declares.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lse_t: Vec<f32>,
    /// Kept tokens, most likely first.
    pub kept: Vec<Kept>,
    /// Drawn tokens, most often drawn first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub drawn: Vec<Drawn>,
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
    /// Its logit, where logits are kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logit: Option<f32>,
}

/// One drawn token.
#[derive(Debug, Serialize)]
pub struct Drawn {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub token: String,
    /// How often it was drawn.
    pub count: u16,
    /// Its probability as the count estimates it.
    pub estimate: f64,
}

impl Distribution {
    /// What `target` says of the token after which `next_id` stands.
    fn of(target: &Target<'_>, next_id: u32, text_of: &impl Fn(u32) -> String) -> Self {
        let entries = target.ids.iter().zip(target.logprobs).enumerate();
        let kept: Vec<Kept> = entries
            .map(|(i, (&id, &logprob))| Kept {
                id,
                token: text_of(id),
                logprob,
                probability: f64::from(logprob).exp(),
                logit: target.logits.get(i).copied(),
            })
            .collect();
        let estimates = target.drawn_probabilities().zip(target.sample_counts);
        let mut drawn: Vec<Drawn> =
            estimates.map(|((id, estimate), &count)| Drawn { id, token: text_of(id), count, estimate }).collect();
        drawn.sort_by_key(|d| std::cmp::Reverse(d.count));
        let next_logprob = kept.iter().find(|k| k.id == next_id).map(|k| k.logprob);
        Distribution {
            next_id,
            next_logprob,
            next_probability: next_logprob.map(|l| f64::from(l).exp()),
            next_estimate: drawn.iter().find(|d| d.id == next_id).map(|d| d.estimate),
            tail_logprob: target.tail_logprob,
            tail_probability: f64::from(target.tail_logprob).exp(),
            logsumexp: target.logsumexp,
            lse_t: target.lse_t.to_vec(),
            kept,
            drawn,
        }
    }

    /// The next token's probability, at most 7 columns.
    fn next_shown(&self) -> String {
        match (self.next_probability, self.next_estimate) {
            (Some(p), _) => print::percent(p),
            (None, Some(estimate)) => format!("~{:.1}%", estimate * 100.0),
            (None, None) if self.kept.is_empty() => "undrawn".into(),
            (None, None) => "in tail".into(),
        }
    }

    /// Kept tokens and then drawn ones, with what is known of their probabilities.
    fn alternatives(&self) -> impl Iterator<Item = (u32, &str, String)> {
        let kept = self.kept.iter().map(|k| {
            let chance = if k.probability < 0.0005 { "<0.1%".into() } else { format!("{:.1}%", k.probability * 100.0) };
            (k.id, k.token.as_str(), chance)
        });
        let drawn = self.drawn.iter().map(|d| (d.id, d.token.as_str(), format!("×{} ~{:.1}%", d.count, d.estimate * 100.0)));
        kept.chain(drawn)
    }
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
                let next = record.input_ids.get(position + 1);
                let after = target.zip(next).map(|(target, &next_id)| Distribution::of(&target, next_id, &text_of));
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
        let drawn = self.positions.iter().filter_map(|p| p.after.as_ref()).all(|after| after.kept.is_empty());
        let what = if drawn && self.scored > 0 { "drawn next" } else { "most likely next" };
        writeln!(out, "{:>places$}  {:<TOKEN_COLUMNS$}  {:>7}  {:>7}  {what}", "pos", "token", "p(next)", "tail")?;
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
        let next = after.next_shown();
        let head =
            format!("{:>places$}  {token}{space}  {next:>7}  {:>7}  ", self.position, print::percent(after.tail_probability));
        let indent = text::width(&head);
        let mut line = head;
        for (i, (id, token, chance)) in after.alternatives().take(top).enumerate() {
            let mark = if id == after.next_id { "▸" } else { "" };
            let shown = format!("{mark}{} {chance}", text::fit(&text::token(token), ALTERNATIVE_COLUMNS));
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
#[path = "conversation_tests.rs"]
mod tests;
