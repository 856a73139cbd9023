//! MT-Bench with single grading, as FastChat's `gen_judgment.py --mode single` and `show_result.py` do it: 80 questions of two turns, a judge
//! that grades every answer from 1 to 10.
//!
//! Owns the order of things: answers (read, or asked for), grades, scores. Refuses to ship questions, references or prompts: they are
//! FastChat's files (`fastchat/llm_judge/data`), since a score means something only beside others that the same words gave.

mod answering;
pub mod prompt;
pub mod question;
pub mod scores;

use super::answers::AnswerSource;
use super::files;
use super::judge::chat::{ChatRequest, LimitField, Logprobs, Message};
use super::judge::{self, Answer, Calls, Client, Endpoint, JudgeError, Outlook, Patience, Replies};
use crate::run::RunContext;
use answering::{answered, customary, dialogue};
use prompt::{Prompt, Prompts, Verdict, has_reference, verdict};
use question::{AnswerRow, Question};
use scores::{Graded, Scores};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Longest judgement, in tokens.
pub const JUDGE_MAX_TOKENS: u32 = 2048;
/// Longest answer to a turn, in tokens.
pub const ANSWER_MAX_TOKENS: u32 = 1024;
/// The mark of an answer that was not judged, in files for FastChat.
const UNGRADED: f64 = -1.0;

/// Temperature of answers by category; any other 0.7.
pub fn temperature(category: &str) -> f64 {
    match category {
        "extraction" | "math" | "coding" | "reasoning" => 0.0,
        "stem" | "humanities" => 0.1,
        _ => 0.7,
    }
}

/// What is to be judged, by whom, with which words.
#[derive(Debug, Clone)]
pub struct MtBenchConfig {
    /// FastChat's `question.jsonl`.
    pub questions: PathBuf,
    /// FastChat's `judge_prompts.jsonl`.
    pub prompts: PathBuf,
    /// Reference answers for math, reasoning and coding, FastChat's `reference_answer/gpt-4.jsonl`.
    pub references: PathBuf,
    /// Where answers come from.
    pub answers: AnswerSource,
    /// The judge, by its server's name.
    pub judge: String,
    /// Longest judgement, in tokens.
    pub max_tokens: u32,
    /// How that is sent.
    pub limit_field: LimitField,
    /// Only so many questions, from the first on.
    pub first: Option<usize>,
    /// Where results go.
    pub out: PathBuf,
    /// Where replies are kept.
    pub replies: PathBuf,
    /// How endpoints are asked.
    pub patience: Patience,
}

/// What came out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MtBenchReport {
    /// Whose answers were judged.
    pub model: String,
    /// The judge that was asked for; `judge_calls.models` says who answered.
    pub judge: String,
    /// Questions.
    pub questions: u64,
    /// BLAKE3 of the file of prompts.
    pub prompts_blake3: String,
    /// The scores.
    pub scores: Scores,
    /// Questions without an answer, by reason; they are not judged.
    pub unanswered: BTreeMap<String, u64>,
    /// Answers that hold FastChat's mark of a failure; they are judged as they stand.
    pub error_answers: u64,
    /// Turns whose answer ended at the limit of its length; only known where answers were asked for.
    pub cut_turns: Option<u64>,
    /// What was asked of the judge.
    pub judge_calls: Calls,
    /// What was asked of the model; null where answers came from a file.
    pub answer_calls: Option<Calls>,
}

/// What a run would ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MtBenchOutlook {
    /// Of the judge. Of answers that are not there yet nothing is known but their greatest length, so the estimate is high.
    pub judge: Outlook,
    /// Of the model.
    pub answers: Outlook,
}

/// One line of `judgments.jsonl`, in FastChat's schema.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Judgment<'a> {
    question_id: u64,
    model: &'a str,
    judge: [&'a str; 2],
    user_prompt: String,
    judgment: String,
    score: f64,
    turn: usize,
    tstamp: f64,
}

/// What belongs to one question.
struct Case<'a> {
    question: &'a Question,
    answer: &'a AnswerRow,
    reference: Option<&'a AnswerRow>,
}

/// What is read before anything is asked.
struct Bench {
    questions: Vec<Question>,
    references: BTreeMap<u64, AnswerRow>,
    prompts: Prompts,
}

impl Bench {
    fn read(config: &MtBenchConfig) -> Result<Self, JudgeError> {
        let mut questions = question::questions(&config.questions)?;
        questions.truncate(config.first.unwrap_or(usize::MAX));
        let needing: Vec<&Question> = questions.iter().filter(|q| has_reference(&q.category)).collect();
        let references = match needing.is_empty() {
            true => Vec::new(),
            false => question::answers(&config.references, &needing, "a reference answer")?,
        };
        let references = references.into_iter().map(|row| (row.question_id, row)).collect();
        let prompts = Prompts::read(&config.prompts)?;
        Ok(Self { questions, references, prompts })
    }

    /// Every turn (from 1) of every question that `rows` answer, in the order of the questions.
    fn cases<'a>(&'a self, rows: &'a [AnswerRow]) -> Vec<(Case<'a>, usize)> {
        let by_id: BTreeMap<u64, &AnswerRow> = rows.iter().map(|row| (row.question_id, row)).collect();
        let answered = self.questions.iter().filter_map(|question| Some((question, *by_id.get(&question.question_id)?)));
        let turns = answered.flat_map(|(question, answer)| {
            let reference = self.references.get(&question.question_id);
            (1..=question.turns.len()).map(move |turn| (Case { question, answer, reference }, turn))
        });
        turns.collect()
    }
}

/// Says what a run would ask. Nothing is sent and nothing is written.
///
/// Errors: files that are not what they should be.
pub fn outlook(config: &MtBenchConfig) -> Result<MtBenchOutlook, JudgeError> {
    let bench = Bench::read(config)?;
    let replies = Replies::look(&config.replies);
    let mut outlook = MtBenchOutlook { judge: Outlook::default(), answers: Outlook::default() };
    let rows = match &config.answers {
        AnswerSource::File(path) => question::answers(path, &bench.questions.iter().collect::<Vec<_>>(), "an answer")?,
        AnswerSource::Endpoint(settings) => {
            let longest = settings.max_tokens.unwrap_or(ANSWER_MAX_TOKENS);
            let unknown = "x".repeat((u64::from(longest) * judge::CHARACTERS_PER_TOKEN) as usize);
            for question in &bench.questions {
                for turn in 1..=question.turns.len() {
                    let said = vec![unknown.clone(); turn - 1];
                    let request = settings.request(dialogue(question, &said), customary(question));
                    outlook.answers.add(&request, &replies)?;
                }
            }
            let row = |question: &Question| answered(question, "", vec![unknown.clone(); question.turns.len()], String::new(), 0);
            bench.questions.iter().map(row).collect()
        }
    };
    for (case, turn) in bench.cases(&rows) {
        let prompt = bench.prompts.of(&case.question.category, turn);
        outlook.judge.add(&request(config, prompt.messages(case.question, case.answer, case.reference)), &replies)?;
    }
    Ok(outlook)
}

/// Has all answers graded and writes `judgments.jsonl`, `report.json` and, where they were asked for, `answers.jsonl`.
///
/// Errors: files that are not what they should be, an endpoint that lets nobody in or is gone, a disk that fails, a stop.
pub fn run(
    config: &MtBenchConfig,
    judge: &Endpoint,
    model: Option<&Endpoint>,
    context: &RunContext,
) -> Result<MtBenchReport, JudgeError> {
    let bench = Bench::read(config)?;
    let replies = judge::begin(&config.out, &config.replies, [Some(judge), model], context)?;
    let answers = config.answers.answers(
        model,
        (&replies, config.patience),
        context,
        |path| answering::read(path, &bench),
        |settings, client| answering::ask(settings, &bench, client, config.patience.concurrency, context),
    )?;
    if answers.calls.is_some() {
        write(&config.out.join("answers.jsonl"), &answers.rows)?;
    }

    let client = Client::new(judge, &replies, config.patience, context);
    let jobs = bench.cases(&answers.rows);
    context.progress.begin("judging", "judgements", jobs.len() as u64);
    let judged = judge::each(&jobs, config.patience.concurrency, &client, context, |(case, turn)| {
        let graded = grade(config, bench.prompts.of(&case.question.category, *turn), case, *turn, &client);
        context.progress.add(1);
        graded
    })?;
    context.progress.end();

    let (grades, judgments): (Vec<Graded>, Vec<Judgment<'_>>) = judged.into_iter().unzip();
    write(&config.out.join("judgments.jsonl"), &judgments)?;
    let report = MtBenchReport {
        model: answers.rows.first().map_or_else(String::new, |row| row.model_id.clone()),
        judge: config.judge.clone(),
        questions: bench.questions.len() as u64,
        prompts_blake3: bench.prompts.digest.clone(),
        scores: Scores::of(&grades),
        unanswered: answers.unanswered,
        error_answers: answers.rows.iter().filter(|row| row.failed()).count() as u64,
        cut_turns: answers.calls.is_some().then_some(answers.cut),
        judge_calls: client.calls(),
        answer_calls: answers.calls,
    };
    files::write_json(&config.out.join("report.json"), &report)?;
    Ok(report)
}

/// Asks for one grade, again where the judge's words hold none.
fn grade<'a>(
    config: &'a MtBenchConfig,
    prompt: &'a Prompt,
    case: &Case<'a>,
    turn: usize,
    client: &Client<'_>,
) -> Result<(Graded, Judgment<'a>), JudgeError> {
    let messages = prompt.messages(case.question, case.answer, case.reference);
    let user_prompt = messages.last().map_or_else(String::new, |m| m.content.clone());
    let request = request(config, messages);
    let (mut grade, mut words, mut received) = (Err("no grade in the judge's words".to_string()), String::new(), 0);
    for attempt in 0..=judge::REPEATS_WITHOUT_VERDICT {
        match client.ask(&request, attempt)? {
            Answer::Failed(reason) => {
                grade = Err(reason);
                break;
            }
            Answer::Reply(reply) => {
                let found = verdict(&reply.content);
                (words, received) = (reply.content, reply.received);
                match found {
                    Verdict::Grade(number) => {
                        grade = Ok(number);
                        break;
                    }
                    Verdict::OutOfRange(_) => grade = Err("a number outside 1 to 10".to_string()),
                    Verdict::None => grade = Err("no grade in the judge's words".to_string()),
                }
            }
        }
    }
    let judgment = Judgment {
        question_id: case.question.question_id,
        model: &case.answer.model_id,
        judge: [&config.judge, prompt.name],
        user_prompt,
        judgment: words,
        score: grade.as_ref().map_or(UNGRADED, |grade| *grade),
        turn,
        tstamp: received as f64,
    };
    let (question_id, category) = (case.question.question_id, case.question.category.clone());
    Ok((Graded { question_id, category, turn, grade }, judgment))
}

fn request(config: &MtBenchConfig, messages: Vec<Message>) -> ChatRequest {
    let (model, max_tokens, limit_field) = (config.judge.clone(), config.max_tokens, config.limit_field);
    ChatRequest { model, messages, temperature: 0.0, top_p: None, max_tokens, limit_field, seed: None, logprobs: Logprobs::None }
}

fn write(path: &Path, rows: &[impl Serialize]) -> Result<(), JudgeError> {
    let bytes = files::lines(rows).map_err(|e| JudgeError::io(path)(e.into()))?;
    files::write(path, &bytes)
}
