//! `diff` through the binary: what it prints is held against a stored text, what it refuses says why.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use support::Bench;

/// A folder with the caches `a` (all 16 entries of a few real distributions) and `b` (the 4 first of each).
fn caches(bench: &Bench) {
    let teacher = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/golden/teacher-awq");
    let chats = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/inspect/hostile.jsonl");
    let arguments = ["precompute", "--teacher", teacher, "--data", chats, "--cache", "a", "--top-k", "16", "--quiet"];
    bench.expect(0, &arguments);
    bench.expect(0, &["repack", "a", "b", "--top-k", "4", "--quiet"]);
}

#[test]
fn a_smaller_cache_lies_where_the_larger_one_does() {
    let bench = Bench::new();
    caches(&bench);
    let found = bench.expect(0, &["diff", "a", "b", "--json", "--quiet"]).json();
    assert_eq!(
        (found["rows"].as_u64(), found["only_first"].as_u64(), found["only_second"].as_u64()),
        (Some(8), Some(0), Some(0))
    );
    let figures = &found["figures"];
    assert_eq!((figures["top1_agrees"].as_f64(), figures["mean_shared_ids"].as_f64()), (Some(1.0), Some(4.0)));
    // Both say the same of four tokens and the rest, but for the rounding of the rest.
    assert!(figures["forward"]["largest"].as_f64().unwrap() < 1e-4, "{figures}");
    let text = bench.expect(0, &["diff", "a", "b", "--quiet"]).stdout;
    assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    for part in
        ["8 in both; 0 in the first alone, 0 in the second", "the same at 100.00%", "KL(second, first)", "Rows that differ most"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }
}

#[test]
fn caches_that_share_no_row_are_refused_with_the_reason() {
    let bench = Bench::new();
    caches(&bench);
    let golden = |name: &str| format!("{}/tests/fixtures/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    let (teacher, chats) = (golden("teacher-awq"), golden("chats.jsonl"));
    bench.expect(0, &["precompute", "--teacher", &teacher, "--data", &chats, "--cache", "other", "--top-k", "4", "--quiet"]);
    let ran = bench.expect(2, &["diff", "a", "other", "--quiet"]);
    assert_eq!(ran.error(), "a and other share no row: they were made from other data");
    let hostile = format!("{}/tests/fixtures/inspect/hostile.jsonl", env!("CARGO_MANIFEST_DIR"));
    let sampled = ["--preset", "sampled", "--quiet"];
    let arguments = ["precompute", "--teacher", &teacher, "--data", &hostile, "--cache", "drawn"];
    bench.expect(0, &[&arguments[..], &sampled].concat());
    let ran = bench.expect(2, &["diff", "a", "drawn", "--quiet"]);
    assert!(ran.error().starts_with("drawn: holds draws alone"), "{ran:?}");
}
