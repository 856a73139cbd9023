//! AlpacaEval 2: a judge prefers one of two answers to an instruction, the model's or a baseline's, in both orders.
//!
//! Owns the order of things: answers (read, or asked for), judgements, figures; and the figures of judgements that are there already
//! ([`scored`]). Refuses to ship instructions, baselines or the prompt: they are AlpacaEval's files. Both orders are asked where the original
//! draws one, so nothing depends on a draw; `annotations.json` is in the original's schema, so that its tool computes the same win rate.

mod answering;
pub mod figures;
pub mod length_controlled;
pub mod output;
mod pair;
pub mod preference;

use super::answers::{AnswerSource, user};
use super::files;
use super::judge::chat::{LimitField, Logprobs};
use super::judge::{self, Calls, Client, Endpoint, JudgeError, Outlook, Patience, Replies};
use crate::run::RunContext;
use answering::{CUSTOMARY, Placed};
use figures::{Comparison, Figures, characters};
use length_controlled::{Coefficients, LengthControlled, difficulties, length_controlled};
use output::{Annotation, OutputRow};
use pair::{Judged, Pair};
use preference::PairPrompt;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Longest judgement, in tokens: the label.
pub const JUDGE_MAX_TOKENS: u32 = 1;
/// Longest answer, in tokens.
pub const ANSWER_MAX_TOKENS: u32 = 2048;
/// Temperature of answers.
pub const ANSWER_TEMPERATURE: f64 = 0.7;

/// In which orders two outputs are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orders {
    /// Both.
    Both,
    /// One, which BLAKE3 draws from this seed and the instruction.
    One(u64),
}

/// What the length-controlled win rate needs.
#[derive(Debug, Clone)]
pub struct LengthControl {
    /// The fitted coefficients.
    pub coefficients: Coefficients,
    /// AlpacaEval's `instruction_difficulty.csv`.
    pub difficulties: PathBuf,
}

/// What is to be judged, by whom, with which words.
#[derive(Debug, Clone)]
pub struct AlpacaEvalConfig {
    /// The baseline's outputs; its instructions, in their order, are the benchmark.
    pub baseline: PathBuf,
    /// AlpacaEval's `alpaca_eval_clf.txt`.
    pub prompt: PathBuf,
    /// Where answers come from.
    pub answers: AnswerSource,
    /// The judge, by its server's name.
    pub judge: String,
    /// Longest judgement, in tokens.
    pub max_tokens: u32,
    /// How that is sent.
    pub limit_field: LimitField,
    /// Whether log-probabilities are asked for.
    pub logprobs: Logprobs,
    /// In which orders.
    pub orders: Orders,
    /// Only so many instructions, from the first on.
    pub first: Option<usize>,
    /// For the length-controlled win rate.
    pub length_control: Option<LengthControl>,
    /// Where results go.
    pub out: PathBuf,
    /// Where replies are kept.
    pub replies: PathBuf,
    /// How endpoints are asked.
    pub patience: Patience,
}

/// The figures of a set of judgements.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scored {
    /// Whose outputs were judged.
    pub model: String,
    /// Against whose.
    pub baseline: String,
    /// By whom.
    pub judge: String,
    /// The figures.
    pub figures: Figures,
    /// The length-controlled win rate; null where no coefficients were given.
    pub length_controlled: Option<LengthControlled>,
}

/// What came out of judging.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AlpacaEvalReport {
    /// The figures.
    #[serde(flatten)]
    pub scored: Scored,
    /// BLAKE3 of the file with the prompt.
    pub prompt_blake3: String,
    /// How the judge chose.
    pub choices: Choices,
    /// Comparisons that are in no figure, by reason.
    pub left_out: BTreeMap<String, u64>,
    /// Instructions without an answer, by reason; they are not judged.
    pub unanswered: BTreeMap<String, u64>,
    /// Answers that ended at the limit of their length; only known where they were asked for.
    pub cut_answers: Option<u64>,
    /// What was asked of the judge.
    pub judge_calls: Calls,
    /// What was asked of the model; null where answers came from a file.
    pub answer_calls: Option<Calls>,
}

/// How the judge chose.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Choices {
    /// Choices by the log-probabilities of the labels.
    pub by_probability: u64,
    /// Choices by the label alone, since the server gave no log-probabilities.
    pub by_label: u64,
    /// Comparisons of equal outputs: a draw, without a call.
    pub identical: u64,
    /// Comparisons with a choice in both orders.
    pub both_orders: u64,
    /// Of those, how many had a different winner in the other order.
    pub flips: u64,
    /// Choices, in either order, for the output that stood first; of an even choice neither counts.
    pub first_wins: u64,
    /// Choices for the one that stood second.
    pub second_wins: u64,
}

/// What a run would ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct AlpacaEvalOutlook {
    /// Of the judge. Of answers that are not there yet nothing is known but their greatest length, so the estimate is high.
    pub judge: Outlook,
    /// Of the model.
    pub answers: Outlook,
}

/// One row of `annotations.json`: the original's fields, and the preference in each order.
#[derive(Serialize)]
struct Written<'a> {
    #[serde(flatten)]
    annotation: Annotation,
    /// With the baseline's output first, and with the model's first; null where it was not asked or not said.
    preference_by_order: [Option<f64>; 2],
    /// Why there is no preference.
    #[serde(skip_serializing_if = "Option::is_none")]
    left_out: Option<&'a str>,
}

/// The figures of judgements that are there already, in AlpacaEval's schema. Needs no network.
///
/// Errors: files that are not what they should be.
pub fn scored(annotations: &Path, control: Option<&LengthControl>) -> Result<Scored, JudgeError> {
    let rows = output::annotations(annotations)?;
    let gammas = control.map(|c| difficulties(&c.difficulties, rows.len())).transpose()?;
    let indexed: Vec<(usize, &Annotation)> = rows.iter().enumerate().collect();
    Ok(figures_of(&indexed, control.zip(gammas.as_deref()), &rows[0]))
}

/// Figures of annotations, each with its instruction's place in the benchmark.
fn figures_of(rows: &[(usize, &Annotation)], control: Option<(&LengthControl, &[f64])>, who: &Annotation) -> Scored {
    let comparison = |(_, row): &(usize, &Annotation)| Comparison {
        dataset: row.dataset.clone().unwrap_or_else(|| "(none)".into()),
        instruction: row.instruction.clone(),
        share: row.share(),
        lengths: [characters(&row.output_1), characters(&row.output_2)],
    };
    let comparisons: Vec<Comparison> = rows.iter().map(comparison).collect();
    let controlled = control.and_then(|(control, gammas)| {
        let gammas: Vec<f64> = rows.iter().filter_map(|(place, _)| gammas.get(*place).copied()).collect();
        let lengths: Vec<[u64; 2]> = comparisons.iter().map(|c| c.lengths).collect();
        length_controlled(control.coefficients, &gammas, &lengths)
    });
    Scored {
        model: who.generator_2.clone(),
        baseline: who.generator_1.clone(),
        judge: who.annotator.clone(),
        figures: Figures::of(&comparisons),
        length_controlled: controlled,
    }
}

/// What is read before anything is asked.
struct Bench {
    baseline: Vec<OutputRow>,
    gammas: Option<Vec<f64>>,
    prompt: PairPrompt,
}

impl Bench {
    fn read(config: &AlpacaEvalConfig) -> Result<Self, JudgeError> {
        let mut baseline = output::outputs(&config.baseline)?;
        let gammas = config.length_control.as_ref().map(|c| difficulties(&c.difficulties, baseline.len())).transpose()?;
        baseline.truncate(config.first.unwrap_or(usize::MAX));
        Ok(Self { baseline, gammas, prompt: PairPrompt::read(&config.prompt)? })
    }

    /// Pairs of outputs, with the instruction's place.
    fn pairs<'a>(&'a self, answers: &'a [Option<OutputRow>]) -> Vec<Pair<'a>> {
        let rows = self.baseline.iter().zip(answers).enumerate();
        rows.filter_map(|(place, (baseline, model))| Some(Pair { place, baseline, model: model.as_ref()? })).collect()
    }
}

/// Says what a run would ask. Nothing is sent and nothing is written.
///
/// Errors: files that are not what they should be.
pub fn outlook(config: &AlpacaEvalConfig) -> Result<AlpacaEvalOutlook, JudgeError> {
    let bench = Bench::read(config)?;
    let replies = Replies::look(&config.replies);
    let mut outlook = AlpacaEvalOutlook { judge: Outlook::default(), answers: Outlook::default() };
    let rows = match &config.answers {
        AnswerSource::File(path) => output::matching(path, &bench.baseline)?,
        AnswerSource::Endpoint(settings) => {
            let longest = settings.max_tokens.unwrap_or(ANSWER_MAX_TOKENS);
            let unknown = "x".repeat((u64::from(longest) * judge::CHARACTERS_PER_TOKEN) as usize);
            for row in &bench.baseline {
                outlook.answers.add(&settings.request(vec![user(&row.instruction)], CUSTOMARY), &replies)?;
            }
            bench.baseline.iter().map(|row| OutputRow { output: unknown.clone(), ..row.clone() }).collect()
        }
    };
    let rows: Vec<Option<OutputRow>> = rows.into_iter().map(Some).collect();
    for pair in bench.pairs(&rows) {
        for request in pair.requests(config, &bench.prompt) {
            outlook.judge.add(&request, &replies)?;
        }
    }
    Ok(outlook)
}

/// Has all pairs judged and writes `annotations.json`, `report.json` and, where they were asked for, `outputs.json`.
///
/// Errors: files that are not what they should be, an endpoint that lets nobody in or is gone, a disk that fails, a stop.
pub fn run(
    config: &AlpacaEvalConfig,
    judge: &Endpoint,
    model: Option<&Endpoint>,
    context: &RunContext,
) -> Result<AlpacaEvalReport, JudgeError> {
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
        let rows: Vec<&OutputRow> = answers.rows.iter().flatten().collect();
        files::write_json(&config.out.join("outputs.json"), &rows)?;
    }

    let client = Client::new(judge, &replies, config.patience, context);
    let pairs = bench.pairs(&answers.rows);
    context.progress.begin("judging", "comparisons", pairs.len() as u64);
    let warned = std::sync::Once::new();
    let judged = judge::each(&pairs, config.patience.concurrency, &client, context, |pair| {
        let judged = pair.judge(config, &bench.prompt, &client)?;
        if config.logprobs == Logprobs::Top && judged.choices.by_label > 0 {
            warned.call_once(|| context.warn(WITHOUT_LOGPROBS));
        }
        context.progress.add(1);
        Ok(judged)
    })?;
    context.progress.end();
    report(config, &bench, answers, &judged, client.calls())
}

/// Said once, at the first reply without log-probabilities.
const WITHOUT_LOGPROBS: &str = "the judge's server gives no log-probabilities: a choice is its label alone, drawn at temperature 1, and win rates \
are not those of AlpacaEval 2; --no-logprobs asks for the most likely label instead";

/// Writes what came out.
fn report(
    config: &AlpacaEvalConfig,
    bench: &Bench,
    answers: Placed,
    judged: &[Judged],
    judge_calls: Calls,
) -> Result<AlpacaEvalReport, JudgeError> {
    let written: Vec<Written<'_>> = judged
        .iter()
        .map(|one| Written {
            annotation: one.annotation.clone(),
            preference_by_order: one.by_order.map(|share| share.map(|y| 1.0 + y)),
            left_out: one.left_out.as_deref(),
        })
        .collect();
    files::write_json(&config.out.join("annotations.json"), &written)?;

    let (mut choices, mut left_out) = (Choices::default(), BTreeMap::new());
    for one in judged {
        choices.add(&one.choices);
        if let Some(reason) = &one.left_out {
            *left_out.entry(reason.clone()).or_default() += 1;
        }
    }
    let indexed: Vec<(usize, &Annotation)> = judged.iter().map(|one| (one.place, &one.annotation)).collect();
    let nobody = Annotation {
        dataset: None,
        instruction: String::new(),
        output_1: String::new(),
        generator_1: bench.baseline.first().map_or_else(String::new, |row| row.generator.clone()),
        output_2: String::new(),
        generator_2: String::new(),
        annotator: config.judge.clone(),
        preference: None,
    };
    let who = judged.first().map_or(&nobody, |one| &one.annotation);
    let control = config.length_control.as_ref().zip(bench.gammas.as_deref());
    let report = AlpacaEvalReport {
        scored: figures_of(&indexed, control, who),
        prompt_blake3: bench.prompt.digest.clone(),
        choices,
        left_out,
        unanswered: answers.unanswered,
        cut_answers: answers.calls.is_some().then_some(answers.cut),
        judge_calls,
        answer_calls: answers.calls,
    };
    files::write_json(&config.out.join("report.json"), &report)?;
    Ok(report)
}
