//! Bad input gets one clear sentence (file, place, expected, found) and its exit code; never a panic.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use safetensors::SafeTensors;
use std::path::Path;
use support::{Bench, CHATS, STUDENT, TEACHER, edit_json, golden};

fn score<'a>(teacher: &'a str, data: &'a str) -> Vec<&'a str> {
    vec!["precompute", "--teacher", teacher, "--data", data, "--cache", "new", "--max-length", "256", "--quiet"]
}

/// Runs stage one and gives its sentence; insists on the exit code and that nothing was written.
fn refused(bench: &Bench, code: i32, teacher: &str, data: &str) -> String {
    let ran = bench.expect(code, &score(teacher, data));
    assert_eq!(ran.stdout, "", "results only on success: {ran:?}");
    assert_eq!(ran.stderr.lines().filter(|l| l.starts_with("error: ")).count(), 1, "{ran:?}");
    assert!(!ran.stderr.contains("panic"), "{ran:?}");
    assert!(!bench.path("new").exists(), "nothing written: {ran:?}");
    ran.error().to_string()
}

/// Rewrites a safetensors file without the tensors whose names `keep` refuses.
fn drop_tensors(path: &Path, keep: impl Fn(&str) -> bool) {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let kept: Vec<_> = tensors.tensors().into_iter().filter(|(name, _)| keep(name)).collect();
    let out = safetensors::serialize(kept, None).unwrap();
    std::fs::write(path, out).unwrap();
}

#[test]
fn model_folders() {
    let bench = Bench::new();
    let error = refused(&bench, 1, "nowhere", &CHATS);
    assert_eq!(error, "nowhere: expected a model folder, found nothing there");

    // A missing tensor, and two that do not fit, are named with their shapes.
    let folder = bench.copy("student", "missing");
    drop_tensors(&folder.join("model.safetensors"), |name| name != "model.layers.1.mlp.up_proj.weight");
    let error = refused(&bench, 1, "missing", &CHATS);
    assert!(error.contains("model.layers.1.mlp.up_proj.weight missing (expected [320, 128])"), "{error}");
    let folder = bench.copy("student", "misshapen");
    edit_json(&folder.join("config.json"), |c| c["intermediate_size"] = 384.into());
    let error = refused(&bench, 1, "misshapen", &CHATS);
    assert!(error.contains("model.layers.0.mlp.gate_proj.weight is [320, 128] (expected [384, 128])"), "{error}");

    let folder = bench.copy("teacher-awq", "group");
    edit_json(&folder.join("config.json"), |c| c["quantization_config"]["group_size"] = 64.into());
    let error = refused(&bench, 1, "group", &CHATS);
    let sentence = "group/config.json: quantization_config.group_size: expected 128, as model.layers.0.self_attn.q_proj.scales has 2 rows for 256 inputs, found 64";
    assert_eq!(error, sentence);
    edit_json(&folder.join("config.json"), |c| c["quantization_config"]["group_size"] = 0.into());
    let error = refused(&bench, 1, "group", &CHATS);
    assert!(error.ends_with("config.json: group_size: expected a whole number from 1 to 131072, found 0"), "{error}");
    edit_json(&folder.join("config.json"), |c| c["quantization_config"]["group_size"] = (-1).into());
    let error = refused(&bench, 1, "group", &CHATS);
    assert!(error.contains("group_size: expected 128, as ") && error.ends_with("found -1 (all inputs)"), "{error}");
    for group in [96, 100_000] {
        edit_json(&folder.join("config.json"), |c| c["quantization_config"]["group_size"] = group.into());
        let error = refused(&bench, 1, "group", &CHATS);
        assert!(error.contains("group_size"), "{error}");
    }
    edit_json(&folder.join("config.json"), |c| c["quantization_config"]["quant_method"] = "gptq".into());
    let error = refused(&bench, 1, "group", &CHATS);
    assert!(error.contains("quant_method: expected \"awq\"") && error.contains("found \"gptq\""), "{error}");

    let folder = bench.copy("student", "broken");
    let path = folder.join("model.safetensors");
    let good = std::fs::read(&path).unwrap();
    for (at, bits) in [(7, 0xff), (0, 0x01), (12, 0xff)] {
        let mut bad = good.clone();
        bad[at] ^= bits;
        std::fs::write(&path, bad).unwrap();
        let error = refused(&bench, 1, "broken", &CHATS);
        assert!(error.contains("broken/model.safetensors: bad safetensors header"), "{error}");
    }
    std::fs::write(&path, &good[..good.len() - 5]).unwrap();
    let error = refused(&bench, 1, "broken", &CHATS);
    assert!(error.contains("model.safetensors"), "{error}");

    let folder = bench.copy("student", "architecture");
    edit_json(&folder.join("config.json"), |c| c["architectures"][0] = "GPT2LMHeadModel".into());
    let error = refused(&bench, 1, "architecture", &CHATS);
    assert!(error.contains("expected Qwen2ForCausalLM") && error.contains("found \"GPT2LMHeadModel\""), "{error}");
    std::fs::write(folder.join("config.json"), "{").unwrap();
    let error = refused(&bench, 1, "architecture", &CHATS);
    assert!(error.contains("config.json: not valid JSON"), "{error}");

    // What would change the arithmetic is refused by name, not passed over.
    for (key, value, found) in [
        ("rope_parameters", r#"{"rope_type": "yarn", "rope_theta": 1e6}"#, "rope_type"),
        ("rope_parameters", r#"{"rope_type": "default", "rope_theta": "1e6"}"#, "rope_theta"),
        ("rope_parameters", r#"{"full_attention": {"rope_theta": 1e6}}"#, "one set of values"),
        ("hidden_act", r#""gelu""#, "\"silu\""),
        ("num_key_value_heads", "3", "a divisor of"),
        ("num_hidden_layers", "1000000000", "a whole number from 1 to 1024"),
        ("rms_norm_eps", "-1", "a positive number"),
    ] {
        let folder = bench.copy("student", "changed");
        edit_json(&folder.join("config.json"), |c| c[key] = serde_json::from_str(value).unwrap());
        let error = refused(&bench, 1, "changed", &CHATS);
        assert!(error.contains("changed/config.json: ") && error.contains(found), "{key}: {error}");
    }
}

#[test]
fn the_older_quant_config_is_read() {
    let bench = Bench::new();
    let folder = bench.copy("teacher-awq", "older");
    edit_json(&folder.join("config.json"), |c| {
        c.as_object_mut().unwrap().remove("quantization_config");
    });
    let older = r#"{"zero_point": true, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}"#;
    std::fs::write(folder.join("quant_config.json"), older).unwrap();
    bench.expect(3, &score("older", &CHATS));
    bench.expect(
        3,
        &["precompute", "--teacher", &TEACHER, "--data", &CHATS, "--cache", "newer", "--max-length", "256", "--quiet"],
    );
    let shards = |cache: &str| bench.expect(0, &["inspect", cache, "--row", "3", "--json"]).stdout;
    assert_eq!(shards("new"), shards("newer"), "the same distributions");
}

#[test]
fn chats() {
    let bench = Bench::new();
    let write = |name: &str, bytes: &[u8]| std::fs::write(bench.path(name), bytes).unwrap();
    let good = r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}"#;
    write("empty.jsonl", b"");
    let error = refused(&bench, 1, &TEACHER, "empty.jsonl");
    assert!(error.starts_with("empty.jsonl"), "{error}");
    write("json.jsonl", format!("{good}\n{{\"messages\": [}}\n").as_bytes());
    let error = refused(&bench, 1, &TEACHER, "json.jsonl");
    assert!(error.starts_with("json.jsonl:2"), "{error}");
    write("utf8.jsonl", &[good.as_bytes(), b"\n{\"messages\": \"\xff\"}\n"].concat());
    let error = refused(&bench, 1, &TEACHER, "utf8.jsonl");
    assert!(error.starts_with("utf8.jsonl:2") && error.contains("UTF-8"), "{error}");
    let error = refused(&bench, 1, &TEACHER, "none-*.jsonl");
    assert!(error.contains("none-*.jsonl"), "{error}");

    // An unknown role: skipped, counted and placed; or refused where that is asked for.
    let tool = r#"{"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}"#;
    write("role.jsonl", format!("{good}\n{tool}\n").as_bytes());
    let strict = bench.expect(1, &[score(&TEACHER, "role.jsonl"), vec!["--on-bad-roles", "error"]].concat());
    assert!(strict.error().starts_with("role.jsonl:2") && strict.error().contains("\"tool\""), "{strict:?}");
    let skipped = bench.expect(3, &score(&TEACHER, "role.jsonl"));
    assert!(skipped.stdout.contains("unknown role") && skipped.stdout.contains("role.jsonl:2"), "{skipped:?}");
}

#[test]
fn caches_and_students() {
    let bench = Bench::new();
    bench.cache("cache");
    let train = |student: &str| {
        bench.run(&["train", "--student", student, "--cache", "cache", "--out", "out", "--steps", "6", "--rank", "4", "--quiet"])
    };

    let folder = bench.copy("student", "other");
    edit_json(&folder.join("tokenizer.json"), |t| {
        let vocab = t["model"]["vocab"].as_object_mut().unwrap();
        let (a, b) = (vocab["A"].clone(), vocab["B"].clone());
        vocab.insert("A".into(), b);
        vocab.insert("B".into(), a);
    });
    let ran = train("other");
    assert_eq!(ran.code, 6, "{ran:?}");
    assert!(
        ran.error().starts_with("other: its tokenizer is not the one that cache cache was made with: expected 2048 ids"),
        "{ran:?}"
    );

    let folder = bench.copy("student", "narrow");
    edit_json(&folder.join("config.json"), |c| c["vocab_size"] = 2000.into());
    let ran = train("narrow");
    assert_eq!((ran.code, ran.error().contains("expected at least 2048 ids, found 2000")), (6, true), "{ran:?}");
    edit_json(&folder.join("config.json"), |c| {
        c["vocab_size"] = 2048.into();
        c["use_sliding_window"] = true.into();
        c["sliding_window"] = 200.into();
    });
    let ran = train("narrow");
    assert_eq!((ran.code, ran.error().contains("expected at least 256 tokens, found 200")), (6, true), "{ran:?}");
    std::fs::create_dir(bench.path("taken")).unwrap();
    std::fs::write(bench.path("taken/metrics.jsonl"), "mine").unwrap();
    let ran = bench.expect(2, &["train", "--student", &STUDENT, "--cache", "cache", "--out", "taken"]);
    assert!(ran.error().starts_with("taken: already holds metrics.jsonl"), "{ran:?}");

    // A weight that no code stands for.
    let folder = bench.copy("student", "nan");
    let path = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let at =
        header + SafeTensors::read_metadata(&bytes).unwrap().1.info("model.layers.1.mlp.up_proj.weight").unwrap().data_offsets.0;
    bytes[at..at + 2].copy_from_slice(&[0xc0, 0x7f]);
    std::fs::write(&path, bytes).unwrap();
    let ran = train("nan");
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.error().contains("model.layers.1.mlp.up_proj.weight: holds a value that is not finite"), "{ran:?}");

    let ran = train(&TEACHER);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.error().contains("a student is quantised to NF4 from dense weights"), "{ran:?}");
    assert_eq!(train("nowhere").error(), "nowhere: expected a model folder, found nothing there");

    // One flipped bit of one shard: found by verify, and never trained on.
    let shard = bench.path("cache/shard-00001.parquet");
    let good = std::fs::read(&shard).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 3] ^= 0x10;
    std::fs::write(&shard, bad).unwrap();
    let verified = bench.expect(4, &["verify", "cache"]);
    assert!(verified.stdout.contains("shard-00001.parquet") && verified.stdout.contains("BLAKE3"), "{verified:?}");
    let ran = train(&STUDENT);
    assert_eq!(ran.code, 4, "{ran:?}");
    assert!(ran.error().contains("shard-00001.parquet"), "{ran:?}");
    std::fs::write(&shard, &good[..good.len() - 9]).unwrap();
    assert_eq!(train(&STUDENT).code, 4);
    std::fs::remove_file(&shard).unwrap();
    assert!(bench.expect(4, &["inspect", "cache"]).error().contains("shard-00001.parquet"));

    let ran = bench.expect(1, &["inspect", "nowhere"]);
    assert!(ran.error().starts_with("nowhere"), "{ran:?}");
}

#[test]
fn settings() {
    let bench = Bench::new();
    let more = |extra: &[&'static str]| bench.expect(2, &[score(&TEACHER, &CHATS), extra.to_vec()].concat());
    let ran = more(&["--top-k", "4000"]);
    assert_eq!(ran.error(), "top_k = 4000: expected at most the tokenizer's 2048 ids");
    let long = ["precompute", "--teacher", &TEACHER, "--data", &CHATS, "--cache", "new", "--max-length", "2000"];
    let sentence = "max_length = 2000: expected at most the teacher's context of 1024 tokens";
    assert_eq!(bench.expect(2, &long).error(), sentence);
    // No machine has that many GPUs, whatever the build.
    let ran = more(&["--device", "cuda:65535"]);
    assert!(ran.error().starts_with("device \"cuda:65535\": ") && ran.error().ends_with("; use --device cpu or auto"), "{ran:?}");
    assert!(cfg!(feature = "cuda") || ran.error().contains("this build computes on the CPU only"), "{ran:?}");
    let golden_file = golden("chats.jsonl");
    let ran = bench.run(&["train", "--student", &STUDENT, "--cache", &golden_file, "--out", "out"]);
    assert_eq!(ran.code, 1, "a file is no cache: {ran:?}");
}
