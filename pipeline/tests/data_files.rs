//! Files, folders, globs and rows as people have them, good and bad: the bad ones with the exact sentence they get.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use potstill_cache::ErrorClass;
use potstill_pipeline::data::{BadRoles, ChatTokenizer, DataError, DataOptions, Dataset, Truncation, load};
use potstill_pipeline::run::RunContext;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden").join(name)
}

fn tokenizer() -> &'static ChatTokenizer {
    static TOKENIZER: OnceLock<ChatTokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| ChatTokenizer::from_folder(&golden("teacher-awq")).unwrap())
}

fn read(paths: &[PathBuf], on_bad_roles: BadRoles) -> Result<Dataset, DataError> {
    let options = DataOptions { max_length: 1024, truncation: Truncation::Turns, on_bad_roles };
    load(paths, tokenizer(), &options, &RunContext::default())
}

/// A file of these bytes, read; its folder is cut out of messages.
fn read_bytes(name: &str, bytes: &[u8], on_bad_roles: BadRoles) -> Result<Dataset, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    read(&[path], on_bad_roles).map_err(|e| {
        assert_eq!(e.class(), ErrorClass::Runtime);
        e.to_string().replace(&format!("{}/", folder.path().display()), "")
    })
}

fn refusal(name: &str, bytes: impl AsRef<[u8]>) -> String {
    read_bytes(name, bytes.as_ref(), BadRoles::Skip).unwrap_err()
}

fn texts(dataset: &Dataset) -> Vec<String> {
    dataset.examples.iter().map(|e| tokenizer().decode(&e.input_ids)).collect()
}

fn chat(turns: &[(&str, &str)]) -> String {
    let turns = turns.iter().map(|(role, content)| format!("<|im_start|>{role}\n{content}<|im_end|>\n"));
    turns.collect()
}

const GOOD: &str = r#"{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Ho"}]}"#;

fn gzip(text: impl AsRef<[u8]>) -> Vec<u8> {
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    packer.write_all(text.as_ref()).unwrap();
    packer.finish().unwrap()
}

#[test]
fn packed_folder_glob_list_and_several_files_give_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    let lines = std::fs::read_to_string(golden("chats.jsonl")).unwrap();
    let expected = read(&[golden("chats.jsonl")], BadRoles::Skip).unwrap();
    let packed = |text: &str| zstd::encode_all(text.as_bytes(), 3).unwrap();
    let list = format!("\u{feff}\n[\n {} ]\n", lines.trim_end().replace('\n', " ,\n"));
    let windows = format!("\u{feff}{}", lines.replace('\n', "\r\n\r\n"));
    let (first, rest) = lines.split_at(lines.find('\n').unwrap() - 3);
    let files: [(&str, Vec<u8>); 8] = [
        ("a.jsonl.gz", gzip(&lines)),
        ("a.JSON.GZ", gzip(&list)),
        // Members in a row, the border within a line.
        ("b.jsonl.gz", [gzip(first), gzip(rest)].concat()),
        ("a.jsonl.zst", packed(&lines)),
        ("a.json", list.clone().into_bytes()),
        ("a.json.zst", packed(&list)),
        ("b.json", lines.clone().into_bytes()),
        ("w.JSONL", windows.into_bytes()),
    ];
    for (name, bytes) in files {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let found = read(&[path], BadRoles::Skip).unwrap();
        assert_eq!(found.examples, expected.examples, "{name}");
    }

    let (head, tail) = lines.split_at(lines.match_indices('\n').nth(9).unwrap().0 + 1);
    let parts = tempfile::tempdir().unwrap();
    std::fs::write(parts.path().join("part-2.jsonl"), tail).unwrap();
    std::fs::write(parts.path().join("part-1.jsonl.zst"), packed(head)).unwrap();
    std::fs::write(parts.path().join("README.md"), "not data").unwrap();
    std::fs::write(parts.path().join(".hidden.jsonl"), "not data").unwrap();
    std::fs::create_dir(parts.path().join("z.jsonl")).unwrap();
    let one_by_one = [parts.path().join("part-1.jsonl.zst"), parts.path().join("part-2.jsonl")];
    for paths in [vec![parts.path().to_path_buf()], vec![parts.path().join("part-*")], one_by_one.to_vec()] {
        let found = read(&paths, BadRoles::Skip).unwrap();
        assert_eq!(found.examples, expected.examples, "{paths:?}");
        let names: Vec<&str> = found.fingerprint.files.iter().map(|file| file.name.as_str()).collect();
        assert_eq!(names, ["part-1.jsonl.zst", "part-2.jsonl"]);
        assert_eq!(found.fingerprint.rows, 40);
    }
}

#[test]
fn alpaca_rows_by_hand() {
    let rows = r#"{"instruction": "Add.", "input": "1 2", "output": "3"}
{"instruction": "Greet.", "input": "", "output": "Hello", "system": "Be kind.", "history": [["a", "b"], ["c", "d"]]}
{"instruction": "Greet.", "input": null, "output": "Hello", "system": "", "history": null}
"#;
    let dataset = read_bytes("alpaca.jsonl", rows.as_bytes(), BadRoles::Error).unwrap();
    let default = ("system", "You are a helpful assistant.");
    let expected = [
        chat(&[default, ("user", "Add.\n1 2"), ("assistant", "3")]),
        chat(&[
            ("system", "Be kind."),
            ("user", "a"),
            ("assistant", "b"),
            ("user", "c"),
            ("assistant", "d"),
            ("user", "Greet."),
            ("assistant", "Hello"),
        ]),
        chat(&[default, ("user", "Greet."), ("assistant", "Hello")]),
    ];
    assert_eq!(texts(&dataset), expected);
}

#[test]
fn a_system_text_beside_firefly_and_sharegpt_comes_first() {
    let rows = r#"{"system": "S", "conversation": [{"human": "a", "assistant": "b"}]}
{"system": "S", "conversations": [{"from": "user", "value": "c"}, {"from": "assistant", "value": "d"}]}
{"conversations": [{"from": "gpt", "value": "e"}, {"from": "human", "value": "f"}]}
"#;
    let dataset = read_bytes("rows.jsonl", rows.as_bytes(), BadRoles::Error).unwrap();
    let expected = [
        chat(&[("system", "S"), ("user", "a"), ("assistant", "b")]),
        chat(&[("system", "S"), ("user", "c"), ("assistant", "d")]),
        chat(&[("system", "You are a helpful assistant."), ("assistant", "e"), ("user", "f")]),
    ];
    assert_eq!(texts(&dataset), expected);
}

#[test]
fn rows_with_nothing_to_learn_are_skipped_and_counted_with_the_first_place() {
    let message = |role: &str, content: &str| format!(r#"{{"role":"{role}","content":{content}}}"#);
    let row = |messages: &[String]| format!("{{\"messages\":[{}]}}", messages.join(","));
    let (user, assistant) = (message("user", "\"Hi\""), message("assistant", "\"Ho\""));
    let rows = [
        row(&[]),
        GOOD.to_string(),
        row(std::slice::from_ref(&user)),
        row(&[user.clone(), user.clone(), assistant.clone()]),
        row(&[user.clone(), assistant.clone(), message("system", "\"S\"")]),
        row(&[message("tool", "null")]),
        row(&[user.clone(), message("assistant", "null")]),
        row(&[user.clone(), r#"{"role":"assistant","content":"x","tool_calls":[{"id":1}]}"#.to_string()]),
        GOOD.to_string(),
        row(&[message("system", "\"S\""), message("system", "\"S\""), assistant.clone()]),
        row(&[]),
        row(&[user, message("assistant", r#""\u0000""#)]),
    ];
    let dataset = read_bytes("rows.jsonl", rows.join("\n").as_bytes(), BadRoles::Skip).unwrap();
    let expected = [
        ("duplicate of an earlier row", 1, ":9"),
        ("empty text", 1, ":7"),
        ("no assistant message", 1, ":3"),
        ("no messages", 2, ":1"),
        ("roles out of order", 3, ":4"),
        ("tool calls", 1, ":8"),
        ("unknown role", 1, ":6"),
    ];
    let counts: BTreeMap<String, u64> = expected.iter().map(|(reason, n, _)| (reason.to_string(), *n)).collect();
    assert_eq!(dataset.fingerprint.skipped, counts);
    for (reason, _, place) in expected {
        assert!(dataset.first_skipped[reason].ends_with(&format!("rows.jsonl{place}")), "{reason}");
    }
    assert_eq!(dataset.fingerprint.rows, 12);
    assert_eq!(dataset.examples.iter().map(|e| e.seq_id).collect::<Vec<_>>(), [1, 11]);
    assert!(texts(&dataset)[1].contains("assistant\n\0<|im_end|>"), "a NUL is text like any other");
}

#[test]
fn bad_roles_stop_the_run_when_asked() {
    let refused = |row: &str| read_bytes("x.jsonl", format!("{GOOD}\n{row}\n").as_bytes(), BadRoles::Error).unwrap_err();
    assert_eq!(
        refused(r#"{"messages":[{"role":"user","content":"a"},{"role":"tool","content":"b"}]}"#),
        "x.jsonl:2: expected one of the roles system, user, assistant, found \"tool\" in message 1"
    );
    assert_eq!(
        refused(r#"{"conversations":[{"from":"observation","value":"a"}]}"#),
        "x.jsonl:2: expected one of the roles system, human, user, gpt, assistant, found \"observation\" in message 0"
    );
    assert_eq!(
        refused(r#"{"messages":[{"role":"user","content":"a"},{"role":"user","content":"b"}]}"#),
        "x.jsonl:2: expected an assistant message after a user message, found the role \"user\" in message 1"
    );
    assert_eq!(
        refused(r#"{"messages":[{"role":"system","content":"a"},{"role":"system","content":"b"}]}"#),
        "x.jsonl:2: expected a user message after the system message, found the role \"system\" in message 1"
    );
}

#[test]
fn malformed_text_is_refused_with_its_line() {
    assert_eq!(
        refusal("x.jsonl", [GOOD.as_bytes(), b"\n{\"a\": \"\xff\"}\n"].concat()),
        "x.jsonl:2: expected UTF-8 text, found an invalid byte 0xff at column 8"
    );
    let cases = [
        ("{\"a\": }", "x.jsonl:3: expected a JSON object, found expected value at column 7"),
        ("{\"a\": 1", "x.jsonl:3: expected a JSON object, found EOF while parsing an object at column 7"),
        ("{} {}", "x.jsonl:3: expected a JSON object, found trailing characters at column 4"),
        (r#"{"a": "\ud800"}"#, "x.jsonl:3: expected a JSON object, found unexpected end of hex escape at column 14"),
    ];
    for (line, expected) in cases {
        assert_eq!(refusal("x.jsonl", format!("{GOOD}\n\n{line}")), expected);
    }
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(refusal("x.jsonl", deep), "x.jsonl:1: expected a JSON object, found recursion limit exceeded at column 128");
    let long = format!("{GOOD}\n{{\"a\": \"{}\"}}", "x".repeat(16 << 20));
    assert_eq!(refusal("x.jsonl", &long), "x.jsonl:2: expected a row of at most 16777216 bytes, found a longer one");
    assert_eq!(refusal("x.json", format!("[{}]", long.replace('\n', ",\n"))), long_row("x.json:2"));
    assert_eq!(refusal("x.jsonl.zst", zstd::encode_all(long.as_bytes(), 1).unwrap()), long_row("x.jsonl.zst:2"));
    assert_eq!(refusal("x.jsonl.gz", gzip(&long)), long_row("x.jsonl.gz:2"));
}

#[test]
fn damaged_gzip_is_refused() {
    let good = gzip(format!("{GOOD}\n"));
    let changed = |at: usize, to: u8| {
        let mut bytes = good.clone();
        bytes[at] = to;
        bytes
    };
    // A name in the header that never ends.
    let endless = [&changed(3, 8)[..10], &[b'x'; 70_000]].concat();
    let cases = [
        (good[..good.len() - 9].to_vec(), "x.jsonl.gz: "),
        (good[..5].to_vec(), "x.jsonl.gz: "),
        (changed(good.len() - 8, !good[good.len() - 8]), "x.jsonl.gz: corrupt gzip stream does not have a matching checksum"),
        ([&good[..], b"more"].concat(), "x.jsonl.gz: "),
        (GOOD.into(), "x.jsonl.gz: invalid gzip header"),
        (endless, "x.jsonl.gz: "),
    ];
    for (i, (bytes, expected)) in cases.into_iter().enumerate() {
        let sentence = refusal("x.jsonl.gz", bytes);
        assert!(sentence.starts_with(expected), "{i}: {sentence}");
    }
    assert!(refusal("x.parquet.gz", &good).contains("expected a file ending in "));
}

fn long_row(place: &str) -> String {
    format!("{place}: expected a row of at most 16777216 bytes, found a longer one")
}

#[test]
fn malformed_lists_are_refused_with_their_line() {
    let cases = [
        (format!("[{GOOD}"), "x.json:1: expected a JSON list of objects, found the end of the file inside the list"),
        (format!("[{GOOD}\n,"), "x.json:2: expected a JSON list of objects, found the end of the file inside the list"),
        (format!("[{GOOD},\n]"), "x.json:2: expected a JSON object, found EOF while parsing a value at column 0"),
        (format!("[{GOOD}]\n]"), "x.json:2: expected a JSON list of objects, found more text after the list"),
        (format!("[{GOOD},\n{{\"a\"\n: ]}}]"), "x.json:3: expected a JSON object, found expected value at column 3"),
        (format!("[{GOOD}\n{GOOD}]"), "x.json:2: expected a JSON object, found trailing characters at column 1"),
        ("\u{feff}[1]".to_string(), "x.json:1: expected a JSON object, found a number"),
    ];
    for (text, expected) in cases {
        assert_eq!(refusal("x.json", &text), expected, "{text}");
    }
    assert_eq!(refusal("x.json", b"\xef\xbb[]"), "x.json:1: expected one JSON object a line, found the byte 0xef at its start");
}

#[test]
fn rows_of_no_known_schema_are_refused_with_what_is_there() {
    let cases = [
        ("[1]", "x.jsonl:1: expected a JSON object, found a list"),
        (
            r#"{"prompt": "a", "text": "b"}"#,
            "x.jsonl:1: expected a row with messages, conversations, conversation, or instruction and output, found the keys prompt, text",
        ),
        ("{}", "x.jsonl:1: expected a row with messages, conversations, conversation, or instruction and output, found no keys"),
        (r#"{"messages": "a"}"#, "x.jsonl:1: expected a list under messages, found a string"),
        (r#"{"messages": [{"role": "user"}]}"#, "x.jsonl:1: expected a string in messages[0].content, found none"),
        (r#"{"messages": [{"role": 1, "content": ""}]}"#, "x.jsonl:1: expected a string in messages[0].role, found a number"),
        (
            r#"{"messages": [{"role": "user", "content": [{"type": "text"}]}]}"#,
            "x.jsonl:1: expected a string in messages[0].content, found a list",
        ),
        (
            r#"{"messages": [{"speaker": "user", "text": ""}]}"#,
            "x.jsonl:1: expected role and content, or from and value, in messages[0], found an object with the keys speaker, text",
        ),
        (
            r#"{"conversation": [{"human": "a"}]}"#,
            "x.jsonl:1: expected strings under human and assistant in conversation[0], found an object with the keys human",
        ),
        (r#"{"instruction": "a", "output": 3}"#, "x.jsonl:1: expected a string under output, found a number"),
        (
            r#"{"instruction": "a", "output": "b", "history": [["a"]]}"#,
            "x.jsonl:1: expected a pair of strings in history[0], found a list",
        ),
    ];
    for (row, expected) in cases {
        assert_eq!(refusal("x.jsonl", row), expected, "{row}");
    }
}

#[test]
fn of_two_wrong_rows_the_earlier_is_reported() {
    let text = format!("{GOOD}\n{{\"a\": 1}}\n{}", "x".repeat((16 << 20) + 1));
    assert!(refusal("x.jsonl", text).starts_with("x.jsonl:2: expected a row with messages"));
}

#[test]
fn paths_that_lead_to_no_data_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path().display().to_string();
    std::fs::write(folder.path().join("notes.txt"), "x").unwrap();
    let supported = ".jsonl, .json (both also with .gz or .zst) or .parquet";
    let cases = [
        ("none.jsonl", format!("{here}/none.jsonl: expected a file, a folder or a glob of chats, found nothing there")),
        ("*.jsonl", format!("{here}/*.jsonl: expected at least one file ending in {supported}, found none")),
        ("", format!("{here}/: expected at least one file ending in {supported}, found none")),
        ("notes.txt", format!("{here}/notes.txt: expected a file ending in {supported}")),
        ("***", format!("{here}/***: expected a glob, found ")),
    ];
    for (name, expected) in cases {
        let error = read(&[folder.path().join(name)], BadRoles::Skip).unwrap_err();
        assert!(error.to_string().starts_with(&expected), "{error}");
        assert_eq!(error.class(), ErrorClass::Runtime);
    }
}

#[test]
fn empty_data_is_refused() {
    for text in ["", "\n \n", "\u{feff}"] {
        assert!(refusal("x.jsonl", text).ends_with("x.jsonl: expected at least one conversation, found no rows"), "{text:?}");
    }
    assert!(refusal("x.json", "[ ]").ends_with("x.json: expected at least one conversation, found no rows"));
    assert!(
        refusal("x.jsonl", "{\"messages\":[]}\n{\"messages\":[]}")
            .ends_with("x.jsonl: expected at least one conversation to learn from, found 2 rows, all skipped (no messages: 2)")
    );
}

#[test]
fn damaged_parquet_is_an_error_and_never_a_panic() {
    let bytes = std::fs::read(golden("chats.parquet")).unwrap();
    assert!(refusal("x.parquet", "PAR1").starts_with("x.parquet: expected readable Parquet, found "));
    assert!(refusal("x.parquet", &bytes[..bytes.len() / 2]).starts_with("x.parquet: expected readable Parquet, found "));
    // One byte in every 97 turned over: an error, or rows that still parse. A damaged text is not detectable in Parquet.
    let mut refused = 0;
    for at in (0..bytes.len()).step_by(97) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0xff;
        refused += usize::from(read_bytes("x.parquet", &damaged, BadRoles::Skip).is_err());
    }
    assert!(refused > 20, "{refused}");
}

#[test]
fn a_stop_is_honoured_and_progress_goes_back_to_nothing() {
    let context = RunContext::default();
    context.stop.store(true, Ordering::Relaxed);
    let options = DataOptions { max_length: 1024, truncation: Truncation::Turns, on_bad_roles: BadRoles::Skip };
    let error = load(&[golden("chats.jsonl")], tokenizer(), &options, &context).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Interrupted);
    assert_eq!(error.to_string(), "stopped by a signal while reading the data; nothing was written; run the same command again");
    assert_eq!(context.progress.snapshot().0.name, "");
}
