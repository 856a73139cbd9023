//! What the command line takes and refuses, through the binary: help, settings, exit codes, one sentence an error.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use assert_cmd::Command;
use std::path::Path;

/// The binary in `folder`, with none of our variables and no colours.
fn potstill(folder: &Path) -> Command {
    let mut command = Command::cargo_bin("potstill").expect("the binary is built");
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("POTSTILL_") {
            command.env_remove(name);
        }
    }
    command.current_dir(folder).env("NO_COLOR", "1").env_remove("RUST_BACKTRACE");
    command
}

/// Exit code, stdout, stderr.
fn run(command: &mut Command) -> (i32, String, String) {
    let output = command.output().expect("the binary runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code().expect("no signal"), text(output.stdout), text(output.stderr))
}

/// Runs with `arguments` and gives the code and stderr's `error:` line.
fn refused(folder: &Path, arguments: &[&str]) -> (i32, String) {
    let (code, out, err) = run(potstill(folder).args(arguments));
    assert_eq!(out, "", "a refused request prints no result");
    (code, err.lines().find(|line| line.starts_with("error: ")).unwrap_or(&err).to_string())
}

const VERBS: [&str; 8] = ["plan", "precompute", "inspect", "diff", "verify", "train", "merge", "demo"];

#[test]
fn help_of_every_verb_fits_and_shows_an_example() {
    let here = tempfile::tempdir().unwrap();
    for verb in VERBS {
        for flag in ["--help", "-h"] {
            let (code, out, _) = run(potstill(here.path()).args([verb, flag]));
            assert_eq!(code, 0);
            let widest = out.lines().max_by_key(|line| line.chars().count()).unwrap_or_default();
            assert!(widest.chars().count() <= 100, "{verb} {flag}: {widest:?}");
            assert!(out.contains(&format!("potstill {verb}")) && out.contains("Example"), "{out}");
        }
    }
}

#[test]
fn help_names_the_defaults() {
    let here = tempfile::tempdir().unwrap();
    let cases: [(&str, &[&str]); 4] = [
        (
            "precompute",
            &[
                "[default: standard]",
                "[default: the preset's]",
                "[default: 10]",
                "[default: 1024]",
                "[default: turns]",
                "[default: skip]",
                "compact cutoff, p >= 1e-5",
            ],
        ),
        (
            "train",
            &[
                "[default: distill]",
                "[default: 2e-4]",
                "[default: 16]",
                "[default: 0.3]",
                "[default: latest]",
                "[default: constant]",
            ],
        ),
        ("inspect", &["[default: 5]"]),
        ("demo", &["[default: potstill-demo, or"]),
    ];
    for (verb, defaults) in cases {
        let (_, out, _) = run(potstill(here.path()).args([verb, "--help"]));
        let out = out.split_whitespace().collect::<Vec<_>>().join(" ");
        for default in defaults {
            assert!(out.contains(default), "{verb}: {default} is not in {out}");
        }
        assert!(!out.contains("] [default:"), "{verb}: a default is named twice in {out}");
    }
}

#[test]
fn version_and_no_verb() {
    let here = tempfile::tempdir().unwrap();
    let (code, out, _) = run(potstill(here.path()).arg("--version"));
    assert_eq!((code, out), (0, format!("potstill {}\n", env!("CARGO_PKG_VERSION"))));
    let (code, out, err) = run(&mut potstill(here.path()));
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(VERBS.iter().all(|verb| err.contains(verb)), "{err}");
}

#[test]
fn unknown_flags_and_verbs_are_usage_errors() {
    let here = tempfile::tempdir().unwrap();
    let (code, error) = refused(here.path(), &["train", "--temprature", "2"]);
    assert_eq!(code, 2);
    assert!(error.contains("--temprature"), "{error}");
    assert_eq!(refused(here.path(), &["distil"]).0, 2);
    assert_eq!(refused(here.path(), &["inspect", "c", "--row", "1", "--key", "00"]).0, 2);
    assert_eq!(refused(here.path(), &["train", "--rank", "many"]).0, 2);
}

#[test]
fn an_unknown_key_is_refused_with_file_key_and_hint() {
    let here = tempfile::tempdir().unwrap();
    std::fs::write(here.path().join("run.toml"), "[train]\ntemprature = 2.0\n").unwrap();
    let (code, error) = refused(here.path(), &["train", "--config", "run.toml"]);
    assert_eq!((code, error.as_str()), (2, "error: run.toml: train.temprature: unknown setting; did you mean temperature?"));
    let (code, _, err) = run(potstill(here.path()).args(["merge"]).env("POTSTILL_MERGE__ADAPTR", "x"));
    assert_eq!((code, err.as_str()), (2, "error: POTSTILL_MERGE__ADAPTR: unknown setting; did you mean adapter?\n"));
}

/// The settings that `train` echoes on stderr before it starts; the folders do not exist, so it goes no further.
fn echoed(command: &mut Command) -> String {
    let (code, _, err) = run(command.args(["--student", "no-student", "--cache", "no-cache", "--out", "no-out"]));
    assert_ne!(code, 0);
    assert!(err.contains("[train]"), "{err}");
    err
}

#[test]
fn flags_win_over_variables_and_variables_over_the_file() {
    let here = tempfile::tempdir().unwrap();
    std::fs::write(here.path().join("run.toml"), "[train]\nlr = 1.0\nrank = 8\nseed = 1\n[precompute]\ntop_k = 3\n").unwrap();
    let train = || {
        let mut command = potstill(here.path());
        command.args(["train", "--config", "run.toml"]);
        command
    };
    let err = echoed(&mut train());
    assert!(err.contains("lr = 1.0\n") && err.contains("rank = 8\n") && err.contains("batch_size = 16\n"), "{err}");
    let err = echoed(train().env("POTSTILL_TRAIN__LR", "2e-1").env("POTSTILL_TRAIN__SHUFFLE", "false"));
    assert!(err.contains("lr = 0.2\n") && err.contains("rank = 8\n") && err.contains("shuffle = false\n"), "{err}");
    let err =
        echoed(train().env("POTSTILL_TRAIN__LR", "2").env("POTSTILL_TRAIN__SHUFFLE", "false").args(["--lr", "3", "--shuffle"]));
    assert!(err.contains("lr = 3.0\n") && err.contains("seed = 1\n") && err.contains("shuffle = true\n"), "{err}");
    let err = echoed(train().args(["--no-shuffle", "--resume", "never", "--objective", "distill+sft"]));
    assert!(err.contains("shuffle = false\n") && err.contains("objective = \"distill+sft\"\n"), "{err}");
    assert!(err.contains("resume = \"never\"\n"), "{err}");
}

#[test]
fn an_adapters_modules_are_a_list_or_text() {
    let here = tempfile::tempdir().unwrap();
    std::fs::write(here.path().join("text.toml"), "[train]\ntarget_modules = \"v_proj, q_proj\"\nrslora = true\n").unwrap();
    std::fs::write(here.path().join("list.toml"), "[train]\ntarget_modules = [\"q_proj\", \"v_proj\"]\ndropout = 0\n").unwrap();
    let echo = |more: &[&str]| echoed(potstill(here.path()).arg("train").args(more));
    let two = "target_modules = [\"q_proj\", \"v_proj\"]\n";
    for more in [&["--config", "text.toml"][..], &["--config", "list.toml"], &["--target-modules", "q_proj,v_proj"]] {
        assert!(echo(more).contains(two), "{more:?}");
    }
    for more in [&[][..], &["--config", "list.toml", "--target-modules", "all"]] {
        let err = echo(more);
        assert!(err.contains("target_modules = \"all\"\n") && err.contains("dropout = 0.0\n"), "{err}");
    }
    let rslora = |more: &[&str]| echo(&[&["--config", "text.toml"][..], more].concat()).contains("rslora = true\n");
    assert!(rslora(&[]) && !rslora(&["--no-rslora"]) && echo(&["--rslora"]).contains("rslora = true\n"));
}

/// The reference student's `config.json`, alone in a folder.
fn config_alone(folder: &Path) {
    let from = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/golden/student/config.json");
    std::fs::create_dir(folder.join("student")).unwrap();
    std::fs::copy(from, folder.join("student/config.json")).unwrap();
}

#[test]
fn a_dry_run_needs_no_more_than_a_config_and_writes_nothing() {
    let here = tempfile::tempdir().unwrap();
    config_alone(here.path());
    let dry = ["train", "--dry-run", "--student", "student", "--pack-tokens", "512", "--rank", "8"];
    let (code, out, err) = run(potstill(here.path()).args(dry).args(["--out", "runs/out"]));
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("PEAK ON THE DEVICE") && out.contains("packs of 512 tokens"), "{out}");
    assert!(out.lines().all(|line| line.chars().count() <= 80), "{out}");
    let (code, out, _) = run(potstill(here.path()).args(["--json"]).args(dry));
    assert_eq!(code, 0);
    let outlook: serde_json::Value = serde_json::from_str(&out).unwrap();
    // Two layers of 4 · 128² + 3 · 128 · 320 weights, and for each of the seven 8 · (in + out) trainable numbers.
    assert_eq!(outlook["memory"]["trainable"], 2 * 8 * (4 * 256 + 3 * 448));
    assert_eq!(
        (&outlook["memory"]["parts"][0]["name"], &outlook["memory"]["parts"][0]["bytes"]),
        (&"NF4 codes".into(), &188_416.into())
    );
    assert_eq!((&outlook["run"], &outlook["target_modules"]), (&serde_json::Value::Null, &"all".into()));
    let names: Vec<_> = std::fs::read_dir(here.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["student"], "nothing is written");

    let (code, error) = refused(here.path(), &["train", "--dry-run", "--cache", "gone"]);
    assert!(code == 2 && error.starts_with("error: student is not given"), "{error}");
    let (code, error) = refused(here.path(), &["train", "--dry-run", "--student", "student", "--cache", "gone"]);
    assert!(code == 1 && error.contains("gone: no such folder"), "{error}");
}

#[test]
fn a_switch_can_be_turned_off_again() {
    let here = tempfile::tempdir().unwrap();
    std::fs::write(here.path().join("run.toml"), "[precompute]\ncompat = true\n").unwrap();
    let echo = |more: &[&str]| {
        let base = ["precompute", "--config", "run.toml", "--teacher", "none", "--data", "none", "--cache", "none"];
        run(potstill(here.path()).args([&base[..], more].concat())).2
    };
    for (flags, compat) in
        [(&[][..], true), (&["--no-compat"], false), (&["--compat", "--no-compat"], false), (&["--no-compat", "--compat"], true)]
    {
        let err = echo(flags);
        assert!(err.contains(&format!("compat = {compat}\n")), "{flags:?}: {err}");
    }
}

#[test]
fn values_out_of_range_name_the_range() {
    let here = tempfile::tempdir().unwrap();
    let cases: [(&[&str], &str); 21] = [
        (&["train", "--lr", "0"], "--lr = 0.0: expected a finite number above 0"),
        (&["train", "--lr", "nan"], "--lr = nan: expected a finite number above 0"),
        (&["train", "--lr=-1e-4"], "--lr = -0.0001: expected a finite number above 0"),
        (&["train", "--alpha", "-1"], "--alpha = -1.0: expected a finite number above 0"),
        (&["train", "--temperature", "inf"], "--temperature = inf: expected a finite number above 0"),
        (&["train", "--rank", "1025"], "--rank = 1025: expected a whole number from 1 to 1024"),
        (&["train", "--tail", "zero"], "--tail = \"zero\": expected auto, bucket, ghost, renorm, studentfull, none"),
        (&["train", "--skew", "0"], "--skew = 0.0: expected a number above 0 and below 1"),
        (&["train", "--loss-schedule", "wsd"], "--loss-schedule = \"wsd\": expected constant, linear, cosine"),
        (&["train", "--objective", "kl"], "--objective = \"kl\": expected sft, distill, distill+sft"),
        (&["precompute", "--top-k", "0"], "--top-k = 0: expected a whole number from 1 to 65535"),
        (&["precompute", "--preset", "tiny"], "--preset = \"tiny\": expected exact, standard, compact, small, sampled"),
        (&["precompute", "--min-mass", "1"], "--min-mass = 1.0: expected a number above 0 and below 1"),
        (&["precompute", "--draws", "0"], "--draws = 0: expected a whole number from 1 to 65535"),
        (
            &["precompute", "--lse-temperatures", "2,-1"],
            "--lse-temperatures = [2.0, -1.0]: expected a list of finite numbers above 0",
        ),
        (&["train", "--min-prob", "0"], "--min-prob = 0.0: expected a number above 0 and below 1"),
        (&["precompute", "--device", "gpu"], "--device = \"gpu\": expected auto, cpu, cuda or cuda:N"),
        (&["train", "--dropout", "1"], "--dropout = 1.0: expected a number from 0 to below 1"),
        (
            &["train", "--target-modules", "q_proj,gate_prj"],
            "--target-modules = [\"q_proj\", \"gate_prj\"]: expected all, or some of q_proj, k_proj, v_proj, o_proj, gate_proj, \
             up_proj, down_proj; did you mean gate_proj?",
        ),
        (
            &["train", "--target-modules", "lm_head"],
            "--target-modules = [\"lm_head\"]: expected all, or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        ),
        (&["merge", "--dtype", "int8"], "--dtype = \"int8\": expected auto, f32, bf16, f16"),
    ];
    for (arguments, sentence) in cases {
        assert_eq!(refused(here.path(), arguments), (2, format!("error: {sentence}")), "{arguments:?}");
    }
}

#[test]
fn what_is_missing_is_said_with_every_way_to_give_it() {
    let here = tempfile::tempdir().unwrap();
    let (code, error) = refused(here.path(), &["precompute", "--cache", "c", "--data", "d"]);
    assert_eq!(code, 2);
    let all = "error: teacher is not given: use --teacher, or teacher in the table [precompute] of a --config file, or \
               POTSTILL_PRECOMPUTE__TEACHER";
    assert_eq!(error, all);
}

#[test]
fn a_cache_that_is_not_there_is_one_sentence() {
    let here = tempfile::tempdir().unwrap();
    std::fs::create_dir(here.path().join("empty")).unwrap();
    for verb in ["inspect", "verify"] {
        for (folder, what) in [("gone", "no such folder"), ("empty", "no manifest.json")] {
            let (code, out, err) = run(potstill(here.path()).args([verb, folder]));
            assert_eq!((code, out.as_str()), (1, ""), "{verb} {folder}: {err}");
            assert!(err.starts_with(&format!("error: {folder}: ")) && err.contains(what), "{err}");
            assert_eq!(err.lines().count(), 1, "{err}");
        }
    }
}

#[test]
fn the_demo_leaves_other_peoples_folders_alone() {
    let here = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(here.path().join("mine/cache")).unwrap();
    let (code, error) = refused(here.path(), &["demo", "--out", "mine"]);
    assert_eq!((code, error.as_str()), (2, "error: mine: holds something that no demo made; name a new folder with --out"));
    assert!(here.path().join("mine/cache").is_dir());
}

#[test]
fn text_from_outside_cannot_act_on_the_terminal() {
    let here = tempfile::tempdir().unwrap();
    let (code, error) = refused(here.path(), &["inspect", "\u{1b}[31mred\u{202e}"]);
    assert_eq!(code, 1);
    assert!(error.starts_with("error: \\u{1b}[31mred\\u{202e}: "), "{error}");
}
