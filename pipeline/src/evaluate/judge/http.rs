//! One POST to `/chat/completions`: what is sent, and what each answer means. Nothing that is said of an answer holds the key.

use super::JudgeError;
use super::chat::Reply;
use super::client::Fault;
use super::endpoint::Endpoint;
use super::pace;
use std::io::Read;
use std::time::{SystemTime, UNIX_EPOCH};
use ureq::Body;
use ureq::http::Response;

/// Longest body read, in bytes. A reply of 2,048 tokens with log-probabilities of one of them has some 10 KB.
const MAX_BODY_BYTES: u64 = 16 << 20;
/// Longest body of an error that is looked at, in bytes.
const MAX_ERROR_BYTES: u64 = 64 << 10;
/// Longest words of an endpoint that are repeated, in characters.
const MAX_SAID: usize = 300;

/// Sends `body` and reads the reply.
pub(super) fn post(agent: &ureq::Agent, endpoint: &Endpoint, body: &str) -> Result<Reply, Fault> {
    let mut request = agent.post(format!("{}/chat/completions", endpoint.base_url())).content_type("application/json");
    if let Some(authorization) = endpoint.authorization() {
        request = request.header("Authorization", authorization);
    }
    let mut response = request.send(body).map_err(|e| on_the_way(endpoint, &e))?;
    if response.status().as_u16() != 200 {
        return Err(meaning(&mut response, endpoint));
    }
    let mut bytes = Vec::new();
    let read = response.body_mut().as_reader().take(MAX_BODY_BYTES + 1).read_to_end(&mut bytes);
    read.map_err(|e| Fault::Passing("an answer cut short", endpoint.without_key(&format!("an answer cut short ({e})")), None))?;
    if bytes.len() as u64 > MAX_BODY_BYTES {
        let found = format!("an answer of more than {MAX_BODY_BYTES} bytes");
        return Err(Fault::Passing("an answer that is too long", found, None));
    }
    let received = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    Reply::read(&bytes, received, |text| endpoint.without_key(text)).map_err(|(expected, found)| {
        let found = said(endpoint, &found);
        Fault::Passing(
            "an answer that is no reply",
            format!("an answer that is no reply: expected {expected}, found {found}"),
            None,
        )
    })
}

/// What an answer other than 200 means.
fn meaning(response: &mut Response<Body>, endpoint: &Endpoint) -> Fault {
    let status = response.status().as_u16();
    let header = response.headers().get("retry-after").and_then(|v| v.to_str().ok());
    let asked = header.and_then(|value| pace::retry_after(value, SystemTime::now()));
    let mut bytes = Vec::new();
    // Of an error that is cut short its beginning is said.
    let _ = response.body_mut().as_reader().take(MAX_ERROR_BYTES).read_to_end(&mut bytes);
    let (words, code) = error_of(&bytes);
    let words = said(endpoint, &words);
    let base = endpoint.base_url().to_string();
    match status {
        401 | 403 => Fault::Final(endpoint.denied(status, words)),
        402 => Fault::Final(JudgeError::Quota { endpoint: base, said: words, kept: KEPT.into() }),
        // OpenAI's word for an empty account, which no waiting fills.
        429 if code == "insufficient_quota" => Fault::Final(JudgeError::Quota { endpoint: base, said: words, kept: KEPT.into() }),
        429 => Fault::Passing("429, too many requests", format!("429 ({words})"), asked),
        408 | 409 | 425 => Fault::Passing("408, 409 or 425", format!("{status} ({words})"), asked),
        500..=599 => Fault::Passing("5xx, a server's error", format!("{status} ({words})"), asked),
        _ => Fault::Refused(status, words),
    }
}

/// What is kept when nothing more can be had.
const KEPT: &str = "what was answered is on disk: run the same command again to go on";

/// An error's own words and its code.
fn error_of(bytes: &[u8]) -> (String, String) {
    // JSON can write a letter in several ways; written anew, a key in it is found.
    let value: serde_json::Value = serde_json::from_slice(bytes).unwrap_or_default();
    let text = if value.is_null() { String::from_utf8_lossy(bytes).into_owned() } else { value.to_string() };
    let at = |places: &[&str]| places.iter().find_map(|place| value.pointer(place)?.as_str()).map(str::to_string);
    let words = at(&["/error/message", "/message", "/detail", "/error"]).unwrap_or(text);
    (words, at(&["/error/code", "/error/type", "/code"]).unwrap_or_default())
}

/// Words from outside: without the key, on one line, of bounded length.
fn said(endpoint: &Endpoint, words: &str) -> String {
    let line = endpoint.without_key(words).split_whitespace().collect::<Vec<_>>().join(" ");
    let mut cut: String = line.chars().take(MAX_SAID).collect();
    if cut.len() < line.len() {
        cut.push('…');
    }
    if cut.is_empty() { "without a word".into() } else { cut }
}

/// What went wrong between here and there.
fn on_the_way(endpoint: &Endpoint, error: &ureq::Error) -> Fault {
    let (kind, found) = match error {
        ureq::Error::HostNotFound => ("no connection", "the host is not known".to_string()),
        ureq::Error::Timeout(_) => ("no answer in time", "no answer in time".to_string()),
        ureq::Error::Io(source) => ("no connection", source.to_string()),
        other => ("no connection", other.to_string()),
    };
    Fault::Passing(kind, said(endpoint, &found), None)
}
