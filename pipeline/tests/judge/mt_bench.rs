//! MT-Bench: which prompt is used, what it holds, and scores by turn and category.

use crate::made::{assert_close, expected, fixture, judge, mt_bench, student};
use crate::server::{Answer, Server};
use potstill_pipeline::evaluate::judge::chat::LimitField;
use potstill_pipeline::evaluate::mt_bench::scores::Score;
use potstill_pipeline::evaluate::mt_bench::{self as bench, MtBenchConfig, temperature};
use potstill_pipeline::evaluate::{AnswerSettings, AnswerSource};
use potstill_pipeline::run::RunContext;
use serde_json::Value;
use std::collections::BTreeMap;

fn assert_score(found: Score, expected: &Value, what: &str) {
    assert_eq!(found.graded, expected["graded"].as_u64().unwrap(), "{what}");
    assert_close(found.mean, &expected["mean"], what);
    assert_close(found.standard_error, &expected["standard_error"], &format!("{what}, error"));
}

#[test]
fn grades_give_numpys_scores_and_a_rerun_asks_nothing() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let config = mt_bench(folder.path());
    let outlook = bench::outlook(&config).unwrap();
    assert_eq!((outlook.judge.calls, outlook.judge.on_disk, outlook.judge.most_completion_tokens), (32, 0, 32 * 2048));
    let report = bench::run(&config, &judge(&server), None, &RunContext::default()).unwrap();

    let expected = &expected()["mt_bench"];
    let scores = &report.scores;
    for (found, name) in [(scores.first, "first"), (scores.second, "second"), (scores.overall, "both")] {
        assert_score(found, &expected["overall"][name], name);
    }
    assert_eq!(scores.categories.len(), 8);
    for category in &scores.categories {
        let expected = &expected["categories"][&category.category];
        for (found, name) in [(category.first, "first"), (category.second, "second"), (category.both, "both")] {
            assert_score(found, &expected[name], &format!("{} {name}", category.category));
        }
    }
    let ungraded: Vec<(&str, u64)> = scores.ungraded.iter().map(|(reason, n)| (reason.as_str(), *n)).collect();
    assert_eq!(ungraded, [("a number outside 1 to 10", 1), ("no grade in the judge's words", 1)]);
    // Two without a grade were asked three more times each.
    assert_eq!((report.judge_calls.asked, server.requests().len()), (38, 38));

    // FastChat's file: all 32 in the order of the questions, −1 where there is no grade.
    let text = std::fs::read_to_string(folder.path().join("judgments.jsonl")).unwrap();
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let without: Vec<(u64, u64)> = rows
        .iter()
        .filter(|r| r["score"] == -1.0)
        .map(|r| (r["question_id"].as_u64().unwrap(), r["turn"].as_u64().unwrap()))
        .collect();
    assert_eq!((rows.len(), without), (32, vec![(906, 2), (910, 1)]));
    assert_eq!(
        (&rows[0]["model"], &rows[0]["judge"]),
        (&"tiny-student".into(), &serde_json::json!(["invented-judge", "single-v1"]))
    );
    assert!(rows[0]["judgment"].as_str().unwrap().contains("Rating: [["));

    let again = bench::run(&config, &judge(&server), None, &RunContext::default()).unwrap();
    assert_eq!((again.judge_calls.asked, again.judge_calls.from_disk, server.requests().len()), (0, 38, 0));
    assert_eq!(again.scores, report.scores);
    assert_eq!(std::fs::read_to_string(folder.path().join("judgments.jsonl")).unwrap(), text);
    assert_eq!(bench::outlook(&config).unwrap().judge.on_disk, 32);
}

#[test]
fn each_category_and_turn_has_its_prompt() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    bench::run(&mt_bench(folder.path()), &judge(&server), None, &RunContext::default()).unwrap();
    let mut by_prompt: BTreeMap<(bool, bool), u64> = BTreeMap::new();
    let mut seen = std::collections::BTreeSet::new();
    for request in server.requests() {
        let text = request.text();
        if !seen.insert(text.clone()) {
            continue;
        }
        let messages = request.body["messages"].as_array().unwrap();
        assert_eq!((messages.len(), &messages[0]["role"], &messages[1]["role"]), (2, &"system".into(), &"user".into()));
        assert_eq!((request.body["temperature"].as_f64(), &request.body["max_tokens"]), (Some(0.0), &2048.into()));
        let second = text.starts_with("Grade the second");
        let id: u64 = text.split("Invented task ").nth(1).unwrap()[..3].parse().unwrap();
        // The categories' places in the fixture: reasoning, math, coding.
        let with_reference = [2, 3, 4].contains(&((id - 901) % 8));
        assert_eq!(text.contains(&format!("Right is {id}.")), with_reference, "{text}");
        assert_eq!(text.contains(&format!("Right is twice {id}.")), with_reference && second, "{text}");
        assert_eq!(text.contains(&format!("{{turn}} of {id}?")), second, "{text}");
        assert_eq!(text.matches("<q=").count(), if second { 2 } else { 1 }, "{text}");
        *by_prompt.entry((with_reference, second)).or_default() += 1;
    }
    let expected = [((false, false), 10), ((false, true), 10), ((true, false), 6), ((true, true), 6)];
    assert_eq!(by_prompt.into_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn answers_are_a_dialogue_at_each_categorys_temperature() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let settings = AnswerSettings {
        model: "tiny-student".into(),
        temperature: None,
        top_p: None,
        max_tokens: None,
        limit_field: LimitField::MaxTokens,
        seed: 0,
    };
    let config = MtBenchConfig { answers: AnswerSource::Endpoint(settings), first: Some(8), ..mt_bench(folder.path()) };
    server.twist(|_, request, mut answer| {
        // One answer is cut, and one question is never answered.
        let text = request.text();
        if request.body["model"] == "tiny-student" && text.starts_with("Invented task 903") {
            let mut value: Value = serde_json::from_slice(&answer.body).unwrap();
            value["choices"][0]["finish_reason"] = "length".into();
            answer.body = value.to_string().into_bytes();
        }
        if text.ends_with("{turn} of 905?") { Answer::of(400, r#"{"message":"no"}"#) } else { answer }
    });
    let report = bench::run(&config, &judge(&server), Some(&student(&server)), &RunContext::default()).unwrap();
    assert_eq!(report.unanswered.into_iter().collect::<Vec<_>>(), [("refused with 400 (no)".to_string(), 1)]);
    assert_eq!((report.cut_turns, report.questions, report.scores.overall.graded), (Some(2), 8, 14));
    // The invented student's marks: 4 for the first turn, 6 for the second.
    assert_eq!(
        (report.scores.first.mean, report.scores.second.mean, report.scores.overall.mean),
        (Some(4.0), Some(6.0), Some(5.0))
    );

    let categories = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"];
    for request in server.requests().iter().filter(|r| r.body["model"] == "tiny-student") {
        let messages = request.body["messages"].as_array().unwrap();
        let id: usize = messages[0]["content"].as_str().unwrap().split("Invented task ").nth(1).unwrap()[..3].parse().unwrap();
        assert_eq!(request.body["temperature"].as_f64(), Some(temperature(categories[id - 901])));
        assert_eq!((&request.body["max_tokens"], &request.body["seed"]), (&1024.into(), &0.into()));
        if messages.len() > 1 {
            assert_eq!((messages.len(), &messages[1]["role"]), (3, &"assistant".into()));
            assert!(messages[1]["content"].as_str().unwrap().starts_with("Answer 1 to Invented task"), "{}", messages[1]);
        }
    }
    assert_eq!(categories.map(temperature), [0.7, 0.7, 0.0, 0.0, 0.0, 0.0, 0.1, 0.1]);
    assert_eq!(temperature("anything"), 0.7);

    // The file that was written can be judged by itself, and gives what it gave.
    let config = MtBenchConfig { answers: AnswerSource::File(folder.path().join("answers.jsonl")), ..config };
    let error = bench::outlook(&config).unwrap_err().to_string();
    assert!(error.contains("question 905: expected an answer to its 2 turns, found none"), "{error}");
    let outlook = bench::outlook(&MtBenchConfig { first: Some(4), ..config }).unwrap();
    assert_eq!((outlook.judge.calls, outlook.judge.on_disk), (8, 8));
}

#[test]
fn files_that_are_wrong_are_named_with_the_place() {
    let folder = tempfile::tempdir().unwrap();
    let good = |name: &str| std::fs::read_to_string(fixture(&format!("mt_bench/{name}"))).unwrap();
    let write = |text: String| {
        let path = folder.path().join("changed.jsonl");
        std::fs::write(&path, text).unwrap();
        path
    };
    let error = |change: &dyn Fn(&mut MtBenchConfig)| {
        let mut config = mt_bench(folder.path());
        change(&mut config);
        bench::outlook(&config).unwrap_err().to_string()
    };
    let answers = good("answers.jsonl");
    let first = answers.lines().next().unwrap();
    for (text, found) in [
        (
            answers.replacen("{\"question_id\": 904", "{\"question_id\": 1904", 1),
            "question 904: expected an answer to its 2 turns, found none",
        ),
        (format!("{answers}{first}\n"), "question 901: expected every question answered once, found two answers"),
        (format!("{first}\n{{\"question_id\": 902}}\n"), "line 2: expected an answer"),
        (
            answers.replacen("\"choices\": [{", "\"choices\": [], \"x\": [{", 1),
            "question 901: expected an answer to its 2 turns, found 0 of them",
        ),
    ] {
        let found_error = error(&|config| config.answers = AnswerSource::File(write(text.clone())));
        assert!(found_error.contains(found) && found_error.contains("changed.jsonl"), "{found_error}");
    }
    let prompts = good("judge_prompts.jsonl");
    for (text, found) in [
        (prompts.replace("\"single-math-v1\"", "\"other\""), "prompt single-math-v1: expected a prompt of this name"),
        (prompts.replace("[[rating]]", "[[A]]"), "prompt single-v1: expected output_format"),
        (
            prompts.replace("A: {answer}", "A: {reply}"),
            "prompt single-v1: expected a template with its places in braces, found none of {answer}",
        ),
        (prompts.replace("Grade this.", "Grade {{this}}."), "found a brace beside"),
    ] {
        let found_error = error(&|config| config.prompts = write(text.clone()));
        assert!(found_error.contains(found), "{found_error}");
    }
    let questions = good("question.jsonl");
    let twice = format!("{questions}{}\n", questions.lines().next().unwrap());
    assert!(error(&|config| config.questions = write(twice.clone())).contains("question 901: expected every question once"));
    let references = good("reference_answer/gpt-4.jsonl");
    let few: String = references.lines().skip(1).map(|line| format!("{line}\n")).collect();
    assert!(
        error(&|config| config.references = write(few.clone()))
            .contains("question 903: expected a reference answer to its 2 turns")
    );
}
