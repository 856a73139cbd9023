//! `potstill evaluate mt-bench` and `alpaca-eval` through the binary, against a real HTTP server: what is printed, exit codes, signals, and a key
//! that is nowhere. The figures are those of `scripts/make_judge_fixtures.py`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
#[path = "../pipeline/tests/judge/server.rs"]
mod server;
mod support;

use server::{Answer, Server};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use support::{Bench, Ran, files};

/// A key that must be nowhere.
const KEY: &str = "sk-canary-51c0d9a3f7";

fn fixture(name: &str) -> String {
    format!("{}/tests/fixtures/judge/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// The binary in a clean environment, pointed at the server.
fn command(bench: &Bench, server: &Server, arguments: &[&str]) -> Command {
    let mut command = bench.command(arguments);
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "ANSWERS_API_KEY"] {
        command.env_remove(name);
    }
    command.env("OPENAI_BASE_URL", &server.base_url).env("OPENAI_API_KEY", KEY).env("ANSWERS_BASE_URL", &server.base_url);
    command
}

fn run(bench: &Bench, server: &Server, arguments: &[&str]) -> Ran {
    let output = command(bench, server, arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap_or(-1), stdout: text(output.stdout), stderr: text(output.stderr) }
}

fn mt_bench(more: &[&str]) -> Vec<String> {
    let data = fixture("mt_bench");
    let all = ["evaluate", "mt-bench", "--data", &data, "--judge", "invented-judge", "--out", "out"];
    all.iter().chain(more).map(|s| s.to_string()).collect()
}

fn alpaca_eval(more: &[&str]) -> Vec<String> {
    let (baseline, prompt, answers) =
        (fixture("alpaca_eval/baseline.json"), fixture("alpaca_eval/prompt.txt"), fixture("alpaca_eval/outputs.json"));
    let all = ["evaluate", "alpaca-eval", "--baseline", &baseline, "--prompt", &prompt, "--answers", &answers];
    let all = all.into_iter().chain(["--judge", "invented-judge", "--out", "out"]);
    all.chain(more.iter().copied()).map(str::to_string).collect()
}

fn arguments(all: &[String]) -> Vec<&str> {
    all.iter().map(String::as_str).collect()
}

/// Insists that `text` is what was looked at once and kept; no line is wider than a terminal.
fn assert_shown(text: &str, name: &str) {
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    let kept = std::fs::read_to_string(fixture(&format!("shown/{name}.txt"))).unwrap_or_default();
    assert_eq!(text, kept, "found, kept:\n{text}\n{kept}");
}

fn assert_without_key(bench: &Bench, ran: &Ran) {
    let canary = &KEY[3..];
    assert!(!ran.stdout.contains(canary) && !ran.stderr.contains(canary), "{ran:?}");
    for (name, bytes) in files(&bench.path("")) {
        assert!(!String::from_utf8_lossy(&bytes).contains(canary), "{name}");
    }
}

#[test]
fn choices_that_are_there_are_scored_without_a_network() {
    let bench = Bench::new();
    let (annotations, difficulty) = (fixture("alpaca_eval/annotations.json"), fixture("alpaca_eval/instruction_difficulty.csv"));
    let mut arguments = vec!["evaluate", "alpaca-eval", "--annotations", &annotations, "--lc-difficulty", &difficulty];
    arguments.push("--lc-coefficients=-1.2673261,0.8917766,-1.4423447");
    // Three of the invented rows hold no preference, so the exit code says that something was left out.
    let ran = bench.expect(3, &arguments);
    assert_shown(&ran.stdout, "scored");
    let json = bench.expect(3, &[&arguments[..], &["--json"]].concat()).json();
    assert_eq!((json["figures"]["wins"].as_u64(), json["length_controlled"]["win_rate"].is_f64()), (Some(7), true));
}

#[test]
fn grades_are_shown_by_category_and_turn_and_the_key_is_nowhere() {
    let (bench, server) = (Bench::new(), Server::start());
    server.twist(|number, request, answer| {
        // Whatever the endpoint is told it says again, in every place.
        let key = request.headers["authorization"].clone();
        match number {
            1 => Answer::of(500, format!(r#"{{"error":{{"message":"{key}"}}}}"#)),
            2 => Answer::of(200, key),
            _ => {
                let mut value: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
                value["system_fingerprint"] = key.into();
                Answer::of(200, value.to_string())
            }
        }
    });
    let answers = fixture("mt_bench/answers.jsonl");
    let ran = run(&bench, &server, &arguments(&mt_bench(&["--answers", &answers])));
    assert_eq!(ran.code, 3, "{ran:?}");
    assert_shown(&ran.stdout, "graded");
    assert_without_key(&bench, &ran);
    assert!(files(&bench.path("out")).contains_key("judgments.jsonl"));

    let again = run(&bench, &server, &arguments(&mt_bench(&["--answers", &answers, "--json", "--quiet"])));
    assert_eq!((again.code, again.stderr.as_str()), (3, ""));
    assert_eq!(
        (again.json()["judge_calls"]["asked"].as_u64(), again.json()["judge_calls"]["from_disk"].as_u64()),
        (Some(0), Some(38))
    );
}

#[test]
fn pairs_are_shown_with_both_orders() {
    let (bench, server) = (Bench::new(), Server::start());
    let ran = run(&bench, &server, &arguments(&alpaca_eval(&[])));
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_shown(&ran.stdout, "chosen");
    assert_without_key(&bench, &ran);
}

#[test]
fn a_dry_run_sends_nothing_and_needs_no_key() {
    let (bench, server) = (Bench::new(), Server::start());
    let arguments_of = |more: &[&str]| mt_bench(&[&["--answers-model", "tiny-student", "--dry-run"], more].concat());
    let output = command(&bench, &server, &arguments(&arguments_of(&[]))).env_remove("OPENAI_API_KEY").output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_shown(&stdout, "planned");
    assert!(server.requests().is_empty() && !bench.path("out").exists());
    let json = run(&bench, &server, &arguments(&arguments_of(&["--json", "--first", "2"]))).json();
    assert_eq!((json["answers"]["calls"].as_u64(), json["judge"]["calls"].as_u64()), (Some(4), Some(4)));
}

#[test]
fn a_signal_stops_with_75_and_the_same_command_goes_on() {
    let (bench, server) = (Bench::new(), Server::start());
    let child_id = Arc::new((Mutex::new(None::<u32>), Condvar::new()));
    let (theirs, told) = (Arc::clone(&child_id), Arc::new(AtomicU32::new(0)));
    let count = Arc::clone(&told);
    server.twist(move |number, _, answer| {
        if number == 10 {
            // The tenth request is answered once the signal is sent.
            let (id, known) = &*theirs;
            let id = *known.wait_while(id.lock().unwrap(), |id| id.is_none()).unwrap();
            let sent = Command::new("kill").args(["-TERM", &id.unwrap().to_string()]).status().unwrap();
            count.store(u32::from(sent.success()), Ordering::Relaxed);
        }
        answer
    });
    let mut child = command(&bench, &server, &arguments(&alpaca_eval(&["--quiet", "--concurrency", "2"])));
    let child = child.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    *child_id.0.lock().unwrap() = Some(child.id());
    child_id.1.notify_all();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), told.load(Ordering::Relaxed)), (Some(75), 1), "{stderr}");
    let sent = server.requests().len();
    assert!(stderr.contains(&format!("stopped by a signal; {sent} replies are on disk")), "{stderr}");
    assert!((10..46).contains(&sent));

    server.twist(|_, _, answer| answer);
    let ran = run(&bench, &server, &arguments(&alpaca_eval(&["--json"])));
    assert_eq!((ran.code, server.requests().len()), (0, 46 - sent), "{ran:?}");
}

#[test]
fn what_is_wrong_is_one_sentence_and_a_code() {
    let (bench, server) = (Bench::new(), Server::start());
    let answers = fixture("mt_bench/answers.jsonl");
    let whole = mt_bench(&["--answers", &answers]);
    let output =
        command(&bench, &server, &arguments(&whole)).env_remove("OPENAI_API_KEY").env_remove("OPENAI_BASE_URL").output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(
        stderr.trim(),
        "error: OPENAI_API_KEY: expected the key of an account, or another address in OPENAI_BASE_URL, found nothing"
    );

    let student = mt_bench(&["--answers-model", "tiny-student"]);
    let output = command(&bench, &server, &arguments(&student)).env("ANSWERS_BASE_URL", "localhost:8000").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .starts_with("error: ANSWERS_BASE_URL: expected an address such as https://host/v1")
    );

    server.twist(|_, request, _| Answer::of(401, request.headers["authorization"].clone()));
    let ran = run(&bench, &server, &arguments(&whole));
    assert_eq!(ran.code, 1);
    assert!(ran.error().contains("answered 401 (Bearer [key]); OPENAI_API_KEY holds a key that it does not accept"), "{ran:?}");
    assert_without_key(&bench, &ran);

    for (arguments, found) in [
        (vec!["evaluate", "mt-bench", "--data", "x", "--judge", "j", "--out", "o"], "--answers"),
        (vec!["evaluate", "mt-bench", "--data", "x", "--answers", "a", "--out", "o"], "--judge"),
        (
            vec!["evaluate", "alpaca-eval", "--annotations", "a", "--lc-coefficients=1,2", "--lc-difficulty", "d"],
            "LENGTH,DIFFICULTY,MODEL",
        ),
        (vec!["evaluate", "alpaca-eval", "--annotations", "a", "--judge", "j"], "--annotations"),
        (vec!["evaluate", "alpaca-eval", "--answers", "a", "--judge", "j", "--out", "o"], "--baseline"),
        (
            vec!["evaluate", "mt-bench", "--data", "nowhere", "--answers", "a", "--judge", "j", "--out", "o"],
            "judge_prompts.jsonl",
        ),
    ] {
        let ran = bench.expect(2, &arguments);
        assert!(ran.stderr.contains(found), "{ran:?}");
    }
}
