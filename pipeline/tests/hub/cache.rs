//! What a name means in a cache that is there: which commit, what is missing, what is refused. No network.

use crate::made::{COMMIT, Cache, OTHER, settings};
use potstill_pipeline::hub::{Hub, HubName, Kind, Network, name_of};
use potstill_pipeline::run::RunContext;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

const MODEL: &str = "models--Org--Some.Model-1";
/// What a sentence ends with where nothing may be fetched.
const ABILITY: &str = if cfg!(feature = "hub") {
    "nothing is downloaded, as HF_HUB_OFFLINE is set"
} else {
    "this build cannot download (cargo feature hub): fetch it with `hf download`, or give a path"
};

#[test]
fn a_name_is_the_snapshot_of_its_revision() {
    let cache = Cache::new();
    cache.model(MODEL, OTHER, &[("model.safetensors", "weights")]);
    cache.model(MODEL, COMMIT, &[("model.safetensors", "weights")]);
    cache.refer(MODEL, "v1", OTHER);
    cache.refer(MODEL, "refs/pr/2", &format!("{OTHER}\n"));
    let (main, other) = (cache.snapshot(MODEL, COMMIT), cache.snapshot(MODEL, OTHER));
    assert_eq!(cache.found("Org/Some.Model-1"), Ok(main.clone()));
    assert_eq!(cache.found("Org/Some.Model-1@main"), Ok(main.clone()));
    for revision in ["v1", "refs/pr/2", OTHER] {
        assert_eq!(cache.found(&format!("Org/Some.Model-1@{revision}")), Ok(other.clone()), "{revision}");
    }
    assert_eq!(name_of(&main).as_deref(), Some("Org/Some.Model-1"));
    assert_eq!(name_of(cache.folder.path()), None);
    assert_eq!(name_of(&main.join("..")), None);
}

#[test]
fn what_exists_or_can_only_be_a_path_stays_one() {
    let cache = Cache::new();
    // Relative to this crate's folder, in which tests run: there is a folder tests/hub.
    cache.model("models--tests--hub", COMMIT, &[("model.safetensors", "weights")]);
    cache.model("models--no--where", COMMIT, &[("model.safetensors", "weights")]);
    assert_eq!(cache.found("tests/hub"), Ok(PathBuf::from("tests/hub")), "a path that exists wins");
    assert_eq!(cache.found("no/where"), Ok(cache.snapshot("models--no--where", COMMIT)));
    for path in
        ["nowhere", "./no/where", "/no/where", "no/where/", "no//where", "../no", "no/..", "no/where:x", "a/b/c", "no/w*", ""]
    {
        assert_eq!(cache.found(path), Ok(PathBuf::from(path)));
    }
    let same = |path: &str| cache.hub().data_files(&[path.into()], &RunContext::default()).unwrap() == [PathBuf::from(path)];
    for path in ["data/chats.jsonl", "data/chats.json.zst", "data/train-*.parquet", "C:/x", "a/b:", "a/b:c:d", "a/b:../c"] {
        assert!(same(path), "{path}");
    }
}

#[test]
fn names_are_what_the_hub_allows() {
    let parse = |text: &str| HubName::parse(Kind::Dataset, text);
    let name = parse("HuggingFaceH4/ultrachat_200k@refs/pr/1:train_sft").unwrap();
    assert_eq!((name.id.as_str(), name.revision.as_str()), ("HuggingFaceH4/ultrachat_200k", "refs/pr/1"));
    assert_eq!((name.split.as_deref(), name.folder().as_str()), (Some("train_sft"), "datasets--HuggingFaceH4--ultrachat_200k"));
    assert_eq!(name.to_string(), "HuggingFaceH4/ultrachat_200k@refs/pr/1:train_sft");
    let long = format!("a/{}", "b".repeat(95));
    for wrong in [
        "-a/b",
        "a-/b",
        "a/.b",
        "a/b.",
        "a/b--c",
        "a--b/c",
        "a/b..c",
        "a/b.git",
        "a b/c",
        "ä/b",
        &long,
        "a/b@",
        "a/b@x/../y",
        "a/b@/x",
    ] {
        assert_eq!(parse(wrong), None, "{wrong}");
    }
    for wrong in ["a/b@.x", "a/b@x//y", "a/b@x y", "a/b:x y", "a/b:.x", "a/b:x/y", "a/b@\0"] {
        assert_eq!(parse(wrong), None, "{wrong}");
    }
    assert_eq!(HubName::parse(Kind::Model, "a/b:train"), None, "a model has no splits");
}

#[test]
fn one_sentence_says_what_was_looked_for_and_what_can_be_done() {
    let cache = Cache::new();
    let missing = |looked: &str| {
        Err(format!("Org/New: there is no such path, and no model of this name in the Hugging Face cache ({looked}); {ABILITY}"))
    };
    assert_eq!(cache.found("Org/New"), missing("there is no CACHE/models--Org--New"));
    cache.put("models--Org--New", COMMIT, "README.md", "");
    assert_eq!(cache.found("Org/New"), missing("there is no CACHE/models--Org--New/refs/main"));
    cache.refer("models--Org--New", "main", OTHER);
    assert_eq!(cache.found("Org/New"), missing(&format!("there is no CACHE/models--Org--New/snapshots/{OTHER}")));
    for wrong in ["../../../etc", "main", "", &COMMIT[1..], &COMMIT.to_uppercase()] {
        cache.refer("models--Org--New", "main", wrong);
        let sentence = cache.found("Org/New").unwrap_err();
        let expected = format!("(CACHE/models--Org--New/refs/main: expected a commit's hash of 40 digits, found {wrong:?});");
        assert!(sentence.contains(&expected), "{sentence}");
    }
    let mut lost = settings(&[("HF_HUB_OFFLINE", "1")]);
    lost.cache = None;
    let nowhere = Hub::new(lost);
    let sentence = nowhere.model_folder(Path::new("Org/New"), &RunContext::default()).unwrap_err().to_string();
    assert!(sentence.contains("none of HF_HUB_CACHE, HF_HOME and HOME says where it is"), "{sentence}");
}

#[test]
fn a_snapshot_that_is_not_whole_is_no_model() {
    let index = |files: &[&str]| {
        let map: Vec<String> = files.iter().map(|file| format!("\"of {}\":{file:?}", file.len())).collect();
        format!("{{\"weight_map\":{{{}}}}}", map.join(","))
    };
    let lacks = |what: &str| Err(format!("Org/Some.Model-1: CACHE/{MODEL}/snapshots/{COMMIT} lacks {what}; {ABILITY}"));
    let cache = Cache::new();
    let whole = Ok(cache.snapshot(MODEL, COMMIT));
    let link = |file: &str| cache.snapshot(MODEL, COMMIT).join(file);
    cache.put(MODEL, COMMIT, "config.json", "{}");
    cache.refer(MODEL, "main", COMMIT);
    assert_eq!(cache.found("Org/Some.Model-1"), lacks("tokenizer.json and 1 more"));
    cache.put(MODEL, COMMIT, "tokenizer.json", "{}");
    assert_eq!(cache.found("Org/Some.Model-1"), lacks("model.safetensors"));
    cache.put(MODEL, COMMIT, "pytorch_model.bin", "no");
    assert_eq!(cache.found("Org/Some.Model-1"), lacks("model.safetensors"));
    cache.put(MODEL, COMMIT, "other.safetensors", "x");
    assert_eq!(cache.found("Org/Some.Model-1"), whole);
    cache.put(MODEL, COMMIT, "model.safetensors.index.json", &index(&["a.safetensors", "bb.safetensors"]));
    assert_eq!(cache.found("Org/Some.Model-1"), lacks("a.safetensors and 1 more"));
    cache.put(MODEL, COMMIT, "a.safetensors", "x");
    assert_eq!(cache.found("Org/Some.Model-1"), lacks("bb.safetensors"));
    // A link whose blob is gone is no file.
    symlink("../../blobs/gone", link("bb.safetensors")).unwrap();
    assert_eq!(cache.found("Org/Some.Model-1"), lacks("bb.safetensors"));
    fs::remove_file(link("bb.safetensors")).unwrap();
    cache.put(MODEL, COMMIT, "bb.safetensors", "x");
    assert_eq!(cache.found("Org/Some.Model-1"), whole);
    for (wrong, found) in [("../a.safetensors", "file name"), ("x/a.safetensors", "file name"), ("a.bin", "file name")] {
        fs::remove_file(link("model.safetensors.index.json")).unwrap();
        cache.put(MODEL, COMMIT, "model.safetensors.index.json", &index(&[wrong]));
        let sentence = cache.found("Org/Some.Model-1").unwrap_err();
        assert!(sentence.contains("expected a weight_map of plain .safetensors names") && sentence.contains(found), "{sentence}");
    }
}

#[test]
fn a_file_that_leads_out_of_the_repository_is_refused() {
    let cache = Cache::new();
    let repository = "datasets--Org--Chats";
    cache.put(repository, COMMIT, "data/a.jsonl", "{}");
    cache.refer(repository, "main", COMMIT);
    assert_eq!(cache.files("Org/Chats"), Ok(vec!["data/a.jsonl".into()]));
    fs::write(cache.path("secret.jsonl"), "{}").unwrap();
    symlink("../../../../secret.jsonl", cache.snapshot(repository, COMMIT).join("data/b.jsonl")).unwrap();
    let sentence = cache.files("Org/Chats").unwrap_err();
    assert!(sentence.contains("data/b.jsonl: leads to ") && sentence.contains("secret.jsonl, which is no part"), "{sentence}");
}

#[test]
fn the_environment_means_what_it_means_elsewhere() {
    let cache = |variables: &[(&str, &str)]| settings(variables).cache.unwrap().to_str().unwrap().to_string();
    let home = ("HOME", "/u");
    assert_eq!(cache(&[home]), "/u/.cache/huggingface/hub");
    assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x")]), "/x/huggingface/hub");
    assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x"), ("HF_HOME", "~/hf")]), "/u/hf/hub");
    assert_eq!(cache(&[home, ("HF_HOME", "/h"), ("HUGGINGFACE_HUB_CACHE", "/old")]), "/old");
    let both = [home, ("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "$BIG/${BIG}x/$NONE"), ("BIG", "/b")];
    assert_eq!(cache(&both), "/b//bx/$NONE");
    assert_eq!(cache(&[home, ("HF_HUB_CACHE", "")]), "/u/.cache/huggingface/hub", "empty is not given");

    assert_eq!(settings(&[home]).endpoint, "https://huggingface.co");
    assert_eq!(settings(&[home, ("HF_ENDPOINT", "http://mirror:80/hf/")]).endpoint, "http://mirror:80/hf");
    let offline = |variables: &[(&str, &str)]| settings(variables).network != settings(&[]).network;
    for on in ["1", "true", "YES", "On"] {
        assert_eq!(offline(&[("HF_HUB_OFFLINE", on)]), cfg!(feature = "hub"), "{on}");
    }
    assert_eq!(offline(&[("TRANSFORMERS_OFFLINE", "1")]), cfg!(feature = "hub"));
    assert!(!offline(&[("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")]) && !offline(&[("HF_HUB_OFFLINE", "2")]));
    assert_eq!(settings(&[]).network == Network::Absent, cfg!(not(feature = "hub")));

    let folder = tempfile::tempdir().unwrap();
    let hf_home = folder.path().to_str().unwrap();
    let file = [("HF_HOME", hf_home)];
    assert_eq!(settings(&file).token(), None);
    fs::write(folder.path().join("token"), " hf_file\n").unwrap();
    fs::write(folder.path().join("mine"), "hf_mine").unwrap();
    assert_eq!(settings(&file).token().as_deref(), Some("hf_file"));
    let mine = folder.path().join("mine");
    assert_eq!(settings(&[file[0], ("HF_TOKEN_PATH", mine.to_str().unwrap())]).token().as_deref(), Some("hf_mine"));
    let given = [file[0], ("HF_TOKEN", "hf_\nx\r\n"), ("HUGGING_FACE_HUB_TOKEN", "hf_old")];
    assert_eq!(settings(&given).token().as_deref(), Some("hf_x"));
    assert!(!format!("{:?}", settings(&given)).contains("hf_x"), "a token is never shown");
    assert_eq!(settings(&given[..1]).token(), settings(&[file[0], ("HF_TOKEN", " ")]).token());
    assert_eq!(settings(&[given[0], given[1], ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]).token(), None);
}
