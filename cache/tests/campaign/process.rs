//! This very test binary as a process of its own, so that it can be killed, held back and run out of disk: an ignored test each
//! role, which does nothing unless it was started from here.

pub use crate::made::files;
use crate::modes::{Mode, modes};
use potstill_cache::{CacheWriter, Companion, Error, ErrorClass, Manifest, Record, WriterOptions};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Rows of the cache that is written: three shards, the last one short.
pub const ROWS: u64 = 11;
/// Rows in a shard.
pub const ROWS_PER_SHARD: u32 = 4;
/// After this many rows a piece of a shard is made durable: not a divisor of the shard's rows, so that pieces differ.
const ROWS_PER_PIECE: usize = 3;

const DIR: &str = "POTSTILL_CAMPAIGN_CHILD_DIR";
const MODE: &str = "POTSTILL_CAMPAIGN_CHILD_MODE";

/// A process in the role of `test`, in the folder `dir`.
pub fn command(test: &str, dir: &Path, mode: usize) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    command.env(DIR, dir).env(MODE, mode.to_string()).env("RUST_BACKTRACE", "0");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// The folder and mode that a process was started with; nothing in an ordinary run of all ignored tests.
pub fn errand() -> Option<(PathBuf, usize)> {
    let dir = std::env::var_os(DIR)?;
    Some((dir.into(), std::env::var(MODE).unwrap().parse().unwrap()))
}

/// The process ends within a minute, or it hangs.
pub fn wait(child: Child, what: &str) -> Output {
    let mut child = child;
    let since = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if since.elapsed() > Duration::from_secs(60) {
            child.kill().unwrap();
            panic!("{what}: hung: {}", String::from_utf8_lossy(&child.wait_with_output().unwrap().stderr));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output().unwrap()
}

/// The way to store with this number, as all processes write it.
pub fn mode(number: usize) -> Mode {
    let mut all = modes(ROWS, ROWS_PER_SHARD);
    let number = number % all.len();
    all.swap_remove(number)
}

/// The companion beside it.
pub fn options() -> WriterOptions {
    WriterOptions { companions: vec![Companion { path: "tokenizer/tokenizer.json".into(), bytes: b"{\"model\": 1}".repeat(9) }] }
}

/// Appends what is missing, with pieces on the way, and finishes.
pub fn complete(writer: CacheWriter, given: &[Record]) -> potstill_cache::Result<Manifest> {
    let mut writer = writer;
    let keys = writer.committed_keys()?;
    assert_eq!(keys.len() as u64, writer.committed_rows());
    assert!(keys.iter().zip(given).all(|(key, record)| *key == record.key()), "the rows there are others");
    for (row, record) in given.iter().enumerate().skip(keys.len()) {
        writer.append(record)?;
        if row % ROWS_PER_PIECE == ROWS_PER_PIECE - 1 {
            writer.seal()?;
        }
    }
    writer.finish()
}

/// Writes the cache or what is missing of it.
pub fn write(dir: &Path, mode: &Mode) -> potstill_cache::Result<Manifest> {
    complete(CacheWriter::open(dir, &mode.description, options())?, &mode.given())
}

/// Ends the process as the command line would.
pub fn exit(error: &Error) -> ! {
    eprintln!("{error}");
    std::process::exit(match error.class() {
        ErrorClass::Runtime => 1,
        ErrorClass::Locked => 5,
        _ => 9,
    })
}

#[test]
#[ignore = "a role: started by the campaigns"]
fn writer() {
    let Some((dir, number)) = errand() else { return };
    match write(&dir, &mode(number)) {
        Ok(_) => std::process::exit(0),
        Err(error) => exit(&error),
    }
}

/// A folder in memory, where there is room for one: what a kill leaves does not depend on the disk, and a sync is quick there.
/// `TMPDIR` chooses another place.
pub fn scratch() -> tempfile::TempDir {
    let memory = match std::env::var_os("TMPDIR") {
        Some(chosen) => tempfile::tempdir_in(chosen),
        None => tempfile::Builder::new().prefix("potstill-").tempdir_in("/dev/shm"),
    };
    memory.or_else(|_| tempfile::tempdir()).unwrap()
}

/// Names of the files in which two folders differ.
pub fn differing(a: &BTreeMap<String, Vec<u8>>, b: &BTreeMap<String, Vec<u8>>) -> Vec<String> {
    let names: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    names.into_iter().filter(|name| a.get(*name) != b.get(*name)).cloned().collect()
}

/// The files of a cache that nothing interrupted.
pub fn reference(number: usize) -> BTreeMap<String, Vec<u8>> {
    let whole = scratch();
    write(whole.path(), &mode(number)).unwrap();
    files(whole.path())
}
