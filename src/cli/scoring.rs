//! The flags of stage one, and of a plan of it.
// What follows `///` here is help text; the tables of a config file stand in brackets in it.
#![allow(rustdoc::broken_intra_doc_links)]

use clap::Args;
use serde::Serialize;
use std::path::PathBuf;

/// Stage one: run a teacher over chats and write a cache of its distributions
///
/// The same command, run again, continues where it stopped; a killed run loses at most --seal-minutes of work.
#[derive(Debug, Args, Serialize)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
Example:
  potstill precompute --teacher models/Qwen1.5-32B-Chat-AWQ \\
      --data 'ultrachat_200k/data/train_sft-*.parquet' \\
      --cache caches/ultrachat --preset compact --max-length 1024

Presets (every knob can be turned by its flag):
  preset    selection              values                    zstd  loses
  exact     top-k 64               bf16 logits, log-sum-exp    12  nothing
  standard  top-k 64               7 mantissa bits              3  hardly any
  compact   cutoff, p >= 1e-5      5 mantissa bits             12  little
  small     cutoff, mass >= 0.999  4 mantissa bits             12  more
  sampled   50 draws               counts                      12  no bias

Several machines: a worker scores whole shards, asks nobody, and writes into
DIR/worker-00003-of-00008 of --cache DIR; run again, it continues. When all are
done, `combine --out OUT DIR` makes the very cache of a single run.
`--worker auto` reads
  Slurm array             SLURM_ARRAY_TASK_ID, _COUNT, _MIN, _MAX and _STEP
  Kubernetes Indexed Job  JOB_COMPLETION_INDEX, JOB_COMPLETIONS (yours to set)
  torchrun                RANK and WORLD_SIZE
  SkyPilot                SKYPILOT_NODE_RANK and SKYPILOT_NUM_NODES
and `--worker auto/8` the index alone, of 8. A worker that did its share exits 0
though conversations were skipped: engines would take 3 for a failure.

By name:
  potstill precompute --teacher Qwen/Qwen1.5-32B-Chat-AWQ \\
      --data HuggingFaceH4/ultrachat_200k:train_sft --cache caches/ultrachat

A path that exists wins over a name. A name means the snapshot in the Hugging
Face cache ($HF_HUB_CACHE, $HF_HOME/hub, ~/.cache/huggingface/hub) that
refs/main or @REVISION says; what is there whole is used without a network.
What is missing is fetched by a build with the cargo feature hub, unless
HF_HUB_OFFLINE is set; HF_TOKEN and HF_ENDPOINT count too. A split means files
called data/SPLIT-00000-of-00003*, else a folder, else a file called after it;
no split means all files.

Each setting may also stand in the table [precompute] of --config FILE, or in
a variable such as POTSTILL_PRECOMPUTE__TOP_K=32. Flags win over variables,
variables over the file."
)]
pub struct Precompute {
    /// What is scored, by whom, and how it is stored.
    #[command(flatten)]
    pub scoring: Scoring,
    /// First score again what this list of `verify --repair-list` names, and mend the cache
    #[arg(long, value_name = "FILE")]
    pub repair: Option<PathBuf>,
}

/// The flags of stage one that a plan of it takes too.
#[derive(Debug, Args, Serialize)]
pub struct Scoring {
    /// Teacher: a Hugging Face folder or a name ORG/NAME[@REVISION]; AWQ (int4) or dense
    #[arg(long, value_name = "DIR|NAME")]
    pub teacher: Option<PathBuf>,
    /// Chats: files, folders, globs (Parquet, JSON, JSONL, also .gz, .zst) or names ORG/NAME[@REVISION][:SPLIT]
    #[arg(long, value_name = "PATH|NAME", num_args = 1..)]
    pub data: Option<Vec<PathBuf>>,
    /// Folder of the cache; made if it is not there, continued if it is
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// What is kept of each distribution, and how: exact, standard, compact, small or sampled (table below)
    #[arg(long, value_name = "NAME")]
    pub preset: Option<String>,
    /// top-k, cutoff, sampled or hybrid [default: the preset's]
    #[arg(long, value_name = "KIND")]
    pub selection: Option<String>,
    /// Most entries kept exactly at each scored position, 1 to 65535 [default: the preset's]
    #[arg(long, value_name = "K")]
    pub top_k: Option<i64>,
    /// Keep entries of at least this probability; makes a top-k selection a cutoff [default: the preset's]
    #[arg(long, value_name = "P")]
    pub min_prob: Option<f64>,
    /// Keep the fewest entries that make up this mass; makes a top-k selection a cutoff [default: the preset's]
    #[arg(long, value_name = "P")]
    pub min_mass: Option<f64>,
    /// Tokens drawn at each scored position, 1 to 65535 [default: the preset's, else 50]
    #[arg(long, value_name = "N")]
    pub draws: Option<i64>,
    /// Seed of the draws [default: 0]
    #[arg(long, value_name = "N")]
    pub sample_seed: Option<i64>,
    /// What is stored of kept entries: logprob or logit-bf16 [default: the preset's]
    #[arg(long, value_name = "WHAT")]
    pub values: Option<String>,
    /// Mantissa bits kept of each log-probability, 1 to 23 [default: the preset's]
    #[arg(long, value_name = "BITS")]
    pub mantissa_bits: Option<i64>,
    /// zstd level of the shards, 1 to 22 [default: the preset's]
    #[arg(long, value_name = "LEVEL")]
    pub zstd_level: Option<i64>,
    /// Lay ids out for readers of Parquet from before 2025, at a few per cent more bytes
    #[arg(long, num_args = 0, default_missing_value = "true", overrides_with = "no_compat")]
    pub compat: Option<bool>,
    /// Lay ids out as small as they come (the default)
    #[arg(long, overrides_with = "compat")]
    #[serde(skip)]
    pub no_compat: bool,
    /// Temperatures T, such as 1.5,2, at which ln Σ p^(1/T) is kept: training at T then knows the tail as exactly as the kept values, which only the preset exact does not round
    #[arg(long, value_name = "T,...", value_delimiter = ',')]
    pub lse_temperatures: Option<Vec<f64>>,
    /// Longest conversation, in tokens
    #[arg(long, value_name = "TOKENS")]
    pub max_length: Option<i64>,
    /// Longer ones lose whole trailing `turns`, or tokens on the `right`
    #[arg(long, value_name = "HOW")]
    pub truncate: Option<String>,
    /// Conversations whose roles cannot be trained on: `skip` or `error`
    #[arg(long, value_name = "WHAT")]
    pub on_bad_roles: Option<String>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// What the factors of the teacher's products are rounded to: f32, or bf16 (about twice as fast where the processor has instructions for it; sums stay f32)
    #[arg(long, value_name = "TYPE")]
    pub compute: Option<String>,
    /// Where weights are between two uses: resident (in memory) or streamed (read layer by layer, let go after use) [default: resident where they fit]
    #[arg(long, value_name = "WHERE")]
    pub residency: Option<String>,
    /// Tokens that go through a layer at once; memory and speed, the cache's bytes do not depend on it
    #[arg(long, value_name = "TOKENS")]
    pub pack_tokens: Option<i64>,
    /// Most tokens that go through the layers together; streamed weights are read once for each such block [default: by memory, and as many as are scored in --seal-minutes]
    #[arg(long, value_name = "TOKENS")]
    pub block_tokens: Option<i64>,
    /// Scored positions whose logits exist at once; memory and speed alone too
    #[arg(long, value_name = "POSITIONS")]
    pub head_chunk: Option<i64>,
    /// Conversations in a shard
    #[arg(long, value_name = "ROWS")]
    pub rows_per_shard: Option<i64>,
    /// Minutes after which what was scored is made durable: the most that a kill can lose; 0: after every pack
    #[arg(long, value_name = "MINUTES")]
    pub seal_minutes: Option<f64>,
    /// Largest share of conversations that may be left out because the teacher's logits are not finite; 0: stop at the first
    #[arg(long, value_name = "SHARE")]
    pub max_bad: Option<f64>,
    /// Score only this share of the conversations, cut at borders of shards; `combine` joins them
    #[arg(long, value_name = "N/T")]
    pub part: Option<String>,
    /// Score the share of worker I of N, from 0, into a folder of its own in --cache; `auto` asks the cluster engine (below)
    #[arg(long, value_name = "I/N")]
    pub worker: Option<String>,
    /// TOML file with a table [precompute]
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
}

/// What precompute will take: sizes on disk, time, memory, before it is run
///
/// Takes the flags of precompute: put `plan` in its place. Encodes all of the data, has the teacher score some of it, and stores that in
/// several ways. Writes nothing.
#[derive(Debug, Args)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
Examples:
  potstill plan --teacher models/Qwen1.5-32B-Chat-AWQ --data 'ultrachat_200k/data/train_sft-*.parquet'
  potstill plan --config run.toml --seconds 300 --compare-k 16,32,64,128
  potstill plan --config run.toml --no-run          (config.json, tokenizer files and data are enough)
  potstill plan --config run.toml --json | jq '.compared[] | [.preset, .k, .estimate.bytes]'

Sizes come from conversations that the teacher really scored, spread evenly over the data, stored by the
cache's own encoder and zstd in each way shown: presets as they are but for k, and the run as it is set.
`±` is a 95 % interval, by how conversations differ. They hold for this teacher: one with random weights
compresses otherwise than a trained one, so plan with the real one. With --no-run nobody was asked, and the
table is that of the cache's benchmark: realistic distributions of 151,643 ids, every position scored.

The time is that of all tokens at the speed of the passes that were timed, on this machine, and of storing;
without loading, and without hashing the weights once. At least one conversation is scored, however long
that takes. `mass` is the probability of the first k ids, on average.

Memory is what a run holds at its largest moment, in both ways to hold weights (--residency). Nothing is
fetched: models and data given by name have to be in the Hugging Face cache."
)]
pub struct Plan {
    /// The run.
    #[command(flatten)]
    pub scoring: Scoring,
    /// Seconds that the teacher scores conversations for
    #[arg(long, value_name = "SECONDS", default_value_t = 20.0, value_parser = seconds)]
    pub seconds: f64,
    /// Do not ask the teacher: nothing about time, and sizes of other distributions
    #[arg(long, conflicts_with = "seconds")]
    pub no_run: bool,
    /// Values of k that sizes are compared at
    #[arg(long, value_name = "K,...", value_delimiter = ',', default_value = "8,16,32,64", value_parser = clap::value_parser!(u16).range(1..))]
    pub compare_k: Vec<u16>,
}

/// Longest that a teacher is measured: a day.
const MOST_SECONDS: f64 = 86_400.0;

/// Reads a time to measure for.
fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= MOST_SECONDS => Ok(seconds),
        _ => Err(format!("expected a number of seconds above 0, at most {MOST_SECONDS}")),
    }
}
