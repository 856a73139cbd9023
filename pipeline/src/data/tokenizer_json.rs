//! `tokenizer.json` before and while it is believed.
//!
//! The library that reads it panics or aborts on some hostile files, so the JSON is parsed and checked here first: size,
//! component types, ids, merges. What this program never uses (padding, truncation, post-processor, dropout) is dropped.
//! It refuses models other than BPE and word lists. The one idea: the library only ever sees a document already understood.

use super::DataError;
use super::guard::guard;
use super::model_folder::read_bounded;
use serde_json::{Map, Value};
use std::collections::{HashMap, HashSet};
use std::path::Path;
use tokenizers::Tokenizer;

/// Largest `tokenizer.json` read, in bytes.
pub(crate) const MAX_TOKENIZER_BYTES: u64 = 64 << 20;
/// Ids are below this.
pub(super) const MAX_TOKEN_ID: u64 = 1 << 24;

const MODELS: &[&str] = &["BPE", "WordLevel"];
const NORMALIZERS: &[&str] = &[
    "Sequence",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Lowercase",
    "Replace",
    "Prepend",
    "Strip",
    "StripAccents",
    "BertNormalizer",
    "ByteLevel",
    "Nmt",
];
const PRE_TOKENIZERS: &[&str] = &[
    "Sequence",
    "Split",
    "ByteLevel",
    "Digits",
    "Metaspace",
    "Whitespace",
    "WhitespaceSplit",
    "Punctuation",
    "CharDelimiterSplit",
    "BertPreTokenizer",
    "UnicodeScripts",
];
const DECODERS: &[&str] =
    &["Sequence", "ByteLevel", "BPEDecoder", "Metaspace", "Replace", "Fuse", "Strip", "ByteFallback", "WordPiece"];

/// One token of the table: what an id means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TokenEntry {
    /// As it is spelled in the file.
    pub text: String,
    /// Whether it lies outside ordinary text (`<|im_end|>`).
    pub special: bool,
    /// Whether it is an added token, spelled as it appears in text.
    pub added: bool,
}

/// A checked tokenizer.
pub(super) struct CheckedTokenizer {
    /// Ready to encode and decode.
    pub tokenizer: Tokenizer,
    /// The document without padding, truncation and dropout; merges as pairs.
    pub document: Value,
    /// What every id means.
    pub table: HashMap<u32, TokenEntry>,
}

/// Reads, checks and loads `path`.
///
/// Errors: a file too large, no JSON, or anything in it that is not as the format has it; the message names the entry.
pub(super) fn load(path: &Path) -> Result<CheckedTokenizer, DataError> {
    let bytes = read_bounded(path, MAX_TOKENIZER_BYTES)?;
    check_and_load(&bytes).map_err(|(expected, found)| DataError::Tokenizer { path: path.to_path_buf(), expected, found })
}

/// What was expected and what was found.
type Disagreement = (String, String);

fn check_and_load(bytes: &[u8]) -> Result<CheckedTokenizer, Disagreement> {
    let mut document: Value = serde_json::from_slice(bytes).map_err(|e| ("JSON".to_string(), e.to_string()))?;
    let root = document.as_object_mut().ok_or_else(|| fault("a JSON object", "another kind of value"))?;
    for unused in ["padding", "truncation"] {
        root.remove(unused);
    }
    for (part, allowed) in [("normalizer", NORMALIZERS), ("pre_tokenizer", PRE_TOKENIZERS), ("decoder", DECODERS)] {
        check_types(part, root.get(part).unwrap_or(&Value::Null), allowed)?;
    }
    let model = root.get_mut("model").and_then(Value::as_object_mut).ok_or_else(|| fault("an object model", "none"))?;
    model.remove("dropout");
    let mut table = check_model(model)?;
    check_added(root.get("added_tokens"), &mut table)?;
    let tokenizer = load_checked(&document)?;
    for (&id, entry) in table.iter().filter(|(_, entry)| entry.added) {
        let loaded = tokenizer.token_to_id(&entry.text);
        if loaded != Some(id) {
            let loaded = loaded.map_or("none".to_string(), |n| n.to_string());
            return Err(fault(format!("id {id} for the added token {:?}", entry.text), format!("id {loaded} when loaded")));
        }
    }
    Ok(CheckedTokenizer { tokenizer, document, table })
}

/// The library's own loading, without the post-processor: it would only trim offsets or add tokens that are not asked for.
fn load_checked(document: &Value) -> Result<Tokenizer, Disagreement> {
    let mut document = document.clone();
    if let Some(root) = document.as_object_mut() {
        root.remove("post_processor");
    }
    let bytes = serde_json::to_vec(&document).map_err(|e| fault("JSON", e.to_string()))?;
    match guard(|| Tokenizer::from_bytes(&bytes)) {
        Ok(Ok(tokenizer)) => Ok(tokenizer),
        Ok(Err(e)) => Err(fault("a tokenizer that loads", e.to_string())),
        Err(panic) => Err(fault("a tokenizer that loads", panic)),
    }
}

/// Every component of a normaliser, pre-tokenizer or decoder has a known type (depth is bounded by the JSON parser).
fn check_types(part: &str, value: &Value, allowed: &[&str]) -> Result<(), Disagreement> {
    match value {
        Value::Object(fields) => {
            let Some(kind) = fields.get("type").and_then(Value::as_str) else {
                return Err(fault(format!("a type in {part}"), "none"));
            };
            if !allowed.contains(&kind) {
                return Err(fault(format!("{part} of a type among {}", allowed.join(", ")), format!("{kind:?}")));
            }
            let inner = ["normalizers", "pretokenizers", "decoders"].iter().filter_map(|key| fields.get(*key));
            inner.filter_map(Value::as_array).flatten().try_for_each(|component| check_types(part, component, allowed))
        }
        Value::Null => Ok(()),
        _ => Err(fault(format!("an object or null under {part}"), "another kind of value")),
    }
}

fn check_model(model: &mut Map<String, Value>) -> Result<HashMap<u32, TokenEntry>, Disagreement> {
    if !model.contains_key("type") && model.contains_key("merges") {
        model.insert("type".into(), "BPE".into()); // files of old releases leave it out
    }
    let kind = model.get("type").and_then(Value::as_str).unwrap_or("none").to_string();
    if !MODELS.contains(&kind.as_str()) {
        return Err(fault(format!("a model of a type among {}", MODELS.join(", ")), format!("{kind:?}")));
    }
    let merges = model.remove("merges");
    let vocab = model.get("vocab").and_then(Value::as_object).ok_or_else(|| fault("an object model.vocab", "none"))?;
    let mut table = HashMap::with_capacity(vocab.len());
    for (token, id) in vocab {
        let id = check_id(id, token)?;
        let entry = TokenEntry { text: token.clone(), special: false, added: false };
        if let Some(earlier) = table.insert(id, entry) {
            return Err(fault(format!("one token for id {id}"), format!("{:?} and {token:?}", earlier.text)));
        }
    }
    if kind == "BPE" {
        let prefix = model.get("continuing_subword_prefix").and_then(Value::as_str).unwrap_or("");
        let pairs = check_merges(merges.as_ref(), vocab, prefix)?;
        model.insert("merges".into(), pairs);
    }
    Ok(table)
}

/// Merges in either spelling (`"a b"` or `["a", "b"]`) as pairs; both parts and the merged token are in the vocabulary.
fn check_merges(merges: Option<&Value>, vocab: &Map<String, Value>, prefix: &str) -> Result<Value, Disagreement> {
    let list = merges.and_then(Value::as_array).ok_or_else(|| fault("a list model.merges", "none"))?;
    let mut pairs = Vec::with_capacity(list.len());
    let mut merged = String::new();
    for (i, merge) in list.iter().enumerate() {
        let parts: Vec<&str> = match merge {
            Value::String(line) if i == 0 && line.starts_with("#version") => continue,
            Value::String(line) => line.split(' ').collect(),
            Value::Array(parts) => parts.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        let [a, b] = parts[..] else {
            return Err(fault(format!("two parts in model.merges[{i}]"), shorten(&merge.to_string())));
        };
        let Some(rest) = b.strip_prefix(prefix) else {
            return Err(fault(
                format!("a second part with the prefix {prefix:?} in model.merges[{i}]"),
                format!("{:?}", shorten(b)),
            ));
        };
        merged.clear();
        merged.push_str(a);
        merged.push_str(rest);
        if let Some(missing) = [a, b, merged.as_str()].into_iter().find(|token| !vocab.contains_key(*token)) {
            let expected = format!("only tokens of the vocabulary in model.merges[{i}]");
            return Err(fault(expected, format!("{:?}", shorten(missing))));
        }
        pairs.push(Value::from(vec![a, b]));
    }
    Ok(Value::Array(pairs))
}

fn check_added(added: Option<&Value>, table: &mut HashMap<u32, TokenEntry>) -> Result<(), Disagreement> {
    let list = match added {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(fault("a list added_tokens", "another kind of value")),
    };
    let mut seen = HashSet::new();
    for (i, token) in list.iter().enumerate() {
        let Some(text) = token.get("content").and_then(Value::as_str).filter(|text| !text.is_empty()) else {
            return Err(fault(format!("a text in added_tokens[{i}].content"), "none"));
        };
        let id = check_id(token.get("id").unwrap_or(&Value::Null), text)?;
        if !seen.insert(text) {
            return Err(fault("every added token once", format!("{:?} twice", shorten(text))));
        }
        if let Some(other) = table.get(&id).filter(|entry| entry.text != text || entry.added) {
            return Err(fault(format!("one token for id {id}"), format!("{:?} and {:?}", shorten(&other.text), shorten(text))));
        }
        let special = token.get("special").and_then(Value::as_bool).unwrap_or(false);
        table.insert(id, TokenEntry { text: text.to_string(), special, added: true });
    }
    Ok(())
}

fn check_id(id: &Value, token: &str) -> Result<u32, Disagreement> {
    match id.as_u64().filter(|&n| n < MAX_TOKEN_ID).and_then(|n| u32::try_from(n).ok()) {
        Some(id) => Ok(id),
        None => Err(fault(format!("an id below {MAX_TOKEN_ID} for the token {:?}", shorten(token)), shorten(&id.to_string()))),
    }
}

fn fault(expected: impl Into<String>, found: impl Into<String>) -> Disagreement {
    (expected.into(), found.into())
}

/// At most 60 characters of a text from outside, for a message.
pub(super) fn shorten(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_string(),
    }
}
