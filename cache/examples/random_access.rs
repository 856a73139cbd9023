//! Random access to single conversations of a large cache: builds one, of made-up distributions, and reads rows of it in random order.
//!
//! ```text
//! cargo run --release -p potstill-cache --example random_access -- --folder DIR [--gigabytes 2.2] [--reads 4000] [--keep]
//! ```
//!
//! The cache is written batch by batch (nothing of it stays in memory) into DIR, and built once: a whole one that is there is used as it
//! is. Then each row's time on the wall, in two states: *warm*, the system holds all files in memory; *cold*, it was asked to forget
//! them. And what each read made of the files: bytes asked of the system (`rchar` of /proc/self/io), and bytes that a disk delivered
//! (`read_bytes`). Linux alone says both. Exits 1 where the warm 99th percentile is 10 ms or more, or where a read asks for more than a
//! thousandth of the cache.

use potstill_cache::{
    Cache, CacheWriter, DataFingerprint, Description, EncodingFingerprint, Manifest, Preset, Record, SoftTargets,
    TeacherFingerprint, TemplateFingerprint, TokenizerFingerprint, WriterOptions,
};
use rayon::prelude::*;
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

type Failure = Box<dyn std::error::Error>;

const USAGE: &str = "usage: random_access --folder DIR [options]
  --folder DIR     where the cache is, or is to be made; needs as much room as it says
  --gigabytes X    size of a new cache, about (default 2.2)
  --reads N        random rows read, warm and cold (default 4000; cold a tenth of them)
  --keep           leave the cache there";

const VOCABULARY: u32 = 151_646;
const ROWS_PER_SHARD: u32 = 1024;
/// Tokens of a conversation: from the first to below the second.
const TOKENS: std::ops::Range<u64> = 200..1024;
/// Rows made and written at once.
const BATCH: u64 = 64;
/// Longest that a warm read may take, in milliseconds, at the 99th percentile; and largest share of the cache that one may ask for.
const LIMIT_MS: f64 = 10.0;
const LIMIT_SHARE: f64 = 1e-3;

struct Options {
    folder: PathBuf,
    gigabytes: f64,
    reads: u64,
    keep: bool,
}

fn main() {
    let done = parse(std::env::args().skip(1)).and_then(|options| run(&options));
    if let Err(e) = done {
        eprintln!("random_access: {e}");
        std::process::exit(1);
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, Failure> {
    let mut options = Options { folder: PathBuf::new(), gigabytes: 2.2, reads: 4000, keep: false };
    while let Some(flag) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{flag} needs a value\n{USAGE}"));
        match flag.as_str() {
            "--folder" => options.folder = value()?.into(),
            "--gigabytes" => options.gigabytes = value()?.parse()?,
            "--reads" => options.reads = value()?.parse()?,
            "--keep" => options.keep = true,
            "--help" | "-h" => {
                println!("{USAGE}");
                std::process::exit(0);
            }
            other => return Err(format!("unknown option {other}\n{USAGE}").into()),
        }
    }
    if options.folder.as_os_str().is_empty() || options.gigabytes.is_nan() || options.gigabytes <= 0.0 || options.reads < 100 {
        return Err(format!("--folder is needed, --gigabytes above 0 and --reads of 100 or more\n{USAGE}").into());
    }
    Ok(options)
}

fn run(options: &Options) -> Result<(), Failure> {
    let dir = options.folder.join("random-access-cache");
    build(&dir, options.gigabytes * 1e9)?;
    let manifest = Manifest::load(&dir)?;
    let (bytes, rows) = (manifest.bytes() as f64, manifest.rows());
    println!(
        "cache        {:.2} GB, {} shards, {rows} rows, {} scored positions",
        bytes / 1e9,
        manifest.shards.len(),
        manifest.scored()
    );
    let (opening, before) = (Instant::now(), io()?);
    let cache = Cache::open(&dir)?;
    println!("opened in    {:.1} ms, {:.1} KB asked for", ms(opening), (io()?.asked - before.asked) as f64 / 1e3);

    for shard in &manifest.shards {
        std::io::copy(&mut File::open(dir.join(&shard.file))?, &mut std::io::sink())?;
    }
    let mut random = Random(1);
    let warm = reads(&cache, (0..options.reads).map(|_| random.below(rows)))?;
    say("warm, first visits", &warm, bytes);
    let again = reads(&cache, (0..options.reads).map(|_| random.below(rows)))?;
    say("warm, later visits", &again, bytes);
    drop(cache);

    for shard in &manifest.shards {
        let file = File::open(dir.join(&shard.file))?;
        file.sync_all()?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
    }
    let cache = Cache::open(&dir)?;
    let cold = reads(&cache, (0..options.reads / 10).map(|_| random.below(rows)))?;
    say("cold", &cold, bytes);
    drop(cache);
    if !options.keep {
        std::fs::remove_dir_all(&dir)?;
    }
    let slowest = [&warm, &again].map(|reads| quantile(reads, |read| read.ms, 0.99)).into_iter().fold(0.0, f64::max);
    let most = warm.iter().chain(&again).map(|read| read.asked as f64).fold(0.0, f64::max);
    if slowest >= LIMIT_MS || most > LIMIT_SHARE * bytes {
        return Err(format!("expected p99 below {LIMIT_MS} ms and reads of at most {LIMIT_SHARE} of the cache").into());
    }
    Ok(())
}

/// One read.
struct Read {
    ms: f64,
    /// Bytes asked of the system.
    asked: u64,
    /// Bytes that a disk delivered.
    delivered: u64,
}

fn reads(cache: &Cache, rows: impl Iterator<Item = u64>) -> Result<Vec<Read>, Failure> {
    let mut reads = Vec::new();
    for row in rows {
        let before = io()?;
        let began = Instant::now();
        let record = cache.row(row)?;
        let ms = ms(began);
        if record.seq_id != row || record.positions.len() + 1 != record.input_ids.len() {
            return Err(format!("row {row} is another one").into());
        }
        let after = io()?;
        // Counters are read before their own reading counts, so the difference holds the first look's.
        reads.push(Read { ms, asked: after.asked - before.asked - before.own, delivered: after.delivered - before.delivered });
    }
    Ok(reads)
}

fn say(state: &str, reads: &[Read], all: f64) {
    let of = |value: fn(&Read) -> f64, share| quantile(reads, value, share);
    let time = |share| of(|read| read.ms, share);
    println!("{state}: {} reads", reads.len());
    println!("  time       median {:.3} ms, p99 {:.3}, largest {:.3}", time(0.5), time(0.99), time(1.0));
    let asked = |share| of(|read| read.asked as f64, share);
    println!(
        "  asked for  median {:.1} KB, p99 {:.1}, largest {:.1}: {:.6} of the cache at most",
        asked(0.5) / 1e3,
        asked(0.99) / 1e3,
        asked(1.0) / 1e3,
        asked(1.0) / all
    );
    let delivered = |share| of(|read| read.delivered as f64, share) / 1e3;
    println!("  from disk  median {:.1} KB, p99 {:.1}, largest {:.1}", delivered(0.5), delivered(0.99), delivered(1.0));
}

fn quantile(reads: &[Read], value: impl Fn(&Read) -> f64, share: f64) -> f64 {
    let mut values: Vec<f64> = reads.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    values[(share * (values.len() - 1) as f64).round() as usize]
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// What this process has asked the system for so far, and what a disk delivered of it; and the bytes that asking this cost.
fn io() -> Result<Counters, Failure> {
    let text = std::fs::read_to_string("/proc/self/io")?;
    let of = |name: &str| -> Result<u64, Failure> {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        Ok(line.ok_or_else(|| format!("/proc/self/io says nothing of {name}"))?.trim().parse()?)
    };
    Ok(Counters { asked: of("rchar:")?, delivered: of("read_bytes:")?, own: text.len() as u64 })
}

struct Counters {
    asked: u64,
    delivered: u64,
    own: u64,
}

/// Writes a cache of about so many bytes, unless a whole one is there.
fn build(dir: &Path, bytes: f64) -> Result<(), Failure> {
    if Manifest::load(dir).is_ok_and(|manifest| manifest.complete) {
        return Ok(());
    }
    if dir.exists() {
        std::fs::remove_dir_all(dir)?;
    }
    // Of 64 ids and 64 values a position some 158 bytes stay: ids drawn from all of the vocabulary hardly compress.
    let rows = (bytes / (158.0 * (TOKENS.start + TOKENS.end) as f64 / 2.0)).ceil() as u64;
    let mut writer = CacheWriter::open(dir, &description(rows), WriterOptions::default())?;
    let (began, mut said) = (Instant::now(), 0);
    for first in (0..rows).step_by(BATCH as usize) {
        let batch: Vec<Record> = (first..rows.min(first + BATCH)).into_par_iter().map(record).collect();
        writer.extend(&batch)?;
        if began.elapsed().as_secs() >= said + 2 {
            said = began.elapsed().as_secs();
            let gone = (first + BATCH).min(rows) as f64 / rows as f64;
            eprintln!("writing: {:.0}%, {:.2} GB, {said} s", 100.0 * gone, writer.manifest().bytes() as f64 / 1e9);
        }
    }
    writer.finish()?;
    eprintln!("written in {:.0} s", began.elapsed().as_secs_f64());
    Ok(())
}

/// A conversation of which every position is scored.
fn record(seq_id: u64) -> Record {
    let mut random = Random(seq_id << 20);
    let tokens = TOKENS.start + random.below(TOKENS.end - TOKENS.start);
    let mut targets = SoftTargets::with_capacity(tokens as usize, 64);
    let (mut ids, mut logprobs) = (Vec::with_capacity(64), Vec::with_capacity(64));
    for _ in 1..tokens {
        // A Zipf's law over 64 ids, each in a stretch of the vocabulary of its own, with a tail below the last of them.
        let (top, slope) = (-(0.05 + 2.0 * random.unit()), 1.5 + random.unit());
        let stretch = u64::from(VOCABULARY) / 64;
        let turn = random.below(64);
        ids.clear();
        logprobs.clear();
        for i in 0..64u64 {
            ids.push((((i + turn) % 64) * stretch + random.below(stretch)) as u32);
            logprobs.push((top - slope * (1.0 + i as f64).ln() - 0.01 * i as f64) as f32);
        }
        let total: f64 = logprobs.iter().map(|l| f64::from(*l).exp()).sum::<f64>() * 1.01;
        logprobs.iter_mut().for_each(|l| *l -= total.ln() as f32);
        targets.push(&ids, &logprobs, (0.01f64 / 1.01).ln() as f32);
    }
    let input_ids = (0..tokens).map(|_| random.below(u64::from(VOCABULARY)) as u32).collect();
    Record { seq_id, input_ids, positions: (0..tokens as u32 - 1).collect(), targets, codec: Default::default() }
}

fn description(rows: u64) -> Description {
    let none = String::new;
    let description = Description {
        teacher: TeacherFingerprint {
            name: "made up".into(),
            config_blake3: none(),
            weights_blake3: none(),
            weights: "none".into(),
            compute: "none".into(),
        },
        tokenizer: TokenizerFingerprint { vocabulary_blake3: none(), blake3: none(), size: VOCABULARY },
        template: TemplateFingerprint { source: none(), blake3: none() },
        data: DataFingerprint { files: Vec::new(), rows, skipped: Default::default() },
        encoding: EncodingFingerprint { max_length: TOKENS.end as u32, truncation: "right".into(), truncated_tokens: 0 },
        selection: Preset::Standard.storage().selection,
        mantissa_bits: 7,
        values: Default::default(),
        lse_temperatures: Vec::new(),
        zstd_level: 3,
        id_encoding: Default::default(),
        rows_per_shard: ROWS_PER_SHARD,
        vocab_size: VOCABULARY,
        expected_rows: rows,
        part: None,
        derived: Vec::new(),
    };
    description.stored_as(&Preset::Standard.storage())
}

/// SplitMix64: the same numbers on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.bits() % n
    }

    fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}
