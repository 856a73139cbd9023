//! The files of MT-Bench, in FastChat's schemas: questions, reference answers, answers. Refuses a question answered twice or not at all.

use super::super::files::{self, wrong};
use super::super::judge::JudgeError;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;

/// What FastChat writes where a model gave no answer.
const NO_ANSWER: [&str; 2] = ["ERROR", "$ERROR$"];

/// A line of `question.jsonl`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Question {
    /// Its number, 81 to 160 in MT-Bench.
    pub question_id: u64,
    /// One of eight.
    pub category: String,
    /// What the user says, one or two turns.
    pub turns: Vec<String>,
}

/// A line of an answer file. What FastChat needs beside these is written too.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AnswerRow {
    /// The question's number.
    pub question_id: u64,
    /// Names the answer.
    #[serde(default)]
    pub answer_id: String,
    /// Who answered.
    pub model_id: String,
    /// The answers; the first counts.
    pub choices: Vec<Choice>,
    /// When, in seconds since 1970.
    #[serde(default)]
    pub tstamp: f64,
}

/// An answer to all turns of a question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// Its number.
    pub index: u64,
    /// One text a turn.
    pub turns: Vec<String>,
}

impl AnswerRow {
    /// The answer to turn `turn` (from 1).
    pub fn turn(&self, turn: usize) -> &str {
        self.choices.first().and_then(|c| c.turns.get(turn - 1)).map_or("", String::as_str)
    }

    /// Whether some turn holds the mark of a failure instead of an answer.
    pub fn failed(&self) -> bool {
        self.choices.first().is_some_and(|c| c.turns.iter().any(|turn| NO_ANSWER.contains(&turn.as_str())))
    }
}

/// The questions of a file, in its order.
///
/// Errors: a file that is none, a number that comes twice, a question without a turn or with more than two.
pub fn questions(path: &Path) -> Result<Vec<Question>, JudgeError> {
    let expected = "a question: question_id, category, turns";
    let questions: Vec<Question> = files::rows(path, expected)?;
    let mut seen = HashMap::new();
    for (i, question) in questions.iter().enumerate() {
        let place = || format!(", question {}", question.question_id);
        if !(1..=2).contains(&question.turns.len()) {
            return Err(wrong(path, place(), "one or two turns", question.turns.len().to_string()));
        }
        if seen.insert(question.question_id, i).is_some() {
            return Err(wrong(path, place(), "every question once", "it twice".into()));
        }
    }
    Ok(questions)
}

/// The answers to `questions` that a file holds, in the order of the questions. `what`: whose answers these are.
///
/// Errors: a file that is none, an answer that is missing, comes twice or lacks a turn.
pub fn answers(path: &Path, questions: &[&Question], what: &str) -> Result<Vec<AnswerRow>, JudgeError> {
    let rows: Vec<AnswerRow> = files::rows(path, "an answer: question_id, model_id, choices[0].turns")?;
    let mut by_id: HashMap<u64, AnswerRow> = HashMap::with_capacity(rows.len());
    for row in rows {
        let id = row.question_id;
        if by_id.insert(id, row).is_some() {
            return Err(wrong(path, format!(", question {id}"), "every question answered once", "two answers".into()));
        }
    }
    let answer = |question: &&Question| {
        let place = format!(", question {}", question.question_id);
        let expected = format!("{what} to its {} turns", question.turns.len());
        let row = by_id.remove(&question.question_id).ok_or_else(|| wrong(path, place.clone(), &expected, "none".into()))?;
        match row.choices.first().map_or(0, |c| c.turns.len()) {
            turns if turns >= question.turns.len() => Ok(row),
            turns => Err(wrong(path, place, &expected, format!("{turns} of them"))),
        }
    };
    questions.iter().map(answer).collect()
}
