//! Measures every way to store a cache, side by side in one run, on given distributions: bytes, what rounding costs, writing,
//! reading, opening.
//!
//! ```text
//! cargo run --release -p potstill-cache --example measure -- --data dists_k128.parquet [--repeat 4] [--json]
//! ```
//!
//! Speeds are CPU time, which hardly depends on what else the machine does. What is timed and what is not is said beside each
//! number's code: `storing.rs`, `reading.rs`.

mod clock;
mod reading;
mod report;
mod source;
mod storing;

use potstill_cache::{Cache, IdEncoding, Knobs, Preset, SelectionKind, Storage, Summary};
use report::{Figures, Report};
use source::{Sequence, Unnamed};
use std::path::{Path, PathBuf};

/// Any error.
pub type Failure = Box<dyn std::error::Error>;

const USAGE: &str = "usage: measure --data FILE.parquet [options]
  --data FILE     sequences with columns input_ids, topk_ids, topk_logits, logsumexp, tail_logprob
  --repeat N      copies of the data in each cache (default 4)
  --tries N       times each cache is written; the median is reported (default 3)
  --reads N       random rows read of each cache (default 300)
  --only A,B      only these storages
  --shards N      shards for the memory of open ones, 0 for none (default 1000)
  --folder DIR    where caches are written, each removed after it (default: a temporary folder)
  --keep          leave the caches there
  --json          JSON in place of tables";

struct Options {
    data: PathBuf,
    repeat: u64,
    tries: usize,
    reads: u64,
    only: Vec<String>,
    shards: u64,
    folder: Option<PathBuf>,
    keep: bool,
    json: bool,
}

fn main() {
    if let Err(e) = run() {
        eprintln!("measure: {e}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [verb, dir, times] = arguments.as_slice()
        && verb == HOLD_OPEN
    {
        return hold_open(Path::new(dir), times.parse()?);
    }
    let options = parse(arguments)?;
    let sequences = Sequence::load(&options.data)?;
    let own = tempfile::tempdir()?;
    let folder = options.folder.clone().unwrap_or_else(|| own.path().to_path_buf());
    let mut report = Report::default();
    for (name, storage, unnamed) in storages()? {
        if options.only.is_empty() || options.only.iter().any(|only| only == name) {
            eprintln!("{name} ...");
            report.storages.push(measure(name, &storage, unnamed, &sequences, &folder, &options)?);
        }
    }
    if options.shards > 0 {
        eprintln!("{} open shards ...", options.shards);
        report.open_shards = Some(open_shards(&folder, options.shards)?);
    }
    match options.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print!("{report}"),
    }
    Ok(())
}

fn parse(arguments: Vec<String>) -> Result<Options, Failure> {
    let mut options = Options {
        data: PathBuf::new(),
        repeat: 4,
        tries: 3,
        reads: 300,
        only: Vec::new(),
        shards: 1000,
        folder: None,
        keep: false,
        json: false,
    };
    let mut rest = arguments.into_iter();
    while let Some(flag) = rest.next() {
        let mut value = || rest.next().ok_or_else(|| format!("{flag} needs a value\n{USAGE}"));
        match flag.as_str() {
            "--data" => options.data = value()?.into(),
            "--repeat" => options.repeat = value()?.parse()?,
            "--tries" => options.tries = value()?.parse()?,
            "--reads" => options.reads = value()?.parse()?,
            "--only" => options.only = value()?.split(',').map(String::from).collect(),
            "--shards" => options.shards = value()?.parse()?,
            "--folder" => options.folder = Some(value()?.into()),
            "--keep" => options.keep = true,
            "--json" => options.json = true,
            "--help" | "-h" => {
                println!("{USAGE}");
                std::process::exit(0);
            }
            other => return Err(format!("unknown option {other}\n{USAGE}").into()),
        }
    }
    if options.data.as_os_str().is_empty() || options.repeat == 0 || options.tries == 0 {
        return Err(format!("--data is needed, and --repeat and --tries of 1 or more\n{USAGE}").into());
    }
    Ok(options)
}

/// Every way to store that is measured.
fn storages() -> Result<Vec<(&'static str, Storage, Unnamed)>, Failure> {
    use Preset::*;
    let none = Knobs::default();
    let top = |k| Knobs { top_k: Some(k), ..none };
    let hybrid = Knobs { selection: Some(SelectionKind::Hybrid), top_k: Some(16), draws: Some(32), ..none };
    let list = [
        ("exact", Exact, none, Unnamed::Redrawn),
        ("exact-cutoff", Exact, Knobs { min_prob: Some(potstill_cache::DEFAULT_MIN_PROB), ..none }, Unnamed::Redrawn),
        ("standard", Standard, none, Unnamed::Redrawn),
        ("compact", Compact, none, Unnamed::Redrawn),
        ("small", Small, none, Unnamed::Redrawn),
        ("sampled", Sampled, none, Unnamed::Redrawn),
        ("sampled-any-id", Sampled, none, Unnamed::AnyId),
        ("hybrid-16+32", Small, hybrid, Unnamed::Redrawn),
        ("hybrid-16+32-any-id", Small, hybrid, Unnamed::AnyId),
        ("standard-compat", Standard, Knobs { id_encoding: Some(IdEncoding::Plain), ..none }, Unnamed::Redrawn),
        // These and the four presets above stand in `potstill plan --no-run`.
        ("exact-8", Exact, top(8), Unnamed::Redrawn),
        ("exact-16", Exact, top(16), Unnamed::Redrawn),
        ("exact-32", Exact, top(32), Unnamed::Redrawn),
        ("exact-128", Exact, top(128), Unnamed::Redrawn),
        ("standard-8", Standard, top(8), Unnamed::Redrawn),
        ("standard-16", Standard, top(16), Unnamed::Redrawn),
        ("standard-32", Standard, top(32), Unnamed::Redrawn),
        ("standard-128", Standard, top(128), Unnamed::Redrawn),
        ("compact-8", Compact, top(8), Unnamed::Redrawn),
        ("compact-16", Compact, top(16), Unnamed::Redrawn),
        ("compact-32", Compact, top(32), Unnamed::Redrawn),
        ("compact-128", Compact, top(128), Unnamed::Redrawn),
        ("small-8", Small, top(8), Unnamed::Redrawn),
        ("small-16", Small, top(16), Unnamed::Redrawn),
        ("small-32", Small, top(32), Unnamed::Redrawn),
        ("small-128", Small, top(128), Unnamed::Redrawn),
    ];
    list.into_iter().map(|(name, preset, knobs, unnamed)| Ok((name, preset.with(&knobs)?, unnamed))).collect()
}

fn measure(
    name: &'static str,
    storage: &Storage,
    unnamed: Unnamed,
    sequences: &[Sequence],
    folder: &Path,
    options: &Options,
) -> Result<Figures, Failure> {
    let records = storing::records(sequences, storage, unnamed);
    let dir = folder.join(name);
    let mut costs = Vec::new();
    for _ in 0..options.tries {
        if dir.exists() {
            std::fs::remove_dir_all(&dir)?;
        }
        costs.push(storing::write(&dir, &records, options.repeat, storage)?.0);
    }
    let cache = Cache::open(&dir)?;
    let summary = Summary::of(&cache, &Default::default())?;
    let scored = summary.scored as f64;
    let median = |of: fn(&storing::Cost) -> f64| clock::quantile(&costs.iter().map(of).collect::<Vec<_>>(), 0.5);
    let (read, arrow) = reading::random_rows(&dir, options.reads)?;
    let (open, manifest) = reading::opening(&dir)?;
    let figures = Figures {
        name,
        selection: storage.selection.to_string(),
        rows: summary.rows,
        scored: summary.scored,
        entries: summary.entries as f64 / scored,
        bytes: summary.bytes as f64 / scored,
        columns: summary.columns.iter().map(|c| (c.name.clone(), c.compressed as f64 / scored)).collect(),
        other: summary.other_bytes as f64 / scored,
        // Nothing is rounded where nothing but counts or logits is kept.
        codec_kl: cache.manifest().codec_kl().filter(|_| storage.selection.head() > 0),
        write_cpu: scored / median(|cost| cost.cpu_s),
        write_wall: scored / median(|cost| cost.wall_s),
        read,
        arrow,
        open,
        manifest,
        cold: reading::cold(&dir)?,
    };
    if !options.keep {
        std::fs::remove_dir_all(&dir)?;
    }
    Ok(figures)
}

/// First argument of the child process that only opens shards.
const HOLD_OPEN: &str = "hold-open";
/// Most shards on disk; for more the same folder is opened several times, each time with maps and metadata of its own.
const SHARDS_ON_DISK: u64 = 100;

/// Memory of a process that holds `shards` shards open, and the CPU microseconds of opening one.
fn open_shards(folder: &Path, shards: u64) -> Result<report::OpenShards, Failure> {
    let dir = folder.join("short");
    let on_disk = shards.min(SHARDS_ON_DISK);
    let storage = Preset::Standard.storage();
    storing::write_short(&dir, on_disk, &storage)?;
    let times = shards.div_ceil(on_disk);
    let child = std::process::Command::new(std::env::current_exe()?)
        .arg(HOLD_OPEN)
        .arg(&dir)
        .arg(times.to_string())
        .stderr(std::process::Stdio::inherit())
        .output()?;
    std::fs::remove_dir_all(&dir)?;
    let text = String::from_utf8(child.stdout)?;
    let numbers: Vec<f64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    match numbers[..] {
        [before, after, micros] if child.status.success() => {
            let (shards, rows) = (on_disk * times, u64::from(storing::ROWS_PER_SHARD));
            Ok(report::OpenShards { shards, rows, before, after, open: micros })
        }
        _ => Err(format!("the process that opens shards said {text:?}").into()),
    }
}

/// Opens the cache in `dir` as often as told, keeps all of them and says what memory that takes and what opening one shard cost.
fn hold_open(dir: &Path, times: u64) -> Result<(), Failure> {
    let before = clock::resident_bytes().ok_or("the system does not say how much memory is resident")?;
    let mut caches = Vec::new();
    let mut micros = Vec::new();
    for _ in 0..times {
        let (taken, cache) = clock::cpu_micros(|| Cache::open(dir));
        let cache = cache?;
        micros.push(taken / cache.manifest().shards.len() as f64);
        caches.push(cache);
    }
    let after = clock::resident_bytes().unwrap_or_default();
    println!("{before} {after} {}", clock::quantile(&micros, 0.5));
    drop(caches);
    Ok(())
}
