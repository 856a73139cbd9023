//! The flags of `evaluate` and its sub-verbs.

use super::word;
use clap::{Args, Subcommand};
use potstill_pipeline::evaluate::held_out::{self, HeldOutConfig};
use potstill_pipeline::evaluate::{BasePrecision, Subject};
use potstill_pipeline::kernel::Precision;
use std::path::PathBuf;

/// The sub-verbs of `evaluate`.
#[derive(Debug, Subcommand)]
pub enum Evaluate {
    /// Say how a student stands beside the teacher on a cache it was not trained on
    HeldOut(HeldOut),
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
