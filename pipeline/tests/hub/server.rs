//! A server in this process that plays the hub: lists, redirects, ETags, large files elsewhere, ranges, and whatever goes wrong.

use crate::made::{COMMIT, settings};
use potstill_pipeline::hub::Hub;
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A request as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub method: String,
    /// Address on its host; large files lie on another host, below `/elsewhere/`.
    pub path: String,
    pub headers: BTreeMap<String, String>,
}

/// What is answered.
#[derive(Default)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
    /// The connection ends after so many bytes of the body.
    pub cut: Option<usize>,
    /// What is done before the connection ends there.
    pub then: Option<Box<dyn FnOnce() + Send>>,
}

impl Answer {
    pub fn of(status: u16, headers: &[(&str, &str)], body: impl Into<Vec<u8>>) -> Self {
        let headers = headers.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        Self { status, headers, body: body.into(), ..Self::default() }
    }

    /// With another value of a header.
    pub fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.retain(|(known, _)| known != name);
        self.headers.push((name.to_string(), value.into()));
        self
    }
}

/// What is done to an ordinary answer before it is sent.
type Twist = Box<dyn FnMut(&Request, Answer) -> Answer + Send>;

/// One file of the repository.
#[derive(Clone)]
struct File {
    bytes: Vec<u8>,
    large: bool,
}

struct Shared {
    /// `models/Org/Name` or `datasets/Org/Name`.
    repository: String,
    commit: Mutex<String>,
    files: Mutex<BTreeMap<String, File>>,
    requests: Mutex<Vec<Request>>,
    twist: Mutex<Twist>,
    elsewhere: String,
}

/// The hub, and the host that large files lie on.
pub struct Server {
    shared: Arc<Shared>,
    pub endpoint: String,
}

impl Server {
    pub fn start(repository: &str) -> Self {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, elsewhere) = (listen(), listen());
        let address = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let shared = Arc::new(Shared {
            repository: repository.into(),
            commit: Mutex::new(COMMIT.into()),
            files: Mutex::default(),
            requests: Mutex::default(),
            twist: Mutex::new(Box::new(|_, answer| answer)),
            elsewhere: address(&elsewhere),
        });
        let endpoint = address(&hub);
        for listener in [hub, elsewhere] {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let shared = Arc::clone(&shared);
                    std::thread::spawn(move || serve(&shared, stream));
                }
            });
        }
        Self { shared, endpoint }
    }

    /// A small file, identified by git's hash.
    pub fn small(self, path: &str, bytes: impl Into<Vec<u8>>) -> Self {
        self.shared.files.lock().unwrap().insert(path.into(), File { bytes: bytes.into(), large: false });
        self
    }

    /// A large file, identified by its SHA-256.
    pub fn large(self, path: &str, bytes: impl Into<Vec<u8>>) -> Self {
        self.shared.files.lock().unwrap().insert(path.into(), File { bytes: bytes.into(), large: true });
        self
    }

    /// The commit that every branch is from now on.
    pub fn set_commit(&self, commit: &str) {
        *self.shared.commit.lock().unwrap() = commit.into();
    }

    /// Changes answers from now on.
    pub fn twist(&self, twist: impl FnMut(&Request, Answer) -> Answer + Send + 'static) {
        *self.shared.twist.lock().unwrap() = Box::new(twist);
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut *self.shared.requests.lock().unwrap())
    }

    /// `METHOD path` of the requests since the last call that concern `file`.
    pub fn asked_for(&self, file: &str) -> Vec<String> {
        let range = |r: &Request| r.headers.get("range").map_or(String::new(), |range| format!(" {range}"));
        let ours = self.requests().into_iter().filter(|r| r.path.ends_with(file));
        ours.map(|r| format!("{}{}", r.method, range(&r))).collect()
    }

    /// Somebody who fetches from here into `cache`.
    pub fn hub(&self, cache: &Path, variables: &[(&str, &str)]) -> Hub {
        let own = [("HF_HUB_CACHE", cache.to_str().unwrap()), ("HF_ENDPOINT", self.endpoint.as_str())];
        let mut settings = settings(&[variables, &own[..]].concat());
        settings.pause = Duration::from_millis(1);
        Hub::new(settings)
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn sha256(bytes: &[u8]) -> String {
    hexadecimal(digest(&SHA256, bytes).as_ref())
}

pub fn git(bytes: &[u8]) -> String {
    let content = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    hexadecimal(digest(&SHA1_FOR_LEGACY_USE_ONLY, &content).as_ref())
}

fn serve(shared: &Shared, stream: TcpStream) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let mut words = first.split(' ').map(str::to_string);
    let (method, path) = (words.next().unwrap(), words.next().unwrap().replace("%20", " "));
    let split = |line: String| line.split_once(':').map(|(n, v)| (n.to_ascii_lowercase(), v.trim().to_string()));
    let headers = lines.take_while(|line| !line.is_empty()).filter_map(split).collect();
    let request = Request { method, path, headers };
    shared.requests.lock().unwrap().push(request.clone());
    let answer = ordinary(shared, &request);
    let answer = (shared.twist.lock().unwrap())(&request, answer);
    // Whoever asked may have gone away.
    let _ = send(stream, &request, answer);
}

fn send(mut stream: TcpStream, request: &Request, answer: Answer) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {} X\r\nconnection: close\r\n", answer.status);
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    if !answer.headers.iter().any(|(name, _)| name == "content-length" || name == "transfer-encoding") {
        head += &format!("content-length: {}\r\n", answer.body.len());
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if request.method != "HEAD" {
        stream.write_all(&answer.body[..answer.cut.unwrap_or(answer.body.len())])?;
    }
    stream.flush()?;
    if let Some(then) = answer.then {
        then();
    }
    Ok(())
}

/// What the hub answers when all is well.
fn ordinary(shared: &Shared, request: &Request) -> Answer {
    let (kind, id) = shared.repository.split_once('/').unwrap();
    let commit = shared.commit.lock().unwrap().clone();
    let files = shared.files.lock().unwrap().clone();
    let prefix = if kind == "models" { String::new() } else { format!("{kind}/") };
    if let Some(revision) = request.path.strip_prefix(&format!("/api/{kind}/{id}/revision/")) {
        let commit = if revision.starts_with(COMMIT) { COMMIT.to_string() } else { commit };
        return Answer::of(200, &[("content-type", "application/json")], list(&commit, &files));
    }
    if let Some(path) = request.path.strip_prefix("/elsewhere/") {
        let file = &files[path.split('?').next().unwrap()];
        return part(&file.bytes, request.headers.get("range").map(String::as_str));
    }
    if let Some(path) = request.path.strip_prefix("/kept/") {
        let file = &files[path];
        let answer = part(&file.bytes, request.headers.get("range").map(String::as_str));
        return answer.with("etag", format!("\"{}\"", git(&file.bytes)));
    }
    let asked = request.path.strip_prefix(&format!("/{prefix}{id}/resolve/")).and_then(|rest| rest.split_once('/'));
    match asked.and_then(|(commit, path)| Some((commit, path, files.get(path)?))) {
        Some((commit, path, file)) if file.large => Answer::of(302, &[("x-repo-commit", commit)], "")
            .with("location", format!("{}/elsewhere/{path}?signature=secret", shared.elsewhere))
            .with("etag", "\"of the redirect\"")
            .with("x-linked-etag", format!("\"{}\"", sha256(&file.bytes)))
            .with("x-linked-size", file.bytes.len().to_string()),
        Some((commit, path, _)) => {
            Answer::of(307, &[("x-repo-commit", commit)], "moved").with("location", format!("/kept/{}", path.replace(' ', "%20")))
        }
        None => Answer::of(404, &[("x-error-code", "RepoNotFound")], "not here"),
    }
}

fn list(commit: &str, files: &BTreeMap<String, File>) -> String {
    let entry = |(path, file): (&String, &File)| {
        let bytes = file.bytes.len();
        let mut entry = serde_json::json!({ "rfilename": path, "size": bytes, "blobId": git(&file.bytes) });
        if file.large {
            entry["blobId"] = git(b"a pointer").into();
            entry["lfs"] = serde_json::json!({ "sha256": sha256(&file.bytes), "size": bytes, "pointerSize": 134 });
        }
        entry
    };
    serde_json::json!({ "id": "x", "sha": commit, "siblings": files.iter().map(entry).collect::<Vec<_>>() }).to_string()
}

fn part(bytes: &[u8], range: Option<&str>) -> Answer {
    let from = range.and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    match from {
        None => Answer::of(200, &[], bytes),
        Some(from) if from < bytes.len() => {
            let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
            Answer::of(206, &[("content-range", &range)], &bytes[from..])
        }
        Some(_) => Answer::of(416, &[], ""),
    }
}
