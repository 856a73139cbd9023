//! A check can be quick, full or a sample: each finds what it looks at, the samples together find all, and a list says what to
//! compute again.

use crate::made;
use potstill_cache::{
    CacheWriter, DamagedRow, Error, ErrorClass, ManifestState, RepairList, ScanProgress, ShardDamage, VerifyMode, VerifyReport,
    verify_as,
};
use std::path::Path;

const ROWS: u64 = 30;
const PER_SHARD: u32 = 8;
const K: u16 = 6;

fn report(dir: &Path, mode: VerifyMode) -> VerifyReport {
    let progress = ScanProgress::default();
    let report = verify_as(dir, mode, &progress).unwrap();
    let ((rows, of_rows), (bytes, of_bytes)) = (progress.rows(), progress.bytes());
    assert_eq!((rows, bytes), (of_rows, of_bytes));
    report
}

fn sample(number: u32, of: u32) -> VerifyMode {
    VerifyMode::Sample { number, of }
}

/// Overwrites 24 bytes at this share of what lies before the footer: pages up to some four fifths of it, then their index.
fn spoil(path: &Path, share: f64) {
    let mut bytes = std::fs::read(path).unwrap();
    let end = bytes.len() - u32::from_le_bytes(bytes[bytes.len() - 8..bytes.len() - 4].try_into().unwrap()) as usize - 8;
    let at = (end as f64 * share) as usize;
    bytes[at..(at + 24).min(end)].fill(0);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_good_cache_is_good_in_every_mode() {
    let (dir, _) = made::cache(ROWS, PER_SHARD, K);
    let quick = report(dir.path(), VerifyMode::Quick);
    assert_eq!((quick.is_good(), quick.rows, quick.checked_rows, quick.good_rows, quick.shards), (true, ROWS, 0, 0, 4));
    for of in [1, 2, 7, 31] {
        let samples: Vec<VerifyReport> = (1..=of).map(|number| report(dir.path(), sample(number, of))).collect();
        assert!(samples.iter().all(VerifyReport::is_good));
        assert_eq!(samples.iter().map(|r| r.checked_rows).sum::<u64>(), ROWS);
        assert_eq!(samples.iter().map(|r| r.good_rows).sum::<u64>(), ROWS);
    }
    let full = report(dir.path(), VerifyMode::Full);
    assert_eq!((full.good_rows, full.checked_rows), (ROWS, ROWS));
    assert!(RepairList::of(&full).shards.is_empty());
    for wrong in [sample(0, 3), sample(4, 3)] {
        let error = verify_as(dir.path(), wrong, &ScanProgress::default()).unwrap_err();
        assert!(error.to_string().contains("expected N/T with N from 1 to T"), "{error}");
    }
}

#[test]
fn samples_together_find_what_the_full_check_finds() {
    made::quiet();
    for share in [0.05, 0.2, 0.4, 0.6, 0.75] {
        let (dir, _) = made::cache(ROWS, PER_SHARD, K);
        spoil(&dir.path().join("shard-00002.parquet"), share);
        let full = report(dir.path(), VerifyMode::Full);
        assert!(!full.is_good());
        let [damage] = &full.damaged_shards[..] else { panic!("{:?}", full.damaged_shards) };
        assert_eq!((damage.file.as_str(), damage.first_row, damage.rows, damage.whole), ("shard-00002.parquet", 16, 8, false));
        // The bytes of all pages may change without a footer that says so.
        assert!(report(dir.path(), VerifyMode::Quick).is_good());
        for of in [2, 5] {
            let mut damaged: Vec<DamagedRow> = Vec::new();
            let mut digests = 0;
            for number in 1..=of {
                let found = report(dir.path(), sample(number, of));
                let rows = found.damaged_shards.iter().flat_map(|shard| shard.damaged.iter().copied());
                damaged.extend(rows);
                digests += found.problems.iter().filter(|p| p.expected.starts_with("contents with BLAKE3")).count();
                assert!(found.good_rows < found.checked_rows || found.damaged_shards.iter().all(|s| s.damaged.is_empty()));
            }
            damaged.sort_by_key(|row| row.row);
            assert_eq!((&damaged, digests), (&damage.damaged, 1), "{of} samples");
        }
    }
}

#[test]
fn a_shard_that_cannot_be_opened_is_named_once() {
    made::quiet();
    let (dir, _) = made::cache(ROWS, PER_SHARD, K);
    let path = |index: usize| dir.path().join(format!("shard-{index:05}.parquet"));
    std::fs::remove_file(path(0)).unwrap();
    // A footer of the right size that says something else.
    let mut bytes = std::fs::read(path(1)).unwrap();
    let end = bytes.len() - 300;
    bytes[end..end + 40].fill(b'x');
    std::fs::write(path(1), &bytes).unwrap();
    let cut = std::fs::read(path(3)).unwrap();
    std::fs::write(path(3), &cut[..cut.len() - 1]).unwrap();
    for mode in [VerifyMode::Quick, VerifyMode::Full, sample(2, 3)] {
        let found = report(dir.path(), mode);
        let files: Vec<&str> = found.problems.iter().map(|p| p.file.as_str()).collect();
        assert_eq!(files, ["shard-00000.parquet", "shard-00001.parquet", "shard-00003.parquet"], "{mode:?}");
        let lost: Vec<(&str, bool)> = found.damaged_shards.iter().map(|d| (d.file.as_str(), d.whole)).collect();
        assert_eq!(lost, [("shard-00000.parquet", true), ("shard-00001.parquet", true), ("shard-00003.parquet", true)]);
        assert_eq!(RepairList::of(&found).rows(), 8 + 8 + 6);
    }
    assert_eq!(report(dir.path(), VerifyMode::Full).good_rows, 8);
}

/// A cache with one whole shard and two pieces of the second.
fn under_way() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let records = made::records(ROWS, K);
    let mut writer = CacheWriter::open(dir.path(), &made::description(ROWS, PER_SHARD, K), made::companions()).unwrap();
    for (from, to) in [(0, 8), (8, 11), (11, 14)] {
        writer.extend(&records[from..to]).unwrap();
        writer.seal().unwrap();
    }
    dir
}

#[test]
fn pieces_of_the_shard_under_way_are_checked_too() {
    made::quiet();
    let dir = under_way();
    let found = report(dir.path(), VerifyMode::Full);
    assert_eq!((found.is_good(), found.complete, found.rows, found.good_rows, found.parts), (true, false, 14, 14, 2));
    assert!(found.unlisted.is_empty());
    spoil(&dir.path().join("part-00001-001.parquet"), 0.5);
    let found = report(dir.path(), VerifyMode::Full);
    assert_eq!((found.damaged_shards.len(), found.damaged_parts.len()), (0, 1));
    assert_eq!(found.damaged_parts[0].file, "part-00001-001.parquet");
    std::fs::remove_file(dir.path().join("part-00001-000.parquet")).unwrap();
    let found = report(dir.path(), VerifyMode::Quick);
    assert_eq!((found.problem_count, found.problems[0].file.as_str()), (1, "part-00001-000.parquet"));
}

#[test]
fn a_manifest_that_is_lost_is_damage_and_an_empty_folder_is_no_cache() {
    let (dir, _) = made::cache(ROWS, PER_SHARD, K);
    let digest = potstill_cache::Manifest::load(dir.path()).unwrap().description.digest();
    std::fs::remove_file(dir.path().join("manifest.json")).unwrap();
    let found = report(dir.path(), VerifyMode::Full);
    assert_eq!(
        (found.manifest, found.problem_count, found.problems[0].file.as_str()),
        (ManifestState::Missing, 1, "manifest.json")
    );
    assert_eq!(found.description_blake3, Some(digest.clone()));
    std::fs::write(dir.path().join("manifest.json"), "{").unwrap();
    let found = report(dir.path(), VerifyMode::Full);
    assert_eq!((found.manifest, found.description_blake3), (ManifestState::Damaged, Some(digest)));
    let empty = tempfile::tempdir().unwrap();
    let error = verify_as(empty.path(), VerifyMode::Full, &ScanProgress::default()).unwrap_err();
    assert!(matches!(error, Error::NoManifest { .. }), "{error}");
}

#[test]
fn a_missing_shard_is_damage_also_for_a_run_that_goes_on() {
    let (dir, _) = made::cache(ROWS, PER_SHARD, K);
    for index in [0, 3] {
        let path = dir.path().join(format!("shard-{index:05}.parquet"));
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let writer = CacheWriter::open(dir.path(), &made::description(ROWS, PER_SHARD, K), made::companions());
        let error = writer.and_then(|writer| writer.committed_keys()).unwrap_err();
        assert_eq!(error.class(), ErrorClass::Integrity);
        assert_eq!(
            error.to_string(),
            format!("{}: expected this shard, found no such file; the cache is damaged", path.display())
        );
        std::fs::write(&path, bytes).unwrap();
    }
}

#[test]
fn a_list_is_saved_and_read_and_its_bytes_are_not_believed() {
    made::quiet();
    let (dir, _) = made::cache(ROWS, PER_SHARD, K);
    spoil(&dir.path().join("shard-00001.parquet"), 0.5);
    let list = RepairList::of(&report(dir.path(), VerifyMode::Full));
    let damaged = &list.shards[0].damaged;
    // Rows of `made` number their conversations 1, 3, 5, …
    assert!(!damaged.is_empty() && damaged.iter().all(|row| row.seq_id == Some(2 * row.row + 1)), "{damaged:?}");
    let path = dir.path().join("list.json");
    list.save(&path).unwrap();
    assert_eq!(RepairList::load(&path).unwrap(), list);
    let text = std::fs::read_to_string(&path).unwrap();
    for (wrong, sentence) in [
        ("".to_string(), "a list written by verify --repair-list"),
        (text.replace("\"shards\"", "\"shard\""), "unknown field"),
        (text.replace("\"repair_list_version\": 1", "\"repair_list_version\": 2"), "repair_list_version: expected 1, found 2"),
        (text.replace("\"row\": ", "\"row\": -"), "contents: expected"),
    ] {
        std::fs::write(&path, &wrong).unwrap();
        let error = RepairList::load(&path).unwrap_err();
        assert!(error.to_string().contains(sentence), "{error}");
        assert_eq!(error.class(), ErrorClass::Runtime);
    }
    assert!(matches!(RepairList::load(dir.path()), Err(Error::RepairList { .. })));
    let whole = ShardDamage { file: "x".into(), first_row: 0, rows: u64::MAX, whole: true, damaged: Vec::new() };
    assert_eq!(RepairList { shards: vec![whole.clone(), whole], ..list }.rows(), u64::MAX);
}
