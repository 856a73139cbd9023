//! Shards of every version of the format, kept for ever: each row is read and compared with its JSON, bit for bit.

use crate::modes::modes;
use crate::process::{files, options, scratch};
use potstill_cache::{Cache, CacheWriter, Record, ScanProgress, SoftTargets, Target, verify};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Rows of each fixture of version 2: a full shard and a short one.
const ROWS: u64 = 4;

/// Where the fixtures are.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Copies a folder's files.
pub fn copy(from: &Path, to: &Path) {
    for (name, bytes) in files(from) {
        let path = to.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

/// The rows in a fixture's JSON. Numbers of 32 bits are written in full, so they come back exactly.
pub fn rows(path: &Path) -> Vec<Record> {
    let value: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    value.as_array().unwrap().iter().map(row).collect()
}

fn row(value: &Value) -> Record {
    let mut targets = SoftTargets::default();
    for target in value["targets"].as_array().unwrap() {
        let counts: Vec<u16> = integers(&target["sample_counts"]).into_iter().map(|n| u16::try_from(n).unwrap()).collect();
        targets.push_target(&Target {
            ids: &integers(&target["ids"]),
            logprobs: &floats(&target["logprobs"]),
            tail_logprob: target["tail_logprob"].as_f64().unwrap() as f32,
            sample_ids: &integers(&target["sample_ids"]),
            sample_counts: &counts,
            logits: &floats(&target["logits"]),
            logsumexp: target["logsumexp"].as_f64().map(|x| x as f32),
            lse_t: &floats(&target["lse_t"]),
        });
    }
    let kl = |name: &str| value["codec"][name].as_f64().unwrap_or(0.0) as f32;
    let record = Record {
        seq_id: value["seq_id"].as_u64().unwrap(),
        input_ids: integers(&value["input_ids"]),
        positions: integers(&value["positions"]),
        targets,
        codec: potstill_cache::CodecError { kl_sum: kl("kl_sum"), kl_max: kl("kl_max") },
    };
    assert_eq!(record.key().to_string(), value["key"].as_str().unwrap());
    record
}

fn integers(value: &Value) -> Vec<u32> {
    value.as_array().into_iter().flatten().map(|n| u32::try_from(n.as_u64().unwrap()).unwrap()).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().into_iter().flatten().map(|x| x.as_f64().unwrap() as f32).collect()
}

/// A record as JSON; parts that it does not have are left out.
fn json(record: &Record) -> Value {
    let target = |i: usize| {
        let t = record.targets.position(i);
        let parts = [
            ("ids", json!(t.ids)),
            ("logprobs", json!(t.logprobs)),
            ("tail_logprob", json!(t.tail_logprob)),
            ("sample_ids", json!(t.sample_ids)),
            ("sample_counts", json!(t.sample_counts)),
            ("logits", json!(t.logits)),
            ("logsumexp", json!(t.logsumexp)),
            ("lse_t", json!(t.lse_t)),
        ];
        let empty = |value: &Value| value.is_null() || value.as_array().is_some_and(Vec::is_empty);
        Value::Object(parts.into_iter().filter(|(_, value)| !empty(value)).map(|(k, v)| (k.into(), v)).collect())
    };
    json!({
        "key": record.key().to_string(),
        "seq_id": record.seq_id,
        "input_ids": record.input_ids,
        "positions": record.positions,
        "codec": { "kl_sum": record.codec.kl_sum, "kl_max": record.codec.kl_max },
        "targets": (0..record.targets.len()).map(target).collect::<Vec<_>>(),
    })
}

/// All numbers of a record as bits, so that equal means equal.
fn bits(record: &Record) -> (Vec<u64>, Vec<u32>) {
    let t = &record.targets;
    let floats =
        [t.logprobs(), t.tail_logprobs(), t.logits(), t.logsumexps(), t.lse_t(), &[record.codec.kl_sum, record.codec.kl_max]];
    let integers = [&record.input_ids, &record.positions, t.offsets(), t.ids(), t.sample_offsets(), t.sample_ids()];
    let counts = t.sample_counts().iter().map(|&n| u64::from(n));
    let mut whole: Vec<u64> = integers.into_iter().flatten().map(|&n| u64::from(n)).chain(counts).collect();
    whole.push(record.seq_id);
    (whole, floats.into_iter().flatten().map(|x| x.to_bits()).collect())
}

/// Reads the cache `dir` and compares every row with the JSON.
fn compare(dir: &Path, json: &Path, version: u32) {
    let what = dir.display();
    let expected = rows(json);
    let report = verify(dir, &ScanProgress::default()).unwrap();
    assert!(report.is_good() && report.complete, "{what}: {:?}", report.problems);
    let cache = Cache::open(dir).unwrap();
    assert_eq!((cache.manifest().format_version, cache.len()), (version, expected.len() as u64), "{what}");
    assert!(!expected.is_empty());
    for (row, expected) in expected.iter().enumerate() {
        let found = cache.row(row as u64).unwrap();
        assert_eq!(bits(&found), bits(expected), "{what}: row {row}");
        assert_eq!(cache.find(&expected.key()).unwrap(), Some(row as u64));
    }
    for companion in &cache.manifest().companions {
        cache.companion(&companion.path).unwrap();
    }
}

#[test]
fn version_1_is_read() {
    compare(&folder().join("version-1"), &folder().join("version-1.json"), 1);
}

/// The fixtures of version 2, and the way to store of each.
fn version_2() -> Vec<(PathBuf, PathBuf, crate::modes::Mode)> {
    let at = folder().join("version-2");
    modes(ROWS, 3).into_iter().map(|mode| (at.join(mode.name), at.join(format!("{}.json", mode.name)), mode)).collect()
}

#[test]
fn version_2_is_read() {
    for (dir, json, _) in version_2() {
        compare(&dir, &json, 2);
    }
}

/// The JSON of a row says all of it: a fixture made now is read back equal, and one changed bit is seen.
#[test]
fn json_holds_every_bit() {
    for (number, mode) in modes(ROWS, 3).into_iter().enumerate() {
        let parent = scratch();
        let (dir, path) = (parent.path().join("cache"), parent.path().join("rows.json"));
        make(&dir, &path, &mode);
        compare(&dir, &path, potstill_cache::FORMAT_VERSION);
        // One bit less is seen.
        let mut value: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let tail = &mut value[number % ROWS as usize]["targets"][0]["tail_logprob"];
        let other = f32::from_bits((tail.as_f64().unwrap() as f32).to_bits() ^ 1);
        *tail = json!(other);
        std::fs::write(&path, value.to_string()).unwrap();
        assert!(std::panic::catch_unwind(|| compare(&dir, &path, potstill_cache::FORMAT_VERSION)).is_err(), "{}", mode.name);
    }
}

fn make(dir: &Path, path: &Path, mode: &crate::modes::Mode) {
    let mut writer = CacheWriter::open(dir, &mode.description, options()).unwrap();
    writer.extend(&mode.given()).unwrap();
    writer.finish().unwrap();
    std::fs::remove_file(dir.join("cache.lock")).unwrap();
    let rows: Vec<Value> = mode.stored().iter().map(json).collect();
    std::fs::write(path, lines(&rows)).unwrap();
}

/// A row a line.
fn lines(rows: &[Value]) -> String {
    format!("[\n{}\n]\n", rows.iter().map(Value::to_string).collect::<Vec<_>>().join(",\n"))
}

/// Makes the fixtures of version 2, where they are not there yet. Once they are released they are never made again.
#[test]
#[ignore = "writes into the source tree, once in the life of a format version"]
fn make_version_2() {
    let at = folder().join("version-2");
    assert!(!at.exists(), "{} is there already", at.display());
    std::fs::create_dir(&at).unwrap();
    for (dir, path, mode) in version_2() {
        make(&dir, &path, &mode);
    }
}
