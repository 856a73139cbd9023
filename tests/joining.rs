//! Parts, repack, combine, verify and repair through the binary, with the reference teacher.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use support::{Bench, Ran, files, golden, precompute};

fn with<'a>(base: Vec<&'a str>, more: &[&'a str]) -> Vec<&'a str> {
    [base, more.to_vec()].concat()
}

/// Whether a folder holds these very files; a failure names those that differ.
fn assert_files(folder: &Path, expected: &BTreeMap<String, Vec<u8>>) {
    let found = files(folder);
    let names = found.keys().chain(expected.keys());
    let differing: Vec<&String> = names.filter(|name| found.get(*name) != expected.get(*name)).collect();
    assert!(differing.is_empty(), "{}: {differing:?} differ", folder.display());
}

fn assert_narrow(ran: &Ran) {
    assert!(ran.stdout.lines().all(|line| line.chars().count() <= 80), "{}", ran.stdout);
}

#[test]
fn parts_scored_apart_make_the_cache_of_a_single_run() {
    let bench = Bench::new();
    bench.cache("whole");
    let whole = files(&bench.path("whole"));
    for part in ["1/3", "2/3", "3/3"] {
        let name = format!("part-{}", &part[..1]);
        let report = bench.expect(3, &with(precompute(&name), &["--part", part, "--json"])).json();
        assert!((8..=16).contains(&report["rows"].as_u64().unwrap()), "{report}");
    }
    let refused = bench.run(&["combine", "--out", "never", "part-1", "part-3"]);
    assert_eq!((refused.code, refused.error()), (2, "part-1: part 2 of 3 is missing; name a cache of each part"));
    assert!(!bench.path("never").exists());
    let ran = bench.expect(0, &["combine", "--out", "all", "part-3", "part-1", "part-2", "--quiet"]);
    assert_narrow(&ran);
    assert!(ran.stdout.contains("conversations"), "{}", ran.stdout);
    assert_files(&bench.path("all"), &whole);
    // Stage one finds nothing left to do.
    let report = bench.expect(3, &with(precompute("all"), &["--json"])).json();
    assert_eq!((report["resumed_rows"].as_u64(), report["scored_tokens"].as_u64()), (Some(39), Some(0)));
    assert_files(&bench.path("all"), &whole);

    // Of more parts than shards some are empty, and say so.
    let ran = bench.expect(3, &with(precompute("more"), &["--part", "1/6"]));
    assert!(ran.stdout.contains("nothing to do: the data make fewer shards than there are shares,"), "{}", ran.stdout);
    assert_narrow(&ran);
    let refused = bench.run(&with(precompute("more"), &["--part", "3/2"]));
    assert_eq!((refused.code, refused.error()), (2, "--part = \"3/2\": expected N/T with N from 1 to T"));
}

#[test]
fn caches_of_two_files_are_put_together_as_one_run_would() {
    let bench = Bench::new();
    let chats = std::fs::read_to_string(golden("chats.jsonl")).unwrap();
    let lines: Vec<&str> = chats.lines().collect();
    // Two conversations are in both files.
    let (a, b) = (lines[..20].join("\n"), [&lines[18..], &lines[..1]].concat().join("\n"));
    std::fs::write(bench.path("a.jsonl"), a).unwrap();
    std::fs::write(bench.path("b.jsonl"), b).unwrap();
    // A pack of its own for each conversation: its bits do not depend on its neighbours.
    let over = |data: &[&'static str], cache: &'static str, pack_tokens: &'static str| {
        let mut arguments = vec!["precompute", "--teacher", support::TEACHER.as_str(), "--cache", cache, "--data"];
        arguments.extend(data);
        arguments.extend([
            "--max-length",
            "256",
            "--top-k",
            "16",
            "--rows-per-shard",
            "8",
            "--pack-tokens",
            pack_tokens,
            "--quiet",
            "--json",
        ]);
        let ran = bench.run(&arguments);
        assert!(ran.code == 0 || ran.code == 3, "{ran:?}");
        ran.json()
    };
    over(&["a.jsonl"], "a", "1");
    over(&["b.jsonl"], "b", "1");
    let single = over(&["a.jsonl", "b.jsonl"], "single", "1");
    let report = bench.expect(0, &["combine", "--out", "both", "a", "b", "--json", "--quiet"]).json();
    assert_eq!(report["rows"], single["rows"]);
    assert!(report["duplicates"].as_u64().unwrap() >= 2, "{report}");
    assert_eq!(report["duplicates"], single["skipped"]["duplicate of an earlier row"]);
    assert_files(&bench.path("both"), &files(&bench.path("single")));
    let ran = bench.expect(0, &["combine", "--out", "both", "a", "b", "--quiet"]);
    assert_narrow(&ran);
    assert!(ran.stdout.contains("left out"), "{}", ran.stdout);
    // Scored in other packs, the conversations of both may differ in their last bits: the first scoring is kept.
    over(&["b.jsonl"], "b-packed", "512");
    let packed = bench.expect(0, &["combine", "--out", "both-packed", "a", "b-packed", "--json", "--quiet"]).json();
    assert_eq!((&packed["rows"], &packed["duplicates"]), (&report["rows"], &report["duplicates"]));
}

#[test]
fn a_cache_is_repacked_and_says_what_changed() {
    let bench = Bench::new();
    bench.cache("c");
    let ran = bench.expect(0, &["repack", "c", "small", "--top-k", "8", "--mantissa-bits", "5", "--zstd-level", "12", "--quiet"]);
    assert_narrow(&ran);
    for fact in ["top-k 16 -> top-k 8", "7 mantissa bits -> 5 mantissa bits", "zstd 3 -> zstd 12", "B of "] {
        assert!(ran.stdout.contains(fact), "{fact}: {}", ran.stdout);
    }
    assert!(bench.expect(0, &["verify", "small"]).stdout.contains("all good: 39 of 39 rows"));
    let report =
        bench.expect(0, &["repack", "c", "small", "--top-k", "8", "--mantissa-bits", "5", "--zstd-level", "12", "--json"]);
    assert_eq!((report.json()["resumed_rows"].as_u64(), report.json()["complete"].as_bool()), (Some(39), Some(true)));
    let refused = bench.run(&["repack", "small", "again", "--mantissa-bits", "7"]);
    assert_eq!(refused.code, 2);
    assert!(
        refused.error().starts_with("mantissa_bits: the cache has 5, which cannot become 7 without the teacher"),
        "{refused:?}"
    );
    let refused = bench.run(&["repack", "c", "again", "--preset", "smal"]);
    assert!(refused.code == 2 && refused.stderr.contains("unknown variant `smal`"), "{refused:?}");
    let refused = bench.run(&["repack", "c", "small"]);
    assert_eq!(refused.code, 6, "{refused:?}");
    // A preset's k is how many at most; one that was asked for by itself has to be there.
    assert_eq!(bench.run(&["repack", "c", "compact", "--preset", "compact", "--top-k", "64"]).code, 2);
    let ran = bench.expect(0, &["repack", "c", "compact", "--preset", "compact", "--compat", "--quiet"]);
    assert!(ran.stdout.contains("top-k 16 -> cutoff 16 p>=1e-5"), "{}", ran.stdout);
    assert!(bench.expect(0, &["inspect", "compact"]).stdout.contains("39"));
    bench.expect(0, &["verify", "compact", "--sample", "2/3"]);
}

fn verify<'a>(cache: &'a str, list: &'a str) -> Vec<&'a str> {
    vec!["verify", cache, "--repair-list", list, "--quiet"]
}

#[test]
fn damage_is_listed_and_repaired_to_the_very_bytes() {
    let bench = Bench::new();
    bench.cache("c");
    let whole = files(&bench.path("c"));
    let ran = bench.expect(0, &verify("c", "list.json"));
    assert!(ran.stdout.contains("list.json: nothing to compute again"), "{}", ran.stdout);

    // A few rows of one shard, all of another, and a companion file.
    let path = bench.path("c/shard-00001.parquet");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.len() / 2;
    bytes[at..at + 40].fill(0);
    std::fs::write(&path, bytes).unwrap();
    std::fs::remove_file(bench.path("c/shard-00003.parquet")).unwrap();
    std::fs::write(bench.path("c/tokenizer/tokenizer.json"), "{}").unwrap();
    let refused = bench.run(&precompute("c"));
    assert_eq!(refused.code, 4, "{refused:?}");
    let found = bench.expect(4, &with(verify("c", "list.json"), &["--json"])).json();
    let damaged = found["damaged_shards"][0]["damaged"].as_array().unwrap().len();
    assert!((1..8).contains(&damaged) && found["damaged_shards"][1]["whole"] == true, "{found}");
    let ran = bench.expect(4, &verify("c", "list.json"));
    assert!(ran.stdout.contains(&format!("{} rows of 2 files to compute again", damaged + 8)), "{}", ran.stdout);
    assert!(ran.stdout.lines().any(|line| line.starts_with("shard-00003.parquet") && line.ends_with("lost")), "{}", ran.stdout);

    // Settings that make another cache are refused with both digests.
    let other = [precompute("c"), vec!["--repair", "list.json", "--truncate", "right"]].concat();
    let refused = bench.run(&other);
    assert_eq!(refused.code, 6, "{refused:?}");
    assert!(refused.error().starts_with("list.json: made for the cache with description "), "{refused:?}");

    let report = bench.expect(3, &with(precompute("c"), &["--repair", "list.json", "--json"])).json();
    let mended = &report["repair"]["shards"];
    assert_eq!(
        (mended[0]["recomputed_rows"].as_u64(), mended[0]["sameness"].as_str()),
        (Some(damaged as u64), Some("identical"))
    );
    assert_eq!((mended[1]["recomputed_rows"].as_u64(), mended[1]["kept_rows"].as_u64()), (Some(8), Some(0)));
    assert_files(&bench.path("c"), &whole);

    // The manifest is lost, and with it the last shard.
    std::fs::remove_file(bench.path("c/manifest.json")).unwrap();
    std::fs::remove_file(bench.path("c/shard-00002.parquet")).unwrap();
    let ran = bench.expect(4, &verify("c", "list.json"));
    assert!(ran.stdout.contains("the manifest to rebuild from the shards"), "{}", ran.stdout);
    assert_eq!(bench.run(&precompute("c")).code, 2, "a folder without a manifest is nobody's cache");
    let ran = bench.expect(3, &with(precompute("c"), &["--repair", "list.json"]));
    assert_narrow(&ran);
    assert!(ran.stdout.contains("the manifest has been rebuilt, with 4 good shards as they were"), "{}", ran.stdout);
    assert_files(&bench.path("c"), &whole);
}

/// The manifest that the cache began with.
fn first_manifest(cache: &Path) -> Vec<u8> {
    let begun = tempfile::tempdir().unwrap();
    let cache = potstill_cache::Cache::open(cache).unwrap();
    let manifest = cache.manifest();
    let kept = |path: &str| potstill_cache::Companion { path: path.into(), bytes: cache.companion(path).unwrap() };
    let companions = manifest.companions.iter().map(|entry| kept(&entry.path)).collect();
    let options = potstill_cache::WriterOptions { companions };
    drop(potstill_cache::CacheWriter::open(begun.path(), &manifest.description, options).unwrap());
    std::fs::read(begun.path().join("manifest.json")).unwrap()
}

#[test]
fn an_earlier_manifest_is_reported_refused_and_rebuilt() {
    let bench = Bench::new();
    bench.cache("c");
    let whole = files(&bench.path("c"));
    std::fs::write(bench.path("c/manifest.json"), first_manifest(&bench.path("c"))).unwrap();
    let stale = files(&bench.path("c"));
    let ran = bench.expect(4, &verify("c", "list.json"));
    for words in
        ["shard-00000.parquet to shard-00004.parquet (5 files) not", "1 problem", "the manifest to rebuild from the shards"]
    {
        assert!(ran.stdout.contains(words), "{words}: {}", ran.stdout);
    }
    let refused = bench.run(&precompute("c"));
    assert!(refused.code == 4 && refused.error().contains("precompute --repair FILE"), "{refused:?}");
    assert_files(&bench.path("c"), &stale);
    let ran = bench.expect(3, &with(precompute("c"), &["--repair", "list.json"]));
    assert!(ran.stdout.contains("the manifest has been rebuilt, with 5 good shards as they were"), "{}", ran.stdout);
    assert_files(&bench.path("c"), &whole);

    // A folder with a shard that is nobody's, and no manifest.
    std::fs::create_dir(bench.path("his")).unwrap();
    std::fs::write(bench.path("his/shard-00000.parquet"), "his").unwrap();
    std::fs::write(bench.path("his/notes.tmp"), "his too").unwrap();
    bench.expect(4, &verify("his", "list.json"));
    let refused = bench.run(&with(precompute("his"), &["--repair", "list.json"]));
    assert!(refused.code == 2 && refused.error().contains("give another folder"), "{refused:?}");
    assert_eq!(std::fs::read(bench.path("his/shard-00000.parquet")).unwrap(), b"his");
    assert!(bench.path("his/notes.tmp").exists());
}

#[test]
fn a_check_is_quick_or_a_sample_and_says_so() {
    let bench = Bench::new();
    bench.cache("c");
    let ran = bench.expect(0, &["verify", "c", "--quick"]);
    assert!(ran.stdout.contains("all good: 39 rows, none of them read (--quick), 5 shards"), "{}", ran.stdout);
    let ran = bench.expect(0, &["verify", "c", "--sample", "2/7"]);
    assert!(ran.stdout.contains("all good: 6 of the 6 rows in sample 2/7 of 39"), "{}", ran.stdout);
    assert_eq!(bench.run(&["verify", "c", "--sample", "8/7"]).code, 2);
    assert_eq!(bench.run(&["verify", "c", "--quick", "--sample", "1/7"]).code, 2);
    // Pages of single values lie together: with them a whole row group is unreadable, and is said in one line.
    let path = bench.path("c/shard-00002.parquet");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[30..60].fill(0);
    std::fs::write(&path, bytes).unwrap();
    let ran = bench.expect(4, &["verify", "c", "--quiet"]);
    assert!(ran.stdout.contains("shard-00002.parquet, row group 0, rows 16 to 23: expected "), "{}", ran.stdout);
    assert_eq!(ran.stdout.lines().filter(|line| line.starts_with("wrong: ")).count(), 2, "{}", ran.stdout);
    for (verb, words) in [("repack", "--preset compact"), ("combine", "--out caches/all"), ("verify", "--sample 3/7")] {
        assert!(bench.expect(0, &[verb, "--help"]).stdout.contains(words), "{verb}");
    }
}

#[test]
fn a_list_replaces_lists_and_nothing_else() {
    let bench = Bench::new();
    bench.cache("c");
    let good = files(&bench.path("c"));
    std::fs::write(bench.path("mine.txt"), "mine").unwrap();
    for (target, expected) in [
        ("c/shard-00000.parquet", "lies in the cache; expected a file outside its folder"),
        ("c/new.json", "lies in the cache; expected a file outside its folder"),
        ("mine.txt", "is there already and is no repair list; give another name"),
    ] {
        let refused = bench.run(&["verify", "c", "--repair-list", target]);
        assert_eq!((refused.code, refused.error()), (2, format!("--repair-list {target}: {expected}").as_str()));
    }
    assert_files(&bench.path("c"), &good);
    assert_eq!(std::fs::read_to_string(bench.path("mine.txt")).unwrap(), "mine");
    bench.expect(0, &["verify", "c", "--repair-list", "list.json"]);
    bench.expect(0, &["verify", "c", "--repair-list", "list.json"]);
    // What no teacher wrote is not sent to one.
    bench.expect(0, &["repack", "c", "small", "--preset", "small"]);
    let mut shard = std::fs::read(bench.path("small/shard-00000.parquet")).unwrap();
    shard[100] ^= 1;
    std::fs::write(bench.path("small/shard-00000.parquet"), shard).unwrap();
    let found = bench.expect(4, &["verify", "small", "--repair-list", "small.json"]);
    assert!(found.stdout.contains("repack made this cache: remove its folder and repack again"), "{}", found.stdout);
}
