//! One request to `/chat/completions` and what is kept of its reply: the schema of OpenAI's API, as far as a judge needs it. Refuses
//! replies that do not say what was asked for.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// Most likely tokens asked for; AlpacaEval's number.
const TOP_LOGPROBS: u32 = 5;
/// A log-probability above this is none. Servers round, so 0 is exceeded by a little.
const HIGHEST_LOGPROB: f64 = 1e-3;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions.
    System,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said.
    pub content: String,
}

/// Under which name the limit of a reply's length is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitField {
    /// What every server knows.
    #[default]
    MaxTokens,
    /// What OpenAI's newer models insist on.
    MaxCompletionTokens,
}

/// Whether a reply is to come with the log-probabilities of its first token's alternatives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logprobs {
    /// The five most likely.
    Top,
    /// None.
    None,
}

/// A request. What is not here is the server's default.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRequest {
    /// The model, by the server's name.
    pub model: String,
    /// The conversation, the last message the user's.
    pub messages: Vec<Message>,
    /// Sampling temperature.
    pub temperature: f64,
    /// Nucleus; `None` sends nothing.
    pub top_p: Option<f64>,
    /// Longest reply, in tokens.
    pub max_tokens: u32,
    /// How that is sent.
    pub limit_field: LimitField,
    /// Seed of the server's sampling; `None` sends nothing.
    pub seed: Option<u64>,
    /// Whether log-probabilities are asked for.
    pub logprobs: Logprobs,
}

impl ChatRequest {
    /// The body, with its fields always in this order: equal requests have equal bytes.
    pub fn body(&self) -> Value {
        let mut body = Map::new();
        body.insert("model".into(), json!(self.model));
        body.insert("messages".into(), json!(self.messages));
        body.insert("temperature".into(), json!(self.temperature));
        if let Some(top_p) = self.top_p {
            body.insert("top_p".into(), json!(top_p));
        }
        let limit = match self.limit_field {
            LimitField::MaxTokens => "max_tokens",
            LimitField::MaxCompletionTokens => "max_completion_tokens",
        };
        body.insert(limit.into(), json!(self.max_tokens));
        body.insert("n".into(), json!(1));
        if let Some(seed) = self.seed {
            body.insert("seed".into(), json!(seed));
        }
        if self.logprobs == Logprobs::Top {
            body.insert("logprobs".into(), json!(true));
            body.insert("top_logprobs".into(), json!(TOP_LOGPROBS));
        }
        Value::Object(body)
    }

    /// Characters (code points) of all messages.
    pub fn characters(&self) -> u64 {
        self.messages.iter().map(|m| m.content.chars().count() as u64).sum()
    }
}

/// An alternative of a reply's first token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// Its text.
    pub token: String,
    /// Its natural log-probability.
    pub logprob: f64,
}

/// Tokens that were paid for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Of the request.
    #[serde(default)]
    pub prompt_tokens: u64,
    /// Of the reply.
    #[serde(default)]
    pub completion_tokens: u64,
}

/// What is kept of a reply.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The text; empty where the model said nothing.
    pub content: String,
    /// Why it ended: `stop`, `length`, …
    pub finish_reason: Option<String>,
    /// The model, by the name that the server gave it in the reply.
    pub model: Option<String>,
    /// The server's word for its own configuration.
    pub system_fingerprint: Option<String>,
    /// What was paid for.
    pub usage: Option<Usage>,
    /// The most likely first tokens; `None` where the server gave none.
    pub top_logprobs: Option<Vec<TokenLogprob>>,
    /// When it came, in seconds since 1970.
    pub received: u64,
}

impl Reply {
    /// Reads the body of an answer. `received`: seconds since 1970. Errors: what was expected, and what was found.
    pub fn read(bytes: &[u8], received: u64, hide: impl Fn(&str) -> String) -> Result<Self, (&'static str, String)> {
        let expected = "a JSON object with choices[0].message.content";
        let value: Value = serde_json::from_slice(bytes).map_err(|e| (expected, e.to_string()))?;
        let choice = value.pointer("/choices/0").ok_or((expected, "no choices".to_string()))?;
        let content = match choice.pointer("/message/content") {
            Some(Value::String(text)) => text.as_str(),
            // A model that said nothing, or only called a tool.
            Some(Value::Null) => "",
            _ => return Err((expected, "none".into())),
        };
        let text = |value: Option<&Value>| value.and_then(Value::as_str).map(&hide);
        let usage = value.get("usage").filter(|u| u.is_object()).map(|u| serde_json::from_value(u.clone()));
        Ok(Self {
            content: hide(content),
            finish_reason: text(choice.get("finish_reason")),
            model: text(value.get("model")),
            system_fingerprint: text(value.get("system_fingerprint")),
            usage: usage.and_then(Result::ok),
            top_logprobs: top(choice)?.map(|all| all.into_iter().map(|t| TokenLogprob { token: hide(&t.token), ..t }).collect()),
            received,
        })
    }
}

/// The alternatives of the first token, if there are any.
fn top(choice: &Value) -> Result<Option<Vec<TokenLogprob>>, (&'static str, String)> {
    let expected = "tokens with log-probabilities of at most 0 in logprobs.content[0].top_logprobs";
    let Some(list) = choice.pointer("/logprobs/content/0/top_logprobs").filter(|v| !v.is_null()) else { return Ok(None) };
    let all: Vec<TokenLogprob> = serde_json::from_value(list.clone()).map_err(|e| (expected, e.to_string()))?;
    match all.iter().find(|t| !t.logprob.is_finite() || t.logprob > HIGHEST_LOGPROB) {
        Some(t) => Err((expected, t.logprob.to_string())),
        None => Ok(Some(all).filter(|all| !all.is_empty())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn read(text: &str) -> Result<Reply, (&'static str, String)> {
        Reply::read(text.as_bytes(), 7, str::to_string)
    }

    #[test]
    fn a_body_says_what_was_asked_and_nothing_else() {
        let message = Message { role: Role::User, content: "é?".into() };
        let mut request = ChatRequest {
            model: "m".into(),
            messages: vec![message],
            temperature: 0.0,
            top_p: None,
            max_tokens: 1,
            limit_field: LimitField::MaxTokens,
            seed: None,
            logprobs: Logprobs::Top,
        };
        let expected = r#"{"model":"m","messages":[{"role":"user","content":"é?"}],"temperature":0.0,"max_tokens":1,"n":1,"logprobs":true,"top_logprobs":5}"#;
        assert_eq!(request.body().to_string(), expected);
        (request.top_p, request.seed, request.logprobs) = (Some(0.8), Some(3), Logprobs::None);
        request.limit_field = LimitField::MaxCompletionTokens;
        let expected = r#"{"model":"m","messages":[{"role":"user","content":"é?"}],"temperature":0.0,"top_p":0.8,"max_completion_tokens":1,"n":1,"seed":3}"#;
        assert_eq!((request.body().to_string().as_str(), request.characters()), (expected, 2));
    }

    #[test]
    fn replies_with_and_without_log_probabilities() {
        let full = read(
            r#"{"model":"j-1","system_fingerprint":"fp","usage":{"prompt_tokens":9,"completion_tokens":1,"more":{}},"choices":[{"message":
            {"role":"assistant","content":"m"},"finish_reason":"length","logprobs":{"content":[{"token":"m","logprob":-0.1,
            "bytes":[109],"top_logprobs":[{"token":"m","logprob":-0.1,"bytes":[109]},{"token":"M","logprob":-2.4}]}]}}]}"#,
        )
        .unwrap();
        assert_eq!((full.content.as_str(), full.model.as_deref(), full.received), ("m", Some("j-1"), 7));
        assert_eq!(full.usage, Some(Usage { prompt_tokens: 9, completion_tokens: 1 }));
        assert_eq!(full.top_logprobs.unwrap()[1], TokenLogprob { token: "M".into(), logprob: -2.4 });
        for bare in ["null", "{}", r#"{"content":null}"#, r#"{"content":[]}"#, r#"{"content":[{"top_logprobs":[]}]}"#] {
            let reply = read(&format!(r#"{{"choices":[{{"message":{{"content":null}},"logprobs":{bare}}}]}}"#)).unwrap();
            assert_eq!((reply.content.as_str(), reply.top_logprobs), ("", None), "{bare}");
        }
    }

    #[test]
    fn what_is_no_reply_is_refused() {
        let logprob = |x: &str| {
            format!(
                r#"{{"choices":[{{"message":{{"content":"m"}},"logprobs":{{"content":[{{"top_logprobs":[{{"token":"m","logprob":{x}}}]}}]}}}}]}}"#
            )
        };
        let deep = "[".repeat(100_000);
        for wrong in
            ["", "<html>", "{}", r#"{"choices":[]}"#, r#"{"choices":[{}]}"#, r#"{"choices":[{"message":{"content":3}}]}"#, &deep]
        {
            assert!(read(wrong).is_err(), "{wrong:.80}");
        }
        for wrong in ["1e400", "\"x\"", "0.5", "null"] {
            assert!(read(&logprob(wrong)).is_err(), "{wrong}");
        }
        assert!(read(&logprob("-9999.0")).is_ok() && read(&logprob("1e-7")).is_ok());
    }
}
