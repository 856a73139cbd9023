//! What a run leaves behind however it ends: killed before any of its operations on files, or with a checkpoint that was changed
//! afterwards.
//!
//! Killed before every second or third operation by default, before each with `POTSTILL_CAMPAIGN_FAULTS=all`; changed as often as
//! `POTSTILL_CAMPAIGN_MUTATIONS` says (1,000).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::checkpoint::RunFolder;
use super::ranks::Ranks;
use super::{Objective, Resume, TrainConfig, TrainError, digests, files::kill, prepare, run};
use crate::precompute::{self, PrecomputeConfig};
use crate::run::RunContext;
use crate::{Error, Result};
use potstill_cache::ErrorClass;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden");
const STEPS: u64 = 4;

/// A folder in memory, where there is room for one: a sync is quick there.
fn scratch() -> tempfile::TempDir {
    let memory = tempfile::Builder::new().prefix("potstill-").tempdir_in("/dev/shm");
    memory.or_else(|_| tempfile::tempdir()).unwrap()
}

fn config(out: &Path) -> TrainConfig {
    TrainConfig {
        student: Path::new(GOLDEN).join("student"),
        data: vec![Path::new(GOLDEN).join("chats.jsonl")],
        out: out.to_path_buf(),
        objective: Objective::Sft,
        max_length: 48,
        steps: Some(STEPS),
        batch_size: 1,
        lr: 2e-3,
        warmup_steps: 0,
        rank: 1,
        checkpoint_every: 1,
        ..TrainConfig::default()
    }
}

fn train(config: &TrainConfig) -> Result<()> {
    run(config, &RunContext::default()).map(drop)
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_string();
    entries.filter(|path| path.is_file()).map(|path| (name(&path), fs::read(&path).unwrap())).collect()
}

/// Steps of the checkpoints in `out`, each proven whole.
fn whole_checkpoints(out: &Path) -> Vec<u64> {
    let mut steps = Vec::new();
    for entry in fs::read_dir(out).into_iter().flatten() {
        let path = entry.unwrap().path();
        let Some(step) = path.file_name().unwrap().to_str().unwrap().strip_prefix("checkpoint-") else { continue };
        digests::check(&path, &["adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json"]).unwrap();
        steps.push(step.parse().unwrap());
    }
    steps.sort_unstable();
    steps
}

/// Kills a run before its operations on files, every `every`-th of them, and lets it go on: it keeps whole checkpoints, and ends with
/// the bytes of one that was never killed.
fn killed_and_gone_on(every: usize, config: impl Fn(&Path) -> TrainConfig) {
    let whole = scratch();
    let (result, calls) = kill::after(u64::MAX, || train(&config(whole.path())));
    result.unwrap();
    let ends = ["adapter", "best"].map(|name| (name, whole.path().join(name))).into_iter().filter(|(_, path)| path.exists());
    let expected: Vec<_> = ends.map(|(name, path)| (name, files(&path))).collect();
    assert_eq!(expected.len(), 1 + usize::from(config(whole.path()).evaluates()));
    digests::check(&whole.path().join("adapter"), &["adapter_model.safetensors"]).unwrap();
    assert_eq!(whole_checkpoints(whole.path()), [STEPS - 1, STEPS]);
    let every = if std::env::var("POTSTILL_CAMPAIGN_FAULTS").is_ok_and(|all| all == "all") { 1 } else { every };
    println!("{calls} calls, killed before every {every}");
    let mut most = 0;
    for last in (0..calls).step_by(every) {
        let dir = scratch();
        let (result, _) = kill::after(last, || train(&config(dir.path())));
        assert!(result.unwrap_err().to_string().contains("killed"), "call {last}");
        let left = whole_checkpoints(dir.path());
        // Two are there as soon as two were written, and none goes before the next one stands.
        assert!(left.len() >= most.min(2), "call {last}: {left:?}");
        most = most.max(left.len());
        assert!(left.windows(2).all(|pair| pair[1] == pair[0] + 1), "call {last}: {left:?}");
        train(&config(dir.path())).unwrap_or_else(|error| panic!("after call {last}: {error}"));
        for (name, expected) in &expected {
            let found = files(&dir.path().join(name));
            let files = found.keys().chain(expected.keys());
            let other: Vec<_> = files.filter(|file| found.get(*file) != expected.get(*file)).collect();
            assert!(other.is_empty(), "{name}: {other:?}, killed before call {}", last + 1);
        }
        assert_eq!(whole_checkpoints(dir.path()), [STEPS - 1, STEPS]);
        let hidden = |name: &str| name.starts_with('.');
        assert!(!fs::read_dir(dir.path()).unwrap().any(|e| hidden(e.unwrap().file_name().to_str().unwrap())), "call {last}");
    }
    assert_eq!(most, 3, "a third one is there before the first goes");
}

#[test]
fn killed_before_any_call_a_run_keeps_whole_checkpoints_and_ends_the_same() {
    killed_and_gone_on(2, config);
}

#[test]
fn killed_before_any_call_a_run_that_evaluates_ends_the_same_and_has_the_same_best() {
    let dir = scratch();
    let cache = PrecomputeConfig {
        teacher: Path::new(GOLDEN).join("teacher-awq"),
        data: vec![Path::new(GOLDEN).join("chats.jsonl")],
        cache: dir.path().join("cache"),
        max_length: 32,
        top_k: Some(4),
        ..PrecomputeConfig::default()
    };
    precompute::run(&cache, &RunContext::default()).unwrap();
    killed_and_gone_on(3, |out| TrainConfig {
        objective: Objective::Distill,
        data: Vec::new(),
        cache: cache.cache.clone(),
        eval_rows: 1,
        eval_every: 1,
        dropout: 0.1,
        ..config(out)
    });
}

#[test]
fn killed_while_a_step_is_saved_again_a_run_keeps_a_whole_checkpoint_of_it() {
    let dir = scratch();
    let config = TrainConfig { steps: Some(2), ..config(dir.path()) };
    train(&config).unwrap();
    let names = |dir: &Path| -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let checkpoint = dir.path().join("checkpoint-2");
    let (left, whole) = (names(dir.path()), files(&checkpoint));
    let (alone, context) = (Ranks::alone(), RunContext::default());
    let save = |last: u64| {
        let (run, _) = prepare(&config, &alone, &context).unwrap();
        assert_eq!(run.progress.step, 2, "call {last}");
        kill::after(last, || run.save())
    };
    let (result, calls) = save(u64::MAX);
    result.unwrap();
    assert_eq!((names(dir.path()), files(&checkpoint)), (left.clone(), whole.clone()), "the old one goes");
    let mut put_back = 0;
    for last in 0..calls {
        let (result, _) = save(last);
        assert!(result.unwrap_err().to_string().contains("killed"), "call {last}");
        put_back += u64::from(!checkpoint.exists());
        drop(RunFolder::open(&config).unwrap());
        assert_eq!(whole_checkpoints(dir.path()), [1, 2], "call {last}");
        assert_eq!((names(dir.path()), files(&checkpoint)), (left.clone(), whole.clone()), "call {last}");
    }
    // The one name is gone and the other not there yet: before the folder's sync, and before the second name.
    assert_eq!(put_back, 2);
}

/// One random change of a checkpoint in `dir`, in words. Never none.
fn change(dir: &Path, random: &mut ChaCha8Rng) -> String {
    let mut all: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    let below = |random: &mut ChaCha8Rng, n: usize| random.next_u32() as usize % n;
    let path = all[below(random, all.len())].clone();
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    let mut bytes = fs::read(&path).unwrap();
    let at = below(random, bytes.len());
    let what = match below(random, 6) {
        0 => {
            bytes[at] ^= 1 << below(random, 8);
            "a bit"
        }
        1 => {
            bytes[at] = bytes[at].wrapping_add(1 + below(random, 255) as u8);
            "a byte"
        }
        2 => {
            bytes.truncate(at);
            "cut"
        }
        3 => {
            bytes.insert(at, b' ');
            "a space more"
        }
        4 => {
            fs::remove_file(&path).unwrap();
            return format!("{name}: gone");
        }
        _ => {
            let other = all.iter().map(|other| fs::read(other).unwrap()).find(|other| *other != bytes).unwrap();
            bytes = other;
            "another file's bytes"
        }
    };
    fs::write(&path, bytes).unwrap();
    format!("{name}: {what} at {at}")
}

#[test]
fn no_change_of_a_checkpoint_goes_unseen() {
    let dir = scratch();
    train(&TrainConfig { steps: Some(2), ..config(dir.path()) }).unwrap();
    let good = files(&dir.path().join("checkpoint-2"));
    let times = std::env::var("POTSTILL_CAMPAIGN_MUTATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(1000);
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let latest = config(dir.path());
    let named = TrainConfig { resume: Resume::Path(dir.path().join("checkpoint-2")), ..latest.clone() };
    let folder = RunFolder::open(&latest).unwrap();
    let step = |found: super::checkpoint::Found| found.checkpoint.unwrap().step();
    assert_eq!(step(folder.find(&latest, 9).unwrap()), 2);
    for _ in 0..times {
        let what = change(&dir.path().join("checkpoint-2"), &mut random);
        // One that was named is refused; from the newest a run goes back to the one before it, and says why.
        let error = folder.find(&named, 9).expect_err(&what);
        let listless = matches!(error, Error::Train(TrainError::NoCheckpoint { .. }));
        assert!(listless || error.class() == ErrorClass::Integrity, "{what}: {error}");
        let found = folder.find(&latest, 9).unwrap();
        let said = found.passed_over.join(" ");
        assert!(said.contains("checkpoint-2") && said.ends_with("checkpoint-1"), "{what}: {said}");
        assert_eq!(step(found), 1, "{what}");
        fs::remove_dir_all(dir.path().join("checkpoint-2")).unwrap();
        fs::create_dir(dir.path().join("checkpoint-2")).unwrap();
        good.iter().for_each(|(name, bytes)| fs::write(dir.path().join("checkpoint-2").join(name), bytes).unwrap());
    }
    // With none whole the newest is what is complained of.
    for name in ["checkpoint-1", "checkpoint-2"] {
        fs::write(dir.path().join(name).join("trainer_state.json"), "{}").unwrap();
    }
    let error = folder.find(&latest, 9).unwrap_err();
    assert!(error.class() == ErrorClass::Integrity && error.to_string().contains("checkpoint-2"), "{error}");
}

/// The newest of two checkpoints is there and cannot be read, or not by this version: the run goes on from the one before it.
#[test]
fn a_checkpoint_that_cannot_be_read_gives_way_to_the_one_before() {
    let dir = scratch();
    train(&TrainConfig { steps: Some(2), ..config(dir.path()) }).unwrap();
    let latest = config(dir.path());
    let folder = RunFolder::open(&latest).unwrap();
    let checkpoint = dir.path().join("checkpoint-2");
    let named = TrainConfig { resume: Resume::Path(checkpoint.clone()), ..latest.clone() };
    let refused = |class: ErrorClass, words: &str| {
        let error = folder.find(&named, 9).unwrap_err();
        assert!(error.class() == class && error.to_string().contains(words), "{error}");
        let found = folder.find(&latest, 9).unwrap();
        let said = found.passed_over.join(" ");
        assert!(said.contains(words) && said.ends_with("checkpoint-1"), "{said}");
        assert_eq!(found.checkpoint.unwrap().step(), 1, "{words}");
    };
    let list = checkpoint.join("digests.json");
    let good = fs::read(&list).unwrap();
    fs::write(&list, vec![b' '; (1 << 20) + 1]).unwrap();
    refused(ErrorClass::Integrity, "digests.json: damaged checkpoint: expected at most 1048576 bytes, found more");
    // As earlier builds wrote it: digests by name alone.
    let digests: serde_json::Value = serde_json::from_slice(&good).unwrap();
    fs::write(&list, digests["files"].to_string()).unwrap();
    refused(ErrorClass::Mismatch, "checkpoint-2: was written by an earlier version");
    fs::write(&list, &good).unwrap();
    assert_eq!(folder.find(&latest, 9).unwrap().checkpoint.unwrap().step(), 2);
    // What a failing disk gives: a file whose first byte cannot be read (address 0 of the process is none).
    #[cfg(target_os = "linux")]
    {
        fs::remove_file(checkpoint.join("optimizer.safetensors")).unwrap();
        std::os::unix::fs::symlink("/proc/self/mem", checkpoint.join("optimizer.safetensors")).unwrap();
        refused(ErrorClass::Runtime, "optimizer.safetensors: Input/output error");
        // Where no other is left, that is what stops the run.
        fs::remove_dir_all(dir.path().join("checkpoint-1")).unwrap();
        let error = folder.find(&latest, 9).unwrap_err().to_string();
        assert!(error.contains("optimizer.safetensors: Input/output error"), "{error}");
    }
}
