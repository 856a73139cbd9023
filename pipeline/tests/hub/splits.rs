//! Which files a split means, by the rule that Hugging Face `datasets` has for paths. The expected lists were compared with what its
//! `get_data_patterns` and `resolve_pattern` (5.2.0) give for the same files.

use crate::made::{COMMIT, Cache};
use std::fs;

const REPOSITORY: &str = "datasets--Org--Chats";

fn cache(files: &[&str]) -> Cache {
    let cache = Cache::new();
    files.iter().for_each(|file| cache.put(REPOSITORY, COMMIT, file, "{}"));
    cache.refer(REPOSITORY, "main", COMMIT);
    cache
}

#[track_caller]
fn means(files: &[&str], split: &str, expected: &[&str]) {
    assert_eq!(cache(files).files(&format!("Org/Chats{split}")), Ok(expected.iter().map(|s| s.to_string()).collect()), "{split}");
}

#[track_caller]
fn refuses(files: &[&str], split: &str, found: &str) {
    let sentence = cache(files).files(&format!("Org/Chats{split}")).unwrap_err();
    assert!(sentence.contains(found), "{found:?} is not in {sentence:?}");
}

#[test]
fn numbered_files_in_data_carry_their_split() {
    let files = [
        "data/train_sft-00000-of-00002-a3ecf92756993583.parquet",
        "data/train_sft-00001-of-00002-0a1819463f7d8d9f.parquet",
        "data/train_gen-00000-of-00001.parquet",
        "data/test_sft-00000-of-00001-f7dfac4afe5b93f4.parquet",
        "train_sft.jsonl",
        "data/more/train_sft-00000-of-00001.parquet",
    ];
    means(&files, ":train_sft", &files[..2]);
    means(&files, ":test_sft", &files[3..4]);
    refuses(&files, ":train", "lacks files of the split train (it holds the splits test_sft, train_gen, train_sft)");
    let all = ["data/more/train_sft-00000-of-00001.parquet", files[3], files[2], files[0], files[1], files[4]];
    means(&files, "", &all);
    refuses(&[files[0], files[2]], ":train_sft", "lacks data/train_sft-00001-of-00002*;");
    refuses(&[files[1], files[2]], "", "lacks data/train_sft-00000-of-00002*;");
    refuses(&["data/x-00000-of-00099.parquet"], ":x", "lacks data/x-00001-of-00099* and 97 more");
    means(&["data/a-00000-of-00001-00000-of-00001.jsonl"], "", &["data/a-00000-of-00001-00000-of-00001.jsonl"]);
}

#[test]
fn a_folder_called_after_a_split_says_it() {
    let files = ["train/a.jsonl", "my_train-2/b.json.zst", "x/testing.1/c.parquet", "validation.jsonl", "x/strain/d.jsonl"];
    means(&files, ":train", &["my_train-2/b.json.zst", "train/a.jsonl"]);
    means(&files, ":test", &["x/testing.1/c.parquet"]);
    // As folders speak, the file's name does not count.
    refuses(&files, ":validation", "(it holds the splits train, test)");
    means(&["train_sft/a.jsonl", "test_sft/b.jsonl"], ":train_sft", &["train_sft/a.jsonl"]);
}

#[test]
fn a_file_called_after_a_split_says_it_where_no_folder_does() {
    let files = ["train.jsonl", "data/part-train-2.jsonl", "dev.jsonl", "eval_1.jsonl", "x/retrain.jsonl", "trains.jsonl"];
    means(&files, ":train", &["data/part-train-2.jsonl", "train.jsonl"]);
    means(&files, ":validation", &["dev.jsonl"]);
    means(&files, ":test", &["eval_1.jsonl"]);
    refuses(&files, ":holdout", "(it holds the splits train, validation, test)");
    means(&["train_sft.jsonl", "train_gen.jsonl"], ":train_gen", &["train_gen.jsonl"]);
}

#[test]
fn else_everything_is_train() {
    let files = [
        "a.jsonl",
        "b/c.parquet",
        ".hidden.jsonl",
        ".git/d.jsonl",
        "__x/e.jsonl",
        "README.md",
        "dataset_infos.json",
        "b/config.json",
    ];
    means(&files, ":train", &files[..2]);
    means(&files, "", &files[..2]);
    refuses(&files, ":test", "lacks files of the split test (it holds the splits train)");
    refuses(&["README.md"], "", "lacks chats (it holds no file of chats)");
    refuses(&["README.md"], ":train", "lacks files of the split train (it holds no file of chats)");
}

#[test]
fn a_list_of_the_commit_tells_what_is_missing() {
    let cache = cache(&["data/one.jsonl"]);
    let tree = cache.path(REPOSITORY).join(format!("trees/{COMMIT}.json"));
    fs::create_dir_all(tree.parent().unwrap()).unwrap();
    let list = |version: u32, files: &[&str]| {
        let entry = |file: &&str| format!("{file:?}:{{\"size\":2,\"blob_id\":\"x\",\"xet_hash\":\"y\"}}");
        let files = files.iter().map(entry).collect::<Vec<_>>().join(",");
        fs::write(&tree, format!("{{\"format_version\":{version},\"files\":{{{files}}}}}")).unwrap();
    };
    list(1, &["data/one.jsonl", "README.md"]);
    assert_eq!(cache.files("Org/Chats"), Ok(vec!["data/one.jsonl".into()]));
    list(1, &["data/one.jsonl", "data/two.jsonl"]);
    let sentence = cache.files("Org/Chats").unwrap_err();
    assert!(sentence.contains(&format!("snapshots/{COMMIT} lacks data/two.jsonl;")), "{sentence}");
    // Another form, or none, is no list.
    list(2, &["data/one.jsonl", "data/two.jsonl"]);
    assert_eq!(cache.files("Org/Chats"), Ok(vec!["data/one.jsonl".into()]));
    fs::write(&tree, "[").unwrap();
    assert_eq!(cache.files("Org/Chats"), Ok(vec!["data/one.jsonl".into()]));
    // A list cannot lead out either: what climbs is hidden, and what is not in the snapshot is missing.
    fs::write(cache.path("secret.jsonl"), "{}").unwrap();
    list(1, &["../../../../secret.jsonl"]);
    assert_eq!(cache.files("Org/Chats"), Err("Org/Chats: expected files of chats, found no file of chats".into()));
    list(1, &["/secret.jsonl"]);
    assert!(cache.files("Org/Chats").unwrap_err().contains(" lacks /secret.jsonl;"));
}
