//! One token as readable text. Byte-level tokens are spelled in an alphabet of 256 stand-in characters; here they become
//! bytes again, and a byte that is no whole character is shown as `<0xE4>`.

use super::tokenizer_json::TokenEntry;
use serde_json::Value;

/// How a tokenizer spells ordinary tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// Each byte as one of 256 characters (GPT-2's alphabet).
    ByteLevel,
    /// As it is, with `▁` for a space.
    Metaspace,
    /// As it is.
    Plain,
}

impl Spelling {
    /// Read from the `decoder` of a checked `tokenizer.json`.
    pub(super) fn of(decoder: &Value) -> Self {
        let inner = decoder.get("decoders").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        for component in std::iter::once(decoder).chain(inner) {
            let kind = component.get("type").and_then(Value::as_str).unwrap_or_default();
            let replaced = component.get("pattern").and_then(|pattern| pattern.get("String")).and_then(Value::as_str);
            match (kind, replaced) {
                ("ByteLevel", _) => return Spelling::ByteLevel,
                ("Metaspace", _) | ("Replace", Some("▁")) => return Spelling::Metaspace,
                _ => {}
            }
        }
        Spelling::Plain
    }

    /// The token's text; added tokens are spelled as they are.
    pub(super) fn text(self, entry: &TokenEntry) -> String {
        match self {
            _ if entry.added => entry.text.clone(),
            Spelling::Metaspace => entry.text.replace('▁', " "),
            Spelling::Plain => entry.text.clone(),
            Spelling::ByteLevel => match entry.text.chars().map(byte_of).collect::<Option<Vec<u8>>>() {
                Some(bytes) => show_bytes(&bytes),
                None => entry.text.clone(),
            },
        }
    }
}

/// The byte a character of GPT-2's alphabet stands for: printable Latin-1 for itself, the 68 other bytes, in rising order, as
/// U+0100 and on (openai/gpt-2, `bytes_to_unicode`).
fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    let printable = |byte: &u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    match u8::try_from(code) {
        Ok(byte) => Some(byte).filter(printable),
        Err(_) => (0..=255u8).filter(|byte| !printable(byte)).nth(usize::try_from(code - 0x100).ok()?),
    }
}

fn show_bytes(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        out.push_str(chunk.valid());
        chunk.invalid().iter().for_each(|byte| out.push_str(&format!("<0x{byte:02X}>")));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_a_bijection_and_partial_characters_show_their_bytes() {
        let printable = (0x21..=0x7eu32).chain(0xa1..=0xac).chain(0xae..=0xff);
        let mut bytes: Vec<u8> = printable.chain(0x100..0x144).filter_map(char::from_u32).filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(byte_of('\u{144}'), None);
        assert_eq!(byte_of(' '), None);
        let entry = |text: &str| TokenEntry { text: text.into(), special: false, added: false };
        assert_eq!(Spelling::ByteLevel.text(&entry("Ġhi")), " hi");
        assert_eq!(Spelling::ByteLevel.text(&entry("ä½")), "<0xE4><0xBD>");
        assert_eq!(Spelling::ByteLevel.text(&entry("ä½ł")), "你");
        assert_eq!(Spelling::Metaspace.text(&entry("▁hi")), " hi");
    }
}
