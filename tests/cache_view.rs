//! `inspect` and `verify` on a cache of known contents, through the binary.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use assert_cmd::Command;
use potstill_cache::{
    CacheWriter, Companion, DataFingerprint, Description, EncodingFingerprint, Record, Selection, SoftTargets,
    TeacherFingerprint, TemplateFingerprint, TokenizerFingerprint, WriterOptions,
};
use std::path::Path;

const ROWS: u64 = 3;
const VOCABULARY: u32 = 2048;

fn description() -> Description {
    let digest = |c: char| c.to_string().repeat(64);
    Description {
        teacher: TeacherFingerprint {
            name: "teacher".into(),
            config_blake3: digest('1'),
            weights_blake3: digest('2'),
            weights: "awq-int4".into(),
            compute: "float32".into(),
        },
        tokenizer: TokenizerFingerprint { vocabulary_blake3: digest('3'), blake3: digest('4'), size: VOCABULARY },
        template: TemplateFingerprint { source: "tokenizer_config.json".into(), blake3: digest('5') },
        data: DataFingerprint { files: vec![], rows: ROWS, skipped: Default::default() },
        encoding: EncodingFingerprint { max_length: 64, truncation: "turns".into(), truncated_tokens: 0 },
        selection: Selection::TopK { k: 2 },
        mantissa_bits: 7,
        values: Default::default(),
        lse_temperatures: Vec::new(),
        zstd_level: 3,
        id_encoding: Default::default(),
        rows_per_shard: 2,
        vocab_size: VOCABULARY,
        expected_rows: ROWS,
        part: None,
        derived: Vec::new(),
    }
}

/// Row `n`: tokens 100+n, 5, 6, 7; after the first two, the next token has probability 1/2, token 9 has 1/4.
fn record(n: u64) -> Record {
    let mut targets = SoftTargets::default();
    for next in [5, 6] {
        targets.push(&[next, 9], &[0.5f32.ln(), 0.25f32.ln()], 0.25f32.ln());
    }
    Record { seq_id: n, input_ids: vec![100 + n as u32, 5, 6, 7], positions: vec![0, 1], targets, codec: Default::default() }
}

fn write_cache(folder: &Path) {
    write_cache_with(folder, vec![tokenizer()]);
}

fn tokenizer() -> Companion {
    let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/golden/teacher-awq/tokenizer.json");
    Companion { path: "tokenizer/tokenizer.json".into(), bytes: std::fs::read(golden).unwrap() }
}

fn write_cache_with(folder: &Path, companions: Vec<Companion>) {
    let mut writer = CacheWriter::open(folder, &description(), WriterOptions { companions }).unwrap();
    (0..ROWS).for_each(|n| writer.append(&record(n)).unwrap());
    writer.finish().unwrap();
}

/// Exit code, stdout, stderr.
fn potstill(folder: &Path, arguments: &[&str]) -> (i32, String, String) {
    let output =
        Command::cargo_bin("potstill").unwrap().current_dir(folder).env("NO_COLOR", "1").args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

#[test]
fn a_summary_says_what_the_cache_is_and_holds() {
    let here = tempfile::tempdir().unwrap();
    write_cache(&here.path().join("c"));
    let (code, out, err) = potstill(here.path(), &["inspect", "c", "--quiet"]);
    assert_eq!((code, err.as_str()), (0, ""));
    // 7 mantissa bits: ln 1/2 = -0.6931 is stored as -0.69140625, whose exponential is 50.09 %.
    for fact in ["teacher, awq-int4 in float32", "3 in 2 shards; complete", "12, 6 scored", "50.09% on average", "topk_ids"] {
        assert!(out.contains(fact), "{fact} is not in {out}");
    }
    assert!(out.lines().all(|line| line.chars().count() <= 80), "{out}");
    let (code, out, _) = potstill(here.path(), &["inspect", "c", "--json"]);
    let whole = json(&out);
    assert_eq!(code, 0);
    assert_eq!(whole["summary"]["rows"], 3);
    assert_eq!(whole["description"]["teacher"]["name"], "teacher");
    // 7 mantissa bits: ln 1/2 is off by at most 2^-8 of itself, so the probability by at most 0.7 · 2^-8.
    let top1 = whole["summary"]["distributions"]["mean_top1"].as_f64().unwrap();
    assert!((top1 - 0.5).abs() < 0.5 * 0.7 / 256.0, "{top1}");
}

#[test]
fn a_row_is_found_by_number_and_by_key() {
    let here = tempfile::tempdir().unwrap();
    write_cache(&here.path().join("c"));
    let key = record(2).key().to_string();
    let (code, by_number, _) = potstill(here.path(), &["inspect", "c", "--row", "2", "--json"]);
    let (_, by_key, _) = potstill(here.path(), &["inspect", "c", "--key", &key, "--json"]);
    assert_eq!((code, &by_number), (0, &by_key));
    let row = json(&by_number);
    assert_eq!((row["key"].as_str(), row["tokens"].as_u64(), row["scored"].as_u64()), (Some(key.as_str()), Some(4), Some(2)));
    let second = &row["positions"][1];
    assert_eq!((second["id"].as_u64(), second["after"]["next_id"].as_u64()), (Some(5), Some(6)));
    assert_eq!(second["after"]["kept"].as_array().unwrap().len(), 2);
    assert!(row["positions"][2]["after"].is_null() && row["positions"][3]["after"].is_null());

    let (code, out, _) = potstill(here.path(), &["inspect", "c", "--row", "2", "--top", "1"]);
    assert_eq!(code, 0);
    let line = out.lines().find(|line| line.trim_start().starts_with("1 ")).unwrap();
    // ln 1/4 = -1.3863 is stored as -1.3828125: 25.09 %.
    assert!(line.contains("25.09%") && line.contains('▸') && line.matches('%').count() == 3, "{out}");

    let (code, _, err) = potstill(here.path(), &["inspect", "c", "--row", "3"]);
    assert_eq!((code, err.as_str()), (2, "error: row 3: the cache has 3 rows, numbered from 0\n"));
    let (code, _, err) = potstill(here.path(), &["inspect", "c", "--key", &"0".repeat(32)]);
    assert_eq!((code, err), (2, format!("error: c: no row has the key {}\n", "0".repeat(32))));
    assert_eq!(potstill(here.path(), &["inspect", "c", "--key", "xyz"]).0, 2);
}

#[test]
fn a_cache_without_a_tokenizer_shows_numbers() {
    let here = tempfile::tempdir().unwrap();
    write_cache_with(&here.path().join("c"), Vec::new());
    let (code, out, err) = potstill(here.path(), &["inspect", "c", "--row", "1"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("▸<id␣5> 50.1%  <id␣9> 25.1%") && out.contains("<id 101><id 5><id 6><id 7>"), "{out}");
    assert_eq!(potstill(here.path(), &["inspect", "c", "--quiet"]).0, 0);
    let (code, _, err) = potstill(here.path(), &["inspect", "c", "--find", "a"]);
    let expected = "error: c: --find needs the tokenizer in the cache (tokenizer/tokenizer.json), found none\n";
    assert_eq!((code, err.as_str()), (2, expected));
}

#[test]
fn verify_names_the_shard_and_ends_in_four() {
    let here = tempfile::tempdir().unwrap();
    let cache = here.path().join("c");
    write_cache(&cache);
    let (code, out, err) = potstill(here.path(), &["verify", "c", "--quiet"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.ends_with("; complete\n") && out.contains("all good: 3 of 3 rows, 2 shards"), "{out}");

    let (_, out, _) = potstill(here.path(), &["verify", "c", "--json"]);
    assert_eq!((json(&out)["problem_count"].as_u64(), json(&out)["good_rows"].as_u64()), (Some(0), Some(3)));

    let manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(cache.join("manifest.json")).unwrap()).unwrap();
    let shard = manifest["shards"][1]["file"].as_str().unwrap();
    let mut bytes = std::fs::read(cache.join(shard)).unwrap();
    bytes[40] ^= 1;
    let path = cache.join(shard);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let (code, out, _) = potstill(here.path(), &["verify", "c"]);
    assert_eq!(code, 4);
    assert!(out.lines().any(|line| line.starts_with("wrong: ") && line.contains(shard)), "{out}");
    assert!(out.lines().any(|line| line.starts_with(shard) && line.ends_with("damaged")), "{out}");
    let (code, out, _) = potstill(here.path(), &["verify", "c", "--json"]);
    assert_eq!(code, 4);
    assert!(json(&out)["problem_count"].as_u64().unwrap() > 0);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let here = tempfile::tempdir().unwrap();
    write_cache(&here.path().join("c"));
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_potstill"))
        .current_dir(here.path())
        .args(["inspect", "c", "--row", "0"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8(output.stderr).unwrap().as_str()), (Some(0), ""));
}
