//! MT-Bench's prompts for grading one answer: which of the four is used, how it is filled in, and what counts as a grade.

use super::super::files::{self, wrong};
use super::super::judge::JudgeError;
use super::super::judge::chat::{Message, Role};
use super::super::judge::template::{Braces, Presence, Template};
use super::question::{AnswerRow, Question};
use serde::Deserialize;
use std::path::Path;

/// Categories whose prompts hold a reference answer.
pub const WITH_REFERENCE: [&str; 3] = ["math", "reasoning", "coding"];
/// Grades that a judge may give.
pub const GRADES: std::ops::RangeInclusive<f64> = 1.0..=10.0;
/// How a prompt says that it asks for a grade.
const FORMAT: &str = "[[rating]]";

/// Whether `category`'s answers are graded beside a reference.
pub fn has_reference(category: &str) -> bool {
    WITH_REFERENCE.contains(&category)
}

#[derive(Deserialize)]
struct Row {
    name: String,
    system_prompt: String,
    prompt_template: String,
    output_format: String,
}

/// One prompt.
#[derive(Debug)]
pub struct Prompt {
    /// Its name in the file.
    pub name: &'static str,
    system: String,
    template: Template,
}

/// The four prompts for grading one answer, and what the file is.
#[derive(Debug)]
pub struct Prompts {
    /// Turn 1, turn 1 with reference, turn 2, turn 2 with reference.
    prompts: [Prompt; 4],
    /// BLAKE3 of the file, in hexadecimal digits.
    pub digest: String,
}

/// Names and places of the four.
const SINGLE: [(&str, &[&str]); 4] = [
    ("single-v1", &["question", "answer"]),
    ("single-math-v1", &["question", "ref_answer_1", "answer"]),
    ("single-v1-multi-turn", &["question_1", "answer_1", "question_2", "answer_2"]),
    ("single-math-v1-multi-turn", &["question_1", "ref_answer_1", "question_2", "ref_answer_2", "answer_1", "answer_2"]),
];

impl Prompts {
    /// From FastChat's `judge_prompts.jsonl`; its other prompts are not looked at.
    ///
    /// Errors: a file that is none, or a prompt that is missing, lacks a place or does not ask for a grade.
    pub fn read(path: &Path) -> Result<Self, JudgeError> {
        let rows: Vec<Row> = files::rows(path, "a prompt: name, system_prompt, prompt_template, output_format")?;
        let prompt = |(name, places): (&'static str, &[&str])| {
            let place = format!(", prompt {name}");
            let row = rows.iter().find(|row| row.name == name);
            let row = row.ok_or_else(|| wrong(path, place.clone(), "a prompt of this name", "none".into()))?;
            if row.output_format != FORMAT {
                return Err(wrong(path, place, &format!("output_format {FORMAT:?}"), format!("{:?}", row.output_format)));
            }
            let template = Template::of(&row.prompt_template, places, Braces::Places, Presence::All);
            let template = template.map_err(|found| wrong(path, place, "a template with its places in braces", found))?;
            Ok(Prompt { name, system: row.system_prompt.clone(), template })
        };
        let [a, b, c, d] = SINGLE;
        let digest = blake3::hash(files::text(path)?.as_bytes()).to_hex().to_string();
        Ok(Self { prompts: [prompt(a)?, prompt(b)?, prompt(c)?, prompt(d)?], digest })
    }

    /// The prompt for turn `turn` (1 or 2) of a question of `category`.
    pub fn of(&self, category: &str, turn: usize) -> &Prompt {
        let [first, first_math, second, second_math] = &self.prompts;
        match (turn, has_reference(category)) {
            (1, false) => first,
            (1, true) => first_math,
            (_, false) => second,
            (_, true) => second_math,
        }
    }
}

impl Prompt {
    /// What the judge is sent. `reference` is there where the category has one.
    pub fn messages(&self, question: &Question, answer: &AnswerRow, reference: Option<&AnswerRow>) -> Vec<Message> {
        let asked = |turn: usize| question.turns.get(turn - 1).map_or("", String::as_str);
        let known = |turn: usize| reference.map_or("", |row| row.turn(turn));
        let values: Vec<&str> = match self.name {
            "single-v1" => vec![asked(1), answer.turn(1)],
            "single-math-v1" => vec![asked(1), known(1), answer.turn(1)],
            "single-v1-multi-turn" => vec![asked(1), answer.turn(1), asked(2), answer.turn(2)],
            _ => vec![asked(1), known(1), asked(2), known(2), answer.turn(1), answer.turn(2)],
        };
        let mut messages = Vec::new();
        if !self.system.is_empty() {
            messages.push(Message { role: Role::System, content: self.system.clone() });
        }
        messages.push(Message { role: Role::User, content: self.template.fill(&values) });
        messages
    }
}

/// What a judge's words say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    /// A grade from 1 to 10.
    Grade(f64),
    /// A number that is no grade.
    OutOfRange(f64),
    /// No number in brackets.
    None,
}

/// The first `[[number]]` in a judgement, else the first `[number]`, as FastChat reads it; but a number outside 1 to 10, which FastChat would
/// take, is no grade.
pub fn verdict(judgement: &str) -> Verdict {
    match bracketed(judgement, "[[", "]]").or_else(|| bracketed(judgement, "[", "]")) {
        Some(grade) if GRADES.contains(&grade) => Verdict::Grade(grade),
        Some(number) => Verdict::OutOfRange(number),
        None => Verdict::None,
    }
}

/// The first number (digits, perhaps a point and more digits) that stands alone between `open` and `close`.
fn bracketed(text: &str, open: &str, close: &str) -> Option<f64> {
    text.match_indices(open).find_map(|(at, _)| {
        let rest = text.get(at + open.len()..)?;
        let number = rest.split(close).next()?;
        let (whole, part) = number.split_once('.').unwrap_or((number, ""));
        let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
        let plain = rest.len() > number.len() && !whole.is_empty() && digits(whole) && digits(part);
        plain.then(|| number.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn grades_as_fastchat_reads_them() {
        for (text, expected) in [
            ("Rating: [[7]]", Verdict::Grade(7.0)),
            ("[[7.5]] and then [[2]]", Verdict::Grade(7.5)),
            ("[3] at first, in the end [[8.]]", Verdict::Grade(8.0)),
            ("so [8]", Verdict::Grade(8.0)),
            ("[[rating]] is [[10]]", Verdict::Grade(10.0)),
            ("[[[9]]]", Verdict::Grade(9.0)),
            ("[[11]]", Verdict::OutOfRange(11.0)),
            ("[[0]] not [[5]]", Verdict::OutOfRange(0.0)),
            ("Rating: 9", Verdict::None),
            ("[[9/10]] [[-3]] [[ 4 ]] [[5", Verdict::None),
            ("", Verdict::None),
        ] {
            assert_eq!(verdict(text), expected, "{text}");
        }
    }
}
