//! Reads a cache: what it is, then one conversation token by token.
//!
//! ```text
//! cargo run -p potstill-cache --example read_cache -- FOLDER [ROW or KEY]
//! ```

use potstill_cache::{Cache, RowKey, Target};
use std::error::Error;
use std::path::PathBuf;

fn main() {
    if let Err(e) = run() {
        eprintln!("read_cache: {e}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let dir = PathBuf::from(arguments.next().ok_or("usage: read_cache FOLDER [ROW or KEY]")?);
    let which = arguments.next().unwrap_or_else(|| "0".into());
    let cache = Cache::open(&dir)?;
    let (manifest, about) = (cache.manifest(), &cache.manifest().description);
    println!("{}: {} rows of {}, {}", dir.display(), manifest.rows(), about.teacher.name, about.selection);
    if let Some((mean, max)) = manifest.codec_kl() {
        println!("storing cost {mean:.1e} nats a position, {max:.1e} at most");
    }
    let row = match which.parse::<u64>() {
        Ok(row) => row,
        Err(_) => cache.find(&which.parse::<RowKey>()?)?.ok_or_else(|| format!("no row has key {which}"))?,
    };
    let record = cache.row(row)?;
    println!("row {row}: key {}, seq_id {}, {} tokens", record.key(), record.seq_id, record.input_ids.len());
    for (i, &position) in record.positions.iter().enumerate() {
        // Position p is the distribution after token p: it predicts token p + 1.
        let came = record.input_ids[position as usize + 1];
        println!("{position:5} -> {came:7} | {}", shown(&record.targets.position(i)));
    }
    Ok(())
}

fn shown(target: &Target<'_>) -> String {
    let kept = target.ids.iter().zip(target.logprobs).map(|(id, l)| format!("{id}:{:.3}", l.exp()));
    let drawn = target.sample_ids.iter().zip(target.sample_counts).map(|(id, n)| format!("{id} x {n}"));
    let parts: Vec<String> = kept.take(5).chain(drawn.take(5)).collect();
    format!("{}  tail {:.2e}", parts.join("  "), target.tail_logprob.exp())
}
