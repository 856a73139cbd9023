//! One real run from end to end through the binary: chats → teacher → cache → student → adapter → merged model.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use serde_json::Value;
use support::{Bench, STUDENT, TEACHER, files, golden, precompute};

/// One metrics.jsonl as values.
fn metrics(bench: &Bench, out: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(bench.path(out).join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn train<'a>(out: &'a str, objective: &'a str, steps: &'a str) -> Vec<&'a str> {
    let mut arguments = vec!["train", "--student", STUDENT.as_str(), "--cache", "cache", "--out", out];
    arguments.extend(["--objective", objective, "--steps", steps, "--lr", "5e-3", "--rank", "8", "--warmup-steps", "2"]);
    arguments.extend(["--batch-size", "8", "--pack-tokens", "512", "--quiet"]);
    arguments
}

#[test]
fn every_stage_of_a_run() {
    let bench = Bench::new();
    bench.cache("cache");

    // The cache: all rows but the one that truncation leaves nothing of; every byte checks.
    let verified = bench.expect(0, &["verify", "cache", "--json"]).json();
    assert_eq!((&verified["rows"], &verified["problem_count"]), (&39.into(), &0.into()), "{verified}");
    let summary = bench.expect(0, &["inspect", "cache", "--json"]).json();
    let text = summary.to_string();
    assert!(text.contains("\"rows\":39"), "{text}");
    let row = bench.expect(0, &["inspect", "cache", "--row", "0"]).stdout;
    assert!(row.contains("<|im_start|>") && row.contains("most likely next"), "{row}");

    for objective in ["sft", "distill", "distill+sft"] {
        let out = format!("run-{objective}");
        let report = bench.expect(0, &[train(&out, objective, "20"), vec!["--json"]].concat()).json();
        assert_eq!(report["steps"], 20, "{report}");
        let lines = metrics(&bench, &out);
        assert_eq!(lines.iter().map(|l| l["step"].as_u64().unwrap()).collect::<Vec<_>>(), (1..=20).collect::<Vec<_>>());
        let mean = |lines: &[Value]| lines.iter().map(|l| l["loss"].as_f64().unwrap()).sum::<f64>() / lines.len() as f64;
        let (first, last) = (mean(&lines[..5]), mean(&lines[15..]));
        assert!(last < 0.9 * first, "{objective}: {first} to {last}");
        for line in &lines {
            let (kd, ce, loss) = (line["kd"].as_f64(), line["ce"].as_f64().unwrap(), line["loss"].as_f64().unwrap());
            let expected = match objective {
                "sft" => ce,
                "distill" => kd.unwrap(),
                _ => 0.5 * kd.unwrap() + 0.5 * ce,
            };
            assert!((loss - expected).abs() < 1e-9, "{objective}: {line}");
            assert_eq!(kd.is_some(), objective != "sft");
            for key in ["lr", "grad_norm", "tokens"] {
                assert!(line[key].as_f64().unwrap() > 0.0, "{key} in {line}");
            }
        }
        let names = files(&bench.path(&out));
        for name in ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/tokenizer.json"] {
            assert!(names.contains_key(name), "{name} in {:?}", names.keys());
        }
        assert!(names.contains_key("config.resolved.toml") && names.contains_key("checkpoint-20/optimizer.safetensors"));
    }

    // The three arms come from one cache and differ.
    let adapter = |arm: &str| files(&bench.path(&format!("run-{arm}/adapter")))["adapter_model.safetensors"].clone();
    assert_ne!(adapter("sft"), adapter("distill"));
    assert_ne!(adapter("distill"), adapter("distill+sft"));

    let merge = |adapter| bench.expect(1, &["merge", "--student", &STUDENT, "--adapter", adapter, "--out", "merged", "--quiet"]);
    let sentence = "run-distill: expected a PEFT adapter folder, found one in run-distill/adapter";
    assert_eq!(merge("run-distill").error(), sentence);
    assert_eq!(merge("nowhere").error(), "nowhere: expected a PEFT adapter folder, found nothing there");
    bench.expect(0, &["merge", "--student", &STUDENT, "--adapter", "run-distill/adapter", "--out", "merged", "--quiet"]);
    let merged = files(&bench.path("merged"));
    let base = std::fs::read(golden("student/model.safetensors")).unwrap();
    assert_eq!(merged["model.safetensors"].len(), base.len(), "same tensors, other values");
    assert_ne!(merged["model.safetensors"], base);

    // The merged folder is a model folder like any other: it can teach.
    let chats = golden("chats.jsonl");
    bench.expect(
        3,
        &["precompute", "--teacher", "merged", "--data", &chats, "--cache", "again", "--max-length", "256", "--quiet"],
    );
}

/// Lays a folder of the reference data out as a snapshot in the Hugging Face cache `hub`.
fn cached(bench: &Bench, folder: &str, repository: &str, within: &str) {
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let root = bench.path("hub").join(repository);
    let snapshot = root.join("snapshots").join(commit).join(within);
    for place in [&root.join("blobs"), &root.join("refs"), &snapshot] {
        std::fs::create_dir_all(place).unwrap();
    }
    std::fs::write(root.join("refs/main"), commit).unwrap();
    let (from, up) = (golden(folder), if within.is_empty() { "../../" } else { "../../../" });
    for file in [std::path::PathBuf::from(&from)]
        .into_iter()
        .chain(std::fs::read_dir(&from).into_iter().flatten().map(|e| e.unwrap().path()))
    {
        if file.is_file() {
            let name = file.file_name().unwrap().to_str().unwrap();
            let etag = name.replace('.', "-");
            std::fs::copy(&file, root.join("blobs").join(&etag)).unwrap();
            std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), snapshot.join(name)).unwrap();
        }
    }
}

#[test]
fn an_adapter_says_what_it_learned_from_and_how() {
    let bench = Bench::new();
    bench.cache("cache");
    let told = |out: &str, objective: &str, more: &[&str]| {
        bench.expect(0, &[train(out, objective, "1"), more.to_vec()].concat());
        let all = files(&bench.path(out));
        let json = |name: &str| serde_json::from_slice::<Value>(&all[name]).unwrap();
        let settings = json("adapter/distill_run.json")["settings"].clone();
        (String::from_utf8(all["adapter/README.md"].clone()).unwrap(), settings, json("adapter/distill_run.json"))
    };
    // An evaluation needs no more of the cache than training does, whatever tail and temperature a distillation would have.
    let (card, settings, _) = told("sft", "sft", &["--tail", "none", "--temperature", "3", "--eval-rows", "10"]);
    assert!(card.contains("Trained by potstill on the data's own tokens, ") && card.contains("- sft\n"), "{card}");
    assert!(!card.contains("distillation") && !card.contains("| teacher |"), "{card}");
    assert!(settings.get("tail").is_none() && settings.get("bf16_products").is_none(), "{settings}");
    // What this loss never looks at is no reason to refuse.
    bench.expect(0, &[train("sft", "sft", "1"), vec!["--eval-rows", "10", "--divergence", "jsd", "--top-k", "4"]].concat());

    let more = ["--kd-alpha-end", "0", "--kd-ce-alpha-end", "1", "--temperature", "2", "--temperature-end", "1"];
    let (card, settings, run) = told("both", "distill", &[&more[..], &["--compute", "bf16", "--max-unknown-mass", "1"]].concat());
    assert!(card.contains("from cached teacher distributions and on the data's own tokens, "), "{card}");
    for line in ["| loss | (1 -> 0) · T² · forward_kl + (0 -> 1) · cross entropy |", "| temperature | 2 -> 1 |"] {
        assert!(card.contains(line), "{line} is not in {card}");
    }
    assert_eq!((&run["loss"]["kd_alpha"], &run["loss_at_last"]["kd_alpha"]), (&1.0.into(), &0.0.into()));
    let pairs = potstill_pipeline::kernel::Isa::best().multiplies_pairs();
    assert_eq!(settings["bf16_products"], if pairs { "pairs" } else { "f32" });
}

#[test]
fn a_run_by_name_is_the_run_by_path() {
    let bench = Bench::new();
    cached(&bench, "teacher-awq", "models--Org--Teacher-AWQ", "");
    cached(&bench, "student", "models--Org--Student", "");
    cached(&bench, "chats.jsonl", "datasets--Org--Chats", "train");
    let run = |code: i32, arguments: &[&str]| {
        let output = bench.command(arguments).env("HF_HUB_CACHE", bench.path("hub")).env("HF_HUB_OFFLINE", "1").output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stderr).unwrap()
    };
    bench.cache("by-path");
    let by_name = |a: &'static str| match a {
        a if a == TEACHER.as_str() => "Org/Teacher-AWQ",
        a if a == support::CHATS.as_str() => "Org/Chats:train",
        a => a,
    };
    run(3, &precompute("by-name").into_iter().map(by_name).collect::<Vec<_>>());
    let (named, others) = (files(&bench.path("by-name")), files(&bench.path("by-path")));
    let manifest =
        |files: &std::collections::BTreeMap<String, Vec<u8>>| serde_json::from_slice::<Value>(&files["manifest.json"]).unwrap();
    let (ours, theirs) = (manifest(&named), manifest(&others));
    assert_eq!(ours["description"]["teacher"]["name"], "Org/Teacher-AWQ");
    assert_eq!(theirs["description"]["teacher"]["name"], "teacher-awq");
    assert_eq!(ours["description"]["data"], theirs["description"]["data"], "files are known by name and content");
    assert_eq!(named.keys().collect::<Vec<_>>(), others.keys().collect::<Vec<_>>());
    // The snapshot's own path gives the same bytes throughout: a folder called after a commit is known by its model's name.
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let snapshot = bench.path("hub/models--Org--Teacher-AWQ/snapshots").join(commit).display().to_string();
    bench.expect(
        3,
        &precompute("snapshot").into_iter().map(|a| if a == TEACHER.as_str() { &snapshot } else { a }).collect::<Vec<_>>(),
    );
    assert_eq!(files(&bench.path("snapshot")), named);

    let arguments = train("run", "sft", "1").into_iter().map(|a| match a {
        a if a == STUDENT.as_str() => "Org/Student@main",
        "cache" => "by-name",
        a => a,
    });
    run(0, &arguments.collect::<Vec<_>>());
    let adapter = files(&bench.path("run/adapter"));
    let config: Value = serde_json::from_slice(&adapter["adapter_config.json"]).unwrap();
    assert_eq!(config["base_model_name_or_path"], "Org/Student");
    assert!(String::from_utf8(adapter["README.md"].clone()).unwrap().contains("base_model: \"Org/Student\""));
    run(0, &["merge", "--student", "Org/Student", "--adapter", "run/adapter", "--out", "merged", "--quiet"]);
    assert!(files(&bench.path("merged")).contains_key("model.safetensors"));

    let sentence = run(1, &["merge", "--student", "Org/Nothing", "--adapter", "run/adapter", "--out", "m", "--quiet"]);
    let hub = bench.path("hub").display().to_string();
    let expected = format!(
        "Org/Nothing: there is no such path, and no model of this name in the Hugging Face cache (there is no {hub}/models--Org--Nothing)"
    );
    assert!(sentence.contains(&expected), "{sentence}");
}

#[test]
fn a_second_run_of_the_same_command_does_nothing_and_other_settings_are_refused() {
    let bench = Bench::new();
    bench.cache("cache");
    let before = files(&bench.path("cache"));
    let report = bench.expect(3, &[precompute("cache"), vec!["--json"]].concat()).json();
    assert_eq!((&report["rows"], &report["resumed_rows"], &report["scored_tokens"]), (&39.into(), &39.into(), &0.into()));
    assert_eq!(files(&bench.path("cache")), before);

    let with = |from: &'static str, to: &'static str| -> Vec<&str> {
        precompute("cache").into_iter().map(|a| if a == from { to } else { a }).collect()
    };
    let other = bench.expect(6, &with("16", "8"));
    assert!(other.error().contains("selection.k") && other.error().contains("16") && other.error().contains('8'), "{other:?}");
    let other = bench.expect(6, &with(&TEACHER, &STUDENT));
    assert!(other.error().contains("teacher.weights"), "{other:?}");
    assert_eq!(files(&bench.path("cache")), before, "a refusal changes nothing");
}

#[test]
fn chunks_packs_and_threads_do_not_change_the_cache() {
    let bench = Bench::new();
    bench.cache("cache");
    // A chunk of 1 leaves lone rows everywhere, one of 5 sometimes; the reference runs in packs of 512.
    for (name, chunk, pack) in [("a", "1", "512"), ("b", "5", "1"), ("c", "256", "4096"), ("d", "7", "300")] {
        let arguments = precompute(name).into_iter().map(|a| if a == "512" { pack } else { a });
        bench.expect(3, &[arguments.collect(), vec!["--head-chunk", chunk]].concat());
        assert_eq!(files(&bench.path("cache")), files(&bench.path(name)), "chunk {chunk}, pack {pack}");
    }
    let threads = bench.command(&precompute("threads")).env("RAYON_NUM_THREADS", "1").output().unwrap();
    assert_eq!(threads.status.code(), Some(3));
    assert_eq!(files(&bench.path("cache")), files(&bench.path("threads")), "one thread");
}

#[test]
fn order_and_seed_do_what_they_say() {
    let bench = Bench::new();
    bench.cache("cache");
    let adapter = |out: &str, more: &[&str]| {
        bench.expect(0, &[train(out, "distill", "3"), more.to_vec()].concat());
        files(&bench.path(out))["adapter/adapter_model.safetensors"].clone()
    };
    let seven = adapter("a", &["--seed", "7"]);
    assert_eq!(seven, adapter("b", &["--seed", "7"]), "one seed, one adapter");
    assert_ne!(seven, adapter("c", &["--seed", "8"]));
    assert_ne!(seven, adapter("d", &["--seed", "7", "--no-shuffle"]));
}

#[test]
fn plain_chats_train_the_very_adapter_that_a_cache_of_them_does() {
    let bench = Bench::new();
    bench.cache("cache");
    let from_chats = |out: &'static str, chats: &'static str| {
        let mut arguments = train(out, "sft", "12");
        let at = arguments.iter().position(|a| *a == "--cache").unwrap();
        arguments.splice(at..at + 2, ["--data", chats, "--max-length", "256"]);
        [arguments, vec!["--json"]].concat()
    };
    let adapter = |out: &str| files(&bench.path(out))["adapter/adapter_model.safetensors"].clone();
    bench.expect(0, &train("cached", "sft", "12"));
    // One chat has nothing to learn from.
    let report = bench.expect(3, &from_chats("plain", support::CHATS.as_str())).json();
    assert_eq!(report["skipped"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum::<u64>(), 1, "{report}");
    assert_eq!(report["targets"], "the data's tokens");
    assert_eq!(adapter("plain"), adapter("cached"));
    // A file of another name with the same chats is the same data; other chats are another run.
    std::fs::copy(golden("chats.jsonl"), bench.path("moved.jsonl")).unwrap();
    let again = bench.expect(3, &from_chats("plain", "moved.jsonl")).json();
    assert_eq!(again["resumed_from"], 12);
    let text = std::fs::read_to_string(golden("chats.jsonl")).unwrap();
    let fewer: String = text.lines().skip(1).flat_map(|line| [line, "\n"]).collect();
    std::fs::write(bench.path("fewer.jsonl"), fewer).unwrap();
    let refused = bench.expect(6, &from_chats("plain", "fewer.jsonl"));
    assert!(refused.error().contains("data_blake3: the checkpoint has "), "{refused:?}");
    let refused = bench.expect(2, &train("other", "sft", "1").into_iter().chain(["--data", "fewer.jsonl"]).collect::<Vec<_>>());
    let sentence = "both cache and data are given: expected either a cache (--cache) or, for --objective sft, chats (--data)";
    assert_eq!(refused.error(), sentence);
}
