//! The flags of `evaluate` and its sub-verbs.

use super::{AlpacaEval, MtBench, word};
use clap::{Args, Subcommand};
use potstill_pipeline::evaluate::generate::{self, GenerateConfig};
use potstill_pipeline::evaluate::held_out::{self, HeldOutConfig};
use potstill_pipeline::evaluate::{BasePrecision, Subject};
use potstill_pipeline::kernel::Precision;
use std::path::{Path, PathBuf};

/// The sub-verbs of `evaluate`.
#[derive(Debug, Subcommand)]
pub enum Evaluate {
    /// Say how a student stands beside the teacher on a cache it was not trained on
    HeldOut(HeldOut),
    /// Let a student answer: MT-Bench, AlpacaEval or prompts of your own in, their answer files out
    Generate(Generate),
    /// Have a judge grade answers to MT-Bench's two-turn questions
    MtBench(Box<MtBench>),
    /// Have a judge choose between a model's and a baseline's answers, or score choices that are there already
    AlpacaEval(Box<AlpacaEval>),
}

/// Which model, and how it is held.
#[derive(Debug, Clone, Args)]
pub struct Model {
    /// The student: a Hugging Face folder or a name ORG/NAME[@REVISION]; plain, merged, or the base of --adapter
    #[arg(long, value_name = "DIR|NAME")]
    pub student: PathBuf,
    /// An adapter's folder (PEFT), to be put on the student
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// How linear layers are held: nf4 (as training holds them), stored (as the folder has them), or auto (nf4 below an adapter, else stored)
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = word::<BasePrecision>)]
    pub base_precision: BasePrecision,
    /// What the factors of products are rounded to: f32 or bf16 (faster where the processor has instructions for it; sums stay f32)
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = word::<Precision>)]
    pub compute: Precision,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
}

impl Model {
    /// The same as the library has it.
    pub fn subject(&self) -> Subject {
        Subject {
            student: self.student.clone(),
            adapter: self.adapter.clone(),
            base: self.base_precision,
            compute: self.compute,
            device: self.device.clone(),
        }
    }
}

/// Say how a student stands beside the teacher on a cache it was not trained on
///
/// Perplexity of the assistant's tokens, divergences from the teacher, agreement and calibration, with standard errors and percentiles
/// over positions. Nothing is written.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  potstill evaluate held-out --student models/Qwen1.5-14B --adapter runs/distill/adapter --cache caches/test
  potstill evaluate held-out --student models/my-14B --cache caches/test --json

Of a cache that was trained on, the rows held out with train --eval-rows 200 --seed 42:
  potstill evaluate held-out --student models/Qwen1.5-14B --adapter runs/distill/best \\
      --cache caches/ultrachat --rows 200 --seed 42

p is the teacher's distribution, q the student's, both at temperature 1, y the data's next token. A cache keeps
the likeliest ids and the mass of the rest, so divergences are coarse: over those ids and one entry for the
rest. They are at most those of the whole distributions; `accepted` (sum of min(p, q), what speculative
decoding accepts of this student as drafter) is at least that. --json holds every definition.

± is a standard error that takes positions for independent, as llama.cpp's report does; `± rows` one that
takes conversations for independent, which is the one to believe where it is larger.")]
pub struct HeldOut {
    /// The model.
    #[command(flatten)]
    pub model: Model,
    /// Folder of the cache
    #[arg(long, value_name = "DIR")]
    pub cache: PathBuf,
    /// Look at so many rows: those that train --eval-rows N with this --seed holds out [default: all]
    #[arg(long, value_name = "N")]
    pub rows: Option<u64>,
    /// Which rows, with --rows
    #[arg(long, value_name = "N", default_value_t = held_out::DEFAULT_SEED)]
    pub seed: u64,
    /// Tokens that go through the model at once; memory and speed, figures do not depend on it
    #[arg(long, value_name = "TOKENS", default_value_t = held_out::DEFAULT_PACK_TOKENS)]
    pub pack_tokens: u32,
    /// Scored positions whose logits exist at once; memory and speed alone too
    #[arg(long, value_name = "POSITIONS", default_value_t = held_out::DEFAULT_HEAD_CHUNK)]
    pub head_chunk: u32,
}

impl HeldOut {
    /// The same as the library has it.
    pub fn config(&self) -> HeldOutConfig {
        HeldOutConfig {
            subject: self.model.subject(),
            cache: self.cache.clone(),
            rows: self.rows,
            seed: self.seed,
            pack_tokens: self.pack_tokens,
            head_chunk: self.head_chunk,
        }
    }
}

/// Let a student answer: MT-Bench, AlpacaEval or prompts of your own in, their answer files out
///
/// Every finished answer is durable at once, in --out with .journal behind its name; the same command, run again, goes on from there.
/// The answers file itself appears when all questions are answered. An answer depends on model, question and settings, not on the
/// batch that it was decoded in.
#[derive(Debug, Args)]
#[command(after_help = "\
Questions are JSONL or one JSON list; the first row says which form they have:
  MT-Bench    question_id, category, turns    out: FastChat's JSONL
  AlpacaEval  instruction, dataset            out: one JSON list
  plain       prompt, perhaps id              out: JSONL with id, prompt, answers

Examples:
  potstill evaluate generate --student models/my-14B --questions mt_bench/question.jsonl \\
      --out answers/mt_bench/my-14B.jsonl
  potstill evaluate generate --student models/Qwen1.5-14B --adapter runs/distill/adapter \\
      --questions alpaca_eval.json --out answers/alpaca/distill.json --temperature 0.7 --top-p 0.8

MT-Bench's temperatures, unless one is given: writing, roleplay 0.7; stem, humanities 0.1; extraction,
math, coding, reasoning 0 (the likeliest token); others 0.7. The second turn sees the student's own first answer.

An answer ends at eos_token_id of generation_config.json (else of config.json), at the token that the chat template
puts after an answer, or at --max-new-tokens. Nothing else of generation_config.json is used: no repetition
penalty, no temperature. Keys and values are kept in f32 and take at most half of the free memory.")]
pub struct Generate {
    /// The model.
    #[command(flatten)]
    pub model: Model,
    /// File of questions
    #[arg(long, value_name = "FILE")]
    pub questions: PathBuf,
    /// File of answers
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// What the model is called in the answers [default: the last part of --student, and of --adapter]
    #[arg(long, value_name = "NAME")]
    pub model_id: Option<String>,
    /// Temperature, 0 for the likeliest token [default: MT-Bench's by category, else 0]
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// Draw from the fewest tokens that make up this probability, above 0 to 1; 1: from all
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f64,
    /// Seed of the draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Answers to each question (AlpacaEval has one)
    #[arg(long, value_name = "N", default_value_t = generate::DEFAULT_CHOICES)]
    pub choices: u32,
    /// Most tokens of an answer
    #[arg(long, value_name = "TOKENS", default_value_t = generate::DEFAULT_MAX_NEW_TOKENS)]
    pub max_new_tokens: u32,
    /// Most answers decoded together; memory and speed, answers do not depend on it
    #[arg(long, value_name = "N", default_value_t = generate::DEFAULT_BATCH_SIZE)]
    pub batch_size: u32,
    /// Most new tokens that go through the model at once; memory and speed alone too
    #[arg(long, value_name = "TOKENS", default_value_t = generate::DEFAULT_PACK_TOKENS)]
    pub pack_tokens: u32,
}

impl Generate {
    /// The same as the library has it.
    pub fn config(&self) -> GenerateConfig {
        GenerateConfig {
            subject: self.model.subject(),
            model_id: self.model_id.clone().unwrap_or_else(|| self.name()),
            questions: self.questions.clone(),
            out: self.out.clone(),
            temperature: self.temperature,
            top_p: self.top_p,
            seed: self.seed,
            choices: self.choices,
            max_new_tokens: self.max_new_tokens,
            batch_size: self.batch_size,
            pack_tokens: self.pack_tokens,
        }
    }

    /// `my-14B`, or `Qwen1.5-14B+distill` of an adapter in runs/distill/adapter.
    fn name(&self) -> String {
        let last = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let student = last(&self.model.student).split('@').next().unwrap_or_default().to_string();
        let Some(adapter) = &self.model.adapter else { return student };
        let own = last(adapter);
        let run = adapter.parent().map(last).filter(|run| !run.is_empty() && matches!(&own[..], "adapter" | "best"));
        format!("{student}+{}", run.unwrap_or(own))
    }
}
