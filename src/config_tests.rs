//! Tests of the layering: who wins, and what is said about what is wrong.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::settings::{PRECOMPUTE, TRAIN};
use potstill_pipeline::precompute::PrecomputeConfig;
use potstill_pipeline::train::{Objective, Resume, TrainConfig};

const PATHS: &str = "student = \"s\"\ncache = \"c\"\nout = \"o\"\n";

/// Sources with a file of this text, these variables and these flags.
fn sources(file: &str, variables: &[(&str, &str)], flags: &str) -> (tempfile::TempDir, Sources) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("run.toml");
    std::fs::write(&path, file).expect("a small file");
    let variables = variables.iter().map(|(k, v)| (k.into(), v.into())).collect();
    (folder, Sources { file: Some(path), variables, flags: flags.parse().expect("TOML") })
}

fn train(file: &str, variables: &[(&str, &str)], flags: &str) -> Result<TrainConfig, String> {
    let (_folder, sources) = sources(file, variables, flags);
    resolve(&TRAIN, &sources).map_err(|e| e.0)
}

#[test]
fn later_places_win() {
    let file = format!("[train]\n{PATHS}lr = 1.0\nrank = 8\nseed = 1\nobjective = \"distill+sft\"");
    let got = train(&file, &[("POTSTILL_TRAIN__LR", "2"), ("POTSTILL_TRAIN__RANK", "16")], "lr = 3.0").expect("good");
    assert_eq!((got.lr, got.rank, got.seed), (3.0, 16, 1));
    assert_eq!(got.objective, Objective::DistillSft);
    assert_eq!(got.temperature, TrainConfig::default().temperature);
    assert_eq!(got.student, PathBuf::from("s"));
}

#[test]
fn optional_settings_stay_absent_and_can_be_given() {
    let got = train(&format!("[train]\n{PATHS}"), &[], "").expect("good");
    assert_eq!((got.steps, got.kd_alpha), (None, None));
    let got = train(&format!("[train]\n{PATHS}steps = 7\nkd_alpha = 1"), &[], "").expect("good");
    assert_eq!((got.steps, got.kd_alpha), (Some(7), Some(1.0)));
}

#[test]
fn resume_is_a_word_or_a_folder() {
    for (text, expected) in
        [("latest", Resume::Latest), ("never", Resume::Never), ("runs/checkpoint-3", Resume::Path("runs/checkpoint-3".into()))]
    {
        let got = train(&format!("[train]\n{PATHS}"), &[("POTSTILL_TRAIN__RESUME", text)], "").expect("good");
        assert_eq!(got.resume, expected);
    }
}

#[test]
fn what_is_echoed_can_be_read_back() {
    let config = TrainConfig {
        student: "a b".into(),
        cache: "c".into(),
        out: "o".into(),
        steps: Some(3),
        resume: Resume::Path("x".into()),
        ..TrainConfig::default()
    };
    let text = to_toml(&TRAIN, &config).expect("plain data");
    assert_eq!(train(&text, &[], "").expect("good"), config);
}

#[test]
fn unknown_names_are_refused_with_the_nearest_one() {
    let error = train("[train]\ntemprature = 2", &[], "").expect_err("unknown");
    assert!(error.ends_with("run.toml: train.temprature: unknown setting; did you mean temperature?"), "{error}");
    let error = train("[precompute]\ntopk = 2", &[], "").expect_err("unknown, in another table");
    assert!(error.ends_with("precompute.topk: unknown setting; did you mean top_k?"), "{error}");
    let error = train("[trian]", &[], "").expect_err("unknown table");
    assert!(error.ends_with("trian: unknown setting; did you mean train?"), "{error}");
    let error = train("", &[("POTSTILL_TRAIN__LRR", "1")], "").expect_err("unknown variable");
    assert_eq!(error, "POTSTILL_TRAIN__LRR: unknown setting; did you mean lr?");
    let error = train("", &[("POTSTILL_CUDA_LIBRARY", "x")], "").expect_err("no setting");
    assert_eq!(error, "POTSTILL_CUDA_LIBRARY: expected POTSTILL_VERB__SETTING, with two underscores between verb and setting");
    let error = train("", &[("POTSTILL_CUDA_LIBRARIES", "x"), ("POTSTILL_CUDA_PROFILE", "1")], "").expect_err("no student");
    assert!(error.starts_with("student is not given"), "{error}");
    let error = train("[train]\nzzzzzz = 1", &[], "").expect_err("far from everything");
    assert!(error.contains("unknown setting; known are student, cache, data"), "{error}");
}

#[test]
fn values_out_of_range_name_place_value_and_range() {
    let error = train("[train]\nlr = -1.0", &[], "").expect_err("negative");
    assert!(error.ends_with("run.toml: train.lr = -1.0: expected a finite number above 0"), "{error}");
    let error = train("", &[("POTSTILL_TRAIN__RANK", "2000")], "").expect_err("too high");
    assert_eq!(error, "POTSTILL_TRAIN__RANK = 2000: expected a whole number from 1 to 1024");
    let error = train("", &[], "temperature = nan").expect_err("not a number");
    assert_eq!(error, "--temperature = nan: expected a finite number above 0");
    let error = train("", &[], "keep_checkpoints = 1").expect_err("too few");
    assert_eq!(error, "--keep-checkpoints = 1: expected a whole number from 2 to 1048576");
}

#[test]
fn a_missing_path_says_all_three_ways_to_give_it() {
    let error = train("[train]\ncache = \"c\"\nout = \"o\"", &[], "").expect_err("no student");
    let expected =
        "student is not given: use --student, or student in the table [train] of a --config file, or POTSTILL_TRAIN__STUDENT";
    assert_eq!(error, expected);
}

#[test]
fn chats_take_the_place_of_a_cache() {
    let got = train("[train]\nstudent = \"s\"\nout = \"o\"\ndata = \"chats.jsonl\"", &[], "").expect("good");
    assert_eq!((got.cache, got.data), (PathBuf::new(), vec![PathBuf::from("chats.jsonl")]));
    let neither = train("[train]\nstudent = \"s\"\nout = \"o\"", &[], "").expect("a matter of the stage");
    let error = neither.check_rows().expect_err("nothing to train on").to_string();
    assert_eq!(
        error,
        "neither cache nor data is given: expected either a cache (--cache) or, for --objective sft, chats (--data)"
    );
    for (settings, words) in [
        ("cache = \"c\"", "both cache and data are given"),
        ("objective = \"distill\"", "objective = distill: expected sft with data"),
        ("kd_alpha = 0.5", "kd_alpha = 0.5: expected no such setting with data"),
        ("top_k = 8", "top_k = 8: expected no such setting with data"),
    ] {
        let objective = if settings.starts_with("objective") { "" } else { "objective = \"sft\"\n" };
        let file = format!("[train]\nstudent = \"s\"\nout = \"o\"\ndata = [\"x\"]\n{objective}{settings}");
        let error = train(&file, &[], "").expect("well-formed").check_rows().expect_err(settings).to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn every_recipe_is_read_as_it_is_meant() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("pipeline/recipes");
    let mut read = Vec::new();
    for entry in std::fs::read_dir(folder).expect("the recipes") {
        let path = entry.expect("a recipe").path();
        let text = std::fs::read_to_string(&path).expect("a small file");
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let stage_one: PrecomputeConfig = recipe(&PRECOMPUTE, &name, &text).expect("settings of stage one");
        let config: TrainConfig = recipe(&TRAIN, &name, &text).expect("settings of stage two");
        config.check_schedule().expect("a schedule that holds together");
        let loss = config.loss_settings().expect("a loss that holds together");
        let Some(arm) = name.strip_prefix("qwen1.5-14b-") else {
            assert_eq!(name, "tiny");
            continue;
        };
        let original = (64, 16.0, 2e-4, 100, 0.3, 16);
        let here = (config.rank, config.alpha, config.lr, config.warmup_steps, config.max_grad_norm, config.batch_size);
        assert_eq!(here, original, "{name}");
        assert_eq!((loss.kd_alpha > 0.0, loss.kd_ce_alpha > 0.0), (arm != "sft", arm != "distill"), "{name}");
        assert_eq!(if arm == "sft" { config.max_length } else { stage_one.max_length }, if arm == "sft" { 2048 } else { 1024 });
        read.push(config.objective.to_string());
    }
    read.sort();
    assert_eq!(read, ["distill", "distill+sft", "sft"]);
    let error = recipe::<TrainConfig>(&TRAIN, "a.toml", "[train]\nlearning_rate = 1").expect_err("a typo").0;
    assert!(error.starts_with("a.toml: train.learning_rate: unknown setting"), "{error}");
}

#[test]
fn broken_files_name_the_line() {
    let error = train("[train]\nlr = 1\nlr == 2", &[], "").expect_err("not TOML");
    assert!(error.contains("run.toml: line 3: "), "{error}");
    assert!(!error.contains('\n'));
    let gone = Sources { file: Some("no/such.toml".into()), variables: vec![], flags: Table::new() };
    let error = resolve::<TrainConfig>(&TRAIN, &gone).expect_err("no file").0;
    assert!(error.starts_with("no/such.toml: "), "{error}");
}

#[test]
fn one_path_is_a_list_of_one() {
    let (_folder, sources) = sources("[precompute]\nteacher = \"t\"\ncache = \"c\"\ndata = \"x.jsonl\"", &[], "");
    let got: PrecomputeConfig = resolve(&PRECOMPUTE, &sources).expect("good");
    assert_eq!(got.data, [PathBuf::from("x.jsonl")]);
}
