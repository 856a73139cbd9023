//! Answers of the model that is judged: from a file, or asked of an endpoint (a server with the merged model, say) and kept like any reply.

use super::judge::chat::{ChatRequest, LimitField, Logprobs, Message, Role};
use super::judge::replies::Name;
use super::judge::{Answer, Calls, Client, Endpoint, JudgeError, Patience, Replies};
use crate::run::RunContext;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Where answers come from.
#[derive(Debug, Clone)]
pub enum AnswerSource {
    /// A file that holds them.
    File(PathBuf),
    /// An endpoint that writes them.
    Endpoint(AnswerSettings),
}

/// How answers are asked for.
#[derive(Debug, Clone)]
pub struct AnswerSettings {
    /// The model, by the server's name.
    pub model: String,
    /// Sampling temperature; `None`: the benchmark's own.
    pub temperature: Option<f64>,
    /// Nucleus; `None` sends nothing.
    pub top_p: Option<f64>,
    /// Longest answer, in tokens; `None`: the benchmark's own.
    pub max_tokens: Option<u32>,
    /// How that is sent.
    pub limit_field: LimitField,
    /// Seed of the server's sampling.
    pub seed: u64,
}

/// What the benchmark itself says.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Customary {
    pub(crate) temperature: f64,
    pub(crate) max_tokens: u32,
}

/// One answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Written {
    pub(crate) text: String,
    /// Whether it ended because it became too long.
    pub(crate) cut: bool,
    /// Seconds since 1970.
    pub(crate) received: u64,
    /// Names the reply.
    pub(crate) id: String,
}

impl AnswerSettings {
    /// The request for an answer to `messages`.
    pub(crate) fn request(&self, messages: Vec<Message>, customary: Customary) -> ChatRequest {
        ChatRequest {
            model: self.model.clone(),
            messages,
            temperature: self.temperature.unwrap_or(customary.temperature),
            top_p: self.top_p,
            max_tokens: self.max_tokens.unwrap_or(customary.max_tokens),
            limit_field: self.limit_field,
            seed: Some(self.seed),
            logprobs: Logprobs::None,
        }
    }

    /// The answer to `messages`, or why there is none.
    pub(crate) fn ask(
        &self,
        client: &Client<'_>,
        messages: Vec<Message>,
        customary: Customary,
    ) -> Result<Result<Written, String>, JudgeError> {
        let request = self.request(messages, customary);
        Ok(match client.ask(&request, 0)? {
            Answer::Failed(reason) => Err(reason),
            Answer::Reply(reply) => Ok(Written {
                text: reply.content.trim().to_string(),
                cut: reply.finish_reason.as_deref() == Some("length"),
                received: reply.received,
                id: Name::of(&request.body(), 0).to_hex().chars().take(22).collect(),
            }),
        })
    }
}

/// What a user says.
pub(crate) fn user(content: &str) -> Message {
    Message { role: Role::User, content: content.to_string() }
}

/// What the model said.
pub(crate) fn assistant(content: &str) -> Message {
    Message { role: Role::Assistant, content: content.to_string() }
}

/// Answers, each in a row of its benchmark, and what became of those that are not there.
pub(crate) struct Answers<R> {
    pub(crate) rows: Vec<R>,
    /// Why, and how often.
    pub(crate) unanswered: BTreeMap<String, u64>,
    /// How many ended because they became too long.
    pub(crate) cut: u64,
    /// What was asked for them; `None` where they were read.
    pub(crate) calls: Option<Calls>,
}

impl<R> Answers<R> {
    /// Read from a file.
    pub(crate) fn read(rows: Vec<R>) -> Self {
        Self { rows, unanswered: BTreeMap::new(), cut: 0, calls: None }
    }

    /// Asked for; rows are still to be added.
    pub(crate) fn asked(calls: Calls) -> Self {
        Self { calls: Some(calls), ..Self::read(Vec::new()) }
    }

    /// Counts one that is not there.
    pub(crate) fn miss(&mut self, reason: String) {
        *self.unanswered.entry(reason).or_default() += 1;
    }
}

impl AnswerSource {
    /// The answers: by `read` of a file, or by `ask` of `model`, whose replies are kept.
    ///
    /// Errors: nobody to ask, and what either has.
    pub(crate) fn answers<R>(
        &self,
        model: Option<&Endpoint>,
        (replies, patience): (&Replies, Patience),
        context: &RunContext,
        read: impl FnOnce(&Path) -> Result<Answers<R>, JudgeError>,
        ask: impl FnOnce(&AnswerSettings, &Client<'_>) -> Result<Answers<R>, JudgeError>,
    ) -> Result<Answers<R>, JudgeError> {
        match (self, model) {
            (AnswerSource::File(path), _) => read(path),
            (AnswerSource::Endpoint(settings), Some(endpoint)) => {
                ask(settings, &Client::new(endpoint, replies, patience, context))
            }
            (AnswerSource::Endpoint(_), None) => {
                let (expected, found) = ("an endpoint that writes them".into(), "none".into());
                Err(JudgeError::Setting { setting: "answers", expected, found })
            }
        }
    }
}
