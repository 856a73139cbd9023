//! Every preset through both stages, resumed inside a shard, read narrower, and what is refused: through the binary.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use serde_json::Value;
use std::process::Stdio;
use support::{Bench, CHATS, STUDENT, TEACHER, files, wait_for};

/// Reference chats of which nothing is left within 128 tokens.
const TOO_LONG: [usize; 2] = [6, 20];

/// A scratch folder with the first `rows` other reference chats.
fn bench(rows: usize) -> Bench {
    let bench = Bench::new();
    let chats = std::fs::read_to_string(CHATS.as_str()).unwrap();
    let kept = chats.lines().enumerate().filter(|(i, _)| !TOO_LONG.contains(i)).take(rows);
    std::fs::write(bench.path("chats.jsonl"), kept.map(|(_, line)| line.to_string() + "\n").collect::<String>()).unwrap();
    bench
}

fn precompute<'a>(cache: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["precompute", "--teacher", TEACHER.as_str(), "--data", "chats.jsonl", "--cache", cache];
    arguments.extend(["--max-length", "128", "--pack-tokens", "256", "--quiet"]);
    arguments.extend(more);
    arguments
}

fn train<'a>(cache: &'a str, out: &'a str, steps: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut arguments = vec!["train", "--student", STUDENT.as_str(), "--cache", cache, "--out", out, "--quiet"];
    arguments.extend(["--steps", steps, "--lr", "2e-3", "--warmup-steps", "1", "--rank", "4", "--batch-size", "8"]);
    arguments.extend(more);
    arguments
}

/// The distillation loss of each step.
fn losses(bench: &Bench, out: &str) -> Vec<f64> {
    let lines = std::fs::read_to_string(bench.path(out).join("metrics.jsonl")).unwrap();
    lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["kd"].as_f64().unwrap()).collect()
}

#[test]
fn each_preset_is_written_verified_and_shown() {
    let bench = bench(6);
    let cases: [(&str, &[&str], &str, &str); 6] = [
        ("exact", &[], "bf16 logits and their log-sum-exp, zstd level 12", "the 64 most likely tokens"),
        ("standard", &[], "log-probabilities, 7 mantissa bits, zstd level 3", "the 64 most likely tokens"),
        ("compact", &["--compat"], "log-probabilities, 5 mantissa bits, zstd level 12, plain ids", "tokens of at least 1e-5"),
        ("small", &["--lse-temperatures", "0.5,2"], "4 mantissa bits, zstd level 12", "fewest tokens that make up 0.999"),
        ("sampled", &["--sample-seed", "9"], "ids and counts, zstd level 12", "50 draws from the distribution"),
        ("standard", &["--selection", "hybrid", "--top-k", "12", "--draws", "25"], "7 mantissa bits", "and 25 draws from it"),
    ];
    for (i, (preset, more, stored, kept)) in cases.into_iter().enumerate() {
        let name = format!("cache-{i}");
        bench.expect(0, &[precompute(&name, &["--preset", preset]), more.to_vec()].concat());
        assert!(bench.expect(0, &["verify", &name]).stdout.contains("all good: 6 of 6 rows"));
        let shown = bench.expect(0, &["inspect", &name]).stdout;
        assert!(shown.contains(stored) && shown.contains(kept), "{preset}: {shown}");
        assert_eq!(shown.contains("also at temperature 0.5, 2"), preset == "small", "{shown}");
        let row = bench.expect(0, &["inspect", &name, "--row", "2"]).stdout;
        assert!(shown.lines().chain(row.lines()).all(|line| line.chars().count() <= 80), "{preset}: {shown}{row}");
        let whole = bench.expect(0, &["inspect", &name, "--json"]).json();
        let figures = &whole["summary"]["distributions"];
        let drawn = preset == "sampled" || kept.contains("draws");
        assert_eq!((figures["mean_top1"].is_null(), figures["drawn"].is_null()), (preset == "sampled", !drawn), "{figures}");
        // Rounding costs where log-probabilities are rounded.
        let rounded = !matches!(preset, "exact" | "sampled");
        assert_eq!(whole["codec_kl"]["mean"].as_f64().unwrap() > 0.0, rounded, "{preset}: {}", whole["codec_kl"]);
    }
}

#[test]
fn a_run_stopped_inside_a_shard_goes_on_there_and_ends_as_the_same_bytes() {
    let bench = bench(30);
    for preset in ["compact", "sampled"] {
        let whole = format!("whole-{preset}");
        // Three packs and more in a shard; pieces after every pack.
        let more = ["--preset", preset, "--rows-per-shard", "20", "--seal-minutes", "0"];
        bench.expect(0, &precompute(&whole, &["--preset", preset, "--rows-per-shard", "20"]));
        let whole = files(&bench.path(&whole));
        assert_eq!(whole.keys().filter(|name| name.starts_with("shard-")).count(), 2);
        let mut in_time = 0;
        for (signal, piece) in
            [("-KILL", "part-00000-001.parquet"), ("-TERM", "part-00000-000.parquet"), ("-KILL", "shard-00000.parquet")]
        {
            let name = format!("cut-{preset}{signal}-{piece}");
            let mut child = bench.command(&precompute(&name, &more)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            let at_work = wait_for(&mut child, &bench.path(&name).join(piece));
            std::process::Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
            let code = child.wait().unwrap().code();
            if at_work && code != Some(0) {
                in_time += 1;
                assert_eq!(code, if signal == "-TERM" { Some(75) } else { None });
            }
            let partial = files(&bench.path(&name));
            let report = bench.expect(0, &[precompute(&name, &more), vec!["--json"]].concat());
            let resumed = report.json()["resumed_rows"].as_u64().unwrap();
            assert!(resumed > 0, "{preset}, {piece}: {:?}", partial.keys());
            assert!(files(&bench.path(&name)) == whole, "{preset} stopped at {piece} with {:?}", partial.keys());
        }
        assert!(in_time > 0, "{preset}: no run was stopped in time");
    }
}

#[test]
fn a_student_learns_from_compact_and_from_draws() {
    let bench = bench(8);
    bench.expect(0, &precompute("compact", &["--preset", "compact"]));
    bench.expect(0, &precompute("sampled", &["--preset", "sampled"]));
    bench.expect(0, &precompute("hybrid", &["--selection", "hybrid", "--top-k", "12", "--draws", "25"]));
    for cache in ["compact", "sampled", "hybrid"] {
        let out = format!("out-{cache}");
        bench.expect(0, &train(cache, &out, "12", &[]));
        let losses = losses(&bench, &out);
        // The same 8 rows in each step: the loss falls.
        assert!(losses[11] < losses[0] - 0.05, "{cache}: {losses:?}");
    }
    // Cross entropy looks at no distribution, so temperature is nothing to it.
    bench.expect(0, &train("sampled", "sft", "1", &["--objective", "sft", "--temperature", "2"]));
}

#[test]
fn reading_narrower_is_as_if_less_had_been_kept() {
    let bench = bench(8);
    let exact = ["--mantissa-bits", "23"];
    bench.expect(0, &[precompute("k16", &["--top-k", "16"]), exact.to_vec()].concat());
    bench.expect(0, &[precompute("k4", &["--top-k", "4"]), exact.to_vec()].concat());
    bench.expect(0, &[precompute("cut", &["--top-k", "16", "--min-prob", "0.02"]), exact.to_vec()].concat());
    let first = |cache: &str, out: &str, more: &[&str]| {
        bench.expect(0, &train(cache, out, "3", more));
        losses(&bench, out)
    };
    let all = first("k16", "a", &[]);
    let by_k = (first("k16", "b", &["--top-k", "4"]), first("k4", "c", &[]));
    let by_cutoff = (first("k16", "d", &["--min-prob", "0.02"]), first("cut", "e", &[]));
    for (wide, narrow) in [by_k, by_cutoff] {
        // Unrounded but for f32: tails that are summed otherwise differ by 1e-7 of themselves, and steps carry that on.
        assert!(wide.iter().zip(&narrow).all(|(a, b)| (a - b).abs() < 1e-4 * b), "{wide:?} {narrow:?}");
        assert!((wide[0] - all[0]).abs() > 1e-3 * all[0], "narrowing does something: {wide:?} {all:?}");
    }
    // It is part of which run this is.
    let ran = bench.expect(6, &train("k16", "b", "6", &["--top-k", "5"]));
    assert!(ran.error().contains("selection: the checkpoint has top-k 4, here it is top-k 5"), "{ran:?}");
}

#[test]
fn a_caches_own_selection_given_again_changes_nothing() {
    let bench = bench(6);
    let small = ["--top-k", "64", "--min-prob", "1e-3", "--mantissa-bits", "4"];
    bench.expect(0, &precompute("cut", &small));
    bench.expect(0, &train("cut", "plain", "2", &[]));
    let own = ["--min-prob", "1e-3", "--top-k", "64"];
    bench.expect(0, &train("cut", "again", "2", &own));
    assert_eq!(losses(&bench, "plain"), losses(&bench, "again"));
    // It is the same run, which has nothing left to do.
    bench.expect(0, &train("cut", "plain", "2", &own));
}

#[test]
fn every_id_may_be_kept() {
    let bench = bench(3);
    for (cache, preset) in [("standard", "standard"), ("exact", "exact")] {
        // The tokenizer's ids: nothing is left for the tail.
        bench.expect(0, &precompute(cache, &["--preset", preset, "--top-k", "2048"]));
        assert!(bench.expect(0, &["verify", cache]).stdout.contains("all good: 3 of 3 rows"));
        assert!(bench.expect(0, &["inspect", cache]).stdout.contains("the 2048 most likely tokens"));
        assert!(bench.expect(0, &["inspect", cache, "--row", "1"]).stdout.contains("most likely next"));
        bench.expect(0, &train(cache, &format!("out-{cache}"), "2", &[]));
        assert!(losses(&bench, &format!("out-{cache}")).iter().all(|loss| loss.is_finite() && *loss > 0.0));
    }
    let ran = bench.expect(2, &precompute("more", &["--top-k", "2049"]));
    assert!(ran.error().contains("top_k = 2049: expected at most the tokenizer's 2048 ids"), "{ran:?}");
}

#[test]
fn a_declared_temperature_gives_the_exact_tail() {
    let bench = bench(8);
    let exact = ["--mantissa-bits", "23"];
    bench.expect(0, &[precompute("plain", &["--top-k", "8"]), exact.to_vec()].concat());
    bench.expect(0, &[precompute("known", &["--top-k", "8", "--lse-temperatures", "2"]), exact.to_vec()].concat());
    bench.expect(0, &[precompute("full", &["--top-k", "2048"]), exact.to_vec()].concat());
    let first = |cache: &str, out: &str, t: &str| {
        bench.expect(0, &train(cache, out, "1", &["--temperature", t, "--max-unknown-mass", "1"]));
        losses(&bench, out)[0]
    };
    let (bucket, known, full) = (first("plain", "a", "2"), first("known", "b", "2"), first("full", "c", "2"));
    // Putting ids together can only bring distributions nearer to each other, if both are tempered first.
    assert!(known < full && (known - bucket).abs() > 1e-3, "bucket {bucket}, known {known}, full {full}");
    // At a temperature that is not declared nothing is known of the tail.
    assert_eq!(first("known", "d", "3"), first("plain", "e", "3"));
}

#[test]
fn a_temperature_at_which_too_much_is_unknown_is_refused_with_the_figure() {
    let bench = bench(6);
    bench.expect(0, &precompute("plain", &["--top-k", "8"]));
    bench.expect(0, &precompute("known", &["--top-k", "8", "--lse-temperatures", "2"]));
    let figure = |cache: &str, more: &[&str]| -> f64 {
        let error = bench.expect(2, &train(cache, "out", "1", more)).error().to_string();
        let (_, after) = error.split_once("up to ").unwrap_or_else(|| panic!("{error}"));
        assert!(
            error.contains("expected at most max_unknown_mass = 0.05") && error.contains("or raise --max-unknown-mass"),
            "{error}"
        );
        after.split_once(" of the teacher's probability").unwrap().0.parse().unwrap()
    };
    let at_two = figure("plain", &["--temperature", "2"]);
    assert!(at_two > 0.05 && at_two < 1.0, "{at_two}");
    assert!(figure("plain", &["--temperature", "4"]) > at_two);
    // A temperature that changes is looked at all the way: the worst is at its end here, which is the figure at 2.
    assert_eq!(figure("plain", &["--temperature-end", "2"]), at_two);
    assert_eq!(figure("known", &["--temperature", "2", "--tail", "ghost"]), at_two);
    let error = bench.expect(2, &train("known", "out", "1", &["--temperature", "2", "--tail", "ghost"]));
    assert!(error.error().contains("--tail auto"), "{error:?}");
    assert!(!bench.path("out").exists(), "refused before anything is written");
    // What the cache declares is known, what is left out is no guess, and the bound is the user's.
    let said =
        |out: &str, more: &[&str]| bench.expect(0, &train("known", out, "1", &[&["--temperature", "2"], more].concat())).stdout;
    assert!(said("a", &["--max-unknown-mass", "0"]).contains("formed at temperature 2"));
    assert!(said("b", &["--tail", "renorm", "--max-unknown-mass", "0"]).contains("both renormalised"));
    assert!(said("c", &["--tail", "none"]).contains("not renormalised (biased)"));
    let told = said("d", &["--tail", "bucket", "--max-unknown-mass", "1"]);
    assert!(told.contains(&format!("the tail as one bucket (up to {at_two:.4} unknown)")), "{told}");
}

#[test]
fn every_divergence_trains_and_weights_change_as_planned() {
    let bench = bench(6);
    bench.expect(0, &precompute("k8", &["--top-k", "8"]));
    let mut seen = Vec::new();
    for divergence in ["forward-kl", "reverse-kl", "jsd", "skewed-kl", "skewed-reverse-kl", "total-variation"] {
        bench.expect(0, &train("k8", divergence, "2", &["--divergence", divergence]));
        let losses = losses(&bench, divergence);
        assert!(losses.iter().all(|loss| *loss > 0.0) && !seen.contains(&losses), "{divergence}: {losses:?}");
        seen.push(losses);
    }
    let ran = bench.expect(6, &train("k8", "jsd", "3", &["--divergence", "jsd", "--beta", "0.9"]));
    assert!(ran.error().contains("divergence: the checkpoint has Jensen-Shannon divergence, beta 0.5"), "{ran:?}");

    let turn = ["--kd-alpha", "1", "--kd-alpha-end", "0", "--kd-ce-alpha", "0", "--kd-ce-alpha-end", "1"];
    let turn = [&turn[..], &["--checkpoint-every", "2"]].concat();
    bench.expect(0, &train("k8", "turn", "3", &turn));
    let lines = std::fs::read_to_string(bench.path("turn").join("metrics.jsonl")).unwrap();
    let steps: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let value = |step: usize, name: &str| steps[step][name].as_f64();
    assert_eq!(value(0, "loss"), value(0, "kd"));
    let middle = 0.5 * value(1, "kd").unwrap() + 0.5 * value(1, "ce").unwrap();
    assert!((value(1, "loss").unwrap() - middle).abs() < 1e-9 * middle, "{lines}");
    assert_eq!((value(2, "loss"), value(2, "kd")), (value(2, "ce"), None));
    // Taken up after the second step, the third is what it was.
    let adapter = || std::fs::read(bench.path("turn/adapter/adapter_model.safetensors")).unwrap();
    let whole = adapter();
    bench.expect(0, &train("k8", "turn", "3", &[&turn[..], &["--resume", "turn/checkpoint-2"]].concat()));
    assert!(adapter() == whole, "the same bytes");
    assert_eq!(std::fs::read_to_string(bench.path("turn").join("metrics.jsonl")).unwrap().lines().count(), 3);
    // Its last step is a last step: the run cannot be made longer, nor end elsewhere.
    let ran = bench.expect(6, &train("k8", "turn", "4", &turn));
    assert!(ran.error().contains("steps: the checkpoint has 3, here it is 4"), "{ran:?}");
}

#[test]
fn what_a_cache_cannot_give_is_refused_before_weights_are_read() {
    let bench = bench(3);
    bench.expect(0, &precompute("k8", &["--top-k", "8"]));
    bench.expect(0, &precompute("sampled", &["--preset", "sampled"]));
    let says = |code: i32, arguments: &[&str], sentence: &str| {
        let ran = bench.expect(code, arguments);
        assert!(ran.error().contains(sentence), "{arguments:?}: {}", ran.error());
    };
    let linear = "sampled: tokens were drawn (sampled 50 seed 0), which can be trained on with forward KL at temperature 1 alone: \
                  found forward KL at temperature 2";
    says(2, &train("sampled", "out", "1", &["--temperature", "2"]), linear);
    says(2, &train("sampled", "out", "1", &["--divergence", "reverse-kl"]), "found reverse KL at temperature 1");
    says(2, &train("sampled", "out", "1", &["--tail", "renorm"]), "found forward KL at temperature 1, tail renorm");
    says(2, &train("sampled", "out", "1", &["--temperature-end", "2"]), "found forward KL at temperature 1 to 2");
    says(
        2,
        &train("k8", "out", "1", &["--tail", "none", "--temperature", "2"]),
        "none needs ln Σ p^(1/T), which the cache knows at []",
    );
    says(2, &train("k8", "out", "1", &["--tail", "none", "--divergence", "jsd"]), "tail = none: expected bucket");
    says(
        2,
        &train("sampled", "out", "1", &["--top-k", "4"]),
        "selection: the cache has sampled 50 seed 0, which cannot become top-k 4",
    );
    says(2, &train("k8", "out", "1", &["--top-k", "9"]), "selection: the cache has top-k 8, which cannot become top-k 9");
    says(
        2,
        &train("k8", "out", "1", &["--min-prob", "0.1", "--min-mass", "0.5"]),
        "min_mass = 0.5: expected either min_prob or min_mass",
    );
    assert!(!bench.path("out").exists());
    for (flags, sentence) in [
        (&["--draws", "5"][..], "draws = 5: expected nothing, for the selection is top-k"),
        (&["--preset", "sampled", "--top-k", "3"], "top_k = 3: expected nothing, for the selection is sampled"),
        (
            &["--preset", "sampled", "--values", "logit-bf16"],
            "values = logit-bf16: expected logprob, for the selection is sampled",
        ),
        (&["--preset", "exact", "--mantissa-bits", "5"], "mantissa_bits = 5: expected 7, for the values are bf16 logits"),
        (&["--lse-temperatures", "2,1.5"], "lse_temperatures = [2.0, 1.5]: expected at most 8 rising temperatures"),
        (&["--lse-temperatures", "1"], "lse_temperatures = [1.0]: expected at most 8 rising temperatures"),
    ] {
        says(2, &precompute("new", flags), sentence);
    }
    assert!(!bench.path("new").exists());
    says(6, &precompute("k8", &["--preset", "compact", "--top-k", "8"]), "selection");
    says(6, &precompute("sampled", &["--preset", "sampled", "--sample-seed", "1"]), "selection.seed");
}
