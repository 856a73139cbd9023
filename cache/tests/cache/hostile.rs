//! Caches made to mislead: manifests whose digest is right and whose contents are not. One clear sentence each, never a panic.

use crate::made::{self, forge};
use potstill_cache::{Cache, Error, ErrorClass, FORMAT_VERSION, ScanProgress, verify};
use serde_json::{Value, json};
use std::path::Path;

type Change = Box<dyn FnOnce(&mut Value)>;

/// The error's class, and its sentence without the folder.
fn forged(change: impl FnOnce(&mut Value)) -> (ErrorClass, String) {
    let (dir, _) = made::cache(6, 3, 4);
    forge(dir.path(), change);
    let error = Cache::open(dir.path()).unwrap_err();
    (error.class(), without_folder(dir.path(), &error))
}

fn without_folder(dir: &Path, error: &Error) -> String {
    error.to_string().strip_prefix(&format!("{}/", dir.display())).expect("the sentence begins with the folder").to_string()
}

#[test]
fn a_forged_manifest_is_read_like_any_other() {
    let (dir, stored) = made::cache(6, 3, 4);
    forge(dir.path(), |_| {});
    assert_eq!(made::errors_or_equal(dir.path(), &stored), 0);
}

#[test]
fn paths_stay_inside_the_folder() {
    for path in
        ["../x.parquet", "/etc/x.parquet", "a/b.parquet", "..", ".x.parquet", "", "x\u{0}.parquet", "passwd", "a\\b.parquet"]
    {
        let (class, text) = forged(|m| m["shards"][0]["file"] = json!(path));
        assert_eq!(class, ErrorClass::Integrity);
        let found = format!("found {path:?}; the cache is damaged");
        assert_eq!(text, format!("manifest.json: expected shards[0].file to be a plain name ending in .parquet, {found}"));
    }
    for path in ["../tokenizer.json", "/etc/passwd", "a/../../b", "shard-00000.parquet", "manifest.json"] {
        let (class, text) = forged(|m| m["companions"][0]["path"] = json!(path));
        assert_eq!(class, ErrorClass::Integrity);
        assert!(text.contains("companion files with plain relative paths"), "{text}");
    }
}

#[test]
fn counts_and_settings_are_not_believed() {
    let (max, i64_max) = (json!(u64::MAX), json!(i64::MAX));
    let cases: Vec<(Change, &str)> = vec![
        (Box::new(|m| m["shards"][1]["first_row"] = json!(2)), "shards[1].first_row 3 and a row or more"),
        (Box::new(|m| m["shards"][0]["rows"] = json!(0)), "shards[0].first_row 0 and a row or more"),
        (Box::new(move |m| m["shards"][0]["rows"] = max), "small enough to add up"),
        (Box::new(move |m| m["shards"][1]["tokens"] = i64_max), "small enough to add up"),
        (Box::new(|m| m["shards"][1]["rows"] = json!(4)), "6 rows in the finished cache, found 7, complete: true"),
        (Box::new(|m| m["shards"].as_array_mut().unwrap().truncate(1)), "6 rows in the finished cache, found 3, complete: true"),
        (Box::new(|m| m["description"]["vocab_size"] = json!(u32::MAX)), "description.vocab_size: 1 to 16777216"),
        (Box::new(|m| m["description"]["selection"]["k"] = json!(0)), "description.selection.k: 1 to 65535"),
        (Box::new(|m| m["description"]["extra"] = json!(0)), "unknown field `extra`"),
        (Box::new(|m| m["shards"][0]["bytes"] = json!(-1)), "invalid value"),
        (Box::new(|m| m["format_version"] = json!(0)), "a format version from 1"),
    ];
    for (change, expected) in cases {
        let (class, text) = forged(change);
        assert_eq!(class, ErrorClass::Integrity);
        assert!(text.starts_with("manifest.json: expected ") && text.contains(expected), "{text}");
    }
}

#[test]
fn a_shard_is_where_its_footer_says() {
    // Files and manifest entries swapped together: every digest and size holds.
    let (dir, stored) = made::cache(6, 3, 4);
    let [a, b, c] = ["shard-00000.parquet", "shard-00001.parquet", "c"].map(|name| dir.path().join(name));
    std::fs::rename(&a, &c).unwrap();
    std::fs::rename(&b, &a).unwrap();
    std::fs::rename(&c, &b).unwrap();
    forge(dir.path(), |m| {
        for field in ["bytes", "blake3"] {
            let (first, second) = (m["shards"][0][field].take(), m["shards"][1][field].take());
            (m["shards"][0][field], m["shards"][1][field]) = (second, first);
        }
    });
    let error = Cache::open(dir.path()).unwrap_err();
    let expected =
        "shard-00000.parquet: expected potstill.first_row = \"0\" in the footer, found Some(\"3\"); the cache is damaged";
    assert_eq!(without_folder(dir.path(), &error), expected);
    assert!(made::errors_or_equal(dir.path(), &stored) > 0);
    assert_eq!(verify(dir.path(), &ScanProgress::default()).unwrap().problem_count, 2);
}

#[test]
fn a_description_that_is_not_the_shards_is_refused() {
    let (_, text) = forged(|m| m["description"]["teacher"]["weights_blake3"] = json!("feed"));
    assert!(text.contains("expected potstill.teacher_weights_blake3 = \"feed\" in the footer"), "{text}");
    let (_, text) = forged(|m| m["description"]["encoding"]["max_length"] = json!(7));
    assert!(text.contains("expected potstill.description_blake3"), "{text}");
}

#[test]
fn what_is_no_cache_gets_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let shown = dir.path().display().to_string();
    let error = Cache::open(&dir.path().join("nowhere")).unwrap_err();
    assert_eq!(error.to_string(), format!("{shown}/nowhere: no such folder; expected the folder of a cache"));
    assert_eq!(error.class(), ErrorClass::Runtime);
    let error = Cache::open(dir.path()).unwrap_err();
    assert_eq!(error.to_string(), format!("{shown}: no manifest.json in this folder; expected the folder of a cache"));
    assert!(verify(dir.path(), &ScanProgress::default()).is_err());
    std::fs::write(dir.path().join("manifest.json"), "{}").unwrap();
    let error = Cache::open(dir.path()).unwrap_err();
    let expected =
        "manifest.json: expected a manifest that opens with manifest_blake3, found something else; the cache is damaged";
    assert_eq!(without_folder(dir.path(), &error), expected);
    std::fs::remove_file(dir.path().join("manifest.json")).unwrap();
    std::fs::create_dir(dir.path().join("manifest.json")).unwrap();
    assert_eq!(Cache::open(dir.path()).unwrap_err().class(), ErrorClass::Integrity);
}

#[test]
fn a_newer_format_is_named_as_such() {
    let (class, text) = forged(|m| {
        m["format_version"] = json!(FORMAT_VERSION + 1);
        m["something_new"] = json!(true);
    });
    assert_eq!(class, ErrorClass::Mismatch);
    let (next, known) = (FORMAT_VERSION + 1, FORMAT_VERSION);
    let expected =
        format!("manifest.json: format version {next}, but this program knows versions up to {known}; use a newer program");
    assert_eq!(text, expected);
}
