//! Several writers open one folder at once: one gets it, the others are told so. And a reader beside a writer that works.

use crate::modes::Random;
use crate::process::{command, complete, differing, errand, exit, files, mode, options, reference, scratch, wait};
use crate::{seed, size};
use potstill_cache::{Cache, CacheWriter, Error};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Writers in a race.
const RACERS: usize = 4;
/// Exit code of a writer that was refused for another's sake.
const LOCKED: i32 = 5;

/// A file beside the folder, by which processes wait for each other.
fn sign(dir: &Path, name: &str) -> PathBuf {
    dir.parent().unwrap().join(name)
}

fn await_sign(path: &Path) {
    for _ in 0..30_000 {
        if path.exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("{}: never came", path.display());
}

#[test]
#[ignore = "a role: started by the campaigns"]
fn racer() {
    let Some((dir, number)) = errand() else { return };
    let mode = mode(number);
    await_sign(&sign(&dir, "go"));
    match CacheWriter::open(&dir, &mode.description, options()) {
        Ok(writer) => {
            // Holds the folder until all others were refused.
            await_sign(&sign(&dir, "finish"));
            complete(writer, &mode.given()).unwrap();
            std::process::exit(0);
        }
        Err(error) => exit(&error),
    }
}

#[test]
fn of_several_writers_one_writes_and_the_others_say_so() {
    let races = size("RACES", 5);
    for race in 0..races as usize {
        let parent = scratch();
        let dir = parent.path().join("cache");
        let mut racers: Vec<_> = (0..RACERS).map(|_| Some(command("races::racer", &dir, race).spawn().unwrap())).collect();
        std::thread::sleep(Duration::from_millis(5));
        std::fs::write(sign(&dir, "go"), "").unwrap();
        let mut refused = 0;
        for _ in 0..30_000 {
            for slot in &mut racers {
                if let Some(child) = slot
                    && child.try_wait().unwrap().is_some()
                {
                    let ended = slot.take().unwrap().wait_with_output().unwrap();
                    let text = String::from_utf8_lossy(&ended.stderr).into_owned();
                    assert_eq!(ended.status.code(), Some(LOCKED), "race {race}: {text}");
                    assert!(text.contains("another process is writing this cache"), "race {race}: {text}");
                    refused += 1;
                }
            }
            if refused == RACERS - 1 {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(refused, RACERS - 1, "race {race}: the others still wait, or more than one writes");
        std::fs::write(sign(&dir, "finish"), "").unwrap();
        let winner = racers.into_iter().flatten().next().unwrap();
        let ended = wait(winner, "the winner");
        assert!(ended.status.success(), "race {race}: {}", String::from_utf8_lossy(&ended.stderr));
        assert!(differing(&reference(race), &files(&dir)).is_empty(), "race {race}");
    }
    eprintln!("races: {races} of {RACERS} writers each; one wrote, the others ended with {LOCKED}");
}

#[test]
fn a_reader_beside_a_writer_sees_whole_rows_only() {
    let (trials, mut random) = (size("READERS", 3), Random(seed() ^ 0x7265_6164));
    let (mut opened, mut read) = (0u64, 0u64);
    for trial in 0..trials as usize {
        let parent = scratch();
        let dir = parent.path().join("cache");
        let stored = mode(trial).stored();
        let mut child = command("process::writer", &dir, trial).spawn().unwrap();
        let mut most = 0;
        loop {
            let ended = child.try_wait().unwrap().is_some();
            match Cache::open(&dir) {
                Ok(cache) => {
                    assert!(cache.len() >= most, "trial {trial}: {most} rows became {}", cache.len());
                    most = cache.len();
                    for row in 0..most {
                        let row = if random.below(2) == 0 { row } else { random.below(most as usize) as u64 };
                        assert_eq!(cache.row(row).unwrap(), stored[row as usize], "trial {trial}: row {row}");
                        read += 1;
                    }
                    opened += 1;
                }
                Err(Error::NoFolder { .. } | Error::NoManifest { .. }) => assert!(!ended, "trial {trial}: nothing was written"),
                Err(error) => panic!("trial {trial}: {error}"),
            }
            if ended {
                break;
            }
        }
        assert_eq!(most, stored.len() as u64, "trial {trial}");
    }
    eprintln!("readers beside a writer: {trials} writers, opened {opened} times, {read} rows read, all right");
}
