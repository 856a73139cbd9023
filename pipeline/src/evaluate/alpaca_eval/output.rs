//! The files of AlpacaEval: outputs and annotations, in its own schemas, so that its own tool can read what is written here.

use super::super::files::{self, wrong};
use super::super::judge::JudgeError;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;

/// One answer: a row of `model_outputs.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputRow {
    /// The collection that the instruction comes from.
    #[serde(default)]
    pub dataset: Option<String>,
    /// What was asked.
    pub instruction: String,
    /// The answer.
    pub output: String,
    /// Who answered.
    pub generator: String,
}

/// One judgement: a row of `annotations.json`. Fields that are not named here are ignored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Annotation {
    /// The collection that the instruction comes from.
    #[serde(default)]
    pub dataset: Option<String>,
    /// What was asked.
    pub instruction: String,
    /// The baseline's answer.
    pub output_1: String,
    /// The baseline.
    pub generator_1: String,
    /// The model's answer.
    pub output_2: String,
    /// The model.
    pub generator_2: String,
    /// The judge.
    #[serde(default)]
    pub annotator: String,
    /// 1: the baseline's is better, 2: the model's; between them how sure the judge is; 0, in old files: a draw; null: no judgement.
    pub preference: Option<f64>,
}

impl Annotation {
    /// The preference as a number from 0 (the baseline's) to 1 (the model's); `None` where the judge gave none, or the number is no preference.
    pub fn share(&self) -> Option<f64> {
        match self.preference? {
            0.0 => Some(0.5),
            x if (1.0..=2.0).contains(&x) => Some(x - 1.0),
            _ => None,
        }
    }
}

/// The outputs of one model. `what`: whose, for the error.
///
/// Errors: a file that is none, rows of several models, an instruction that comes twice.
pub fn outputs(path: &Path) -> Result<Vec<OutputRow>, JudgeError> {
    let rows: Vec<OutputRow> = files::rows(path, "an output: instruction, output, generator")?;
    let mut seen = HashMap::with_capacity(rows.len());
    for (i, row) in rows.iter().enumerate() {
        let place = || format!(", row {i}");
        if row.generator != rows[0].generator {
            let expected = format!("outputs of one model, {:?}", rows[0].generator);
            return Err(wrong(path, place(), &expected, format!("{:?}", row.generator)));
        }
        if let Some(earlier) = seen.insert(row.instruction.as_str(), i) {
            return Err(wrong(path, place(), "every instruction once", format!("that of row {earlier} again")));
        }
    }
    Ok(rows)
}

/// The outputs of `path` that answer the instructions of `baseline`, in that order.
///
/// Errors: as [`outputs`], and an instruction without an output.
pub fn matching(path: &Path, baseline: &[OutputRow]) -> Result<Vec<OutputRow>, JudgeError> {
    let rows = outputs(path)?;
    let mut by_instruction: HashMap<String, OutputRow> = rows.into_iter().map(|row| (row.instruction.clone(), row)).collect();
    let find = |(i, row): (usize, &OutputRow)| {
        let missing = || wrong(path, String::new(), &format!("an output to the baseline's instruction {i}"), "none".into());
        by_instruction.remove(&row.instruction).ok_or_else(missing)
    };
    baseline.iter().enumerate().map(find).collect()
}

/// The annotations of one model against one baseline.
///
/// Errors: a file that is none, or rows of several models, baselines or judges.
pub fn annotations(path: &Path) -> Result<Vec<Annotation>, JudgeError> {
    let rows: Vec<Annotation> =
        files::rows(path, "an annotation: instruction, output_1, output_2, generator_1, generator_2, preference")?;
    let who = |row: &Annotation| [row.generator_1.clone(), row.generator_2.clone(), row.annotator.clone()];
    let first = who(&rows[0]);
    for (i, row) in rows.iter().enumerate() {
        if who(row) != first {
            let expected = format!("one baseline, model and judge, {first:?}");
            return Err(wrong(path, format!(", row {i}"), &expected, format!("{:?}", who(row))));
        }
    }
    Ok(rows)
}
