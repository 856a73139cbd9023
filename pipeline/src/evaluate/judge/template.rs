//! Prompts with named places. All places are filled at once, so that what stands in an answer is never taken for a place.

/// Whether braces may stand around anything else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Braces {
    /// They are text, as in AlpacaEval's prompts.
    Text,
    /// They are an error: MT-Bench's prompts are Python format strings, in which a brace alone means something.
    Places,
}

/// Which places have to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Each at least once.
    All,
    /// Any number of them.
    Any,
}

/// A text with places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Text, and the place after it, by its number in the list of names.
    pieces: Vec<(String, Option<usize>)>,
}

impl Template {
    /// Reads `text`, in which `names` stand in braces. Errors: what is wrong.
    pub fn of(text: &str, names: &[&str], braces: Braces, presence: Presence) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut rest = text;
        let mut seen = vec![false; names.len()];
        let next = |rest: &str| {
            let found = names.iter().enumerate().filter_map(|(i, name)| Some((rest.find(&format!("{{{name}}}"))?, i)));
            found.min()
        };
        while let Some((at, place)) = next(rest) {
            let (before, after) = rest.split_at(at);
            pieces.push((before.to_string(), Some(place)));
            seen[place] = true;
            rest = &after[names[place].len() + 2..];
        }
        pieces.push((rest.to_string(), None));
        if let (Presence::All, Some(missing)) = (presence, names.iter().zip(&seen).find(|(_, seen)| !**seen)) {
            return Err(format!("none of {{{}}}", missing.0));
        }
        if braces == Braces::Places && pieces.iter().any(|(text, _)| text.contains(['{', '}'])) {
            return Err(format!("a brace beside {{{}}}", names.join("}, {")));
        }
        Ok(Self { pieces })
    }

    /// The text with `values` in its places, in the order of the names.
    pub fn fill(&self, values: &[&str]) -> String {
        let mut out = String::new();
        for (text, place) in &self.pieces {
            out.push_str(text);
            out.push_str(place.and_then(|place| values.get(place)).unwrap_or(&""));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn places_are_filled_once_and_together() {
        let template = Template::of("Q: {q}\nA: {a} ({q})", &["q", "a"], Braces::Places, Presence::All).unwrap();
        assert_eq!(template.fill(&["{a}", "{q}"]), "Q: {a}\nA: {q} ({a})");
        let names = ["question", "answer", "answer_1"];
        let template = Template::of("{answer_1}{answer}{question}", &names, Braces::Places, Presence::All).unwrap();
        assert_eq!(template.fill(&["q", "a", "b"]), "baq");
    }

    #[test]
    fn what_is_missing_or_means_something_else_is_said() {
        assert_eq!(Template::of("{q}", &["q", "a"], Braces::Text, Presence::All).unwrap_err(), "none of {a}");
        assert_eq!(Template::of("{q} {{x}}", &["q"], Braces::Places, Presence::All).unwrap_err(), "a brace beside {q}");
        assert!(Template::of("{q}", &["q", "a"], Braces::Text, Presence::Any).is_ok());
        assert_eq!(Template::of("{ \"x\": {q} }", &["q"], Braces::Text, Presence::All).unwrap().fill(&["1"]), "{ \"x\": 1 }");
    }
}
