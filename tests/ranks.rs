//! Several processes that train together: settings from the environment, a kill, a stop, and what each of them says.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use support::{Bench, Ran, STUDENT, files, wait_for};

const VARIABLES: [&str; 6] = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE"];

fn train<'a>(out: &'a str, steps: &'a str) -> Vec<&'a str> {
    let mut arguments = vec!["train", "--student", STUDENT.as_str(), "--cache", "cache", "--out", out, "--steps", steps];
    arguments.extend([
        "--lr",
        "2e-3",
        "--rank",
        "4",
        "--batch-size",
        "4",
        "--checkpoint-every",
        "2",
        "--dropout",
        "0.1",
        "--quiet",
    ]);
    arguments.extend(["--eval-rows", "3", "--eval-every", "4", "--no-tensorboard"]);
    arguments
}

fn rank(bench: &Bench, arguments: &[&str], rank: u32, of: u32, port: &str) -> Command {
    let mut command = bench.command(arguments);
    for name in VARIABLES {
        command.env_remove(name);
    }
    command.env("RANK", rank.to_string()).env("WORLD_SIZE", of.to_string());
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Ranks under way, the first of which has told its port.
fn started(bench: &Bench, of: u32, arguments: impl Fn(u32) -> Vec<String>) -> Vec<Child> {
    started_in(bench, of, arguments, |_, _| ())
}

/// The same, each with what is changed in its environment.
fn started_in(
    bench: &Bench,
    of: u32,
    arguments: impl Fn(u32) -> Vec<String>,
    environment: impl Fn(u32, &mut Command),
) -> Vec<Child> {
    let start = |number: u32, port: &str| {
        let arguments = arguments(number);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut command = rank(bench, &arguments, number, of, port);
        environment(number, &mut command);
        command.spawn().unwrap()
    };
    let mut first = start(0, "0");
    let mut stderr = BufReader::with_capacity(1, first.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    let port = line.trim().rsplit(':').next().unwrap().to_string();
    assert_eq!(line, format!("rank 0 of {of}, by RANK and WORLD_SIZE; rank 0 at 127.0.0.1:{port}\n"));
    first.stderr = Some(stderr.into_inner());
    std::iter::once(first).chain((1..of).map(|rank| start(rank, &port))).collect()
}

fn ended(mut child: Child) -> Ran {
    let (mut stdout, mut stderr) = (String::new(), String::new());
    child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    Ran { code: child.wait().unwrap().code().unwrap_or(-1), stdout, stderr }
}

fn all(of: u32, bench: &Bench, out: &str, steps: &str) -> Vec<Ran> {
    let own = |_| train(out, steps).into_iter().map(String::from).collect();
    started(bench, of, own).into_iter().map(ended).collect()
}

/// The numbers of a finished run of so many steps.
fn outcome(bench: &Bench, out: &str, steps: u64) -> [Vec<u8>; 3] {
    let all = files(&bench.path(out));
    let checkpoint = format!("checkpoint-{steps}");
    [
        "adapter/adapter_model.safetensors".to_string(),
        format!("{checkpoint}/optimizer.safetensors"),
        "best/evaluation.json".into(),
    ]
    .map(|name| all[&name].clone())
}

#[test]
fn ranks_are_processes_that_end_as_one() {
    let bench = Bench::new();
    bench.cache("cache");
    let ran = all(3, &bench, "whole", "12");
    assert!(ran.iter().all(|ran| ran.code == 0), "{ran:?}");
    // The first alone reports; all say who they are, though asked to be quiet.
    assert!(ran[0].stdout.lines().any(|line| line.starts_with("ranks") && line.ends_with(" 3")), "{ran:?}");
    assert!(ran[1..].iter().all(|ran| ran.stdout.is_empty() && ran.stderr.starts_with("rank ")), "{ran:?}");
    let whole = outcome(&bench, "whole", 12);

    // One is killed: the others end, and all of them go on from the checkpoint.
    for (victim, out) in [(2, "cut"), (0, "led")] {
        let mut ranks = started(&bench, 3, |_| train(out, "1000000").into_iter().map(String::from).collect());
        assert!(wait_for(&mut ranks[0], &bench.path(out).join("checkpoint-4")));
        ranks[victim].kill().unwrap();
        let ran: Vec<Ran> = ranks.into_iter().map(ended).collect();
        for (rank, ran) in ran.iter().enumerate().filter(|(rank, _)| *rank != victim) {
            let gone = format!("rank {victim} is gone: it has closed the connection; ");
            assert!(ran.code == 1 && ran.error().contains(&gone), "rank {rank}: {ran:?}");
        }
    }
    let of = |name: &String| name.strip_prefix("checkpoint-")?.split('/').next()?.parse::<u64>().ok();
    let end = files(&bench.path("cut")).keys().filter_map(of).max().unwrap() + 2;
    for out in ["cut", "other"] {
        assert!(all(3, &bench, out, &end.to_string()).iter().all(|ran| ran.code == 0));
    }
    assert_eq!(outcome(&bench, "cut", end), outcome(&bench, "other", end));

    // A signal to one is a stop of all.
    let mut ranks = started(&bench, 3, |_| train("stopped", "1000000").into_iter().map(String::from).collect());
    assert!(wait_for(&mut ranks[0], &bench.path("stopped/checkpoint-2")));
    let pid = ranks[1].id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let ran: Vec<Ran> = ranks.into_iter().map(ended).collect();
    assert!(ran.iter().all(|other| other.code == 75 && other.error() == ran[0].error()), "{ran:?}");
    assert!(ran[0].error().contains("stopped by a signal; checkpoint-"), "{ran:?}");

    // Another setting at one ends all, and the same command with one process is another run.
    let wrong = |rank| [train("wrong", "4"), if rank == 1 { vec!["--seed", "7"] } else { Vec::new() }].concat();
    let ran: Vec<Ran> =
        started(&bench, 2, |rank| wrong(rank).into_iter().map(String::from).collect()).into_iter().map(ended).collect();
    assert!(ran.iter().all(|ran| ran.code == 6 && ran.error().contains("seed: rank 0 has 42, it has 7")), "{ran:?}");
    let mut one = bench.command(&train("whole", "14"));
    for name in VARIABLES {
        one.env_remove(name);
    }
    let one = one.env("WORLD_SIZE", "1").output().unwrap();
    assert_eq!(one.status.code(), Some(6), "{one:?}");
    assert_eq!(outcome(&bench, "whole", 12), whole);
}

#[test]
fn variables_that_do_not_fit_are_named_and_a_worker_is_no_rank() {
    let bench = Bench::new();
    let mut command = rank(&bench, &train("run", "4"), 2, 2, "1");
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        (output.status.code(), said.as_str()),
        (Some(2), "error: RANK = 2: expected a rank from 0 to below WORLD_SIZE = 2\n")
    );
    // The same variables mean a worker to `precompute`, where it is asked to read them, and nothing where it is not.
    for (name, worker) in [("parts", true), ("whole", false)] {
        let arguments = [support::precompute(name), if worker { vec!["--worker", "auto"] } else { Vec::new() }].concat();
        let output = rank(&bench, &arguments, 0, 2, "1").output().unwrap();
        assert_eq!(output.status.code(), Some(if worker { 0 } else { 3 }), "{output:?}");
        assert_eq!(bench.path(name).join("worker-00000-of-00002").is_dir(), worker);
    }
}

/// Gradients from GPU to GPU, each process with an emulated one: `scripts/test-cuda-emulated.sh` runs this.
#[cfg(feature = "cuda")]
#[test]
fn nccl_adds_up_what_tcp_does_and_is_given_up_when_a_rank_dies() {
    // No setting of the program's, which would refuse it.
    const ON_A_GPU: &str = "POTSTILL_TEST_DEVICE";
    if std::env::var_os(ON_A_GPU).is_none() {
        return;
    }
    let bench = Bench::new();
    let cache = [support::precompute("cache"), vec!["--device", "cpu"]].concat();
    assert_eq!(bench.command(&cache).env_remove(ON_A_GPU).output().unwrap().status.code(), Some(3));
    let run = |out: &str, backend: &str, dies: Option<(u32, &str)>| -> Vec<Ran> {
        let mut arguments = vec!["train", "--student", STUDENT.as_str(), "--cache", "cache", "--out", out, "--steps", "4"];
        arguments.extend(["--batch-size", "2", "--rank", "2", "--checkpoint-every", "0", "--device", "cuda"]);
        arguments.extend(["--dist-backend", backend, "--no-tensorboard", "--quiet"]);
        let environment = |rank: u32, command: &mut Command| {
            command.env_remove(ON_A_GPU);
            if let Some((_, group)) = dies.filter(|(victim, _)| *victim == rank) {
                command.env("EMULATED_NCCL_DIES_IN", group);
            }
        };
        let own = |_| arguments.iter().map(|argument| argument.to_string()).collect();
        started_in(&bench, 2, own, environment).into_iter().map(ended).collect()
    };
    let numbers = |out: &str| {
        let all = files(&bench.path(out));
        ["adapter/adapter_model.safetensors", "checkpoint-4/optimizer.safetensors"].map(|name| all[name].clone())
    };
    for backend in ["tcp", "nccl"] {
        let ran = run(backend, backend, None);
        assert!(ran.iter().all(|ran| ran.code == 0), "{ran:?}");
        assert_eq!(ran[0].stdout.contains("2, gradients by NCCL "), backend == "nccl", "{ran:?}");
    }
    assert_eq!(numbers("tcp"), numbers("nccl"));
    // One process alone goes that way too.
    let mut alone = vec!["train", "--student", STUDENT.as_str(), "--cache", "cache", "--out", "alone", "--steps", "2"];
    alone.extend(["--batch-size", "2", "--rank", "2", "--device", "cuda", "--dist-backend", "nccl", "--quiet"]);
    let mut alone = bench.command(&alone);
    VARIABLES.iter().for_each(|name| _ = alone.env_remove(name));
    let died = alone.env_remove(ON_A_GPU).env("EMULATED_NCCL_DIES_IN", "2").output().unwrap();
    assert!(died.status.code().is_none() && bench.path("alone").is_dir(), "{died:?}");
    assert_eq!(alone.env_remove("EMULATED_NCCL_DIES_IN").output().unwrap().status.code(), Some(0));
    for victim in [0, 1] {
        let out = format!("cut-{victim}");
        let ran = run(&out, "nccl", Some((victim, "3")));
        let left = &ran[1 - victim as usize];
        let gone = format!("rank {victim} is gone: it has closed the connection; ");
        assert!(left.code == 1 && left.error().contains(&gone), "{ran:?}");
        // Rank 0 keeps the two steps before.
        assert_eq!(bench.path(&out).join("checkpoint-2").is_dir(), victim == 1);
        assert!(run(&out, "nccl", None).iter().all(|ran| ran.code == 0));
        assert_eq!(numbers(&out), numbers("tcp"));
    }
}

/// Where nothing can be added up by NCCL that is said before anything is done.
#[test]
fn nccl_needs_gpus() {
    let bench = Bench::new();
    bench.cache("cache");
    let ran = bench.run(&[train("run", "4"), vec!["--device", "cpu", "--dist-backend", "nccl"]].concat());
    assert!(ran.code == 2 && ran.error().starts_with("dist_backend = nccl: NCCL adds up on NVIDIA GPUs, and "), "{ran:?}");
    let ran = bench.run(&[train("run", "4"), vec!["--dist-backend", "gloo"]].concat());
    assert!(ran.code == 2 && ran.error().starts_with("--dist-backend = \"gloo\": expected "), "{ran:?}");
    assert!(!bench.path("run").exists());
}
