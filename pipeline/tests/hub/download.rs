//! Fetching from the server that plays the hub: what comes, where it lies, how it goes on after a break.

use crate::made::{COMMIT, OTHER, in_snapshot};
use crate::server::{Answer, Server, git, sha256};
use potstill_cache::ErrorClass;
use potstill_pipeline::hub::{Hub, name_of};
use potstill_pipeline::run::RunContext;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;
use tempfile::TempDir;

const NAME: &str = "Org/Name";
const FOLDER: &str = "models--Org--Name";
const INDEX: &str = "{\"weight_map\":{\"a\":\"model-00001-of-00002.safetensors\",\"b\":\"model-00002-of-00002.safetensors\"}}";
const SECOND: &str = "model-00002-of-00002.safetensors";

/// Bytes that no two places of share.
pub fn noise(n: u32) -> Vec<u8> {
    (0..n).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

/// A hub with a model in two files, and much that is not wanted.
pub fn model() -> Server {
    let server = Server::start("models/Org/Name").small("config.json", "{\"a\": 1}").large("tokenizer.json", noise(100));
    let server = server.small("model.safetensors.index.json", INDEX).small("chat_template.jinja", "{{ x }}");
    let server = server.large("model-00001-of-00002.safetensors", noise(50_000)).large(SECOND, noise(200_000));
    let server = server.large("pytorch_model.bin", "pickle").large("model.gguf", "gguf").small("onnx/config.json", "no");
    server.small("README.md", "---\nlicense: other\n---\n").large("extra.safetensors", "no").large("tf_model.h5", "no")
}

pub fn chats() -> Server {
    let server = Server::start("datasets/Org/Name").small("README.md", "card").small("dataset_infos.json", "{}");
    let server = server.large("data/a-00000-of-00002.jsonl", "0").large("data/a-00001-of-00002.jsonl", "1");
    server.small("data/b b-00000-of-00001.jsonl", "2").small("data/b-00000-of-00001.jsonl", "3")
}

pub fn fetched(hub: &Hub, context: &RunContext) -> Result<PathBuf, String> {
    hub.model_folder(Path::new(NAME), context).map_err(|e| e.to_string())
}

/// Every file and link below a folder.
pub fn below(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(current) = open.pop() {
        for entry in fs::read_dir(&current).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() { open.push(path) } else { found.push(path.strip_prefix(folder).unwrap().display().to_string()) }
        }
    }
    found.sort();
    found
}

#[test]
fn a_model_is_fetched_into_the_layout_that_others_read() {
    let (server, cache) = (model(), TempDir::new().unwrap());
    let hub = server.hub(cache.path(), &[("HF_TOKEN", "hf_secret")]);
    let context = RunContext::default();
    let snapshot = fetched(&hub, &context).unwrap();
    assert_eq!(snapshot, cache.path().join(FOLDER).join("snapshots").join(COMMIT));
    assert_eq!(name_of(&snapshot).as_deref(), Some(NAME));
    let weights = ["model-00001-of-00002.safetensors", SECOND];
    let small = ["README.md", "chat_template.jinja", "config.json", "model.safetensors.index.json", "tokenizer.json"];
    let mut wanted = [&small[..], &weights].concat();
    wanted.sort();
    assert_eq!(below(&snapshot), wanted, "only what is used");
    assert_eq!(fs::read(snapshot.join(SECOND)).unwrap(), noise(200_000));
    let link = |file: &str| fs::read_link(snapshot.join(file)).unwrap().display().to_string();
    assert_eq!(link(SECOND), format!("../../blobs/{}", sha256(&noise(200_000))));
    assert_eq!(link("config.json"), format!("../../blobs/{}", git(b"{\"a\": 1}")));
    assert_eq!(fs::read_to_string(cache.path().join(FOLDER).join("refs/main")).unwrap(), COMMIT);
    assert_eq!(below(&cache.path().join(FOLDER).join("blobs")).len(), wanted.len(), "nothing is left over");
    assert_eq!(context.progress.snapshot().0.name, "", "the phase is over");

    let requests = server.requests();
    for request in &requests {
        let token = request.headers.get("authorization").map(String::as_str);
        let ours = !request.path.starts_with("/elsewhere/");
        assert_eq!(token, ours.then_some("Bearer hf_secret"), "the token goes to the hub alone: {request:?}");
    }
    assert!(!requests.iter().any(|r| r.path.contains(".bin") || r.path.contains("extra")), "{requests:?}");
    // What is whole is used without a word to anybody, wherever the branch has gone.
    server.set_commit(OTHER);
    assert_eq!(fetched(&hub, &context).unwrap(), snapshot);
    assert_eq!(server.requests(), []);
}

#[test]
fn progress_counts_every_byte_once() {
    let (server, cache) = (model(), TempDir::new().unwrap());
    let context = RunContext::default();
    let (seen, looked_at) = (std::sync::Arc::new(std::sync::Mutex::new(None)), context.clone());
    let keep = std::sync::Arc::clone(&seen);
    let mut cut = true;
    server.twist(move |request, mut answer| {
        if request.method == "GET" && request.path.contains(SECOND) {
            *keep.lock().unwrap() = Some(looked_at.progress.snapshot());
            answer.cut = std::mem::take(&mut cut).then_some(300_000);
        }
        answer
    });
    fetched(&server.hub(cache.path(), &[]), &context).unwrap();
    // As the rest is asked for: the first file and what came before the break.
    let (phase, done) = seen.lock().unwrap().clone().unwrap();
    assert_eq!((phase.name.as_str(), phase.unit, phase.note.as_str()), ("fetching Org/Name", "bytes", SECOND));
    assert_eq!((phase.total, done), (4 * 250_000, 4 * 50_000 + 300_000));
}

#[test]
fn a_break_in_the_middle_is_continued_where_it_was() {
    let (server, cache) = (model(), TempDir::new().unwrap());
    let mut cuts = vec![100_000, 1];
    server.twist(move |request, mut answer| {
        if request.path.starts_with("/elsewhere/") && request.path.contains(SECOND) {
            answer.cut = cuts.pop();
        }
        answer
    });
    let snapshot = fetched(&server.hub(cache.path(), &[]), &RunContext::default()).unwrap();
    assert_eq!(fs::read(snapshot.join(SECOND)).unwrap(), noise(200_000));
    let asked = server.asked_for(&format!("{SECOND}?signature=secret"));
    assert_eq!(asked, ["GET", "GET bytes=1-", "GET bytes=100001-"]);
}

#[test]
fn a_stop_keeps_what_came_and_a_later_run_goes_on() {
    let (server, cache) = (model(), TempDir::new().unwrap());
    let partial = cache.path().join(FOLDER).join("blobs").join(format!("{}.incomplete", sha256(&noise(200_000))));
    let context = RunContext::default();
    let (stop, looked_at) = (context.stop.clone(), partial.clone());
    server.twist(move |request, mut answer| {
        if request.path.starts_with("/elsewhere/") && request.path.contains(SECOND) {
            let (stop, partial) = (stop.clone(), looked_at.clone());
            answer.cut = Some(5000);
            answer.then = Some(Box::new(move || {
                while fs::metadata(&partial).map_or(0, |m| m.len()) < 5000 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                stop.store(true, Ordering::Relaxed);
            }));
        }
        answer
    });
    let hub = server.hub(cache.path(), &[]);
    let error = hub.model_folder(Path::new(NAME), &context).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Interrupted);
    let sentence =
        "stopped by a signal while fetching Org/Name; what was fetched is kept: run the same command again to continue";
    assert_eq!(error.to_string(), sentence);
    assert_eq!(fs::read(&partial).unwrap(), noise(200_000)[..5000]);
    assert!(!cache.path().join(FOLDER).join("snapshots").exists(), "nothing looks whole");
    server.requests();
    server.twist(|_, answer| answer);
    context.stop.store(false, Ordering::Relaxed);
    let snapshot = fetched(&hub, &context).unwrap();
    assert_eq!(fs::read(snapshot.join(SECOND)).unwrap(), noise(200_000));
    assert_eq!(server.asked_for(&format!("{SECOND}?signature=secret")), ["GET bytes=5000-"]);
    assert!(!partial.exists());
}

#[test]
fn what_an_earlier_run_left_is_not_trusted() {
    let (server, cache) = (model(), TempDir::new().unwrap());
    let blobs = cache.path().join(FOLDER).join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{}.incomplete", sha256(&noise(200_000)))), [7; 9000]).unwrap();
    fs::write(blobs.join(format!("{}.incomplete", sha256(&noise(50_000)))), [7; 900_000]).unwrap();
    let snapshot = fetched(&server.hub(cache.path(), &[]), &RunContext::default()).unwrap();
    assert_eq!(fs::read(snapshot.join(SECOND)).unwrap(), noise(200_000));
    assert_eq!(fs::read(snapshot.join("model-00001-of-00002.safetensors")).unwrap(), noise(50_000));
    assert_eq!(server.asked_for(&format!("{SECOND}?signature=secret")), ["GET bytes=9000-", "GET"]);
}

#[test]
fn a_server_without_parts_sends_all_again() {
    let (server, cache) = (model(), TempDir::new().unwrap());
    let blobs = cache.path().join(FOLDER).join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{}.incomplete", sha256(&noise(200_000)))), &noise(200_000)[..9000]).unwrap();
    server.twist(|request, answer| match answer.status {
        206 => Answer::of(200, &[], if request.path.contains(SECOND) { noise(200_000) } else { vec![] }),
        _ => answer,
    });
    let snapshot = fetched(&server.hub(cache.path(), &[]), &RunContext::default()).unwrap();
    assert_eq!(fs::read(snapshot.join(SECOND)).unwrap(), noise(200_000));
    assert_eq!(server.asked_for(&format!("{SECOND}?signature=secret")), ["GET bytes=9000-"]);
}

#[test]
fn only_what_is_missing_is_fetched_and_from_the_commit_that_is_there() {
    let (server, cache) = (model(), TempDir::new().unwrap());
    let hub = server.hub(cache.path(), &[]);
    let snapshot = fetched(&hub, &RunContext::default()).unwrap();
    fs::remove_file(snapshot.join(SECOND)).unwrap();
    fs::remove_file(cache.path().join(FOLDER).join("blobs").join(sha256(&noise(200_000)))).unwrap();
    server.requests();
    server.set_commit(OTHER);
    assert_eq!(fetched(&hub, &RunContext::default()).unwrap(), snapshot);
    let asked: Vec<String> = server.requests().into_iter().map(|r| format!("{} {}", r.method, r.path)).collect();
    let expected = [
        format!("GET /api/models/Org/Name/revision/{COMMIT}?blobs=true"),
        format!("HEAD /Org/Name/resolve/{COMMIT}/{SECOND}"),
        format!("GET /elsewhere/{SECOND}?signature=secret"),
    ];
    assert_eq!(asked, expected);
    // A blob that is there is linked, not fetched.
    fs::remove_file(snapshot.join(SECOND)).unwrap();
    assert_eq!(fetched(&hub, &RunContext::default()).unwrap(), snapshot);
    assert_eq!(server.asked_for(SECOND), ["HEAD"]);
}

#[test]
fn a_split_is_fetched_alone_and_the_list_tells_later_what_is_missing() {
    let (server, cache) = (chats(), TempDir::new().unwrap());
    let hub = server.hub(cache.path(), &[]);
    let files = |hub: &Hub, name: &str| -> Result<Vec<String>, String> {
        let files = hub.data_files(&[name.into()], &RunContext::default()).map_err(|e| e.to_string())?;
        Ok(files.iter().map(|file| in_snapshot(file)).collect())
    };
    let a = ["data/a-00000-of-00002.jsonl", "data/a-00001-of-00002.jsonl"].map(String::from).to_vec();
    assert_eq!(files(&hub, "Org/Name@dev/1:a"), Ok(a.clone()));
    let requests = server.requests();
    assert_eq!(requests[0].path, "/api/datasets/Org/Name/revision/dev%2F1?blobs=true");
    assert!(!requests.iter().any(|r| r.path.contains("/b")), "{requests:?}");
    assert_eq!(below(&cache.path().join("datasets--Org--Name/snapshots").join(COMMIT)), a);
    assert_eq!(fs::read_to_string(cache.path().join("datasets--Org--Name/refs/dev/1")).unwrap(), COMMIT);

    let offline = server.hub(cache.path(), &[("HF_HUB_OFFLINE", "1")]);
    assert_eq!(files(&offline, "Org/Name@dev/1:a"), Ok(a.clone()));
    let sentence = files(&offline, "Org/Name@dev/1").unwrap_err();
    assert!(
        sentence.ends_with("lacks data/b b-00000-of-00001.jsonl and 1 more; nothing is downloaded, as HF_HUB_OFFLINE is set")
    );
    assert!(files(&hub, "Org/Name@dev/1:c").unwrap_err().contains("expected files of chats, found the splits a, b, b b"));
    assert_eq!(server.requests(), []);

    let all = files(&hub, "Org/Name@dev/1").unwrap();
    assert_eq!(all, [&a[..], &["data/b b-00000-of-00001.jsonl".into(), "data/b-00000-of-00001.jsonl".into()]].concat());
    let asked = server.asked_for("00001.jsonl");
    assert_eq!(asked, ["HEAD", "HEAD", "GET", "HEAD", "HEAD", "GET"], "small files: a redirect, then the file");
}
