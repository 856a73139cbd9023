//! AlpacaEval: figures of judgements that are there, and judging in both orders.

use crate::made::{alpaca_eval, assert_close, control, expected, fixture, judge, student};
use crate::server::{Answer, Server, reply};
use potstill_pipeline::evaluate::alpaca_eval::figures::Figures;
use potstill_pipeline::evaluate::alpaca_eval::length_controlled::{difficulties, is_extreme};
use potstill_pipeline::evaluate::alpaca_eval::{self as alpaca, Orders, Scored};
use potstill_pipeline::evaluate::judge::chat::{LimitField, Logprobs};
use potstill_pipeline::evaluate::{AnswerSettings, AnswerSource};
use potstill_pipeline::run::RunContext;
use serde_json::Value;

fn assert_figures(scored: &Scored, expected: &Value) {
    let Figures { judged, left_out, wins, losses, draws, .. } = scored.figures;
    let counts = [judged, left_out, wins, losses, draws];
    let names = ["judged", "left_out", "wins", "losses", "draws"];
    assert_eq!(counts.to_vec(), names.map(|name| expected[name].as_u64().unwrap()).to_vec());
    let figures = &scored.figures;
    let controlled = scored.length_controlled.unwrap();
    for (found, name) in [
        (figures.win_rate, "win_rate"),
        (figures.standard_error, "standard_error"),
        (figures.discrete_win_rate, "discrete_win_rate"),
        (figures.lengths.baseline, "baseline_length"),
        (figures.lengths.model, "model_length"),
        (Some(controlled.win_rate), "length_controlled"),
        (controlled.standard_error, "length_controlled_error"),
        (controlled.with_lengths, "with_lengths"),
    ] {
        assert_close(found, &expected[name], name);
    }
    let no_ties = &figures.no_ties;
    assert_eq!((no_ties.total.wins + no_ties.total.losses, no_ties.forced), (judged, draws));
    assert_eq!(no_ties.datasets.len(), expected["datasets"].as_object().unwrap().len());
    for winners in &no_ties.datasets {
        let dataset = &expected["datasets"][&winners.dataset];
        assert_close(winners.win_rate, &dataset["win_rate"], &winners.dataset);
        let [judged, above, ties] = ["judged", "above", "ties"].map(|name| dataset[name].as_u64().unwrap());
        assert_eq!((winners.judged, winners.wins + winners.losses), (judged, judged));
        assert!((above..=above + ties).contains(&winners.wins), "{winners:?}");
    }
}

#[test]
fn judgements_that_are_there_give_numpys_figures() {
    let scored = alpaca::scored(&fixture("alpaca_eval/annotations.json"), Some(&control())).unwrap();
    assert_figures(&scored, &expected()["alpaca_eval"]["scored"]);
    assert_eq!(
        (scored.model.as_str(), scored.baseline.as_str(), scored.judge.as_str()),
        ("tiny-student", "baseline-x", "invented-judge")
    );
    assert_eq!(alpaca::scored(&fixture("alpaca_eval/annotations.json"), None).unwrap().length_controlled, None);
}

/// Figures of the public leaderboard, on judgements that are published but not ours to ship: run where `ALPACA_EVAL_ANNOTATIONS` names them.
#[test]
fn published_judgements_give_the_leaderboards_figures() {
    let Some(path) = std::env::var_os("ALPACA_EVAL_ANNOTATIONS") else { return };
    let figures = alpaca::scored(path.as_ref(), None).unwrap().figures;
    let rounded = [figures.win_rate, figures.standard_error, figures.discrete_win_rate].map(|x| format!("{:.4}", x.unwrap()));
    assert_eq!(rounded, ["64.6407", "1.4301", "66.0248"]);
    assert_eq!((figures.wins, figures.losses, figures.draws), (531, 273, 1));
}

#[test]
fn both_orders_give_numpys_figures_and_a_rerun_asks_nothing() {
    let server = Server::start();
    let folder = tempfile::tempdir().unwrap();
    let config = alpaca_eval(folder.path());
    let run = || alpaca::run(&config, &judge(&server), None, &RunContext::default()).unwrap();
    let report = run();
    let expected = &expected()["alpaca_eval"]["judged"];
    assert_figures(&report.scored, expected);
    let choices = report.choices;
    assert_eq!((choices.by_probability, choices.by_label, choices.identical, choices.both_orders), (46, 0, 1, 23));
    let count = |name: &str| expected[name].as_u64().unwrap();
    assert_eq!(
        (choices.flips, choices.first_wins, choices.second_wins),
        (count("flips"), count("first_wins"), count("second_wins"))
    );
    assert_eq!((report.judge_calls.asked, report.judge_calls.from_disk), (46, 0));
    assert_eq!((report.judge_calls.prompt_tokens, report.judge_calls.completion_tokens_now), (4600, 460));
    assert_eq!(report.judge_calls.models.keys().collect::<Vec<_>>(), ["invented-judge-2026"]);
    assert!(report.left_out.is_empty() && report.unanswered.is_empty());

    // The file is AlpacaEval's, row by row in the benchmark's order, and gives the same figures again.
    let annotations = folder.path().join("annotations.json");
    let rows: Vec<Value> = serde_json::from_slice(&std::fs::read(&annotations).unwrap()).unwrap();
    for (i, row) in rows.iter().enumerate() {
        assert_close(row["preference"].as_f64(), &expected["preferences"][i], &format!("row {i}"));
        assert!(row["instruction"].as_str().unwrap().starts_with(&format!("Invented instruction {i}:")));
    }
    assert_figures(&alpaca::scored(&annotations, Some(&control())).unwrap(), expected);

    let requests = server.requests();
    assert_eq!(requests.len(), 46);
    for request in &requests {
        assert_eq!(request.path, "/v1/chat/completions");
        assert_eq!((&request.body["logprobs"], &request.body["top_logprobs"]), (&true.into(), &5.into()));
        assert_eq!((&request.body["max_tokens"], request.body["temperature"].as_f64()), (&1.into(), Some(1.0)));
        // An instruction with a place in it is text.
        assert!(request.text().contains(": {output_1}?"), "{}", request.text());
    }

    let before = crate::made::files(folder.path());
    let again = run();
    assert_eq!((again.judge_calls.asked, again.judge_calls.from_disk, server.requests().len()), (0, 46, 0));
    assert_eq!((&again.scored, again.choices), (&report.scored, report.choices));
    let after = crate::made::files(folder.path());
    for ((path, old), (_, new)) in before.iter().zip(&after).filter(|((path, _), _)| !path.ends_with("report.json")) {
        assert_eq!(old, new, "{}", path.display());
    }
}

#[test]
fn one_order_is_drawn_by_seed_and_instruction() {
    let server = Server::start();
    let mut first = Vec::new();
    for seed in [0, 0, 1] {
        let folder = tempfile::tempdir().unwrap();
        let config = alpaca::AlpacaEvalConfig { orders: Orders::One(seed), ..alpaca_eval(folder.path()) };
        let report = alpaca::run(&config, &judge(&server), None, &RunContext::default()).unwrap();
        assert_eq!((report.judge_calls.asked, report.choices.both_orders, report.scored.figures.judged), (23, 0, 24));
        let mut texts: Vec<String> = server.requests().iter().map(|r| r.text()).collect();
        texts.sort();
        let swapped = texts.iter().filter(|t| t.contains("m:\nA student")).count();
        assert!((5..=18).contains(&swapped), "{swapped} of 23");
        first.push(texts);
    }
    assert!(first[0] == first[1] && first[1] != first[2]);
}

#[test]
fn without_log_probabilities_labels_count_and_it_is_said() {
    let server = Server::start();
    server.twist(|_, request, answer| {
        let mut value: Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(request.body["logprobs"], true);
        value["choices"][0]["logprobs"] = Value::Null;
        Answer::of(200, value.to_string())
    });
    let folder = tempfile::tempdir().unwrap();
    let context = RunContext::default();
    let report = alpaca::run(&alpaca_eval(folder.path()), &judge(&server), None, &context).unwrap();
    assert_eq!((report.choices.by_probability, report.choices.by_label), (0, 46));
    let warnings = context.take_warnings();
    assert!(warnings.len() == 1 && warnings[0].contains("no log-probabilities"), "{warnings:?}");
    // Two orders that disagree are a draw.
    let figures = &report.scored.figures;
    assert_eq!(figures.draws, report.choices.flips + report.choices.identical);
    assert_eq!(report.choices.flips, expected()["alpaca_eval"]["judged"]["flips"].as_u64().unwrap());

    // Asked for nothing else, it is what was wanted, and the likeliest label is asked for.
    server.twist(|_, request, answer| {
        assert!(request.body.get("logprobs").is_none() && request.body["temperature"] == 0.0);
        answer
    });
    let folder = tempfile::tempdir().unwrap();
    let config = alpaca::AlpacaEvalConfig { logprobs: Logprobs::None, ..alpaca_eval(folder.path()) };
    assert_eq!(alpaca::run(&config, &judge(&server), None, &context).unwrap().scored.figures, report.scored.figures);
    assert!(context.take_warnings().is_empty());
}

#[test]
fn a_judge_that_chooses_neither_is_asked_again_and_then_left_out() {
    let server = Server::start();
    // Instruction 3 gets no label at all, in one of the two orders; instruction 4 none at the first two times of asking.
    let mut fours = 0;
    server.twist(move |_, request, answer| {
        let text = request.text();
        let neither = reply("invented-judge", "Neither", None).to_string();
        let three = text.contains("instruction 3:") && text.contains("m:\nA student");
        let four = text.contains("instruction 4:") && text.contains("m:\nA student");
        fours += u32::from(four);
        if three || (four && fours <= 2) { Answer::of(200, neither) } else { answer }
    });
    let folder = tempfile::tempdir().unwrap();
    let report = alpaca::run(&alpaca_eval(folder.path()), &judge(&server), None, &RunContext::default()).unwrap();
    assert_eq!((report.scored.figures.judged, report.scored.figures.left_out), (23, 1));
    assert_eq!(report.left_out.into_iter().collect::<Vec<_>>(), [("the judge chose neither label".to_string(), 1)]);
    assert_eq!(report.judge_calls.asked, 46 + 3 + 2);
    let rows: Vec<Value> = serde_json::from_slice(&std::fs::read(folder.path().join("annotations.json")).unwrap()).unwrap();
    assert!(rows[3]["preference"].is_null() && rows[3]["preference_by_order"][0].is_f64() && rows[3]["left_out"].is_string());
    assert!(rows[4].get("left_out").is_none());
    // What it said in vain is on disk too.
    server.requests();
    let again = alpaca::run(&alpaca_eval(folder.path()), &judge(&server), None, &RunContext::default()).unwrap();
    assert_eq!((again.judge_calls.asked, again.judge_calls.from_disk, server.requests().len()), (0, 51, 0));
}

#[test]
fn answers_come_from_an_endpoint_that_never_sees_the_judges_key() {
    let (server, theirs) = (Server::start(), Server::start());
    theirs.twist(|number, request, answer| {
        assert!(!request.headers.contains_key("authorization"));
        if request.text().contains("instruction 7:") {
            Answer::of(400, r#"{"error":{"message":"too long"}}"#)
        } else {
            let _ = number;
            answer
        }
    });
    let folder = tempfile::tempdir().unwrap();
    let settings = AnswerSettings {
        model: "tiny-student".into(),
        temperature: Some(0.25),
        top_p: Some(0.8),
        max_tokens: Some(99),
        limit_field: LimitField::MaxCompletionTokens,
        seed: 5,
    };
    let config = alpaca::AlpacaEvalConfig { answers: AnswerSource::Endpoint(settings), ..alpaca_eval(folder.path()) };
    let outlook = alpaca::outlook(&config).unwrap();
    assert_eq!((outlook.answers.calls, outlook.judge.calls, outlook.answers.most_completion_tokens), (24, 48, 24 * 99));
    assert!(!folder.path().join("replies").exists() && theirs.requests().is_empty());

    let report = alpaca::run(&config, &judge(&server), Some(&student(&theirs)), &RunContext::default()).unwrap();
    assert_eq!(report.unanswered.into_iter().collect::<Vec<_>>(), [("refused with 400 (too long)".to_string(), 1)]);
    assert_eq!((report.scored.figures.judged, report.scored.model.as_str(), report.cut_answers), (23, "tiny-student", Some(0)));
    let body = &theirs.requests()[0].body;
    assert_eq!(
        (&body["max_completion_tokens"], &body["seed"], body["temperature"].as_f64()),
        (&99.into(), &5.into(), Some(0.25))
    );
    assert!(body.get("max_tokens").is_none() && body["top_p"].as_f64() == Some(0.8));
    let rows: Vec<Value> = serde_json::from_slice(&std::fs::read(folder.path().join("outputs.json")).unwrap()).unwrap();
    assert_eq!((rows.len(), rows[0]["generator"].as_str()), (23, Some("tiny-student")));
    assert!(rows[0]["output"].as_str().unwrap().starts_with("Answer 1 to"));
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let row = |i: u32, generator: &str| format!(r#"{{"instruction":"i{i}","output":"o","generator":"{generator}"}}"#);
    let cases = [
        ("not json", "expected an output"),
        ("[]", "found no row"),
        ("[1, 2]", "row 0"),
        (&format!("[{},{}]", row(0, "a"), row(1, "b")), "row 1: expected outputs of one model, \"a\", found \"b\""),
        (&format!("[{},{}]", row(0, "a"), row(0, "a")), "found that of row 0 again"),
        (&row(0, "a"), "expected an output to the baseline's instruction 0, found none"),
    ];
    for (text, found) in cases {
        let config =
            alpaca::AlpacaEvalConfig { answers: AnswerSource::File(write("answers.json", text)), ..alpaca_eval(folder.path()) };
        let error = alpaca::outlook(&config).unwrap_err().to_string();
        assert!(error.contains(found) && error.contains("answers.json"), "{text}: {error}");
    }
    for (text, found) in [
        ("a,b\n", "instruction_difficulty"),
        ("index,instruction_difficulty\n0,1\n1,NaN\n", "line 3"),
        ("index,instruction_difficulty\n0,1\n0,2\n", "another one for 0"),
        ("index,instruction_difficulty\n0,1\n", "found none for 1"),
        ("index,instruction_difficulty\n0,1\n1,1\n2,1\n", "found one for 2"),
    ] {
        let error = difficulties(&write("d.csv", text), 2).unwrap_err().to_string();
        assert!(error.contains(found), "{text}: {error}");
    }
    // As pandas writes a series, and a table with a row for each of several models.
    assert_eq!(difficulties(&write("d.csv", ",instruction_difficulty\n1,-2.5\n0,1e-1\n"), 2).unwrap(), [0.1, -2.5]);
    assert_eq!(
        difficulties(&write("d.csv", "m,index,instruction_difficulty\nx,0,1\nx,1,2\ny,0,1\ny,1,2\n"), 2).unwrap(),
        [1.0, 2.0]
    );
}

#[test]
fn a_rate_far_from_the_plain_one_is_noticed() {
    // The rule's own examples: of 20, below 10 or above 40; of 50, below 37.5 or above 62.5.
    assert_eq!([9.9, 10.1, 39.9, 40.1].map(|x| is_extreme(20.0, x)), [true, false, false, true]);
    assert_eq!([37.4, 37.6, 62.4, 62.6].map(|x| is_extreme(50.0, x)), [true, false, false, true]);
}
