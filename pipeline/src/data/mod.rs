//! Chats → conversations → examples. Pure CPU; no tensor type.
//!
//! Files become rows (`source`, `rows`), rows become [`Message`]s (`schema`), a [`ChatTokenizer`] renders them with the
//! model's own template (`template`) and encodes the text as a whole, marking what the assistant says (`spans`), and
//! [`load`] does it for a whole dataset, in parallel and in order (`dataset`). Every byte here comes from outside, so
//! everything is bounded and checked; the one idea is that the rendered *text* is the truth, and ids and mask follow from it.

mod chat_tokenizer;
mod dataset;
mod encoding;
mod error;
mod fingerprint;
mod guard;
mod json_rows;
mod model_folder;
pub mod pack;
mod parquet_rows;
mod rows;
mod schema;
mod skip;
mod source;
mod spans;
mod template;
mod token_text;
mod tokenizer_json;

pub use chat_tokenizer::ChatTokenizer;
pub use dataset::{DataOptions, Dataset, load};
pub use error::DataError;
pub use guard::guarded;
pub(crate) use model_folder::COMPANIONS;
pub(crate) use source::holds_chats;
pub use token_text::show_bytes;
pub(crate) use tokenizer_json::MAX_TOKENIZER_BYTES;

use serde::{Deserialize, Serialize};

/// What happens to a conversation longer than the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Truncation {
    /// Whole trailing turns are dropped; when not even the first exchange fits, it is cut on the right.
    #[default]
    Turns,
    /// Tokens beyond the limit are cut on the right.
    Right,
}

/// What happens to a conversation with roles that cannot be trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum BadRoles {
    /// It is skipped and counted.
    #[default]
    Skip,
    /// The run stops with an error naming the place.
    Error,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Instructions that come before the conversation.
    System,
    /// The person.
    User,
    /// The model; what it says is scored.
    Assistant,
}

impl Role {
    /// The name templates know it by.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        }
    }
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said, as it stands in the data: nothing is trimmed.
    pub content: String,
}

/// What a rendering ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prompt {
    /// The last message.
    None,
    /// The header after which the assistant is to speak (`add_generation_prompt`).
    Generation,
}

/// One tokenised conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Number of the conversation in the data (0-based, skipped rows counted).
    pub seq_id: u64,
    /// Tokens of the whole rendered text.
    pub input_ids: Vec<u32>,
    /// For each token, whether it carries a character of an assistant message or of the end marker after it.
    pub scored: Vec<bool>,
}
