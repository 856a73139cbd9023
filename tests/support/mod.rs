//! Running the binary on copies of the reference models.
#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// What a run of the binary gave.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// The sentence after `error: `.
    pub fn error(&self) -> &str {
        self.stderr.lines().find_map(|line| line.strip_prefix("error: ")).unwrap_or_else(|| panic!("no error in {self:?}"))
    }

    /// Standard output as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// A scratch folder in which commands run, with the reference data beside it.
pub struct Bench {
    folder: TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The binary, ready to run in the scratch folder.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_potstill"));
        command.current_dir(self.folder.path()).env("NO_COLOR", "1").env_remove("RUST_BACKTRACE").args(arguments);
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Ran {
        let output = self.command(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ran { code: output.status.code().unwrap_or(-1), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Runs and insists on the exit code.
    pub fn expect(&self, code: i32, arguments: &[&str]) -> Ran {
        let ran = self.run(arguments);
        assert_eq!(ran.code, code, "{arguments:?}: {ran:?}");
        ran
    }

    /// Copies a folder of the reference data into the scratch folder.
    pub fn copy(&self, golden_folder: &str, name: &str) -> PathBuf {
        let to = self.path(name);
        std::fs::create_dir_all(&to).unwrap();
        for entry in std::fs::read_dir(golden(golden_folder)).unwrap() {
            let from = entry.unwrap().path();
            std::fs::copy(&from, to.join(from.file_name().unwrap())).unwrap();
        }
        to
    }

    /// A cache of the reference chats by the reference teacher. The one chat with nothing to learn from makes it exit 3.
    pub fn cache(&self, name: &str) {
        self.expect(3, &precompute(name));
    }
}

/// A file or folder of the reference data, as text for an argument.
pub fn golden(name: &str) -> String {
    format!("{}/tests/fixtures/golden/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Arguments that score the reference chats in shards of 8 rows.
pub fn precompute(cache: &str) -> Vec<&str> {
    let mut arguments = vec!["precompute", "--teacher", TEACHER.as_str(), "--data", CHATS.as_str(), "--cache", cache];
    arguments.extend(["--max-length", "256", "--top-k", "16", "--rows-per-shard", "8", "--pack-tokens", "512", "--quiet"]);
    arguments
}

pub static TEACHER: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| golden("teacher-awq"));
pub static STUDENT: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| golden("student"));
pub static CHATS: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| golden("chats.jsonl"));

/// Every file below a folder: relative name → bytes.
pub fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(current) = open.pop() {
        for entry in std::fs::read_dir(&current).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_string_lossy().into_owned();
                all.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    all
}

/// Changes a JSON file in place.
pub fn edit_json(path: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let mut value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    std::fs::write(path, serde_json::to_vec(&value).unwrap()).unwrap();
}

/// Waits until `path` exists or the child ends; whether the child was still running then.
pub fn wait_for(child: &mut Child, path: &Path) -> bool {
    let started = Instant::now();
    while !path.exists() && started.elapsed() < Duration::from_secs(120) {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    child.try_wait().unwrap().is_none()
}
