//! A byte-level BPE tokenizer of Qwen2's kind, trained on the tiny world's chats, and its ChatML template.
//!
//! Owns `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and the rendered text to train on. Refuses any
//! other template. Every byte is in the alphabet, so nothing is ever unknown; the special tokens are the last ids.

use super::MiniatureError;
use super::chats::Message;
use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainerBuilder;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

/// Special tokens, in the order of their ids at the end of the vocabulary.
pub const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// Smallest size that can be asked for: every byte, and the special tokens.
pub const SMALLEST: usize = 256 + SPECIAL.len();
/// Largest size that can be asked for; the chats hold far fewer merges.
pub const LARGEST: usize = 8192;
/// The system message that ChatML puts before a conversation without one.
const DEFAULT_SYSTEM: &str = "You are a helpful assistant.";
/// A merge must be seen this often.
const FEWEST_SIGHTINGS: u64 = 2;
/// Qwen2's pre-tokenizer pattern: digits one by one, a word with the one blank before it, punctuation, line ends, blanks.
const PATTERN: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// ChatML as the Qwen1.5 chat models' folders state it.
pub const CHAT_TEMPLATE: &str = concat!(
    "{% for message in messages %}",
    "{% if loop.first and messages[0]['role'] != 'system' %}",
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}",
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}",
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
);

/// The trained tokenizer.
pub struct MiniatureTokenizer {
    tokenizer: Tokenizer,
    special: [u32; 3],
}

/// Trains a tokenizer of at most `size` ids (special ones included) on `texts`.
///
/// The result does not depend on the number of threads: merges are chosen by count, ties by the smaller pair of ids.
pub fn train(texts: &[String], size: usize) -> Result<MiniatureTokenizer, MiniatureError> {
    let wrong = |what| move |source| MiniatureError::Tokenizer { what, source };
    let mut tokenizer = Tokenizer::from_bytes(scaffold().to_string()).map_err(wrong("setting up"))?;
    let trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(size.saturating_sub(SPECIAL.len()))
        .min_frequency(FEWEST_SIGHTINGS)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let pieces = texts.iter().flat_map(|text| pieces(text));
    tokenizer.train(&mut TrainerWrapper::from(trainer), pieces).map_err(wrong("training"))?;
    let first = tokenizer.get_vocab_size(true) as u32;
    tokenizer.add_special_tokens(SPECIAL.map(|token| AddedToken::from(token, true))).map_err(wrong("adding special tokens"))?;
    Ok(MiniatureTokenizer { tokenizer, special: [first, first + 1, first + 2] })
}

impl MiniatureTokenizer {
    /// Number of ids, special ones included.
    pub fn size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Ids of [`SPECIAL`], in that order.
    pub fn special(&self) -> [u32; 3] {
        self.special
    }

    /// Ids of each rendered text, cut on the right after `longest`.
    pub fn encode_all(&self, texts: &[String], longest: usize) -> Result<Vec<Vec<u32>>, MiniatureError> {
        texts
            .iter()
            .map(|text| {
                let encoding = self
                    .tokenizer
                    .encode_fast(text.as_str(), false)
                    .map_err(|source| MiniatureError::Tokenizer { what: "encoding", source })?;
                let ids = encoding.get_ids();
                Ok(ids[..ids.len().min(longest)].to_vec())
            })
            .collect()
    }

    /// The files a model folder holds beside its weights: (name, content). `context` is the longest input in tokens.
    pub fn files(&self, context: usize) -> Result<[(&'static str, String); 3], MiniatureError> {
        let tokenizer = self
            .tokenizer
            .to_string(true)
            .map_err(|source| MiniatureError::Tokenizer { what: "writing tokenizer.json", source })?;
        Ok([
            ("tokenizer.json", tokenizer + "\n"),
            ("tokenizer_config.json", pretty("tokenizer_config.json", &self.config(context))?),
            ("generation_config.json", pretty("generation_config.json", &self.generation())?),
        ])
    }

    fn config(&self, context: usize) -> Value {
        let entries = SPECIAL.iter().zip(self.special).map(|(content, id)| {
            let token = json!({
                "content": content, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": true,
            });
            (id.to_string(), token)
        });
        json!({
            "add_prefix_space": false,
            "added_tokens_decoder": serde_json::Map::from_iter(entries),
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": null,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": false,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": context,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": false,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": null,
        })
    }

    fn generation(&self) -> Value {
        let [end_of_text, _, im_end] = self.special;
        json!({
            "bos_token_id": end_of_text,
            "do_sample": true,
            "eos_token_id": [im_end, end_of_text],
            "pad_token_id": end_of_text,
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
        })
    }
}

/// The text of a conversation by [`CHAT_TEMPLATE`], without a generation prompt.
pub fn render(messages: &[Message]) -> String {
    let mut text = String::new();
    let mut say = |role: &str, content: &str| text.push_str(&format!("<|im_start|>{role}\n{content}<|im_end|>\n"));
    if messages.first().is_some_and(|message| message.role != "system") {
        say("system", DEFAULT_SYSTEM);
    }
    for message in messages {
        say(message.role, &message.content);
    }
    text
}

/// The text between its ChatML markers: what the pre-tokenizer sees, so that no merge spans or is spent on a marker.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    text.split("<|im_start|>").flat_map(|piece| piece.split("<|im_end|>")).filter(|piece| !piece.is_empty())
}

/// `tokenizer.json` before training.
fn scaffold() -> Value {
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    let pattern = json!({"Regex": PATTERN});
    let split = json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": {}, "merges": [],
        },
    })
}

/// A JSON document, indented, with a last newline.
pub fn pretty(what: &'static str, value: &Value) -> Result<String, MiniatureError> {
    serde_json::to_string_pretty(value).map(|text| text + "\n").map_err(|source| MiniatureError::Json { what, source })
}
