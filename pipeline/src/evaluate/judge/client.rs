//! Owns one request after another to one endpoint: sent, repeated, given up, kept. Refuses redirects, since a key must not be carried
//! elsewhere, and bodies longer than a reply can be.
//!
//! The one idea: a failure either passes, and the request is repeated after a pause; or it is this request's own, which is counted and
//! left out; or it is everybody's, which ends the run with what was answered on disk.

use super::chat::{ChatRequest, Reply};
use super::endpoint::{Endpoint, Proxy};
use super::pace::{self, Pace, Waited};
use super::replies::{Known, Name, Replies};
use super::{Answer, Calls, JudgeError, Patience, http};
use crate::run::RunContext;
use serde_json::Value;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Requests given up in a row, after which the endpoint counts as gone.
const GIVEN_UP_IN_A_ROW: u32 = 5;

/// Why a request gave no reply.
pub(super) enum Fault {
    /// It may pass: of what kind, what happened, and how long the server asks to wait.
    Passing(&'static str, String, Option<Duration>),
    /// The server does not answer this request, with this status.
    Refused(u16, String),
    /// Nothing more can be had.
    Final(JudgeError),
}

/// Asks one endpoint. Threads share it.
pub struct Client<'a> {
    endpoint: &'a Endpoint,
    replies: &'a Replies,
    patience: Patience,
    context: &'a RunContext,
    agent: ureq::Agent,
    pace: Pace,
    /// Whether the endpoint has ever answered. Until then one request goes alone.
    proven: AtomicBool,
    alone: Mutex<()>,
    given_up: AtomicU32,
    /// Whether something failed that ends the run for all.
    over: AtomicBool,
    calls: Mutex<Calls>,
}

impl<'a> Client<'a> {
    /// Somebody who asks `endpoint` and keeps its replies.
    pub fn new(endpoint: &'a Endpoint, replies: &'a Replies, patience: Patience, context: &'a RunContext) -> Self {
        let limit = Some(patience.timeout);
        let config = ureq::Agent::config_builder()
            .user_agent(concat!("potstill/", env!("CARGO_PKG_VERSION")))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(limit)
            .timeout_connect(limit)
            .timeout_recv_response(limit)
            .timeout_recv_body(limit)
            .timeout_per_read(limit)
            .timeout_per_write(limit);
        let config = match endpoint.proxy {
            Proxy::Environment => config,
            Proxy::Never => config.proxy(None),
        };
        let agent = config.build().new_agent();
        let (pace, calls) = (Pace::new(patience.requests_per_minute), Mutex::default());
        let (proven, alone, given_up) = (AtomicBool::new(false), Mutex::new(()), AtomicU32::new(0));
        let over = AtomicBool::new(false);
        Self { endpoint, replies, patience, context, agent, pace, proven, alone, given_up, over, calls }
    }

    /// What was asked so far.
    pub fn calls(&self) -> Calls {
        self.lock().clone()
    }

    /// The reply to `request`, asked for the `attempt`-th time (from 0): from disk, else from the endpoint.
    ///
    /// Errors: a stop, a disk that fails, an endpoint that lets nobody in, refuses the very first request, or is gone.
    pub fn ask(&self, request: &ChatRequest, attempt: u32) -> Result<Answer, JudgeError> {
        let body = request.body();
        match self.replies.get(&body, attempt)? {
            Known::Reply(reply) => {
                self.proven.store(true, Ordering::Relaxed);
                self.lock().found(&reply);
                return Ok(Answer::Reply(reply));
            }
            Known::Torn => self.lock().torn += 1,
            Known::Nothing => {}
        }
        let answer = self.in_turn(&body, Name::of(&body, attempt))?;
        if let Answer::Reply(reply) = &answer {
            self.replies.put(&body, attempt, reply)?;
            self.lock().asked(reply);
        }
        Ok(answer)
    }

    /// Asks alone where the endpoint never answered yet, so that what is wrong with it is found at the price of one request.
    fn in_turn(&self, body: &Value, name: Name) -> Result<Answer, JudgeError> {
        let mut alone = None;
        if !self.proven.load(Ordering::Relaxed) {
            alone = Some(self.alone.lock().unwrap_or_else(PoisonError::into_inner));
        }
        if self.proven.load(Ordering::Relaxed) {
            drop(alone.take());
        }
        // Known to the others before the next of them goes.
        self.insist(body, name).inspect_err(|_| self.over.store(true, Ordering::Relaxed))
    }

    /// Repeats a request until it is answered, refused or given up.
    fn insist(&self, body: &Value, name: Name) -> Result<Answer, JudgeError> {
        let bytes = body.to_string();
        let mut tries = 0;
        loop {
            if self.pace.turn(self.context) == Waited::Stopped || self.over.load(Ordering::Relaxed) {
                return Err(self.stopped());
            }
            let (kind, found, asked) = match http::post(&self.agent, self.endpoint, &bytes) {
                Ok(reply) => {
                    self.proven.store(true, Ordering::Relaxed);
                    self.given_up.store(0, Ordering::Relaxed);
                    return Ok(Answer::Reply(reply));
                }
                Err(Fault::Final(error)) => return Err(error),
                Err(Fault::Refused(status, said)) if !self.proven.load(Ordering::Relaxed) => {
                    return Err(JudgeError::Refused { endpoint: self.endpoint.base_url().to_string(), status, said });
                }
                Err(Fault::Refused(status, said)) => {
                    self.lock().fail(format!("refused with {status}"));
                    return Ok(Answer::Failed(format!("refused with {status} ({said})")));
                }
                Err(Fault::Passing(kind, found, asked)) => (kind, found, asked),
            };
            tries += 1;
            self.lock().repeat(kind);
            if tries >= self.patience.tries {
                return self.give_up(kind, found);
            }
            let pause = pace::pause(self.patience.pause, tries, name.bytes());
            if let Some(asked) = asked {
                self.pace.hold(asked);
            }
            self.context.progress.note(format!("try {} of {} after {found}", tries + 1, self.patience.tries));
            if pace::rest(asked.map_or(pause, |asked| asked.max(pause)), self.context) == Waited::Stopped {
                return Err(self.stopped());
            }
        }
    }

    /// Counts a request as failed, or the endpoint as gone.
    fn give_up(&self, kind: &'static str, found: String) -> Result<Answer, JudgeError> {
        let in_a_row = self.given_up.fetch_add(1, Ordering::Relaxed) + 1;
        if in_a_row >= GIVEN_UP_IN_A_ROW || !self.proven.load(Ordering::Relaxed) {
            return Err(JudgeError::Unreachable {
                endpoint: self.endpoint.base_url().to_string(),
                requests: match in_a_row {
                    1 => format!("a request failed {} times", self.patience.tries),
                    n => format!("{n} requests in a row failed {} times each", self.patience.tries),
                },
                found,
                kept: self.kept(),
            });
        }
        self.lock().fail(format!("given up after {} tries: {kind}", self.patience.tries));
        Ok(Answer::Failed(format!("given up after {} tries, at last: {found}", self.patience.tries)))
    }

    fn stopped(&self) -> JudgeError {
        JudgeError::Interrupted { kept: self.kept() }
    }

    /// What is on disk, and what to do next.
    pub(super) fn kept(&self) -> String {
        let calls = self.lock();
        let kept = calls.asked + calls.from_disk;
        let word = if kept == 1 { "reply is" } else { "replies are" };
        format!("{kept} {word} on disk: run the same command again to go on, at no cost for what is there")
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Calls {
    fn found(&mut self, reply: &Reply) {
        self.from_disk += 1;
        self.note(reply);
    }

    fn asked(&mut self, reply: &Reply) {
        self.asked += 1;
        let usage = reply.usage.unwrap_or_default();
        self.prompt_tokens_now += usage.prompt_tokens;
        self.completion_tokens_now += usage.completion_tokens;
        self.note(reply);
    }

    fn note(&mut self, reply: &Reply) {
        let usage = reply.usage.unwrap_or_default();
        self.prompt_tokens += usage.prompt_tokens;
        self.completion_tokens += usage.completion_tokens;
        let model = reply.model.clone().unwrap_or_else(|| "(none said)".into());
        *self.models.entry(model).or_default() += 1;
    }

    fn repeat(&mut self, kind: &'static str) {
        *self.passing.entry(kind.to_string()).or_default() += 1;
    }

    fn fail(&mut self, reason: String) {
        *self.failed.entry(reason).or_default() += 1;
    }
}
