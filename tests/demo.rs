//! The README's first command, from nothing: tiny models are made and carried through every stage.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use support::{Bench, files};

#[test]
fn the_demo_makes_everything_once() {
    let bench = Bench::new();
    let made = bench.expect(0, &["demo", "--out", "demo", "--json", "--quiet"]).json();
    let (first, last) = (made["train"]["first_loss"].as_f64().unwrap(), made["train"]["last_loss"].as_f64().unwrap());
    assert!(last < 0.9 * first, "{first} to {last}");
    let all = files(&bench.path("demo"));
    for name in [
        "miniature/chats.jsonl",
        "miniature/teacher/model.safetensors.index.json",
        "miniature/student/model.safetensors",
        "cache/manifest.json",
        "cache/shard-00000.parquet",
        "run/adapter/adapter_model.safetensors",
        "run/metrics.jsonl",
        "merged/model.safetensors",
        "merged/config.json",
    ] {
        assert!(all.contains_key(name), "{name} in {:?}", all.keys());
    }
    bench.expect(0, &["verify", "demo/cache"]);
    // What is finished is not made again over itself.
    let again = bench.expect(2, &["demo", "--out", "demo", "--quiet"]);
    assert_eq!(again.error(), "demo: holds a finished demo; name a new folder with --out");
    assert_eq!(files(&bench.path("demo")), all);
}
