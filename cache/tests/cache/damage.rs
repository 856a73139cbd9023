//! Damage of any kind is reported, and no damaged row is ever returned as if it were good.

use crate::made::{self, errors_or_equal};
use potstill_cache::{Cache, Error, ErrorClass, ScanProgress, VerifyReport, verify};
use std::path::Path;

fn report(dir: &Path) -> VerifyReport {
    let progress = ScanProgress::default();
    let report = verify(dir, &progress).unwrap();
    let (done, total) = progress.rows();
    assert_eq!(done, total);
    report
}

#[test]
fn a_good_cache_has_no_problems() {
    let (dir, stored) = made::cache(10, 4, 4);
    let found = report(dir.path());
    assert_eq!((found.problem_count, found.problems.len(), found.good_rows, found.rows, found.shards), (0, 0, 10, 10, 3));
    assert!(found.complete && found.unlisted.is_empty() && found.repeated_rows == 0);
    assert_eq!(errors_or_equal(dir.path(), &stored), 0);
}

#[test]
fn every_flipped_bit_of_a_shard_is_found() {
    made::quiet();
    let (dir, stored) = made::cache(6, 6, 4);
    let path = dir.path().join("shard-00000.parquet");
    let good = std::fs::read(&path).unwrap();
    // 1,009 is prime, so the flips fall on all bits of a byte and all parts of the file: pages, headers, indexes, footer.
    let step = (good.len() * 8 / 1009).max(1) | 1;
    let (mut flips, mut unread) = (0, 0);
    for bit in (0..good.len() * 8).step_by(step) {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&path, &bad).unwrap();
        let found = report(dir.path());
        assert!(!found.is_good(), "bit {bit} of {} went unnoticed", good.len() * 8);
        assert!(found.problems.iter().all(|p| p.file == "shard-00000.parquet"));
        // Some flips change nothing that a reader looks at; those rows come back equal. None comes back wrong.
        unread += usize::from(errors_or_equal(dir.path(), &stored) == 0);
        flips += 1;
    }
    assert!(flips >= 900, "{flips} flips");
    assert!(unread < flips / 2, "{unread} of {flips} flips left every row readable");
}

#[test]
fn every_changed_byte_of_the_manifest_is_found() {
    let (dir, _) = made::cache(3, 2, 4);
    let path = dir.path().join("manifest.json");
    let good = std::fs::read(&path).unwrap();
    for i in 0..good.len() {
        let mut bad = good.clone();
        bad[i] ^= 1 << (i % 8);
        std::fs::write(&path, &bad).unwrap();
        let error = Cache::open(dir.path()).unwrap_err();
        assert_eq!(error.class(), ErrorClass::Integrity, "byte {i}: {error}");
        assert!(!report(dir.path()).is_good());
    }
    for bad in [&good[..good.len() - 1], &[&good[..], b"\n"].concat(), &[b" ", &good[..]].concat(), b""] {
        std::fs::write(&path, bad).unwrap();
        assert_eq!(Cache::open(dir.path()).unwrap_err().class(), ErrorClass::Integrity);
    }
    std::fs::write(&path, &good).unwrap();
    assert!(report(dir.path()).is_good());
}

#[test]
fn truncated_swapped_doubled_and_missing_shards_are_found() {
    made::quiet();
    let (dir, stored) = made::cache(9, 3, 4);
    let [a, b] = [0, 1].map(|i| dir.path().join(format!("shard-{i:05}.parquet")));
    let (first, second) = (std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
    let check = |what: &str| {
        let found = report(dir.path());
        assert!(!found.is_good(), "{what}");
        assert_eq!(Cache::open(dir.path()).unwrap_err().class(), ErrorClass::Integrity, "{what}");
        assert!(errors_or_equal(dir.path(), &stored) > 0, "{what}");
        found
    };
    for cut in [0, 1, first.len() / 2, first.len() - 1] {
        std::fs::write(&a, &first[..cut]).unwrap();
        let found = check("truncated");
        // The other two shards have been looked at all the same.
        assert_eq!((found.problem_count, found.good_rows), (1, 6));
        assert_eq!(found.problems[0].expected, format!("{} bytes", first.len()));
    }
    std::fs::write(&a, [&first[..], b"x"].concat()).unwrap();
    check("lengthened");
    std::fs::write(&a, &second).unwrap();
    check("doubled");
    std::fs::write(&b, &first).unwrap();
    check("swapped");
    std::fs::remove_file(&b).unwrap();
    std::fs::write(&a, &first).unwrap();
    let found = check("missing");
    assert_eq!((found.problems[0].expected.as_str(), found.problems[0].found.as_str()), ("this shard", "no such file"));
}

#[test]
fn zeroed_blocks_are_found_and_located() {
    made::quiet();
    let (dir, stored) = made::cache(80, 80, 6);
    let path = dir.path().join("shard-00000.parquet");
    let good = std::fs::read(&path).unwrap();
    let mut located = 0;
    for start in (0..good.len()).step_by(good.len() / 40) {
        let mut bad = good.clone();
        let end = (start + 64).min(good.len());
        bad[start..end].fill(0);
        std::fs::write(&path, &bad).unwrap();
        let found = report(dir.path());
        assert!(!found.is_good());
        located += usize::from(found.problems.iter().any(|p| p.row.is_some() && p.row_group.is_some()));
        errors_or_equal(dir.path(), &stored);
    }
    assert!(located > 20, "{located} of 40 blocks were traced to a row");
}

#[test]
fn companions_and_strangers_are_seen() {
    let (dir, _) = made::cache(3, 3, 4);
    std::fs::write(dir.path().join("tokenizer/tokenizer.json"), "{\"model\": 2}").unwrap();
    std::fs::write(dir.path().join("shard-00007.parquet"), "").unwrap();
    let found = report(dir.path());
    assert_eq!((found.problem_count, found.problems[0].file.as_str()), (1, "tokenizer/tokenizer.json"));
    assert_eq!(found.unlisted, ["shard-00007.parquet"]);
    let error = Cache::open(dir.path()).unwrap().companion("tokenizer/tokenizer.json").unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
}

#[test]
fn a_conversation_told_twice_is_no_damage() {
    let dir = tempfile::tempdir().unwrap();
    let mut records = made::records(2, 4);
    records.push(potstill_cache::Record { seq_id: 99, ..records[0].clone() });
    made::write(dir.path(), &made::description(3, 2, 4), &records);
    let found = report(dir.path());
    assert_eq!((found.problem_count, found.repeated_rows), (0, 1));
    assert_eq!(Cache::open(dir.path()).unwrap().find(&records[2].key()).unwrap(), Some(0));
}
