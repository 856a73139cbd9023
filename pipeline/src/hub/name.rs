//! Owns what a name on the hub looks like: `ORG/NAME`, `ORG/NAME@REVISION`, and for chats `ORG/NAME@REVISION:SPLIT`. Refuses
//! everything that could be read as another path once it is part of one.
//!
//! The one idea: a name has exactly one slash and begins with a letter or digit, so `.`, `..`, absolute paths, globs and plain
//! words stay paths.

use std::path::{Component, Path};

/// The revision a name has when it says none.
pub const DEFAULT_REVISION: &str = "main";
/// Longest `ORG/NAME`, as the hub has it.
const MAX_ID: usize = 96;
/// Longest revision.
const MAX_REVISION: usize = 200;
/// Longest path of a file in a repository, in bytes.
const MAX_PATH: usize = 1024;

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A model.
    Model,
    /// Chats.
    Dataset,
}

impl Kind {
    /// What begins its folder in the cache, and names it in the hub's interface: `models` or `datasets`.
    pub fn plural(self) -> &'static str {
        match self {
            Kind::Model => "models",
            Kind::Dataset => "datasets",
        }
    }

    /// The word for a sentence.
    pub(super) fn singular(self) -> &'static str {
        match self {
            Kind::Model => "model",
            Kind::Dataset => "dataset",
        }
    }
}

/// A repository, which state of it, and which part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    /// What it holds.
    pub kind: Kind,
    /// `ORG/NAME`.
    pub id: String,
    /// A branch, a tag or a commit.
    pub revision: String,
    /// A dataset's split.
    pub split: Option<String>,
}

impl HubName {
    /// Reads a name; `None` for a text that is none and can only be a path.
    pub fn parse(kind: Kind, text: &str) -> Option<Self> {
        let (rest, split) = match text.split_once(':') {
            Some((rest, split)) if kind == Kind::Dataset && is_split(split) => (rest, Some(split.to_string())),
            Some(_) => return None,
            None => (text, None),
        };
        let (id, revision) = rest.split_once('@').unwrap_or((rest, DEFAULT_REVISION));
        let named = is_id(id) && is_revision(revision);
        named.then(|| Self { kind, id: id.to_string(), revision: revision.to_string(), split })
    }

    /// The folder's name in the cache: `models--ORG--NAME`.
    pub fn folder(&self) -> String {
        format!("{}--{}", self.kind.plural(), self.id.replace('/', "--"))
    }
}

impl std::fmt::Display for HubName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.id)?;
        if self.revision != DEFAULT_REVISION {
            write!(f, "@{}", self.revision)?;
        }
        self.split.as_ref().map_or(Ok(()), |split| write!(f, ":{split}"))
    }
}

/// The reverse of [`HubName::folder`]; `None` for a folder that no repository has.
pub(super) fn id_of_folder(name: &str) -> Option<(Kind, String)> {
    [Kind::Model, Kind::Dataset].into_iter().find_map(|kind| {
        let id = name.strip_prefix(kind.plural())?.strip_prefix("--")?.replacen("--", "/", 1);
        is_id(&id).then_some((kind, id))
    })
}

/// `ORG/NAME` of letters, digits, `-`, `_` and `.`, by the hub's own rules.
fn is_id(id: &str) -> bool {
    let part = |part: &str| {
        let edge = |c: Option<char>| c.is_some_and(|c| !matches!(c, '-' | '.'));
        edge(part.chars().next()) && edge(part.chars().next_back()) && part.chars().all(is_plain)
    };
    let two = id.split_once('/').is_some_and(|(org, name)| part(org) && part(name));
    two && id.len() <= MAX_ID && !id.contains("--") && !id.contains("..") && !id.ends_with(".git")
}

fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

/// A branch, a tag (`v1.0`, `refs/pr/3`) or a commit.
fn is_revision(revision: &str) -> bool {
    let part = |part: &str| !part.is_empty() && !part.starts_with('.') && part.chars().all(is_plain);
    revision.len() <= MAX_REVISION && revision.split('/').all(part) && !revision.contains("..")
}

/// Words joined by dots, as `datasets` has them.
fn is_split(split: &str) -> bool {
    let word = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    split.len() <= MAX_ID && split.split('.').all(word)
}

/// Whether a text is a whole commit's hash.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Whether a file's path in a repository is of ordinary parts, so that joining it to a folder cannot leave the folder.
pub(super) fn is_plain_path(path: &str) -> bool {
    let ordinary = Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    let written = path.split('/').all(|part| !part.is_empty() && part != "." && part != ".." && part.len() <= 255);
    ordinary && written && path.len() <= MAX_PATH && !path.chars().any(|c| matches!(c, '\\' | ':') || c.is_control())
}
