//! The files of a model folder that text goes through: `tokenizer_config.json` and the chat template.
//!
//! `chat_template.jinja` wins over the config's `chat_template`, which is a string or a list of named templates (then the
//! one called `default`). Named special tokens are read for the template's use. Nothing else of the config is used.

use super::DataError;
use serde_json::Value;
use std::io::Read;
use std::path::Path;

/// Files beside `tokenizer.json` and the weights that tokenizers and generators use, where they are there.
pub(crate) const COMPANIONS: [&str; 9] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];
/// Largest `tokenizer_config.json` read, in bytes.
const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Largest chat template, in bytes.
pub(super) const MAX_TEMPLATE_BYTES: usize = 256 << 10;
/// The special tokens templates may name.
pub(super) const NAMED_TOKENS: [&str; 4] = ["bos_token", "eos_token", "pad_token", "unk_token"];

const TEMPLATE_FILE: &str = "chat_template.jinja";
const CONFIG_FILE: &str = "tokenizer_config.json";

/// What a model folder says about chats.
#[derive(Debug, Default)]
pub(super) struct ChatSettings {
    /// `bos_token` and so on; absent ones are empty, as they render in Jinja.
    pub named_tokens: Vec<(&'static str, String)>,
    /// The template, if the folder has one.
    pub template: Option<TemplateSource>,
}

/// A template's text and where it stood.
#[derive(Debug)]
pub(super) struct TemplateSource {
    /// The file, and the name in a list of templates.
    pub name: String,
    /// Jinja.
    pub text: String,
}

/// Reads the settings of `folder`. Files that are not there are no error; unreadable ones are.
pub(super) fn chat_settings(folder: &Path) -> Result<ChatSettings, DataError> {
    let path = folder.join(CONFIG_FILE);
    let config = match path.exists() {
        true => {
            serde_json::from_slice(&read_bounded(&path, MAX_CONFIG_BYTES)?).map_err(|e| wrong(&path, "JSON", e.to_string()))?
        }
        false => Value::Null,
    };
    let named_tokens = NAMED_TOKENS.iter().map(|&name| Ok((name, named_token(&path, &config, name)?)));
    Ok(ChatSettings { named_tokens: named_tokens.collect::<Result<_, DataError>>()?, template: template(folder, &config)? })
}

/// A token is written as a string, as an object with `content`, or as null.
fn named_token(path: &Path, config: &Value, name: &str) -> Result<String, DataError> {
    let value = config.get(name).unwrap_or(&Value::Null);
    match value.get("content").unwrap_or(value) {
        Value::String(text) => Ok(text.clone()),
        Value::Null => Ok(String::new()),
        _ => Err(wrong(path, format!("a string, an object with content, or null under {name}"), "another kind of value")),
    }
}

fn template(folder: &Path, config: &Value) -> Result<Option<TemplateSource>, DataError> {
    let path = folder.join(TEMPLATE_FILE);
    if path.exists() {
        let text = String::from_utf8(read_bounded(&path, MAX_TEMPLATE_BYTES as u64)?)
            .map_err(|e| wrong(&path, "UTF-8 text", e.utf8_error().to_string()))?;
        return Ok(Some(TemplateSource { name: TEMPLATE_FILE.into(), text }));
    }
    let path = folder.join(CONFIG_FILE);
    let (name, text) = match config.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => (CONFIG_FILE.to_string(), text),
        Some(Value::Array(named)) => {
            let default = named.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"));
            match default.and_then(|entry| entry.get("template")) {
                Some(Value::String(text)) => (format!("{CONFIG_FILE} (default)"), text),
                _ => return Err(wrong(&path, "a template named default under chat_template", "none")),
            }
        }
        Some(_) => {
            return Err(wrong(&path, "a string or a list of named templates under chat_template", "another kind of value"));
        }
    };
    match text.len() {
        ..=MAX_TEMPLATE_BYTES => Ok(Some(TemplateSource { name, text: text.clone() })),
        found => Err(wrong(&path, format!("a chat_template of at most {MAX_TEMPLATE_BYTES} bytes"), format!("{found}"))),
    }
}

fn wrong(path: &Path, expected: impl Into<String>, found: impl Into<String>) -> DataError {
    DataError::Tokenizer { path: path.to_path_buf(), expected: expected.into(), found: found.into() }
}

/// The whole file, which may hold at most `limit` bytes.
pub(super) fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, DataError> {
    let io = |source| DataError::Io { path: path.to_path_buf(), source };
    let file = std::fs::File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(io)?;
    match bytes.len() as u64 > limit {
        true => Err(DataError::TooLarge { path: path.to_path_buf(), limit, found: limit + 1 }),
        false => Ok(bytes),
    }
}
