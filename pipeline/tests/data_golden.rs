//! Chats against the reference data of transformers: text, ids and mask are equal, not close. No tolerance anywhere.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use potstill_pipeline::data::{BadRoles, ChatTokenizer, DataOptions, Dataset, Example, Message, Prompt, Role, Truncation, load};
use potstill_pipeline::run::RunContext;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden").join(name)
}

fn lines(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(golden(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn tokenizer() -> ChatTokenizer {
    ChatTokenizer::from_folder(&golden("teacher-awq")).unwrap()
}

fn options(max_length: u32, truncation: Truncation) -> DataOptions {
    DataOptions { max_length, truncation, on_bad_roles: BadRoles::Skip }
}

fn load_golden(name: &str, options: &DataOptions) -> Dataset {
    load(&[golden(name)], &tokenizer(), options, &RunContext::default()).unwrap()
}

fn messages(row: &Value) -> Vec<Message> {
    serde_json::from_value(row["messages"].clone()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn mask(value: &Value) -> Vec<bool> {
    value.as_array().unwrap().iter().map(|flag| flag == 1).collect()
}

#[test]
fn every_row_has_the_reference_text_ids_and_mask() {
    let tokenizer = tokenizer();
    let rows = lines("expected/chat_template.jsonl");
    assert_eq!(rows.len(), 58);
    for row in &rows {
        let name = format!("{} {}", row["source"], row["index"]);
        let messages = messages(row);
        assert_eq!(row["text"], tokenizer.render(&messages, Prompt::None).unwrap(), "{name}");
        let example = tokenizer.encode(7, &messages).unwrap();
        assert_eq!(example.seq_id, 7);
        assert_eq!(example.input_ids, ids(&row["input_ids"]), "{name}");
        assert_eq!(example.input_ids.len() as u64, row["n_tokens"], "{name}");
        assert_eq!(example.scored, mask(&row["assistant_mask"]), "{name}");
    }
}

#[test]
fn the_prompt_ends_with_the_assistants_header() {
    let tokenizer = tokenizer();
    for row in lines("expected/chat_template.jsonl") {
        let messages = messages(&row);
        let last_user = messages.iter().rposition(|message| message.role == Role::User).unwrap();
        let prompt = &messages[..=last_user];
        assert_eq!(row["prompt_text"], tokenizer.render(prompt, Prompt::Generation).unwrap());
        assert_eq!(tokenizer.encode_prompt(prompt).unwrap(), ids(&row["prompt_ids"]), "{} {}", row["source"], row["index"]);
    }
}

/// Rows from their own files, in their own schemas, become the reference's tokens. The limit is beyond every length.
#[test]
fn each_schema_and_container_gives_the_reference_rows() {
    let expected = lines("expected/chat_template.jsonl");
    let sources =
        [("chats.jsonl", "chats"), ("chats.parquet", "chats"), ("firefly.jsonl", "firefly"), ("sharegpt.jsonl", "sharegpt")];
    for (file, source) in sources {
        let dataset = load_golden(file, &options(2048, Truncation::Turns));
        let wanted: Vec<Example> = expected
            .iter()
            .filter(|row| row["source"] == source)
            .map(|row| Example {
                seq_id: row["index"].as_u64().unwrap(),
                input_ids: ids(&row["input_ids"]),
                scored: mask(&row["assistant_mask"]),
            })
            .collect();
        assert_eq!(dataset.examples, wanted, "{file}");
        assert_eq!(dataset.fingerprint.rows, wanted.len() as u64);
        assert_eq!(dataset.fingerprint.skipped, BTreeMap::new());
        assert_eq!((dataset.truncated_tokens, dataset.truncated_rows), (0, 0));
        let data_file = &dataset.fingerprint.files[0];
        let bytes = std::fs::read(golden(file)).unwrap();
        assert_eq!((data_file.name.as_str(), data_file.bytes), (file, bytes.len() as u64));
        assert_eq!(data_file.blake3, blake3::hash(&bytes).to_hex().to_string());
    }
}

#[test]
fn cut_on_the_right_a_row_is_its_first_tokens() {
    let dataset = load_golden("chats.jsonl", &options(256, Truncation::Right));
    let expected: Vec<Value> = lines("expected/chat_template.jsonl").into_iter().filter(|row| row["source"] == "chats").collect();
    let (mut kept, mut cut_tokens, mut cut_rows) = (dataset.examples.iter(), 0, 0);
    for row in &expected {
        let index = row["index"].as_u64().unwrap();
        if index == 20 {
            continue; // its first 256 tokens are all the user's
        }
        let (ids, mask) = (ids(&row["input_ids"]), mask(&row["assistant_mask"]));
        let example = kept.next().unwrap();
        let length = ids.len().min(256);
        assert_eq!(example.seq_id, index);
        assert_eq!((&example.input_ids[..], &example.scored[..]), (&ids[..length], &mask[..length]));
        cut_tokens += (ids.len() - length) as u64;
        cut_rows += u64::from(ids.len() > length);
    }
    assert_eq!(kept.next(), None);
    assert_eq!((dataset.truncated_tokens, dataset.truncated_rows), (cut_tokens, cut_rows));
    assert_eq!(dataset.fingerprint.skipped, BTreeMap::from([("nothing left after truncation".to_string(), 1)]));
    assert!(dataset.first_skipped["nothing left after truncation"].ends_with("chats.jsonl:21"), "{:?}", dataset.first_skipped);
    let lengths: Vec<usize> =
        dataset.examples.iter().filter(|e| [38, 39].contains(&e.seq_id)).map(|e| e.input_ids.len()).collect();
    assert_eq!(lengths, [256, 256]); // of 256 and 257
}

/// For every multi-turn row and every limit, against the definition itself: the longest prefix that ends with an assistant
/// message and fits; none fits: the first tokens of the whole.
#[test]
fn cut_by_turns_a_row_is_its_longest_fitting_beginning() {
    let tokenizer = tokenizer();
    let mut by_turns = 0;
    for limit in [60, 90, 100, 120, 150, 256, 700] {
        let loaded = load_golden("chats.jsonl", &options(limit, Truncation::Turns));
        let mut cut_tokens = 0;
        for row in lines("expected/chat_template.jsonl").iter().filter(|row| row["source"] == "chats") {
            let messages = messages(row);
            let whole = tokenizer.encode(0, &messages).unwrap();
            let limit = limit as usize;
            let ends = (1..=messages.len()).rev().filter(|&n| n == messages.len() || messages[n - 1].role == Role::Assistant);
            let fitting = ends.map(|n| tokenizer.encode(0, &messages[..n]).unwrap()).find(|e| e.input_ids.len() <= limit);
            by_turns += usize::from(fitting.as_ref().is_some_and(|e| e.input_ids.len() < whole.input_ids.len()));
            let expected = fitting.unwrap_or_else(|| Example {
                seq_id: 0,
                input_ids: whole.input_ids[..limit].to_vec(),
                scored: whole.scored[..limit].to_vec(),
            });
            let found = loaded.examples.iter().find(|e| row["index"] == e.seq_id);
            if let Some(found) = found {
                assert_eq!(
                    (&found.input_ids, &found.scored),
                    (&expected.input_ids, &expected.scored),
                    "{} {limit}",
                    row["index"]
                );
                cut_tokens += (whole.input_ids.len() - expected.input_ids.len()) as u64;
            } else {
                // Skipped: nothing scored is left, or the cut rows have become equal.
                let twin = loaded.examples.iter().any(|e| e.input_ids == expected.input_ids);
                assert!(twin || !expected.scored[1..].contains(&true), "{} {limit}", row["index"]);
            }
        }
        assert_eq!(loaded.truncated_tokens, cut_tokens, "{limit}");
    }
    assert!(by_turns > 20, "{by_turns} rows were cut by turns: too few to show anything");
}

#[test]
fn other_templates_give_the_reference_text() {
    let chats = lines("chats.jsonl");
    let rows = lines("expected/chat_template_alt.jsonl");
    let mut tokenizers: BTreeMap<String, (tempfile::TempDir, ChatTokenizer)> = BTreeMap::new();
    for row in &rows {
        let template = row["template"].as_str().unwrap().to_string();
        let (_, tokenizer) = tokenizers.entry(template.clone()).or_insert_with(|| {
            let folder = tempfile::tempdir().unwrap();
            for file in ["tokenizer.json", "tokenizer_config.json"] {
                std::fs::copy(golden("teacher-awq").join(file), folder.path().join(file)).unwrap();
            }
            let source = golden("expected/templates").join(format!("{template}.jinja"));
            std::fs::copy(source, folder.path().join("chat_template.jinja")).unwrap();
            let tokenizer = ChatTokenizer::from_folder(folder.path()).unwrap();
            (folder, tokenizer)
        });
        let messages = messages(&chats[row["index"].as_u64().unwrap() as usize]);
        let prompt = if row["add_generation_prompt"] == true { Prompt::Generation } else { Prompt::None };
        assert_eq!(row["text"], tokenizer.render(&messages, prompt).unwrap(), "{template} {}", row["index"]);
    }
    let names: Vec<&str> = tokenizers.keys().map(String::as_str).collect();
    assert_eq!(names, ["multiline", "qwen1_5", "qwen1_5_early", "trim_blocks"]);
}

/// What the assistant says is found under templates that mark it, trim it, or leave out the last end marker.
#[test]
fn other_templates_give_the_right_mask() {
    let expected = lines("expected/chat_template.jsonl");
    for template in ["with_generation", "multiline", "qwen1_5", "trim_blocks", "qwen1_5_early"] {
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(golden("teacher-awq/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
        let source = golden("expected/templates").join(format!("{template}.jinja"));
        std::fs::copy(source, folder.path().join("chat_template.jinja")).unwrap();
        let tokenizer = ChatTokenizer::from_folder(folder.path()).unwrap();
        for row in expected.iter().filter(|row| row["source"] == "chats") {
            let messages = messages(row);
            let example = tokenizer.encode(0, &messages).unwrap();
            let scored: Vec<u32> =
                example.input_ids.iter().zip(&example.scored).filter(|(_, s)| **s).map(|(id, _)| *id).collect();
            let wanted: Vec<u32> = ids(&row["input_ids"])
                .into_iter()
                .zip(mask(&row["assistant_mask"]))
                .filter(|(_, s)| *s)
                .map(|(id, _)| id)
                .collect();
            let last_is_assistant = messages.last().unwrap().role == Role::Assistant;
            let name = format!("{template} {}", row["index"]);
            match template {
                "qwen1_5_early" if last_is_assistant => assert_eq!(scored, wanted[..wanted.len() - 1], "{name}"),
                // It trims, so the tokens at a content's edges differ where the content has whitespace there.
                "trim_blocks" if messages.iter().any(|m| m.role == Role::Assistant && m.content.trim() != m.content) => {
                    let text = tokenizer.decode(&scored);
                    let spoken = messages.iter().filter(|m| m.role == Role::Assistant);
                    let said: String = spoken.map(|m| format!("{}<|im_end|>", m.content.trim())).collect();
                    assert_eq!(text, said, "{name}");
                }
                _ => assert_eq!(scored, wanted, "{name}"),
            }
        }
    }
}

#[test]
fn tokens_are_shown_as_text_and_partial_characters_as_bytes() {
    let tokenizer = tokenizer();
    assert_eq!(tokenizer.token_text(2046), "<|im_start|>");
    assert_eq!(tokenizer.token_text(2048), "<id 2048>");
    assert_eq!(tokenizer.decode(&[2047, 9999]), "<|im_end|><id 9999>");
    let mut bytes_seen = false;
    for row in lines("expected/chat_template.jsonl").iter().filter(|row| row["tag"] != "nfd") {
        let ids = ids(&row["input_ids"]);
        assert_eq!(row["text"], tokenizer.decode(&ids));
        let pieces: Vec<String> = ids.iter().map(|&id| tokenizer.token_text(id)).collect();
        let partial = pieces.iter().any(|piece| piece.contains("<0x"));
        bytes_seen |= partial;
        if !partial {
            assert_eq!(row["text"], pieces.concat());
        }
    }
    assert!(bytes_seen);
}

#[test]
fn teacher_and_student_share_a_tokenizer_and_spelling_does_not_matter() {
    let teacher = tokenizer();
    let student = ChatTokenizer::tokenizer_only(&golden("student")).unwrap();
    let fingerprint = teacher.tokenizer_fingerprint();
    assert_eq!(fingerprint, student.tokenizer_fingerprint());
    assert_eq!(fingerprint.size, 2048);
    assert_eq!(student.template_fingerprint(), None);
    assert_eq!(teacher.template_fingerprint().unwrap().source, "tokenizer_config.json");

    let text = std::fs::read_to_string(golden("student/tokenizer.json")).unwrap();
    let fingerprint_of = |change: &dyn Fn(&mut Value)| {
        let mut document: Value = serde_json::from_str(&text).unwrap();
        change(&mut document);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), document.to_string()).unwrap();
        ChatTokenizer::tokenizer_only(folder.path()).unwrap().tokenizer_fingerprint().clone()
    };
    let same = fingerprint_of(&|document| {
        document["padding"] = serde_json::json!({"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 0});
        document["truncation"] = serde_json::json!({"max_length": 1, "stride": 5});
        let merges = document["model"]["merges"].as_array_mut().unwrap();
        for merge in merges.iter_mut() {
            *merge = merge.as_str().unwrap().split(' ').map(Value::from).collect();
        }
        let root = document.as_object_mut().unwrap();
        let model = root.shift_remove("model").unwrap();
        root.shift_insert(0, "model".into(), model); // another order of keys
    });
    assert_eq!(&same, fingerprint);
    let fewer_merges = fingerprint_of(&|document| {
        document["model"]["merges"].as_array_mut().unwrap().pop();
    });
    assert_eq!(fewer_merges.vocabulary_blake3, fingerprint.vocabulary_blake3);
    assert_ne!(fewer_merges.blake3, fingerprint.blake3);
    let not_special = fingerprint_of(&|document| document["added_tokens"][1]["special"] = false.into());
    assert_ne!(not_special.vocabulary_blake3, fingerprint.vocabulary_blake3);
}
