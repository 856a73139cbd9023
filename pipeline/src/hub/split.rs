//! Owns which files of a dataset a split means. Looks at paths alone: a dataset's card or loading script is not read.
//!
//! The rule is that of Hugging Face `datasets` for a repository without a script:
//!
//! 1. Where files are called `data/NAME-00000-of-00003*.*`, NAME is their split, and there are no others.
//! 2. Else, where a folder is called after a split (`train/…`, `my_train-1/…`), the folder says it.
//! 3. Else, where a file is called after a split (`train.jsonl`, `part-test-2.parquet`), the file says it.
//! 4. Else all files are `train`.
//!
//! In 2 and 3 a split's word stands alone between the ends of the name and any of `-._ 0123456789`; `train` is also called
//! `training`, `validation` also `valid`, `dev` and `val`, `test` also `testing`, `eval` and `evaluation`. Any other split goes by
//! its own word. Without a split, all files are taken. Never taken are files that begin with a dot or stand in a folder that
//! begins with a dot or `__`, other kinds of files than chats come in, and the hub's own `config.json`, `dataset_info.json`,
//! `dataset_infos.json` and `dataset_dict.json`.

use std::collections::{BTreeMap, BTreeSet};

/// JSON files that hold no rows.
const NO_ROWS: [&str; 4] = ["config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"];
/// What splits are also called.
const WORDS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];

/// The files of `paths` (paths in the repository) that `split` means, in order; else the splits that there are.
pub(super) fn files_of(paths: &[String], split: Option<&str>) -> Result<Vec<String>, Vec<String>> {
    let mut rows: Vec<&String> = paths.iter().filter(|path| holds_rows(path)).collect();
    rows.sort();
    let taken =
        |chosen: &dyn Fn(&str) -> bool| -> Vec<String> { rows.iter().filter(|p| chosen(p)).map(|p| p.to_string()).collect() };
    let Some(split) = split else {
        return if rows.is_empty() { Err(Vec::new()) } else { Ok(taken(&|_| true)) };
    };
    let sharded: BTreeSet<&str> = rows.iter().filter_map(|path| Some(shard_of(path)?.split)).collect();
    let words = |split: &str| WORDS.iter().find(|(known, _)| *known == split).map(|(_, words)| words.to_vec());
    let asked = words(split).unwrap_or_else(|| vec![split]);
    let (chosen, known): (Vec<String>, Vec<String>) = if !sharded.is_empty() {
        (taken(&|p| shard_of(p).is_some_and(|s| s.split == split)), sharded.iter().map(|s| s.to_string()).collect())
    } else {
        let named = |rule: fn(&str, &[&str]) -> bool| -> Vec<String> {
            let here = WORDS.iter().filter(|(_, words)| rows.iter().any(|path| rule(path, words)));
            let mut here: Vec<String> = here.map(|(known, _)| known.to_string()).collect();
            if words(split).is_none() && rows.iter().any(|path| rule(path, &asked)) {
                here.push(split.to_string());
            }
            here
        };
        match (named(folder_says), named(file_says)) {
            (known, _) if !known.is_empty() => (taken(&|p| folder_says(p, &asked)), known),
            (_, known) if !known.is_empty() => (taken(&|p| file_says(p, &asked)), known),
            _ if split == "train" => (taken(&|_| true), Vec::new()),
            _ if rows.is_empty() => (Vec::new(), Vec::new()),
            _ => (Vec::new(), vec!["train".into()]),
        }
    };
    if chosen.is_empty() { Err(known) } else { Ok(chosen) }
}

/// Files that the numbers in names say there must be, but are not among `paths`: of 3 with the second missing, `data/NAME-00001-of-00003*`.
pub(super) fn gaps(paths: &[String]) -> Vec<String> {
    let mut seen: BTreeMap<(&str, u32), BTreeSet<u32>> = BTreeMap::new();
    for shard in paths.iter().filter_map(|path| shard_of(path)) {
        seen.entry((shard.split, shard.of)).or_default().insert(shard.number);
    }
    let missing = seen.into_iter().flat_map(|((split, of), numbers)| {
        (0..of).filter(move |n| !numbers.contains(n)).map(move |n| format!("data/{split}-{n:05}-of-{of:05}*"))
    });
    missing.take(1000).collect()
}

/// What `data/NAME-00000-of-00003*.*` says.
struct Shard<'a> {
    split: &'a str,
    number: u32,
    of: u32,
}

fn shard_of(path: &str) -> Option<Shard<'_>> {
    let name = path.strip_prefix("data/").filter(|name| !name.contains('/'))?;
    // The last place counts, as a split may itself be called so.
    name.rmatch_indices("-of-").find_map(|(at, mark)| {
        let digits = |from: usize| name.get(from..from + 5).filter(|d| d.bytes().all(|b| b.is_ascii_digit()))?.parse().ok();
        let start = at.checked_sub(6).filter(|start| *start > 0 && name.as_bytes().get(*start) == Some(&b'-'))?;
        let (number, of) = (digits(start + 1)?, digits(at + mark.len())?);
        let dotted = name.get(at + mark.len() + 5..).is_some_and(|rest| rest.contains('.'));
        dotted.then(|| name.get(..start).map(|split| Shard { split, number, of }))?
    })
}

fn holds_rows(path: &str) -> bool {
    let (folders, name) = path.rsplit_once('/').unwrap_or(("", path));
    let hidden = name.starts_with('.') || folders.split('/').any(|part| part.starts_with('.') || part.starts_with("__"));
    !hidden && !NO_ROWS.contains(&name) && crate::data::holds_chats(name)
}

fn folder_says(path: &str, words: &[&str]) -> bool {
    let folders = path.rsplit_once('/').map_or("", |(folders, _)| folders);
    folders.split('/').any(|folder| words.iter().any(|word| stands_in(folder, word, Last::MayEnd)))
}

fn file_says(path: &str, words: &[&str]) -> bool {
    let name = path.rsplit_once('/').map_or(path, |(_, name)| name);
    words.iter().any(|word| stands_in(name, word, Last::MustGoOn))
}

/// Whether the word may be the name's end.
#[derive(Clone, Copy, PartialEq)]
enum Last {
    MayEnd,
    MustGoOn,
}

/// Whether `word` stands alone in `name`.
fn stands_in(name: &str, word: &str, last: Last) -> bool {
    let apart = |c: char| matches!(c, '-' | '.' | '_' | ' ') || c.is_ascii_digit();
    name.match_indices(word).any(|(at, _)| {
        let before = name.get(..at).and_then(|s| s.chars().next_back()).is_none_or(apart);
        let after = name.get(at + word.len()..).and_then(|s| s.chars().next());
        before && after.map_or(last == Last::MayEnd, apart)
    })
}
