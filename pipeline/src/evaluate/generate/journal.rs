//! The answers of a run as they come, one durable line each, below a line that says what decides them. Refuses a journal of other settings
//! and one that another process writes.
//!
//! ```text
//! {"settings": {NAME: VALUE, …}}
//! {"question":0,"choice":0,"turn":0,"text":"…","tokens":87,"prompt_tokens":31,"end":"stop","tstamp":…}
//! {"question":3,…                                    in the order in which answers are finished
//! ```
//! A last line without its newline is what a crash left of an answer; it is cut off, and the answer is given again.

use super::Answer;
use crate::bounded;
use crate::evaluate::error::EvaluateError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Largest journal read, in bytes.
const MAX_BYTES: u64 = 1 << 30;

/// What decides the answers, by name.
pub(super) type Settings = BTreeMap<String, String>;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    settings: Settings,
}

/// An open journal.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
}

/// Where the journal of an answers file lies.
pub(super) fn beside(out: &Path) -> PathBuf {
    let name = out.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    out.with_file_name(format!("{name}.journal"))
}

impl Journal {
    /// Opens the journal at `path`, or begins it, and gives the answers in it.
    ///
    /// Errors: another process has it open, it is of other settings, a line that is none of it.
    pub(super) fn open(path: &Path, settings: &Settings) -> Result<(Self, Vec<Answer>), EvaluateError> {
        let io = |source| EvaluateError::Io { path: path.to_path_buf(), source };
        let fresh = !path.exists();
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(EvaluateError::Locked { path: path.to_path_buf() }),
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
        let bytes = bounded::read(path, MAX_BYTES).map_err(io)?;
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        let mut journal = Self { path: path.to_path_buf(), file };
        journal.file.set_len(whole as u64).map_err(io)?;
        journal.file.seek(SeekFrom::Start(whole as u64)).map_err(io)?;
        let mut lines = bytes[..whole].split(|b| *b == b'\n').filter(|line| !line.is_empty()).enumerate();
        let answers = match lines.next() {
            Some((_, head)) => {
                let head: Head = journal.line(0, head)?;
                check(path, settings, &head.settings)?;
                lines.map(|(i, line)| journal.line(i, line)).collect::<Result<_, _>>()?
            }
            None => {
                journal.append(&Head { settings: settings.clone() })?;
                Vec::new()
            }
        };
        if fresh && let Some(folder) = path.parent() {
            let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(io)?;
        }
        Ok((journal, answers))
    }

    /// Adds an answer; it is durable when this returns.
    pub(super) fn add(&mut self, answer: &Answer) -> Result<(), EvaluateError> {
        self.append(answer)
    }

    fn append(&mut self, line: &impl Serialize) -> Result<(), EvaluateError> {
        let io = |source| EvaluateError::Io { path: self.path.clone(), source };
        let mut text = serde_json::to_vec(line).map_err(|e| io(e.into()))?;
        text.push(b'\n');
        self.file.write_all(&text).and_then(|()| self.file.sync_data()).map_err(io)
    }

    fn line<T: serde::de::DeserializeOwned>(&self, number: usize, line: &[u8]) -> Result<T, EvaluateError> {
        serde_json::from_slice(line).map_err(|e| EvaluateError::Journal {
            path: self.path.clone(),
            line: number + 1,
            why: e.to_string(),
        })
    }
}

/// Errors: settings that differ, each with both values.
fn check(path: &Path, ours: &Settings, theirs: &Settings) -> Result<(), EvaluateError> {
    let names: std::collections::BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
    let shown = |settings: &Settings, name: &String| settings.get(name).cloned().unwrap_or_else(|| "nothing".into());
    let differences: Vec<String> = names
        .into_iter()
        .filter(|name| ours.get(*name) != theirs.get(*name))
        .map(|name| format!("{name}: expected {}, found {}", shown(ours, name), shown(theirs, name)))
        .collect();
    match differences.is_empty() {
        true => Ok(()),
        false => Err(EvaluateError::OtherAnswers { path: path.to_path_buf(), differences: differences.join("; ") }),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::super::End;
    use super::*;

    fn answer(question: usize) -> Answer {
        let text = format!("answer {question}\nöß");
        Answer { question, choice: 0, turn: 0, text, tokens: 3, prompt_tokens: 9, end: End::Stop, tstamp: 1.5 }
    }

    fn settings(seed: &str) -> Settings {
        Settings::from([("seed".into(), seed.into()), ("model".into(), "m".into())])
    }

    #[test]
    fn answers_come_back_whatever_a_crash_left_of_the_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = beside(&folder.path().join("a.jsonl"));
        let (mut journal, answers) = Journal::open(&path, &settings("1")).unwrap();
        assert!(answers.is_empty());
        (0..3).for_each(|i| journal.add(&answer(i)).unwrap());
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (mut journal, answers) = Journal::open(&path, &settings("1")).unwrap();
            let lines = whole[..cut].iter().filter(|b| **b == b'\n').count();
            assert_eq!(answers, (0..lines.saturating_sub(1)).map(answer).collect::<Vec<_>>(), "cut at {cut}");
            answers.iter().chain([&answer(7)]).last().map(|_| journal.add(&answer(7)).unwrap()).unwrap();
            drop(journal);
            assert_eq!(Journal::open(&path, &settings("1")).unwrap().1.last(), Some(&answer(7)));
        }
    }

    #[test]
    fn other_settings_and_other_writers_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.journal");
        let (journal, _) = Journal::open(&path, &settings("1")).unwrap();
        let error = Journal::open(&path, &settings("1")).unwrap_err();
        assert!(matches!(error, EvaluateError::Locked { .. }), "{error}");
        drop(journal);
        let error = Journal::open(&path, &settings("2")).unwrap_err().to_string();
        assert!(
            error.contains("seed: expected 2, found 1;")
                || error.ends_with("seed: expected 2, found 1")
                || error.contains("seed: expected 2, found 1"),
            "{error}"
        );
        let mut text = std::fs::read(&path).unwrap();
        text.extend(b"{\"question\": -1}\n");
        std::fs::write(&path, text).unwrap();
        let error = Journal::open(&path, &settings("1")).unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
    }
}
