//! Files in a cache's folder that no manifest names: a stranger's stay, what a crash leaves goes, and a manifest of an earlier day
//! costs no shard.

use crate::made::{self, description, files, records};
use potstill_cache::{
    Cache, CacheWriter, Error, ErrorClass, MANIFEST_FILE, ManifestState, Repair, RepairList, ScanProgress, VerifyReport, verify,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const PER_SHARD: u32 = 2;
const K: u16 = 4;

fn open(dir: &Path, rows: u64) -> Result<CacheWriter, Error> {
    CacheWriter::open(dir, &description(rows, PER_SHARD, K), made::companions())
}

fn report(dir: &Path) -> VerifyReport {
    verify(dir, &ScanProgress::default()).unwrap()
}

/// The list of a check, in a folder of its own.
fn list(dir: &Path) -> (tempfile::TempDir, PathBuf) {
    let outside = tempfile::tempdir().unwrap();
    let path = outside.path().join("list.json");
    RepairList::of(&report(dir)).save(&path).unwrap();
    (outside, path)
}

fn repair(dir: &Path, rows: u64, list: &Path) -> Result<Repair, Error> {
    Repair::open(dir, &description(rows, PER_SHARD, K), &made::companions(), list)
}

/// A cache of `rows` rows, and the manifest it had after each shard but the last.
fn with_history(rows: u64) -> (tempfile::TempDir, Vec<Vec<u8>>) {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = open(dir.path(), rows).unwrap();
    let mut history = Vec::new();
    for pair in records(rows, K).chunks(PER_SHARD as usize) {
        history.push(std::fs::read(dir.path().join(MANIFEST_FILE)).unwrap());
        writer.extend(pair).unwrap();
    }
    writer.finish().unwrap();
    (dir, history)
}

#[test]
fn a_writer_removes_its_own_leftovers_and_nothing_else() {
    let foreign = [
        "shard-notes.parquet",
        "shard-1.parquet",
        "shard-000002.parquet",
        "shard-00099.parquet",
        "part-00000-spark.snappy.parquet",
        "part-0-0.parquet",
        "notes.tmp",
        "shard-notes.parquet.tmp",
        "tokenizer.tmp",
        "data.parquet",
    ];
    let ours = ["part-00001-000.parquet", "part-00001-001.parquet.tmp", "shard-00001.parquet.tmp", "manifest.json.tmp"];
    for complete in [true, false] {
        let (dir, history) = with_history(4);
        if !complete {
            std::fs::write(dir.path().join(MANIFEST_FILE), &history[1]).unwrap();
        }
        let names: Vec<String> = files(dir.path()).into_keys().collect();
        foreign.iter().chain(&ours).for_each(|name| std::fs::write(dir.path().join(name), *name).unwrap());
        drop(open(dir.path(), 4).unwrap());
        let found = files(dir.path());
        for name in foreign {
            assert_eq!(found.get(name).map(Vec::as_slice), Some(name.as_bytes()), "{name}, complete: {complete}");
        }
        let left: Vec<&str> = ours.into_iter().filter(|name| found.contains_key(*name)).collect();
        assert!(left.is_empty(), "{left:?}, complete: {complete}");
        // The shard that was renamed and not named yet is written again.
        let kept = names.iter().filter(|name| complete || *name != "shard-00001.parquet");
        assert!(kept.into_iter().all(|name| found.contains_key(name)), "complete: {complete}");
        assert_eq!(found.contains_key("shard-00001.parquet"), complete);
    }
}

#[test]
fn an_earlier_manifest_costs_no_shard() {
    let rows = 11;
    let (dir, history) = with_history(rows);
    let good = files(dir.path());
    for (shards, manifest) in history.iter().enumerate() {
        let what = format!("{shards} of 6 shards named");
        std::fs::write(dir.path().join(MANIFEST_FILE), manifest).unwrap();
        let before = files(dir.path());
        let found = report(dir.path());
        if shards == 5 {
            // What a crash between the renaming of a shard and the manifest leaves.
            assert!(found.is_good() && found.manifest == ManifestState::Good, "{what}: {:?}", found.problems);
            assert_eq!(found.unlisted, ["shard-00005.parquet"]);
            continue;
        }
        assert_eq!((found.problem_count, found.manifest), (1, ManifestState::Stale), "{what}");
        let problem = &found.problems[0];
        let later = format!("shard-{shards:05}.parquet to shard-00005.parquet");
        assert!(problem.file == MANIFEST_FILE && problem.found.contains(&later), "{what}: {problem:?}");
        let refused = open(dir.path(), rows).unwrap_err();
        assert_eq!(refused.class(), ErrorClass::Integrity, "{refused}");
        let sentence = refused.to_string();
        assert!(sentence.contains(&later) && sentence.contains("verify --repair-list"), "{sentence}");
        assert_eq!(files(dir.path()), before, "{what}");

        let (_keep, list) = list(dir.path());
        assert_eq!(RepairList::load(&list).unwrap().manifest, ManifestState::Stale);
        let repair = repair(dir.path(), rows, &list).unwrap();
        assert!(repair.shards().is_empty());
        let done = repair.finish().unwrap();
        assert_eq!((done.manifest, done.adopted_shards, done.dropped_parts), (ManifestState::Stale, 6, 0));
        assert_eq!(files(dir.path()), good, "{what}");
    }
}

#[test]
fn an_earlier_manifest_with_pieces_and_holes_is_rebuilt_too() {
    let rows = 11;
    let (whole, history) = with_history(rows);
    let good = files(whole.path());
    let all = records(rows, K);
    // Four shards and a piece; then the first manifest comes back and a shard is lost.
    let dir = tempfile::tempdir().unwrap();
    let mut writer = open(dir.path(), rows).unwrap();
    for (from, to) in [(0, 8), (8, 9)] {
        writer.extend(&all[from..to]).unwrap();
        writer.seal().unwrap();
    }
    drop(writer);
    let piece = files(dir.path()).into_keys().find(|name| name.starts_with("part-")).unwrap();
    std::fs::write(dir.path().join(MANIFEST_FILE), &history[0]).unwrap();
    std::fs::remove_file(dir.path().join("shard-00001.parquet")).unwrap();
    let (_keep, list) = list(dir.path());
    let mut repair = repair(dir.path(), rows, &list).unwrap();
    let [lost] = repair.shards() else { panic!("{:?}", repair.shards()) };
    let lost = lost.clone();
    assert_eq!((lost.index, lost.recompute.as_slice()), (1, [2, 3].as_slice()));
    // Until the end of the repair nothing is given up.
    assert!(dir.path().join(&piece).exists());
    let mut mending = repair.mend(&lost).unwrap();
    mending.extend(&all[2..4]).unwrap();
    mending.finish().unwrap();
    let done = repair.finish().unwrap();
    assert_eq!((done.adopted_shards, done.dropped_parts), (3, 1));
    assert!(report(dir.path()).is_good() && report(dir.path()).unlisted.is_empty());
    let mut writer = open(dir.path(), rows).unwrap();
    assert_eq!(writer.committed_rows(), 8);
    writer.extend(&all[8..]).unwrap();
    writer.finish().unwrap();
    assert_eq!(files(dir.path()), good);
}

#[test]
fn pieces_of_a_later_shard_tell_an_earlier_manifest_too() {
    let rows = 11;
    let dir = tempfile::tempdir().unwrap();
    let mut writer = open(dir.path(), rows).unwrap();
    let first = std::fs::read(dir.path().join(MANIFEST_FILE)).unwrap();
    writer.extend(&records(rows, K)[..3]).unwrap();
    writer.seal().unwrap();
    drop(writer);
    std::fs::write(dir.path().join(MANIFEST_FILE), first).unwrap();
    let before = files(dir.path());
    assert_eq!(report(dir.path()).manifest, ManifestState::Stale);
    assert_eq!(open(dir.path(), rows).unwrap_err().class(), ErrorClass::Integrity);
    assert_eq!(files(dir.path()), before);
}

#[test]
fn a_strangers_shard_is_never_written_over() {
    let (other, _) = with_history(4);
    let empty = tempfile::tempdir().unwrap();
    let list_of = |manifest: &str| {
        let path = empty.path().join("list.json");
        let text = r#"{"repair_list_version": 1, "description_blake3": null, "manifest": "M", "shards": [], "parts": [], "companions": []}"#;
        std::fs::write(&path, text.replace('M', manifest)).unwrap();
        path
    };
    for stranger in [b"PAR1 not ours".to_vec(), Vec::new()] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("shard-00000.parquet"), &stranger).unwrap();
        std::fs::write(dir.path().join("part-00000-000.parquet"), "his too").unwrap();
        for manifest in ["missing", "good"] {
            let refused = repair(dir.path(), 4, &list_of(manifest)).unwrap_err();
            assert_eq!(refused.class(), ErrorClass::Usage, "{refused}");
            assert!(refused.to_string().contains("shard-00000.parquet"), "{refused}");
        }
        let mut found: BTreeMap<String, Vec<u8>> = files(dir.path());
        found.remove("cache.lock");
        assert_eq!(found["shard-00000.parquet"], stranger);
        assert_eq!(found.len(), 2, "{:?}", found.keys());
    }
    // One shard that is ours is proof enough.
    std::fs::remove_file(other.path().join(MANIFEST_FILE)).unwrap();
    std::fs::write(other.path().join("shard-00000.parquet"), "x").unwrap();
    let repair = repair(other.path(), 4, &list_of("missing")).unwrap();
    assert_eq!(repair.shards().len(), 1);
}

#[test]
fn a_list_takes_the_place_of_an_older_one_at_once() {
    let (dir, _) = with_history(4);
    let (outside, path) = list(dir.path());
    let older = outside.path().join("older.json");
    std::fs::hard_link(&path, &older).unwrap();
    let before = std::fs::read(&older).unwrap();
    std::fs::remove_file(dir.path().join("shard-00001.parquet")).unwrap();
    RepairList::of(&report(dir.path())).save(&path).unwrap();
    // Written over in place, a crash would leave half a list; renamed into place, what had the name before is untouched.
    assert_eq!(std::fs::read(&older).unwrap(), before);
    assert_ne!(std::fs::read(&path).unwrap(), before);
    assert_eq!(files(outside.path()).len(), 2);
    assert!(Cache::open(dir.path()).is_err());
}
