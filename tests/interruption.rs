//! Nothing is lost and nothing changes when a run is killed or asked to stop.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use serde_json::Value;
use std::process::Stdio;
use support::{Bench, STUDENT, files, precompute, wait_for};

#[test]
fn a_killed_precompute_resumed_is_byte_identical() {
    let bench = Bench::new();
    bench.cache("whole");
    let whole = files(&bench.path("whole"));
    let mut killed = 0;
    for shard in 0..4 {
        let name = format!("cut-{shard}");
        let mut child = bench.command(&precompute(&name)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        if wait_for(&mut child, &bench.path(&name).join(format!("shard-{shard:05}.parquet"))) {
            killed += 1;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let partial = files(&bench.path(&name));
        let trained = bench.run(&["train", "--student", &STUDENT, "--cache", &name, "--out", "early", "--steps", "1", "--quiet"]);
        if !String::from_utf8_lossy(&partial["manifest.json"]).contains("\"complete\": true") {
            assert_eq!(trained.code, 2, "an unfinished cache is not trained from: {trained:?}");
            assert!(trained.error().contains(" of 39 rows; finish it with the precompute command"), "{trained:?}");
        }
        let report = bench.expect(3, &[precompute(&name), vec!["--json"]].concat()).json();
        assert_eq!(report["rows"], 39);
        assert_eq!(files(&bench.path(&name)), whole, "killed after shard {shard} with {:?}", partial.keys());
    }
    assert!(killed > 0, "no run was killed in time");
}

#[test]
fn two_writers_of_one_cache_are_refused() {
    let bench = Bench::new();
    bench.cache("cache");
    let lock = std::fs::File::options().write(true).open(bench.path("cache/cache.lock")).unwrap();
    lock.lock().unwrap();
    let refused = bench.expect(5, &precompute("cache"));
    assert_eq!(refused.error(), "cache: another process is writing this cache; wait for it or stop it");
}

fn train<'a>(out: &'a str, steps: &'a str) -> Vec<&'a str> {
    let mut arguments = vec!["train", "--student", STUDENT.as_str(), "--cache", "cache", "--out", out, "--steps", steps];
    arguments.extend(["--lr", "2e-3", "--rank", "4", "--batch-size", "4", "--checkpoint-every", "2", "--quiet"]);
    arguments
}

/// Adapter, optimiser state and metrics (without the clock) of a finished run of 12 steps.
fn outcome(bench: &Bench, out: &str) -> (Vec<u8>, Vec<u8>, Vec<Value>) {
    let all = files(&bench.path(out));
    let lines = String::from_utf8(all["metrics.jsonl"].clone()).unwrap();
    let metrics = lines.lines().map(|line| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        let line = value.as_object_mut().unwrap();
        for clock in ["seconds", "tokens_per_second"] {
            line.remove(clock).unwrap();
        }
        value
    });
    let (adapter, optimizer) = (&all["adapter/adapter_model.safetensors"], &all["checkpoint-12/optimizer.safetensors"]);
    (adapter.clone(), optimizer.clone(), metrics.collect())
}

#[test]
fn a_killed_training_resumed_is_bit_identical() {
    let bench = Bench::new();
    bench.cache("cache");
    bench.expect(0, &train("whole", "12"));
    let whole = outcome(&bench, "whole");
    assert_eq!(whole.2.len(), 12);
    let mut killed = 0;
    for step in [2, 6, 10] {
        let out = format!("cut-{step}");
        let mut child = bench.command(&train(&out, "12")).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        if wait_for(&mut child, &bench.path(&out).join(format!("checkpoint-{step}"))) {
            killed += 1;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        bench.expect(0, &train(&out, "12"));
        assert_eq!(outcome(&bench, &out), whole, "killed after step {step}");
    }
    assert!(killed > 0, "no run was killed in time");
}

#[test]
fn a_training_asked_to_stop_leaves_a_checkpoint_and_says_75() {
    let bench = Bench::new();
    bench.cache("cache");
    bench.expect(0, &train("whole", "12"));
    // A thousand steps take long enough to be stopped within.
    let mut child = bench.command(&train("run", "1000")).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    assert!(wait_for(&mut child, &bench.path("run/checkpoint-4")));
    let pid = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(75), "{stderr}");
    assert!(stderr.contains("stopped by a signal; checkpoint-") && stderr.contains("run the same command again"), "{stderr}");

    // Fewer steps than the checkpoint has are refused; the same command goes on.
    let refused = bench.expect(2, &train("run", "1"));
    assert!(refused.error().starts_with("steps = 1: expected at least the "), "{refused:?}");
    let checkpoints = std::fs::read_dir(bench.path("run"))
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with("checkpoint-"));
    assert_eq!(checkpoints.count(), 2, "two are kept");
}

#[test]
fn a_checkpoint_is_refused_when_damaged_or_of_another_run() {
    let bench = Bench::new();
    bench.cache("cache");
    bench.expect(0, &train("run", "4"));
    let refused = bench.expect(2, &[train("run", "6"), vec!["--resume", "never"]].concat());
    assert_eq!(refused.error(), "run: already holds checkpoint-4; choose another --out, or --resume latest to continue");
    let refused = bench.expect(1, &[train("run", "6"), vec!["--resume", "nowhere"]].concat());
    assert_eq!(refused.error(), "nowhere: no checkpoint: expected a folder, found nothing there");
    let refused = bench.expect(6, &[train("run", "6"), vec!["--seed", "1"]].concat());
    assert!(refused.error().contains("other settings: seed: the checkpoint has 42, here it is 1"), "{refused:?}");
    let lock = std::fs::File::options().write(true).open(bench.path("run/train.lock")).unwrap();
    lock.lock().unwrap();
    assert!(bench.expect(5, &train("run", "6")).error().contains("another process is training"));
    lock.unlock().unwrap();

    for name in ["adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json", "digests.json"] {
        let path = bench.path("run/checkpoint-4").join(name);
        let good = std::fs::read(&path).unwrap();
        for at in [0, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, bad).unwrap();
            let refused = bench.run(&train("run", "6"));
            assert_eq!(refused.code, 4, "{name} byte {at}: {refused:?}");
        }
        std::fs::write(&path, good).unwrap();
    }
    // An earlier checkpoint can be named; later ones are set aside, also a damaged one, and the run's own are the newest again.
    bench.expect(0, &[train("run", "3"), vec!["--resume", "run/checkpoint-2"]].concat());
    let names = |folder: &str| -> Vec<String> {
        let entries = std::fs::read_dir(bench.path(folder)).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = entries.filter(|n| n.starts_with("checkpoint-")).collect();
        names.sort();
        names
    };
    assert_eq!(
        (names("run"), names("run/set-aside")),
        (vec!["checkpoint-2".into(), "checkpoint-3".into()], vec!["checkpoint-4".into()])
    );
    bench.expect(0, &train("run", "6"));
    assert_eq!(names("run"), ["checkpoint-4", "checkpoint-6"]);

    // What a run killed while publishing leaves is tidied: the half-written goes, the older adapter gives way or comes back.
    for name in [".checkpoint-9.partial", ".adapter.partial-1", ".adapter.old"] {
        std::fs::create_dir(bench.path("run").join(name)).unwrap();
        std::fs::write(bench.path("run").join(name).join("file"), "x").unwrap();
    }
    bench.expect(0, &train("run", "7"));
    let left = std::fs::read_dir(bench.path("run")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    assert_eq!(left.filter(|name| name.starts_with('.')).collect::<Vec<_>>(), Vec::<String>::new());
}
