//! The flags of the verbs that look at caches, check them and make others of them.
// What follows `///` here is help text; the tables of a config file stand in brackets in it.
#![allow(rustdoc::broken_intra_doc_links)]

use super::word;
use clap::Args;
use potstill_cache::{Preset, SelectionKind, Values};
use potstill_pipeline::precompute::Share;
use std::path::PathBuf;

/// Show what a cache holds, or one conversation token by token
///
/// Without flags: what the cache is and how its distributions look, on one screen. With --html: a page of both, to be passed on.
#[derive(Debug, Args)]
#[command(after_help = "\
Probabilities are the teacher's, at temperature 1; entropy and surprise are in nats.
Line i of the table shows the distribution after tokens 0 to i, which predicts token i + 1.
A token's colour, or the block below it, tells how surprising it was itself.
Characters split over tokens are shown where they end: \\xA0 你 is a byte, and what it makes.

Examples:
  potstill inspect caches/ultrachat
  potstill inspect caches/ultrachat --row 17 --top 3
  potstill inspect caches/ultrachat --find 'capital of France'
  potstill inspect caches/ultrachat --html ultrachat.html --sample 100
  potstill inspect caches/ultrachat --row 17 --json | jq '.positions[0]'")]
pub struct Inspect {
    /// Folder of the cache
    #[arg(value_name = "CACHE")]
    pub cache: PathBuf,
    /// Show this conversation, by its row number (from 0)
    #[arg(long, value_name = "N", group = "which")]
    pub row: Option<u64>,
    /// Show this conversation, by its key (32 hex digits)
    #[arg(long, value_name = "KEY", group = "which")]
    pub key: Option<String>,
    /// List the first 20 conversations that contain this text, letter by letter, and show the place in the first one
    #[arg(long, value_name = "TEXT", group = "which")]
    pub find: Option<String>,
    /// Write one self-contained page to this file: figures, and conversations token by token. Needs no network to be looked at
    #[arg(long, value_name = "FILE", group = "which")]
    pub html: Option<PathBuf>,
    /// Conversations in the page: the 10 most surprising, and others evenly spaced (some 10 to 20 KB each)
    #[arg(long, value_name = "N", default_value_t = 200, requires = "html", value_parser = clap::value_parser!(u64).range(1..))]
    pub sample: u64,
    /// Alternatives shown at each position (--json always gives all)
    #[arg(long, value_name = "M", default_value_t = 5)]
    pub top: usize,
}

/// Say how far two caches of the same conversations lie apart
///
/// Two teachers, two codecs, two k: KL both ways, how often the most likely token is the same, percentiles, the rows that differ most.
#[derive(Debug, Args)]
#[command(after_help = "\
Rows are matched by key: the same tokens, scored at the same positions. Caches that share none are refused.
A divergence is taken over the ids that both caches keep and one outcome for all else: at least so large.

Examples:
  potstill diff caches/awq caches/bf16
  potstill diff caches/k64 caches/k16 --json | jq .figures.forward")]
pub struct Diff {
    /// Folder of the first cache
    #[arg(value_name = "A")]
    pub first: PathBuf,
    /// Folder of the second cache
    #[arg(value_name = "B")]
    pub second: PathBuf,
}

/// Check every byte of a cache, or a share of it
///
/// Reads each shard, compares it with the manifest's BLAKE3 and decodes every row. Exit code 4 when anything is wrong.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  potstill verify caches/ultrachat
  potstill verify caches/ultrachat --quick
  potstill verify caches/ultrachat --sample 3/7      (one of seven shares a day: a week checks all)

What is damaged is computed again by the command that made the cache:
  potstill verify caches/ultrachat --repair-list damage.json
  potstill precompute ... --cache caches/ultrachat --repair damage.json")]
pub struct Verify {
    /// Folder of the cache
    #[arg(value_name = "CACHE")]
    pub cache: PathBuf,
    /// Read no row: only manifest, companion files, and each shard's size and footer
    #[arg(long, conflicts_with = "sample")]
    pub quick: bool,
    /// Read every T-th row and digest every T-th shard, from the N-th on; shares 1 to T together are the whole check
    #[arg(long, value_name = "N/T", value_parser = str::parse::<Share>)]
    pub sample: Option<Share>,
    /// Write what has to be computed again to this file, for precompute --repair
    #[arg(long, value_name = "FILE")]
    pub repair_list: Option<PathBuf>,
}

/// How rows are to be stored in a cache that is made of others. Nothing that was not kept comes back.
#[derive(Debug, Args)]
pub struct Storing {
    /// Start from this preset instead of what the cache has: exact, standard, compact, small or sampled
    #[arg(long, value_name = "PRESET", value_parser = word::<Preset>)]
    pub preset: Option<Preset>,
    /// What is kept of each distribution: top-k, cutoff, sampled or hybrid
    #[arg(long, value_name = "KIND", value_parser = word::<SelectionKind>)]
    pub selection: Option<SelectionKind>,
    /// Most entries kept at each scored position
    #[arg(long, value_name = "K")]
    pub top_k: Option<u16>,
    /// Keep entries of at least this probability
    #[arg(long, value_name = "P")]
    pub min_prob: Option<f32>,
    /// Keep the fewest entries that make up this mass
    #[arg(long, value_name = "MASS")]
    pub min_mass: Option<f32>,
    /// What is stored of kept entries: logprob or logit-bf16
    #[arg(long, value_name = "VALUES", value_parser = word::<Values>)]
    pub values: Option<Values>,
    /// Mantissa bits kept of each log-probability, 1 to 23
    #[arg(long, value_name = "BITS")]
    pub mantissa_bits: Option<u8>,
    /// zstd level of the shards, 1 to 22
    #[arg(long, value_name = "LEVEL")]
    pub zstd_level: Option<i32>,
    /// Lay ids out so that readers from before 2025 can read them: a few per cent larger
    #[arg(long)]
    pub compat: bool,
    /// Conversations in a shard
    #[arg(long, value_name = "ROWS")]
    pub rows_per_shard: Option<u32>,
}

/// Store a cache anew without the teacher: smaller, never finer
///
/// Without flags the new cache is stored as the old one, in the current format version. Run again, it continues.
#[derive(Debug, Args)]
#[command(after_help = "\
Asking for more than the cache holds (a larger k, more mantissa bits) is refused.

Examples:
  potstill repack caches/ultrachat caches/compact --preset compact
  potstill repack caches/ultrachat caches/top16 --top-k 16
  potstill repack caches/ultrachat caches/archive --zstd-level 19")]
pub struct Repack {
    /// Folder of the cache to read
    #[arg(value_name = "CACHE")]
    pub source: PathBuf,
    /// Folder of the new cache
    #[arg(value_name = "OUT")]
    pub out: PathBuf,
    /// How to store.
    #[command(flatten)]
    pub storing: Storing,
}

/// Join caches: parts of the same data, interrupted runs, other data
///
/// The parts of one data make the very bytes of a single run over it. A folder of workers' parts stands for all of them. Caches of
/// other data are put one after another. Run again, it continues.
#[derive(Debug, Args)]
#[command(after_help = "\
Teacher, tokenizer, template and settings have to be alike. A conversation that two caches hold is kept once if
its distributions are the same; if they differ, nothing is written and both places are named.

Of a folder that `precompute --worker` filled, every worker's part has to be there and finished.

Examples:
  potstill combine --out caches/all caches/part-1 caches/part-2 caches/part-3
  potstill combine --out caches/all caches/parts          (parts/worker-00000-of-00003 and so on)
  potstill combine --out caches/top16 --top-k 16 caches/ultrachat caches/code")]
pub struct Combine {
    /// Folders of the caches to read, or of workers' parts
    #[arg(value_name = "CACHE", required = true, num_args = 1..)]
    pub sources: Vec<PathBuf>,
    /// Folder of the new cache
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// How to store.
    #[command(flatten)]
    pub storing: Storing,
}
