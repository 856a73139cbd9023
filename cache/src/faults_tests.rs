//! Every call to the system of a run over three shards fails in every way: each time a clean error, a folder that verifies, and a
//! rerun that ends byte-identical.
//!
//! A share of the calls by default; all of them with `POTSTILL_CAMPAIGN_FAULTS=all`. And the power is cut at any moment:
//! `POTSTILL_CAMPAIGN_CUTS` times.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::{Fault, Lasting, with};
use crate::fingerprint::tests_description;
use crate::power::{noted, recorded};
use crate::{
    Cache, CacheWriter, Companion, Description, ErrorClass, Manifest, Record, Repair, RepairList, Result, ScanProgress,
    Selection, SoftTargets, Values, WriterOptions, verify,
};
use std::collections::BTreeMap;
use std::path::Path;

const ROWS: u64 = 11;
const ROWS_PER_SHARD: u32 = 4;

fn description() -> Description {
    let plain = tests_description(Selection::TopK { k: 3 }, Values::Logprob);
    Description { rows_per_shard: ROWS_PER_SHARD, expected_rows: ROWS, ..plain }
}

fn records() -> Vec<Record> {
    let record = |seq_id: u64| {
        let tokens = 4 + seq_id % 5;
        let positions: Vec<u32> = (0..tokens as u32 - 1).collect();
        let mut targets = SoftTargets::with_capacity(positions.len(), 3);
        for &position in &positions {
            let first = (seq_id as u32 + position) % 8;
            targets.push(&[first, first + 1, first + 2], &[0.5f32.ln(), 0.25f32.ln(), 0.125f32.ln()], 0.125f32.ln());
        }
        let input_ids = (0..tokens).map(|i| ((seq_id * 7 + i * 3) % 10) as u32).collect();
        Record { seq_id, input_ids, positions, targets, codec: Default::default() }
    };
    (0..ROWS).map(record).collect()
}

/// Makes the cache, or what is missing of it. Every second row of the first two shards ends a piece.
fn run(dir: &Path) -> Result<Manifest> {
    run_noting(dir, &mut |_| {})
}

/// The same; tells `durable` the number of rows that are durable by now.
fn run_noting(dir: &Path, durable: &mut dyn FnMut(u64)) -> Result<Manifest> {
    let options = WriterOptions { companions: vec![Companion { path: "a/b.json".into(), bytes: vec![7; 40] }] };
    let mut writer = CacheWriter::open(dir, &description(), options)?;
    let keys = writer.committed_keys()?;
    let records = records();
    assert!(keys.iter().zip(&records).all(|(key, record)| *key == record.key()));
    for (row, record) in records.iter().enumerate().skip(writer.committed_rows() as usize) {
        writer.append(record)?;
        if row % 2 == 1 && row < 8 {
            writer.seal()?;
        }
        durable(writer.committed_rows());
    }
    writer.finish().inspect(|manifest| durable(manifest.rows()))
}

/// A folder in memory, where there is room for one: what is tested here does not depend on the disk, and a sync is quick there.
fn scratch() -> tempfile::TempDir {
    let memory = tempfile::Builder::new().prefix("potstill-").tempdir_in("/dev/shm");
    memory.or_else(|_| tempfile::tempdir()).unwrap()
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        match path.is_dir() {
            true => found.extend(files(&path).into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes))),
            false => drop(found.insert(name, std::fs::read(&path).unwrap())),
        }
    }
    found
}

/// One trial: how the first run ended, and whether it got as far as the fault.
struct Trial {
    reached: bool,
    failed: bool,
}

/// In a folder prepared by `before`, a run whose call `at` fails; then a run that may finish.
fn trial(before: &dyn Fn(&Path), at: u64, fault: Fault, lasting: Lasting, expected: &BTreeMap<String, Vec<u8>>) -> Trial {
    let parent = scratch();
    let dir = parent.path().join("of/a/cache");
    before(&dir);
    let what = format!("call {at}: {fault:?} {lasting:?}");
    let (result, calls) = with(at, fault, lasting, || run(&dir));
    if let Err(error) = &result {
        let class = error.class();
        assert_eq!(class, ErrorClass::Runtime, "{what}: {error}");
        let named = error.to_string();
        assert!(named.contains("os error") || named.contains("nterrupted"), "{what}: the cause is not told: {named}");
    }
    // Whatever is there by now is whole.
    match Cache::open(&dir) {
        Ok(_) => {
            let report = verify(&dir, &ScanProgress::default()).unwrap();
            assert!(report.is_good(), "{what}: {:?}", report.problems);
            assert_eq!(report.good_rows, report.rows, "{what}");
        }
        Err(crate::Error::NoFolder { .. } | crate::Error::NoManifest { .. }) => assert!(result.is_err(), "{what}"),
        Err(error) => panic!("{what}: {error}"),
    }
    run(&dir).unwrap_or_else(|error| panic!("{what}: the rerun failed: {error}"));
    let found = files(&dir);
    let differing: Vec<&String> = expected.keys().chain(found.keys()).filter(|n| expected.get(*n) != found.get(*n)).collect();
    assert!(differing.is_empty(), "{what}: {differing:?} differ from an uninterrupted run");
    Trial { reached: calls >= at, failed: result.is_err() }
}

/// Trials over the calls of a run in a folder prepared by `before`. Gives how many calls that run makes.
fn sweep(before: &dyn Fn(&Path), share: u64) -> u64 {
    let whole = scratch();
    run(whole.path()).unwrap();
    let expected = files(whole.path());
    let mut most = 0;
    for (i, fault) in Fault::ALL.into_iter().enumerate() {
        for lasting in [Lasting::Once, Lasting::FromThenOn] {
            let (mut at, mut failed) = (1 + i as u64 % share, 0);
            loop {
                let trial = trial(before, at, fault, lasting, &expected);
                if !trial.reached {
                    break;
                }
                failed += u64::from(trial.failed);
                most = most.max(at);
                at += share;
            }
            // A short or interrupted write is no failure by itself; the others are, wherever they come.
            let must = matches!(fault, Fault::Eio | Fault::Full | Fault::Late);
            assert!(failed > 0 || !must, "{fault:?} {lasting:?} never failed a run");
            if matches!(fault, Fault::Half | Fault::Interrupted) && lasting == Lasting::Once {
                assert_eq!(failed, 0, "{fault:?} is no error");
            }
        }
    }
    most
}

/// Every how many calls one is tried: all of them on demand.
fn share() -> u64 {
    if std::env::var("POTSTILL_CAMPAIGN_FAULTS").is_ok_and(|all| all == "all") { 1 } else { 29 }
}

/// All calls on one thread: encoders and checks too, so that "the n-th call" is one and the same call in every run.
fn alone(work: impl FnOnce() + Send) {
    rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(work);
}

#[test]
fn any_call_of_a_run_may_fail() {
    alone(|| {
        let calls = sweep(&|_| {}, share());
        assert!(calls > 100, "{calls} calls");
        eprintln!("a run makes some {calls} calls");
    });
}

#[test]
fn any_call_of_a_resumed_run_may_fail() {
    alone(|| {
        for stop in [3, 6] {
            let begun = |dir: &Path| {
                let options = WriterOptions { companions: vec![Companion { path: "a/b.json".into(), bytes: vec![7; 40] }] };
                let mut writer = CacheWriter::open(dir, &description(), options).unwrap();
                for (row, record) in records().iter().enumerate().take(stop) {
                    writer.append(record).unwrap();
                    if row % 2 == 1 {
                        writer.seal().unwrap();
                    }
                }
            };
            let calls = sweep(&begun, share() * 2 - 1);
            assert!(calls > 50, "{calls} calls");
        }
    });
}

/// Verifies the cache and repairs what is listed.
fn repair(dir: &Path, list: &Path) -> Result<()> {
    let report = verify(dir, &ScanProgress::default())?;
    RepairList::of(&report).save(list)?;
    let options = WriterOptions { companions: vec![Companion { path: "a/b.json".into(), bytes: vec![7; 40] }] };
    let mut repair = Repair::open(dir, &description(), &options, list)?;
    let records = records();
    for shard in repair.shards().to_vec() {
        let mut mending = repair.mend(&shard)?;
        for &row in &shard.recompute {
            mending.extend(&records[row as usize..=row as usize])?;
        }
        mending.finish()?;
    }
    repair.finish().map(|_| ())
}

#[test]
fn any_call_of_a_repair_may_fail() {
    alone(|| {
        let whole = scratch();
        run(whole.path()).unwrap();
        let expected = files(whole.path());
        let list = scratch();
        let list = list.path().join("repair.json");
        for (i, fault) in Fault::ALL.into_iter().enumerate() {
            for lasting in [Lasting::Once, Lasting::FromThenOn] {
                let mut at = 1 + i as u64 % share();
                loop {
                    let dir = scratch();
                    run(dir.path()).unwrap();
                    // A byte of a row's pages in one shard; all of another.
                    let mut bytes = expected["shard-00001.parquet"].clone();
                    bytes[200] ^= 4;
                    std::fs::write(dir.path().join("shard-00001.parquet"), bytes).unwrap();
                    std::fs::remove_file(dir.path().join("shard-00002.parquet")).unwrap();
                    let what = format!("call {at} of a repair: {fault:?} {lasting:?}");
                    let (_, calls) = with(at, fault, lasting, || repair(dir.path(), &list));
                    repair(dir.path(), &list).unwrap_or_else(|error| panic!("{what}: the next one failed: {error}"));
                    let found = files(dir.path());
                    let names = expected.keys().chain(found.keys());
                    let differing: Vec<&String> = names.filter(|n| expected.get(*n) != found.get(*n)).collect();
                    assert!(differing.is_empty(), "{what}: {differing:?} differ from the cache before the damage");
                    if calls < at {
                        break;
                    }
                    at += share();
                }
            }
        }
    });
}

/// A folder after a cut of power: whole as far as its manifest says, with all rows that were called durable, and it can be continued.
fn after_a_cut(dir: &Path, promised: u64, expected: &BTreeMap<String, Vec<u8>>, what: &str) {
    let rows = match Cache::open(dir) {
        Ok(cache) => {
            let report = verify(dir, &ScanProgress::default()).unwrap();
            assert!(report.is_good(), "{what}: {:?}", report.problems);
            cache.len() + cache.manifest().part_rows()
        }
        Err(crate::Error::NoFolder { .. } | crate::Error::NoManifest { .. }) => 0,
        Err(error) => panic!("{what}: {error}"),
    };
    assert!(rows >= promised, "{what}: {promised} rows were durable, {rows} are left");
    run(dir).unwrap_or_else(|error| panic!("{what}: the rerun failed: {error}"));
    let found = files(dir);
    let differing: Vec<&String> = expected.keys().chain(found.keys()).filter(|n| expected.get(*n) != found.get(*n)).collect();
    assert!(differing.is_empty(), "{what}: {differing:?} differ from an uninterrupted run");
}

#[test]
fn a_cut_of_power_leaves_what_was_durable() {
    let trials = std::env::var("POTSTILL_CAMPAIGN_CUTS").map_or(300, |n| n.parse::<usize>().unwrap());
    alone(|| {
        let parent = scratch();
        let dir = parent.path().join("of/a/cache");
        // After how many things done how many rows were durable.
        let mut promises: Vec<(usize, u64)> = Vec::new();
        let (states, ()) = recorded(|| {
            run_noting(&dir, &mut |rows| promises.push((noted(), rows))).unwrap();
        });
        let expected = files(&dir);
        assert!(states.len() > 60 && promises.len() > 5, "{} {}", states.len(), promises.len());
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut choose = |n: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % n
        };
        for trial in 0..trials {
            let at = choose(states.len());
            let promised = promises.iter().filter(|(noted, _)| *noted <= at + 1).map(|(_, rows)| *rows).max().unwrap_or(0);
            let left = scratch();
            states[at].cut(parent.path(), left.path(), &mut choose).unwrap();
            after_a_cut(&left.path().join("of/a/cache"), promised, &expected, &format!("trial {trial}: cut after {at}"));
        }
        eprintln!("cuts of power: {trials} at {} moments, nothing durable lost, 0 differing bytes", states.len());
    });
}
