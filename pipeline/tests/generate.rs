//! Answers: a conversation decoded token by token beside one computed at once, greedy answers beside transformers'
//! (`scripts/make_greedy_fixture.py`), and answers that depend on no batch and no interruption.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use candle_core::{Device, Tensor};
use potstill_cache::ErrorClass;
use potstill_pipeline::adapter::FittedAdapter;
use potstill_pipeline::data::ChatTokenizer;
use potstill_pipeline::data::pack::{Pack, Sequence};
use potstill_pipeline::evaluate::generate::{self, GenerateConfig, GenerateReport};
use potstill_pipeline::evaluate::{BasePrecision, Subject};
use potstill_pipeline::kernel::Precision;
use potstill_pipeline::model::decoder::{Decoder, Holding};
use potstill_pipeline::model::kv_cache::KvCache;
use potstill_pipeline::run::RunContext;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use support::golden;

fn bits(x: &Tensor) -> Vec<u32> {
    x.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect()
}

/// Hidden states of the last of these tokens, the whole conversation computed at once.
fn at_once(decoder: &Decoder, ids: &[u32]) -> Vec<u32> {
    let pack = Pack::new([Sequence { input_ids: ids, positions: &[] }]);
    let hidden = decoder.hidden(&pack).unwrap();
    bits(&hidden.narrow(0, ids.len() - 1, 1).unwrap())
}

fn check_decoder(decoder: &Decoder, what: &str) {
    let vocabulary = decoder.config.vocab_size as u32;
    let text = |seed: u32, n: u32| (0..n).map(|i| (i * 7919 + seed * 31 + 5) % vocabulary).collect::<Vec<u32>>();
    // A long prompt and a short one that comes later; then both go on, one token at a time; then a longer stretch at once.
    let (a, b) = (text(1, 70), text(2, 41));
    let (mut of_a, mut of_b) = (KvCache::new(&decoder.config, 8), KvCache::new(&decoder.config, 41));
    let (mut done_a, mut done_b) = (0, 0);
    for (new_a, new_b) in [(37, 0), (1, 3), (1, 1), (1, 1), (1, 33), (20, 1), (9, 2)] {
        let mut new: Vec<(&[u32], &mut KvCache)> = Vec::new();
        let mut expected = Vec::new();
        for (n, text, done, kept) in [(new_a, &a, &mut done_a, &mut of_a), (new_b, &b, &mut done_b, &mut of_b)] {
            if n > 0 {
                new.push((&text[*done..*done + n], kept));
                *done += n;
                expected.extend(at_once(decoder, &text[..*done]));
            }
        }
        let found = decoder.hidden_cached(&mut new, &RunContext::default()).unwrap().unwrap();
        assert_eq!(bits(&found), expected, "{what}: after {done_a} and {done_b} tokens");
    }
    assert_eq!((of_a.len(), of_b.len()), (70, 41));
    let row_bytes = KvCache::token_bytes(&decoder.config);
    assert!(row_bytes >= (8 * decoder.config.layers * decoder.config.kv_heads * decoder.config.head_dim) as u64);
}

#[test]
fn a_conversation_decoded_token_by_token_has_the_bits_of_one_computed_at_once() {
    let folder = |name: &str| golden("../decoders").join(name);
    let read = |folder: &Path, holding, precision| {
        Decoder::from_folder(folder, holding, precision, &Device::Cpu, &RunContext::default()).unwrap()
    };
    for precision in [Precision::F32, Precision::Bf16] {
        for name in ["llama", "llama_awq", "qwen3", "qwen2_head_dim", "mistral"] {
            check_decoder(&read(&folder(name), Holding::AsStored, precision), &format!("{name} {precision:?}"));
        }
        let mut student = read(&golden("student"), Holding::Nf4, precision);
        FittedAdapter::read(&golden("expected/lora"), &student.config).unwrap().put_on(&mut student).unwrap();
        check_decoder(&student, &format!("student {precision:?}"));
    }
}

/// A scratch folder with a file of questions.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new(questions: &[Value]) -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap() };
        let lines: String = questions.iter().map(|question| format!("{question}\n")).collect();
        std::fs::write(bench.path("questions.jsonl"), lines).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn config(&self, out: &str) -> GenerateConfig {
        GenerateConfig {
            subject: Subject { student: golden("student"), ..Subject::default() },
            model_id: "student".into(),
            questions: self.path("questions.jsonl"),
            out: self.path(out),
            max_new_tokens: 48,
            ..GenerateConfig::default()
        }
    }

    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }
}

fn run(config: &GenerateConfig) -> GenerateReport {
    generate::run(config, &RunContext::default()).unwrap()
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn greedy_answers_are_those_of_transformers() {
    let text = std::fs::read_to_string(golden("../evaluate/greedy.json")).unwrap();
    let expected: Value = serde_json::from_str(&text).unwrap();
    for (variant, adapter) in [("plain", None), ("adapter", Some(golden("expected/lora")))] {
        let dialogues = expected[variant]["dialogues"].as_array().unwrap();
        // Every step's lead is far beyond what two f32 forwards differ by (2e-5), so a difference here is an error.
        assert!(dialogues.len() >= 4 && expected[variant]["least_lead"].as_f64().unwrap() >= 5e-3);
        let question = |(i, d): (usize, &Value)| json!({"question_id": i, "category": "writing", "turns": d["turns"]});
        let bench = Bench::new(&dialogues.iter().enumerate().map(question).collect::<Vec<_>>());
        for batch_size in [1, 3, 24] {
            let out = format!("{batch_size}.jsonl");
            let subject = Subject { adapter: adapter.clone(), base: BasePrecision::Stored, ..bench.config(&out).subject };
            let report = run(&GenerateConfig { subject, temperature: Some(0.0), batch_size, ..bench.config(&out) });
            assert_eq!(report.stop_ids.iter().copied().collect::<Vec<_>>(), [2045, 2047]);
            let found = lines(&bench.text(&out));
            for (found, expected) in found.iter().zip(dialogues) {
                let texts: Vec<&Value> = expected["answers"].as_array().unwrap().iter().map(|answer| &answer["text"]).collect();
                assert_eq!(found["choices"][0]["turns"], json!(texts), "{variant}: {}", expected["turns"]);
            }
            let all = dialogues.iter().flat_map(|d| d["answers"].as_array().unwrap());
            let tokens: usize = all.clone().map(|answer| answer["ids"].as_array().unwrap().len()).sum();
            let prompts: u64 = all.clone().map(|answer| answer["prompt_tokens"].as_u64().unwrap()).sum();
            let cut = all.filter(|answer| answer["stopped"] == false).count();
            assert_eq!((report.tokens, report.prompt_tokens, report.cut), (tokens as u64, prompts, cut), "{variant}");
        }
    }
}

fn prompts(n: usize) -> Vec<Value> {
    (0..n).map(|i| json!({"id": format!("q{i}"), "prompt": format!("Say something about the number {i}{}", " and more".repeat(i % 5))})).collect()
}

#[test]
fn drawn_answers_follow_from_the_seed_and_not_from_the_batch() {
    let bench = Bench::new(&prompts(7));
    let drawn = |out: &str, seed, batch_size, pack_tokens| {
        let config =
            GenerateConfig { temperature: Some(0.9), top_p: 0.8, choices: 2, seed, batch_size, pack_tokens, ..bench.config(out) };
        run(&config);
        bench.text(out)
    };
    let alone = drawn("a", 3, 1, 4096);
    assert_eq!(alone, drawn("b", 3, 5, 4096));
    assert_eq!(alone, drawn("c", 3, 24, 60));
    assert_ne!(alone, drawn("d", 4, 24, 4096));
    let found = lines(&alone);
    assert_eq!(found.len(), 7);
    for (i, answer) in found.iter().enumerate() {
        assert_eq!((&answer["id"], &answer["model_id"]), (&json!(format!("q{i}")), &json!("student")));
        assert_ne!(answer["answers"][0], answer["answers"][1], "each choice draws for itself");
    }
}

#[test]
fn a_run_goes_on_where_its_journal_ends() {
    let bench = Bench::new(&prompts(6));
    let config = GenerateConfig { temperature: Some(1.0), choices: 2, batch_size: 4, ..bench.config("whole") };
    let whole = run(&config);
    assert_eq!((whole.questions, whole.answers, whole.resumed), (6, 12, 0));
    let journal = bench.text("whole.journal");
    let cut: Vec<&str> = journal.split_inclusive('\n').collect();
    for kept in [0, 1, 4, 12, 13] {
        let out = format!("cut-{kept}");
        // What a crash leaves of the next answer is no answer.
        let torn = cut.get(kept).map_or("", |line| &line[..line.len() / 2]);
        std::fs::write(bench.path(&format!("{out}.journal")), format!("{}{torn}", cut[..kept].concat())).unwrap();
        let report = run(&GenerateConfig { out: bench.path(&out), ..config.clone() });
        assert_eq!((report.answers, report.resumed), (12, kept.saturating_sub(1)));
        assert_eq!(bench.text(&out), bench.text("whole"), "from {kept} lines on");
    }
    // A finished run, again: nothing is computed, the same file.
    std::fs::remove_file(bench.path("whole")).unwrap();
    let again = run(&config);
    assert_eq!((again.resumed, again.tokens), (12, 0));
    let stopped = RunContext::default();
    stopped.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let error = generate::run(&GenerateConfig { seed: 9, ..bench.config("stopped") }, &stopped).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Interrupted, "{error}");
}

#[test]
fn each_benchmark_has_its_own_file() {
    let alpaca = [
        json!({"dataset": "made", "instruction": "Tell me a story.", "output": "not mine", "generator": "other"}),
        json!({"dataset": "made", "instruction": "Tell me a story.", "output": "twice"}),
    ];
    let bench = Bench::new(&alpaca);
    let report = run(&GenerateConfig { choices: 3, ..bench.config("alpaca.json") });
    assert_eq!(serde_json::to_value(report.form).unwrap(), "alpaca-eval");
    let found: Vec<Value> = serde_json::from_str(&bench.text("alpaca.json")).unwrap();
    assert_eq!(found.len(), 2);
    let keys: Vec<&String> = found[0].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["dataset", "instruction", "output", "generator"]);
    assert_eq!((&found[0]["generator"], &found[0]["dataset"]), (&json!("student"), &json!("made")));
    assert!(!found[0]["output"].as_str().unwrap().contains("not mine"));
    // The same as a list.
    std::fs::write(bench.path("questions.jsonl"), json!(alpaca).to_string()).unwrap();
    run(&bench.config("new/folder/list.json"));
    assert_eq!(bench.text("new/folder/list.json"), bench.text("alpaca.json"), "a folder for answers is made");

    let bench = Bench::new(&[json!({"question_id": 81, "category": "math", "turns": ["One?", "Two?"]})]);
    run(&GenerateConfig { choices: 2, ..bench.config("mt.jsonl") });
    let found = lines(&bench.text("mt.jsonl"));
    let keys: Vec<&String> = found[0].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["question_id", "answer_id", "model_id", "choices", "tstamp"]);
    let choices = found[0]["choices"].as_array().unwrap();
    assert_eq!((choices.len(), &choices[1]["index"], choices[1]["turns"].as_array().unwrap().len()), (2, &json!(1), 2));
    // Of mathematics the likeliest token is taken, so both choices are alike.
    assert_eq!(choices[0]["turns"], choices[1]["turns"]);
    assert!(found[0]["tstamp"].as_f64().unwrap() > 1e9);
}

#[test]
fn what_cannot_be_answered_is_refused_or_counted() {
    let bench = Bench::new(&prompts(2));
    let refused = |config: &GenerateConfig| generate::run(config, &RunContext::default()).unwrap_err();
    run(&bench.config("a"));
    let error = refused(&GenerateConfig { top_p: 0.5, ..bench.config("a") });
    assert_eq!(error.class(), ErrorClass::Mismatch);
    assert!(error.to_string().contains("top_p: expected 0.5, found 1"), "{error}");
    std::fs::write(bench.path("b"), "somebody's").unwrap();
    assert_eq!(refused(&bench.config("b")).class(), ErrorClass::Usage);
    assert_eq!(
        refused(&GenerateConfig { top_p: 0.0, ..bench.config("c") }).to_string(),
        "top_p = 0: expected a number above 0, at most 1"
    );
    for (row, words) in [
        (
            json!({"text": "?"}),
            "row 1: expected turns (MT-Bench), instruction (AlpacaEval) or prompt (plain), found none of them",
        ),
        (json!({"question_id": 1, "turns": []}), "row 1: expected turns, a list of at least one text, found []"),
        (json!({"turns": ["a"]}), "row 1: expected a question_id, a number or a text, found nothing"),
        (json!({"prompt": 7}), "row 1: expected a prompt, a text, found 7"),
    ] {
        let bad = Bench::new(&[row]);
        let error = refused(&bad.config("x")).to_string();
        assert!(error.contains(words), "{error}");
    }
    let twice = Bench::new(&[json!({"id": 1, "prompt": "a"}), json!({"id": 1, "prompt": "b"})]);
    assert!(refused(&twice.config("x")).to_string().contains("row 2: expected each id once, found 1 again"));
    // 1,024 tokens are the student's context.
    let long = Bench::new(&[json!({"prompt": "word ".repeat(3000)}), json!({"prompt": "short"})]);
    let report = run(&long.config("long"));
    assert_eq!((report.answers, report.too_long), (2, 1));
    assert_eq!(lines(&long.text("long"))[0]["answers"], json!([""]));
}

#[test]
fn an_answer_ends_where_the_template_ends_it() {
    let tokenizer = ChatTokenizer::from_folder(&golden("student")).unwrap();
    assert_eq!(tokenizer.end_of_answer().unwrap(), Some(2047));
    assert_eq!(tokenizer.decode_text(&[2046, 2047]), "");
}
