//! Answers to AlpacaEval: read, or asked for.

use super::super::answers::{AnswerSettings, Customary, user};
use super::super::judge::{self, Calls, Client, JudgeError};
use super::output::{self, OutputRow};
use super::{ANSWER_MAX_TOKENS, ANSWER_TEMPERATURE, Bench};
use crate::run::RunContext;
use std::collections::BTreeMap;
use std::path::Path;

/// What the benchmark itself says of answers.
pub(super) const CUSTOMARY: Customary = Customary { temperature: ANSWER_TEMPERATURE, max_tokens: ANSWER_MAX_TOKENS };

/// Answers, by the place of their instruction, and what became of those that are not there.
pub(super) struct Answers {
    pub(super) rows: Vec<Option<OutputRow>>,
    pub(super) unanswered: BTreeMap<String, u64>,
    pub(super) cut: u64,
    pub(super) calls: Option<Calls>,
}

impl Answers {
    pub(super) fn read(path: &Path, bench: &Bench) -> Result<Self, JudgeError> {
        let rows = output::matching(path, &bench.baseline)?.into_iter().map(Some).collect();
        Ok(Self { rows, unanswered: BTreeMap::new(), cut: 0, calls: None })
    }

    pub(super) fn ask(
        settings: &AnswerSettings,
        bench: &Bench,
        client: &Client<'_>,
        at_once: usize,
        context: &RunContext,
    ) -> Result<Self, JudgeError> {
        context.progress.begin("answering", "instructions", bench.baseline.len() as u64);
        let written = judge::each(&bench.baseline, at_once, client, context, |row| {
            let written = settings.ask(client, vec![user(&row.instruction)], CUSTOMARY)?;
            context.progress.add(1);
            Ok(written)
        })?;
        context.progress.end();
        let mut answers = Self { rows: Vec::new(), unanswered: BTreeMap::new(), cut: 0, calls: Some(client.calls()) };
        for (row, written) in bench.baseline.iter().zip(written) {
            answers.rows.push(match written {
                Ok(written) => {
                    answers.cut += u64::from(written.cut);
                    Some(OutputRow { output: written.text, generator: settings.model.clone(), ..row.clone() })
                }
                Err(reason) => {
                    *answers.unanswered.entry(reason).or_default() += 1;
                    None
                }
            });
        }
        Ok(answers)
    }
}
