//! Tokenizers and templates made to hurt: each gets one sentence, within a second or two, and no panic reaches the caller.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use potstill_cache::ErrorClass;
use potstill_pipeline::data::{BadRoles, ChatTokenizer, DataError, DataOptions, Message, Prompt, Role, Truncation, load};
use potstill_pipeline::run::RunContext;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Well above what a hostile file may take here (the slowest takes half a second), well below what it would take unbounded.
const PATIENCE: Duration = Duration::from_secs(10);

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/golden").join(name)
}

fn document() -> Value {
    serde_json::from_slice(&std::fs::read(golden("teacher-awq/tokenizer.json")).unwrap()).unwrap()
}

/// Loads a folder with this `tokenizer.json`; the folder is cut out of the message.
fn tokenizer_of(text: &str) -> Result<ChatTokenizer, String> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), text).unwrap();
    ChatTokenizer::tokenizer_only(folder.path()).map_err(|e| {
        assert_eq!(e.class(), ErrorClass::Runtime);
        e.to_string().replace(&format!("{}/", folder.path().display()), "")
    })
}

fn tokenizer_refusal(change: impl FnOnce(&mut Value)) -> String {
    let mut document = document();
    change(&mut document);
    tokenizer_of(&document.to_string()).map(|_| "loaded".to_string()).unwrap_or_else(|e| e)
}

#[test]
fn hostile_tokenizers_are_refused_with_the_entry() {
    let merge = |merge: Value| move |d: &mut Value| d["model"]["merges"].as_array_mut().unwrap().push(merge);
    let long = "Ġ".repeat(5000);
    let only = "expected only tokens of the vocabulary in model.merges[1789], found";
    assert_eq!(tokenizer_refusal(merge(json!([long, "a"]))), format!("tokenizer.json: {only} \"{}…\"", "Ġ".repeat(60)));
    assert_eq!(tokenizer_refusal(merge(json!("q qqq"))), format!("tokenizer.json: {only} \"qqq\""));
    assert_eq!(tokenizer_refusal(merge(json!(["q", "x"]))), format!("tokenizer.json: {only} \"qx\""));
    let parts = "tokenizer.json: expected two parts in model.merges[1789], found";
    assert_eq!(tokenizer_refusal(merge(json!("a b c"))), format!("{parts} \"a b c\""));
    assert_eq!(tokenizer_refusal(merge(json!(7))), format!("{parts} 7"));
    assert_eq!(
        tokenizer_refusal(|d| d["model"]["continuing_subword_prefix"] = "#".repeat(100).into()),
        format!("tokenizer.json: expected a second part with the prefix {:?} in model.merges[0], found \"Ġ\"", "#".repeat(100))
    );
    assert_eq!(
        tokenizer_refusal(|d| d["pre_tokenizer"] = json!({"type": "FixedLength", "length": 0})),
        "tokenizer.json: expected pre_tokenizer of a type among Sequence, Split, ByteLevel, Digits, Metaspace, Whitespace, \
         WhitespaceSplit, Punctuation, CharDelimiterSplit, BertPreTokenizer, UnicodeScripts, found \"FixedLength\""
    );
    assert_eq!(
        tokenizer_refusal(|d| d["normalizer"] = json!({"type": "Sequence", "normalizers": [{"type": "Precompiled"}]})),
        "tokenizer.json: expected normalizer of a type among Sequence, NFC, NFD, NFKC, NFKD, Lowercase, Replace, Prepend, Strip, \
         StripAccents, BertNormalizer, ByteLevel, Nmt, found \"Precompiled\""
    );
    assert_eq!(
        tokenizer_refusal(|d| d["decoder"] = json!([])),
        "tokenizer.json: expected an object or null under decoder, found another kind of value"
    );
    assert_eq!(
        tokenizer_refusal(|d| d["model"]["type"] = "Unigram".into()),
        "tokenizer.json: expected a model of a type among BPE, WordLevel, found \"Unigram\""
    );
}

#[test]
fn ids_that_cannot_be_are_refused() {
    let vocab = |id: Value| tokenizer_refusal(|d| d["model"]["vocab"]["zzz"] = id);
    assert_eq!(vocab(json!(16_777_216)), "tokenizer.json: expected an id below 16777216 for the token \"zzz\", found 16777216");
    assert_eq!(vocab(json!(-1)), "tokenizer.json: expected an id below 16777216 for the token \"zzz\", found -1");
    assert_eq!(vocab(json!(2.5)), "tokenizer.json: expected an id below 16777216 for the token \"zzz\", found 2.5");
    assert_eq!(vocab(json!(5)), "tokenizer.json: expected one token for id 5, found \"&\" and \"zzz\"");
    let added = |token: Value| tokenizer_refusal(|d| d["added_tokens"].as_array_mut().unwrap().push(token));
    let token = |id: u64, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    assert_eq!(
        added(token(1 << 40, "<x>")),
        "tokenizer.json: expected an id below 16777216 for the token \"<x>\", found 1099511627776"
    );
    assert_eq!(added(token(2047, "<x>")), "tokenizer.json: expected one token for id 2047, found \"<|im_end|>\" and \"<x>\"");
    assert_eq!(
        added(token(3000, "<x>")),
        "tokenizer.json: expected id 3000 for the added token \"<x>\", found id 2048 when loaded"
    );
    assert_eq!(added(token(2048, "<|im_end|>")), "tokenizer.json: expected every added token once, found \"<|im_end|>\" twice");
    assert_eq!(added(token(2048, "")), "tokenizer.json: expected a text in added_tokens[3].content, found none");
    assert_eq!(added(token(2048, "<x>")), "loaded");
}

#[test]
fn files_that_are_no_tokenizer_are_refused() {
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let cases = [
        (deep.as_str(), "tokenizer.json: expected JSON, found recursion limit exceeded at line 1 column 128"),
        ("", "tokenizer.json: expected JSON, found EOF while parsing a value at line 1 column 0"),
        ("[]", "tokenizer.json: expected a JSON object, found another kind of value"),
        ("{}", "tokenizer.json: expected an object model, found none"),
    ];
    for (text, expected) in cases {
        assert_eq!(tokenizer_of(text).unwrap_err(), expected);
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    std::fs::File::create(&path).unwrap().set_len((64 << 20) + 1).unwrap();
    let error = ChatTokenizer::tokenizer_only(folder.path()).unwrap_err();
    assert_eq!(error.to_string(), format!("{}: expected at most 67108864 bytes, found 67108865", path.display()));
    std::fs::remove_file(&path).unwrap();
    let error = ChatTokenizer::tokenizer_only(folder.path()).unwrap_err();
    assert!(error.to_string().starts_with(&format!("{}: ", path.display())), "{error}");
}

/// Padding to 9,999,999,999 tokens would abort the process, a stride beyond the length would panic; neither is ever loaded.
#[test]
fn padding_truncation_dropout_and_post_processor_are_not_used() {
    let plain = tokenizer_of(&document().to_string()).unwrap();
    let mut document = document();
    document["padding"] = json!({"strategy": {"Fixed": 9_999_999_999u64}, "direction": "Right", "pad_id": 0, "pad_type_id": 0,
        "pad_token": "!", "pad_to_multiple_of": null});
    document["truncation"] = json!({"max_length": 2, "stride": 5, "strategy": "LongestFirst", "direction": "Right"});
    document["model"]["dropout"] = json!(0.9);
    document["post_processor"] = json!({"type": "TemplateProcessing", "single": "nonsense"});
    let changed = tokenizer_of(&document.to_string()).unwrap();
    assert_eq!(plain.tokenizer_fingerprint().vocabulary_blake3, changed.tokenizer_fingerprint().vocabulary_blake3);
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    let text = "Hello there, how are you? 你好";
    let encode = |document: &Value| {
        let folder = folder(template, &document.to_string(), "{}");
        ChatTokenizer::from_folder(folder.path()).unwrap().encode(0, &hello(text)).unwrap()
    };
    let example = encode(&document);
    assert_eq!(example, encode(&self::document()));
    assert_eq!(changed.decode(&example.input_ids), text);
    assert!(example.scored.iter().all(|&scored| scored));
}

fn folder(template: &str, tokenizer: &str, config: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), tokenizer).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    if !template.is_empty() {
        std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    }
    folder
}

fn hello(content: &str) -> Vec<Message> {
    vec![Message { role: Role::Assistant, content: content.into() }]
}

/// Loads the template and renders with it on a worker's small stack, as loading a dataset does.
fn render(template: &str) -> Result<String, String> {
    let folder =
        folder(template, &document().to_string(), r#"{"bos_token": {"content": "<b>"}, "eos_token": "<e>", "pad_token": null}"#);
    let start = Instant::now();
    let result = rayon::scope(|_| {
        let tokenizer = ChatTokenizer::from_folder(folder.path())?;
        tokenizer.render(&hello("Hi"), Prompt::None)
    });
    assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    result.map_err(|e: DataError| {
        assert_eq!(e.class(), ErrorClass::Runtime);
        e.to_string()
    })
}

#[test]
fn hostile_templates_are_stopped() {
    let loops = "{% for a in range(99999) %}".repeat(4) + &"{% endfor %}".repeat(4);
    let doubling = "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}";
    let recursion = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
    let big = "{% set s = 'x' * 65536 %}{% for i in range(99999) %}{{ s }}{% endfor %}";
    let steps = "chat template chat_template.jinja: expected at most 1000000 steps, found more (an endless or very long loop)";
    let output = "chat template chat_template.jinja: expected at most 33554432 bytes of text, found more";
    assert_eq!(render(&loops).unwrap_err(), steps);
    assert_eq!(render(doubling).unwrap_err(), steps);
    assert_eq!(render(big).unwrap_err(), output);
    // The limit is where it is said to be: a loop of 2,250,000 turns is stopped, one of 10,000 turns is not.
    let counted = |n: u32| render(&format!("{{% for a in range({n}) %}}{{% for b in range({n}) %}}{{% endfor %}}{{% endfor %}}"));
    assert_eq!(counted(1500).unwrap_err(), steps);
    assert_eq!(counted(100).unwrap(), "");
    let hostile = [
        recursion.to_string(),
        "{{ range(999999999) | list }}".to_string(),
        "{{ 'x' * 99999999999 }}".to_string(),
        "{{ [0] * 99999999999 }}".to_string(),
        "{{ '%999999999999d' | format(1) }}".to_string(),
        "{{ 'x' | indent(99999999999) }}".to_string(),
        "{{ 2 ** 99999999 ** 99999999 }}".to_string(),
        format!("{}1{}", "{{ (".to_string() + &"(".repeat(100_000), ")".repeat(100_001) + " }}"),
        "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}".to_string(),
        "{% include 'chat_template.jinja' %}".to_string(),
        "{% extends 'chat_template.jinja' %}".to_string(),
        "{% include '/etc/passwd' %}".to_string(),
        "{% if".to_string(),
    ];
    for template in hostile {
        let error = render(&template).map(|text| text.len()).unwrap_err();
        assert!(error.starts_with("chat template chat_template.jinja: "), "{error}");
        assert!(error.len() < 400, "{error}");
    }
}

#[test]
fn a_template_says_what_it_misses() {
    let name = "chat template chat_template.jinja";
    assert_eq!(render("a\n{{ nothing }}").unwrap_err(), format!("{name}: line 2: undefined value"));
    assert_eq!(
        render("{{ strftime_now('%Y') }}").unwrap_err(),
        format!("{name}: line 1: unknown function: strftime_now is unknown")
    );
    assert_eq!(
        render("{{ raise_exception('No ' + 'tools!') }}").unwrap_err(),
        format!("{name} refuses the conversation: No tools!")
    );
    let long = "x".repeat((256 << 10) + 1);
    assert!(render(&long).unwrap_err().ends_with("chat_template.jinja: expected at most 262144 bytes, found 262145"));
}

#[test]
fn a_template_has_what_transformers_gives_it() {
    assert_eq!(render("{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}").unwrap(), "<b><e>");
    assert_eq!(
        render("{{ tools is none }}{{ documents is none }}{% if x %}{% endif %}{{ x is defined }}").unwrap(),
        "TrueTrueFalse"
    );
    assert_eq!(
        render("{{ messages[-1]['role'] }} {{ messages[0].content.upper() }}{{ not messages[0].tool_calls }}").unwrap(),
        "assistant HITrue"
    );
    assert_eq!(render("<{{ 'a&b' }}>\r\n  {% if true %}\r\nx\r\n  {% endif %}\r\ny\n").unwrap(), "<a&b>\nx\ny");
    assert_eq!(render("a\n\n").unwrap(), "a\n");
}

#[test]
fn templates_come_from_a_file_or_from_the_config_and_are_missed_when_absent() {
    let tokenizer = document().to_string();
    let load = |template: &str, config: Value| {
        let folder = folder(template, &tokenizer, &config.to_string());
        let result = ChatTokenizer::from_folder(folder.path());
        let text = result.and_then(|t| Ok((t.render(&hello("Hi"), Prompt::None)?, t.template_fingerprint().cloned().unwrap())));
        text.map(|(text, print)| (text, print.source, print.blake3))
            .map_err(|e| e.to_string().replace(&folder.path().display().to_string(), "F"))
    };
    let hash = |text: &str| blake3::hash(text.as_bytes()).to_hex().to_string();
    let config = json!({"chat_template": "config"});
    assert_eq!(load("file", config.clone()), Ok(("file".into(), "chat_template.jinja".into(), hash("file"))));
    assert_eq!(load("", config), Ok(("config".into(), "tokenizer_config.json".into(), hash("config"))));
    let named = json!({"chat_template": [{"name": "rag", "template": "rag"}, {"name": "default", "template": "named"}]});
    assert_eq!(load("", named), Ok(("named".into(), "tokenizer_config.json (default)".into(), hash("named"))));
    let missing =
        "F: expected a chat template in chat_template.jinja or under chat_template in tokenizer_config.json, found none";
    assert_eq!(load("", json!({})), Err(missing.to_string()));
    let nameless = json!({"chat_template": [{"name": "rag", "template": "rag"}]});
    assert_eq!(
        load("", nameless),
        Err("F/tokenizer_config.json: expected a template named default under chat_template, found none".into())
    );
    assert_eq!(load("", json!([])).unwrap_err(), missing);
    let plain = folder("", &tokenizer, "{}");
    let error = ChatTokenizer::tokenizer_only(plain.path()).unwrap().encode(0, &hello("Hi")).unwrap_err();
    assert_eq!(error.to_string().replace(&plain.path().display().to_string(), "F"), missing);
}

/// A template's own refusal is about one conversation: that row is skipped, or named, as for roles. Other failures stop.
#[test]
fn a_conversation_the_template_refuses_is_skipped_or_named() {
    let template = "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('not that') }}{% endif %}{{ m.content }}{% endfor %}";
    let folder = folder(template, &document().to_string(), "{}");
    let tokenizer = ChatTokenizer::from_folder(folder.path()).unwrap();
    let row = |content: &str| format!("{{\"messages\":[{{\"role\":\"assistant\",\"content\":\"{content}\"}}]}}\n");
    let path = folder.path().join("x.jsonl");
    std::fs::write(&path, row("fine and long") + &row("bad")).unwrap();
    let run = |on_bad_roles| {
        let options = DataOptions { max_length: 64, truncation: Truncation::Right, on_bad_roles };
        load(std::slice::from_ref(&path), &tokenizer, &options, &RunContext::default())
    };
    let dataset = run(BadRoles::Skip).unwrap();
    assert_eq!(dataset.examples.len(), 1);
    assert_eq!(dataset.fingerprint.skipped["refused by the template"], 1);
    let error = run(BadRoles::Error).unwrap_err().to_string();
    assert_eq!(error, format!("{}:2: chat template chat_template.jinja refuses the conversation: not that", path.display()));
}
