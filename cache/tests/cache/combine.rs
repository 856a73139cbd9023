//! Caches joined: the parts of one data make the very bytes of a single run, and whatever does not belong together is refused with
//! both sides.

use crate::made::{self, Random, files, records};
use potstill_cache::{
    Cache, DataFile, Description, ErrorClass, Knobs, Part, Record, Reshape, Rewritten, ScanProgress, combine, repack, verify,
};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

const ROWS: u64 = 23;
const PER_SHARD: u32 = 4;
const K: u16 = 4;

/// `records` number their conversations 1, 3, 5, …, so the data have twice as many rows.
fn description(rows: u64, rows_per_shard: u32, k: u16) -> Description {
    let mut described = made::description(rows, rows_per_shard, k);
    described.data.rows = 2 * rows;
    described
}

/// Whether a folder holds these very files; a failure names those that differ.
fn assert_files(dir: &Path, expected: &BTreeMap<String, Vec<u8>>) {
    let found = files(dir);
    let names = found.keys().chain(expected.keys());
    let differing: BTreeSet<&String> = names.filter(|name| found.get(*name) != expected.get(*name)).collect();
    assert!(differing.is_empty(), "{}: {differing:?} differ", dir.display());
}

/// A bench of cache folders.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a cache; of fewer records than it expects, as many whole shards as they fill.
    fn write(&self, name: &str, description: &Description, records: &[Record]) -> PathBuf {
        let dir = self.path(name);
        let mut writer = potstill_cache::CacheWriter::open(&dir, description, made::companions()).unwrap();
        writer.extend(records).unwrap();
        if writer.rows() == description.expected_rows {
            writer.finish().unwrap();
        }
        dir
    }

    /// The single run over `ROWS` rows.
    fn whole(&self) -> PathBuf {
        self.write("whole", &description(ROWS, PER_SHARD, K), &records(ROWS, K))
    }

    /// Part `number` of `of`, or the first `rows` rows of it.
    fn part(&self, number: u32, of: u32, rows: usize) -> PathBuf {
        let part = Part { number, of };
        let range = part.rows(ROWS, PER_SHARD);
        let described =
            Description { part: Some(part), expected_rows: range.end - range.start, ..description(ROWS, PER_SHARD, K) };
        let mut share = records(ROWS, K)[range.start as usize..range.end as usize].to_vec();
        share.truncate(rows);
        self.write(&format!("part-{number}-of-{of}"), &described, &share)
    }
}

fn joined(sources: &[PathBuf], out: &Path) -> Rewritten {
    let progress = ScanProgress::default();
    let report = combine(sources, out, &Reshape::default(), &progress).unwrap();
    assert_eq!(progress.rows().0, progress.rows().1);
    report
}

/// The sentence and class of a refusal, which leaves nothing behind.
fn refused(sources: &[PathBuf], out: &Path) -> (String, ErrorClass) {
    let error = combine(sources, out, &Reshape::default(), &ScanProgress::default()).unwrap_err();
    assert!(!out.exists(), "{error}");
    (error.to_string(), error.class())
}

#[test]
fn parts_make_the_bytes_of_a_single_run() {
    let bench = Bench::new();
    let expected = files(&bench.whole());
    for of in 2..=6 {
        let mut parts: Vec<PathBuf> = (1..=of).map(|number| bench.part(number, of, usize::MAX)).collect();
        let out = bench.path(&format!("joined-{of}"));
        // The order in which they are named does not matter.
        let mut random = Random(u64::from(of));
        (1..parts.len()).rev().for_each(|i| parts.swap(i, random.below(i as u64 + 1) as usize));
        let report = joined(&parts, &out);
        assert_eq!((report.rows, report.complete, report.shared_rows, report.duplicates), (ROWS, true, 0, 0));
        assert_files(&out, &expected);
    }
}

#[test]
fn interrupted_runs_make_their_union() {
    let bench = Bench::new();
    let expected = files(&bench.whole());
    let rows = records(ROWS, K);
    let prefix =
        |rows_there: usize| bench.write(&format!("first-{rows_there}"), &description(ROWS, PER_SHARD, K), &rows[..rows_there]);
    let (short, long) = (prefix(8), prefix(16));
    let out = bench.path("union");
    let report = joined(&[short, long.clone()], &out);
    assert_eq!((report.rows, report.expected_rows, report.complete, report.shared_rows), (16, ROWS, false, 8));
    assert_files(&out, &files(&long));
    // A part that starts in the middle completes it; what both have is kept once.
    let report = joined(&[long, bench.part(2, 2, usize::MAX)], &bench.path("completed"));
    assert_eq!((report.rows, report.complete, report.shared_rows), (ROWS, true, 4));
    assert_files(&bench.path("completed"), &expected);
    // Every part is there, but the last is not finished: the union is a prefix, which a single run continues.
    let parts = [bench.part(1, 3, usize::MAX), bench.part(2, 3, usize::MAX), bench.part(3, 3, 4)];
    let report = joined(&parts, &bench.path("two-and-a-half"));
    assert_eq!((report.rows, report.expected_rows, report.complete), (20, ROWS, false));
    let mut writer =
        potstill_cache::CacheWriter::open(&bench.path("two-and-a-half"), &description(ROWS, PER_SHARD, K), made::companions())
            .unwrap();
    assert_eq!(writer.committed_rows(), 20);
    writer.extend(&rows[20..]).unwrap();
    writer.finish().unwrap();
    assert_files(&bench.path("two-and-a-half"), &expected);
    // Once it has been continued, joining again changes nothing.
    assert_eq!(joined(&parts, &bench.path("two-and-a-half")).resumed_rows, ROWS);
    assert_files(&bench.path("two-and-a-half"), &expected);
}

#[test]
fn a_cache_and_itself_or_one_of_its_parts_is_that_cache() {
    let bench = Bench::new();
    let whole = bench.whole();
    let expected = files(&whole);
    let (twice, part) = (bench.path("twice"), bench.part(2, 3, usize::MAX));
    let report = joined(&[whole.clone(), whole.clone()], &twice);
    assert_eq!((report.rows, report.shared_rows), (ROWS, ROWS));
    assert_files(&twice, &expected);
    joined(&[part.clone(), whole], &bench.path("with-part"));
    assert_files(&bench.path("with-part"), &expected);
    // A part alone stays that part.
    joined(&[part.clone(), part.clone()], &bench.path("part-alone"));
    assert_files(&bench.path("part-alone"), &files(&part));
}

#[test]
fn what_is_missing_is_named() {
    let bench = Bench::new();
    let out = bench.path("never");
    let (one, two, three) = (bench.part(1, 3, usize::MAX), bench.part(2, 3, 4), bench.part(3, 3, usize::MAX));
    let (sentence, class) = refused(&[one.clone(), three.clone()], &out);
    assert!(sentence.contains("part-1-of-3: part 2 of 3 is missing; name a cache of each part"), "{sentence}");
    assert_eq!(class, ErrorClass::Usage);
    let (sentence, _) = refused(&[bench.part(2, 4, 0), bench.part(3, 4, 0)], &out);
    assert!(sentence.contains("parts 1, 4 of 4 are missing"), "{sentence}");
    let (sentence, _) = refused(&[one.clone(), two, three], &out);
    assert!(sentence.contains("rows 12 to 15 of 23 are missing; name a cache that has them"), "{sentence}");
    let (sentence, class) = refused(&[one.clone(), bench.part(2, 6, usize::MAX)], &out);
    assert!(sentence.contains("part.of is 3 there and 6 here"), "{sentence}");
    assert_eq!(class, ErrorClass::Mismatch);
    // A part that has fewer rows than its share of these data.
    let lie = Description { part: Some(Part { number: 1, of: 3 }), expected_rows: 4, ..description(ROWS, PER_SHARD, K) };
    let lie = bench.write("lie", &lie, &records(4, K));
    let (sentence, _) = refused(&[bench.whole(), lie], &out);
    assert!(sentence.contains("expected_rows is 8 there and 4 here"), "{sentence}");
    let (sentence, class) = refused(&[], &out);
    assert_eq!((sentence.as_str(), class), ("caches = none: expected one cache or more", ErrorClass::Usage));
}

#[test]
fn other_distributions_or_tokens_of_a_row_are_a_conflict() {
    let bench = Bench::new();
    let (out, whole) = (bench.path("never"), bench.whole());
    let mut rows = records(ROWS, K);
    rows[9].targets = made::record(99, rows[9].input_ids.len(), K).targets.slice(0..1);
    let one = made::record(rows[9].seq_id, rows[9].input_ids.len(), K);
    rows[9].positions = one.positions[..1].to_vec();
    let tokens = bench.write("tokens", &description(ROWS, PER_SHARD, K), &rows);
    let (sentence, class) = refused(&[whole.clone(), tokens], &out);
    assert!(
        sentence.contains(&format!("tokens: row 9 (seq_id 19, key {}) has other tokens than row 9 of ", rows[9].key())),
        "{sentence}"
    );
    assert!(sentence.contains("whole") && class == ErrorClass::Mismatch, "{sentence}");

    let mut rows = records(ROWS, K);
    let mut targets = rows[17].targets.slice(0..rows[17].targets.len() - 1);
    targets.push(&[5], &[0.5f32.ln()], 0.5f32.ln());
    rows[17].targets = targets;
    let targets = bench.write("targets", &description(ROWS, PER_SHARD, K), &rows);
    let (sentence, _) = refused(&[whole, targets], &out);
    assert!(
        sentence.contains("targets: row 17 (seq_id 35, key ") && sentence.contains("other distributions than row 17"),
        "{sentence}"
    );
}

/// What a single run over two files would say of them, with rows `a` of the first and `b` of the second kept.
fn other_data(rows: u64, name: &str) -> Description {
    let mut described = description(rows, PER_SHARD, K);
    described.data.files = vec![DataFile { name: name.into(), bytes: 77, blake3: "b".repeat(64) }];
    described.data.rows = 40;
    described.data.skipped = [("empty".to_string(), 1), ("tool calls".to_string(), 3)].into();
    described.encoding.truncated_tokens = 5;
    described
}

#[test]
fn other_data_are_put_one_after_another() {
    let bench = Bench::new();
    let first = bench.whole();
    // Conversations of the second data: two of them are in the first data too, with the same distributions.
    let old = records(ROWS, K);
    let mut second: Vec<Record> = (0..9).map(|i| made::record(1000 + i, 6 + i as usize, K)).collect();
    second[2] = old[4].clone();
    second[7] = old[20].clone();
    (0..9).for_each(|i| second[i].seq_id = 3 * i as u64);
    let other = bench.write("other", &other_data(9, "code.jsonl"), &second);
    let out = bench.path("both");
    let report = joined(&[first.clone(), other.clone()], &out);
    assert_eq!((report.rows, report.duplicates, report.complete), (ROWS + 7, 2, true));

    // The single run: files and counts added, numbers of the second data after the 46 rows of the first, duplicates skipped.
    let mut described = description(ROWS + 7, PER_SHARD, K);
    described.data.files.extend(other_data(9, "code.jsonl").data.files);
    described.data.rows = 2 * ROWS + 40;
    described.data.skipped =
        [("duplicate of an earlier row".to_string(), 2), ("empty".to_string(), 3), ("tool calls".to_string(), 3)].into();
    described.encoding.truncated_tokens = 17 + 5;
    let kept = second
        .iter()
        .enumerate()
        .filter(|(i, _)| *i != 2 && *i != 7)
        .map(|(_, r)| Record { seq_id: r.seq_id + 2 * ROWS, ..r.clone() });
    let single = bench.write("single", &described, &old.iter().cloned().chain(kept).collect::<Vec<_>>());
    assert_files(&out, &files(&single));
}

#[test]
fn the_same_conversation_in_other_data_is_kept_as_the_first_has_it() {
    let bench = Bench::new();
    let first = bench.whole();
    let mut twin = records(ROWS, K)[4].clone();
    let mut targets = twin.targets.slice(1..twin.targets.len());
    targets.push(&[5], &[0.25f32.ln()], 0.75f32.ln());
    (twin.targets, twin.seq_id) = (targets, 3);
    let (another, out) = (Record { seq_id: 5, ..made::record(1000, 6, K) }, bench.path("both"));
    let other = bench.write("other", &other_data(2, "code.jsonl"), &[twin.clone(), another]);
    // Scored in another pack it may differ in the last bits, and which of the two is kept matters to nobody.
    let report = joined(&[first.clone(), other.clone()], &out);
    assert_eq!((report.rows, report.duplicates, report.shared_rows), (ROWS + 1, 1, 0));
    let rows = |dir: &Path| Cache::open(dir).unwrap();
    assert_eq!(rows(&out).row(4).unwrap(), rows(&first).row(4).unwrap());
    assert_ne!(rows(&out).row(4).unwrap().targets, rows(&other).row(0).unwrap().targets);
    // The other way round it is the other one.
    joined(&[other.clone(), first], &bench.path("other-first"));
    assert_eq!(rows(&bench.path("other-first")).row(0).unwrap(), rows(&other).row(0).unwrap());
}

#[test]
fn rows_in_pieces_are_said_to_be_left_out() {
    let bench = Bench::new();
    let rows = records(ROWS, K);
    let dir = bench.path("sealed");
    let mut writer = potstill_cache::CacheWriter::open(&dir, &description(ROWS, PER_SHARD, K), made::companions()).unwrap();
    for (from, to) in [(0, 9), (9, 11)] {
        writer.extend(&rows[from..to]).unwrap();
        writer.seal().unwrap();
    }
    drop(writer);
    let report = joined(&[dir], &bench.path("out"));
    assert_eq!((report.rows, report.piece_rows, report.complete), (8, 3, false));
    assert_eq!(joined(&[bench.whole()], &bench.path("none")).piece_rows, 0);
}

#[test]
fn caches_that_were_not_made_alike_are_refused_with_both_sides() {
    let bench = Bench::new();
    let (whole, out) = (bench.whole(), bench.path("never"));
    let change = |name: &str, change: &dyn Fn(&mut Description)| {
        let mut described = description(ROWS, PER_SHARD, K);
        change(&mut described);
        let other = bench.write(name, &described, &records(ROWS, K));
        let (sentence, class) = refused(&[whole.clone(), other.clone()], &out);
        assert_eq!(class, ErrorClass::Mismatch);
        assert!(
            sentence.starts_with(&format!("{}: cannot be combined with {}: ", other.display(), whole.display())),
            "{sentence}"
        );
        sentence
    };
    let sentence = change("teacher", &|d| d.teacher.weights_blake3 = "c".repeat(64));
    assert!(sentence.contains("teacher.weights_blake3 is ") && sentence.contains(&"c".repeat(64)), "{sentence}");
    assert!(change("template", &|d| d.template.blake3 = "d".into()).contains("template.blake3"));
    assert!(change("tokenizer", &|d| d.tokenizer.blake3 = "d".into()).contains("tokenizer.blake3"));
    assert!(change("length", &|d| d.encoding.max_length = 77).contains("encoding.max_length is 1024 there and 77 here"));
    assert!(change("bits", &|d| d.mantissa_bits = 8).contains("mantissa_bits is 7 there and 8 here"));
    assert!(
        change("k", &|d| d.selection = potstill_cache::Selection::TopK { k: 5 }).contains("selection.k is 4 there and 5 here")
    );
    assert!(change("cut", &|d| d.encoding.truncated_tokens = 3).contains("truncated_tokens is 17 there and 3 here"));
    // Level and cut may differ: the first cache's are taken.
    let other = Description { zstd_level: 9, rows_per_shard: 5, ..description(ROWS, PER_SHARD, K) };
    let other = bench.write("level", &other, &records(ROWS, K));
    joined(&[whole.clone(), other], &bench.path("first-counts"));
    assert_files(&bench.path("first-counts"), &files(&whole));
}

#[test]
fn narrowing_while_joining_is_narrowing_afterwards() {
    let bench = Bench::new();
    let reshape = Reshape { knobs: Knobs { top_k: Some(2), ..Knobs::default() }, ..Reshape::default() };
    let parts = [bench.part(1, 2, usize::MAX), bench.part(2, 2, usize::MAX)];
    let report = combine(&parts, &bench.path("at-once"), &reshape, &ScanProgress::default()).unwrap();
    assert_eq!(report.after.selection, "top-k 2");
    repack(&bench.whole(), &bench.path("after"), &reshape, &ScanProgress::default()).unwrap();
    let [a, b] = ["at-once", "after"].map(|name| Cache::open(&bench.path(name)).unwrap());
    assert_eq!(a.len(), ROWS);
    (0..ROWS).for_each(|row| assert_eq!(a.row(row).unwrap(), b.row(row).unwrap()));
    let derived = &a.manifest().description.derived;
    assert_eq!((derived.len(), derived[0].verb.as_str(), derived[0].from.len()), (1, "combine", 2));
    // Parts that were narrowed apart have a history of their own, and still belong together.
    let narrowed = parts.iter().enumerate().map(|(i, part)| {
        let out = bench.path(&format!("narrowed-{i}"));
        repack(part, &out, &reshape, &ScanProgress::default()).unwrap();
        out
    });
    let narrowed: Vec<PathBuf> = narrowed.collect();
    joined(&narrowed, &bench.path("narrowed-then-joined"));
    let c = Cache::open(&bench.path("narrowed-then-joined")).unwrap();
    assert_eq!(c.manifest().description.derived[0].from.len(), 2);
    (0..ROWS).for_each(|row| assert_eq!(c.row(row).unwrap(), b.row(row).unwrap()));
    assert!(verify(c.dir(), &ScanProgress::default()).unwrap().is_good());
    // An unfinished part cannot be narrowed: nothing could continue the result.
    let error = combine(&[bench.part(1, 3, 4)], &bench.path("never"), &reshape, &ScanProgress::default()).unwrap_err();
    assert!(error.to_string().contains("rows 4 to 7 of 8 are missing; finish that cache"), "{error}");
}
