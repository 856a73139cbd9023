//! Files of questions, in; files of answers, out. Owns both forms of MT-Bench (FastChat's), AlpacaEval and plain prompts; refuses rows that
//! are of none of them, or of another form than the first.
//!
//! | form | a row of questions | answers |
//! |---|---|---|
//! | MT-Bench | `question_id`, `category`, `turns` | JSONL: `question_id`, `answer_id`, `model_id`, `choices: [{index, turns}]`, `tstamp` |
//! | AlpacaEval | `instruction`, `dataset` | one JSON list: `dataset`, `instruction`, `output`, `generator` |
//! | plain | `prompt`, perhaps `id` | JSONL: `id`, `prompt`, `answers`, `model_id` |
//!
//! Rows are JSONL, or one JSON list. Other keys are passed over.

use super::Answer;
use crate::bounded;
use crate::evaluate::error::EvaluateError;
use crate::evaluate::mt_bench;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;

/// Largest file of questions, in bytes.
const MAX_BYTES: u64 = 64 << 20;

/// Which files they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// MT-Bench, as FastChat has it.
    MtBench,
    /// AlpacaEval.
    AlpacaEval,
    /// Prompts of one's own.
    Plain,
}

/// All questions of a file.
#[derive(Debug, Clone)]
pub(super) struct Questions {
    pub(super) form: Form,
    pub(super) all: Vec<Question>,
    /// BLAKE3 of the file.
    pub(super) blake3: String,
}

/// One question.
#[derive(Debug, Clone)]
pub(super) struct Question {
    /// What the file calls it.
    id: Value,
    /// AlpacaEval's part.
    dataset: Value,
    /// What the person says, turn by turn.
    pub(super) turns: Vec<String>,
    /// The temperature that belongs to its category.
    pub(super) temperature: Option<f64>,
}

impl Questions {
    /// Reads a file. Errors name file and row.
    pub(super) fn read(path: &Path) -> Result<Self, EvaluateError> {
        let io = |source| EvaluateError::Io { path: path.to_path_buf(), source };
        let bytes = bounded::read(path, MAX_BYTES).map_err(io)?;
        let wrong = |row: usize, expected: &str, found: String| EvaluateError::Question {
            path: path.to_path_buf(),
            row,
            expected: expected.into(),
            found,
        };
        let rows: Vec<Value> = match bytes.trim_ascii_start().first() {
            Some(b'[') => serde_json::from_slice(&bytes).map_err(|e| wrong(1, "a JSON list of questions", e.to_string()))?,
            _ => {
                let lines = bytes.split(|b| *b == b'\n').enumerate().filter(|(_, line)| !line.trim_ascii().is_empty());
                let row = |(i, line)| serde_json::from_slice(line).map_err(|e| wrong(i + 1, "a line of JSON", format!("{e}")));
                lines.map(row).collect::<Result<_, _>>()?
            }
        };
        const FORMS: &str = "turns (MT-Bench), instruction (AlpacaEval) or prompt (plain)";
        let first = rows.first().ok_or_else(|| wrong(1, FORMS, "no row".into()))?;
        let form = match first {
            row if row.get("turns").is_some() => Form::MtBench,
            row if row.get("instruction").is_some() => Form::AlpacaEval,
            row if row.get("prompt").is_some() => Form::Plain,
            _ => return Err(wrong(1, FORMS, "none of them".into())),
        };
        let mut all: Vec<Question> = Vec::with_capacity(rows.len());
        for (i, row) in rows.iter().enumerate() {
            let question = Question::of(form, row, i).map_err(|(expected, found)| wrong(i + 1, expected, found))?;
            all.push(question);
        }
        // AlpacaEval asks by number, so a question may stand twice.
        let ids: Vec<String> = all.iter().filter(|_| form != Form::AlpacaEval).map(|question| question.id.to_string()).collect();
        let mut seen = BTreeSet::new();
        if let Some((row, id)) = ids.iter().enumerate().find(|(_, id)| !seen.insert(*id)) {
            return Err(wrong(row + 1, "each id once", format!("{id} again")));
        }
        Ok(Self { form, all, blake3: blake3::hash(&bytes).to_hex().to_string() })
    }

    /// The file of answers. `answers` holds, for each question and each of its choices, every turn's.
    pub(super) fn answers(&self, answers: &[Vec<Vec<&Answer>>], model: &str, digest: &str) -> String {
        let texts = |turns: &Vec<&Answer>| -> Vec<String> { turns.iter().map(|answer| answer.text.clone()).collect() };
        let rows = self.all.iter().zip(answers).map(|(question, choices)| match self.form {
            Form::MtBench => {
                let last = choices.iter().flatten().map(|answer| answer.tstamp).fold(0.0, f64::max);
                let list = choices.iter().enumerate().map(|(index, turns)| json!({"index": index, "turns": texts(turns)}));
                let id = blake3::hash(format!("{digest} {}", question.id).as_bytes()).to_hex();
                json!({
                    "question_id": question.id,
                    "answer_id": &id[..22],
                    "model_id": model,
                    "choices": list.collect::<Vec<_>>(),
                    "tstamp": last,
                })
            }
            Form::AlpacaEval => json!({
                "dataset": question.dataset,
                "instruction": question.turns.first(),
                "output": choices.first().and_then(|turns| turns.first()).map(|answer| &answer.text),
                "generator": model,
            }),
            Form::Plain => {
                let first = choices.iter().filter_map(|turns| turns.first()).map(|answer| &answer.text);
                let answers: Vec<&String> = first.collect();
                json!({"id": question.id, "prompt": question.turns.first(), "answers": answers, "model_id": model})
            }
        });
        match self.form {
            Form::AlpacaEval => format!("{:#}\n", Value::Array(rows.collect())),
            Form::MtBench | Form::Plain => rows.map(|row| format!("{row}\n")).collect(),
        }
    }
}

impl Question {
    /// Errors: what was expected, and what was found.
    fn of(form: Form, row: &Value, number: usize) -> Result<Self, (&'static str, String)> {
        let shown =
            |value: Option<&Value>| value.map_or("nothing".into(), |v| v.to_string().chars().take(80).collect::<String>());
        let text = |key: &'static str, expected: &'static str| match row.get(key).and_then(Value::as_str) {
            Some(text) => Ok(text.to_string()),
            None => Err((expected, shown(row.get(key)))),
        };
        let id_of = |key: &str| row.get(key).filter(|id| id.is_string() || id.is_number()).cloned();
        match form {
            Form::MtBench => {
                let id =
                    id_of("question_id").ok_or_else(|| ("a question_id, a number or a text", shown(row.get("question_id"))))?;
                let expected = "turns, a list of at least one text";
                let list = row.get("turns").and_then(Value::as_array).filter(|turns| !turns.is_empty());
                let turns = list.and_then(|turns| turns.iter().map(|turn| turn.as_str().map(String::from)).collect());
                let turns = turns.ok_or_else(|| (expected, shown(row.get("turns"))))?;
                let category = row.get("category").and_then(Value::as_str).unwrap_or_default();
                Ok(Self { id, dataset: Value::Null, turns, temperature: Some(mt_bench::temperature(category)) })
            }
            Form::AlpacaEval => {
                let turns = vec![text("instruction", "an instruction, a text")?];
                let dataset = row.get("dataset").filter(|dataset| dataset.is_string()).cloned().unwrap_or(Value::Null);
                Ok(Self { id: Value::from(number), dataset, turns, temperature: None })
            }
            Form::Plain => {
                let turns = vec![text("prompt", "a prompt, a text")?];
                let id = id_of("id").unwrap_or_else(|| Value::from(number));
                Ok(Self { id, dataset: Value::Null, turns, temperature: None })
            }
        }
    }
}
