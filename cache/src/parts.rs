//! A folder of parts: what N workers write side by side, each a cache in a folder of its own that is named after the worker.
//!
//! ```text
//! caches/ultrachat/                    no cache itself
//!   worker-00000-of-00003/             a cache each, of one share of the data: manifest, shards, lock
//!   worker-00001-of-00003/
//!   worker-00002-of-00003/
//! ```
//!
//! Owns these names and the question whether all of them are there and finished. Workers count from 0, as the engines that start them
//! do, and the folder bears the number of the engine's log; digits are filled up so that a listing is in the order of the data; `of`
//! keeps parts of 3 and of 4 workers apart. It is not called `part-…`: pieces of a shard under way are, inside of a cache, and a
//! manifest's `part` counts from 1. The one idea: a worker that has nothing to do leaves an empty, complete cache, so that what is
//! missing is what has not run. Other files in the folder, such as logs, are nobody's business.

use crate::manifest::{MANIFEST_FILE, Manifest};
use crate::{Error, Result, writer};
use std::path::{Path, PathBuf};

/// Most parts that a sentence names.
const MOST_NAMED: usize = 8;

/// One of N workers that share the data; as text the name of its folder, `worker-00001-of-00003`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct WorkerFolder {
    /// Of how many.
    pub of: u32,
    /// Which one, from 0.
    pub index: u32,
}

impl std::fmt::Display for WorkerFolder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "worker-{:05}-of-{:05}", self.index, self.of)
    }
}

impl WorkerFolder {
    /// Reads exactly the name that such a folder is given.
    pub fn from_name(name: &str) -> Option<Self> {
        let (index, of) = name.strip_prefix("worker-")?.split_once("-of-")?;
        let found = Self { index: index.parse().ok()?, of: of.parse().ok()? };
        (found.index < found.of && found.to_string() == name).then_some(found)
    }

    /// Where this worker writes below `dir`. Only names are looked at, and nothing is written.
    ///
    /// Errors: `dir` is itself a cache, or holds the part of another number of workers, whose shares are cut elsewhere.
    pub fn place(self, dir: &Path) -> Result<PathBuf> {
        if !dir.is_dir() {
            return Ok(dir.join(self.to_string()));
        }
        if dir.join(MANIFEST_FILE).exists() {
            let expected = "a folder for the workers' parts, not a cache".into();
            return Err(Error::Setting { name: "cache", found: dir.display().to_string(), expected });
        }
        match folders(dir)?.into_iter().find(|other| other.of != self.of) {
            Some(other) => {
                let plural = if other.of == 1 { "" } else { "s" };
                let expected = format!(
                    "one of {} worker{plural}, for {} is there already; go on with as many, or give another --cache",
                    other.of,
                    dir.join(other.to_string()).display()
                );
                Err(Error::Setting { name: "worker", found: format!("{}/{}", self.index, self.of), expected })
            }
            None => Ok(dir.join(self.to_string())),
        }
    }
}

/// The workers that have begun in `dir`, by rising number of workers and of the worker.
fn folders(dir: &Path) -> Result<Vec<WorkerFolder>> {
    let named = writer::names(dir)?.into_iter().filter_map(|name| WorkerFolder::from_name(&name));
    let mut found: Vec<WorkerFolder> = named.filter(|folder| dir.join(folder.to_string()).is_dir()).collect();
    found.sort();
    Ok(found)
}

/// The caches that `source` stands for: itself, or the parts in it, all of them and all finished.
///
/// Errors: `Incomplete`, which names the workers whose parts are missing or unfinished; parts of several numbers of workers; damage.
pub(crate) fn caches(source: &Path) -> Result<Vec<PathBuf>> {
    if !source.is_dir() || source.join(MANIFEST_FILE).exists() {
        return Ok(vec![source.to_path_buf()]);
    }
    let found = folders(source)?;
    let Some(of) = found.first().map(|folder| folder.of) else { return Ok(vec![source.to_path_buf()]) };
    if let Some(other) = found.iter().find(|folder| folder.of != of) {
        return Err(Error::Incomplete {
            dir: source.to_path_buf(),
            missing: format!("holds parts of {of} and of {} workers", other.of),
            advice: "name the parts that belong together, or remove the others",
        });
    }
    let mut unfinished = Vec::new();
    for index in 0..of {
        // A folder may claim any number of workers; what is absent costs a sentence, not a list.
        if unfinished.len() > MOST_NAMED {
            break;
        }
        unfinished.extend(unfinished_part(source, WorkerFolder { of, index })?);
    }
    if unfinished.is_empty() {
        return Ok(found.iter().map(|folder| source.join(folder.to_string())).collect());
    }
    if unfinished.len() > MOST_NAMED {
        unfinished.truncate(MOST_NAMED);
        unfinished.push("and more".into());
    }
    let missing = format!("not all parts of {of} workers are finished: {}", unfinished.join(", "));
    Err(Error::Incomplete { dir: source.to_path_buf(), missing, advice: "run the command of these workers again" })
}

/// What is to be said of a worker's part that is not finished.
fn unfinished_part(dir: &Path, folder: WorkerFolder) -> Result<Option<String>> {
    let index = folder.index;
    match Manifest::load(&dir.join(folder.to_string())) {
        Err(Error::NoFolder { .. } | Error::NoManifest { .. }) => Ok(Some(format!("worker {index} has not begun"))),
        Err(error) => Err(error),
        Ok(manifest) if manifest.complete => Ok(None),
        Ok(manifest) => {
            let (rows, expected) = (manifest.rows() + manifest.part_rows(), manifest.description.expected_rows);
            Ok(Some(format!("worker {index} has {rows} of {expected} rows")))
        }
    }
}

/// The error of a folder without a manifest: where it is one of parts, that they have yet to be joined.
pub(crate) fn no_manifest(dir: &Path) -> Error {
    // A folder that cannot be listed has no manifest either, as far as one can tell.
    match folders(dir).unwrap_or_default().is_empty() {
        false => Error::OnlyParts { dir: dir.to_path_buf() },
        true => Error::NoManifest { dir: dir.to_path_buf() },
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::fingerprint::tests_description;
    use crate::{CacheWriter, Part, Selection, Values, WriterOptions};

    /// The folder of one worker's part, begun, with `rows` expected; complete where that is none.
    fn begin(dir: &Path, index: u32, of: u32, rows: u64) {
        let mut description = tests_description(Selection::TopK { k: 2 }, Values::Logprob);
        (description.expected_rows, description.part) = (rows, Some(Part { number: index + 1, of }));
        let folder = WorkerFolder { index, of }.place(dir).unwrap();
        let writer = CacheWriter::open(&folder, &description, WriterOptions::default()).unwrap();
        if rows == 0 {
            assert!(writer.finish().unwrap().complete);
        }
    }

    #[test]
    fn names_are_read_back_exactly_and_sort_by_number() {
        let names: Vec<String> = [0, 1, 2, 10, 99].map(|index| WorkerFolder { index, of: 100 }.to_string()).to_vec();
        assert!(names.is_sorted(), "{names:?}");
        assert_eq!(names[3], "worker-00010-of-00100");
        for (index, of) in [(0, 1), (7, 8), (99_999, 100_000), (u32::MAX - 1, u32::MAX)] {
            let folder = WorkerFolder { index, of };
            assert_eq!(WorkerFolder::from_name(&folder.to_string()), Some(folder));
        }
        let wrong =
            ["worker-00003-of-00003", "worker-1-of-3", "worker-00001-of-3", "worker-00000-of-00000", "part-00000-of-00001"];
        for wrong in wrong.into_iter().chain(["worker-+0001-of-00003", "worker-00001-of-00003.old", "worker-00001", ""]) {
            assert_eq!(WorkerFolder::from_name(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_is_missing_or_unfinished_is_named() {
        let bench = tempfile::tempdir().unwrap();
        let dir = bench.path();
        assert_eq!(caches(dir).unwrap(), [dir], "a folder without parts stands for itself, and is refused as what it is");
        begin(dir, 0, 4, 0);
        begin(dir, 2, 4, 7);
        std::fs::create_dir(dir.join("worker-00003-of-00004")).unwrap();
        std::fs::create_dir(dir.join("logs")).unwrap();
        let error = caches(dir).unwrap_err().to_string();
        let expected = "not all parts of 4 workers are finished: worker 1 has not begun, worker 2 has 0 of 7 rows, \
                        worker 3 has not begun; run the command of these workers again";
        assert_eq!(error, format!("{}: {expected}", dir.display()));
        std::fs::remove_dir_all(dir.join("worker-00002-of-00004")).unwrap();
        std::fs::remove_dir(dir.join("worker-00003-of-00004")).unwrap();
        [1, 2, 3].iter().for_each(|&index| begin(dir, index, 4, 0));
        let all = [0, 1, 2, 3].map(|index| dir.join(format!("worker-0000{index}-of-00004")));
        assert_eq!(caches(dir).unwrap(), all);
        assert_eq!(caches(&all[1]).unwrap(), [all[1].clone()]);
        let error = crate::Cache::open(dir).err().unwrap().to_string();
        let expected = "holds workers' parts and is no cache itself; join them first: combine --out OUT";
        assert_eq!(error, format!("{0}: {expected} {0}", dir.display()));
    }

    #[test]
    fn a_folder_that_claims_many_workers_costs_one_sentence() {
        let bench = tempfile::tempdir().unwrap();
        std::fs::create_dir(bench.path().join("worker-00000-of-4294967295")).unwrap();
        let error = caches(bench.path()).unwrap_err().to_string();
        assert!(error.contains("worker 7 has not begun, and more; run") && !error.contains("worker 8"), "{error}");
    }

    #[test]
    fn shares_of_other_numbers_of_workers_do_not_mix() {
        let bench = tempfile::tempdir().unwrap();
        let dir = bench.path();
        begin(dir, 1, 2, 0);
        let error = WorkerFolder { index: 1, of: 3 }.place(dir).unwrap_err().to_string();
        assert!(error.starts_with("worker = 1/3: expected one of 2 workers, for ") && error.contains("worker-00001-of-00002"));
        std::fs::create_dir(dir.join("worker-00000-of-00003")).unwrap();
        let error = caches(dir).unwrap_err().to_string();
        assert!(error.contains("holds parts of 2 and of 3 workers; name the parts that belong together"), "{error}");
        let error = WorkerFolder { index: 0, of: 2 }.place(&dir.join("worker-00001-of-00002")).unwrap_err().to_string();
        assert!(error.ends_with("expected a folder for the workers' parts, not a cache"), "{error}");
        // A writer that is given the folder of parts itself refuses it, and says what it is.
        let description = tests_description(Selection::TopK { k: 2 }, Values::Logprob);
        let error = CacheWriter::open(dir, &description, WriterOptions::default()).unwrap_err().to_string();
        assert!(error.ends_with("it is a folder of workers' parts: give --worker too, or another folder"), "{error}");
    }
}
