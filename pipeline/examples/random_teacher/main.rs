//! Writes a model folder of any shape with random weights: for measuring memory and speed at sizes whose real weights are not at hand.
//! It says nothing sensible, but it computes as a real one does: activations stay of order 1 through any number of layers.
//!
//!     cargo run --release -p potstill-pipeline --example random_teacher -- --out FOLDER --tokenizer MODEL_FOLDER [flags]
//!
//! The shape is a 32B one (--hidden 5120 --layers 64 --heads 40 --kv-heads 8 --intermediate 27392 --vocab 152064, about 19 GB)
//! unless flags say otherwise. --awq (int4 in groups of --group 128) or --dense (bf16); --tied: no head of its own; --seed 0;
//! --shard-bytes 4000000000; --dry-run prints sizes and writes nothing. The tokenizer is that of MODEL_FOLDER, filled up with ids
//! that no text yields to --ids (151646, or the vocabulary where that is smaller), so that the head is as wide as in real life.
//!
//! Weights are drawn in blocks, each from its own stream of the seed: the same files whatever the number of threads, and memory
//! for a round of blocks only.

mod shape;
mod shards;
mod tensor;
mod vocabulary;

use serde_json::{Map, json};
use shape::Sizes;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

type Failure = Box<dyn std::error::Error>;

struct Flags {
    out: PathBuf,
    tokenizer: PathBuf,
    sizes: Sizes,
    seed: u64,
    shard_bytes: u64,
    dry_run: bool,
}

impl Flags {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, Failure> {
        let (mut out, mut tokenizer) = (None, None);
        let (mut seed, mut shard_bytes, mut dry_run) = (0, 4_000_000_000, false);
        let mut s = Sizes {
            hidden: 5120,
            layers: 64,
            heads: 40,
            kv_heads: 8,
            intermediate: 27_392,
            vocab: 152_064,
            ids: None,
            group: 128,
            awq: true,
            tied: false,
        };
        while let Some(flag) = arguments.next() {
            let mut text = || arguments.next().ok_or_else(|| format!("{flag}: expected a value, found nothing"));
            let number =
                |text: String| text.parse::<u64>().map_err(|_| format!("{flag}: expected a whole number, found {text:?}"));
            match flag.as_str() {
                "--out" => out = Some(text()?.into()),
                "--tokenizer" => tokenizer = Some(text()?.into()),
                "--awq" => s.awq = true,
                "--dense" => s.awq = false,
                "--tied" => s.tied = true,
                "--dry-run" => dry_run = true,
                "--seed" => seed = number(text()?)?,
                "--shard-bytes" => shard_bytes = number(text()?)?,
                "--ids" => s.ids = Some(number(text()?)? as usize),
                _ => {
                    let size = match flag.as_str() {
                        "--hidden" => &mut s.hidden,
                        "--layers" => &mut s.layers,
                        "--heads" => &mut s.heads,
                        "--kv-heads" => &mut s.kv_heads,
                        "--intermediate" => &mut s.intermediate,
                        "--vocab" => &mut s.vocab,
                        "--group" => &mut s.group,
                        _ => return Err(format!("{flag}: no such flag").into()),
                    };
                    *size = (number(text()?)? as usize).max(1);
                }
            }
        }
        let out = out.ok_or("--out: expected a folder that is not there yet")?;
        Ok(Self {
            out,
            tokenizer: tokenizer.ok_or("--tokenizer: expected a model folder")?,
            sizes: s,
            seed,
            shard_bytes,
            dry_run,
        })
    }
}

fn main() -> Result<(), Failure> {
    let flags = Flags::parse(std::env::args().skip(1))?;
    flags.sizes.check()?;
    let tensors = flags.sizes.tensors();
    let shards = shards::plan(&tensors, flags.shard_bytes);
    let total: u64 = shards.iter().map(|shard| shard.header.len() as u64 + shard.data).sum();
    for shard in &shards {
        println!("{}  {:>14} bytes  {:>5} tensors", shard.name, shard.header.len() as u64 + shard.data, shard.range.len());
    }
    println!("{total} bytes ({:.2} GB) in {} files, {} tensors", total as f64 / 1e9, shards.len(), tensors.len());
    if flags.dry_run {
        return Ok(());
    }

    let begun = Instant::now();
    fs::create_dir(&flags.out).map_err(|e| format!("{}: {e}", flags.out.display()))?;
    vocabulary::fill_up(&flags)?;
    fs::write(flags.out.join("config.json"), serde_json::to_string_pretty(&flags.sizes.config())?)?;
    let mut map = Map::new();
    for shard in &shards {
        let path = flags.out.join(&shard.name);
        let mut file = File::create(&path)?;
        file.write_all(&shard.header)?;
        for number in shard.range.clone() {
            tensors[number].write(&mut file, flags.seed, number)?;
            map.insert(tensors[number].name.clone(), shard.name.clone().into());
        }
        let (planned, written) = (shard.header.len() as u64 + shard.data, file.metadata()?.len());
        if planned != written {
            return Err(format!("{}: expected {planned} bytes, found {written}", path.display()).into());
        }
    }
    let data: u64 = shards.iter().map(|shard| shard.data).sum();
    let index = json!({ "metadata": { "total_size": data }, "weight_map": map });
    fs::write(flags.out.join("model.safetensors.index.json"), serde_json::to_string_pretty(&index)?)?;
    println!("written in {:.1} s", begun.elapsed().as_secs_f64());
    Ok(())
}
