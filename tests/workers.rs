//! Many processes over one data, each without knowledge of the others: what they write becomes the cache of a single run.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::collections::BTreeMap;
use std::process::Stdio;
use support::{Bench, Ran, files, golden, precompute, wait_for};

/// Arguments of one worker.
fn worker<'a>(folder: &'a str, share: &'a str) -> Vec<&'a str> {
    [precompute(folder), vec!["--worker", share]].concat()
}

/// A run with the variables of an engine, and with none that this test's own engine may have set.
fn under(bench: &Bench, arguments: &[&str], variables: &[(&str, &str)]) -> Ran {
    let mut command = bench.command(arguments);
    for (name, _) in std::env::vars() {
        if name.starts_with("SLURM_") || name.starts_with("SKYPILOT_") || name.starts_with("JOB_COMPLETION") {
            command.env_remove(name);
        }
    }
    command.env_remove("RANK").env_remove("WORLD_SIZE").envs(variables.iter().copied());
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap_or(-1), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// What differs between a folder's files and these.
fn differing(found: &BTreeMap<String, Vec<u8>>, expected: &BTreeMap<String, Vec<u8>>) -> Vec<String> {
    let names = found.keys().chain(expected.keys());
    names.filter(|name| found.get(*name) != expected.get(*name)).cloned().collect()
}

#[test]
fn any_number_of_workers_makes_the_cache_of_a_single_run() {
    let bench = Bench::new();
    bench.cache("whole");
    let whole = files(&bench.path("whole"));
    // The data make five shards; of eight workers three have nothing to do.
    for of in [1, 2, 3, 4, 5, 8] {
        let (parts, all) = (format!("parts-{of}"), format!("all-{of}"));
        let mut idle = 0;
        for index in (0..of).rev() {
            let ran = bench.expect(0, &worker(&parts, &format!("{index}/{of}")));
            let folder = format!("{parts}/worker-{index:05}-of-{of:05}");
            assert!(ran.stdout.contains(&folder) && ran.stdout.contains("skipped"), "{ran:?}");
            assert!(ran.stdout.lines().all(|line| line.chars().count() <= 80), "{}", ran.stdout);
            let nothing = ran.stdout.contains("nothing to do: the data make fewer shards than there are shares,");
            assert_eq!(nothing, !bench.path(&folder).join("shard-00000.parquet").exists(), "{ran:?}");
            idle += usize::from(nothing);
            bench.expect(0, &["verify", &folder, "--quiet"]);
        }
        assert_eq!(idle, if of == 8 { 3 } else { 0 });
        bench.expect(0, &["combine", "--out", &all, &parts, "--quiet"]);
        assert_eq!(differing(&files(&bench.path(&all)), &whole), [""; 0], "{of} workers");
    }
    // The parts by name, in any order, and parts chosen by hand, are the same.
    let names: Vec<String> = [2, 0, 1].map(|index| format!("parts-3/worker-{index:05}-of-00003")).to_vec();
    let mut arguments = vec!["combine", "--out", "by-name", "--quiet"];
    arguments.extend(names.iter().map(String::as_str));
    bench.expect(0, &arguments);
    assert_eq!(differing(&files(&bench.path("by-name")), &whole), [""; 0]);
    for number in ["1/3", "2/3", "3/3"] {
        bench.expect(3, &[precompute(&format!("part-{}", &number[..1])), vec!["--part", number]].concat());
    }
    let part = files(&bench.path("part-2"));
    assert_eq!(differing(&part, &files(&bench.path("parts-3/worker-00001-of-00003"))), [""; 0]);
}

#[test]
fn a_worker_is_killed_and_started_again_and_nobody_else_notices() {
    let bench = Bench::new();
    bench.cache("whole");
    bench.expect(0, &worker("parts", "1/2"));
    let before = files(&bench.path("parts"));
    let folder = "parts/worker-00000-of-00002";
    let mut child = bench.command(&worker("parts", "0/2")).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    assert!(wait_for(&mut child, &bench.path(folder).join("shard-00000.parquet")), "the run was over before it was killed");
    child.kill().unwrap();
    child.wait().unwrap();
    let refused = bench.run(&["combine", "--out", "early", "parts"]);
    let sentence = refused.error();
    assert!(sentence.starts_with("parts: not all parts of 2 workers are finished: worker 0 has "), "{sentence}");
    assert!(sentence.ends_with(" of 16 rows; run the command of these workers again"), "{sentence}");
    assert_eq!(refused.code, 2);
    assert!(!bench.path("early").exists());

    bench.expect(0, &worker("parts", "0/2"));
    let mut after = files(&bench.path("parts"));
    after.retain(|name, _| name.starts_with("worker-00001"));
    assert_eq!(differing(&after, &before), [""; 0]);
    bench.expect(0, &["combine", "--out", "all", "parts", "--quiet"]);
    assert_eq!(differing(&files(&bench.path("all")), &files(&bench.path("whole"))), [""; 0]);

    // Each holds the lock of its own part alone.
    let lock = std::fs::File::options().write(true).open(bench.path(folder).join("cache.lock")).unwrap();
    lock.lock().unwrap();
    assert_eq!(bench.run(&worker("parts", "0/2")).code, 5);
    bench.expect(0, &worker("parts", "1/2"));
}

#[test]
fn a_worker_that_is_told_its_time_is_nearly_up_stops_and_says_75() {
    let bench = Bench::new();
    // As many chats, ten times, each time as other texts: long enough to be stopped within.
    let chats = std::fs::read_to_string(golden("chats.jsonl")).unwrap();
    let copy = |n: u32| chats.replace("\"content\": \"", &format!("\"content\": \"{n}. "));
    std::fs::write(bench.path("long.jsonl"), (0..10).map(copy).collect::<String>()).unwrap();
    for signal in ["-USR1", "-TERM"] {
        let parts = format!("parts{signal}");
        let mut arguments: Vec<&str> = worker(&parts, "0/1");
        let of = |arguments: &[&str], flag: &str| 1 + arguments.iter().position(|argument| *argument == flag).unwrap();
        let (data, pack_tokens) = (of(&arguments, "--data"), of(&arguments, "--pack-tokens"));
        (arguments[data], arguments[pack_tokens]) = ("long.jsonl", "1");
        arguments.extend(["--seal-minutes", "0"]);
        let mut child = bench.command(&arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        assert!(wait_for(&mut child, &bench.path(&parts).join("worker-00000-of-00001/part-00000-000.parquet")));
        assert!(std::process::Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(75), "{stderr}");
        assert!(stderr.contains(" of 380 rows are durable; run the same command again"), "{stderr}");
    }
}

#[test]
fn the_engine_says_which_worker_this_is() {
    let bench = Bench::new();
    let auto: Vec<&str> = worker("parts", "auto").into_iter().filter(|argument| *argument != "--quiet").collect();
    let outside = under(&bench, &auto, &[]);
    assert_eq!(outside.code, 2);
    assert!(outside.error().starts_with("worker = auto: no engine says which worker this is; looked for SLURM_"), "{outside:?}");
    assert!(!bench.path("parts").exists());

    let torchrun = [("RANK", "1"), ("WORLD_SIZE", "5")];
    let ran = under(&bench, &auto, &torchrun);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.stderr.starts_with("worker 1 of 5, by RANK=1, WORLD_SIZE=5\n"), "{}", ran.stderr);
    assert!(ran.stderr.contains("worker = \"1/5\"") && ran.stderr.contains("cache = \"parts\""), "{}", ran.stderr);
    assert!(bench.path("parts/worker-00001-of-00005/manifest.json").exists());

    // A setting like any other: the variable asks for the engine's word, a flag wins over it.
    let kubernetes = [("JOB_COMPLETION_INDEX", "3"), ("POTSTILL_PRECOMPUTE__WORKER", "auto/5")];
    let ran = under(&bench, &[precompute("parts"), vec!["--json"]].concat(), &kubernetes);
    assert_eq!((ran.code, ran.json()["rows"].as_u64()), (0, Some(8)), "{ran:?}");
    let ran = under(&bench, &[precompute("parts"), vec!["--worker", "4/5", "--json"]].concat(), &kubernetes);
    assert_eq!((ran.code, ran.json()["rows"].as_u64()), (0, Some(7)), "{ran:?}");
    assert_eq!(std::fs::read_dir(bench.path("parts")).unwrap().count(), 3);

    let ran = under(&bench, &worker("parts", "auto"), &[("SLURM_ARRAY_TASK_ID", "1"), ("RANK", "0"), ("WORLD_SIZE", "5")]);
    assert_eq!(ran.code, 2, "half of an array: {ran:?}");
}

#[test]
fn what_cannot_be_meant_is_refused_before_anything_is_read() {
    let bench = Bench::new();
    let refused = bench.run(&[worker("parts", "1/3"), vec!["--part", "2/3"]].concat());
    let expected = "worker = 1/3: expected no part beside it (part = 2/3): both say which share of the data is scored";
    assert_eq!((refused.code, refused.error()), (2, expected));
    let refused = bench.run(&worker("parts", "3/3"));
    let expected = "--worker = \"3/3\": expected I/N with I from 0 to N - 1, auto, or auto/N";
    assert_eq!((refused.code, refused.error()), (2, expected));

    // One task submitted alone would be all of an array of one: another number of workers than the folder has.
    bench.expect(0, &worker("parts", "1/3"));
    let refused = bench.run(&worker("parts", "0/1"));
    let expected = "worker = 0/1: expected one of 3 workers, for parts/worker-00001-of-00003 is there already; \
                    go on with as many, or give another --cache";
    assert_eq!((refused.code, refused.error()), (2, expected));
    let refused = bench.run(&worker("parts/worker-00001-of-00003", "0/3"));
    assert_eq!((refused.code, refused.error().ends_with("expected a folder for the workers' parts, not a cache")), (2, true));
    let refused = bench.run(&precompute("parts"));
    assert_eq!(refused.code, 2);
    assert!(refused.error().ends_with("it is a folder of workers' parts: give --worker too, or another folder"), "{refused:?}");

    let refused = bench.run(&["combine", "--out", "all", "parts"]);
    let expected = "parts: not all parts of 3 workers are finished: worker 0 has not begun, worker 2 has not begun; \
                    run the command of these workers again";
    assert_eq!((refused.code, refused.error()), (2, expected));
    for verb in ["verify", "inspect"] {
        let refused = bench.run(&[verb, "parts"]);
        let expected = "parts: holds workers' parts and is no cache itself; join them first: combine --out OUT parts";
        assert_eq!((refused.code, refused.error()), (2, expected), "{verb}");
    }
}
