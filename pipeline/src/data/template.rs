//! The model's chat template, rendered as transformers renders it, by an engine with limits.
//!
//! Jinja with trim_blocks and lstrip_blocks, no escaping, one trailing newline of the template dropped, Python's string
//! methods, `raise_exception` and Python's `tojson`. There is no clock (`strftime_now` is not defined: the same chat gives
//! the same text every day), no loader and no I/O. A variable that is not there is an error where it is printed or iterated,
//! and false where it is tested. The one idea: a template is a hostile program, so its steps, output and source are bounded.

use super::model_folder::{ChatSettings, TemplateSource};
use super::{DataError, Message, Prompt};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior, context};
use potstill_cache::TemplateFingerprint;
use serde::Serialize;
use std::error::Error as _;
use std::io::Write;

/// Steps a rendering may take. A chat of 1,000 messages of 4,000 characters takes about 275,000.
pub(super) const FUEL: u64 = 1_000_000;
/// Bytes a rendering may write.
pub(super) const MAX_OUTPUT_BYTES: usize = 32 << 20;
/// Nested calls; workers have small stacks, and chat templates hardly recurse.
const RECURSION_LIMIT: usize = 64;

/// A compiled chat template.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    name: String,
    text: String,
    fingerprint: TemplateFingerprint,
}

impl ChatTemplate {
    /// Compiles `source`; `settings` gives the special tokens it may name.
    pub(super) fn new(source: &TemplateSource, settings: &ChatSettings) -> Result<Self, DataError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| engine_error(&source.name, &e))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_undefined_behavior(UndefinedBehavior::SemiStrict);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION_LIMIT);
        environment.set_debug(false);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", python_json);
        environment.add_global("tools", Value::from(())); // transformers passes None for both
        environment.add_global("documents", Value::from(()));
        for (name, token) in &settings.named_tokens {
            environment.add_global(*name, token.as_str());
        }
        let text = without_generation_marks(&source.text.replace("\r\n", "\n").replace('\r', "\n"));
        environment.add_template_owned(source.name.clone(), text.clone()).map_err(|e| engine_error(&source.name, &e))?;
        let blake3 = blake3::hash(source.text.as_bytes()).to_hex().to_string();
        let fingerprint = TemplateFingerprint { source: source.name.clone(), blake3 };
        Ok(Self { environment, name: source.name.clone(), text, fingerprint })
    }

    /// The file it came from.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Its identity.
    pub(super) fn fingerprint(&self) -> &TemplateFingerprint {
        &self.fingerprint
    }

    /// Whether the template's own text holds `c`.
    pub(super) fn contains(&self, c: char) -> bool {
        self.text.contains(c)
    }

    /// The text of `messages`.
    ///
    /// Errors: too many steps, too much text, a template that fails or that calls `raise_exception`.
    pub(super) fn render(&self, messages: &[Message], prompt: Prompt) -> Result<String, DataError> {
        let message = |m: &Message| context! { role => m.role.as_str(), content => m.content.as_str() };
        let context = context! {
            messages => messages.iter().map(message).collect::<Value>(),
            add_generation_prompt => prompt == Prompt::Generation,
        };
        let mut out = BoundedText(Vec::new());
        let template = self.environment.get_template(&self.name).map_err(|e| engine_error(&self.name, &e))?;
        template.render_captured_to(context, &mut out).map_err(|e| engine_error(&self.name, &e))?;
        String::from_utf8(out.0).map_err(|e| DataError::Template { name: self.name.clone(), found: e.utf8_error().to_string() })
    }
}

/// Text that refuses to grow beyond [`MAX_OUTPUT_BYTES`].
struct BoundedText(Vec<u8>);

impl Write for BoundedText {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(std::io::Error::other("the text is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A template's own refusal.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Refusal(message)))
}

fn engine_error(name: &str, error: &Error) -> DataError {
    let name = name.to_string();
    if let Some(refusal) = error.source().and_then(|source| source.downcast_ref::<Refusal>()) {
        return DataError::Refused { name, found: super::tokenizer_json::shorten(&refusal.0) };
    }
    match error.kind() {
        ErrorKind::OutOfFuel => DataError::TemplateSteps { name, limit: FUEL },
        ErrorKind::WriteFailure => DataError::TemplateOutput { name, limit: MAX_OUTPUT_BYTES },
        kind => {
            let line = error.line().map_or(String::new(), |line| format!("line {line}: "));
            let detail = error.detail().map_or(String::new(), |detail| format!(": {detail}"));
            DataError::Template { name, found: format!("{line}{kind}{detail}") }
        }
    }
}

/// `{% generation %}` … `{% endgeneration %}`, transformers' marks around what the assistant says, as blocks that are always
/// taken; whitespace marks (`-`, `+`) stay where they are.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        let (tag, after) = tag.split_at(end);
        let word = tag.trim_start_matches("{%").trim_end_matches("%}");
        let word = word.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        match word {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn python_json(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<Value, Error> {
    let indent = options.get::<Option<usize>>("indent")?.or(indent);
    options.get::<Option<bool>>("ensure_ascii")?;
    options.assert_all_used()?;
    if value.kind() == ValueKind::Undefined {
        return Err(Error::new(ErrorKind::UndefinedError, "tojson of an undefined value"));
    }
    let mut out = Vec::new();
    let failed = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    match indent {
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter)).map_err(failed)?;
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonSpacing)).map_err(failed)?,
    }
    String::from_utf8(out).map(Value::from).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))
}

/// `", "` between items and `": "` after keys, on one line.
struct PythonSpacing;

impl serde_json::ser::Formatter for PythonSpacing {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn generation_marks_become_blocks_with_their_whitespace_marks() {
        let source =
            "{%- generation -%}a{% endgeneration %}{%generation%}{%+ endgeneration +%}{% if generation %}{{ 'generation' }}{%";
        let expected = "{%- if true -%}a{% endif %}{%if true%}{%+ endif +%}{% if generation %}{{ 'generation' }}{%";
        assert_eq!(without_generation_marks(source), expected);
    }

    #[test]
    fn json_is_spelled_as_python_spells_it() {
        let source = TemplateSource {
            name: "t".into(),
            text: "{{ {'a': [1, 'é<&'], 'b': none} | tojson }}|{{ {'a': [1]} | tojson(indent=2) }}".into(),
        };
        let template = ChatTemplate::new(&source, &ChatSettings::default()).unwrap();
        let text = template.render(&[], Prompt::None).unwrap();
        assert_eq!(text, "{\"a\": [1, \"é<&\"], \"b\": null}|{\n  \"a\": [\n    1\n  ]\n}");
    }
}
