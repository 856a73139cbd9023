//! Digests of a folder's files, in a file of the folder: `digests.json`, which also holds a digest of itself. Refuses a folder in which
//! any byte of a listed file, or of the list, is another than was written.
//!
//! ```text
//! { "files": { "NAME": "BLAKE3, hex", … by rising name }, "blake3": "of the object `files` as it stands here, without spaces" }
//! ```

use super::TrainError;
use super::files::{io, replace};
use crate::{Result, bounded};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

/// Name of the list.
pub(super) const DIGESTS_FILE: &str = "digests.json";
/// Largest list read, in bytes.
const MAX_LIST_BYTES: u64 = 1 << 20;

/// Name → BLAKE3 (hex).
type Digests = BTreeMap<String, String>;

/// The list.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    files: Digests,
    blake3: String,
}

impl List {
    fn of(files: Digests) -> serde_json::Result<List> {
        let blake3 = blake3::hash(&serde_json::to_vec(&files)?).to_hex().to_string();
        Ok(List { files, blake3 })
    }

    /// The one form that it is written in, so that a change of any byte shows.
    fn text(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec_pretty(self)
    }
}

/// Writes the digests of every file in the folder, durably.
pub(super) fn write(folder: &Path) -> Result<()> {
    let path = folder.join(DIGESTS_FILE);
    let text = List::of(found(folder)?).and_then(|list| list.text()).map_err(|e| io(&path)(e.into()))?;
    replace(&path, &text)
}

/// Proves that the folder holds what was written, `needed` among it.
///
/// Errors: no such folder or no list in it; a list or a file that is not what was written, or cannot be read; a list of an earlier
/// version.
pub(super) fn check(folder: &Path, needed: &[&str]) -> Result<()> {
    let path = folder.join(DIGESTS_FILE);
    if !path.is_file() {
        let why = match folder.is_dir() {
            true => format!("expected a folder with {DIGESTS_FILE} in it, found none in it"),
            false => "expected a folder, found nothing there".into(),
        };
        return Err(TrainError::NoCheckpoint { path: folder.to_path_buf(), why }.into());
    }
    let expected = listed(&path)?;
    let found = found(folder)?;
    for name in needed.iter().copied().chain(expected.keys().map(String::as_str)) {
        let show = |of: &Digests| of.get(name).map_or("nothing".into(), |digest| format!("BLAKE3 {digest}"));
        if expected.get(name) != found.get(name) || !expected.contains_key(name) {
            return Err(TrainError::Damaged { path: folder.join(name), expected: show(&expected), found: show(&found) }.into());
        }
    }
    Ok(())
}

/// A file of a checkpoint. Errors: it cannot be read; one with more bytes than any that was written, which is damage.
pub(super) fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    bounded::read(path, most).map_err(|source| match source.kind() {
        ErrorKind::FileTooLarge => {
            let (expected, found) = (format!("at most {most} bytes"), "more".into());
            TrainError::Damaged { path: path.to_path_buf(), expected, found }.into()
        }
        _ => io(path)(source),
    })
}

/// Whether this is a list as versions before this one wrote it: digests by name, and none of the list itself.
fn is_of_earlier_version(text: &[u8]) -> bool {
    let is_digest = |digest: &String| digest.len() == 2 * blake3::OUT_LEN && digest.bytes().all(|b| b.is_ascii_hexdigit());
    serde_json::from_slice::<Digests>(text).is_ok_and(|files| !files.is_empty() && files.values().all(is_digest))
}

/// What the list says, its own digest checked.
fn listed(path: &Path) -> Result<Digests> {
    let damaged =
        |expected: &str, found: String| TrainError::Damaged { path: path.to_path_buf(), expected: expected.into(), found };
    let text = read(path, MAX_LIST_BYTES)?;
    if is_of_earlier_version(&text) {
        let folder = path.parent().unwrap_or(path).to_path_buf();
        return Err(TrainError::OtherVersion { path: folder }.into());
    }
    let list: List = serde_json::from_slice(&text).map_err(|e| damaged("a list of digests", e.to_string()))?;
    let again = List::of(list.files.clone()).map_err(|e| io(path)(e.into()))?;
    if again.blake3 != list.blake3 {
        let found = format!("BLAKE3 {}", again.blake3);
        return Err(TrainError::Damaged { path: path.to_path_buf(), expected: format!("BLAKE3 {}", list.blake3), found }.into());
    }
    if again.text().map_err(|e| io(path)(e.into()))? != text {
        return Err(damaged("the list as it was written", "the same in other bytes".into()).into());
    }
    Ok(list.files)
}

/// The digest of every file in the folder but the list's own.
fn found(folder: &Path) -> Result<Digests> {
    let mut all = Digests::new();
    for entry in fs::read_dir(folder).map_err(io(folder))? {
        let path = entry.map_err(io(folder))?.path();
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if name != DIGESTS_FILE && !name.starts_with('.') && path.is_file() {
            let mut hasher = blake3::Hasher::new();
            hasher.update_reader(File::open(&path).map_err(io(&path))?).map_err(io(&path))?;
            all.insert(name, hasher.finalize().to_hex().to_string());
        }
    }
    Ok(all)
}
