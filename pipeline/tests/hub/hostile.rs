//! A hub that refuses, breaks or lies: one sentence, nothing that looks whole, nothing outside the cache's folder.

use crate::download::{below, chats, fetched, model, noise};
use crate::made::COMMIT;
use crate::server::{Answer, Request, Server, git, sha256};
use potstill_cache::ErrorClass;
use potstill_pipeline::run::RunContext;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// Fetches a model whose answers are changed so; its sentence. Nothing may look whole.
fn refusal(
    server: &Server,
    variables: &[(&str, &str)],
    twist: impl FnMut(&Request, Answer) -> Answer + Send + 'static,
) -> String {
    let cache = TempDir::new().unwrap();
    server.twist(twist);
    let hub = server.hub(&cache.path().join("hub"), variables);
    let error = hub.model_folder(Path::new("Org/Name"), &RunContext::default()).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Runtime);
    let files = below(cache.path());
    assert!(
        files.iter().all(|file| file.starts_with("hub/") && !file.contains("snapshots") && !file.contains("refs")),
        "{files:?}"
    );
    let text = error.to_string();
    assert!(text.lines().count() == 1 && text.len() < 700 && !text.contains("signature"), "{text}");
    text.replace(&format!("{}/hub", cache.path().display()), "CACHE")
}

const LIST: &str = "Org/Name@main (no such path, and not whole in CACHE)";

fn is_large(request: &Request) -> bool {
    request.path.ends_with("/model-00002-of-00002.safetensors")
}

#[test]
fn refusals_say_what_may_help() {
    let server = model();
    let denied = |status| move |_: &Request, _: Answer| Answer::of(status, &[("x-error-code", "GatedRepo")], "no");
    let sentence = refusal(&server, &[], denied(401));
    let advice = "set HF_TOKEN to a token that may read it, and accept its terms on its page if it has any";
    assert_eq!(sentence, format!("{LIST}: the hub answered 401: it may be private, gated, or not exist; {advice}"));
    let sentence = refusal(&server, &[("HF_TOKEN", "hf_x")], denied(403));
    assert!(
        sentence.contains("403")
            && sentence.ends_with("the token (HF_TOKEN or the token file) may not read it, or its terms are not accepted yet")
    );
    assert!(!sentence.contains("hf_x"));
    let sentence = refusal(&server, &[], |_, _| Answer::of(404, &[("x-error-code", "RevisionNotFound")], ""));
    assert_eq!(sentence, format!("{LIST}: the hub at {} does not have it (404, RevisionNotFound)", server.endpoint));
    let sentence = refusal(&server, &[], |request, answer| if is_large(request) { Answer::of(404, &[], "") } else { answer });
    assert!(sentence.starts_with("Org/Name: model-00002-of-00002.safetensors: the hub at "), "{sentence}");
    server.requests();
    let sentence = refusal(&server, &[("HF_HUB_OFFLINE", "1")], |_, answer| answer);
    assert!(sentence.ends_with("nothing is downloaded, as HF_HUB_OFFLINE is set"), "{sentence}");
    assert_eq!(server.requests(), []);
}

#[test]
fn what_passes_is_waited_for_and_what_does_not_is_given_up() {
    let server = model();
    let cache = TempDir::new().unwrap();
    let mut wrong = vec![503, 500, 429];
    server.twist(move |request, answer| match request.path.starts_with("/elsewhere/") {
        true => wrong.pop().map_or(answer, |status| Answer::of(status, &[], "")),
        false => answer,
    });
    fetched(&server.hub(cache.path(), &[]), &RunContext::default()).unwrap();
    // A signed address may grow old: it is asked for anew.
    server.requests();
    let cache = TempDir::new().unwrap();
    let mut old = true;
    server.twist(move |request, answer| match request.path.starts_with("/elsewhere/model-00002") && std::mem::take(&mut old) {
        true => Answer::of(403, &[], "expired"),
        false => answer,
    });
    fetched(&server.hub(cache.path(), &[]), &RunContext::default()).unwrap();
    assert_eq!(server.requests().iter().filter(|r| is_large(r)).count(), 2);

    let sentence = refusal(&server, &[], |_, _| Answer::of(502, &[], ""));
    let again = "what was fetched is kept: run the same command again to continue";
    let failed = format!("the hub at {} failed 5 times, at last", server.endpoint);
    assert_eq!(sentence, format!("{LIST}: {failed}: the answer 502; {again}"));
    assert_eq!(server.requests().len(), 5);
    let sentence = refusal(&server, &[], |request, mut answer| {
        answer.cut = request.path.starts_with("/elsewhere/model-00002").then_some(0);
        answer
    });
    assert!(sentence.contains(&format!("{failed}: at byte 0 of 800000: ")), "{sentence}");
    // A port that nobody listens on: it was given to a listener that is gone.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let endpoint = format!("http://{port}");
    let sentence = refusal(&server, &[("HF_ENDPOINT", &endpoint)], |_, answer| answer);
    assert!(sentence.starts_with(&format!("{LIST}: the hub at {endpoint} failed 5 times, at last: ")), "{sentence}");
}

#[test]
fn other_bytes_than_announced_are_refused_and_not_kept() {
    let server = model();
    let sentence = refusal(&server, &[], |request, mut answer| {
        if request.path.starts_with("/elsewhere/model-00002") {
            answer.body[400_000] ^= 1;
        }
        answer
    });
    let mut wrong = noise(200_000);
    let good = sha256(&wrong);
    wrong[400_000] ^= 1;
    let what = "Org/Name: model-00002-of-00002.safetensors";
    assert_eq!(sentence, format!("{what}: expected bytes with SHA-256 {good}, found {}", sha256(&wrong)));
    let sentence =
        refusal(&server, &[], |request, answer| match request.path == "/kept/config.json" && request.method == "GET" {
            true => Answer { body: b"{\"a\": 2}".to_vec(), ..answer },
            false => answer,
        });
    let (good, wrong) = (git(b"{\"a\": 1}"), git(b"{\"a\": 2}"));
    assert_eq!(sentence, format!("Org/Name: config.json: expected bytes with git hash {good}, found {wrong}"));
    let short = refusal(&server, &[], |request, answer| match request.path.starts_with("/elsewhere/model-00002") {
        true => Answer { body: answer.body[..100].to_vec(), ..answer },
        false => answer,
    });
    assert_eq!(short, format!("{what}: expected 800000 bytes, found 100"));
    // Without a length, more than announced is never read.
    let endless = refusal(&server, &[], |request, answer| match request.path.starts_with("/elsewhere/model-00002") {
        true => Answer { body: format!("{:x}\r\n{}\r\n", 900_000, "x".repeat(900_000)).into(), ..answer }
            .with("transfer-encoding", "chunked"),
        false => answer,
    });
    assert!(endless.contains("expected bytes with SHA-256"), "{endless}");
}

#[test]
fn headers_that_lie_are_refused() {
    let server = model();
    let head = |name: &'static str, value: String| {
        refusal(&server, &[], move |request, answer| if is_large(request) { answer.with(name, value.clone()) } else { answer })
    };
    let what = "Org/Name: model-00002-of-00002.safetensors: expected";
    for (size, found) in [("799999", "799999"), ("18446744073709551615", "18446744073709551615")] {
        let sentence = head("x-linked-size", size.into());
        assert_eq!(sentence, format!("{what} 800000 bytes, as the hub's list says, found {found}"));
    }
    for etag in ["../../../x", "a/b", "", "a.incomplete", "\"..\"", &"a".repeat(129)] {
        let sentence = head("x-linked-etag", etag.into());
        assert!(sentence.starts_with(&format!("{what} an ETag of letters, digits, - and _, found ")), "{sentence}");
    }
    let sentence = head("x-linked-etag", sha256(b"other"));
    let listed = sha256(&noise(200_000));
    assert_eq!(sentence, format!("{what} SHA-256 {listed}, as the hub's list says, found {}", sha256(b"other")));
    for location in ["file:///etc/passwd", "//evil/x", "relative"] {
        let sentence = head("location", location.into());
        assert!(sentence.starts_with(&format!("{what} a redirect that stays with https, found one to ")), "{sentence}");
    }
    let around = refusal(&server, &[], |_, _| Answer::of(307, &[("location", "/again")], ""));
    assert_eq!(around, format!("{LIST}: expected at most 10 redirects, found more"));
}

#[test]
fn lists_that_lie_are_refused() {
    let server = model();
    let answered = |list: String| {
        refusal(&server, &[], move |request, answer| match request.path.starts_with("/api/") {
            true => Answer::of(200, &[], list.clone()),
            false => answer,
        })
    };
    for (list, words) in [
        ("", "expected a commit and its files"),
        ("{\"sha\":\"../../x\",\"siblings\":[]}", "expected a commit's hash of 40 digits, found \"../../x\""),
        (
            &format!("{{\"sha\":\"{COMMIT}\",\"siblings\":[]}}"),
            "expected a model with tokenizer.json, found none in the hub's list",
        ),
        (
            &format!("{{\"sha\":\"{COMMIT}\",\"siblings\":[{{\"rfilename\":\"x\",\"size\":-1}}]}}"),
            "expected a commit and its files",
        ),
    ] {
        let sentence = answered(list.into());
        assert!(sentence.starts_with("Org/Name") && sentence.contains(words), "{sentence}");
    }
    let list = |files: &str| format!("{{\"sha\":\"{COMMIT}\",\"siblings\":[{files}]}}");
    let many = vec!["{\"rfilename\":\"x\"}"; 50_001].join(",");
    assert!(answered(list(&many)).ends_with("expected at most 50000 files, found 50001"));
    let named = |names: &[&str]| names.iter().map(|name| format!("{{\"rfilename\":{name:?}}}")).collect::<Vec<_>>().join(",");
    let sentence = answered(list(&named(&["config.json", "tokenizer.json", "pytorch_model.bin", "../x.safetensors"])));
    assert!(sentence.contains("expected safetensors weights, found none"), "{sentence}");
    let sentence = answered(list(&format!(
        "{},{{\"rfilename\":\"model.safetensors\",\"size\":{}}}",
        named(&["config.json", "tokenizer.json"]),
        u64::MAX
    )));
    assert!(sentence.contains("404") || sentence.contains("bytes, as the hub's list says"), "{sentence}");

    // A dataset's paths, and the files that a model's index names.
    for path in ["/evil.jsonl", "a//b.jsonl", "a\\b.jsonl", "a:b.jsonl"] {
        let (server, cache) = (chats().small(path, "{}"), TempDir::new().unwrap());
        let hub = server.hub(&cache.path().join("x/y/hub"), &[]);
        let sentence = hub.data_files(&["Org/Name".into()], &RunContext::default()).unwrap_err().to_string();
        assert!(sentence.ends_with("expected a file of the repository, found a path that leads elsewhere"), "{sentence}");
        assert_eq!(below(cache.path()), Vec::<String>::new());
    }
    // What climbs counts as hidden.
    let (server, cache) = (chats().small("../../../../evil.jsonl", "{}").small("a/../b.jsonl", "{}"), TempDir::new().unwrap());
    let hub = server.hub(&cache.path().join("x/y/hub"), &[]);
    assert_eq!(hub.data_files(&["Org/Name".into()], &RunContext::default()).unwrap().len(), 4);
    assert!(below(cache.path()).iter().all(|file| file.starts_with("x/y/hub/") && !file.contains("evil")));
    for file in ["../x.safetensors", "/x.safetensors", "x/y.safetensors", "x.bin"] {
        let index = format!("{{\"weight_map\":{{\"a\":{file:?}}}}}");
        let sentence = refusal(&model().small("model.safetensors.index.json", index), &[], |_, answer| answer);
        assert!(sentence.contains("expected a weight_map of plain .safetensors names, found the file name"), "{sentence}");
    }
    let index = "{\"weight_map\":{\"a\":\"gone.safetensors\"}}";
    let sentence = refusal(&model().small("model.safetensors.index.json", index), &[], |_, answer| answer);
    assert!(
        sentence.ends_with("gone.safetensors: expected a file of the repository, found none in the hub's list"),
        "{sentence}"
    );
    assert!(fs::metadata("/evil.jsonl").is_err());
}
