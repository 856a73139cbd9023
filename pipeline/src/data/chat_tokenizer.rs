//! One model folder's way from messages to tokens and back: tokenizer and chat template together.

use super::guard::guard;
use super::model_folder::{self, ChatSettings};
use super::spans::{self, EndMarkers, Marked};
use super::template::ChatTemplate;
use super::token_text::Spelling;
use super::tokenizer_json::{self, TokenEntry};
use super::{DataError, Example, Message, Prompt, Role, encoding, fingerprint};
use potstill_cache::{TemplateFingerprint, TokenizerFingerprint};
use serde_json::Value;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

/// Ids of a text, and each token's byte offsets in it.
type EncodedText = (Vec<u32>, Vec<(usize, usize)>);

/// Tokenizer and chat template of one model folder. Shared freely between threads.
pub struct ChatTokenizer {
    folder: PathBuf,
    tokenizer: Tokenizer,
    table: HashMap<u32, TokenEntry>,
    spelling: Spelling,
    fingerprint: TokenizerFingerprint,
    template: Option<ChatTemplate>,
    markers: EndMarkers,
}

impl ChatTokenizer {
    /// Reads `tokenizer.json` and the chat template of `folder`: `chat_template.jinja`, else `chat_template` in
    /// `tokenizer_config.json` (a string, or the one called `default` of a list of named templates).
    ///
    /// Errors: a file missing, too large or malformed; no template; a template that does not compile.
    pub fn from_folder(folder: &Path) -> Result<Self, DataError> {
        let mut this = Self::tokenizer_only(folder)?;
        let settings = model_folder::chat_settings(folder)?;
        let source = settings.template.as_ref().ok_or_else(|| no_template(folder))?;
        this.template = Some(ChatTemplate::new(source, &settings)?);
        this.markers = end_markers(&this.table, &settings);
        Ok(this)
    }

    /// Reads `tokenizer.json` alone; [`render`](Self::render) and [`encode`](Self::encode) then say that there is no template.
    pub fn tokenizer_only(folder: &Path) -> Result<Self, DataError> {
        let checked = tokenizer_json::load(&folder.join("tokenizer.json"))?;
        let fingerprint = fingerprint::of(&checked);
        let spelling = Spelling::of(checked.document.get("decoder").unwrap_or(&Value::Null));
        Ok(Self {
            folder: folder.to_path_buf(),
            tokenizer: checked.tokenizer,
            table: checked.table,
            spelling,
            fingerprint,
            template: None,
            markers: EndMarkers::default(),
        })
    }

    /// The tokenizer's identity; `size` is the highest id + 1.
    pub fn tokenizer_fingerprint(&self) -> &TokenizerFingerprint {
        &self.fingerprint
    }

    /// The template's identity, if it was read.
    pub fn template_fingerprint(&self) -> Option<&TemplateFingerprint> {
        self.template.as_ref().map(ChatTemplate::fingerprint)
    }

    /// The text of `messages`.
    ///
    /// Errors: no template, a template that fails, refuses the conversation, or goes beyond its limits.
    pub fn render(&self, messages: &[Message], prompt: Prompt) -> Result<String, DataError> {
        self.chat_template()?.render(messages, prompt)
    }

    /// The tokens of `messages`, whole, with the scored mask: tokens that carry a byte of an assistant message or of the end
    /// marker after it.
    ///
    /// Errors: those of [`render`](Self::render), a template that changes what the assistant says, a text that cannot be encoded.
    pub fn encode(&self, seq_id: u64, messages: &[Message]) -> Result<Example, DataError> {
        let encoded = encoding::encode(self, messages)?;
        Ok(Example { seq_id, input_ids: encoded.ids, scored: encoded.scored })
    }

    /// The tokens of `messages` followed by the header after which the assistant is to speak ([`Prompt::Generation`]).
    ///
    /// Errors: those of [`render`](Self::render), a text that cannot be encoded.
    pub fn encode_prompt(&self, messages: &[Message]) -> Result<Vec<u32>, DataError> {
        Ok(self.encode_text(&self.render(messages, Prompt::Generation)?)?.0)
    }

    /// One token as readable text: bytes as text, those of a partial character as `<0xE4>`, special tokens as they are, an id
    /// that no token has as `<id 123>`.
    pub fn token_text(&self, id: u32) -> String {
        match self.table.get(&id) {
            Some(entry) => self.spelling.text(entry),
            None => format!("<id {id}>"),
        }
    }

    /// One token's bytes, which may begin or end within a character. The bytes of a conversation's tokens, one after another, are its
    /// text. An id that no token has is spelled `<id 123>`.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match self.table.get(&id) {
            Some(entry) => self.spelling.bytes(entry),
            None => format!("<id {id}>").into_bytes(),
        }
    }

    /// The text of `ids`, special tokens included; ids that no token has are shown as [`token_text`](Self::token_text) does.
    pub fn decode(&self, ids: &[u32]) -> String {
        let known = ids.iter().all(|id| self.table.contains_key(id));
        let decoded = if known { guard(|| self.tokenizer.decode(ids, false)).ok().and_then(Result::ok) } else { None };
        decoded.unwrap_or_else(|| ids.iter().map(|&id| self.token_text(id)).collect())
    }

    /// The text of `ids` without special tokens, as an answer is read. Ids that no token has are left out too.
    pub fn decode_text(&self, ids: &[u32]) -> String {
        let plain = |id: &u32| self.table.get(id).is_some_and(|entry| !entry.special);
        let ids: Vec<u32> = ids.iter().copied().filter(plain).collect();
        let decoded = guard(|| self.tokenizer.decode(&ids, true)).ok().and_then(Result::ok);
        decoded.unwrap_or_else(|| ids.iter().map(|&id| self.token_text(id)).collect())
    }

    /// The token that the template puts after what the assistant says, if it is a token of its own: where an answer ends, whatever the
    /// model's configuration says. Errors: as [`encode`](Self::encode).
    pub fn end_of_answer(&self) -> Result<Option<u32>, DataError> {
        let message = |role, content: &str| Message { role, content: content.into() };
        let example = self.encode(0, &[message(Role::User, "a"), message(Role::Assistant, "b")])?;
        let last = example.input_ids.iter().zip(&example.scored).filter(|(_, scored)| **scored).map(|(id, _)| *id).next_back();
        Ok(last.filter(|id| self.table.get(id).is_some_and(|entry| entry.special || entry.added)))
    }

    /// The rendered text and the assistant's spans in it.
    pub(super) fn marked(&self, messages: &[Message]) -> Result<Marked, DataError> {
        spans::render(self.chat_template()?, messages, &self.markers)
    }

    /// Ids of `text` and each token's byte offsets in it; nothing is added.
    pub(super) fn encode_text(&self, text: &str) -> Result<EncodedText, DataError> {
        match guard(|| self.tokenizer.encode(text, false)) {
            Ok(Ok(encoding)) => Ok((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec())),
            Ok(Err(e)) => Err(DataError::Encode { found: e.to_string() }),
            Err(panic) => Err(DataError::Encode { found: panic }),
        }
    }

    fn chat_template(&self) -> Result<&ChatTemplate, DataError> {
        self.template.as_ref().ok_or_else(|| no_template(&self.folder))
    }
}

impl std::fmt::Debug for ChatTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTokenizer")
            .field("folder", &self.folder)
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

fn end_markers(table: &HashMap<u32, TokenEntry>, settings: &ChatSettings) -> EndMarkers {
    let eos = settings.named_tokens.iter().find(|(name, _)| *name == "eos_token").map(|(_, token)| token.clone());
    let eos = eos.unwrap_or_default();
    let ends = |entry: &&TokenEntry| entry.special || (entry.added && entry.text == eos);
    let mut special: Vec<String> = table.values().filter(ends).map(|entry| entry.text.clone()).collect();
    special.sort_unstable_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
    EndMarkers { special, eos }
}

fn no_template(folder: &Path) -> DataError {
    DataError::NoTemplate { folder: folder.to_path_buf(), found: "none".to_string() }
}
