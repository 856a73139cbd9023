//! One row of a cache, decoded: each token with the teacher's distribution after it.
//!
//! The one idea: the record is turned into plain numbers once ([`Conversation`]); people and machines see the same ones.

use super::{reading, summary};
use crate::ink::{Ink, Line, Shade};
use crate::print::{self, COLUMNS};
use crate::text;
use potstill_cache::{PositionFigures, Record, RowFigures, RowKey, Target};
use potstill_pipeline::data::show_bytes;
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
    /// Figures of the whole row; absent where nothing is scored or all is drawn.
    pub figures: Option<RowFigures>,
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
    /// Its bytes, which may be part of a character.
    #[serde(skip)]
    pub bytes: Vec<u8>,
    /// Bytes of a character that the tokens before it left unfinished.
    #[serde(skip)]
    pub before: Vec<u8>,
    /// How surprising it was; absent where nothing was scored before it.
    #[serde(skip)]
    pub level: Option<usize>,
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
    /// Its place among the kept, from 1; absent when it was not kept.
    pub next_rank: Option<u32>,
    /// Entropy in nats of the kept tokens and the tail as one outcome; absent where all is drawn, as is the next.
    pub entropy: Option<f64>,
    /// Sum of the kept probabilities.
    pub kept_mass: Option<f64>,
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
    /// As people see it in its place.
    #[serde(skip)]
    pub shown: String,
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
    /// As people see it in its place.
    #[serde(skip)]
    pub shown: String,
    /// How often it was drawn.
    pub count: u16,
    /// Its probability as the count estimates it.
    pub estimate: f64,
}

impl Distribution {
    /// What `target` says of the token after which `next_id` stands; `before` is what is unfinished there of a character.
    fn of(target: &Target<'_>, next_id: u32, before: &[u8], bytes_of: &impl Fn(u32) -> Vec<u8>) -> Self {
        let spelled = |id: u32| {
            let bytes = bytes_of(id);
            (show_bytes(&bytes), text::piece(before, &bytes))
        };
        let entries = target.ids.iter().zip(target.logprobs).enumerate();
        let kept: Vec<Kept> = entries
            .map(|(i, (&id, &logprob))| {
                let (token, shown) = spelled(id);
                let (probability, logit) = (f64::from(logprob).exp(), target.logits.get(i).copied());
                Kept { id, token, shown, logprob, probability, logit }
            })
            .collect();
        let estimates = target.drawn_probabilities().zip(target.sample_counts);
        let mut drawn: Vec<Drawn> = estimates
            .map(|((id, estimate), &count)| {
                let (token, shown) = spelled(id);
                Drawn { id, token, shown, count, estimate }
            })
            .collect();
        drawn.sort_by_key(|d| std::cmp::Reverse(d.count));
        let next_logprob = kept.iter().find(|k| k.id == next_id).map(|k| k.logprob);
        let figures = PositionFigures::of(target, next_id);
        Distribution {
            next_id,
            next_logprob,
            next_probability: next_logprob.map(|l| f64::from(l).exp()),
            next_estimate: drawn.iter().find(|d| d.id == next_id).map(|d| d.estimate),
            next_rank: figures.and_then(|f| f.next_rank),
            entropy: figures.map(|f| f.entropy),
            kept_mass: figures.map(|f| f.kept_mass),
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
            (k.id, k.shown.as_str(), chance)
        });
        let drawn = self.drawn.iter().map(|d| (d.id, d.shown.as_str(), format!("×{} ~{:.1}%", d.count, d.estimate * 100.0)));
        kept.chain(drawn)
    }
}

impl Conversation {
    /// Decodes `record`; `bytes_of` gives a token's bytes.
    pub fn of(row: u64, record: &Record, bytes_of: impl Fn(u32) -> Vec<u8>) -> Self {
        let mut targets = record.positions.iter().zip((0..record.targets.len()).map(|i| record.targets.position(i))).peekable();
        let mut positions: Vec<Position> = Vec::with_capacity(record.input_ids.len());
        let (mut before, mut level) = (Vec::new(), None);
        for (position, &id) in record.input_ids.iter().enumerate() {
            let bytes = bytes_of(id);
            let unfinished = text::unfinished(&before, &bytes);
            let target = targets.next_if(|(at, _)| **at as usize == position).map(|(_, target)| target);
            // A scored position is never the last one (`Record`), so there is a next token.
            let next = record.input_ids.get(position + 1);
            let after = target.zip(next).map(|(target, &next_id)| Distribution::of(&target, next_id, &unfinished, &bytes_of));
            let next_level = after.as_ref().map(|after| reading::level(after.next_probability.or(after.next_estimate)));
            let (token, scored) = (show_bytes(&bytes), after.is_some());
            positions.push(Position { position, id, token, scored, after, bytes, before, level });
            (before, level) = (unfinished, next_level);
        }
        let losses: Vec<f64> =
            positions.iter().filter_map(|p| p.after.as_ref()?.next_logprob).map(|logprob| -f64::from(logprob)).collect();
        Self {
            row,
            key: RowKey::of(&record.input_ids, &record.positions).to_string(),
            seq_id: record.seq_id,
            tokens: positions.len(),
            scored: positions.iter().filter(|p| p.scored).count(),
            mean_kept_loss: (!losses.is_empty()).then(|| losses.iter().sum::<f64>() / losses.len() as f64),
            figures: RowFigures::of(row, record),
            positions,
        }
    }

    /// Writes the text and all positions for people, `top` alternatives each.
    pub fn write(&self, top: usize, ink: Ink, out: &mut impl Write) -> std::io::Result<()> {
        ink.write_all(&self.head(), out)?;
        ink.write_all(&[Line::default()], out)?;
        ink.write_all(&reading::lines(self, ink), out)?;
        ink.write_all(&[Line::default()], out)?;
        self.write_positions(0..self.positions.len(), top, ink, out)
    }

    /// What is said of the row as a whole.
    pub fn head(&self) -> Vec<Line> {
        let loss = self.mean_kept_loss.map_or_else(|| "-".into(), |nats| format!("{nats:.3} nats"));
        let plain = |text: String| Line::of(Shade::Plain, text);
        let mut lines = vec![
            plain(format!("row {} · conversation {} of the data · key {}", self.row, self.seq_id, self.key)),
            plain(format!("{} tokens, {} scored; mean -ln p(next) where it was kept: {loss}", self.tokens, self.scored)),
        ];
        if let Some(f) = &self.figures {
            let (perplexity, came) = (summary::perplexity(f.perplexity_at_least), print::percent(f.top1_is_next));
            lines.push(plain(format!("perplexity at least {perplexity}; the teacher's first choice came at {came}")));
        }
        lines
    }

    /// Writes some positions for people, under column heads.
    pub fn write_positions(
        &self,
        range: std::ops::Range<usize>,
        top: usize,
        ink: Ink,
        out: &mut impl Write,
    ) -> std::io::Result<()> {
        let places = self.positions.len().to_string().len().max(3);
        let drawn = self.positions.iter().filter_map(|p| p.after.as_ref()).all(|after| after.kept.is_empty());
        let what = if drawn && self.scored > 0 { "drawn next" } else { "most likely next" };
        let head = format!("{:>places$}  {:<TOKEN_COLUMNS$}  {:>7}  {:>7}  {what}", "pos", "token", "p(next)", "tail");
        ink.write(&Line::of(Shade::Strong, head), out)?;
        let shown = self.positions.iter().skip(range.start).take(range.len());
        shown.flat_map(|p| p.lines(places, top)).try_for_each(|line| ink.write(&line, out))
    }
}

impl Position {
    /// The token as people see it in its place.
    pub fn shown(&self) -> String {
        text::piece(&self.before, &self.bytes)
    }

    /// The lines of the table that tell of it.
    fn lines(&self, places: usize, top: usize) -> Vec<Line> {
        let token = text::fit(&self.shown(), TOKEN_COLUMNS);
        let space = " ".repeat(TOKEN_COLUMNS.saturating_sub(text::width(&token)));
        let shade = self.level.map_or(Shade::Faint, Shade::Surprise);
        let line = Line::of(Shade::Faint, format!("{:>places$}  ", self.position)).then(shade, token);
        let Some(after) = &self.after else { return vec![line] };
        let figures = format!("{space}  {:>7}  {:>7}  ", after.next_shown(), print::percent(after.tail_probability));
        let mut line = line.then(Shade::Plain, figures);
        let indent = line.width();
        let mut lines = Vec::new();
        for (i, (id, token, chance)) in after.alternatives().take(top).enumerate() {
            let came = id == after.next_id;
            let mark = if came { "▸" } else { "" };
            let shown = format!("{mark}{} {chance}", text::fit(token, ALTERNATIVE_COLUMNS));
            if i > 0 && line.width() + 2 + text::width(&shown) > COLUMNS {
                lines.push(std::mem::replace(&mut line, Line::of(Shade::Plain, " ".repeat(indent))));
            } else if i > 0 {
                line.push(Shade::Plain, "  ");
            }
            line.push(if came { Shade::Strong } else { Shade::Plain }, shown);
        }
        lines.push(line);
        lines
    }
}

#[cfg(test)]
#[path = "conversation_tests.rs"]
mod tests;
