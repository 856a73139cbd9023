//! What people watch while training: held-out evaluation, the best adapter, an early end, probes, metrics and event files.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use potstill_cache::{Cache, Order, Sampler};
use serde_json::Value;
use std::collections::BTreeMap;
use std::process::Stdio;
use support::{Bench, STUDENT, TEACHER, files, precompute, wait_for};

fn train<'a>(out: &'a str, steps: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["train", "--student", STUDENT.as_str(), "--cache", "cache", "--out", out, "--steps", steps];
    arguments.extend(["--rank", "4", "--warmup-steps", "0", "--json", "--quiet"]);
    // A setting may be given twice here; the later one counts.
    for more in more.chunks(2) {
        match arguments.iter().position(|a| *a == more[0]) {
            Some(at) => arguments[at + 1] = more[1],
            None => arguments.extend(more),
        }
    }
    arguments
}

/// The lines of a run's metrics without the clock, and the last `eval` of them.
fn metrics(bench: &Bench, out: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(bench.path(out).join("metrics.jsonl")).unwrap();
    let line = |line| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        for clock in ["seconds", "tokens_per_second"] {
            value.as_object_mut().unwrap().remove(clock);
        }
        value
    };
    text.lines().map(line).collect()
}

fn evaluations(bench: &Bench, out: &str) -> Vec<(u64, Value)> {
    let lines = metrics(bench, out).into_iter();
    lines.filter_map(|line| Some((line["step"].as_u64().unwrap(), line.get("eval")?.clone()))).collect()
}

fn close(a: &Value, b: f64, tolerance: f64) {
    assert!((a.as_f64().unwrap() - b).abs() < tolerance, "{a} {b}");
}

#[test]
fn rows_held_out_are_evaluated_and_never_trained_on() {
    let bench = Bench::new();
    bench.cache("cache");
    let cache = Cache::open(&bench.path("cache")).unwrap();
    let order = Sampler::new(39, 5, Order::Seeded);
    let held_out: Vec<u64> = (0..8).map(|i| order.row(u64::MAX, i)).collect();
    let counted = |rows: &mut dyn Iterator<Item = u64>| {
        let records = rows.map(|row| cache.row(row).unwrap()).filter(|record| !record.positions.is_empty());
        records.fold((0, 0), |(tokens, positions), r| (tokens + r.input_ids.len(), positions + r.positions.len()))
    };
    let (_, held_positions) = counted(&mut held_out.iter().copied());
    let (tokens, positions) = counted(&mut (0..39).filter(|row| !held_out.contains(row)));

    // One pass, a row a step: every row that remains comes once.
    let mut arguments = train("run", "1", &["--eval-rows", "8", "--seed", "5", "--batch-size", "1", "--eval-every", "10"]);
    arguments.drain(7..9);
    let report = bench.expect(0, &[arguments, vec!["--epochs", "1", "--objective", "distill+sft"]].concat()).json();
    assert_eq!((&report["steps"], &report["tokens"]), (&31.into(), &tokens.into()), "{report}");
    let lines = metrics(&bench, "run");
    let scored: u64 = lines.iter().filter_map(|line| line["scored"].as_u64()).sum();
    assert_eq!(scored, positions as u64);

    // Evaluations after steps 10, 20, 30 and the last; each line stands behind that of its step.
    let found = evaluations(&bench, "run");
    assert_eq!(found.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [10, 20, 30, 31]);
    let steps: Vec<u64> = lines.iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert!(steps.is_sorted() && steps.len() == 35);
    for (_, eval) in &found {
        close(&eval["loss"], 0.5 * eval["kd"].as_f64().unwrap() + 0.5 * eval["ce"].as_f64().unwrap(), 1e-6);
        let perplexity = eval["ce"].as_f64().unwrap().exp();
        close(&eval["perplexity"], perplexity, 1e-6 * perplexity);
        for share in ["agreement", "kept_mass", "teacher_kept_mass", "ece"] {
            assert!((0.0..=1.0).contains(&eval[share].as_f64().unwrap()), "{share} in {eval}");
        }
        assert!(eval.get("angle").is_none() && eval.get("teacher_ece").is_none(), "no dense rows: {eval}");
    }
    let held = &report["held_out"];
    assert_eq!((&held["rows"], &held["positions"]), (&8.into(), &held_positions.into()), "{held}");
    assert_eq!((&held["last"]["loss"], &held["last"]["step"]), (&found[3].1["loss"], &31.into()));
    let lowest = found.iter().map(|(_, e)| e["loss"].as_f64().unwrap()).fold(f64::INFINITY, f64::min);
    assert_eq!((held["best"]["loss"].as_f64(), &held["adapter"]), (Some(lowest), &"run/best".into()));
    assert!(held["stopped_early"].is_null());
}

#[test]
fn an_evaluation_on_the_training_rows_gives_the_training_loss() {
    let bench = Bench::new();
    bench.cache("cache");
    for objective in ["sft", "distill", "distill+sft"] {
        let out = format!("run-{objective}");
        // At this rate nothing moves: each step of all rows, and the evaluation of all rows, are of the same student.
        let more =
            ["--objective", objective, "--lr", "1e-30", "--batch-size", "39", "--eval-cache", "cache", "--head-chunk", "7"];
        bench.expect(0, &train(&out, "2", &more));
        let lines = metrics(&bench, &out);
        let (step, eval) = (&lines[1], &evaluations(&bench, &out)[0].1);
        // Sums over 3,000 positions in another order, and another way to the head's product: f32 logits, 1e-7 of 10.
        close(&eval["loss"], step["loss"].as_f64().unwrap(), 1e-5);
        close(&eval["ce"], step["ce"].as_f64().unwrap(), 1e-5);
        if let Some(kd) = step["kd"].as_f64() {
            close(&eval["kd"], kd, 1e-5);
        }
        assert!(eval["kd"].as_f64().unwrap() > 0.1, "sft sees how far it is from the teacher too: {eval}");
    }
    // Kept ids are 16 of each distribution, whose mass the cache knows.
    let cache = Cache::open(&bench.path("cache")).unwrap();
    let (mut mass, mut n) = (0.0, 0);
    for row in 0..39 {
        let targets = cache.row(row).unwrap().targets;
        mass += targets.logprobs().iter().map(|l| f64::from(*l).exp()).sum::<f64>();
        n += targets.len();
    }
    close(&evaluations(&bench, "run-sft")[0].1["teacher_kept_mass"], mass / n as f64, 1e-6);
}

/// What must not depend on interruptions: adapters, best adapter, metrics.
fn outcome(bench: &Bench, out: &str) -> (BTreeMap<String, Vec<u8>>, Vec<Value>) {
    let mut all = files(&bench.path(out));
    all.retain(|name, _| name.starts_with("best/") || name.starts_with("adapter/"));
    (all, metrics(bench, out))
}

#[test]
fn a_killed_run_resumed_has_the_same_best_adapter_and_end() {
    let bench = Bench::new();
    bench.cache("cache");
    let more = [
        "--eval-rows",
        "8",
        "--eval-every",
        "2",
        "--batch-size",
        "4",
        "--lr",
        "2e-2",
        "--checkpoint-every",
        "3",
        "--patience",
        "3",
        "--keep-checkpoints",
        "20",
    ];
    let whole = bench.expect(0, &train("whole", "14", &more)).json();
    let expected = outcome(&bench, "whole");
    assert!(expected.0.contains_key("best/adapter_model.safetensors") && expected.0.contains_key("best/evaluation.json"));
    let best = whole["held_out"]["best"]["step"].as_u64().unwrap();
    assert!((2..14).contains(&best), "the best is neither missing nor the last: {whole}");
    let mut killed = 0;
    for step in [2, 3, 6, 8] {
        let out = format!("cut-{step}");
        let mut child = bench.command(&train(&out, "14", &more)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        killed += u32::from(wait_for(&mut child, &bench.path(&out).join(format!("checkpoint-{step}"))));
        child.kill().unwrap();
        child.wait().unwrap();
        let report = bench.expect(0, &train(&out, "14", &more)).json();
        assert_eq!(outcome(&bench, &out), expected, "killed after step {step}");
        for key in ["positions", "first", "last", "best", "stopped_early"] {
            let (ours, theirs) = (&report["held_out"][key], &whole["held_out"][key]);
            assert_eq!(ours, theirs, "{key}");
        }
    }
    assert!(killed > 0, "no run was killed in time");

    // Back to a checkpoint before the best: what is not known there yet is set aside, and found again on the way.
    bench.expect(0, &train("whole", "14", &[&more[..], &["--resume", "whole/checkpoint-2"]].concat()));
    assert_eq!(outcome(&bench, "whole"), expected);

    // Other rows held out are another run; more patience is not.
    let refused = bench.expect(6, &train("whole", "14", &[&more[..], &["--eval-rows", "9"]].concat()));
    assert!(refused.error().contains("eval_rows: the checkpoint has 8, here it is 9"), "{refused:?}");
    bench.expect(0, &train("whole", "14", &[&more[..], &["--patience", "9"]].concat()));
}

#[test]
fn a_run_that_no_longer_gains_ends_early_and_stays_ended() {
    let bench = Bench::new();
    bench.cache("cache");
    let more = ["--eval-rows", "6", "--eval-every", "1", "--batch-size", "4", "--lr", "0.1", "--patience", "2"];
    let report = bench.expect(0, &train("run", "400", &more)).json();
    let steps = report["steps"].as_u64().unwrap();
    let held = &report["held_out"];
    assert_eq!(steps, held["best"]["step"].as_u64().unwrap() + 2, "{report}");
    let why = format!("at step {steps} of 400: no lower held-out loss in 2 evaluations");
    assert_eq!(held["stopped_early"], why);
    assert!(bench.path(&format!("run/checkpoint-{steps}")).exists());
    assert_ne!(
        files(&bench.path("run/best"))["adapter_model.safetensors"],
        files(&bench.path("run/adapter"))["adapter_model.safetensors"]
    );

    let before = outcome(&bench, "run");
    let again = bench.expect(0, &train("run", "400", &more)).json();
    assert_eq!((&again["steps"], &again["resumed_from"], &again["tokens"]), (&steps.into(), &steps.into(), &0.into()));
    assert_eq!(again["held_out"]["stopped_early"], why);
    assert_eq!(outcome(&bench, "run"), before);
    // People see it.
    let mut arguments = train("run", "400", &more);
    arguments.retain(|a| *a != "--json");
    let table = bench.expect(0, &arguments).stdout;
    assert!(table.contains(&why) && table.contains("run/best"), "{table}");
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
}

#[test]
fn dense_rows_show_what_a_narrow_reading_costs() {
    let bench = Bench::new();
    let vocabulary = dense_cache(&bench);
    let eval = |out: &str, more: &[&str]| {
        let more = [&["--lr", "1e-30", "--batch-size", "8", "--pack-tokens", "512"], more].concat();
        bench.expect(0, &train(out, "1", &more));
        evaluations(&bench, out)[0].1.clone()
    };
    let number = |eval: &Value, key: &str| eval[key].as_f64().unwrap_or_else(|| panic!("{key} in {eval}"));
    let whole = eval("whole", &["--eval-rows", "6"]);
    assert!(number(&whole, "angle") < 0.01, "who reads all {vocabulary} ids goes straight: {whole}");
    let narrow = eval("narrow", &["--eval-rows", "6", "--top-k", "4"]);
    let narrower = eval("narrower", &["--eval-rows", "6", "--top-k", "1"]);
    let sft = eval("sft", &["--eval-rows", "6", "--objective", "sft"]);
    let angles = [&whole, &narrow, &narrower, &sft].map(|eval| number(eval, "angle"));
    assert!(angles.is_sorted() && angles[1] > 0.5 && angles[3] > 20.0, "{angles:?}");
    for other in [&narrow, &narrower, &sft] {
        // The student's own, whatever is read.
        close(&other["teacher_ece"], number(&whole, "teacher_ece"), 1e-6);
    }

    // The same from a companion of a narrow cache, over all rows that it has.
    let probed = eval("probed", &["--cache", "narrow-cache", "--eval-rows", "6", "--probe-cache", "cache"]);
    assert!((number(&probed, "angle") - number(&narrow, "angle")).abs() < 5.0, "{probed} {narrow}");
    assert!(eval("blind", &["--cache", "narrow-cache", "--eval-rows", "6"]).get("angle").is_none());

    for (more, sentence) in [
        (vec!["--probe-cache", "cache"], "probe_cache = cache: expected either eval_rows or eval_cache beside it"),
        (vec!["--patience", "2"], "patience = 2: expected either eval_rows or eval_cache beside it"),
        (vec!["--eval-rows", "39"], "eval_rows = 39: expected fewer than the 39 rows of cache"),
        (vec!["--eval-rows", "3", "--eval-cache", "cache"], "eval_cache = cache: expected either this or eval_rows"),
        (vec!["--eval-rows", "0", "--eval-cache", "narrow-cache"], "selection: the cache has top-k 4, which cannot become"),
        (
            vec!["--top-k", "4", "--eval-rows", "3", "--probe-cache", "narrow-cache"],
            "probe_cache = narrow-cache (top-k 4): expected a cache that keeps all",
        ),
    ] {
        let refused = bench.expect(2, &train("refused", "1", &more));
        assert!(refused.error().starts_with(sentence), "{more:?}: {refused:?}");
    }
}

#[test]
fn another_teachers_cache_is_no_measure() {
    let bench = Bench::new();
    bench.cache("cache");
    let arguments = precompute("other").into_iter().map(|a| if a == TEACHER.as_str() { STUDENT.as_str() } else { a });
    bench.expect(3, &arguments.collect::<Vec<_>>());
    let teacher = |cache: &str| Cache::open(&bench.path(cache)).unwrap().manifest().description.teacher.weights_blake3.clone();
    for more in [vec!["--eval-cache", "other"], vec!["--eval-rows", "4", "--probe-cache", "other"]] {
        let refused = bench.expect(6, &train("run", "1", &more));
        let error = refused.error();
        assert!(error.starts_with("other: is of another teacher than the run's cache: expected teacher-awq, weights"), "{error}");
        assert!(error.contains(&teacher("cache")) && error.contains(&teacher("other")), "{error}");
    }
}

/// Two caches of the reference chats: `cache` keeps every id, `narrow-cache` four. Gives the vocabulary.
fn dense_cache(bench: &Bench) -> String {
    bench.cache("probe");
    let vocabulary = Cache::open(&bench.path("probe")).unwrap().manifest().description.vocab_size.to_string();
    for (name, k) in [("cache", vocabulary.as_str()), ("narrow-cache", "4")] {
        let mut arguments = precompute(name);
        let at = arguments.iter().position(|a| *a == "16").unwrap();
        arguments[at] = k;
        bench.expect(3, &[arguments, vec!["--preset", "exact"]].concat());
    }
    vocabulary
}

#[test]
fn event_files_and_plain_lines_accompany_a_run() {
    let bench = Bench::new();
    bench.cache("cache");
    let more = ["--eval-rows", "4", "--eval-every", "3", "--batch-size", "2", "--objective", "distill+sft"];
    bench.expect(0, &train("run", "3", &more));
    let mut arguments = train("run", "6", &more);
    arguments.retain(|a| *a != "--quiet");
    let ran = bench.expect(0, &arguments);
    // Progress in a file: plain lines, none wider than a terminal.
    let lines: Vec<&str> = ran.stderr.lines().skip_while(|line| !line.starts_with("training: ")).collect();
    assert!(lines.iter().all(|line| line.chars().count() <= 80) && !lines.is_empty(), "{}", ran.stderr);

    let names: Vec<String> = files(&bench.path("run/tensorboard")).into_keys().collect();
    assert_eq!(names.len(), 2, "one a process: {names:?}");
    assert!(names.iter().all(|name| name.starts_with("events.out.tfevents.")), "{names:?}");
    let bytes = files(&bench.path("run/tensorboard"));
    let holds = |name: &String, tag: &str| bytes[name].windows(tag.len()).any(|w| w == tag.as_bytes());
    for tag in
        ["train/loss", "train/kd", "train/ce", "train/lr", "train/grad_norm", "train/tokens_per_second", "eval/loss", "eval/ece"]
    {
        assert!(names.iter().all(|name| holds(name, tag)), "{tag}");
    }
    // Each opens with a START at its first step, 1 and 4: field 2 of the event, then field 7 with the status 1.
    for (name, step) in names.iter().zip([1, 4]) {
        assert!(bytes[name].windows(6).any(|w| w == [2 << 3, step, 7 << 3 | 2, 2, 1 << 3, 1]), "{name}");
    }
    bench.expect(0, &train("quiet", "1", &["--no-tensorboard"]));
    assert!(!bench.path("quiet/tensorboard").exists());
}
