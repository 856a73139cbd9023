//! Where in the rendered text the assistant speaks.
//!
//! Templates may trim, wrap or repeat what they are given, so the text is not searched for the messages. Instead the
//! conversation is rendered once more with two marks that occur nowhere else (Unicode noncharacters) around every assistant
//! content; where the marks come out is where the content stands:
//!
//! ```text
//! plain   …<|im_start|>assistant\nHello!<|im_end|>\n
//! marked  …<|im_start|>assistant\n⟦Hello!⟧<|im_end|>\n       without the marks it must equal the plain text
//! span                           └content┘└ marker ┘
//! ```
//!
//! A template that trims would be kept from it by marks outside the whitespace. So marks are tried outside the content's own
//! whitespace first, then inside on one side, then on both; the first placing that leaves the text as it was is right.

use super::template::ChatTemplate;
use super::{DataError, Message, Prompt, Role};
use std::ops::Range;

/// One stretch of the assistant's speech, as byte offsets in the rendered text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span {
    /// The content.
    pub content: Range<usize>,
    /// End of the scored text: after the end marker where one follows, else the content's end.
    pub end: usize,
}

/// Tokens that end a message.
#[derive(Debug, Default)]
pub(super) struct EndMarkers {
    /// Special tokens, longest first; one that follows a content directly is its end marker.
    pub special: Vec<String>,
    /// The model's end-of-text token; it is the end marker even after whitespace. (After whitespace another special token may
    /// as well open the next message.)
    pub eos: String,
}

/// A rendered conversation.
#[derive(Debug)]
pub(super) struct Marked {
    /// The text, without marks.
    pub text: String,
    /// Rising and disjoint.
    pub spans: Vec<Span>,
}

/// Which side of a content's own whitespace a mark stands on.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Outside,
    Inside,
}

/// Whether contents that are empty get marks: a template may take another branch for them.
#[derive(Clone, Copy, PartialEq)]
enum EmptyContents {
    Marked,
    Bare,
}

/// Renders `messages` and finds the assistant's spans.
///
/// Errors: those of rendering, and a template that changes a content beyond trimming.
pub(super) fn render(template: &ChatTemplate, messages: &[Message], markers: &EndMarkers) -> Result<Marked, DataError> {
    let text = template.render(messages, Prompt::None)?;
    let marks = free_marks(template, messages).ok_or_else(|| lost(template, "a text that uses every noncharacter"))?;
    let assistant = || messages.iter().filter(|m| m.role == Role::Assistant).map(|m| m.content.as_str());
    let leads = sides(assistant().any(|content| content.starts_with(char::is_whitespace)));
    let tails = sides(assistant().any(|content| content.ends_with(char::is_whitespace)));
    let empties: &[EmptyContents] = match assistant().any(|content| content.trim().is_empty()) {
        true => &[EmptyContents::Marked, EmptyContents::Bare],
        false => &[EmptyContents::Marked],
    };
    for &empty in empties {
        for &lead in leads {
            for &tail in tails {
                let marked = template.render(&mark(messages, marks, lead, tail, empty), Prompt::None)?;
                match placing(&marked, &text, marks) {
                    Placing::Changed => {}
                    Placing::Unpaired => return Err(lost(template, "one that begins without ending")),
                    Placing::At(contents) => {
                        let spans = contents.into_iter().map(|content| close(&text, content, markers)).collect();
                        return Ok(Marked { text, spans });
                    }
                }
            }
        }
    }
    Err(lost(template, "one that the template changes"))
}

fn sides(has_whitespace: bool) -> &'static [Side] {
    if has_whitespace { &[Side::Outside, Side::Inside] } else { &[Side::Outside] }
}

/// Two noncharacters that neither the messages nor the template hold.
fn free_marks(template: &ChatTemplate, messages: &[Message]) -> Option<[char; 2]> {
    let taken = |c: char| template.contains(c) || messages.iter().any(|message| message.content.contains(c));
    let mut free = ('\u{FDD0}'..='\u{FDEF}').filter(|&c| !taken(c));
    Some([free.next()?, free.next()?])
}

fn mark(messages: &[Message], [open, close]: [char; 2], lead: Side, tail: Side, empty: EmptyContents) -> Vec<Message> {
    let marked = |message: &Message| {
        let content = message.content.as_str();
        let bare = content.trim().is_empty() && empty == EmptyContents::Bare;
        if message.role != Role::Assistant || bare {
            return message.clone();
        }
        let start = content.len() - content.trim_start().len();
        let start = if lead == Side::Inside { start } else { 0 };
        let end = content.trim_end().len().max(start);
        let end = if tail == Side::Inside { end } else { content.len() };
        let [before, inner, after] =
            [content.get(..start), content.get(start..end), content.get(end..)].map(Option::unwrap_or_default);
        Message { role: message.role, content: format!("{before}{open}{inner}{close}{after}") }
    };
    messages.iter().map(marked).collect()
}

/// What marks did to a text.
enum Placing {
    /// Without the marks it is another text.
    Changed,
    /// The same text, but a mark lacks its partner.
    Unpaired,
    /// The same text, with these stretches between marks.
    At(Vec<Range<usize>>),
}

fn placing(marked: &str, plain: &str, [open, close]: [char; 2]) -> Placing {
    let mut found = Vec::new();
    let mut begun = None;
    let mut paired = true;
    let (mut at, mut rest) = (0, plain); // at: offset in the plain text, where `rest` begins
    for piece in marked.split_inclusive([open, close]) {
        let text = piece.trim_end_matches([open, close]);
        match rest.strip_prefix(text) {
            Some(after) => (at, rest) = (at + text.len(), after),
            None => return Placing::Changed,
        }
        match (piece.get(text.len()..).and_then(|mark| mark.chars().next()), begun) {
            (None, _) => {}
            (Some(mark), None) if mark == open => begun = Some(at),
            (Some(mark), Some(start)) if mark == close => {
                found.push(start..at);
                begun = None;
            }
            _ => paired = false,
        }
    }
    match (rest.is_empty(), paired && begun.is_none()) {
        (false, _) => Placing::Changed,
        (true, false) => Placing::Unpaired,
        (true, true) => Placing::At(found),
    }
}

/// Adds the end marker that follows `content`.
fn close(text: &str, content: Range<usize>, markers: &EndMarkers) -> Span {
    let rest = text.get(content.end..).unwrap_or_default();
    let direct = markers.special.iter().find(|marker| rest.starts_with(marker.as_str())).map(String::len);
    let spaced = || {
        let trimmed = rest.trim_start();
        let follows = !markers.eos.is_empty() && trimmed.starts_with(&markers.eos);
        follows.then_some(rest.len() - trimmed.len() + markers.eos.len())
    };
    let end = content.end + direct.or_else(spaced).unwrap_or(0);
    Span { content, end }
}

fn lost(template: &ChatTemplate, found: &str) -> DataError {
    DataError::LostSpan { name: template.name().to_string(), found: found.to_string() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::model_folder::{ChatSettings, TemplateSource};
    use super::*;

    fn spans_of(template: &str, contents: &[&str]) -> Result<Vec<(String, String)>, String> {
        let source = TemplateSource { name: "t".into(), text: template.into() };
        let template = ChatTemplate::new(&source, &ChatSettings::default()).unwrap();
        let markers = EndMarkers { special: vec!["<|im_start|>".into(), "<e>".into()], eos: "<e>".into() };
        let messages: Vec<_> = contents.iter().map(|c| Message { role: Role::Assistant, content: c.to_string() }).collect();
        let marked = render(&template, &messages, &markers).map_err(|e| e.to_string())?;
        let show = |s: &Span| (marked.text[s.content.clone()].to_string(), marked.text[s.content.end..s.end].to_string());
        Ok(marked.spans.iter().map(show).collect())
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect()
    }

    #[test]
    fn whitespace_belongs_to_the_content_exactly_where_the_template_keeps_it() {
        let each = |body: &str| format!("{{% for m in messages %}}a\n{body}<e>{{% endfor %}}");
        let content = "\n\n hi \n";
        let cases = [
            ("{{ m.content }}", content),
            ("{{ m.content | trim }}", "hi"),
            ("{{ m.content.lstrip() }}", "hi \n"),
            ("{{ m.content.rstrip() }}", "\n\n hi"),
        ];
        for (body, kept) in cases {
            assert_eq!(spans_of(&each(body), &[content]), Ok(pairs(&[(kept, "<e>")])), "{body}");
        }
    }

    #[test]
    fn an_end_marker_follows_directly_or_is_the_end_of_text_after_whitespace() {
        let each = |end: &str| format!("{{% for m in messages %}}{{{{ m.content }}}}{end}{{% endfor %}}.");
        assert_eq!(spans_of(&each("<|im_start|>"), &["x"]), Ok(pairs(&[("x", "<|im_start|>")])));
        assert_eq!(spans_of(&each(" <e>"), &["x", "y"]), Ok(pairs(&[("x", " <e>"), ("y", " <e>")])));
        assert_eq!(spans_of(&each("\n<|im_start|>"), &["x"]), Ok(pairs(&[("x", "")])));
        assert_eq!(spans_of(&each("-"), &["x"]), Ok(pairs(&[("x", "")])));
    }

    #[test]
    fn empty_contents_repeated_contents_and_marks_in_the_data() {
        let plain = "{% for m in messages %}{{ m.content }}<e>{% endfor %}";
        assert_eq!(spans_of(plain, &["", "b"]), Ok(pairs(&[("", "<e>"), ("b", "<e>")])));
        let branch = "{% for m in messages %}{% if m.content %}{{ m.content }}{% else %}nothing{% endif %}<e>{% endfor %}";
        assert_eq!(spans_of(branch, &["", "b"]), Ok(pairs(&[("b", "<e>")])));
        let twice = "{% for m in messages %}{{ m.content }}<e>{{ m.content }}{% endfor %}";
        assert_eq!(spans_of(twice, &["a"]), Ok(pairs(&[("a", "<e>"), ("a", "")])));
        let noncharacters = "\u{FDD0}x\u{FDD1}";
        assert_eq!(spans_of(plain, &[noncharacters]), Ok(pairs(&[(noncharacters, "<e>")])));
    }

    #[test]
    fn a_template_that_changes_the_content_is_refused() {
        let cut = "{% for m in messages %}{{ m.content[:2] }}{% endfor %}";
        let expected = "chat template t: expected every assistant message whole in the text, found one that the template changes";
        assert_eq!(spans_of(cut, &["abc"]), Err(expected.to_string()));
        let split = "{% for m in messages %}{{ m.content.split('|')[-1] }}{% endfor %}";
        let expected =
            "chat template t: expected every assistant message whole in the text, found one that begins without ending";
        assert_eq!(spans_of(split, &["a|b"]), Err(expected.to_string()));
        let hidden = "{% for m in messages %}-{% endfor %}";
        assert_eq!(spans_of(hidden, &["a"]), Ok(vec![]));
    }
}
