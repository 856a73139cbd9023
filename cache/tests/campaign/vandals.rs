//! Shards truncated, removed, replaced and rewritten under a reader that is at work: it gets an error or the right row, and lives.
//! The reader is a process of its own, since what is feared is a signal.

use crate::modes::Random;
use crate::process::{command, errand, files, mode, scratch, wait, write};
use crate::{seed, size};
use potstill_cache::{Cache, ScanProgress, verify};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a reader is disturbed.
const TRIAL: Duration = Duration::from_millis(400);

#[test]
#[ignore = "a role: started by the campaigns"]
fn reader() {
    let Some((dir, number)) = errand() else { return };
    let stored = mode(number).stored();
    let mut random = Random(number as u64);
    let stop = dir.parent().unwrap().join("stop");
    let (mut right, mut wrong) = (0u64, 0u64);
    while !stop.exists() {
        let Ok(cache) = Cache::open(&dir) else {
            wrong += 1;
            continue;
        };
        // One opening serves for a while, so that files change behind the map and the page table that it holds.
        for _ in 0..40 {
            let row = random.below(stored.len());
            match cache.row(row as u64) {
                Ok(found) => {
                    assert_eq!(found, stored[row], "row {row} came back wrong without an error");
                    right += 1;
                }
                Err(_) => wrong += 1,
            }
            let _ = cache.find(&stored[row].key());
        }
        if random.below(8) == 0 {
            let _ = verify(&dir, &ScanProgress::default());
        }
    }
    eprintln!("{right} {wrong}");
    std::process::exit(0);
}

/// Does one thing to one shard.
fn disturb(dir: &Path, good: &BTreeMap<String, Vec<u8>>, random: &mut Random) {
    let shards: Vec<&String> = good.keys().filter(|name| name.ends_with(".parquet")).collect();
    let name = shards[random.below(shards.len())];
    let (path, bytes) = (dir.join(name), &good[name]);
    let beside = dir.parent().unwrap().join("beside");
    match random.below(7) {
        0 => {
            if let Ok(file) = std::fs::OpenOptions::new().write(true).open(&path) {
                file.set_len(random.below(bytes.len()) as u64).unwrap();
            }
        }
        1 => drop(std::fs::remove_file(&path)),
        2 => {
            // Another file of the same size under this name.
            let mut other = bytes.clone();
            let at = random.below(other.len());
            other[at..].iter_mut().for_each(|byte| *byte ^= 0x55);
            std::fs::write(&beside, other).unwrap();
            std::fs::rename(&beside, &path).unwrap();
        }
        3 => {
            std::fs::write(&beside, &good[shards[random.below(shards.len())]]).unwrap();
            std::fs::rename(&beside, &path).unwrap();
        }
        // Truncated and written again in place.
        4 | 5 => std::fs::write(&path, bytes).unwrap(),
        _ => {
            for name in &shards {
                std::fs::write(&beside, &good[*name]).unwrap();
                std::fs::rename(&beside, dir.join(name)).unwrap();
            }
        }
    }
}

#[test]
fn shards_that_change_under_a_reader_are_errors_and_no_crash() {
    let (trials, mut random) = (size("VANDALS", 3), Random(seed() ^ 0x7661_6e64));
    let (mut right, mut wrong, mut disturbed) = (0u64, 0u64, 0u64);
    for trial in 0..trials as usize {
        let parent = scratch();
        let dir = parent.path().join("cache");
        write(&dir, &mode(trial)).unwrap();
        let good = files(&dir);
        let child = command("vandals::reader", &dir, trial).spawn().unwrap();
        let since = Instant::now();
        while since.elapsed() < TRIAL {
            disturb(&dir, &good, &mut random);
            disturbed += 1;
            std::thread::sleep(Duration::from_micros(random.below(3000) as u64));
        }
        std::fs::write(parent.path().join("stop"), "").unwrap();
        let ended = wait(child, "a reader");
        let text = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(ended.status.success(), "seed {}, trial {trial}: the reader ended with {}: {text}", seed(), ended.status);
        let counts: Vec<u64> = text.split_whitespace().rev().take(2).map(|n| n.parse().unwrap()).collect();
        (wrong, right) = (wrong + counts[0], right + counts[1]);
    }
    assert!(right > 0 && wrong > 0, "{right} rows, {wrong} errors: the reader was not disturbed, or not at all at work");
    eprintln!("vandals: {trials} readers, disturbed {disturbed} times: {right} right rows, {wrong} errors, 0 wrong, 0 crashes");
}
