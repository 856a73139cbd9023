//! One token as bytes and as readable text. Byte-level tokens are spelled in an alphabet of 256 stand-in characters, others fall back
//! to tokens such as `<0xE4>`; here both become bytes again, and in text a byte that is no whole character is shown as `<0xE4>`.

use super::tokenizer_json::TokenEntry;
use serde_json::Value;

/// How a tokenizer spells ordinary tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spelling {
    /// Each byte as one of 256 characters (GPT-2's alphabet).
    ByteLevel,
    /// As it is, with `▁` for a space, and `<0xE4>` for a byte.
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

    /// The token's bytes, which may be part of a character; added tokens are spelled as they are.
    pub(super) fn bytes(self, entry: &TokenEntry) -> Vec<u8> {
        match self {
            _ if entry.added => entry.text.clone().into_bytes(),
            Spelling::Metaspace => match fallback_byte(&entry.text) {
                Some(byte) => vec![byte],
                None => entry.text.replace('▁', " ").into_bytes(),
            },
            Spelling::Plain => entry.text.clone().into_bytes(),
            Spelling::ByteLevel => {
                let bytes = entry.text.chars().map(byte_of).collect::<Option<Vec<u8>>>();
                bytes.unwrap_or_else(|| entry.text.clone().into_bytes())
            }
        }
    }

    /// The token's text.
    pub(super) fn text(self, entry: &TokenEntry) -> String {
        show_bytes(&self.bytes(entry))
    }
}

/// The byte that a token such as `<0xE4>` stands for.
fn fallback_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_byte = digits.len() == 2 && digits.bytes().all(|c| c.is_ascii_hexdigit());
    if is_byte { u8::from_str_radix(digits, 16).ok() } else { None }
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

/// Bytes as text; those that are no whole character as `<0xE4>`.
pub fn show_bytes(bytes: &[u8]) -> String {
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
        assert_eq!(Spelling::ByteLevel.bytes(&entry("ä½")), [0xe4, 0xbd]);
        assert_eq!(
            (Spelling::Metaspace.bytes(&entry("<0xE4>")), Spelling::Metaspace.text(&entry("<0xE4>"))),
            (vec![0xe4], "<0xE4>".into())
        );
        // A byte that is a whole character is that character, and what only looks like a byte is text.
        assert_eq!(
            (Spelling::Metaspace.text(&entry("<0x0A>")), Spelling::Metaspace.text(&entry("<0xE4F>"))),
            ("\n".into(), "<0xE4F>".into())
        );
    }
}
