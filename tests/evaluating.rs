//! `potstill evaluate`, from the command line: figures that agree with what training says of the same rows, and what is refused.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use serde_json::Value;
use std::process::{Command, Stdio};
use std::time::Duration;
use support::{Bench, STUDENT, TEACHER, golden};

fn held_out<'a>(student: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["evaluate", "held-out", "--student", student, "--cache", "cache"];
    arguments.extend(more);
    arguments
}

/// What training says of its held-out rows before anything has moved.
fn evaluation(bench: &Bench, out: &str, more: &[&str]) -> Value {
    let train = ["train", "--student", STUDENT.as_str(), "--cache", "cache", "--out", out, "--steps", "1", "--rank", "4"];
    let still = ["--warmup-steps", "0", "--lr", "1e-30", "--quiet", "--json"];
    let report = bench.expect(0, &[&train[..], &still, more].concat()).json();
    report["held_out"].clone()
}

fn close(a: &Value, b: &Value) {
    let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
    // What training reports is f32.
    assert!((a - b).abs() < 2e-6 * b.abs().max(1.0), "{a} {b}");
}

#[test]
fn figures_are_those_that_training_reports_of_the_same_rows() {
    let bench = Bench::new();
    bench.cache("cache");
    let trained = evaluation(&bench, "run", &["--eval-rows", "8", "--seed", "5"]);
    let more = ["--rows", "8", "--seed", "5", "--base-precision", "nf4", "--json", "--quiet"];
    let found = bench.expect(0, &held_out(&STUDENT, &more)).json();
    assert_eq!(found["positions"], trained["positions"]);
    let last = &trained["last"];
    close(&found["kl"]["mean"], &last["kd"]);
    close(&found["nll"]["mean"], &last["ce"]);
    close(&found["perplexity"]["value"], &last["perplexity"]);
    close(&found["same_top_token"]["mean"], &last["agreement"]);
    close(&found["calibration_error"]["student"], &last["ece"]);
    close(&found["kept_mass"]["student"], &last["kept_mass"]);
    // With an adapter that changes nothing the base is held as training holds it, unasked.
    let more = ["--rows", "8", "--seed", "5", "--adapter", "run/adapter", "--json", "--quiet"];
    let adapted = bench.expect(0, &held_out(&STUDENT, &more)).json();
    assert_eq!((&adapted["base_precision"], &adapted["kl"]), (&"nf4".into(), &found["kl"]));
}

#[test]
fn a_teacher_beside_its_own_cache_is_next_to_itself() {
    let bench = Bench::new();
    bench.cache("cache");
    let found = bench.expect(0, &held_out(&TEACHER, &["--json", "--quiet"])).json();
    // Values are kept to 7 mantissa bits: KL of 1e-6 on average, as its manifest says.
    assert!(found["kl"]["mean"].as_f64().unwrap() < 1e-4, "{found}");
    assert!(found["same_top_token"]["mean"].as_f64().unwrap() > 0.98, "{found}");
    assert!((found["where_kept"]["ratio"]["value"].as_f64().unwrap() - 1.0).abs() < 0.01, "{found}");
}

#[test]
fn the_report_fits_and_names_what_it_gives() {
    let bench = Bench::new();
    bench.cache("cache");
    let ran = bench.expect(0, &held_out(&STUDENT, &["--rows", "12"]));
    println!("{}", ran.stdout);
    assert!(ran.stdout.lines().all(|line| line.chars().count() <= 80), "{}", ran.stdout);
    for words in ["perplexity of the student", "KL(p,q)", "99.9 %", "median", "± rows", "calibration error (ECE), teacher"] {
        assert!(ran.stdout.contains(words), "{words} in {}", ran.stdout);
    }
    let json = bench.expect(0, &held_out(&STUDENT, &["--rows", "12", "--json", "--quiet"])).json();
    assert!(json["definitions"]["kl"].as_str().unwrap().starts_with("coarse KL(p, q)"), "{json}");
}

#[test]
fn what_cannot_be_evaluated_is_said_with_its_code() {
    let bench = Bench::new();
    bench.cache("cache");
    let error = |code, arguments: &[&str]| bench.expect(code, arguments).error().to_string();
    let found = error(2, &held_out(&STUDENT, &["--rows", "40"]));
    assert_eq!(found, "rows = 40: expected a whole number from 1 to the 39 rows of cache");
    assert!(error(1, &held_out(&TEACHER, &["--base-precision", "nf4"])).contains("quantised to NF4 from dense weights"));
    bench.expect(2, &held_out(&STUDENT, &["--base-precision", "int8"]));
    let found = error(1, &held_out(&STUDENT, &["--adapter", &golden("student")]));
    assert!(found.contains("expected a PEFT adapter folder"), "{found}");
    let other = bench.copy("student", "other");
    support::edit_json(&other.join("config.json"), |config| config["vocab_size"] = 100.into());
    assert!(error(6, &held_out("other", &[])).contains("vocabulary is too small"));
}

fn generate<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments =
        vec!["evaluate", "generate", "--student", STUDENT.as_str(), "--questions", "questions.jsonl", "--out", out];
    arguments.extend(["--max-new-tokens", "64", "--quiet"]);
    arguments.extend(more);
    arguments
}

#[test]
fn a_stopped_run_of_answers_goes_on_and_ends_with_the_same_file() {
    let bench = Bench::new();
    let prompt = |i: usize| format!("{}\n", serde_json::json!({ "prompt": format!("Tell me what {i} is good for") }));
    std::fs::write(bench.path("questions.jsonl"), (0..40).map(prompt).collect::<String>()).unwrap();
    let more = ["--temperature", "0.8", "--batch-size", "2"];
    bench.expect(0, &generate("whole.jsonl", &more));
    let mut child = bench.command(&generate("cut.jsonl", &more)).stderr(Stdio::piped()).spawn().unwrap();
    let journal = bench.path("cut.jsonl.journal");
    let answers = || std::fs::read_to_string(&journal).map_or(0, |text| text.lines().count());
    while answers() < 3 && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(75), "{said}");
    assert!(said.contains(" of 40 answers are durable; run the same command again to continue"), "{said}");
    assert!(!bench.path("cut.jsonl").exists(), "an answers file is whole or not there");
    let kept = answers() - 1;
    let report = bench.expect(0, &generate("cut.jsonl", &[&more[..], &["--json"]].concat())).json();
    assert_eq!((&report["answers"], &report["resumed"]), (&40.into(), &kept.into()));
    assert_eq!(std::fs::read(bench.path("cut.jsonl")).unwrap(), std::fs::read(bench.path("whole.jsonl")).unwrap());
    // What is said of it, at 80 columns.
    let ran = bench.expect(0, &generate("cut.jsonl", &more));
    println!("{}", ran.stdout);
    assert!(ran.stdout.lines().all(|line| line.chars().count() <= 80) && ran.stdout.contains("40, 40 of them by an earlier run"));
    let refused = bench.expect(6, &generate("cut.jsonl", &["--temperature", "0.9", "--batch-size", "2"]));
    assert!(refused.error().contains("temperature: expected 0.9, found 0.8"), "{refused:?}");
}
