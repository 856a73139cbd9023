//! Weights of a model folder: the reference folders, and every way a folder can lie.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use candle_core::{DType, Device};
use potstill_cache::ErrorClass;
use potstill_pipeline::model::ModelError;
use potstill_pipeline::model::weights::Weights;
use potstill_pipeline::run::RunContext;
use safetensors::Dtype;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use tempfile::TempDir;

fn golden(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden")).join(name)
}

/// A safetensors file with this header text and this many zero bytes of data.
fn raw(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// A file holding f32 vectors of two elements with these names.
fn vectors(names: &[&str]) -> Vec<u8> {
    let entries: Vec<String> = names
        .iter()
        .enumerate()
        .map(|(i, n)| format!("{n:?}:{{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[{},{}]}}", 8 * i, 8 * i + 8))
        .collect();
    raw(&format!("{{{}}}", entries.join(",")), 8 * names.len())
}

fn folder(files: &[(&str, Vec<u8>)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

fn index(map: &str) -> Vec<u8> {
    format!("{{\"metadata\":{{\"total_size\":16}},\"weight_map\":{map}}}").into_bytes()
}

#[track_caller]
fn refused(dir: &Path, words: &[&str]) {
    let error = Weights::open(dir).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Runtime);
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
    assert!(text.lines().count() == 1 && text.len() < 700, "{text}");
}

const INDEX: &str = "model.safetensors.index.json";

#[test]
fn reads_one_file_and_many() {
    let student = Weights::open(&golden("student")).unwrap();
    assert!(student.contains("model.embed_tokens.weight") && !student.contains("lm_head.weight"));
    let k = student.tensor("model.layers.0.self_attn.k_proj.weight", &[128, 128], &Device::Cpu).unwrap();
    assert_eq!((k.dtype(), k.dims()), (DType::BF16, &[128, 128][..]));
    let bytes = student.bytes("model.layers.0.self_attn.k_proj.weight", Dtype::BF16, &[128, 128]).unwrap();
    let values = k.flatten_all().unwrap().to_vec1::<half::bf16>().unwrap();
    assert!(values.iter().zip(bytes.chunks(2)).all(|(v, b)| v.to_le_bytes() == b));
    assert_eq!(student.total_bytes(), fs::metadata(golden("student/model.safetensors")).unwrap().len());

    let teacher = Weights::open(&golden("teacher-awq")).unwrap();
    let listed = fs::read_to_string(golden("teacher-awq").join(INDEX)).unwrap();
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let mut expected: Vec<&str> = listed["weight_map"].as_object().unwrap().keys().map(String::as_str).collect();
    expected.sort_unstable();
    assert_eq!(teacher.names().collect::<Vec<_>>(), expected);
    let info = teacher.info("model.layers.0.self_attn.k_proj.qweight").unwrap();
    assert_eq!((info.dtype, info.shape), (Dtype::I32, vec![256, 8]));
}

#[test]
fn equals_the_safetensors_crate_on_every_tensor() {
    let file = fs::read(golden("student/model.safetensors")).unwrap();
    let reference = safetensors::SafeTensors::deserialize(&file).unwrap();
    let ours = Weights::open(&golden("student")).unwrap();
    assert_eq!(ours.names().count(), reference.len());
    for (name, view) in reference.iter() {
        assert_eq!(ours.bytes(name, view.dtype(), view.shape()).unwrap(), view.data(), "{name}");
    }
}

#[test]
fn a_tensor_of_another_kind_is_refused_with_both_sides() {
    let student = Weights::open(&golden("student")).unwrap();
    let name = "model.layers.0.self_attn.k_proj.bias";
    let text = student.tensor(name, &[64], &Device::Cpu).unwrap_err().to_string();
    for word in ["model.safetensors", name, "[64]", "BF16 [128]"] {
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
    assert!(matches!(student.bytes(name, Dtype::F32, &[128]), Err(ModelError::TensorMismatch { .. })));
    assert!(matches!(student.bytes("lm_head.weight", Dtype::F32, &[1]), Err(ModelError::TensorMissing { .. })));
    let teacher = Weights::open(&golden("teacher-awq")).unwrap();
    let packed = teacher.tensor("model.layers.0.self_attn.k_proj.qweight", &[256, 8], &Device::Cpu);
    assert!(packed.unwrap_err().to_string().contains("found I32 [256, 8]"));
}

#[test]
fn require_lists_everything_that_is_wrong() {
    let weights = Weights::open(&golden("student")).unwrap();
    weights.require(&[("model.norm.weight".into(), vec![128])]).unwrap();
    let mut wrong = vec![("model.norm.weight".to_string(), vec![129]), ("model.embed_tokens.weight".into(), vec![2048, 128])];
    wrong.extend((0..10).map(|i| (format!("missing.{i}"), vec![1])));
    let text = weights.require(&wrong).unwrap_err().to_string();
    for word in ["11 of 12", "model.norm.weight is [128] (expected [129])", "missing.6 missing", "and 3 more"] {
        assert!(text.contains(word), "{word:?} is not in {text:?}");
    }
    assert!(!text.contains("missing.7") && !text.contains("embed"));
}

#[test]
fn the_fingerprint_is_of_names_and_contents() {
    let context = RunContext::default();
    let print = |files: &[(&str, Vec<u8>)]| Weights::open(folder(files).path()).unwrap().fingerprint(&context).unwrap();
    let one = print(&[("model.safetensors", vectors(&["a"]))]);
    assert_eq!(one.len(), 64);
    assert_eq!(one, print(&[("model.safetensors", vectors(&["a"]))]));
    assert_ne!(one, print(&[("other.safetensors", vectors(&["a"]))]));
    let mut changed = vectors(&["a"]);
    *changed.last_mut().unwrap() = 1;
    assert_ne!(one, print(&[("model.safetensors", changed)]));

    let mut hasher = blake3::Hasher::new();
    let content = vectors(&["a"]);
    hasher.update(b"potstill weights v1\0");
    hasher.update(&17_u64.to_le_bytes()).update(b"model.safetensors");
    hasher.update(&(content.len() as u64).to_le_bytes()).update(&content);
    assert_eq!(one, hasher.finalize().to_hex().as_str());

    context.stop.store(true, Ordering::Relaxed);
    let stopped = Weights::open(&golden("student")).unwrap().fingerprint(&context).unwrap_err();
    assert_eq!(stopped.class(), ErrorClass::Interrupted);
}

#[test]
fn a_folder_without_weights_is_refused() {
    refused(Path::new("/nonexistent/model"), &["/nonexistent/model", "No such file"]);
    refused(folder(&[]).path(), &["no weights", "found 0 others"]);
    refused(folder(&[("a.safetensors", vectors(&["a"])), ("b.safetensors", vectors(&["b"]))]).path(), &["found 2 others"]);
    refused(folder(&[("adapter_model.safetensors", vectors(&["a"]))]).path(), &["found 0 others"]);
    refused(&golden("student/model.safetensors"), &["not a folder"]);
}

#[test]
fn a_corrupt_header_is_refused() {
    let whole = fs::read(golden("student/model.safetensors")).unwrap();
    let cases: Vec<(Vec<u8>, &[&str])> = vec![
        (vec![], &["at least 8 bytes, found 0"]),
        (vec![1, 2, 3], &["at least 8 bytes, found 3"]),
        (u64::MAX.to_le_bytes().to_vec(), &["18446744073709551615 bytes, at most 16777216"]),
        ([&1000_u64.to_le_bytes()[..], b"{}"].concat(), &["it says it has 1000 bytes, but the file has 10"]),
        (raw("{\"a\":", 0), &["header"]),
        (raw("\u{0}\u{1}", 0), &["header"]),
        (whole[..whole.len() - 1].to_vec(), &["cut short"]),
        ([&whole[..], b"x"].concat(), &["bytes too many"]),
        (raw("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4), &["header"]),
        (raw("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", 8), &["header"]),
        (raw("{\"a\":{\"dtype\":\"F32\",\"shape\":[18446744073709551615,3],\"data_offsets\":[0,4]}}", 4), &["header"]),
        (
            raw("{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,4]}}", 4),
            &["9 dimensions, at most 8"],
        ),
        (raw("{\"a\":{\"dtype\":\"Q9\",\"shape\":[1],\"data_offsets\":[0,4]}}", 4), &["header"]),
    ];
    for (bytes, words) in cases {
        let dir = folder(&[("model.safetensors", bytes)]);
        refused(dir.path(), &[&["model.safetensors"], words].concat());
    }
}

#[test]
fn a_bloated_header_is_refused_before_it_is_parsed() {
    let entry = |i: usize| format!("\"{i}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}");
    let many = |n: usize| raw(&format!("{{{}}}", (0..n).map(entry).collect::<Vec<_>>().join(",")), 0);
    refused(folder(&[("model.safetensors", many(100_002))]).path(), &["100002 tensors, at most 100000"]);
    assert_eq!(Weights::open(folder(&[("model.safetensors", many(1000))]).path()).unwrap().names().count(), 1000);
    // Braces in strings are no objects, and a tensor written as a JSON array counts as one.
    let named = "{\"{{[[\\\"{\":{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}";
    assert!(Weights::open(folder(&[("model.safetensors", raw(named, 0))]).path()).unwrap().contains("{{[[\"{"));
    let arrays: Vec<String> = (0..100_002).map(|i| format!("\"{i}\":[\"U8\",[0],[0,0]]")).collect();
    refused(folder(&[("model.safetensors", raw(&format!("{{{}}}", arrays.join(",")), 0))]).path(), &["at most 100000"]);
}

#[test]
fn an_index_that_lies_is_refused() {
    let (a, b) = (("a.safetensors", vectors(&["a"])), ("b.safetensors", vectors(&["b"])));
    let with = |map: &str| folder(&[a.clone(), b.clone(), (INDEX, index(map))]);
    let good = with("{\"a\":\"a.safetensors\",\"b\":\"b.safetensors\"}");
    assert_eq!(Weights::open(good.path()).unwrap().names().collect::<Vec<_>>(), ["a", "b"]);

    refused(with("{\"b\":\"a.safetensors\"}").path(), &["\"b\"", "\"a.safetensors\"", "lacks it"]);
    refused(with("{\"a\":\"a.safetensors\",\"b\":\"a.safetensors\",\"c\":\"b.safetensors\"}").path(), &["lacks it"]);
    refused(with("{\"a\":\"a.safetensors\",\"a\":\"b.safetensors\"}").path(), &["listed twice"]);
    refused(with("{\"a\":\"gone.safetensors\"}").path(), &["gone.safetensors", "No such file"]);
    refused(with("{}").path(), &["names no tensor"]);
    refused(with("[]").path(), &["bad index"]);
    let names = ["../a.safetensors", "/etc/a.safetensors", "x/a.safetensors", "..", ".", "", "a.bin", "./a.safetensors"];
    for name in names.iter().chain(&["a\\u0000.safetensors", "x\\\\a.safetensors", "a.safetensors/"]) {
        refused(with(&format!("{{\"a\":\"{name}\"}}")).path(), &["bad index", "plain name"]);
    }
    let twice = index("{\"a\":\"a.safetensors\",\"x\":\"b.safetensors\"}");
    let twice = folder(&[a.clone(), ("b.safetensors", vectors(&["a"])), (INDEX, twice)]);
    refused(twice.path(), &["b.safetensors", "\"a\" is also in a.safetensors"]);
}

#[test]
fn an_index_beyond_the_limits_is_refused() {
    let dir = folder(&[("a.safetensors", vectors(&["a"]))]);
    let file = fs::File::create(dir.path().join(INDEX)).unwrap();
    file.set_len((64 << 20) + 1).unwrap();
    refused(dir.path(), &["expected at most 67108864 bytes, found more"]);
    let entries: Vec<String> = (0..10_001).map(|i| format!("\"t{i}\":\"f{i}.safetensors\"")).collect();
    fs::write(dir.path().join(INDEX), index(&format!("{{{}}}", entries.join(",")))).unwrap();
    refused(dir.path(), &["10001 files, at most 10000"]);
    let entries: Vec<String> = (0..100_001).map(|i| format!("\"t{i}\":\"a.safetensors\"")).collect();
    fs::write(dir.path().join(INDEX), index(&format!("{{{}}}", entries.join(",")))).unwrap();
    refused(dir.path(), &["more than 100000"]);
}

#[cfg(unix)]
#[test]
fn links_may_lead_to_the_blobs_of_a_hub_cache_and_nowhere_else() {
    use std::os::unix::fs::symlink;
    let outside = folder(&[("secret.safetensors", vectors(&["a"]))]);
    let dir = folder(&[]);
    symlink(outside.path().join("secret.safetensors"), dir.path().join("model.safetensors")).unwrap();
    refused(dir.path(), &["leads out of the model folder", "secret.safetensors"]);

    // A snapshot's links: to a blob of its repository, or through one to a blob that repositories share.
    let hub = folder(&[]);
    let (commit, hash) = ("0123456789abcdef0123456789abcdef01234567", "ab".repeat(32));
    let leads = |repository: &str, name: &str, link: &str, file: &str| {
        let snapshot = hub.path().join(repository).join(name);
        fs::create_dir_all(&snapshot).unwrap();
        let file = snapshot.join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, vectors(&["a"])).unwrap();
        let _ = fs::remove_file(snapshot.join("model.safetensors"));
        symlink(link, snapshot.join("model.safetensors")).unwrap();
        snapshot
    };
    let (good, place) = ("models--a--b", format!("snapshots/{commit}"));
    let snapshot = leads(good, &place, "../../blobs/cafe", "../../blobs/cafe");
    assert!(Weights::open(&snapshot).unwrap().contains("a"));
    let shared = format!("../../../blobs/ab/{hash}");
    leads(good, &place, "../../blobs/cafe", &shared);
    fs::remove_file(hub.path().join(good).join("blobs/cafe")).unwrap();
    symlink(format!("../../blobs/ab/{hash}"), hub.path().join(good).join("blobs/cafe")).unwrap();
    assert!(Weights::open(&snapshot).unwrap().contains("a"));

    // Nothing wider: other places, and folders that only look alike.
    let wider = |repository: &str, name: &str, link: &str| {
        refused(&leads(repository, name, link, link), &["leads out of the model folder"])
    };
    for link in
        ["../../blobs/x/cafe", "../../refs/cafe", "../0000/cafe", "../../../models--a--c/blobs/cafe", "../../../blobs/cafe"]
    {
        wider(good, &place, link);
    }
    for link in
        [format!("../../../blobs/cd/{hash}"), format!("../../../blobs/ab/{}", &hash[2..]), format!("../../../blobs/{hash}")]
    {
        wider(good, &place, &link);
    }
    for (repository, name) in [
        ("b", "snapshots/0123"),
        ("models--a--b--c", "snapshots/0"),
        ("spaces--a--b", "snapshots/0"),
        ("models--a", "snapshots/0"),
    ] {
        wider(repository, &name.replace("/0", &format!("/{commit}")).replace("123", ""), "../../blobs/cafe");
    }
    for name in ["snapshots/0123", "snapshots/main", "versions/0", "snapshots/0123456789ABCDEF0123456789ABCDEF01234567"] {
        wider(good, &name.replace("versions/0", &format!("versions/{commit}")), "../../blobs/beef");
    }
}
