//! Endpoints that misbehave: every failure passes, is counted, or ends the run with what was answered on disk. And a key that is nowhere.

use crate::made::{KEY, alpaca_eval, files, judge, mt_bench};
use crate::server::{Answer, Request, Server};
use potstill_cache::ErrorClass;
use potstill_pipeline::evaluate::alpaca_eval::{self as alpaca, AlpacaEvalReport};
use potstill_pipeline::evaluate::judge::JudgeError;
use potstill_pipeline::evaluate::mt_bench as bench;
use potstill_pipeline::run::RunContext;
use serde_json::Value;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Requests that all pairs of the fixture take.
const ALL: u64 = 46;

fn run(server: &Server, out: &Path) -> Result<AlpacaEvalReport, JudgeError> {
    alpaca::run(&alpaca_eval(out), &judge(server), None, &RunContext::default())
}

/// What all is well gives, in a folder of its own.
fn undisturbed() -> AlpacaEvalReport {
    let folder = tempfile::tempdir().unwrap();
    run(&Server::start(), folder.path()).unwrap()
}

/// Makes a bad answer of a good one.
type Bad = Box<dyn Fn(Answer) -> Answer + Send>;

/// Gives the first requests bad answers, one kind after another; all others are answered.
fn first(server: &Server, mut bad: Vec<Bad>) {
    bad.reverse();
    server.twist(move |_, _, answer| match bad.pop() {
        Some(twist) => twist(answer),
        None => answer,
    });
}

#[test]
fn what_passes_is_repeated_counted_and_changes_no_figure() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let kinds: [(&str, Vec<Bad>); 7] = [
        ("429, too many requests", vec![Box::new(|_| Answer::of(429, "slow down").with("retry-after", "0"))]),
        ("5xx, a server's error", vec![Box::new(|_| Answer::of(500, "")), Box::new(|_| Answer::of(503, "<html>"))]),
        ("408, 409 or 425", vec![Box::new(|_| Answer::of(408, "{}")), Box::new(|_| Answer::of(409, "{}"))]),
        ("an answer cut short", vec![Box::new(|answer| Answer { cut: Some(40), ..answer })]),
        (
            "an answer that is too long",
            vec![Box::new(|_| Answer { more: Some((vec![b' '; 1 << 20], 17)), ..Answer::of(200, "{") })],
        ),
        (
            "an answer that is no reply",
            vec![
                Box::new(|_| Answer::of(200, "<html>")),
                Box::new(|_| Answer::of(200, "{}")),
                Box::new(|_| Answer::of(200, r#"{"choices":[]}"#)),
            ],
        ),
        ("no connection", vec![Box::new(|answer| Answer { headers: vec![("bad header", "\u{1}".into())], ..answer })]),
    ];
    let expected = undisturbed();
    for (kind, bad) in kinds {
        let (out, n) = (folder.path().join(kind), bad.len() as u64);
        first(&server, bad);
        server.requests();
        let report = run(&server, &out).unwrap();
        assert_eq!(report.judge_calls.passing.iter().collect::<Vec<_>>(), [(&kind.to_string(), &n)]);
        assert_eq!((report.judge_calls.asked, server.requests().len() as u64), (ALL, ALL + n), "{kind}");
        assert_eq!((&report.scored, &report.judge_calls.failed), (&expected.scored, &Default::default()), "{kind}");
    }
}

#[test]
fn retry_after_is_waited_for() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    first(&server, vec![Box::new(|_| Answer::of(429, "").with("retry-after", "0.4"))]);
    let began = Instant::now();
    run(&server, folder.path()).unwrap();
    assert!(began.elapsed() >= Duration::from_millis(400));
}

#[test]
fn a_request_that_always_fails_is_left_out_and_nothing_else() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let poison = |request: &Request| request.text().contains("instruction 5:");
    server.twist(
        move |_, request, answer| if poison(request) { Answer::of(500, r#"{"error":{"message":"boom"}}"#) } else { answer },
    );
    let report = run(&server, folder.path()).unwrap();
    let failed = "given up after 4 tries: 5xx, a server's error".to_string();
    assert_eq!(report.judge_calls.failed.iter().collect::<Vec<_>>(), [(&failed, &2)]);
    assert_eq!((report.scored.figures.judged, report.scored.figures.left_out, report.judge_calls.passing.len()), (23, 1, 1));
    assert_eq!(report.left_out.values().sum::<u64>(), 1);
    assert!(report.left_out.keys().all(|reason| reason.ends_with("500 (boom)")), "{:?}", report.left_out);

    // Once the server is well, only what was missing is asked, and nothing shows that it ever was.
    server.twist(|_, _, answer| answer);
    server.requests();
    let again = run(&server, folder.path()).unwrap();
    assert_eq!((server.requests().len(), again.judge_calls.from_disk), (2, ALL - 2));
    assert_eq!(again.scored, undisturbed().scored);
}

#[test]
fn an_endpoint_that_is_not_there_ends_the_run_after_one_request() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    server.twist(|_, _, _| Answer::of(502, "bad gateway"));
    let error = run(&server, folder.path()).unwrap_err();
    assert_eq!((server.requests().len(), error.class()), (4, ErrorClass::Runtime));
    assert!(error.to_string().contains("a request failed 4 times, at last: 502 (bad gateway)"), "{error}");
}

#[test]
fn an_endpoint_that_dies_ends_the_run_and_costs_nothing_that_was_answered() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    server.twist(|number, _, answer| if number > 20 { Answer::of(500, "") } else { answer });
    let error = run(&server, folder.path()).unwrap_err().to_string();
    assert!(error.contains(" requests in a row failed 4 times each") && error.contains("20 replies are on disk"), "{error}");
    server.twist(|_, _, answer| answer);
    server.requests();
    let report = run(&server, folder.path()).unwrap();
    assert_eq!((server.requests().len() as u64, report.judge_calls.from_disk), (ALL - 20, 20));
    assert_eq!(report.scored, undisturbed().scored);
}

#[test]
fn what_concerns_all_requests_ends_the_run_at_the_first() {
    let server = Server::start();
    let (elsewhere, folder) = (Server::start(), tempfile::tempdir().unwrap());
    let leads = elsewhere.base_url.clone();
    let quota = r#"{"error":{"message":"You exceeded your quota","code":"insufficient_quota"}}"#;
    type Cases = Vec<(u16, String, &'static [&'static str])>;
    let cases: Cases = vec![
        (
            401,
            r#"{"error":{"message":"who are you"}}"#.into(),
            &["answered 401 (who are you)", "OPENAI_API_KEY holds a key that it does not accept"],
        ),
        (403, "no".into(), &["answered 403 (no)"]),
        (429, quota.into(), &["quota is used up (You exceeded your quota)"]),
        (402, "pay".into(), &["quota is used up (pay)"]),
        (
            400,
            r#"{"detail":"logprobs are not supported"}"#.into(),
            &["refused the first request with 400 (logprobs are not supported)"],
        ),
        (404, "The model does not exist".into(), &["refused the first request with 404 (The model does not exist)"]),
        (302, String::new(), &["refused the first request with 302 (without a word)"]),
    ];
    for (status, body, said) in cases {
        let leads = leads.clone();
        server.twist(move |_, _, _| Answer::of(status, body.clone()).with("location", format!("{leads}/chat/completions")));
        let error = run(&server, folder.path()).unwrap_err().to_string();
        assert!(said.iter().all(|words| error.contains(words)), "{error}");
        assert_eq!(server.requests().len(), 1, "{status}");
    }
    assert!(elsewhere.requests().is_empty(), "a redirect was followed");
}

#[test]
fn one_refused_request_is_left_out() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    server
        .twist(|_, request, answer| if request.text().contains("instruction 8:") { Answer::of(400, "too long") } else { answer });
    let report = run(&server, folder.path()).unwrap();
    assert_eq!(report.left_out.into_iter().collect::<Vec<_>>(), [("refused with 400 (too long)".to_string(), 1)]);
    assert_eq!((report.scored.figures.judged, report.judge_calls.failed.values().sum::<u64>()), (23, 2));
}

#[test]
fn a_stop_keeps_what_was_answered_and_the_rest_is_asked_later() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let (context, stop) = (RunContext::default(), RunContext::default());
    let theirs = Arc::clone(&context.stop);
    server.twist(move |number, _, answer| {
        theirs.fetch_or(number >= 10, Ordering::Relaxed);
        answer
    });
    let config = alpaca_eval(folder.path());
    let error = alpaca::run(&config, &judge(&server), None, &context).unwrap_err();
    let sent = server.requests().len() as u64;
    // What three other threads had under way is finished, and nothing more is begun.
    assert_eq!(error.class(), ErrorClass::Interrupted);
    assert!((10..=13).contains(&sent) && error.to_string().contains(&format!("{sent} replies are on disk")), "{sent}: {error}");
    assert!(!folder.path().join("report.json").exists());

    server.twist(|_, _, answer| answer);
    let report = alpaca::run(&config, &judge(&server), None, &stop).unwrap();
    assert_eq!((server.requests().len() as u64, report.judge_calls.from_disk), (ALL - sent, sent));
    assert_eq!(report.scored, undisturbed().scored);
}

#[test]
fn a_stop_ends_a_pause() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let context = RunContext::default();
    let theirs = Arc::clone(&context.stop);
    server.twist(move |_, _, _| {
        theirs.store(true, Ordering::Relaxed);
        Answer::of(429, "").with("retry-after", "500")
    });
    let error = alpaca::run(&alpaca_eval(folder.path()), &judge(&server), None, &context).unwrap_err();
    assert_eq!((error.class(), server.requests().len()), (ErrorClass::Interrupted, 1));
}

#[test]
fn a_torn_reply_is_asked_for_again() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    run(&server, folder.path()).unwrap();
    server.requests();
    let replies = files(&folder.path().join("replies"));
    assert_eq!(replies.len() as u64, ALL);
    let (path, bytes) = &replies[7];
    std::fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    let report = run(&server, folder.path()).unwrap();
    let calls = &report.judge_calls;
    assert_eq!((calls.torn, calls.asked, calls.from_disk, server.requests().len()), (1, 1, ALL - 1, 1));
    assert_eq!(report.scored, undisturbed().scored);
}

/// Hides what the server was sent in everything it can say.
fn echo(request: &Request, answer: Answer) -> Answer {
    let key = request.headers.get("authorization").map_or("", |value| value.strip_prefix("Bearer ").unwrap());
    let mut value: Value = serde_json::from_slice(&answer.body).unwrap();
    let content = value["choices"][0]["message"]["content"].as_str().unwrap().to_string();
    value["choices"][0]["message"]["content"] = format!("{content} {key}").into();
    value["choices"][0]["finish_reason"] = key.into();
    value["model"] = format!("{key}-model").into();
    value["system_fingerprint"] = key.into();
    if let Some(token) = value.pointer_mut("/choices/0/logprobs/content/0/top_logprobs/2/token") {
        *token = key.into();
    }
    // Once more as JSON may also write it.
    let body = value.to_string().replacen(key, &key.replacen('s', "\\u0073", 1), 1);
    Answer { body: body.into_bytes(), ..answer }
}

#[test]
fn the_key_is_in_one_header_and_nowhere_else() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let context = RunContext::default();
    let notes = Arc::new(Mutex::new(Vec::new()));
    let (progress, seen) = (Arc::clone(&context.progress), Arc::clone(&notes));
    let failing = Arc::new(AtomicU64::new(0));
    server.twist(move |number, request, answer| {
        seen.lock().unwrap().push(progress.snapshot().0.note);
        failing.fetch_add(1, Ordering::Relaxed);
        let key = request.headers["authorization"].clone();
        match number % 5 {
            1 => Answer::of(500, format!(r#"{{"error":{{"message":"wrong key {key}"}}}}"#)),
            2 => Answer::of(200, format!("no JSON but {key}")),
            3 if number > 30 && request.text().starts_with("You compare.") => {
                Answer::of(400, format!(r#"{{"odd":"{}"}}"#, key.replacen("sk-", "\\u0073k-", 1)))
            }
            _ => echo(request, answer),
        }
    });
    let endpoint = judge(&server);
    let pairs = alpaca::run(&alpaca_eval(&folder.path().join("pairs")), &endpoint, None, &context).unwrap();
    let grades = bench::run(&mt_bench(&folder.path().join("grades")), &endpoint, None, &context).unwrap();
    assert!(pairs.judge_calls.asked > 20 && grades.judge_calls.asked > 10 && !pairs.judge_calls.failed.is_empty());
    assert!(
        server
            .requests()
            .iter()
            .all(|r| r.headers["authorization"] == format!("Bearer {KEY}") && !r.body.to_string().contains(KEY))
    );

    let mut said = vec![
        serde_json::to_string(&pairs).unwrap(),
        serde_json::to_string(&grades).unwrap(),
        format!("{endpoint:?} {pairs:?} {grades:?} {:?}", context.take_warnings()),
        format!("{:?}", notes.lock().unwrap()),
    ];
    server.twist(|_, request, _| Answer::of(401, request.headers["authorization"].clone()));
    let other = alpaca::AlpacaEvalConfig { judge: "other-judge".into(), ..alpaca_eval(folder.path()) };
    let denied = alpaca::run(&other, &endpoint, None, &context).unwrap_err();
    said.push(format!("{denied} {denied:?}"));
    let kept = files(folder.path());
    assert!(kept.len() > 40 && said[0].contains("[key]") && said[4].contains("[key]"));
    // The end of it is enough to find it, however its beginning is written.
    let canary = &KEY[3..];
    for text in &said {
        assert!(!text.contains(canary), "{text}");
    }
    for (path, bytes) in kept {
        assert!(!String::from_utf8_lossy(&bytes).contains(canary), "{}", path.display());
    }
}
