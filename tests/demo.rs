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

#[test]
fn the_proof_compares_arms_that_differ_in_nothing_else() {
    let bench = Bench::new();
    let account =
        bench.expect(0, &["demo", "--proof", "--seeds", "1", "--steps", "3", "--out", "proof", "--json", "--quiet"]).json();
    let trials = account["trials"].as_array().unwrap();
    assert_eq!(trials.len(), 4);
    for trial in trials {
        let nll = |model: &serde_json::Value| model["nll"].as_f64().unwrap();
        let arms: Vec<f64> = trial["arms"].as_array().unwrap().iter().map(nll).collect();
        assert_eq!(arms.len(), 3);
        // Three steps move a student a little, each objective another way.
        assert!(arms.iter().all(|arm| (arm - nll(&trial["base"])).abs() < 0.5 && *arm != nll(&trial["base"])), "{trial}");
        assert!(arms[0] != arms[1] && arms[1] != arms[2], "{trial}");
        // On clean rows, the taught teacher's own divergence from itself is what storing its distributions cost.
        let (kl, weak) = (trial["teacher"]["kl"].as_f64().unwrap(), trial["condition"] == 3);
        assert!(if weak { kl > 0.05 } else { kl < 1e-3 }, "{trial}");
    }
    // One base, one teacher but the weak one: what chance decides is the same in all conditions of a seed.
    assert_eq!(trials[0]["base"], trials[3]["base"]);
    assert_eq!(trials[0]["teacher"], trials[2]["teacher"]);
    assert_eq!(account["parts"][0]["distill_against_sft"], "one seed: no interval, so nothing is shown");
    let stored: serde_json::Value = serde_json::from_slice(&std::fs::read(bench.path("proof/proof.json")).unwrap()).unwrap();
    assert_eq!(stored, account);
    for (wrong, word) in [(&["demo", "--proof", "--seeds", "11"][..], "1..=10"), (&["demo", "--sweep"], "--proof")] {
        assert!(bench.expect(2, wrong).stderr.contains(word), "{wrong:?}");
    }
}
