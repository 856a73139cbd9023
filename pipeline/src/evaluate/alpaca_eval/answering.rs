//! Answers to AlpacaEval: read, or asked for.

use super::super::answers::{AnswerSettings, Answers, Customary, user};
use super::super::judge::{self, Client, JudgeError};
use super::output::{self, OutputRow};
use super::{ANSWER_MAX_TOKENS, ANSWER_TEMPERATURE, Bench};
use crate::run::RunContext;
use std::path::Path;

/// What the benchmark itself says of answers.
pub(super) const CUSTOMARY: Customary = Customary { temperature: ANSWER_TEMPERATURE, max_tokens: ANSWER_MAX_TOKENS };

/// Answers by the place of their instruction.
pub(super) type Placed = Answers<Option<OutputRow>>;

pub(super) fn read(path: &Path, bench: &Bench) -> Result<Placed, JudgeError> {
    let rows = output::matching(path, &bench.baseline)?.into_iter().map(Some).collect();
    Ok(Answers::read(rows))
}

pub(super) fn ask(
    settings: &AnswerSettings,
    bench: &Bench,
    client: &Client<'_>,
    at_once: usize,
    context: &RunContext,
) -> Result<Placed, JudgeError> {
    context.progress.begin("answering", "instructions", bench.baseline.len() as u64);
    let written = judge::each(&bench.baseline, at_once, client, context, |row| {
        let written = settings.ask(client, vec![user(&row.instruction)], CUSTOMARY)?;
        context.progress.add(1);
        Ok(written)
    })?;
    context.progress.end();
    let mut answers = Answers::asked(client.calls());
    for (row, written) in bench.baseline.iter().zip(written) {
        let row = match written {
            Ok(written) => {
                answers.cut += u64::from(written.cut);
                Some(OutputRow { output: written.text, generator: settings.model.clone(), ..row.clone() })
            }
            Err(reason) => {
                answers.miss(reason);
                None
            }
        };
        answers.rows.push(row);
    }
    Ok(answers)
}
