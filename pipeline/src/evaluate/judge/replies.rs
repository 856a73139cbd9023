//! Owns replies on disk: one file a request, named by the request's digest, so that no question is paid for twice.
//!
//! A file is two lines: the BLAKE3 of the second, and one JSON object with the request and what was kept of its reply. It appears by
//! rename, and is believed only when its digest fits and it holds the very request; anything else is no reply, and is asked for again.

use super::chat::Reply;
use super::{JudgeError, files};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Longest file believed, in bytes: a request and a reply, both bounded.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// Set apart from digests of anything else.
const PURPOSE: &str = "potstill 2026 reply to a chat request";

/// A folder of replies.
#[derive(Debug, Clone)]
pub struct Replies {
    folder: PathBuf,
}

/// What is known of a request.
#[derive(Debug, PartialEq)]
pub enum Known {
    /// The reply.
    Reply(Reply),
    /// A file that is torn or of another request.
    Torn,
    /// Nothing.
    Nothing,
}

/// A request's name: the digest of its body and of how often it was asked before in vain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name(blake3::Hash);

impl Name {
    /// Of the `attempt`-th time (from 0) that `body` is asked.
    pub fn of(body: &Value, attempt: u32) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(PURPOSE);
        hasher.update(&attempt.to_le_bytes()).update(body.to_string().as_bytes());
        Self(hasher.finalize())
    }

    /// Its digits.
    pub fn to_hex(&self) -> String {
        self.0.to_hex().to_string()
    }

    pub(super) fn bytes(&self) -> &[u8; 32] {
        self.0.as_bytes()
    }
}

#[derive(Serialize, Deserialize)]
struct Stored {
    attempt: u32,
    request: Value,
    reply: Reply,
}

impl Replies {
    /// A folder, which is made where it is missing.
    ///
    /// Errors: it cannot be made.
    pub fn open(folder: &Path) -> Result<Self, JudgeError> {
        std::fs::create_dir_all(folder).map_err(JudgeError::io(folder))?;
        Ok(Self { folder: folder.to_path_buf() })
    }

    /// A folder that may be missing and is only looked into.
    pub fn look(folder: &Path) -> Self {
        Self { folder: folder.to_path_buf() }
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn path(&self, name: Name) -> PathBuf {
        self.folder.join(format!("{}.reply", name.to_hex()))
    }

    /// What is known of the `attempt`-th time that `body` is asked.
    ///
    /// Errors: a file that is there and cannot be read.
    pub fn get(&self, body: &Value, attempt: u32) -> Result<Known, JudgeError> {
        let path = self.path(Name::of(body, attempt));
        let bytes = match crate::bounded::read(&path, MAX_FILE_BYTES) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Known::Nothing),
            Err(e) if e.kind() == ErrorKind::FileTooLarge => return Ok(Known::Torn),
            Err(e) => return Err(JudgeError::io(&path)(e)),
        };
        let stored = whole(&bytes).and_then(|line| serde_json::from_slice::<Stored>(line).ok());
        Ok(match stored {
            Some(stored) if stored.attempt == attempt && stored.request == *body => Known::Reply(stored.reply),
            _ => Known::Torn,
        })
    }

    /// Keeps a reply, durably.
    ///
    /// Errors: it cannot be written.
    pub fn put(&self, body: &Value, attempt: u32, reply: &Reply) -> Result<(), JudgeError> {
        let path = self.path(Name::of(body, attempt));
        let stored = Stored { attempt, request: body.clone(), reply: reply.clone() };
        let line = serde_json::to_string(&stored).map_err(|e| JudgeError::io(&path)(e.into()))?;
        let digest = blake3::hash(line.as_bytes()).to_hex();
        files::write(&path, format!("{digest}\n{line}\n").as_bytes())
    }
}

/// The second line, if the first is its digest and nothing is missing.
fn whole(bytes: &[u8]) -> Option<&[u8]> {
    let (digest, rest) = bytes.split_at_checked(2 * blake3::OUT_LEN)?;
    let line = rest.strip_prefix(b"\n")?.strip_suffix(b"\n")?;
    (blake3::hash(line).to_hex().as_bytes() == digest).then_some(line)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use serde_json::json;

    fn reply(content: &str) -> Reply {
        Reply {
            content: content.into(),
            finish_reason: None,
            model: None,
            system_fingerprint: None,
            usage: None,
            top_logprobs: None,
            received: 1,
        }
    }

    #[test]
    fn a_reply_is_found_again_by_its_request_and_attempt_alone() {
        let folder = tempfile::tempdir().unwrap();
        let replies = Replies::open(&folder.path().join("a/b")).unwrap();
        let (body, other) = (json!({ "model": "j", "n": 1 }), json!({ "model": "j", "n": 2 }));
        replies.put(&body, 0, &reply("[[7]]\n")).unwrap();
        assert_eq!(replies.get(&body, 0).unwrap(), Known::Reply(reply("[[7]]\n")));
        assert_eq!((replies.get(&body, 1).unwrap(), replies.get(&other, 0).unwrap()), (Known::Nothing, Known::Nothing));
        assert_eq!(Replies::look(&folder.path().join("none")).get(&body, 0).unwrap(), Known::Nothing);
        assert_ne!(Name::of(&body, 0), Name::of(&body, 1));
    }

    #[test]
    fn no_cut_or_changed_file_is_a_reply() {
        let folder = tempfile::tempdir().unwrap();
        let replies = Replies::open(folder.path()).unwrap();
        let (body, other) = (json!({ "model": "j" }), json!({ "model": "k" }));
        replies.put(&body, 0, &reply("yes")).unwrap();
        let path = replies.path(Name::of(&body, 0));
        let good = std::fs::read(&path).unwrap();
        for length in 0..good.len() {
            std::fs::write(&path, &good[..length]).unwrap();
            assert_eq!(replies.get(&body, 0).unwrap(), Known::Torn, "{length}");
        }
        for place in 0..good.len() {
            let mut bad = good.clone();
            bad[place] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            assert_eq!(replies.get(&body, 0).unwrap(), Known::Torn, "{place}");
        }
        // Whole, but under another's name.
        std::fs::write(replies.path(Name::of(&other, 0)), &good).unwrap();
        assert_eq!(replies.get(&other, 0).unwrap(), Known::Torn);
    }
}
