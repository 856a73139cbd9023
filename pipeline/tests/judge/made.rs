//! The invented benchmark, and settings that point at the server.

use crate::server::Server;
use potstill_pipeline::evaluate::AnswerSource;
use potstill_pipeline::evaluate::alpaca_eval::length_controlled::Coefficients;
use potstill_pipeline::evaluate::alpaca_eval::{AlpacaEvalConfig, LengthControl, Orders};
use potstill_pipeline::evaluate::judge::chat::{LimitField, Logprobs};
use potstill_pipeline::evaluate::judge::endpoint::{ANSWERS, JUDGE, Proxy, Variables};
use potstill_pipeline::evaluate::judge::{Endpoint, Patience};
use potstill_pipeline::evaluate::mt_bench::MtBenchConfig;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A key that must be nowhere.
pub const KEY: &str = "sk-canary-7f3a9c0d51";

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/judge").join(name)
}

/// What NumPy says.
pub fn expected() -> Value {
    serde_json::from_slice(&std::fs::read(fixture("expected.json")).unwrap()).unwrap()
}

/// Sums of some tens of numbers of size 1 to 100 in another order: n · ε · size, far below this.
pub fn assert_close(found: Option<f64>, expected: &Value, what: &str) {
    match (found, expected.as_f64()) {
        (Some(found), Some(expected)) => {
            assert!((found - expected).abs() <= 1e-11 * expected.abs().max(1.0), "{what}: {found}, not {expected}")
        }
        (None, None) => assert!(expected.is_null(), "{what}"),
        other => panic!("{what}: {other:?}"),
    }
}

pub fn judge(server: &Server) -> Endpoint {
    endpoint(server, JUDGE, KEY)
}

pub fn student(server: &Server) -> Endpoint {
    endpoint(server, ANSWERS, "")
}

pub fn endpoint(server: &Server, variables: Variables, key: &str) -> Endpoint {
    let variable = |name: &str| {
        let value = if name == variables.base_url { &server.base_url } else { key };
        Some(value.into())
    };
    Endpoint::from(variables, variable, Proxy::Never).unwrap()
}

pub fn patience() -> Patience {
    Patience {
        concurrency: 4,
        tries: 4,
        timeout: Duration::from_secs(30),
        pause: Duration::from_millis(1),
        requests_per_minute: None,
    }
}

pub fn mt_bench(out: &Path) -> MtBenchConfig {
    MtBenchConfig {
        questions: fixture("mt_bench/question.jsonl"),
        prompts: fixture("mt_bench/judge_prompts.jsonl"),
        references: fixture("mt_bench/reference_answer/gpt-4.jsonl"),
        answers: AnswerSource::File(fixture("mt_bench/answers.jsonl")),
        judge: "invented-judge".into(),
        max_tokens: 2048,
        limit_field: LimitField::MaxTokens,
        first: None,
        out: out.to_path_buf(),
        replies: out.join("replies"),
        patience: patience(),
    }
}

pub fn control() -> LengthControl {
    let numbers = expected()["alpaca_eval"]["coefficients"].clone();
    let [length, difficulty, model] = [0, 1, 2].map(|i| numbers[i].as_f64().unwrap());
    LengthControl {
        coefficients: Coefficients { length, difficulty, model },
        difficulties: fixture("alpaca_eval/instruction_difficulty.csv"),
    }
}

pub fn alpaca_eval(out: &Path) -> AlpacaEvalConfig {
    AlpacaEvalConfig {
        baseline: fixture("alpaca_eval/baseline.json"),
        prompt: fixture("alpaca_eval/prompt.txt"),
        answers: AnswerSource::File(fixture("alpaca_eval/outputs.json")),
        judge: "invented-judge".into(),
        max_tokens: 1,
        limit_field: LimitField::MaxTokens,
        logprobs: Logprobs::Top,
        orders: Orders::Both,
        first: None,
        length_control: Some(control()),
        out: out.to_path_buf(),
        replies: out.join("replies"),
        patience: patience(),
    }
}

/// Every file below a folder: its name and bytes.
pub fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(files(&path));
        } else {
            all.push((path.clone(), std::fs::read(&path).unwrap()));
        }
    }
    all.sort();
    all
}
