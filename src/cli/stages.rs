//! The flags of stage two and what belongs to it: models, adapters, the demo.
// What follows `///` here is help text; the tables of a config file stand in brackets in it.
#![allow(rustdoc::broken_intra_doc_links)]

use clap::Args;
use serde::Serialize;
use std::path::PathBuf;

/// Stage two: train a LoRA adapter on an NF4 student from a cache, or on plain chats
///
/// Writes adapter/ (PEFT), checkpoint-N/, metrics.jsonl, tensorboard/ and the resolved settings into --out; where rows are held
/// out, best/ (PEFT) too: the adapter with the lowest held-out loss. adapter/ is always the last one. The same command, run again,
/// goes on from the newest checkpoint that is whole.
#[derive(Debug, Args, Serialize)]
#[command(
    allow_negative_numbers = true,
    after_help = "\
Example:
  potstill train --student models/Qwen1.5-14B --cache caches/ultrachat --out runs/distill \\
      --objective distill --lr 2e-4 --rank 64 --alpha 16

Without a cache, on the data's own tokens, encoded as precompute does:
  potstill train --objective sft --student models/Qwen1.5-14B \\
      --data 'ultrachat_200k/data/train_sft-*.parquet' --max-length 2048 --out runs/sft

Whole recipes stand in pipeline/recipes: potstill train --config FILE and the paths.

A step whose loss or gradient is not finite is skipped: it changes nothing, is counted, and its
conversations are named in bad-step-N.json. Five in a row end the run.

Divergences of the student's Q from the teacher's P, all from the same cache:
  forward-kl         KL(P, Q)
  reverse-kl         KL(Q, P)
  jsd                b KL(P, M) + (1-b) KL(Q, M), M = b P + (1-b) Q, b = --beta
  skewed-kl          KL(P, M), M = a P + (1-a) Q, a = --skew
  skewed-reverse-kl  KL(Q, M), M = (1-a) P + a Q
  total-variation    half the sum of |P - Q|

What becomes of the probability outside the kept ids (--tail):
  auto         formed at --temperature where the cache declares it, else bucket
  bucket       one entry on each side, also called ghost token
  renorm       left out; teacher and student add up to 1 without it
  studentfull  left out of the teacher alone, whose kept ids add up to 1
  none         top-k KL as it stands: biased and perhaps below 0; forward-kl only

A cache of drawn tokens (sampled, hybrid) is trained on by unbiased estimates, at temperature 1.
The loss shown is then not the divergence from the teacher; its gradient is that one's on average.
--top-k, --min-prob and --min-mass read less than a cache has, as if less had been kept.

At a temperature T that the cache declares, the tail's mass is what the kept entries leave of
its ln Σ p^(1/T). That is exact where logits are kept (preset exact), else as exact as the
rounded values: off by 0.002 (7 bits) to 0.012 (4 bits) of all mass at T = 0.5 on average. For
T below 1 it is held to what the stored tail allows.

At any other T than 1 the tail is one bucket: a guess, for its tokens may be few or many. How far
off it can be is worked out for the cache's first 10,000 positions; a run is refused where that is
more than --max-unknown-mass on average.

--kd-alpha-end, --kd-ce-alpha-end and --temperature-end are the values of the last step; those of
the first are given without -end. A temperature that changes takes the tail as one bucket.

An evaluation gives the held-out loss (kd and ce apart), perplexity, how often student and
teacher find the same token most likely, the probability of the ids that are read, and the
calibration error of the student's confidence (ECE, 15 bins of equal mass). Where the rows held
out, or those of --probe-cache, keep the whole vocabulary, also the angle in degrees between
the gradient of the run's loss and that of full distillation, and the calibration error against
the teacher (15 bins by powers of two, 0 to 2).

Several processes train together where torchrun's variables say so: WORLD_SIZE (above 1), RANK,
MASTER_ADDR and MASTER_PORT, where rank 0 listens (TCP, for private networks); LOCAL_RANK picks the
GPU of --device cuda. Give all of them the same command; --batch-size is that of all together:
  export WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500
  RANK=1 potstill train --config FILE & RANK=0 potstill train --config FILE
or
  torchrun --no-python --nproc-per-node 2 potstill train --config FILE
Rank 0 evaluates and writes; a signal to one stops all. Where torchrun's own store has MASTER_PORT
(TORCHELASTIC_USE_AGENT_STORE=True), the port after it is used. --dist-backend nccl has the GPUs
add up gradients among themselves (libnccl.so.2: pip install nvidia-nccl-cu13); all else stays on TCP.

Each setting may also stand in the table [train] of --config FILE, or in a variable such as
POTSTILL_TRAIN__LR=1e-4. Flags win over variables, variables over the file."
)]
pub struct Train {
    /// Student: a Hugging Face folder or a name ORG/NAME[@REVISION] (dense; held in NF4 while training)
    #[arg(long, value_name = "DIR|NAME")]
    pub student: Option<PathBuf>,
    /// Folder of the cache; or --data
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// Chats instead of a cache, for --objective sft: files, folders, globs or names, as for precompute
    #[arg(long, value_name = "PATH|NAME", num_args = 1..)]
    pub data: Option<Vec<PathBuf>>,
    /// Longest conversation of --data, in tokens
    #[arg(long, value_name = "TOKENS")]
    pub max_length: Option<i64>,
    /// Longer ones of --data lose whole trailing `turns`, or tokens on the `right`
    #[arg(long, value_name = "HOW")]
    pub truncate: Option<String>,
    /// Conversations of --data whose roles cannot be trained on: `skip` or `error`
    #[arg(long, value_name = "WHAT")]
    pub on_bad_roles: Option<String>,
    /// Folder for adapter, checkpoints and metrics
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// sft (the data's tokens), distill (the teacher's distributions) or distill+sft
    #[arg(long, value_name = "OBJECTIVE")]
    pub objective: Option<String>,
    /// Weight of the distillation term [default: sft 0, distill 1, distill+sft 0.5]
    #[arg(long, value_name = "X")]
    pub kd_alpha: Option<f64>,
    /// Weight of the cross entropy [default: sft 1, distill 0, distill+sft 0.5]
    #[arg(long, value_name = "X")]
    pub kd_ce_alpha: Option<f64>,
    /// Temperature T of the distillation term, 0.05 to 100; where the cache keeps ln Σ p^(1/T), the tail is formed at T (below)
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// How the student is compared with the teacher (table below)
    #[arg(long, value_name = "NAME")]
    pub divergence: Option<String>,
    /// Weight of the teacher in jsd, between 0 and 1
    #[arg(long, value_name = "X")]
    pub beta: Option<f64>,
    /// Skew of skewed-kl and skewed-reverse-kl, between 0 and 1
    #[arg(long, value_name = "X")]
    pub skew: Option<f64>,
    /// Probability outside the kept ids: auto, bucket (or ghost), renorm, studentfull or none (table below)
    #[arg(long, value_name = "NAME")]
    pub tail: Option<String>,
    /// Most probability, on average, of which the cache may not tell where it lies at a temperature other than 1; 0 to 1
    #[arg(long, value_name = "P")]
    pub max_unknown_mass: Option<f64>,
    /// Weight of the distillation term at the last step [default: --kd-alpha]
    #[arg(long, value_name = "X")]
    pub kd_alpha_end: Option<f64>,
    /// Weight of the cross entropy at the last step [default: --kd-ce-alpha]
    #[arg(long, value_name = "X")]
    pub kd_ce_alpha_end: Option<f64>,
    /// Temperature at the last step, 0.05 to 100; where it changes, the tails auto and bucket are one bucket [default: --temperature]
    #[arg(long, value_name = "T")]
    pub temperature_end: Option<f64>,
    /// How those three are reached: linear or cosine (constant: they must not change)
    #[arg(long, value_name = "SHAPE")]
    pub loss_schedule: Option<String>,
    /// Read at most so many entries of each distribution [default: all the cache has]
    #[arg(long, value_name = "K")]
    pub top_k: Option<i64>,
    /// Read entries of at least this probability [default: all the cache has]
    #[arg(long, value_name = "P")]
    pub min_prob: Option<f64>,
    /// Read the fewest entries that make up this mass [default: all the cache has]
    #[arg(long, value_name = "P")]
    pub min_mass: Option<f64>,
    /// Optimiser steps; overrides --epochs [default: from --epochs]
    #[arg(long, value_name = "N")]
    pub steps: Option<i64>,
    /// Passes over the cache
    #[arg(long, value_name = "N")]
    pub epochs: Option<f64>,
    /// Conversations in an optimiser step
    #[arg(long, value_name = "ROWS")]
    pub batch_size: Option<i64>,
    /// Tokens that go through the model at once; a step is split into packs
    #[arg(long, value_name = "TOKENS")]
    pub pack_tokens: Option<i64>,
    /// Scored positions whose logits exist at once
    #[arg(long, value_name = "POSITIONS")]
    pub head_chunk: Option<i64>,
    /// Layers, counted from the last, whose activations are kept for the way back instead of being computed again: faster, more memory, the same adapter (--dry-run says how much)
    #[arg(long, value_name = "N")]
    pub keep_layers: Option<i64>,
    /// What the factors of products are rounded to: f32, or bf16 (about twice as fast where the processor has instructions for it; sums, losses and the optimiser stay f32)
    #[arg(long, value_name = "TYPE")]
    pub compute: Option<String>,
    /// Peak learning rate, above 0
    #[arg(long, value_name = "X")]
    pub lr: Option<f64>,
    /// Learning rate after warm-up: constant, cosine, linear or wsd (constant, then a linear fall)
    #[arg(long, value_name = "SHAPE")]
    pub schedule: Option<String>,
    /// Steps of linear warm-up
    #[arg(long, value_name = "N")]
    pub warmup_steps: Option<i64>,
    /// Steps of wsd's fall [default: the last tenth of the run]
    #[arg(long, value_name = "N")]
    pub decay_steps: Option<i64>,
    /// What cosine, linear and wsd fall to, as a share of --lr, from 0 to below 1
    #[arg(long, value_name = "X")]
    pub min_lr_ratio: Option<f64>,
    /// adamw (state in f32, 8 bytes a trainable number) or adamw-8bit (2 bytes)
    #[arg(long, value_name = "KIND")]
    pub optimizer: Option<String>,
    /// LoRA rank, 1 to 1024
    #[arg(long, value_name = "N")]
    pub rank: Option<i64>,
    /// LoRA alpha; the adapter is scaled by alpha / rank, with --rslora by alpha / √rank
    #[arg(long, value_name = "N")]
    pub alpha: Option<f64>,
    /// Scale the adapter by alpha / √rank (rank-stabilised LoRA)
    #[arg(long, num_args = 0, default_missing_value = "true", overrides_with = "no_rslora")]
    pub rslora: Option<bool>,
    /// Scale the adapter by alpha / rank (the default)
    #[arg(long, overrides_with = "rslora")]
    #[serde(skip)]
    pub no_rslora: bool,
    /// Projections that carry the adapter: all, or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub target_modules: Option<Vec<String>>,
    /// Share of the adapter's inputs left out at random while training, from 0 to below 1 (LoRA dropout, as PEFT has it)
    #[arg(long, value_name = "SHARE")]
    pub dropout: Option<f64>,
    /// Decoupled weight decay of AdamW
    #[arg(long, value_name = "X")]
    pub weight_decay: Option<f64>,
    /// AdamW's decay of the first moment, from 0 to below 1
    #[arg(long, value_name = "X")]
    pub beta1: Option<f64>,
    /// AdamW's decay of the second moment, from 0 to below 1
    #[arg(long, value_name = "X")]
    pub beta2: Option<f64>,
    /// AdamW's epsilon, above 0
    #[arg(long, value_name = "X")]
    pub eps: Option<f64>,
    /// Largest L2 norm of the gradient; 0 turns clipping off
    #[arg(long, value_name = "X")]
    pub max_grad_norm: Option<f64>,
    /// Seed of the order, the adapter's start, its dropout, and the rows held out
    #[arg(long, value_name = "N")]
    pub seed: Option<i64>,
    /// Take rows in seeded order (the default)
    #[arg(long, num_args = 0, default_missing_value = "true", overrides_with = "no_shuffle")]
    pub shuffle: Option<bool>,
    /// Take rows in the cache's order
    #[arg(long, overrides_with = "shuffle")]
    #[serde(skip)]
    pub no_shuffle: bool,
    /// Rows of the cache held out: never trained on, but evaluated on; chosen by --seed; 0 for none. The held-out loss has the weights and the temperature of the first step, also where they change
    #[arg(long, value_name = "ROWS")]
    pub eval_rows: Option<i64>,
    /// Another cache to evaluate on, all of its rows; it keeps at least what is read of --cache [default: none]
    #[arg(long, value_name = "DIR")]
    pub eval_cache: Option<PathBuf>,
    /// Steps between evaluations, where rows are held out; the last step is followed by one too
    #[arg(long, value_name = "N")]
    pub eval_every: Option<i64>,
    /// Evaluations in a row without a lower held-out loss after which the run ends; 0 for never. One at the run's end counts where --eval-every has one there; the loss is that of the first step's weights and temperature
    #[arg(long, value_name = "N")]
    pub patience: Option<i64>,
    /// A cache that keeps all ids, on up to 2000 positions of which evaluations look at what --cache leaves out (below) [default: none]
    #[arg(long, value_name = "DIR")]
    pub probe_cache: Option<PathBuf>,
    /// Write TensorBoard event files into tensorboard/ (the default)
    #[arg(long, num_args = 0, default_missing_value = "true", overrides_with = "no_tensorboard")]
    pub tensorboard: Option<bool>,
    /// Write no TensorBoard event files
    #[arg(long, overrides_with = "tensorboard")]
    #[serde(skip)]
    pub no_tensorboard: bool,
    /// Steps between checkpoints; 0 writes only the last one; a stop or a better evaluation still writes one
    #[arg(long, value_name = "N")]
    pub checkpoint_every: Option<i64>,
    /// Checkpoints kept, at least 2
    #[arg(long, value_name = "N")]
    pub keep_checkpoints: Option<i64>,
    /// Say what the run will need in memory, steps and tokens, and do nothing: reads config.json of --student (all that its folder needs to hold) and, if given, the manifest of --cache
    #[arg(long)]
    #[serde(skip)]
    pub dry_run: bool,
    /// Start from the latest checkpoint that is whole, from this one, or never
    #[arg(long, value_name = "latest|PATH|never")]
    pub resume: Option<String>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
    /// What gradients of several processes cross by: tcp, or nccl (from GPU to GPU; needs libnccl.so.2)
    #[arg(long, value_name = "tcp|nccl")]
    pub dist_backend: Option<String>,
    /// TOML file with a table [train]
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
}

/// Merge an adapter into its base model and write a plain model folder
#[derive(Debug, Args, Serialize)]
#[command(after_help = "\
Example:
  potstill merge --student models/Qwen1.5-14B --adapter runs/distill/adapter --out models/my-14B

Each setting may also stand in the table [merge] of --config FILE, or in a variable such as
POTSTILL_MERGE__DTYPE=bf16. Flags win over variables, variables over the file.")]
pub struct Merge {
    /// The base model: a Hugging Face folder or a name ORG/NAME[@REVISION]
    #[arg(long, value_name = "DIR|NAME")]
    pub student: Option<PathBuf>,
    /// The adapter's folder (PEFT)
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Folder of the merged model
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Merge into the `original` weights, or into the `nf4` ones that training saw
    #[arg(long, value_name = "WHICH")]
    pub weights: Option<String>,
    /// Type of the merged weights: auto (the base model's), f32, bf16 or f16
    #[arg(long, value_name = "TYPE")]
    pub dtype: Option<String>,
    /// TOML file with a table [merge]
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
}

/// Seeds of the proof where none are given.
pub const DEFAULT_SEEDS: u64 = 3;

/// Optimiser steps of the proof's students where none are given.
pub const DEFAULT_PROOF_STEPS: u64 = 600;

/// Most seeds of the proof.
pub const MOST_SEEDS: u64 = 10;

/// Make tiny models and run everything on them, with no network, in minutes
///
/// Makes a tokenizer, a teacher (trained for a moment, then packed as AWQ) and a student; then precompute, verify, inspect,
/// train and merge. A demo that was interrupted in the same folder is begun again; any other content is left alone and refused.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  potstill demo --out /tmp/potstill-demo\n  potstill demo --proof")]
pub struct Demo {
    /// Folder for everything the demo makes [default: potstill-demo, or potstill-demo-2 and so on where that is taken]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Instead: does distillation beat fine-tuning on the same data? Three arms, four conditions, several seeds, with intervals; its folder is potstill-proof unless --out says otherwise
    #[arg(long)]
    pub proof: bool,
    /// Seeds of the proof, 1 to 10; an interval needs two, and each takes minutes [default: 3]
    #[arg(long, value_name = "N", requires = "proof", value_parser = clap::value_parser!(u64).range(1..=MOST_SEEDS))]
    pub seeds: Option<u64>,
    /// Optimiser steps of each of the proof's students [default: 600]
    #[arg(long, value_name = "N", requires = "proof", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub steps: Option<u64>,
    /// With the proof: nine other students from one of its caches (k, temperature, divergence, weights), without the teacher
    #[arg(long, requires = "proof")]
    pub sweep: bool,
}
