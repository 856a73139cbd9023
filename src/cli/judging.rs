//! The flags of those sub-verbs of `evaluate` that have a judge.
// What follows `///` here is help text.
#![allow(rustdoc::broken_intra_doc_links)]

use clap::{ArgGroup, Args};
use potstill_pipeline::evaluate::alpaca_eval::{self, length_controlled::Coefficients};
use potstill_pipeline::evaluate::judge::chat::LimitField;
use potstill_pipeline::evaluate::judge::{DEFAULT_CONCURRENCY, DEFAULT_TIMEOUT_SECONDS, DEFAULT_TRIES};
use potstill_pipeline::evaluate::mt_bench;
use std::path::PathBuf;

/// How a judge is asked, and where what it says is kept.
#[derive(Debug, Args)]
pub struct Asking {
    /// The judge: a model by its server's name
    #[arg(long, value_name = "NAME")]
    pub judge: Option<String>,
    /// Folder for results
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Folder of replies; several runs may share one [default: OUT/replies]
    #[arg(long, value_name = "DIR")]
    pub replies: Option<PathBuf>,
    /// Requests under way at once
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CONCURRENCY, value_parser = at_least_one)]
    pub concurrency: usize,
    /// Most requests a minute [default: as many as come]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub requests_per_minute: Option<u32>,
    /// How often a request is tried that fails
    #[arg(long, value_name = "N", default_value_t = DEFAULT_TRIES, value_parser = clap::value_parser!(u32).range(1..))]
    pub tries: u32,
    /// Seconds that an endpoint may be silent
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_TIMEOUT_SECONDS, value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: u64,
    /// How the limit of a reply's length is sent: max_tokens, or max_completion_tokens, which newer models want
    #[arg(long, value_name = "FIELD", default_value = "max_tokens", value_parser = limit_field)]
    pub limit_field: LimitField,
    /// Only the first N questions or instructions
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub first: Option<usize>,
    /// Say how many calls and about how many tokens it would take; send nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// How answers are asked for, where they are not in a file.
#[derive(Debug, Args)]
pub struct Answering {
    /// File with the answers
    #[arg(long, value_name = "FILE")]
    pub answers: Option<PathBuf>,
    /// Ask the endpoint ANSWERS_BASE_URL for the answers, of the model with this name
    #[arg(long, value_name = "NAME", conflicts_with = "answers")]
    pub answers_model: Option<String>,
    /// Temperature of answers [default: MT-Bench's by category; 0.7]
    #[arg(long, value_name = "T", requires = "answers_model", value_parser = temperature)]
    pub answers_temperature: Option<f64>,
    /// Nucleus of answers [default: the server's]
    #[arg(long, value_name = "P", requires = "answers_model", value_parser = share)]
    pub answers_top_p: Option<f64>,
    /// Longest answer to a turn, in tokens [default: 1024 in MT-Bench, 2048 in AlpacaEval]
    #[arg(long, value_name = "TOKENS", requires = "answers_model", value_parser = clap::value_parser!(u32).range(1..))]
    pub answers_max_tokens: Option<u32>,
    /// Seed of the answering server's sampling
    #[arg(long, value_name = "N", default_value_t = 0, requires = "answers_model")]
    pub answers_seed: u64,
}

/// Have a judge grade answers to MT-Bench's two-turn questions
///
/// Every answer is graded from 1 to 10, as FastChat's single mode does it, beside a reference answer in math, reasoning and coding.
#[derive(Debug, Args)]
#[command(
    group = ArgGroup::new("source").required(true).args(["answers", "answers_model"]),
    mut_args = |arg| if arg.get_id() == "judge" || arg.get_id() == "out" { arg.required(true) } else { arg },
    after_help = "\
Files: questions, prompts and reference answers are FastChat's, in its folder
fastchat/llm_judge/data; --data is that folder's mt_bench. Answers are a file of
FastChat's schema (question_id, model_id, choices[0].turns), one line a
question.

Variables:
  OPENAI_BASE_URL    the judge's address (https://api.openai.com/v1)
  OPENAI_API_KEY     its key; goes into one header and nowhere else
  ANSWERS_BASE_URL   with --answers-model: who writes the answers
  ANSWERS_API_KEY    its key, if it wants one

Every reply is kept in --replies under a digest of its request: the same command
again asks only for what is missing. A new model under an old name needs a new
folder. --out gets judgments.jsonl (FastChat's schema), report.json and, where
answers were asked for, answers.jsonl. Answers without a grade are counted by
reason, are in no mean, and make the exit code 3.

Examples:
  potstill evaluate mt-bench --data FastChat/fastchat/llm_judge/data/mt_bench \\
      --answers answers/my-14B.jsonl --judge gpt-4o --out runs/mt-bench
  ANSWERS_BASE_URL=http://localhost:8000/v1 potstill evaluate mt-bench \\
      --data mt_bench --answers-model my-14B --judge gpt-4o --out runs/mt-bench"
)]
pub struct MtBench {
    /// Folder with question.jsonl, reference_answer/gpt-4.jsonl and, here or one above, judge_prompts.jsonl
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// File of prompts [default: judge_prompts.jsonl in --data or above it]
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// File of reference answers [default: reference_answer/gpt-4.jsonl in --data]
    #[arg(long, value_name = "FILE")]
    pub references: Option<PathBuf>,
    /// Longest judgement, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = mt_bench::JUDGE_MAX_TOKENS, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// Where answers come from.
    #[command(flatten)]
    pub answering: Answering,
    /// How a judge is asked.
    #[command(flatten)]
    pub asking: Asking,
}

/// Have a judge choose between a model's and a baseline's answers, or score choices that are there already
///
/// Each pair is shown in both orders; a choice is the probability of the judge's label among its five likeliest tokens.
#[derive(Debug, Args)]
#[command(
    group = ArgGroup::new("source").required(true).args(["annotations", "answers", "answers_model"]),
    mut_args = |arg| if arg.get_id() == "judge" || arg.get_id() == "out" { arg.required_unless_present("annotations") } else { arg },
    after_help = "\
Files: baseline and answers are JSON rows of dataset, instruction, output and
generator, as AlpacaEval's model_outputs.json; the prompt is its
alpaca_eval_clf.txt (ChatML, labels m and M). The baseline's instructions, in
their order, are the benchmark.

Variables:
  OPENAI_BASE_URL    the judge's address (https://api.openai.com/v1)
  OPENAI_API_KEY     its key; goes into one header and nowhere else
  ANSWERS_BASE_URL   with --answers-model: who writes the answers
  ANSWERS_API_KEY    its key, if it wants one

Every reply is kept in --replies under a digest of its request: the same command
again asks only for what is missing. A new model under an old name needs a new
folder. --out gets annotations.json (AlpacaEval's schema), report.json and,
where answers were asked for, outputs.json. Pairs without a choice are counted
by reason, are in no figure, and make the exit code 3.

The length-controlled win rate takes coefficients that AlpacaEval fitted, in the
order of its files of weights, and its instruction_difficulty.csv.

Examples:
  potstill evaluate alpaca-eval --baseline gpt4_1106_preview.json \\
      --answers my-14B.json --prompt alpaca_eval_clf.txt \\
      --judge gpt-4-1106-preview --out runs/alpaca
  potstill evaluate alpaca-eval --annotations runs/alpaca/annotations.json \\
      --lc-coefficients=-1.2673261,0.8917766,-1.4423447 \\
      --lc-difficulty instruction_difficulty.csv"
)]
pub struct AlpacaEval {
    /// Score the choices in this file; needs no network
    #[arg(long, value_name = "FILE", conflicts_with_all = ["judge", "out", "replies", "baseline", "prompt", "dry_run", "first"])]
    pub annotations: Option<PathBuf>,
    /// File with the baseline's answers
    #[arg(long, value_name = "FILE", required_unless_present = "annotations")]
    pub baseline: Option<PathBuf>,
    /// File with the prompt
    #[arg(long, value_name = "FILE", required_unless_present = "annotations")]
    pub prompt: Option<PathBuf>,
    /// Orders in which a pair is shown: 2, or 1, drawn from --seed and the instruction, at half the price
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=2))]
    pub orders: u8,
    /// Seed of the order, with --orders 1
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Ask for the label alone, of a server that refuses log-probabilities
    #[arg(long)]
    pub no_logprobs: bool,
    /// Longest judgement, in tokens
    #[arg(long, value_name = "TOKENS", default_value_t = alpaca_eval::JUDGE_MAX_TOKENS, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// Coefficients for the length-controlled win rate: of length, of difficulty, of the model
    #[arg(long, value_name = "L,D,M", allow_hyphen_values = true, requires = "lc_difficulty")]
    pub lc_coefficients: Option<Coefficients>,
    /// Difficulties of the instructions, by their place in the benchmark
    #[arg(long, value_name = "FILE", requires = "lc_coefficients")]
    pub lc_difficulty: Option<PathBuf>,
    /// Where answers come from.
    #[command(flatten)]
    pub answering: Answering,
    /// How a judge is asked.
    #[command(flatten)]
    pub asking: Asking,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "expected a whole number of at least 1".into())
}

fn temperature(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|t: &f64| (0.0..=2.0).contains(t)).ok_or_else(|| "expected a number from 0 to 2".into())
}

fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|p: &f64| *p > 0.0 && *p <= 1.0).ok_or_else(|| "expected a number above 0, at most 1".into())
}

fn limit_field(text: &str) -> Result<LimitField, String> {
    match text {
        "max_tokens" => Ok(LimitField::MaxTokens),
        "max_completion_tokens" => Ok(LimitField::MaxCompletionTokens),
        _ => Err("expected max_tokens or max_completion_tokens".into()),
    }
}
