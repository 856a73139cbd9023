//! `plan` through the binary: what it foretells of a run of stage one, held against what that run then did.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use serde_json::Value;
use support::{Bench, CHATS, TEACHER};

/// A plan or a run with these flags. The reference chats, cut at 256 tokens: 39 conversations and one of which nothing is left.
fn arguments<'a>(verb: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let base = [verb, "--teacher", TEACHER.as_str(), "--data", CHATS.as_str(), "--max-length", "256", "--quiet"];
    [&base[..], more].concat()
}

fn planned(bench: &Bench, more: &[&str]) -> Value {
    bench.expect(0, &[arguments("plan", more), vec!["--json"]].concat()).json()
}

fn size(plan: &Value, preset: &str, k: u64) -> f64 {
    let found = plan["compared"].as_array().unwrap().iter().find(|c| c["preset"] == preset && c["k"] == k);
    found.unwrap_or_else(|| panic!("{preset} {k} in {plan}"))["estimate"]["bytes"].as_f64().unwrap()
}

#[test]
fn a_plan_foretells_the_run() {
    let bench = Bench::new();
    // Enough time for all of the chats: what is left of the error is what rows share of a row group.
    let flags = ["--top-k", "16", "--rows-per-shard", "8"];
    let plan = planned(&bench, &[&flags[..], &["--seconds", "600", "--compare-k", "16,8,64"]].concat());
    let names: Vec<_> = std::fs::read_dir(bench.path("")).unwrap().collect();
    assert!(names.is_empty(), "a plan writes nothing: {names:?}");

    let ways: [(&str, &[&str], f64); 5] = [
        ("as-set", &flags, plan["size"]["estimate"]["bytes"].as_f64().unwrap()),
        ("standard-16", &["--top-k", "16", "--rows-per-shard", "8"], size(&plan, "standard", 16)),
        ("exact-8", &["--preset", "exact", "--top-k", "8", "--rows-per-shard", "8"], size(&plan, "exact", 8)),
        ("compact-64", &["--preset", "compact", "--top-k", "64", "--rows-per-shard", "8"], size(&plan, "compact", 64)),
        ("small-16", &["--preset", "small", "--top-k", "16", "--rows-per-shard", "8"], size(&plan, "small", 16)),
    ];
    for (name, flags, foretold) in ways {
        let ran = bench.expect(3, &[arguments("precompute", flags), vec!["--cache", name, "--json"]].concat()).json();
        let bytes = ran["bytes"].as_f64().unwrap();
        assert!((foretold / bytes - 1.0).abs() < 0.01, "{name}: {foretold} foretold, {bytes} in the end");
        for (mine, its) in [("rows", "rows"), ("tokens", "tokens"), ("scored", "scored")] {
            assert_eq!(plan["extent"][mine], ran[its], "{name}: {mine}");
        }
        for same in ["skipped", "first_skipped", "truncated_tokens"] {
            assert_eq!(plan[same], ran[same], "{name}");
        }
    }
    let measured = &plan["measured"];
    assert_eq!((&measured["sampled"], &plan["size"]["estimate"]["standard_error"]), (&plan["extent"], &0.0.into()), "{plan}");
    assert!(plan["seconds"].as_f64().unwrap() > 0.0 && measured["warm_up_seconds"].as_f64().unwrap() > 0.0, "{plan}");
    assert_eq!(plan["shards"], 5);
    // What the first k hold of a distribution grows with k, and is what the cache then holds.
    let mass = |k: &str| plan["kept_mass"][k].as_f64().unwrap();
    assert!(mass("8") < mass("16") && mass("16") < mass("64"), "{plan}");
    let inspected = bench.expect(0, &["inspect", "standard-16", "--json", "--quiet"]).json();
    let kept = inspected["summary"]["distributions"]["mean_kept_mass"].as_f64().unwrap();
    // Seven mantissa bits of a log-probability are right to 2^-8 of it.
    assert!((kept - mass("16")).abs() < 0.01, "{kept} {plan}");
}

#[test]
fn little_time_gives_few_conversations_and_says_how_sure_it_is() {
    let bench = Bench::new();
    let plan = planned(&bench, &["--seconds", "1e-6"]);
    let (measured, estimate) = (&plan["measured"], &plan["size"]["estimate"]);
    assert_eq!((&measured["sampled"]["rows"], &measured["warm_up_seconds"]), (&1.into(), &Value::Null), "{plan}");
    assert_eq!(estimate["standard_error"], Value::Null, "one conversation says nothing of others");
    let ran = bench.expect(0, &[arguments("plan", &["--seconds", "1e-6"])].concat());
    assert!(ran.stdout.contains("a first pass, which brought the weights in"), "{}", ran.stdout);
    assert!(ran.stdout.lines().all(|line| line.chars().count() <= 80), "{}", ran.stdout);
}

#[test]
fn without_the_teacher_config_and_tokenizer_are_enough() {
    let bench = Bench::new();
    let folder = bench.copy("teacher-awq", "teacher");
    for entry in std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.to_string_lossy().contains(".safetensors") {
            std::fs::remove_file(entry).unwrap();
        }
    }
    let flags =
        |more: &[&'static str]| [&["plan", "--teacher", "teacher", "--data", CHATS.as_str(), "--quiet"][..], more].concat();
    let plan = bench.expect(0, &[&flags(&["--no-run", "--json"])[..]].concat()).json();
    assert_eq!((&plan["measured"], &plan["size"], &plan["seconds"]), (&Value::Null, &Value::Null, &Value::Null));
    assert_eq!(plan["typical"].as_array().unwrap().len(), 20);
    assert!(plan["memory"]["streamed"]["peak"].as_u64() > Some(0), "{plan}");
    let text = bench.expect(0, &flags(&["--no-run"])).stdout;
    assert!(text.contains("not measured (--no-run)") && text.lines().all(|line| line.chars().count() <= 80), "{text}");
    let refused = bench.expect(1, &flags(&[]));
    assert!(refused.error().contains("no weights"), "{refused:?}");
}

#[test]
fn a_config_file_of_a_run_plans_it_and_a_share_is_a_share() {
    let bench = Bench::new();
    let toml = format!(
        "[precompute]\nteacher = {:?}\ndata = {:?}\ncache = \"to/come\"\nmax_length = 256\nrows_per_shard = 8\n",
        TEACHER.as_str(),
        CHATS.as_str()
    );
    std::fs::write(bench.path("run.toml"), toml).unwrap();
    let plan =
        |more: &[&str]| bench.expect(0, &[&["plan", "--config", "run.toml", "--no-run", "--json"][..], more].concat()).json();
    let rows: Vec<u64> =
        ["0/3", "1/3", "2/3"].iter().map(|w| plan(&["--worker", w])["extent"]["rows"].as_u64().unwrap()).collect();
    assert_eq!(rows.iter().sum::<u64>(), 39, "{rows:?}");
    let part = plan(&["--part", "2/3"]);
    assert_eq!((&part["extent"]["rows"], &part["part"]["number"]), (&rows[1].into(), &2.into()));
    // More shares than shards: one of them has nothing to do, and a plan of it says so.
    let idle = bench.expect(0, &["plan", "--config", "run.toml", "--worker", "0/9", "--quiet"]);
    let empty = (0..9).any(|i| plan(&["--worker", &format!("{i}/9")])["extent"]["rows"] == 0);
    assert!(empty && idle.stdout.contains("conversations"), "{idle:?}");
    assert!(!bench.path("to").exists());
}

#[test]
fn what_cannot_be_planned_is_refused() {
    let bench = Bench::new();
    for (flags, code, words) in [
        (&["--compare-k", "0"][..], 2, "0 is not in 1..=65535"),
        (&["--compare-k", "8,4000"], 2, "compare_k = 4000: expected 1 to the tokenizer's 2048 ids"),
        (&["--seconds", "0"], 2, "expected a number of seconds above 0"),
        (&["--seconds", "nan"], 2, "expected a number of seconds above 0"),
        (&["--seconds", "5", "--no-run"], 2, "cannot be used with"),
        (&["--top-k", "4000"], 2, "top_k = 4000: expected at most the tokenizer's 2048 ids"),
        (&["--max-length", "1000000"], 2, "max_length = 1000000: expected at most the teacher's context"),
        (&["--data", "gone.jsonl"], 1, "gone.jsonl: expected a file, a folder or a glob of chats"),
        (&["--teacher", "gone"], 1, "gone: expected a model folder"),
        (&["--repair", "list.json"], 2, "--repair"),
        (&["--cache", CHATS.as_str(), "--no-run"], 2, "chats.jsonl: expected a folder, or a place for one: this is a file"),
        (&["--part", "1/2", "--worker", "0/2"], 2, "expected no part beside it"),
    ] {
        // A flag that is given twice is refused by itself, so the one that is tried is left out here.
        let base = [("--teacher", TEACHER.as_str()), ("--data", CHATS.as_str())];
        let base = base.into_iter().filter(|(flag, _)| *flag != flags[0]).flat_map(|(flag, value)| [flag, value]);
        let base: Vec<&str> = ["plan", "--quiet"].into_iter().chain(base).collect();
        let ran = bench.run(&[&base[..], flags].concat());
        assert!(ran.stderr.contains(words), "{flags:?}: {ran:?}");
        assert_eq!((ran.code, ran.stdout.as_str()), (code, ""), "{flags:?}: {ran:?}");
    }
}
