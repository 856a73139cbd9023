//! Owns requests to the hub: addresses, token, redirects, repeats. Refuses to show the token to any other host, and to leave https
//! for http.
//!
//! The one idea: a failure either passes, and then the request is repeated after a pause, or it is final and says what may help.

use super::super::listing::MAX_LIST_BYTES;
use super::super::name::{HubName, Kind};
use super::super::{HubError, HubSettings, Proxy};
use super::list::{self, List};
use crate::run::RunContext;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};
use ureq::http::{Response, Uri};
use ureq::{Agent, Body};

/// How often a request is repeated that brings nothing new.
const TRIES: u32 = 5;
/// Redirects followed in a row.
const MAX_REDIRECTS: usize = 10;
/// Longest nap in which a stop goes unnoticed.
const NAP: Duration = Duration::from_millis(50);

/// Why a request gave nothing.
pub(super) enum Fault {
    /// It may pass; what happened, and whether something new came before it did.
    Passing(String, Gain),
    /// It will not.
    Final(HubError),
}

/// Whether a failed request brought something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gain {
    /// Nothing new.
    Nothing,
    /// Some bytes.
    Some,
}

impl From<HubError> for Fault {
    fn from(error: HubError) -> Self {
        Fault::Final(error)
    }
}

/// Speaks to the hub about one repository.
pub(super) struct Client<'a> {
    pub(super) settings: &'a HubSettings,
    pub(super) name: &'a HubName,
    pub(super) context: &'a RunContext,
    agent: Agent,
    token: Option<String>,
}

/// Where a file's bytes are, and how they are known.
pub(super) struct Source {
    pub(super) url: String,
    /// Its name among the blobs.
    pub(super) etag: String,
    /// Its length, where the answer says it.
    pub(super) bytes: Option<u64>,
}

/// Where redirects to another host end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Border {
    Stop,
    Cross,
}

impl<'a> Client<'a> {
    pub(super) fn new(settings: &'a HubSettings, name: &'a HubName, context: &'a RunContext) -> Self {
        let limit = Some(settings.timeout);
        let config = Agent::config_builder()
            .user_agent(concat!("potstill/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_resolve(limit)
            .timeout_connect(limit)
            .timeout_recv_response(limit)
            .timeout_per_read(limit)
            .timeout_per_write(limit);
        let config = match settings.proxy {
            Proxy::Environment => config,
            Proxy::Never => config.proxy(None),
        };
        Self { settings, name, context, agent: config.build().new_agent(), token: settings.token() }
    }

    /// Repeats `attempt` until it succeeds, fails for good, or has failed [`TRIES`] times in a row without anything new.
    pub(super) fn insist<T>(&self, what: &str, mut attempt: impl FnMut() -> Result<T, Fault>) -> Result<T, HubError> {
        let mut tries = 0;
        loop {
            self.go_on()?;
            match attempt() {
                Ok(value) => return Ok(value),
                Err(Fault::Final(error)) => return Err(error),
                Err(Fault::Passing(_, Gain::Some)) => tries = 1,
                Err(Fault::Passing(found, Gain::Nothing)) => {
                    tries += 1;
                    if tries >= TRIES {
                        return Err(HubError::Unreachable {
                            what: what.to_string(),
                            endpoint: self.settings.endpoint.clone(),
                            found,
                            tries,
                        });
                    }
                }
            }
            self.rest(self.settings.pause * 2_u32.pow(tries - 1))?;
        }
    }

    /// Errors: a stop was asked for.
    pub(super) fn go_on(&self) -> Result<(), HubError> {
        if self.context.stopping() { Err(HubError::Interrupted { name: self.name.to_string() }) } else { Ok(()) }
    }

    /// Waits. Errors: a stop was asked for.
    pub(super) fn rest(&self, pause: Duration) -> Result<(), HubError> {
        let end = Instant::now() + pause;
        while Instant::now() < end {
            self.go_on()?;
            std::thread::sleep(NAP.min(end.saturating_duration_since(Instant::now())));
        }
        Ok(())
    }

    /// The commit that `revision` is, and its files.
    pub(super) fn list(&self, revision: &str) -> Result<List, HubError> {
        let (plural, id) = (self.name.kind.plural(), &self.name.id);
        let url = format!("{}/api/{plural}/{id}/revision/{}?blobs=true", self.settings.endpoint, encoded(revision, ""));
        // A mistyped path may look like a name, so the sentence says that there is no such path.
        let cache = self.settings.cache.as_deref().unwrap_or(Path::new("the cache")).display();
        let what = format!("{id}@{revision} (no such path, and not whole in {cache})");
        let bytes = self.insist(&what, || {
            let mut response = self.send("GET", &url, None, Border::Cross, &what)?.0;
            self.accept(&response, &[200], &what)?;
            let mut bytes = Vec::new();
            let read = response.body_mut().as_reader().take(MAX_LIST_BYTES + 1).read_to_end(&mut bytes);
            read.map_err(|e| Fault::Passing(e.to_string(), Gain::Nothing))?;
            Ok(bytes)
        })?;
        list::parsed(&bytes).map_err(|(expected, found)| HubError::Answer { what, expected, found })
    }

    /// Asks where the file is and what identifies its bytes.
    pub(super) fn locate(&self, commit: &str, path: &str) -> Result<Source, Fault> {
        let kind = if self.name.kind == Kind::Dataset { "datasets/" } else { "" };
        let (endpoint, id) = (&self.settings.endpoint, &self.name.id);
        let url = format!("{endpoint}/{kind}{id}/resolve/{commit}/{}", encoded(path, "/"));
        let what = self.what(path);
        let (response, seen) = self.send("HEAD", &url, None, Border::Stop, &what)?;
        let arrived = seen.url.is_some();
        self.accept(&response, if arrived { &[301, 302, 303, 307, 308] } else { &[200] }, &what)?;
        let wrong = |expected: &str, found: String| HubError::Answer { what: what.clone(), expected: expected.into(), found };
        let etag = seen.linked_etag.or_else(|| header(&response, "etag")).unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_string();
        let fits = (1..=128).contains(&etag.len()) && etag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        if !fits {
            let shown: String = etag.chars().take(80).collect();
            return Err(wrong("an ETag of letters, digits, - and _", format!("{shown:?}")).into());
        }
        // The length of a redirect is its own, not the file's.
        let length = if arrived { None } else { header(&response, "content-length") };
        let bytes = seen.linked_size.or(length).and_then(|n| n.trim().parse().ok());
        Ok(Source { url: seen.url.unwrap_or(seen.last), etag, bytes })
    }

    /// The bytes behind `url` from byte `from` on: an answer 200 (all of them) or 206 (the rest).
    pub(super) fn bytes(&self, url: &str, from: u64, what: &str) -> Result<Response<Body>, Fault> {
        let response = self.send("GET", url, (from > 0).then_some(from), Border::Cross, what)?.0;
        let elsewhere = !self.is_ours(url);
        match response.status().as_u16() {
            // A signed address that is too old, or a part that there is not: asked anew.
            status @ (401 | 403) if elsewhere => Err(Fault::Passing(format!("the answer {status}"), Gain::Nothing)),
            _ => self.accept(&response, &[200, 206, 416], what).map(|()| response),
        }
    }

    /// The file in a sentence.
    pub(super) fn what(&self, path: &str) -> String {
        format!("{}: {path}", self.name.id)
    }

    /// Sends a request and follows redirects. The token goes to the hub's own address alone.
    fn send(
        &self,
        method: &str,
        url: &str,
        from: Option<u64>,
        border: Border,
        what: &str,
    ) -> Result<(Response<Body>, Seen), Fault> {
        let mut seen = Seen { last: url.to_string(), ..Seen::default() };
        for _ in 0..MAX_REDIRECTS {
            let mut request = if method == "HEAD" { self.agent.head(&seen.last) } else { self.agent.get(&seen.last) };
            request = request.header("accept-encoding", "identity");
            if let Some(from) = from {
                request = request.header("range", format!("bytes={from}-"));
            }
            if let Some(token) = self.token.as_deref().filter(|_| self.is_ours(&seen.last)) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let response = request.call().map_err(|e| Fault::Passing(said(&e), Gain::Nothing))?;
            seen.linked_etag = seen.linked_etag.or_else(|| header(&response, "x-linked-etag"));
            seen.linked_size = seen.linked_size.or_else(|| header(&response, "x-linked-size"));
            let Some(location) = header(&response, "location").filter(|_| response.status().is_redirection()) else {
                return Ok((response, seen));
            };
            let next = joined(&seen.last, &location).filter(|next| next.starts_with("https:") || !self.is_https());
            let Some(next) = next else {
                let expected = "a redirect that stays with https".into();
                let found =
                    format!("one to {:?}", location.split('?').next().unwrap_or_default().chars().take(200).collect::<String>());
                return Err(HubError::Answer { what: what.to_string(), expected, found }.into());
            };
            if border == Border::Stop && !self.is_ours(&next) {
                seen.url = Some(next);
                return Ok((response, seen));
            }
            seen.last = next;
        }
        let expected = format!("at most {MAX_REDIRECTS} redirects");
        Err(HubError::Answer { what: what.to_string(), expected, found: "more".into() }.into())
    }

    /// Whether an answer is one of `good`; else what it means.
    fn accept(&self, response: &Response<Body>, good: &[u16], what: &str) -> Result<(), Fault> {
        let status = response.status().as_u16();
        let what = what.to_string();
        Err(match status {
            _ if good.contains(&status) => return Ok(()),
            401 | 403 => {
                let advice = match self.token {
                    None => "set HF_TOKEN to a token that may read it, and accept its terms on its page if it has any",
                    Some(_) => "the token (HF_TOKEN or the token file) may not read it, or its terms are not accepted yet",
                };
                HubError::Denied { what, status, advice }.into()
            }
            404 => {
                let word = header(response, "x-error-code").filter(|w| w.len() < 40).unwrap_or_else(|| "not found".into());
                HubError::NotThere { what, endpoint: self.settings.endpoint.clone(), found: format!("404, {word}") }.into()
            }
            408 | 429 | 500 | 502..=504 => Fault::Passing(format!("the answer {status}"), Gain::Nothing),
            _ => HubError::Answer { what, expected: format!("an answer {good:?}"), found: status.to_string() }.into(),
        })
    }

    fn is_ours(&self, url: &str) -> bool {
        let origin = |url: &str| {
            let uri: Uri = url.parse().ok()?;
            Some((uri.scheme_str()?.to_ascii_lowercase(), uri.authority()?.as_str().to_ascii_lowercase()))
        };
        origin(url).is_some_and(|ours| origin(&self.settings.endpoint) == Some(ours))
    }

    fn is_https(&self) -> bool {
        self.settings.endpoint.starts_with("https:")
    }
}

/// What was learnt on the way.
#[derive(Default)]
struct Seen {
    /// The last address asked.
    last: String,
    /// An address beyond the border.
    url: Option<String>,
    linked_etag: Option<String>,
    linked_size: Option<String>,
}

/// Everything but letters, digits, `-._~` and `kept` as %XX.
fn encoded(text: &str, kept: &str) -> String {
    let one = |byte: u8| match char::from(byte) {
        c if c.is_ascii_alphanumeric() || "-._~".contains(c) || kept.contains(c) => c.to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(one).collect()
}

/// `location` as seen from `url`: absolute, or from the host's root.
fn joined(url: &str, location: &str) -> Option<String> {
    if location.starts_with("http://") || location.starts_with("https://") {
        return Some(location.to_string());
    }
    let uri: Uri = url.parse().ok()?;
    let rooted = location.starts_with('/') && !location.starts_with("//");
    rooted.then(|| Some(format!("{}://{}{location}", uri.scheme_str()?, uri.authority()?)))?
}

pub(super) fn header(response: &Response<Body>, name: &str) -> Option<String> {
    response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_string)
}

/// What went wrong between here and there, without the address, which may hold a signature.
fn said(error: &ureq::Error) -> String {
    match error {
        ureq::Error::HostNotFound => "the host is not known".into(),
        ureq::Error::Timeout(_) => "no answer in time".into(),
        ureq::Error::Io(source) => source.to_string(),
        ureq::Error::BadUri(_) => "the address is none".into(),
        other => other.to_string(),
    }
}
