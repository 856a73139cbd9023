//! The identity of a tokenizer: which ids mean what, and how text becomes ids.
//!
//! Both digests are taken from a canonical form, so that a file saved again by another release keeps its identity: keys
//! sorted, empty settings left out, merges as pairs, padding, truncation and dropout dropped.

use super::tokenizer_json::{CheckedTokenizer, TokenEntry};
use potstill_cache::TokenizerFingerprint;
use serde_json::Value;

/// The fingerprint of a checked tokenizer.
pub(super) fn of(checked: &CheckedTokenizer) -> TokenizerFingerprint {
    let mut table: Vec<(u32, &TokenEntry)> = checked.table.iter().map(|(&id, entry)| (id, entry)).collect();
    table.sort_unstable_by_key(|&(id, _)| id);
    let mut vocabulary = blake3::Hasher::new();
    vocabulary.update(b"potstill vocabulary v1\0");
    for (id, entry) in &table {
        vocabulary.update(&id.to_le_bytes());
        vocabulary.update(&(entry.text.len() as u64).to_le_bytes());
        vocabulary.update(entry.text.as_bytes());
        vocabulary.update(&[u8::from(entry.special)]);
    }
    let mut canonical = Vec::new();
    write_canonical(&checked.document, &mut canonical);
    let mut whole = blake3::Hasher::new();
    whole.update(b"potstill tokenizer v1\0");
    whole.update(&canonical);
    TokenizerFingerprint {
        vocabulary_blake3: vocabulary.finalize().to_hex().to_string(),
        blake3: whole.finalize().to_hex().to_string(),
        size: table.last().map_or(0, |&(id, _)| id + 1),
    }
}

/// JSON with sorted keys and without null fields. Depth is bounded by the parser that made `value`.
fn write_canonical(value: &Value, out: &mut Vec<u8>) {
    match value {
        Value::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().filter(|(_, value)| !value.is_null()).collect();
            fields.sort_unstable_by_key(|(key, _)| key.as_str());
            out.push(b'{');
            for (key, value) in fields {
                out.extend_from_slice(Value::from(key.as_str()).to_string().as_bytes());
                out.push(b':');
                write_canonical(value, out);
                out.push(b',');
            }
            out.push(b'}');
        }
        Value::Array(items) => {
            out.push(b'[');
            for item in items {
                write_canonical(item, out);
                out.push(b',');
            }
            out.push(b']');
        }
        leaf => out.extend_from_slice(leaf.to_string().as_bytes()),
    }
}
