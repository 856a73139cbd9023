//! `inspect` (and `diff`) through the binary, on a cache of invented chats that mean no good: all that it prints is held against stored texts in
//! `tests/fixtures/inspect`, and nothing of it acts on a terminal or a page.
//!
//! `POTSTILL_WRITE_SNAPSHOTS=1 cargo test --test inspecting` stores what is printed now; look at the difference before you commit it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use potstill_cache::{
    CacheWriter, Companion, DataFile, DataFingerprint, Description, EncodingFingerprint, Record, Selection, SoftTargets, Target,
    TeacherFingerprint, TemplateFingerprint, TokenizerFingerprint, WriterOptions,
};
use potstill_pipeline::data::{ChatTokenizer, Message};
use serde_json::Value;
use std::path::{Path, PathBuf};
use support::Bench;

const VOCABULARY: u32 = 2048;
const HOSTILE_NAME: &str = "</title><script>hostile()</script>\u{202e}{nonce}";

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn description(rows: u64, selection: Selection) -> Description {
    let digest = |c: char| c.to_string().repeat(64);
    Description {
        teacher: TeacherFingerprint {
            name: HOSTILE_NAME.into(),
            config_blake3: digest('1'),
            weights_blake3: digest('2'),
            weights: "awq-int4".into(),
            compute: "float32".into(),
        },
        tokenizer: TokenizerFingerprint { vocabulary_blake3: digest('3'), blake3: digest('4'), size: VOCABULARY },
        template: TemplateFingerprint { source: "tokenizer_config.json".into(), blake3: digest('5') },
        data: DataFingerprint {
            files: vec![DataFile { name: "hostile.jsonl".into(), bytes: 1, blake3: digest('6') }],
            rows,
            skipped: Default::default(),
        },
        encoding: EncodingFingerprint { max_length: 1024, truncation: "turns".into(), truncated_tokens: 0 },
        selection,
        mantissa_bits: 7,
        values: Default::default(),
        lse_temperatures: Vec::new(),
        zstd_level: 3,
        id_encoding: Default::default(),
        rows_per_shard: 4,
        vocab_size: VOCABULARY,
        expected_rows: rows,
        part: None,
        derived: Vec::new(),
    }
}

/// What the made-up teacher expects before `next`: four tokens of falling probability; `next` is one of them, or none, by turns.
fn push(targets: &mut SoftTargets, selection: Selection, next: u32, turn: usize) {
    let shapes: [&[f32]; 3] =
        [&[0.75, 0.125, 0.0625, 0.03125], &[0.3125, 0.25, 0.15625, 0.125], &[0.984375, 0.0078125, 0.0009765625, 0.0001]];
    let (shape, place) = (shapes[turn % 3], turn * 7 % 5);
    let mut others = (1..).map(|step| (next + 37 * step) % VOCABULARY);
    let ids: Vec<u32> = (0..4).map(|i| if i == place { next } else { others.next().unwrap() }).collect();
    let logprobs: Vec<f32> = shape.iter().map(|p| p.ln()).collect();
    let tail_logprob = (1.0 - shape.iter().sum::<f32>()).ln();
    let mut draws: Vec<(u32, u16)> = vec![(ids[0], 5), (others.next().unwrap(), 3)];
    draws.sort_unstable();
    let (sample_ids, sample_counts): (Vec<u32>, Vec<u16>) = draws.into_iter().unzip();
    match selection {
        Selection::Sampled { .. } => {
            let tail_logprob = 0.25f32.ln();
            targets.push_target(&Target {
                sample_ids: &sample_ids,
                sample_counts: &sample_counts,
                tail_logprob,
                ..Target::default()
            });
        }
        _ => targets.push(&ids, &logprobs, tail_logprob),
    }
}

fn write_cache(folder: &Path, selection: Selection) {
    let tokenizer = ChatTokenizer::from_folder(&fixture("golden/teacher-awq")).unwrap();
    let chats = std::fs::read_to_string(fixture("inspect/hostile.jsonl")).unwrap();
    let mut records = Vec::new();
    for (n, line) in chats.lines().enumerate() {
        let chat: Value = serde_json::from_str(line).unwrap();
        let messages: Vec<Message> = serde_json::from_value(chat["messages"].clone()).unwrap();
        let example = tokenizer.encode(n as u64, &messages).unwrap();
        let mut targets = SoftTargets::default();
        let positions: Vec<u32> = (1..example.input_ids.len()).filter(|&t| example.scored[t]).map(|t| t as u32 - 1).collect();
        for (turn, &position) in positions.iter().enumerate() {
            push(&mut targets, selection, example.input_ids[position as usize + 1], turn + n);
        }
        records.push(Record { seq_id: n as u64, input_ids: example.input_ids, positions, targets, codec: Default::default() });
    }
    let bytes = std::fs::read(fixture("golden/teacher-awq/tokenizer.json")).unwrap();
    let companions = vec![Companion { path: "tokenizer/tokenizer.json".into(), bytes }];
    let mut writer =
        CacheWriter::open(folder, &description(records.len() as u64, selection), WriterOptions { companions }).unwrap();
    records.iter().for_each(|record| writer.append(record).unwrap());
    writer.finish().unwrap();
}

/// A scratch folder with the cache `c`.
fn with_cache(selection: Selection) -> Bench {
    let bench = Bench::new();
    write_cache(&bench.path("c"), selection);
    bench
}

/// Holds `found` against the stored text.
fn hold(name: &str, found: &str) {
    let path = fixture("inspect").join(name);
    if std::env::var_os("POTSTILL_WRITE_SNAPSHOTS").is_some() {
        std::fs::write(&path, found).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = expected.lines().zip(found.lines()).position(|(a, b)| a != b);
    let line = differs.unwrap_or(expected.lines().count().min(found.lines().count()));
    let at = |text: &str| text.lines().nth(line).unwrap_or("(no line)").to_string();
    assert!(expected == found, "{name}, line {}: stored\n{}\nfound\n{}", line + 1, at(&expected), at(found));
}

/// JSON in lines, floating-point numbers to 9 digits: their last ones are the C library's.
fn steady(value: &Value) -> String {
    fn rounded(value: &Value) -> Value {
        match value {
            Value::Number(n) if n.is_f64() => format!("{:.8e}", n.as_f64().unwrap()).parse::<f64>().unwrap().into(),
            Value::Array(all) => all.iter().map(rounded).collect(),
            Value::Object(all) => Value::Object(all.iter().map(|(key, value)| (key.clone(), rounded(value))).collect()),
            other => other.clone(),
        }
    }
    serde_json::to_string(&rounded(value)).unwrap().replace("},{", "},\n{").replace(",\"", ",\n\"").replace('\u{202e}', "\\u202e")
        + "\n"
}

/// Whether a character acts on a terminal or on the order of what stands around it.
fn acts(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Nothing in `text` acts on a terminal, and it fits one of 80 columns.
fn is_harmless(text: &str) {
    if let Some(c) = text.chars().find(|c| *c != '\n' && acts(*c)) {
        panic!("{c:?} in {text}");
    }
    // Wide characters make it fewer; no line has more.
    assert!(text.lines().all(|line| line.chars().count() <= 80 && !line.ends_with(' ')), "{text}");
}

#[test]
fn texts_are_as_stored_and_harmless() {
    let bench = with_cache(Selection::TopK { k: 4 });
    let printed = |arguments: &[&str]| bench.expect(0, &[arguments, &["--quiet"]].concat()).stdout;
    let summary = printed(&["inspect", "c"]);
    is_harmless(&summary);
    hold("summary.txt", &summary);
    for row in 0..8 {
        let text = printed(&["inspect", "c", "--row", &row.to_string()]);
        is_harmless(&text);
        hold(&format!("row-{row}.txt"), &text);
    }
    let found = printed(&["inspect", "c", "--find", "利用", "--top", "2"]);
    is_harmless(&found);
    hold("find.txt", &found);
    printed(&["repack", "c", "d", "--top-k", "2"]);
    let diff = printed(&["diff", "c", "d"]);
    is_harmless(&diff);
    hold("diff.txt", &diff);
    let help = printed(&["inspect", "--help"]);
    hold("help.txt", &help);
}

#[test]
fn json_is_as_stored() {
    let bench = with_cache(Selection::TopK { k: 4 });
    let json = |arguments: &[&str]| {
        let ran = bench.expect(0, &[arguments, &["--json", "--quiet"]].concat());
        assert!(ran.stdout.chars().all(|c| c == '\n' || !acts(c)), "{}", ran.stdout);
        ran.json()
    };
    hold("summary.json", &steady(&json(&["inspect", "c"])));
    hold("row-2.json", &steady(&json(&["inspect", "c", "--row", "2"])));
    let found = json(&["inspect", "c", "--find", "hostile"]);
    assert_eq!(found["may_be_more"], false);
    hold("find.json", &steady(&found["rows"]));
    assert_eq!(found["conversation"], json(&["inspect", "c", "--row", &found["rows"][0]["row"].to_string()]));
}

#[test]
fn draws_are_shown_as_what_they_are() {
    let bench = with_cache(Selection::Sampled { draws: 8, seed: 0 });
    let printed = |arguments: &[&str]| bench.expect(0, &[arguments, &["--quiet"]].concat()).stdout;
    let (summary, row) = (printed(&["inspect", "c"]), printed(&["inspect", "c", "--row", "1"]));
    is_harmless(&summary);
    is_harmless(&row);
    hold("drawn-summary.txt", &summary);
    hold("drawn-row-1.txt", &row);
    bench.expect(0, &["inspect", "c", "--html", "drawn.html"]);
}

#[test]
fn what_is_not_there_is_said() {
    let bench = with_cache(Selection::TopK { k: 4 });
    let ran = bench.expect(2, &["inspect", "c", "--find", "\u{202e}nowhere", "--quiet"]);
    assert_eq!(ran.error(), "c: no conversation contains \"\\u{202e}nowhere\"");
    let ran = bench.expect(2, &["inspect", "c", "--find", ""]);
    assert_eq!(ran.error(), "--find: expected a text to look for, found none");
    bench.expect(2, &["inspect", "c", "--find", "a", "--row", "1"]);
    bench.expect(2, &["inspect", "c", "--html", "p.html", "--row", "1"]);
    bench.expect(2, &["inspect", "c", "--sample", "3"]);
    bench.expect(2, &["inspect", "c", "--html", "p.html", "--sample", "0"]);
    std::fs::write(bench.path("mine.txt"), "kept").unwrap();
    let ran = bench.expect(2, &["inspect", "c", "--html", "mine.txt", "--quiet"]);
    assert_eq!(ran.error(), "mine.txt: expected a new file or an earlier page, found another file");
    assert_eq!(std::fs::read_to_string(bench.path("mine.txt")).unwrap(), "kept");
    bench.expect(1, &["inspect", "c", "--html", "no/such/folder.html", "--quiet"]);
}

/// The page without style, script and payload, and the payload.
fn taken_apart(page: &str) -> (String, Value) {
    let between = |from: &str, to: &str| {
        let start = page.find(from).unwrap_or_else(|| panic!("no {from}")) + from.len();
        &page[start..start + page[start..].find(to).unwrap()]
    };
    let nonce = between("<style nonce=\"", "\"");
    let (style, script) = (
        between(&format!("<style nonce=\"{nonce}\">"), "</style>"),
        between(&format!("<script nonce=\"{nonce}\">"), "</script>"),
    );
    let payload = between("id=\"payload\">", "</script>");
    let markup = page.replace(style, "…").replace(script, "…").replace(payload, "…").replace(nonce, "NONCE");
    let mut json = Vec::new();
    let bytes = unbase64(payload);
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(bytes.as_slice()), &mut json).unwrap();
    (markup, serde_json::from_slice(&json).unwrap())
}

fn unbase64(text: &str) -> Vec<u8> {
    let value = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        other => panic!("{other} is no letter of base64"),
    };
    let text = text.trim_end_matches('=').as_bytes();
    let mut out = Vec::new();
    for four in text.chunks(4) {
        let word = four.iter().fold(0u32, |word, &c| word << 6 | u32::from(value(c))) << (6 * (4 - four.len()));
        out.extend_from_slice(&word.to_be_bytes()[1..four.len()]);
    }
    out
}

#[test]
fn a_page_is_as_stored_and_the_data_has_no_way_into_it() {
    let bench = with_cache(Selection::TopK { k: 4 });
    let ran = bench.expect(0, &["inspect", "c", "--html", "page.html", "--quiet", "--top", "3"]);
    let page = std::fs::read_to_string(bench.path("page.html")).unwrap();
    assert!(ran.stdout.starts_with("page.html: ") && ran.stdout.ends_with(", 8 of 8 conversations\n"), "{}", ran.stdout);
    // A second page replaces the first, byte for byte.
    bench.expect(0, &["inspect", "c", "--html", "page.html", "--quiet", "--top", "3"]);
    assert_eq!(page, std::fs::read_to_string(bench.path("page.html")).unwrap());

    let (markup, payload) = taken_apart(&page);
    hold("page.html.txt", &markup);
    hold("page-payload.json", &steady(&payload));
    // No markup but ours, nothing that asks for anything from elsewhere, and the policy that forbids it.
    let times = |text: &str| markup.matches(text).count();
    assert_eq!((times("<script"), times("<img"), times("hostile()"), times("&lt;script&gt;hostile()")), (2, 0, 2, 2));
    assert!(markup.contains("default-src 'none'") && !markup.contains("{nonce}"));
    assert!(
        !page.contains("src=") && !page.contains("href=") && !page.contains("url(") && !page.contains("@import"),
        "asks for a file"
    );
    assert!(page.chars().all(|c| c == '\n' || !c.is_control()), "control characters");
    assert!(!page.contains(['\u{202e}', '\u{2028}', '\u{2067}', '\u{feff}', '\u{200f}']), "characters that act");
    // What the script sets as text has been made harmless, too.
    let texts = payload["texts"].to_string();
    assert!(
        texts.contains("\\\\u{202e}") && texts.contains("\\\\u{1b}") && !texts.contains('\u{202e}') && !texts.contains("\\u001b")
    );

    let ran = bench.expect(0, &["inspect", "c", "--html", "small.html", "--sample", "3", "--json", "--quiet"]);
    assert_eq!((ran.json()["conversations"].as_u64(), ran.json()["rows"].as_u64()), (Some(3), Some(8)));
    let (_, small) = taken_apart(&std::fs::read_to_string(bench.path("small.html")).unwrap());
    assert_eq!(small["rows"].as_array().unwrap().len(), 3);
}
