//! Ranks as threads of one process, over the same sockets as between machines.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::link::Patience;
use super::message::{CHUNK, Message};
use super::*;
use crate::train::{self, Objective, TrainConfig, TrainReport};
use candle_core::Device;
use potstill_cache::ErrorClass;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

#[cfg(feature = "cuda")]
#[path = "nccl_tests.rs"]
mod nccl;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden");

fn place(rank: u32, of: u32, port: u16) -> Place {
    Place { rank, of, host: "127.0.0.1".into(), port }
}

fn port(meeting: &Meeting) -> u16 {
    meeting.address().rsplit(':').next().unwrap().parse().unwrap()
}

/// Does `work` as each of `of` ranks.
fn together<T: Send>(of: u32, work: impl Fn(Ranks, &RunContext) -> T + Sync, contexts: &[RunContext]) -> Vec<T> {
    let first = Meeting::open(place(0, of, 0)).unwrap();
    let port = port(&first);
    let mut meetings = vec![first];
    meetings.extend((1..of).map(|rank| Meeting::open(place(rank, of, port)).unwrap()));
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = meetings
            .into_iter()
            .zip(contexts)
            .map(|(meeting, context)| scope.spawn(move || work(meeting.meet(context).unwrap(), context)))
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn contexts(of: u32) -> Vec<RunContext> {
    (0..of).map(|_| RunContext::default()).collect()
}

fn config(out: &Path) -> TrainConfig {
    TrainConfig {
        student: Path::new(GOLDEN).join("student"),
        data: vec![Path::new(GOLDEN).join("chats.jsonl")],
        out: out.to_path_buf(),
        objective: Objective::Sft,
        max_length: 48,
        steps: Some(4),
        batch_size: 5,
        pack_tokens: 64,
        lr: 2e-3,
        warmup_steps: 0,
        rank: 2,
        dropout: 0.2,
        checkpoint_every: 2,
        tensorboard: false,
        ..TrainConfig::default()
    }
}

/// Trains as so many ranks, each with the settings that are given for it.
fn train(of: u32, config: impl Fn(u32) -> TrainConfig + Sync, contexts: &[RunContext]) -> Vec<Result<TrainReport>> {
    together(of, |ranks, context| train::run_as(&config(ranks.rank()), &ranks, context), contexts)
}

fn trained(of: u32, config: &TrainConfig) -> Vec<TrainReport> {
    train(of, |_| config.clone(), &contexts(of)).into_iter().map(Result::unwrap).collect()
}

fn file(out: &Path, name: &str) -> Vec<u8> {
    std::fs::read(out.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Everything of the finished adapter and the last checkpoint that is numbers.
fn numbers(out: &Path, step: u64) -> [Vec<u8>; 2] {
    [file(out, "adapter/adapter_model.safetensors"), file(out, &format!("checkpoint-{step}/optimizer.safetensors"))]
}

/// Losses of the steps, as they stand in metrics.jsonl.
fn losses(out: &Path) -> Vec<f64> {
    let lines = String::from_utf8(file(out, "metrics.jsonl")).unwrap();
    lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64().unwrap()).collect()
}

fn values(out: &Path) -> Vec<f32> {
    let tensors = candle_core::safetensors::load(out.join("adapter/adapter_model.safetensors"), &Device::Cpu).unwrap();
    let mut names: Vec<_> = tensors.keys().collect();
    names.sort();
    names.into_iter().flat_map(|name| tensors[name].flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
}

#[test]
fn ranks_train_what_one_process_trains() {
    let dir = tempfile::tempdir().unwrap();
    let alone = config(&dir.path().join("alone"));
    let report = train::run(&alone, &RunContext::default()).unwrap();
    for of in [2, 3, 7] {
        let shared = config(&dir.path().join(format!("{of}")));
        let reports = trained(of, &shared);
        assert!(reports.iter().all(|theirs| (theirs.tokens, theirs.last_loss) == (report.tokens, reports[0].last_loss)));
        let (one, several) = (losses(&alone.out), losses(&shared.out));
        assert_eq!((one.len(), several.len()), (4, 4));
        // Of the first step every term has the same bits, dropout's masks included; only the order of f64 sums of some hundred differs.
        assert!((one[0] - several[0]).abs() < 1e-12 * one[0], "{of} ranks: {} {}", one[0], several[0]);
        // A gradient of f32 sums over N < 240 tokens in another order is off by N/2^24 < 1.5e-5 of its terms' sizes, and an update by as much
        // of its size, lr, where terms do not cancel; four updates. Where they cancel an entry may be off by more: the mean over all is looked at.
        let (a, b) = (values(&alone.out), values(&shared.out));
        let difference = a.iter().zip(&b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() / a.len() as f64;
        println!(
            "{of} ranks: losses off by {:?}, values by {:e}",
            one.iter().zip(&several).map(|(a, b)| a - b).collect::<Vec<_>>(),
            difference.sqrt()
        );
        assert!(difference.sqrt() < 4.0 * 1.5e-5 * shared.lr, "{of} ranks: {difference}");
        assert!(one.iter().zip(&several).all(|(a, b)| (a - b).abs() < 1e-5 * a), "{of} ranks: {one:?} {several:?}");
        // Again: the very same bits.
        let again = config(&dir.path().join(format!("{of}-again")));
        trained(of, &again);
        assert_eq!(numbers(&shared.out, 4), numbers(&again.out, 4), "{of} ranks");
    }
}

#[test]
fn ranks_go_on_from_a_checkpoint_and_others_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, cut) = (config(&dir.path().join("whole")), config(&dir.path().join("cut")));
    trained(2, &whole);
    trained(2, &TrainConfig { steps: Some(3), ..cut.clone() });
    let reports = trained(2, &cut);
    assert!(reports.iter().all(|report| (report.resumed_from, report.ranks) == (3, Some(2))));
    assert_eq!(numbers(&cut.out, 4), numbers(&whole.out, 4));
    let longer = TrainConfig { steps: Some(5), ..cut.clone() };
    let error = train::run(&longer, &RunContext::default()).unwrap_err();
    assert!(error.to_string().contains("ranks: the checkpoint has 2, here it is nothing"), "{error}");
    // A rank that does not see rank 0's checkpoint says so, and ends all.
    let blind = TrainConfig { out: dir.path().join("empty"), ..longer.clone() };
    let errors = failures(train(2, |rank| if rank == 0 { longer.clone() } else { blind.clone() }, &contexts(2)));
    assert!(
        errors[0].starts_with("rank 1 ended, and all with it: ") && errors[1].contains("checkpoint-4: no checkpoint"),
        "{errors:?}"
    );
    assert!(!dir.path().join("empty").exists(), "rank 0 alone writes");
}

fn failures(results: Vec<Result<TrainReport>>) -> Vec<String> {
    results.into_iter().map(|result| result.unwrap_err().to_string()).collect()
}

#[test]
fn a_stop_at_any_rank_stops_all_after_the_same_step() {
    let dir = tempfile::tempdir().unwrap();
    for stopper in [0, 1, 2] {
        let long = TrainConfig { steps: Some(1 << 30), ..config(&dir.path().join(format!("{stopper}"))) };
        let contexts = contexts(3);
        let results = thread::scope(|scope| {
            let run = scope.spawn(|| train(3, |_| long.clone(), &contexts));
            while contexts[stopper].progress.snapshot().0.name != "training" || contexts[stopper].progress.snapshot().1 < 2 {
                thread::yield_now();
            }
            contexts[stopper].stop.store(true, std::sync::atomic::Ordering::Relaxed);
            run.join().unwrap()
        });
        let classes: Vec<_> = results.iter().map(|result| result.as_ref().unwrap_err().class()).collect();
        assert_eq!(classes, [ErrorClass::Interrupted; 3]);
        let said = failures(results);
        assert!(said.iter().all(|other| *other == said[0]), "{said:?}");
        let step: u64 = said[0].split("checkpoint-").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
        assert!(long.out.join(format!("checkpoint-{step}")).is_dir(), "{said:?}");
        // Nothing of the step that was given up is left: the run goes on as if it had not been stopped.
        if stopper == 1 {
            let whole = TrainConfig { steps: Some(step + 1), ..config(&dir.path().join("whole")) };
            trained(3, &whole);
            trained(3, &TrainConfig { out: long.out.clone(), ..whole.clone() });
            assert_eq!(numbers(&long.out, step + 1), numbers(&whole.out, step + 1));
        }
    }
}

#[test]
fn a_rank_of_another_run_or_one_that_fails_ends_all_with_its_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str| config(&dir.path().join(name));
    let other = |rank: u32, changed: TrainConfig| if rank == 1 { changed } else { of("a") };
    let results = train(3, |rank| other(rank, TrainConfig { seed: 7, steps: Some(9), ..of("a") }), &contexts(3));
    assert!(results.iter().all(|result| result.as_ref().unwrap_err().class() == ErrorClass::Mismatch));
    let said = failures(results);
    let words = "rank 1 does not belong to this run: seed: rank 0 has 42, it has 7; steps: rank 0 has 4, it has 9; give all ranks the same";
    assert!(said[0].starts_with(words), "{said:?}");
    assert!(said[1..].iter().all(|other| other.starts_with(&format!("rank 0 ended, and all with it: {words}"))), "{said:?}");
    let results = train(3, |rank| other(rank, TrainConfig { device: "cuda:9".into(), ..of("a") }), &contexts(3));
    assert!(results.iter().all(|result| result.as_ref().unwrap_err().class() == ErrorClass::Usage));
    let said = failures(results);
    assert!(said[1].starts_with("device \"cuda:9\": "), "{said:?}");
    assert_eq!([&said[0], &said[2]], [&format!("rank 1 ended, and all with it: {}", said[1]); 2]);
    assert!(!dir.path().join("a/adapter").exists());
}

/// What a rank says first.
fn hello(version: &str, rank: u32, of: u32) -> Vec<u8> {
    let mut bytes = b"potrank1".to_vec();
    bytes.extend(version.bytes());
    bytes.resize(32, 0);
    bytes.extend(rank.to_le_bytes());
    bytes.extend(of.to_le_bytes());
    bytes
}

/// Rank 0 of two at a meeting to which somebody comes who is not this program.
fn met_by(patience: Patience, context: &RunContext, other: impl FnOnce(TcpStream) + Send) -> Result<Ranks> {
    let meeting = Meeting::with(place(0, 2, 0), patience).unwrap();
    let address = meeting.address();
    thread::scope(|scope| {
        let other = scope.spawn(move || other(TcpStream::connect(address).unwrap()));
        let ranks = meeting.meet(context);
        other.join().unwrap();
        ranks
    })
}

fn refused(hello: Vec<u8>) -> String {
    let context = RunContext::default();
    let error = met_by(Patience::default(), &context, move |mut stream| {
        stream.write_all(&hello).unwrap();
        let mut magic = [0; 8];
        stream.read_exact(&mut magic).unwrap();
        let Message::Abort { rank: 0, class: ErrorClass::Mismatch, .. } = Message::read(&mut stream).unwrap() else { panic!() };
    });
    let error = error.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Mismatch);
    error.to_string()
}

#[test]
fn ranks_of_another_program_number_or_place_are_refused_by_name() {
    let own = env!("CARGO_PKG_VERSION");
    let said = refused(hello("9.9", 1, 2));
    assert!(said.starts_with(&format!("rank 1 does not belong to this run: it is potstill 9.9, rank 0 is {own};")), "{said}");
    let said = refused(hello(own, 1, 3));
    assert!(said.contains("it says that there are 3 ranks (WORLD_SIZE), rank 0 says 2"), "{said}");
    for rank in [0, 2] {
        let said = refused(hello(own, rank, 2));
        assert!(
            said.starts_with(&format!("rank {rank} does not belong to this run: expected a rank from 1 to below 2")),
            "{said}"
        );
    }
}

#[test]
fn strangers_are_sent_away_and_change_nothing() {
    let meeting = Meeting::open(place(0, 2, 0)).unwrap();
    let (address, port) = (meeting.address(), port(&meeting));
    let contexts = contexts(2);
    thread::scope(|scope| {
        let first = scope.spawn(|| meeting.meet(&contexts[0]).unwrap());
        for rubbish in ["GET / HTTP/1.1\r\nHost: somewhere.example.org\r\n\r\n", "", "potrank1"] {
            let mut stream = TcpStream::connect(&address).unwrap();
            stream.write_all(rubbish.as_bytes()).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut answer = Vec::new();
            // Closed, perhaps before all that was sent was read.
            let _ = stream.read_to_end(&mut answer);
            assert_eq!(answer, b"");
        }
        let second = Meeting::open(place(1, 2, port)).unwrap().meet(&contexts[1]).unwrap();
        assert_eq!((first.join().unwrap().of(), second.rank()), (2, 1));
    });
    let said = contexts[0].take_warnings();
    assert_eq!(said.len(), 3);
    assert!(said[0].contains("is no rank: its first bytes are not a rank's"), "{said:?}");
    assert!(said[2].contains("is no rank: it closed the connection before it said who it is"), "{said:?}");
}

#[test]
fn what_is_in_the_way_of_a_meeting_is_said() {
    // A port that is taken.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let error = Meeting::open(place(0, 2, port)).unwrap_err().to_string();
    assert!(error.starts_with(&format!("rank 0 cannot listen at 127.0.0.1:{port} (MASTER_ADDR and MASTER_PORT): ")), "{error}");
    // Something else at rank 0's port.
    let error = thread::scope(|scope| {
        scope.spawn(|| taken.accept().unwrap().0.write_all(b"HTTP/1.1 400 Bad Request\r\n").unwrap());
        Meeting::open(place(1, 2, port)).unwrap().meet(&RunContext::default()).unwrap_err().to_string()
    });
    assert!(error.starts_with(&format!("127.0.0.1:{port} (MASTER_ADDR and MASTER_PORT) is no rank 0 of potstill: ")), "{error}");
    drop(taken);
    // Nobody there, nobody coming, a stop meanwhile.
    let short = Patience { meeting: Duration::ZERO, ..Patience::default() };
    let error = Meeting::with(place(1, 2, port), short).unwrap().meet(&RunContext::default()).unwrap_err().to_string();
    assert!(error.starts_with(&format!("rank 0 was not reached at 127.0.0.1:{port}")), "{error}");
    let error = Meeting::with(place(0, 3, 0), short).unwrap().meet(&RunContext::default()).unwrap_err().to_string();
    assert_eq!(error, "of 3 ranks (WORLD_SIZE) rank 1, 2 did not come within 0 s");
    let stopped = RunContext::default();
    stopped.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    for rank in [0, 1] {
        let error = Meeting::open(place(rank, 2, port)).unwrap().meet(&stopped).unwrap_err();
        assert_eq!(error.class(), ErrorClass::Interrupted);
    }
}

#[test]
fn a_rank_that_is_gone_silent_or_talks_nonsense_is_found_out() {
    let own = hello(env!("CARGO_PKG_VERSION"), 1, 2);
    // The other side stays, and is not waited for.
    let quick = Patience { farewell: Duration::from_millis(10), ..Patience::default() };
    let (own, short) = (own.as_slice(), Patience { silence: Duration::from_millis(200), ..quick });
    let ended = |patience: Patience, first: &[u8], stays: bool, halts: bool| {
        let context = RunContext::default();
        let (first, (left, leaves)) = ([own, first].concat(), std::sync::mpsc::channel::<()>());
        let ranks = met_by(patience, &context, |mut stream| {
            stream.write_all(&first).unwrap();
            thread::spawn(move || (stays && leaves.recv().is_ok()).then_some(stream));
        });
        // Found out at the meeting already, or by whoever waits for a word.
        let error = ranks.and_then(|ranks| ranks.agree(&Identity::new(), (1, DistBackend::Tcp), None)).unwrap_err();
        // A pass under way would end.
        while halts && !context.stopping() {
            thread::yield_now();
        }
        drop(left);
        error.to_string()
    };
    let said = ended(quick, &[], false, true);
    assert!(said.starts_with("rank 1 is gone: it has closed the connection"), "{said}");
    let said = ended(short, &Message::Alive.frame(), true, true);
    assert!(said.starts_with("rank 1 is gone: it said nothing for 200ms"), "{said}");
    let said = ended(quick, b"GET / HTTP", true, true);
    assert!(said.starts_with("rank 1 is gone: it sent a message of the unknown kind 71"), "{said}");
    let said = ended(quick, &Message::Bye.frame(), true, false);
    assert!(said.starts_with("rank 1 is gone: it sent a farewell, expected an identity"), "{said}");
    let said = ended(quick, &Message::Start(None).frame().repeat(40), true, false);
    // Either the first of them or that there are so many is what is noticed.
    assert!(said.starts_with("rank 1 is gone: it sent "), "{said}");
}

#[test]
fn a_rank_that_is_busy_gives_signs_of_life() {
    let patience = Patience { pulse: Duration::from_millis(1), ..Patience::default() };
    let own = hello(env!("CARGO_PKG_VERSION"), 1, 2);
    let (sender, stream) = std::sync::mpsc::channel();
    let context = RunContext::default();
    let ranks = met_by(patience, &context, move |mut stream| {
        stream.write_all(&own).unwrap();
        stream.read_exact(&mut [0; 8]).unwrap();
        sender.send(stream).unwrap();
    });
    // Rank 0 does nothing, and is heard; then a stop is asked for, and that is heard.
    let mut stream = stream.recv().unwrap();
    let mut alive = std::iter::repeat_with(|| Message::read(&mut stream).unwrap()).filter(|message| *message == Message::Alive);
    assert_eq!(alive.by_ref().take(3).count(), 3);
    context.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    while Message::read(&mut stream).unwrap() != Message::Stop {}
    drop((stream, ranks.unwrap()));
}

#[test]
fn sums_are_added_in_the_ranks_order_and_are_the_same_everywhere() {
    // Several stretches, and tensors without a value or with one.
    let shapes = [(0, 3), (1, 1), (7, CHUNK), (3, 5)];
    let value = |rank: u32, i: usize| if rank == 0 { 1e8 } else { -1e8 * (i % 2) as f32 + 0.1 * (i % 97) as f32 * rank as f32 };
    let of_shape = |rank: u32, (rows, columns): (usize, usize)| {
        let values: Vec<f32> = (0..rows * columns).map(|i| value(rank, i)).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    };
    let parameters: Vec<_> = shapes.iter().map(|shape| (String::new(), of_shape(0, *shape))).collect();
    let step = |rank: u32, rows: bool| {
        let gradients = if rows { shapes.iter().map(|shape| of_shape(rank, *shape)).collect() } else { Vec::new() };
        Step { gradients, mean: crate::loss::LossSums { total: 0.1 * f64::from(rank), kd: 0.0, ce: 1.0 }, tokens: 9, scored: 4 }
    };
    let own = |step: Option<Step>, tokens: u64| Own { step, scored: 4, tokens };
    let sums = together(
        3,
        |ranks, _| {
            let summed = ranks.add_up(5, own(Some(step(ranks.rank(), true)), 9), &parameters).unwrap().unwrap();
            // A rank without rows adds nothing; one that gives up its pass ends the step everywhere.
            let without = ranks.add_up(6, own(Some(step(ranks.rank(), ranks.rank() != 1)), 9), &parameters).unwrap().unwrap();
            let given_up = ranks.add_up(7, own(Some(step(ranks.rank(), true)).filter(|_| ranks.rank() != 2), 9), &parameters);
            assert!(given_up.unwrap().is_none());
            let wrong = ranks.add_up(8, own(Some(step(ranks.rank(), true)), 9 + u64::from(ranks.rank() == 2)), &parameters);
            let wrong = wrong.unwrap_err();
            ranks.abort(&wrong);
            let values = |step: &Step| -> Vec<u32> {
                let all = step.gradients.iter().flat_map(|g| g.flatten_all().unwrap().to_vec1::<f32>().unwrap());
                all.map(f32::to_bits).collect()
            };
            ([values(&summed), values(&without)], summed.mean.total, wrong.to_string())
        },
        &contexts(3),
    );
    for ([summed, without], total, wrong) in &sums {
        let expected = |ranks: &[u32]| -> Vec<u32> {
            let of = |i: usize| ranks.iter().skip(1).fold(value(ranks[0], i), |sum, rank| sum + value(*rank, i)).to_bits();
            shapes.iter().flat_map(|(rows, columns)| (0..rows * columns).map(of)).collect()
        };
        assert!(*summed == expected(&[0, 1, 2]) && *without == expected(&[0, 2]));
        assert_eq!(*total, 0.1 * 0.0 + 0.1 + 0.2);
        assert!(wrong.contains("rank 2 does not belong to this run: tokens: rank 0 has 9, it has 10"), "{wrong}");
    }
}

#[test]
fn adapters_of_other_bits_are_found_out() {
    let words = together(
        2,
        |ranks, _| {
            let same = ranks.word(Next::Step, ranks.rank() == 0, 2, || Ok([1; 32])).unwrap();
            let other = ranks.word(Next::Stop, true, 3, || Ok([ranks.rank() as u8; 32]));
            other.as_ref().err().into_iter().for_each(|error| ranks.abort(error));
            // What rank 1 asks for has no weight.
            (same, other.map_err(|error| error.to_string()))
        },
        &contexts(2),
    );
    assert_eq!((words[0].0, words[1].0, &words[1].1), (Next::Step, Next::Step, &Ok(Next::Stop)));
    let error = words[0].1.as_ref().unwrap_err();
    assert!(error.starts_with("rank 1 has another adapter than rank 0 after step 3"), "{error}");
}

#[test]
fn gradients_of_a_cpu_do_not_cross_by_nccl() {
    let dir = tempfile::tempdir().unwrap();
    let run = TrainConfig { device: "cpu".into(), dist_backend: DistBackend::Nccl, ..config(&dir.path().join("run")) };
    let error = train::run(&run, &RunContext::default()).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Usage);
    let why = if cfg!(feature = "cuda") { "the device is the CPU" } else { "this build computes on the CPU only" };
    let said = format!("dist_backend = nccl: NCCL adds up on NVIDIA GPUs, and {why}; --dist-backend tcp does without NCCL");
    assert_eq!(error.to_string(), said);
    assert!(!run.out.exists());
}
