//! Conversations for which the teacher's logits are not finite: left out, named, counted, the same in every way a cache can be made.
//!
//! The teacher is the reference one with a single NaN in the embedding of one token, so that exactly the conversations that hold the
//! token before or at their last scored position are bad.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use potstill_cache::{Cache, Record};
use serde_json::Value;
use std::path::Path;
use support::{Bench, CHATS, STUDENT, files, precompute};

/// What a report of skipped conversations calls them.
const REASON: &str = "the teacher's logits are not finite";
const NAN_F16: [u8; 2] = [0x00, 0x7e];

fn rows(folder: &Path) -> Vec<Record> {
    let cache = Cache::open(folder).unwrap();
    (0..cache.len()).map(|row| cache.row(row).unwrap()).collect()
}

/// The first scored position whose distribution has seen the token.
fn first_bad(record: &Record, token: u32) -> Option<u32> {
    let at = record.input_ids.iter().position(|id| *id == token)? as u32;
    record.positions.iter().copied().find(|position| *position >= at)
}

/// A token that spoils few conversations, but not the first row, and some in both halves of the data.
fn token(rows: &[Record]) -> u32 {
    let spoils = |token: u32| rows.iter().map(|row| first_bad(row, token).is_some()).collect::<Vec<_>>();
    let fits = |token: &u32| {
        let bad = spoils(*token);
        let (low, high) = bad.split_at(rows.len() / 2);
        let count = |part: &[bool]| part.iter().filter(|bad| **bad).count();
        !bad[0] && (1..4).contains(&count(low)) && (1..4).contains(&count(high))
    };
    (0..2048).find(fits).expect("a token of few conversations")
}

/// Sets the first number of a token's embedding to NaN.
fn poison(folder: &Path, token: u32) {
    let file = folder.join("model-00001-of-00002.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let names: Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let tensor = &names["model.embed_tokens.weight"];
    assert_eq!(tensor["dtype"], "F16");
    let start = 8 + header + tensor["data_offsets"][0].as_u64().unwrap() as usize;
    let at = start + token as usize * tensor["shape"][1].as_u64().unwrap() as usize * 2;
    bytes[at..at + 2].copy_from_slice(&NAN_F16);
    std::fs::write(file, bytes).unwrap();
}

/// Arguments as for the reference cache, with the spoiled teacher.
fn scored<'a>(cache: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = precompute(cache);
    let teacher = arguments.iter().position(|argument| *argument == "--teacher").unwrap();
    arguments[teacher + 1] = "spoiled";
    if let Some(packs) = arguments.iter().position(|argument| more.contains(argument) && *argument == "--pack-tokens") {
        arguments.drain(packs..packs + 2);
    }
    arguments.extend(more);
    arguments
}

#[test]
fn spoiled_conversations_are_left_out_and_nothing_else_changes() {
    let bench = Bench::new();
    bench.cache("clean");
    let clean = rows(&bench.path("clean"));
    let token = token(&clean);
    let expected: Vec<(u64, u32)> = clean.iter().filter_map(|row| Some((row.seq_id, first_bad(row, token)?))).collect();
    let bad = expected.len() as u64;
    poison(&bench.copy("teacher-awq", "spoiled"), token);

    let report = bench.expect(3, &scored("whole", &["--max-bad", "0.2", "--json"])).json();
    assert_eq!((report["rows"].as_u64(), report["skipped"][REASON].as_u64()), (Some(39), Some(bad)));
    let named = report["left_out"].as_array().unwrap();
    let places: Vec<(u64, u32)> =
        named.iter().map(|row| (row["seq_id"].as_u64().unwrap(), row["position"].as_u64().unwrap() as u32)).collect();
    assert_eq!(places, expected);
    assert!(named.iter().all(|row| row["found"] == "the logit of id 0 is NaN, expected a finite number"), "{named:?}");
    let first = report["first_skipped"][REASON].as_str().unwrap();
    assert!(first.starts_with(&format!("conversation {} of the data, position {}: ", expected[0].0, expected[0].1)), "{first}");

    for (found, clean) in rows(&bench.path("whole")).iter().zip(&clean) {
        if expected.iter().any(|(seq_id, _)| *seq_id == clean.seq_id) {
            assert_eq!((&found.input_ids, found.positions.len(), found.targets.len()), (&clean.input_ids, 0, 0));
        } else {
            assert_eq!(found, clean);
        }
    }
    bench.expect(0, &["verify", "whole", "--quiet"]);
    let shown = bench.expect(0, &["inspect", "whole"]).stdout;
    assert!(
        shown.contains(&format!("{bad} of them: {REASON}")) && shown.lines().all(|line| line.chars().count() <= 80),
        "{shown}"
    );
    assert_eq!(bench.expect(0, &["inspect", "whole", "--json"]).json()["summary"]["left_out"], bad);
    let spoiled = clean.iter().position(|row| row.seq_id == expected[0].0).unwrap().to_string();
    bench.expect(0, &["inspect", "whole", "--row", &spoiled]);

    // A student learns from the rest: an epoch of single rows, in some steps of which there is nothing to learn.
    let mut train =
        vec!["train", "--student", &STUDENT, "--cache", "whole", "--out", "out", "--steps", "39", "--batch-size", "1"];
    train.extend(["--rank", "2", "--lr", "1e-3", "--quiet"]);
    // Of a seed that brings one of those first.
    let cache = potstill_cache::Cache::open(&bench.path("whole")).unwrap();
    let first = |seed: &u64| potstill_cache::Sampler::new(39, *seed, potstill_cache::Order::Seeded).row(0, 0);
    let seed = (0..1000).find(|seed| cache.row(first(seed)).unwrap().positions.is_empty()).unwrap().to_string();
    train.extend(["--json", "--seed", &seed]);
    let report = bench.expect(0, &train).json();
    let metrics = std::fs::read_to_string(bench.path("out/metrics.jsonl")).unwrap();
    let steps: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let idle = steps.iter().filter(|step| step["scored"] == 0);
    assert_eq!((steps.len(), idle.count() as u64), (39, bad));
    // Such a step has no loss: the means at first and at last are those of ten steps that have one.
    let losses: Vec<f64> = steps.iter().filter(|step| step["scored"] != 0).map(|step| step["loss"].as_f64().unwrap()).collect();
    assert_eq!(steps[0]["scored"], 0);
    for (key, ten) in [("first_loss", &losses[..10]), ("last_loss", &losses[losses.len() - 10..])] {
        let mean = ten.iter().sum::<f64>() / 10.0;
        // A run's progress keeps losses below 1 in f32: half a unit of 2^-24 each.
        assert!((report[key].as_f64().unwrap() - mean).abs() < 6e-8, "{key}: {mean}, {report}");
    }
}

#[test]
fn packs_parts_stops_and_repairs_leave_the_same_rows_out() {
    let bench = Bench::new();
    bench.cache("clean");
    let clean = rows(&bench.path("clean"));
    let token = token(&clean);
    let bad = clean.iter().filter(|row| first_bad(row, token).is_some()).count();
    poison(&bench.copy("teacher-awq", "spoiled"), token);
    let enough = ["--max-bad", "0.2"];
    bench.expect(3, &scored("whole", &enough));
    let whole = files(&bench.path("whole"));

    bench.expect(3, &scored("packs", &[&enough[..], &["--pack-tokens", "1", "--head-chunk", "7"]].concat()));
    assert!(files(&bench.path("packs")) == whole, "packs of one conversation");

    for part in ["1/2", "2/2"] {
        bench.expect(3, &scored(&format!("part-{}", &part[..1]), &[&enough[..], &["--part", part]].concat()));
    }
    bench.expect(0, &["combine", "--out", "parts", "part-1", "part-2", "--quiet"]);
    assert!(files(&bench.path("parts")) == whole, "two parts");

    // One is allowed: the run stops at the second, with the first in the cache; allowed more, it goes on.
    let one = format!("{}", 1.5 / 39.0);
    let small = ["--pack-tokens", "1", "--seal-minutes", "0"];
    let stopped = bench.expect(1, &scored("stopped", &[&small[..], &["--max-bad", &one]].concat()));
    let sentence = "2 of 39 conversations have a logit that cannot be kept, expected at most 1 (--max-bad); conversation ";
    assert!(stopped.error().starts_with(sentence) && stopped.error().contains("is NaN"), "{stopped:?}");
    let report = bench.expect(3, &scored("stopped", &[&enough[..], &["--json"]].concat())).json();
    assert!(report["resumed_rows"].as_u64().unwrap() > 1, "{report}");
    assert_eq!(report["skipped"][REASON], bad);
    assert!(files(&bench.path("stopped")) == whole, "resumed");

    // Also a run that has nothing left to score knows of them, and judges them.
    let again = bench.expect(3, &scored("whole", &[&enough[..], &["--json"]].concat())).json();
    assert_eq!((again["resumed_rows"].as_u64(), again["skipped"][REASON].as_u64()), (Some(39), Some(bad as u64)));
    let refused = bench.expect(1, &scored("whole", &["--max-bad", "0"]));
    assert!(refused.error().starts_with(&format!("{bad} of 39 conversations have")), "{refused:?}");

    let row = clean.iter().position(|row| first_bad(row, token).is_some()).unwrap();
    std::fs::remove_file(bench.path("whole").join(format!("shard-{:05}.parquet", row / 8))).unwrap();
    bench.expect(4, &["verify", "whole", "--repair-list", "list.json", "--quiet"]);
    bench.expect(3, &scored("whole", &[&enough[..], &["--repair", "list.json"]].concat()));
    assert!(files(&bench.path("whole")) == whole, "repaired");
}

#[test]
fn the_first_bad_conversation_stops_a_run_by_default_where_data_are_few() {
    let bench = Bench::new();
    bench.cache("clean");
    poison(&bench.copy("teacher-awq", "spoiled"), token(&rows(&bench.path("clean"))));
    // A thousandth of 39 conversations is none.
    let refused = bench.expect(1, &scored("c", &[]));
    assert!(refused.error().contains("expected at most 0 (--max-bad)"), "{refused:?}");
    let wrong = bench.expect(2, &scored("d", &["--max-bad", "1.5"]));
    assert!(wrong.error().contains("max-bad") && !bench.path("d").exists(), "{wrong:?} {}", CHATS.as_str());
}
