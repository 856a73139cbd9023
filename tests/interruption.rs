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

    let newest = bench.path("run/checkpoint-4");
    for name in ["adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json", "digests.json"] {
        let path = newest.join(name);
        let good = std::fs::read(&path).unwrap();
        for at in [0, good.len() / 2, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, bad).unwrap();
            let refused = bench.run(&[train("run", "6"), vec!["--resume", "run/checkpoint-4"]].concat());
            assert_eq!(refused.code, 4, "{name} byte {at}: {refused:?}");
        }
        std::fs::write(&path, good).unwrap();
    }
    std::fs::write(newest.join("optimizer.safetensors"), "x").unwrap();
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

#[test]
fn a_damaged_newest_checkpoint_gives_way_to_the_one_before_it_and_that_is_said() {
    let bench = Bench::new();
    bench.cache("cache");
    bench.expect(0, &train("whole", "12"));
    bench.expect(0, &train("run", "6"));
    let damaged = bench.path("run/checkpoint-6/adapter_model.safetensors");
    let mut bytes = std::fs::read(&damaged).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    let ran = bench.expect(0, &[train("run", "12"), vec!["--json"]].concat());
    let warning = ran.stderr.lines().find_map(|line| line.strip_prefix("warning: ")).unwrap_or_else(|| panic!("{ran:?}"));
    assert!(warning.starts_with("run/checkpoint-6/adapter_model.safetensors: damaged checkpoint: expected BLAKE3 "), "{warning}");
    assert!(warning.ends_with("; going on from run/checkpoint-4"), "{warning}");
    let report = ran.json();
    assert_eq!((&report["resumed_from"], &report["passed_over"]), (&4.into(), &serde_json::json!([warning])), "{report}");
    assert!(bench.path("run/set-aside/checkpoint-6").is_dir(), "kept, out of the way");
    assert_eq!(outcome(&bench, "run"), outcome(&bench, "whole"), "the way back costs steps and nothing else");
    // Where none is whole nothing is begun anew in silence.
    for step in [10, 12] {
        std::fs::write(bench.path(&format!("run/checkpoint-{step}/trainer_state.json")), "{}").unwrap();
    }
    let refused = bench.expect(4, &train("run", "14"));
    assert!(refused.error().starts_with("run/checkpoint-12/trainer_state.json: damaged checkpoint"), "{refused:?}");
}

/// A student whose embedding of `token` is infinite, so that no loss of a row with it is finite. Its head, which the reference model
/// shares with the embedding, stays as it is.
fn poisoned(bench: &Bench, token: u32) {
    let folder = bench.copy("student", "poisoned");
    support::edit_json(&folder.join("config.json"), |config| config["tie_word_embeddings"] = false.into());
    let path = folder.join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let embedding = tensors.tensor("model.embed_tokens.weight").unwrap();
    let (dtype, shape) = (embedding.dtype(), embedding.shape().to_vec());
    let size = embedding.data().len() / shape.iter().product::<usize>();
    let row = token as usize * shape[1] * size;
    let mut bad = embedding.data().to_vec();
    // Infinity in f32, and in the two bytes of bf16.
    let infinity = &[0, 0, 0x80, 0x7f][4 - size..];
    bad[row..row + shape[1] * size].chunks_mut(size).for_each(|value| value.copy_from_slice(infinity));
    let mut all: Vec<_> = tensors.tensors().into_iter().filter(|(name, _)| name != "model.embed_tokens.weight").collect();
    all.push(("lm_head.weight".into(), embedding));
    all.push(("model.embed_tokens.weight".into(), safetensors::tensor::TensorView::new(dtype, shape, &bad).unwrap()));
    let whole = safetensors::serialize(all, None).unwrap();
    std::fs::write(path, whole).unwrap();
}

fn finite(bench: &Bench, adapter: &str) -> bool {
    let bytes = std::fs::read(bench.path(adapter).join("adapter_model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats = |data: &[u8]| data.chunks(4).all(|b| f32::from_le_bytes(b.try_into().unwrap()).is_finite());
    tensors.tensors().iter().all(|(_, tensor)| floats(tensor.data()))
}

#[test]
fn a_step_that_is_not_finite_is_skipped_and_five_in_a_row_end_the_run() {
    let bench = Bench::new();
    bench.cache("cache");
    let cache = potstill_cache::Cache::open(&bench.path("cache")).unwrap();
    let rows: Vec<Vec<u32>> = (0..cache.len()).map(|row| cache.row(row).unwrap().input_ids).collect();
    let with = |token: u32| (0..rows.len()).filter(|row| rows[*row].contains(&token)).collect::<Vec<_>>();
    // A token that two rows have, neither of them the first, which the run begins with.
    let rare = (0..4096).find(|t| with(*t).len() == 2 && with(*t)[0] > 3).unwrap();
    poisoned(&bench, rare);
    let in_order = |out: &'static str, steps: &'static str| {
        let all = train(out, steps).into_iter().map(|a| if a == STUDENT.as_str() { "poisoned" } else { a });
        [all.collect(), vec!["--no-shuffle", "--json"]].concat()
    };
    let bad: Vec<u64> = (1..=10).filter(|step| with(rare).iter().any(|row| *row as u64 / 4 + 1 == *step)).collect();
    let report = bench.expect(0, &in_order("run", "9")).json();
    assert_eq!(report["skipped_steps"], bad.iter().filter(|step| **step <= 9).count(), "{report}");
    for step in 1..=9u64 {
        let file = bench.path(&format!("run/bad-step-{step}.json"));
        assert_eq!(file.is_file(), bad.contains(&step), "step {step}, bad are {bad:?}");
        if file.is_file() {
            let said: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
            let keys: Vec<String> =
                ((step - 1) * 4..step * 4).map(|row| cache.row(row % cache.len()).unwrap().key().to_string()).collect();
            let named: Vec<&str> = said["rows"].as_array().unwrap().iter().map(|row| row["key"].as_str().unwrap()).collect();
            assert_eq!((named, said["loss"].as_str()), (keys.iter().map(String::as_str).collect(), Some("NaN")), "{said}");
        }
    }
    assert!(finite(&bench, "run/adapter"));
    let lines = String::from_utf8(files(&bench.path("run"))["metrics.jsonl"].clone()).unwrap();
    let skipped = lines.lines().filter(|line| line.contains("\"loss\":null") && line.contains("\"skipped\":true"));
    assert_eq!(skipped.count(), bad.iter().filter(|step| **step <= 9).count(), "{lines}");
    // Killed or not, skipped steps are the same ones: the run of 4 steps that goes on is the run of 9.
    bench.expect(0, &in_order("cut", "4"));
    bench.expect(0, &in_order("cut", "9"));
    let adapter = |out: &str| files(&bench.path(out))["adapter/adapter_model.safetensors"].clone();
    assert_eq!(adapter("cut"), adapter("run"));

    // Held-out positions behind that token are left out and counted; the others still have figures.
    let evaluated = bench.expect(0, &[in_order("evaluated", "1"), vec!["--eval-cache", "cache"]].concat()).json();
    let left_out = evaluated["held_out"]["last"]["positions_not_finite"].as_u64().unwrap();
    let theirs: usize = with(rare).into_iter().map(|row| cache.row(row as u64).unwrap().positions.len()).sum();
    assert!((1..=theirs as u64).contains(&left_out), "{evaluated}");
    assert!(evaluated["held_out"]["last"]["loss"].as_f64().is_some_and(|loss| loss > 0.0), "{evaluated}");

    // A token of every row: no step can be taken.
    poisoned(&bench, rows[0][0]);
    assert_eq!(with(rows[0][0]).len(), rows.len());
    let ended = bench.expect(1, &in_order("all", "9"));
    let expected = "step 5: loss NaN, gradient norm NaN: not finite, as in the 4 steps before it; nothing was changed yet, so it is \
                    the student's weights that give this; all/bad-step-5.json names its conversations";
    assert_eq!(ended.error(), expected);
    // Of nothing there are no figures; what was done until then is kept.
    let blind = bench.expect(1, &[in_order("blind", "1"), vec!["--eval-cache", "cache"]].concat());
    assert_eq!(blind.error(), "step 1: held-out loss NaN, or a figure beside it: not finite; try a lower --lr");
    assert!(finite(&bench, "blind/checkpoint-1"));
    assert!(finite(&bench, "all/checkpoint-4") && !bench.path("all/checkpoint-5").exists());
}
