//! Rows of the four known schemas as messages.
//!
//! | key of the row | schema | a message |
//! | --- | --- | --- |
//! | `messages` | OpenAI, ultrachat_200k | `{role, content}` |
//! | `conversations` | ShareGPT | `{from, value}`; human or user, gpt or assistant, system |
//! | `conversation` | Firefly | `{human, assistant}`: a user and an assistant message |
//! | `instruction`, `output` | Alpaca | `input` on the next line of the instruction; `history` of pairs before it |
//!
//! The first key of this table that is there and not null decides, row by row. A `system` text beside the last three comes
//! first; an empty one counts as none. Texts are taken as they are: nothing is trimmed and no system message is invented.
//!
//! What can be trained on: an optional system message first, then user and assistant in turns. A conversation may begin with
//! the assistant (a greeting: its text and what it depends on are well defined) and may end with the user. Two of one kind in
//! a row, or a system message that is not the first, are out of order.

use super::skip::Skip;
use super::{Message, Role};
use serde_json::{Map, Value};

/// Why a row gives no conversation.
#[derive(Debug, PartialEq)]
pub(super) enum Fault {
    /// It is built otherwise.
    Schema { expected: String, found: String },
    /// A role nobody knows.
    UnknownRole { expected: &'static str, found: String, index: usize },
    /// A known role in the wrong place.
    RoleOrder { expected: &'static str, found: &'static str, index: usize },
    /// Well formed, but nothing to learn from.
    Skip(Skip),
}

const ROLES: &str = "system, user, assistant";
const SHAREGPT_ROLES: &str = "system, human, user, gpt, assistant";
const SCHEMAS: &str = "a row with messages, conversations, conversation, or instruction and output";

/// Columns worth reading; the others are left on disk.
pub(super) const COLUMNS: [&str; 8] =
    ["messages", "conversations", "conversation", "instruction", "input", "output", "history", "system"];

/// The conversation in `row`.
pub(super) fn conversation(row: &Value) -> Result<Vec<Message>, Fault> {
    let row = row.as_object().ok_or_else(|| schema("a JSON object", kind(row)))?;
    if let Some(list) = present(row, "messages") {
        checked(spoken("messages", items("messages", list)?, Vec::new())?)
    } else if let Some(list) = present(row, "conversations") {
        checked(spoken("conversations", items("conversations", list)?, system(row)?)?)
    } else if let Some(list) = present(row, "conversation") {
        checked(firefly(items("conversation", list)?, system(row)?)?)
    } else if present(row, "instruction").is_some() && present(row, "output").is_some() {
        checked(alpaca(row, system(row)?)?)
    } else {
        let keys: Vec<&str> = row.keys().map(String::as_str).take(8).collect();
        let found = if keys.is_empty() { "no keys".to_string() } else { format!("the keys {}", keys.join(", ")) };
        Err(schema(SCHEMAS, super::tokenizer_json::shorten(&found)))
    }
}

/// Messages with a role and a text each.
fn spoken(name: &str, list: &[Value], mut messages: Vec<Message>) -> Result<Vec<Message>, Fault> {
    // A row with an unknown role is judged by that, whatever its contents look like (tool calls often have none).
    let roles: Vec<Role> = list.iter().enumerate().map(|(i, item)| role(name, i, item)).collect::<Result<_, _>>()?;
    for (i, (item, role)) in list.iter().zip(roles).enumerate() {
        let key = if item.get("role").is_some() { "content" } else { "value" };
        match item.get(key) {
            Some(Value::String(text)) => messages.push(Message { role, content: text.clone() }),
            Some(Value::Null) => return Err(Fault::Skip(Skip::EmptyText)),
            other => return Err(schema(format!("a string in {name}[{i}].{key}"), other.map_or("none", kind))),
        }
    }
    Ok(messages)
}

/// The role of one `{role, content}` or `{from, value}`.
fn role(name: &str, index: usize, item: &Value) -> Result<Role, Fault> {
    let Some((key, value)) = ["role", "from"].into_iter().find_map(|key| Some((key, item.get(key)?))) else {
        return Err(schema(format!("role and content, or from and value, in {name}[{index}]"), shape(item)));
    };
    let value = value.as_str().ok_or_else(|| schema(format!("a string in {name}[{index}].{key}"), kind(value)))?;
    if item.get("tool_calls").is_some_and(|calls| calls.as_array().is_some_and(|calls| !calls.is_empty())) {
        return Err(Fault::Skip(Skip::ToolCalls));
    }
    match (key, value) {
        (_, "system") => Ok(Role::System),
        (_, "user") | ("from", "human") => Ok(Role::User),
        (_, "assistant") | ("from", "gpt") => Ok(Role::Assistant),
        _ => {
            let expected = if key == "from" { SHAREGPT_ROLES } else { ROLES };
            Err(Fault::UnknownRole { expected, found: super::tokenizer_json::shorten(value), index })
        }
    }
}

fn firefly(pairs: &[Value], mut messages: Vec<Message>) -> Result<Vec<Message>, Fault> {
    for (i, pair) in pairs.iter().enumerate() {
        for (key, role) in [("human", Role::User), ("assistant", Role::Assistant)] {
            let Some(text) = pair.get(key).and_then(Value::as_str) else {
                return Err(schema(format!("strings under human and assistant in conversation[{i}]"), shape(pair)));
            };
            messages.push(Message { role, content: text.to_string() });
        }
    }
    Ok(messages)
}

fn alpaca(row: &Map<String, Value>, mut messages: Vec<Message>) -> Result<Vec<Message>, Fault> {
    let history = present(row, "history").map_or(Ok(&[][..]), |list| items("history", list))?;
    for (i, pair) in history.iter().enumerate() {
        let texts = pair.as_array().map(Vec::as_slice).unwrap_or_default();
        let [Value::String(user), Value::String(assistant)] = texts else {
            return Err(schema(format!("a pair of strings in history[{i}]"), kind(pair)));
        };
        messages.push(Message { role: Role::User, content: user.clone() });
        messages.push(Message { role: Role::Assistant, content: assistant.clone() });
    }
    let (instruction, input) = (text(row, "instruction")?, text(row, "input")?);
    let content = if input.is_empty() { instruction.to_string() } else { format!("{instruction}\n{input}") };
    messages.push(Message { role: Role::User, content });
    messages.push(Message { role: Role::Assistant, content: text(row, "output")?.to_string() });
    Ok(messages)
}

/// The roles are in an order that can be trained on, and the assistant speaks.
fn checked(messages: Vec<Message>) -> Result<Vec<Message>, Fault> {
    if messages.is_empty() {
        return Err(Fault::Skip(Skip::NoMessages));
    }
    let mut before: Option<Role> = None;
    for (index, message) in messages.iter().enumerate() {
        let expected = match (before, message.role) {
            (None, _) | (Some(Role::System), Role::User | Role::Assistant) => None,
            (Some(Role::User), Role::Assistant) | (Some(Role::Assistant), Role::User) => None,
            (Some(Role::User), _) => Some("an assistant message after a user message"),
            (Some(Role::Assistant), _) => Some("a user message after an assistant message"),
            (Some(Role::System), Role::System) => Some("a user message after the system message"),
        };
        if let Some(expected) = expected {
            return Err(Fault::RoleOrder { expected, found: message.role.as_str(), index });
        }
        before = Some(message.role);
    }
    match messages.iter().any(|message| message.role == Role::Assistant) {
        true => Ok(messages),
        false => Err(Fault::Skip(Skip::NoAssistant)),
    }
}

fn system(row: &Map<String, Value>) -> Result<Vec<Message>, Fault> {
    let content = text(row, "system")?;
    let message = Message { role: Role::System, content: content.to_string() };
    Ok(if content.is_empty() { Vec::new() } else { vec![message] })
}

/// The string under `key`; none and null are empty.
fn text<'a>(row: &'a Map<String, Value>, key: &str) -> Result<&'a str, Fault> {
    match present(row, key) {
        None => Ok(""),
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(schema(format!("a string under {key}"), kind(other))),
    }
}

fn present<'a>(row: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    row.get(key).filter(|value| !value.is_null())
}

fn items<'a>(name: &str, value: &'a Value) -> Result<&'a [Value], Fault> {
    value.as_array().map(Vec::as_slice).ok_or_else(|| schema(format!("a list under {name}"), kind(value)))
}

/// An object by its keys, anything else by its kind.
fn shape(value: &Value) -> String {
    match value.as_object() {
        Some(fields) => {
            let keys: Vec<&str> = fields.keys().map(String::as_str).take(8).collect();
            super::tokenizer_json::shorten(&format!("an object with the keys {}", keys.join(", ")))
        }
        None => kind(value).to_string(),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn schema(expected: impl Into<String>, found: impl Into<String>) -> Fault {
    Fault::Schema { expected: expected.into(), found: found.into() }
}
