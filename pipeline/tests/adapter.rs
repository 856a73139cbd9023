//! Adapter folders in and out: PEFT's reference adapter, round trips, and every refusal.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use candle_core::{DType, Device, Tensor};
use potstill_pipeline::adapter::{AdapterConfig, AdapterError, LearnedFrom, Scaling, Surroundings, load, save};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden")).join(name)
}

const PROJECTIONS: [&str; 7] = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"];

fn config() -> AdapterConfig {
    AdapterConfig {
        rank: 2,
        alpha: 3.0,
        scaling: Scaling::Standard,
        dropout: 0.0,
        base_model: "models/base".into(),
        revision: None,
        target_modules: vec!["v_proj".into(), "q_proj".into()],
    }
}

fn values(count: usize) -> Vec<f32> {
    (0..count).map(|i| i as f32 * 0.37 - 1.0).collect()
}

fn tensor(shape: &[usize]) -> Tensor {
    Tensor::from_vec(values(shape.iter().product()), shape, &Device::Cpu).unwrap()
}

fn pair(module: &str, inputs: usize, outputs: usize) -> [(String, Tensor); 2] {
    [
        (format!("model.layers.0.self_attn.{module}.lora_A.weight"), tensor(&[2, inputs])),
        (format!("model.layers.0.self_attn.{module}.lora_B.weight"), tensor(&[outputs, 2])),
    ]
}

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn surroundings(base: &Path) -> Surroundings<'_> {
    Surroundings { base, learned_from: LearnedFrom::Teacher, facts: &[], run: None }
}

#[test]
fn reads_the_adapter_that_peft_wrote() {
    let (config, tensors) = load(&golden("expected/lora")).unwrap();
    assert_eq!((config.rank, config.alpha, config.scaling, config.factor()), (8, 16.0, Scaling::Standard, 2.0));
    assert_eq!((config.base_model.as_str(), &config.target_modules[..]), ("student", &PROJECTIONS.map(String::from)[..]));
    assert_eq!(tensors.len(), 28);
    let reference = candle_core::safetensors::load(golden("expected/lora/adapter_model.safetensors"), &Device::Cpu).unwrap();
    for (name, tensor) in &tensors {
        let stored = &reference[&format!("base_model.model.{name}")];
        assert_eq!((flat(tensor), tensor.dims()), (flat(stored), stored.dims()), "{name}");
    }
}

#[test]
fn writes_what_peft_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("adapter");
    let (config, tensors) = load(&golden("expected/lora")).unwrap();
    let list: Vec<(String, Tensor)> = tensors.clone().into_iter().collect();
    save(&folder, &config, &list, &surroundings(&golden("student"))).unwrap();

    let ours = fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let theirs = fs::read(golden("expected/lora/adapter_model.safetensors")).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&ours).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap(), &HashMap::from([("format".to_string(), "pt".to_string())]));
    let (ours, theirs) =
        (safetensors::SafeTensors::deserialize(&ours).unwrap(), safetensors::SafeTensors::deserialize(&theirs).unwrap());
    assert_eq!(ours.len(), theirs.len());
    for (name, view) in theirs.iter() {
        let our = ours.tensor(name).unwrap();
        assert_eq!((our.dtype(), our.shape(), our.data()), (view.dtype(), view.shape(), view.data()), "{name}");
    }

    let read =
        |folder: &Path| -> Value { serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap() };
    let (ours, theirs) = (read(&folder), read(&golden("expected/lora")));
    for (key, value) in ours.as_object().unwrap().iter().filter(|(key, _)| *key != "peft_version") {
        // PEFT 0.21 writes the same value under every key of ours but one that it no longer needs.
        assert_eq!(theirs.get(key).unwrap_or(&Value::Null), value, "{key}");
    }
    for key in ["peft_type", "r", "lora_alpha", "target_modules", "task_type", "bias", "lora_dropout", "inference_mode"] {
        assert!(ours.get(key).is_some(), "{key}");
    }
    for copied in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert_eq!(fs::read(folder.join(copied)).unwrap(), fs::read(golden("student").join(copied)).unwrap());
    }
    let (again, back) = load(&folder).unwrap();
    assert_eq!(again, config);
    assert!(tensors.iter().all(|(name, tensor)| flat(tensor) == flat(&back[name])));
}

#[test]
fn the_card_names_the_training_and_the_base_licence() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    fs::create_dir(&base).unwrap();
    fs::write(base.join("README.md"), "---\nlicense: other\nlicense_name: tongyi-qianwen\ntags: [x]\n---\nlicense: mit\n")
        .unwrap();
    let facts = [("temperature".to_string(), "2".to_string()), ("note".to_string(), "a|b\nc".to_string())];
    let folder = dir.path().join("adapter");
    let around = Surroundings { base: &base, learned_from: LearnedFrom::Tokens, facts: &facts, run: None };
    save(&folder, &config(), &pair("q_proj", 4, 3), &around).unwrap();
    let card = fs::read_to_string(folder.join("README.md")).unwrap();
    let front: Vec<&str> = card.split("---\n").collect();
    for line in [
        "library_name: peft",
        "base_model: \"models/base\"",
        "- \"base_model:adapter:models/base\"",
        "- lora",
        "- sft",
        "pipeline_tag: text-generation",
        "license: other",
        "license_name: tongyi-qianwen",
    ] {
        assert!(front[1].lines().any(|l| l == line), "{line} is not in {card}");
    }
    assert!(card.contains("Trained by potstill on the data's own tokens, the base") && !card.contains("distillation"), "{card}");
    assert!(
        card.contains("bnb_4bit_quant_type: nf4") && card.contains(concat!("potstill ", env!("CARGO_PKG_VERSION"))),
        "{card}"
    );
    assert!(!folder.join("distill_run.json").exists() && !card.contains("distill_run") && !card.contains("LICENSE"), "{card}");
    assert!(card.contains("| temperature | 2 |") && card.contains("| note | a\\|b c |") && !card.contains("mit"), "{card}");

    // A licence that stands in a file alone is copied and pointed at; the front matter is not made to say one.
    let record = json!({"cache": {"id": "ab12"}});
    fs::write(base.join("LICENSE"), "Tongyi Qianwen LICENSE AGREEMENT").unwrap();
    fs::write(base.join("README.md"), "---\r\nlicense: >\r\n  mit\r\n---\r\n").unwrap();
    let around = Surroundings { base: &base, learned_from: LearnedFrom::Both, facts: &facts, run: Some(&record) };
    save(&folder, &config(), &pair("q_proj", 4, 3), &around).unwrap();
    let card = fs::read_to_string(folder.join("README.md")).unwrap();
    let both = "Trained by potstill from cached teacher distributions and on the data's own tokens, the base";
    assert!(card.contains("- distillation\n- sft\n") && card.contains(both), "{card}");
    assert!(!card.contains("license:") && card.contains("`LICENSE`") && card.contains("`distill_run.json`"), "{card}");
    assert_eq!(fs::read(folder.join("LICENSE")).unwrap(), fs::read(base.join("LICENSE")).unwrap());
    let stored: Value = serde_json::from_slice(&fs::read(folder.join("distill_run.json")).unwrap()).unwrap();
    assert_eq!(stored, record);

    let bare = dir.path().join("bare");
    save(&bare, &config(), &pair("q_proj", 4, 3), &surroundings(&golden("student"))).unwrap();
    assert!(!fs::read_to_string(bare.join("README.md")).unwrap().contains("license"));
}

#[test]
fn scaling_is_written_and_read() {
    let dir = tempfile::tempdir().unwrap();
    for (alpha, scaling, factor) in [
        (3.0, Scaling::Standard, 1.5),
        (0.5, Scaling::RankStabilised, 0.5 / 2.0_f64.sqrt()),
        (16.0, Scaling::RankStabilised, 16.0 / 2.0_f64.sqrt()),
    ] {
        let folder = dir.path().join("adapter");
        let revision = (alpha > 1.0).then(|| "0123456789abcdef".to_string());
        let given = AdapterConfig { alpha, scaling, dropout: alpha / 32.0, revision, ..config() };
        // The second round replaces the first's folder.
        save(&folder, &given, &pair("q_proj", 4, 3), &surroundings(&golden("student"))).unwrap();
        let (read, _) = load(&folder).unwrap();
        assert_eq!((read.alpha, read.scaling), (alpha, scaling));
        assert_eq!((read.dropout, &read.revision), (given.dropout, &given.revision));
        let keys: Value = serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap();
        assert_eq!(keys["use_rslora"], json!(scaling == Scaling::RankStabilised));
        assert_eq!((&keys["lora_dropout"], &keys["revision"]), (&json!(alpha / 32.0), &json!(given.revision)));
        assert!((read.factor() - factor).abs() < 1e-15);
    }
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["adapter"], "nothing else is left behind");
}

#[cfg(unix)]
#[test]
fn all_files_of_the_folder_can_be_read_alike() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("adapter");
    save(&folder, &config(), &pair("q_proj", 4, 3), &surroundings(&golden("student"))).unwrap();
    let mode = |name: &str| fs::metadata(folder.join(name)).unwrap().permissions().mode();
    assert_eq!(mode("adapter_model.safetensors"), mode("README.md"));
}

/// An adapter folder with these keys changed in its configuration and these tensors in its file.
fn folder(dir: &Path, changes: Value, tensors: &[(&str, Tensor)]) -> PathBuf {
    let path = dir.join("adapter");
    let _ = fs::remove_dir_all(&path);
    fs::create_dir(&path).unwrap();
    let mut keys = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]});
    for (key, value) in changes.as_object().unwrap() {
        keys[key] = value.clone();
    }
    fs::write(path.join("adapter_config.json"), keys.to_string()).unwrap();
    let tensors: HashMap<String, Tensor> = tensors.iter().map(|(n, t)| (format!("base_model.model.{n}"), t.clone())).collect();
    candle_core::safetensors::save(&tensors, path.join("adapter_model.safetensors")).unwrap();
    path
}

const A: &str = "model.layers.0.self_attn.q_proj.lora_A.weight";
const B: &str = "model.layers.0.self_attn.q_proj.lora_B.weight";

#[track_caller]
fn refused<T>(result: Result<T, AdapterError>, words: &[&str]) {
    let Err(error) = result else { panic!("accepted; expected {words:?}") };
    let text = error.to_string();
    words.iter().for_each(|word| assert!(text.contains(word), "{word:?} is not in {text:?}"));
    assert!(text.lines().count() == 1 && text.len() < 600, "{text}");
}

#[test]
fn configurations_that_mean_more_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let good = [(A, tensor(&[2, 4])), (B, tensor(&[3, 2]))];
    load(&folder(dir.path(), json!({}), &good)).unwrap();
    load(&folder(
        dir.path(),
        json!({"target_modules": "all-linear", "bias": "none", "rank_pattern": {}, "use_dora": null}),
        &good,
    ))
    .unwrap();
    for (changes, words) in [
        (json!({"peft_type": "IA3"}), ["peft_type", "\"IA3\""]),
        (json!({"r": 1025}), ["r: expected a whole number, 1 to 1024", "1025"]),
        (json!({"r": 1_000_000_000_000_i64}), ["1 to 1024", "1000000000000"]),
        (json!({"r": 0}), ["1 to 1024", "found 0"]),
        (json!({"r": 2.5}), ["1 to 1024", "2.5"]),
        (json!({"lora_alpha": null}), ["lora_alpha", "null"]),
        (json!({"lora_dropout": 1.0}), ["lora_dropout: expected a number from 0 to below 1", "1.0"]),
        (json!({"lora_dropout": "some"}), ["lora_dropout", "some"]),
        (json!({"use_dora": true}), ["use_dora", "plain LoRA"]),
        (json!({"rank_pattern": {"q_proj": 4}}), ["rank_pattern", "q_proj"]),
        (json!({"alpha_pattern": {"q_proj": 4}}), ["alpha_pattern", "q_proj"]),
        (json!({"modules_to_save": ["lm_head"]}), ["modules_to_save", "lm_head"]),
        (json!({"fan_in_fan_out": true}), ["fan_in_fan_out", "true"]),
        (json!({"bias": "all"}), ["bias", "\"all\""]),
        (json!({"lora_bias": true}), ["lora_bias", "true"]),
        (json!({"init_lora_weights": "pissa"}), ["init_lora_weights", "pissa"]),
        (json!({"target_modules": ["embed_tokens"]}), ["target_modules", "embed_tokens"]),
        (json!({"target_modules": ".*_proj"}), ["target_modules", ".*_proj"]),
        (json!({"target_modules": []}), ["target_modules", "[]"]),
    ] {
        refused(load(&folder(dir.path(), changes, &good)), &[&["adapter_config.json"], &words[..]].concat());
    }
    let path = folder(dir.path(), json!({}), &good);
    fs::write(path.join("adapter_config.json"), "{\"r\": ").unwrap();
    refused(load(&path), &["adapter_config.json", "not valid JSON", "line 1"]);
    fs::write(path.join("adapter_config.json"), vec![b' '; (1 << 20) + 1]).unwrap();
    refused(load(&path), &["at most 1048576 bytes"]);
    fs::remove_file(path.join("adapter_config.json")).unwrap();
    refused(load(&path), &["expected a PEFT adapter folder, found no adapter_config.json in it"]);
}

#[test]
fn tensors_that_lie_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = ((A, tensor(&[2, 4])), (B, tensor(&[3, 2])));
    let with = |tensors: &[(&str, Tensor)]| load(&folder(dir.path(), json!({}), tensors));
    refused(with(std::slice::from_ref(&a)), &["model.layers.0.self_attn.q_proj has lora_A but no lora_B"]);
    refused(with(std::slice::from_ref(&b)), &["has lora_B but no lora_A"]);
    refused(with(&[]), &["adapter_model.safetensors", "holds no tensor"]);
    refused(with(&[(A, tensor(&[3, 4])), b.clone()]), &[A, "expected [2, in]", "F32 [3, 4]"]);
    refused(with(&[a.clone(), (B, tensor(&[2, 3]))]), &[B, "expected [out, 2]", "F32 [2, 3]"]);
    refused(with(&[(A, tensor(&[2])), b.clone()]), &[A, "expected [2, in]", "F32 [2]"]);
    for name in [
        "model.layers.0.self_attn.v_proj.lora_A.weight",
        "model.layers.00.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.layers.0.self_attn.q_proj.lora_C.weight",
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "model.embed_tokens.lora_embedding_A",
    ] {
        refused(with(&[a.clone(), b.clone(), (name, tensor(&[2, 4]))]), &[name, "MODULE one of q_proj"]);
    }
    let path = folder(dir.path(), json!({}), &[]);
    let bare = HashMap::from([(A, tensor(&[2, 4]))]);
    candle_core::safetensors::save(&bare, path.join("adapter_model.safetensors")).unwrap();
    refused(load(&path), &[A, "expected base_model.model.model.layers.N"]);
    let whole = HashMap::from([
        (format!("base_model.model.{A}"), Tensor::zeros((2, 4), DType::U8, &Device::Cpu).unwrap()),
        (format!("base_model.model.{B}"), tensor(&[3, 2])),
    ]);
    candle_core::safetensors::save(&whole, path.join("adapter_model.safetensors")).unwrap();
    refused(load(&path), &["F32, F16 or BF16 [2, 4]", "U8 [2, 4]"]);
    fs::write(path.join("adapter_model.safetensors"), [7; 3]).unwrap();
    refused(load(&path), &["adapter_model.safetensors", "at least 8 bytes"]);
}

#[test]
fn half_precision_adapters_are_widened() {
    let dir = tempfile::tempdir().unwrap();
    let half = tensor(&[2, 4]).to_dtype(DType::BF16).unwrap();
    let (_, tensors) = load(&folder(dir.path(), json!({}), &[(A, half.clone()), (B, tensor(&[3, 2]))])).unwrap();
    assert_eq!(flat(&tensors[A]), flat(&half.to_dtype(DType::F32).unwrap()));
}

#[test]
fn what_would_not_load_is_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("adapter");
    let base = golden("student");
    let good = pair("q_proj", 4, 3);
    let attempt = |config: &AdapterConfig, tensors: &[(String, Tensor)]| save(&target, config, tensors, &surroundings(&base));
    refused(attempt(&config(), &good[..1]), &["lora_A but no lora_B"]);
    refused(attempt(&config(), &[]), &["holds no tensor"]);
    refused(attempt(&AdapterConfig { rank: 3, ..config() }, &good), &["expected [3, in]", "F32 [2, 4]"]);
    refused(attempt(&AdapterConfig { rank: 2000, ..config() }, &good), &["r: expected 1 to 1024", "2000"]);
    refused(attempt(&config(), &pair("k_proj", 4, 3)), &["k_proj", "MODULE one of v_proj, q_proj"]);
    refused(attempt(&config(), &[good[0].clone(), good[0].clone(), good[1].clone()]), &["each matrix once"]);
    let half = good.clone().map(|(n, t)| (n, t.to_dtype(DType::F16).unwrap()));
    refused(attempt(&config(), &half), &["expected F32", "F16"]);
    assert!(!target.exists());
    fs::create_dir(&target).unwrap();
    fs::write(target.join("thesis.txt"), "mine").unwrap();
    refused(attempt(&config(), &good), &["empty one", "thesis.txt"]);
    let names: BTreeMap<_, _> = fs::read_dir(dir.path()).unwrap().map(|e| (e.unwrap().file_name(), ())).collect();
    assert_eq!(names.len(), 1, "{names:?}");
}
