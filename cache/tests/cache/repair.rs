//! A damaged cache, mended: with the same teacher it ends byte-identical to the original, whatever was damaged.

use crate::made::{self, Random, description, files, records};
use potstill_cache::{
    Cache, CacheWriter, Description, Error, ErrorClass, ManifestState, Record, Repair, RepairList, RepairReport, Sameness,
    ScanProgress, verify,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const ROWS: u64 = 150;
const PER_SHARD: u32 = 70;
const K: u16 = 4;

struct Bench {
    dir: tempfile::TempDir,
    good: BTreeMap<String, Vec<u8>>,
    rows: Vec<Record>,
}

impl Bench {
    fn new() -> Self {
        made::quiet();
        let (dir, _) = made::cache(ROWS, PER_SHARD, K);
        let good = files(dir.path());
        Self { dir, good, rows: records(ROWS, K) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Checks the cache and keeps the list outside of it.
    fn list(&self) -> (tempfile::TempDir, PathBuf) {
        let report = verify(self.dir.path(), &ScanProgress::default()).unwrap();
        let outside = tempfile::tempdir().unwrap();
        let path = outside.path().join("list.json");
        RepairList::of(&report).save(&path).unwrap();
        (outside, path)
    }

    fn open(&self, list: &Path) -> Result<Repair, Error> {
        Repair::open(self.dir.path(), &description(ROWS, PER_SHARD, K), &made::companions(), list)
    }

    /// What a caller with a teacher does: `rows` are what it would compute.
    fn mend(&self, list: &Path, rows: &[Record]) -> RepairReport {
        let mut repair = self.open(list).unwrap();
        for shard in repair.shards().to_vec() {
            let records: Vec<Record> = shard.recompute.iter().map(|&row| rows[row as usize].clone()).collect();
            let mut mending = repair.mend(&shard).unwrap();
            // In uneven blocks, as packs come.
            records.chunks(3).for_each(|block| mending.extend(block).unwrap());
            mending.finish().unwrap();
        }
        repair.finish().unwrap()
    }

    /// The run that continues: it also restores companion files.
    fn go_on(&self) {
        let mut writer = CacheWriter::open(self.dir.path(), &description(ROWS, PER_SHARD, K), made::companions()).unwrap();
        let committed = writer.committed_rows() as usize;
        assert_eq!(writer.committed_keys().unwrap().len(), committed);
        writer.extend(&self.rows[committed..]).unwrap();
        writer.finish().unwrap();
    }

    fn assert_good(&self, what: &str) {
        let found = files(self.dir.path());
        let differing: Vec<&String> =
            found.keys().chain(self.good.keys()).filter(|name| found.get(*name) != self.good.get(*name)).collect();
        assert!(differing.is_empty(), "{what}: {differing:?} differ");
    }
}

#[test]
fn random_damage_is_mended_to_the_very_bytes() {
    let bench = Bench::new();
    let mut random = Random(11);
    let (mut recomputed, mut kept, mut rebuilt) = (0, 0, 0);
    for round in 0..60 {
        let names =
            ["shard-00000.parquet", "shard-00001.parquet", "shard-00002.parquet", "manifest.json", "tokenizer/tokenizer.json"];
        let mut what = format!("round {round}");
        for _ in 0..1 + random.below(3) {
            let name = names[random.below(5) as usize];
            let Ok(mut bytes) = std::fs::read(bench.path(name)) else { continue };
            let at = random.below(bytes.len().max(1) as u64) as usize;
            match random.below(5) {
                0 if name != "tokenizer/tokenizer.json" => std::fs::remove_file(bench.path(name)).unwrap(),
                1 => std::fs::write(bench.path(name), &bytes[..at]).unwrap(),
                2 if !bytes.is_empty() => {
                    bytes[at] ^= 1 << random.below(8);
                    std::fs::write(bench.path(name), bytes).unwrap();
                }
                _ => {
                    let end = (at + 500).min(bytes.len());
                    bytes[at..end].fill(0);
                    std::fs::write(bench.path(name), bytes).unwrap();
                }
            }
            what += &format!(", {name} at {at}");
        }
        if (0..3).all(|i| !bench.path(names[i]).exists()) && !bench.path("manifest.json").exists() {
            bench.good.iter().for_each(|(name, bytes)| std::fs::write(bench.path(name), bytes).unwrap());
        }
        let (_keep, list) = bench.list();
        let report = bench.mend(&list, &bench.rows);
        bench.go_on();
        bench.assert_good(&what);
        recomputed += report.shards.iter().map(|s| s.recomputed_rows).sum::<u64>();
        kept += report.shards.iter().map(|s| s.kept_rows).sum::<u64>();
        rebuilt += u64::from(report.manifest != ManifestState::Good);
        assert!(report.shards.iter().all(|s| s.sameness != Sameness::Different), "{what}: {report:?}");
    }
    // Every way was gone: rows scored again, rows taken from damaged shards, manifests rebuilt.
    assert!(recomputed > 100 && kept > 100 && rebuilt > 5, "{recomputed} {kept} {rebuilt}");
}

#[test]
fn only_the_damaged_rows_are_asked_for() {
    let bench = Bench::new();
    let path = bench.path("shard-00001.parquet");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.len() / 3;
    bytes[at..at + 30].fill(0);
    std::fs::write(&path, &bytes).unwrap();
    let (_keep, list) = bench.list();
    let listed = RepairList::load(&list).unwrap();
    let rows: Vec<u64> = listed.shards[0].damaged.iter().map(|row| row.row).collect();
    let repair = bench.open(&list).unwrap();
    let [shard] = repair.shards() else { panic!("{:?}", repair.shards()) };
    assert_eq!((shard.index, shard.first_row, shard.rows, &shard.recompute), (1, 70, 70, &rows));
    assert!(!rows.is_empty() && rows.len() < 10, "{rows:?}");
    drop(repair);
    // More damage since the list was made: the rows that cannot be read are asked for as well.
    let more = bytes.len() / 2;
    bytes[more..more + 30].fill(0);
    std::fs::write(&path, &bytes).unwrap();
    let repair = bench.open(&list).unwrap();
    let now = repair.shards()[0].recompute.clone();
    assert!(now.len() > rows.len() && rows.iter().all(|row| now.contains(row)), "{now:?}");
    drop(repair);
    let report = bench.mend(&list, &bench.rows);
    assert_eq!((report.shards[0].sameness, report.shards[0].recomputed_rows), (Sameness::Identical, now.len() as u64));
    bench.assert_good("two places");
    // Nothing is left to do, and doing it again changes nothing.
    let (_keep, empty) = bench.list();
    assert_eq!(bench.mend(&empty, &bench.rows), RepairReport::default());
    bench.assert_good("an empty list");
}

#[test]
fn another_arithmetic_is_said_and_stated() {
    let bench = Bench::new();
    std::fs::remove_file(bench.path("shard-00001.parquet")).unwrap();
    let (_keep, list) = bench.list();
    // The same conversations, scored a little differently.
    let mut others = bench.rows.clone();
    let targets = others[75].targets.clone();
    let mut moved = potstill_cache::SoftTargets::default();
    for i in 0..targets.len() {
        let target = targets.position(i);
        let logprobs: Vec<f32> = target.logprobs.iter().map(|l| l - 0.02).collect();
        moved.push(target.ids, &logprobs, ((1.0 - logprobs.iter().map(|&l| f64::from(l).exp()).sum::<f64>()).ln()) as f32);
    }
    others[75].targets = moved;
    let report = bench.mend(&list, &others);
    assert_eq!(report.shards.len(), 1);
    assert_eq!(
        (report.shards[0].sameness, report.shards[0].recomputed_rows, report.shards[0].kept_rows),
        (Sameness::Different, 70, 0)
    );
    assert!(verify(bench.dir.path(), &ScanProgress::default()).unwrap().is_good());
    let cache = Cache::open(bench.dir.path()).unwrap();
    assert_eq!(cache.row(75).unwrap().key(), bench.rows[75].key());
    let found = files(bench.dir.path());
    let differing: Vec<&str> = found.keys().filter(|name| found[*name] != bench.good[*name]).map(String::as_str).collect();
    assert_eq!(differing, ["manifest.json", "shard-00001.parquet"]);
}

#[test]
fn a_lost_manifest_is_rebuilt_also_of_an_interrupted_run() {
    let bench = Bench::new();
    // Interrupted after the first shard, a piece of the second under way; then the manifest is lost and the shard damaged.
    let dir = tempfile::tempdir().unwrap();
    let mut writer = CacheWriter::open(dir.path(), &description(ROWS, PER_SHARD, K), made::companions()).unwrap();
    writer.extend(&bench.rows[..90]).unwrap();
    writer.seal().unwrap();
    drop(writer);
    let partial = files(dir.path());
    let shard = dir.path().join("shard-00000.parquet");
    let mut bytes = std::fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 20].fill(0);
    std::fs::write(&shard, bytes).unwrap();
    std::fs::remove_file(dir.path().join("manifest.json")).unwrap();
    let bench = Bench { dir, ..bench };
    let (_keep, list) = bench.list();
    assert_eq!(RepairList::load(&list).unwrap().manifest, ManifestState::Missing);
    let report = bench.mend(&list, &bench.rows);
    assert_eq!((report.manifest, report.adopted_shards, report.shards.len()), (ManifestState::Missing, 0, 1));
    // The piece cannot be told from a stray one any more: it is given up, and said so.
    assert_eq!(report.dropped_parts, 1);
    assert!(!bench.path("part-00001-000.parquet").exists());
    assert_eq!(report.shards[0].sameness, Sameness::Unknown);
    assert_eq!(std::fs::read(&shard).unwrap(), partial["shard-00000.parquet"]);
    assert_eq!(Cache::open(bench.dir.path()).unwrap().len(), 70);
    bench.go_on();
    bench.assert_good("continued");
}

#[test]
fn damaged_pieces_are_given_up_and_scored_again() {
    let bench = Bench::new();
    let dir = tempfile::tempdir().unwrap();
    let mut writer = CacheWriter::open(dir.path(), &description(ROWS, PER_SHARD, K), made::companions()).unwrap();
    for (from, to) in [(0, 75), (75, 80), (80, 90)] {
        writer.extend(&bench.rows[from..to]).unwrap();
        writer.seal().unwrap();
    }
    drop(writer);
    let bench = Bench { dir, ..bench };
    std::fs::write(bench.path("part-00001-001.parquet"), "x").unwrap();
    let (_keep, list) = bench.list();
    let report = bench.mend(&list, &bench.rows);
    assert_eq!((report.dropped_parts, report.shards.len()), (2, 0));
    assert!(!bench.path("part-00001-002.parquet").exists() && bench.path("part-00001-000.parquet").exists());
    bench.go_on();
    bench.assert_good("pieces");
}

#[test]
fn lists_of_other_caches_and_lists_that_do_not_fit_are_refused() {
    let bench = Bench::new();
    std::fs::remove_file(bench.path("shard-00001.parquet")).unwrap();
    let (_keep, list) = bench.list();
    let refused = |description: &Description, list: &Path| {
        let error = Repair::open(bench.dir.path(), description, &made::companions(), list).unwrap_err();
        (error.class(), error.to_string())
    };
    let ours = description(ROWS, PER_SHARD, K);
    let other = Description { mantissa_bits: 8, ..ours.clone() };
    let (class, sentence) = refused(&other, &list);
    assert_eq!(class, ErrorClass::Mismatch);
    assert!(sentence.contains(&ours.digest()) && sentence.contains(&other.digest()), "{sentence}");
    let edit = |from: &str, to: &str| {
        let text = std::fs::read_to_string(&list).unwrap();
        assert!(text.contains(from), "{text}");
        let path = list.with_file_name(format!("edited-{}.json", blake3::hash(to.as_bytes()).to_hex()));
        std::fs::write(&path, text.replace(from, to)).unwrap();
        path
    };
    // A list that names no description is held against the cache itself.
    let silent = edit(&format!("\"{}\"", ours.digest()), "null");
    assert_eq!(refused(&other, &silent).0, ErrorClass::Mismatch);
    let (_, sentence) = refused(&ours, &edit("shard-00001", "../shard-00001"));
    assert!(sentence.contains("expected a shard of this cache, found \"../shard-00001.parquet\""), "{sentence}");
    let outside = edit("\"damaged\": []", "\"damaged\": [{\"row\": 140, \"seq_id\": null}]");
    let (_, sentence) = refused(&ours, &outside);
    assert!(sentence.contains("shard-00001.parquet: expected rows 70 to 139, found 140"), "{sentence}");
    let (_, sentence) = refused(
        &ours,
        &edit("\"parts\": []", "\"parts\": [{\"file\": \"y\", \"first_row\": 0, \"rows\": 1, \"whole\": true, \"damaged\": []}]"),
    );
    assert!(sentence.contains("expected a piece of the shard under way, found \"y\""), "{sentence}");
    // Another writer has the cache.
    let holder = bench.open(&list).unwrap();
    assert_eq!(refused(&ours, &list).0, ErrorClass::Locked);
    drop(holder);
    // The shards of another cache are not written over for want of a manifest.
    std::fs::remove_file(bench.path("manifest.json")).unwrap();
    let (class, sentence) = refused(&other, &silent);
    assert_eq!(class, ErrorClass::Mismatch, "{sentence}");
    // Nothing has been touched by any of it.
    assert_eq!(std::fs::read(bench.path("shard-00000.parquet")).unwrap(), bench.good["shard-00000.parquet"]);
}

#[test]
fn too_few_too_many_and_wrong_rows_leave_the_cache_as_it_was() {
    let bench = Bench::new();
    std::fs::remove_file(bench.path("shard-00002.parquet")).unwrap();
    let damaged = files(bench.dir.path());
    let (_keep, list) = bench.list();
    let mut repair = bench.open(&list).unwrap();
    let shard = repair.shards()[0].clone();
    assert_eq!(shard.recompute, (140..150).collect::<Vec<u64>>());
    let mut mending = repair.mend(&shard).unwrap();
    mending.extend(&bench.rows[140..149]).unwrap();
    assert!(matches!(mending.finish(), Err(Error::RowCount { expected: 10, found: 9, .. })));
    let mut mending = repair.mend(&shard).unwrap();
    mending.extend(&bench.rows[140..150]).unwrap();
    assert!(matches!(mending.extend(&bench.rows[149..150]), Err(Error::RowCount { .. })));
    drop(mending);
    let mut mending = repair.mend(&shard).unwrap();
    mending.extend(&bench.rows[141..142]).unwrap();
    assert!(matches!(mending.extend(&bench.rows[140..141]), Err(Error::BadRecord { .. })), "rows out of order");
    drop(mending);
    assert!(matches!(repair.finish(), Err(Error::RowCount { .. })), "a shard was left");
    let left: BTreeMap<String, Vec<u8>> =
        files(bench.dir.path()).into_iter().filter(|(name, _)| !name.ends_with(".tmp")).collect();
    assert_eq!(left.keys().collect::<Vec<_>>(), damaged.keys().collect::<Vec<_>>());
    bench.mend(&list, &bench.rows);
    bench.assert_good("after all");
}

#[test]
fn shards_that_are_good_again_are_left_alone() {
    let bench = Bench::new();
    for file in ["shard-00000.parquet", "shard-00001.parquet"] {
        let mut bytes = bench.good[file].clone();
        bytes[200] ^= 1;
        std::fs::write(bench.path(file), bytes).unwrap();
    }
    let (_outside, list) = bench.list();
    assert_eq!(bench.open(&list).unwrap().shards().len(), 2);
    // A repair that ended after the first shard.
    std::fs::write(bench.path("shard-00000.parquet"), &bench.good["shard-00000.parquet"]).unwrap();
    let left = bench.open(&list).unwrap().shards().to_vec();
    assert_eq!(left.iter().map(|shard| shard.file.as_str()).collect::<Vec<_>>(), ["shard-00001.parquet"]);
    bench.mend(&list, &bench.rows);
    assert!(files(bench.dir.path()) == bench.good);
    assert!(bench.open(&list).unwrap().shards().is_empty());
}
