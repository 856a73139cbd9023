//! Conversations of the tiny world, and the JSONL they are stored as.
//!
//! Owns how exchanges become a conversation and a line of ultrachat_200k's schema: `prompt`, `prompt_id`, `messages`.
//! Refuses the words themselves (the grammar's) and every other schema.

use super::MiniatureError;
use super::dice::Dice;
use super::grammar::{self, Manner};
use serde::Serialize;
use std::collections::HashSet;

/// Fewest topics of a conversation.
const FEWEST_TOPICS: usize = 1;
/// Most topics of a conversation.
const MOST_TOPICS: usize = 3;
/// Of 100 conversations, how many open with the system message that asks for brevity.
const BRIEF_PERCENT: usize = 20;
/// Of 100 conversations, how many end with thanks.
const FAREWELL_PERCENT: usize = 25;
/// The system message that asks for brevity.
const BRIEF_SYSTEM: &str = "Answer in one word.";
/// Draws in search of a conversation that was not there yet; after that a repetition is accepted.
const FRESH_DRAWS: usize = 64;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Message {
    /// What is said.
    pub content: String,
    /// `system`, `user` or `assistant`.
    pub role: &'static str,
}

/// One line of `chats.jsonl`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Conversation {
    /// The first user message.
    pub prompt: String,
    /// 64 hexadecimal digits: BLAKE3 of the messages' roles and contents, so that every conversation has its own.
    pub prompt_id: String,
    /// All messages; user and assistant take turns after an optional system message, and the assistant speaks last.
    pub messages: Vec<Message>,
}

/// Writes `count` conversations, distinct as long as the grammar yields new ones.
pub fn write_conversations(count: usize, dice: &mut Dice) -> Vec<Conversation> {
    let mut seen = HashSet::new();
    let mut conversations = Vec::with_capacity(count);
    while conversations.len() < count {
        let mut conversation = write_conversation(dice);
        for _ in 0..FRESH_DRAWS {
            if !seen.contains(&conversation.prompt_id) {
                break;
            }
            conversation = write_conversation(dice);
        }
        seen.insert(conversation.prompt_id.clone());
        conversations.push(conversation);
    }
    conversations
}

/// Of 100 answers, `percent` become another conversation's: fluent, and wrong. What is asked stays. The conversations get the identity of
/// their new words.
pub fn spoil(conversations: &mut [Conversation], percent: usize, dice: &mut Dice) {
    let answers: Vec<String> =
        conversations.iter().flat_map(|c| &c.messages).filter(|m| m.role == "assistant").map(|m| m.content.clone()).collect();
    for conversation in conversations {
        for message in conversation.messages.iter_mut().filter(|m| m.role == "assistant") {
            if dice.chance(percent) {
                message.content.clone_from(&answers[dice.below(answers.len())]);
            }
        }
        conversation.prompt_id = identity(&conversation.messages);
    }
}

/// One JSON object a line, each line ended.
pub fn to_jsonl(conversations: &[Conversation]) -> Result<String, MiniatureError> {
    let mut text = String::new();
    for conversation in conversations {
        let line = serde_json::to_string(conversation).map_err(|source| MiniatureError::Json { what: "chats.jsonl", source })?;
        text.push_str(&line);
        text.push('\n');
    }
    Ok(text)
}

fn write_conversation(dice: &mut Dice) -> Conversation {
    let manner = if dice.chance(BRIEF_PERCENT) { Manner::Brief } else { Manner::Sentences };
    let topics = FEWEST_TOPICS + dice.below(MOST_TOPICS - FEWEST_TOPICS + 1);
    let mut exchanges: Vec<_> = (0..topics).flat_map(|_| grammar::exchanges(manner, dice)).collect();
    if dice.chance(FAREWELL_PERCENT) {
        exchanges.push(grammar::farewell(dice));
    }

    let prompt = exchanges.first().map(|exchange| exchange.question.clone()).unwrap_or_default();
    let mut messages = Vec::with_capacity(2 * exchanges.len() + 1);
    if manner == Manner::Brief {
        messages.push(Message { content: BRIEF_SYSTEM.into(), role: "system" });
    }
    for exchange in exchanges {
        messages.push(Message { content: exchange.question, role: "user" });
        messages.push(Message { content: exchange.answer, role: "assistant" });
    }
    Conversation { prompt, prompt_id: identity(&messages), messages }
}

fn identity(messages: &[Message]) -> String {
    let mut hasher = blake3::Hasher::new();
    for message in messages {
        // A zero byte ends each part: none occurs in the text, so two lists of messages never read alike.
        hasher.update(message.role.as_bytes()).update(&[0]).update(message.content.as_bytes()).update(&[0]);
    }
    hasher.finalize().to_hex().to_string()
}
