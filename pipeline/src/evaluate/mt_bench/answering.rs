//! Answers to MT-Bench: read, or asked for turn after turn, each turn seeing the model's own answer to the one before.

use super::super::answers::{AnswerSettings, Answers, Customary, assistant, user};
use super::super::files;
use super::super::judge::chat::Message;
use super::super::judge::{self, Client, JudgeError};
use super::question::{self, AnswerRow, Choice, Question};
use super::{ANSWER_MAX_TOKENS, Bench, temperature};
use crate::run::RunContext;
use std::path::Path;

pub(super) fn read(path: &Path, bench: &Bench) -> Result<Answers<AnswerRow>, JudgeError> {
    let rows = question::answers(path, &bench.questions.iter().collect::<Vec<_>>(), "an answer")?;
    if let Some(other) = rows.iter().find(|row| row.model_id != rows[0].model_id) {
        let place = format!(", question {}", other.question_id);
        let expected = format!("answers of one model, {:?}", rows[0].model_id);
        return Err(files::wrong(path, place, &expected, format!("{:?}", other.model_id)));
    }
    Ok(Answers::read(rows))
}

/// Turn after turn; a question of which one turn failed is left out as a whole.
pub(super) fn ask(
    settings: &AnswerSettings,
    bench: &Bench,
    client: &Client<'_>,
    at_once: usize,
    context: &RunContext,
) -> Result<Answers<AnswerRow>, JudgeError> {
    context.progress.begin("answering", "questions", bench.questions.len() as u64);
    let written = judge::each(&bench.questions, at_once, client, context, |question| {
        let (mut said, mut cut, mut last) = (Vec::new(), 0, None);
        for _ in &question.turns {
            match settings.ask(client, dialogue(question, &said), customary(question))? {
                Ok(written) => {
                    said.push(written.text.clone());
                    cut += u64::from(written.cut);
                    last = Some(written);
                }
                Err(reason) => return Ok(Err(reason)),
            }
        }
        context.progress.add(1);
        let (id, received) = last.map_or_else(Default::default, |written| (written.id, written.received));
        Ok(Ok((answered(question, &settings.model, said, id, received), cut)))
    })?;
    context.progress.end();
    let mut answers = Answers::asked(client.calls());
    for written in written {
        match written {
            Ok((row, cut)) => {
                answers.rows.push(row);
                answers.cut += cut;
            }
            Err(reason) => answers.miss(reason),
        }
    }
    Ok(answers)
}

/// The question's turns up to the next one to be answered, with what was `said` to the earlier ones.
pub(super) fn dialogue(question: &Question, said: &[String]) -> Vec<Message> {
    let mut messages = Vec::new();
    for (i, turn) in question.turns.iter().take(said.len() + 1).enumerate() {
        messages.push(user(turn));
        messages.extend(said.get(i).map(|answer| assistant(answer)));
    }
    messages
}

pub(super) fn customary(question: &Question) -> Customary {
    Customary { temperature: temperature(&question.category), max_tokens: ANSWER_MAX_TOKENS }
}

pub(super) fn answered(question: &Question, model: &str, turns: Vec<String>, id: String, received: u64) -> AnswerRow {
    let choices = vec![Choice { index: 0, turns }];
    AnswerRow { question_id: question.question_id, answer_id: id, model_id: model.to_string(), choices, tstamp: received as f64 }
}
