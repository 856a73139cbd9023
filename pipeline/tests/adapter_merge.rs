//! The merge against PEFT's merged weights, and the folder that it writes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use candle_core::{DType, Device, Tensor};
use potstill_cache::ErrorClass;
use potstill_pipeline::adapter::{MergeConfig, MergeDtype, MergeFrom, MergeReport, load, merge, merge_in_shards};
use potstill_pipeline::model::weights::Weights;
use potstill_pipeline::run::RunContext;
use safetensors::Dtype;
use serde_json::Value;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

fn golden(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden")).join(name)
}

fn settings(out: &Path) -> MergeConfig {
    MergeConfig { student: golden("student"), adapter: golden("expected/lora"), out: out.to_path_buf(), ..MergeConfig::default() }
}

fn f32s(weights: &Weights, name: &str) -> Vec<f32> {
    let shape = weights.info(name).unwrap().shape;
    let tensor = weights.tensor(name, &shape, &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

const V: &str = "model.layers.1.self_attn.v_proj.weight";

fn run(from: MergeFrom, dtype: MergeDtype) -> (tempfile::TempDir, Weights, MergeReport) {
    let dir = tempfile::tempdir().unwrap();
    let config = MergeConfig { weights: from, dtype, ..settings(&dir.path().join("merged")) };
    let report = merge(&config, &RunContext::default()).unwrap();
    let weights = Weights::open(&config.out).unwrap();
    (dir, weights, report)
}

#[test]
fn merged_weights_equal_pefts() {
    let reference = Weights::open_file(&golden("expected/merged_weights.safetensors")).unwrap();
    for (variant, from, dtype) in [
        ("merged_base_f32", MergeFrom::Original, MergeDtype::F32),
        ("merged_base_bf16", MergeFrom::Original, MergeDtype::Auto),
        ("merged_nf4_f32", MergeFrom::Nf4, MergeDtype::F32),
    ] {
        let (_dir, weights, _) = run(from, dtype);
        let (found, expected) = (f32s(&weights, V), f32s(&reference, &format!("{variant}.{V}")));
        let mut flipped = 0;
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let difference = (found - expected).abs();
            if variant.ends_with("bf16") {
                // A sum of eight f32 products in another order may fall on the other side of a rounding: one bf16 step.
                assert!(difference <= expected.abs() * f32::powi(2.0, -7), "{variant} at {i}: {expected} {found}");
                flipped += usize::from(difference > 0.0);
            } else {
                // Eight f32 products and a sum, all of size below 1: some 1e-7. NF4's nested offset is a mean whose
                // order of summation is free (1e-6 relative), and one of 5888 absmax bytes may differ by a step.
                assert!(difference < 1e-6, "{variant} at {i}: {expected} {found}");
            }
        }
        assert!(flipped <= expected.len() / 100, "{flipped} values rounded the other way");
    }
}

#[test]
fn every_layer_is_merged_once_and_all_else_is_untouched() {
    let (config, matrices) = load(&golden("expected/lora")).unwrap();
    let base = Weights::open(&golden("student")).unwrap();
    let (_dir, weights, report) = run(MergeFrom::Original, MergeDtype::Auto);
    assert_eq!(weights.names().collect::<Vec<_>>(), base.names().collect::<Vec<_>>(), "tied heads stay tied");
    assert_eq!((report.adapted, report.tensors, report.files), (14, base.names().count() as u64, 1));
    assert_eq!(report.bytes, weights.total_bytes());
    let mut adapted = 0;
    for name in base.names() {
        let info = base.info(name).unwrap();
        assert_eq!(weights.info(name).unwrap(), info, "{name}");
        let module = name.strip_suffix(".weight").unwrap_or_default();
        let (old, new) = (f32s(&base, name), f32s(&weights, name));
        let Some(a) = matrices.get(&format!("{module}.lora_A.weight")) else {
            assert_eq!(old, new, "{name}");
            continue;
        };
        let b = matrices[&format!("{module}.lora_B.weight")].to_dtype(DType::F64).unwrap();
        let delta = (b.matmul(&a.to_dtype(DType::F64).unwrap()).unwrap() * config.factor()).unwrap();
        let delta: Vec<f64> = delta.flatten_all().unwrap().to_vec1().unwrap();
        for ((old, new), delta) in old.iter().zip(&new).zip(&delta) {
            let exact = f64::from(*old) + delta;
            // Rounded once: half a bf16 step (at most 2^-8 of the value) and f32's error before it.
            assert!((f64::from(*new) - exact).abs() <= exact.abs() * f64::powi(2.0, -8) + 1e-7, "{name}: {exact} {new}");
        }
        assert_ne!(old, new, "{name}");
        adapted += 1;
    }
    assert_eq!(adapted, 14);
}

#[test]
fn the_folder_is_complete() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("merged");
    fs::create_dir(&out).unwrap();
    merge(&MergeConfig { dtype: MergeDtype::F16, ..settings(&out) }, &RunContext::default()).unwrap();
    let mut names: Vec<String> = fs::read_dir(&out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]);
    for copied in ["generation_config.json", "tokenizer.json", "tokenizer_config.json"] {
        assert_eq!(fs::read(out.join(copied)).unwrap(), fs::read(golden("student").join(copied)).unwrap());
    }
    let read = |folder: &Path| -> Value { serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap() };
    let mut expected = read(&golden("student"));
    expected["torch_dtype"] = "float16".into();
    assert_eq!(read(&out), expected);
    let weights = Weights::open(&out).unwrap();
    assert!(weights.names().all(|n| weights.info(n).unwrap().dtype == Dtype::F16));
    let bytes = fs::read(out.join("model.safetensors")).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = |name: &str| fs::metadata(out.join(name)).unwrap().permissions().mode();
        assert_eq!(mode("model.safetensors"), mode("config.json"));
    }
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["merged"]);
}

#[test]
fn a_model_in_shards_is_the_same_model() {
    let (_dir, whole, _) = run(MergeFrom::Nf4, MergeDtype::Auto);
    let dir = tempfile::tempdir().unwrap();
    let config = MergeConfig { weights: MergeFrom::Nf4, ..settings(&dir.path().join("merged")) };
    let limit = 200_000;
    let report = merge_in_shards(&config, limit, &RunContext::default()).unwrap();
    assert!(report.files >= 4, "{report:?}");
    for i in 1..=report.files {
        let file = config.out.join(format!("model-{i:05}-of-{:05}.safetensors", report.files));
        let weights = Weights::open_file(&file).unwrap();
        let bytes: usize = weights.names().map(|n| 2 * weights.info(n).unwrap().shape.iter().product::<usize>()).sum();
        assert!(bytes as u64 <= limit || weights.names().count() == 1);
    }
    let index: Value = serde_json::from_slice(&fs::read(config.out.join("model.safetensors.index.json")).unwrap()).unwrap();
    let shards = Weights::open(&config.out).unwrap();
    assert_eq!(index["weight_map"].as_object().unwrap().len(), whole.names().count());
    let mut total = 0;
    for name in whole.names() {
        let info = whole.info(name).unwrap();
        let bytes = shards.bytes(name, info.dtype, &info.shape).unwrap();
        assert_eq!(bytes, whole.bytes(name, info.dtype, &info.shape).unwrap(), "{name}");
        total += bytes.len() as u64;
    }
    assert_eq!(index["metadata"]["total_size"].as_u64().unwrap(), total);
}

#[track_caller]
fn refused(config: &MergeConfig, words: &[&str], class: ErrorClass) {
    let error = merge(config, &RunContext::default()).unwrap_err();
    let text = error.to_string();
    words.iter().for_each(|word| assert!(text.contains(word), "{word:?} is not in {text:?}"));
    assert_eq!(error.class(), class, "{text}");
}

#[test]
fn what_does_not_fit_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let good = settings(&dir.path().join("merged"));
    let runtime = ErrorClass::Runtime;
    refused(&MergeConfig { student: "/nonexistent".into(), ..good.clone() }, &["/nonexistent", "No such file"], runtime);
    refused(
        &MergeConfig { adapter: "/nonexistent".into(), ..good.clone() },
        &["/nonexistent: expected a PEFT adapter folder, found nothing there"],
        runtime,
    );
    let awq = MergeConfig { student: golden("teacher-awq"), ..good.clone() };
    refused(&awq, &["config.json", "quantization_config", "dense"], runtime);

    let adapter = dir.path().join("adapter");
    fs::create_dir(&adapter).unwrap();
    fs::copy(golden("expected/lora/adapter_config.json"), adapter.join("adapter_config.json")).unwrap();
    let write = |layer: usize, inputs: usize, size: f32| {
        let name = |m: &str| format!("base_model.model.model.layers.{layer}.self_attn.q_proj.{m}.weight");
        let full = |shape: (usize, usize)| Tensor::full(size, shape, &Device::Cpu).unwrap();
        let tensors = HashMap::from([(name("lora_A"), full((8, inputs))), (name("lora_B"), full((128, 8)))]);
        candle_core::safetensors::save(&tensors, adapter.join("adapter_model.safetensors")).unwrap();
    };
    let foreign = MergeConfig { adapter: adapter.clone(), ..good.clone() };
    write(2, 128, 1.0);
    refused(&foreign, &["model.layers.2.self_attn.q_proj.weight missing"], runtime);
    write(1, 64, 1.0);
    refused(&foreign, &["q_proj.weight is [128, 128] (expected [128, 64])"], runtime);
    write(1, 128, 100.0);
    let f16 = MergeConfig { dtype: MergeDtype::F16, ..foreign };
    refused(&f16, &["layers.1.self_attn.q_proj.weight", "beyond the range of f16", "--dtype bf16"], runtime);

    fs::create_dir(&good.out).unwrap();
    fs::write(good.out.join("notes.txt"), "mine").unwrap();
    refused(&good, &["empty one", "notes.txt"], ErrorClass::Usage);
    refused(&MergeConfig { out: good.out.join("notes.txt"), ..good.clone() }, &["a file"], ErrorClass::Usage);

    let context = RunContext::default();
    context.stop.store(true, Ordering::Relaxed);
    let stopped = merge(&settings(&dir.path().join("other")), &context).unwrap_err();
    assert_eq!(stopped.class(), ErrorClass::Interrupted);
    let (phase, done) = context.progress.snapshot();
    assert_eq!((phase.name.as_str(), phase.unit, phase.total), ("merging", "bytes", done));
    let base = Weights::open(&golden("student")).unwrap();
    let bytes = base.names().map(|n| 2 * base.info(n).unwrap().shape.iter().product::<usize>()).sum::<usize>();
    assert_eq!(done, bytes as u64);
    let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["adapter", "merged"]);
}
