//! A judge: any OpenAI-compatible endpoint, asked with patience, whose every reply is kept.
//!
//! Owns requests, replies on disk, repeats, and the threads that ask. Knows nothing of benchmarks. Where the endpoint is and what opens it
//! comes from the environment ([`endpoint`]); the key goes into one header and nowhere else.

pub mod chat;
pub mod client;
pub mod endpoint;
mod error;
mod http;
mod pace;
pub mod replies;
pub mod template;

pub use client::Client;
pub use endpoint::Endpoint;
pub use error::JudgeError;
pub use replies::Replies;

use super::files;
use crate::run::RunContext;
use chat::{ChatRequest, Reply};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Requests under way at once; AlpacaEval's number.
pub const DEFAULT_CONCURRENCY: usize = 5;
/// How often a request is tried; FastChat's number.
pub const DEFAULT_TRIES: u32 = 16;
/// Seconds that an endpoint may be silent. A reply comes only when all of it is written.
pub const DEFAULT_TIMEOUT_SECONDS: u64 = 300;
/// Pause before the first repeat of a request that failed; it doubles with each.
pub const DEFAULT_PAUSE: Duration = Duration::from_millis(500);
/// How often a judge is asked again whose reply gives no verdict.
pub const REPEATS_WITHOUT_VERDICT: u32 = 3;
/// Characters of English text in a token, on average: what the estimates of a dry run go by.
pub const CHARACTERS_PER_TOKEN: u64 = 4;

/// How an endpoint is asked.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Requests under way at once.
    pub concurrency: usize,
    /// How often a request is tried before it is given up.
    pub tries: u32,
    /// How long the endpoint may be silent.
    pub timeout: Duration,
    /// Pause before the first repeat.
    pub pause: Duration,
    /// Most requests a minute.
    pub requests_per_minute: Option<u32>,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            concurrency: DEFAULT_CONCURRENCY,
            tries: DEFAULT_TRIES,
            timeout: Duration::from_secs(DEFAULT_TIMEOUT_SECONDS),
            pause: DEFAULT_PAUSE,
            requests_per_minute: None,
        }
    }
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// It was answered.
    Reply(Reply),
    /// It was not, and why. It is counted in [`Calls::failed`].
    Failed(String),
}

/// What was asked, and what became of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Calls {
    /// Requests answered by the endpoint in this run.
    pub asked: u64,
    /// Requests whose reply was on disk.
    pub from_disk: u64,
    /// Files that were no reply, and were asked for again.
    pub torn: u64,
    /// Failures that were followed by another try or by giving up, by kind.
    pub passing: BTreeMap<String, u64>,
    /// Requests left without a reply, by reason.
    pub failed: BTreeMap<String, u64>,
    /// Tokens of requests, as the endpoint counts them, of all replies.
    pub prompt_tokens: u64,
    /// Tokens of replies.
    pub completion_tokens: u64,
    /// Tokens of requests that were answered in this run.
    pub prompt_tokens_now: u64,
    /// Tokens of replies that came in this run.
    pub completion_tokens_now: u64,
    /// Replies by the model that the endpoint said it was.
    pub models: BTreeMap<String, u64>,
}

/// What a run would ask.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Outlook {
    /// Requests.
    pub calls: u64,
    /// Of those, how many have their reply on disk.
    pub on_disk: u64,
    /// Estimated tokens of the requests still to be sent, at [`CHARACTERS_PER_TOKEN`].
    pub prompt_tokens: u64,
    /// Most tokens of their replies.
    pub most_completion_tokens: u64,
}

impl Outlook {
    /// Adds a request.
    ///
    /// Errors: a reply on disk that cannot be read.
    pub fn add(&mut self, request: &ChatRequest, replies: &Replies) -> Result<(), JudgeError> {
        self.calls += 1;
        if matches!(replies.get(&request.body(), 0)?, replies::Known::Reply(_)) {
            self.on_disk += 1;
        } else {
            self.prompt_tokens += request.characters().div_ceil(CHARACTERS_PER_TOKEN);
            self.most_completion_tokens += u64::from(request.max_tokens);
        }
        Ok(())
    }
}

/// What a run begins with: the folders of results and of replies, and a word of each endpoint that would send its key in the open.
///
/// Errors: a folder that cannot be made.
pub(super) fn begin(
    out: &Path,
    replies: &Path,
    endpoints: [Option<&Endpoint>; 2],
    context: &RunContext,
) -> Result<Replies, JudgeError> {
    let replies = Replies::open(replies)?;
    std::fs::create_dir_all(out).map_err(JudgeError::io(out))?;
    endpoints.into_iter().flatten().filter_map(Endpoint::exposure).for_each(|sentence| context.warn(sentence));
    Ok(replies)
}

/// Does `work` for each of `jobs`, some at once; the results stand in the order of the jobs. What is under way when a stop is asked for, or
/// when something fails, is finished, since its reply is paid for.
///
/// Errors: the first failure of `work`, or a stop.
pub(super) fn each<J: Sync, T: Send>(
    jobs: &[J],
    concurrency: usize,
    client: &Client<'_>,
    context: &RunContext,
    work: impl Fn(&J) -> Result<T, JudgeError> + Sync,
) -> Result<Vec<T>, JudgeError> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let results: Mutex<Vec<(usize, Result<T, JudgeError>)>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..concurrency.clamp(1, jobs.len().max(1)) {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) && !context.stopping() {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(i) else { break };
                    let result = work(job);
                    failed.fetch_or(result.is_err(), Ordering::Relaxed);
                    results.lock().unwrap_or_else(PoisonError::into_inner).push((i, result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(i, _)| *i);
    // Whoever was stopped by another's failure says only that; the failure itself is the news.
    let news = |result: &Result<T, JudgeError>| matches!(result, Err(e) if !matches!(e, JudgeError::Interrupted { .. }));
    if let Some(first) = results.iter().position(|(_, result)| news(result)) {
        results.swap(0, first);
    }
    let whole = results.len() == jobs.len();
    let done = results.into_iter().map(|(_, result)| result).collect::<Result<Vec<T>, _>>();
    // Since it failed, what others had under way has come.
    let kept = client.kept();
    match done {
        Ok(done) if whole => Ok(done),
        Ok(_) | Err(JudgeError::Interrupted { .. }) => Err(JudgeError::Interrupted { kept }),
        Err(JudgeError::Unreachable { endpoint, requests, found, .. }) => {
            Err(JudgeError::Unreachable { endpoint, requests, found, kept })
        }
        Err(other) => Err(other),
    }
}
