//! A writer killed at random moments, again and again until it is done: what is there after each kill is whole, nothing that was
//! durable is lost, and the end is byte-identical to a run that nobody killed.

use crate::modes::Random;
use crate::process::{command, differing, files, mode, reference, scratch, wait};
use crate::{seed, size};
use potstill_cache::{Cache, Error, ScanProgress, verify};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};

const ROLE: &str = "process::writer";
const SIGKILL: i32 = 9;

/// How long a writer runs when it is let alone: the quickest of three.
fn run_time(number: usize) -> Duration {
    let once = || {
        let dir = scratch();
        let since = Instant::now();
        let done = wait(command(ROLE, dir.path(), number).spawn().unwrap(), "an undisturbed writer");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        since.elapsed()
    };
    (0..3).map(|_| once()).min().unwrap()
}

/// What is there is whole. Gives the rows that readers have, and those that a writer would not write again.
fn look(dir: &Path, what: &str) -> (u64, u64) {
    match Cache::open(dir) {
        Ok(cache) => {
            let report = verify(dir, &ScanProgress::default()).unwrap();
            assert!(report.is_good(), "{what}: {:?}", report.problems);
            let pieces: u64 = cache.manifest().parts.iter().map(|part| part.rows).sum();
            (cache.len(), cache.len() + pieces)
        }
        Err(Error::NoFolder { .. } | Error::NoManifest { .. }) => (0, 0),
        Err(error) => panic!("{what}: {error}"),
    }
}

#[test]
fn a_killed_writer_loses_nothing_and_ends_byte_identical() {
    let (kills, mut random) = (size("KILLS", 40), Random(seed()));
    let (mut done, mut rounds, mut in_writing) = (0u64, 0u64, 0u64);
    while done < kills {
        let number = rounds as usize;
        rounds += 1;
        let (expected, whole) = (reference(number), run_time(number));
        let parent = scratch();
        let dir = parent.path().join("cache");
        let mut durable = (0, 0);
        loop {
            let what = format!("seed {}, round {rounds} ({}), after kill {done}", seed(), mode(number).name);
            let mut child = command(ROLE, &dir, number).spawn().unwrap();
            std::thread::sleep(whole.mul_f64(random.unit()));
            // Of a process that has ended by itself nothing is left to kill; then this says so.
            let _ = child.kill();
            let ended = wait(child, &what);
            let after = look(&dir, &what);
            assert!(after.0 >= durable.0 && after.1 >= durable.1, "{what}: {durable:?} rows became {after:?}");
            durable = after;
            if ended.status.signal() == Some(SIGKILL) {
                done += 1;
                in_writing += u64::from(dir.join("cache.lock").exists());
                continue;
            }
            assert!(ended.status.success(), "{what}: {}", String::from_utf8_lossy(&ended.stderr));
            let found = differing(&expected, &files(&dir));
            assert!(found.is_empty(), "{what}: {found:?} differ from an uninterrupted run");
            break;
        }
    }
    assert!(in_writing * 4 > done, "{in_writing} of {done} kills came when the folder was there");
    eprintln!("kills: {done} in {rounds} rounds, {in_writing} of them beyond the lock; 0 torn, 0 lost, 0 differing bytes");
}
