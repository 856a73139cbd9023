//! Gradients from GPU to GPU. `scripts/test-cuda-emulated.sh` runs these on an emulated GPU, which stands in for those of all ranks.

use super::*;
use crate::cuda;
use crate::train::ranks::message::Part;
use crate::train::ranks::sums;

/// The GPUs of two ranks. `None` where there are none to test on; a run that is about them must not pass for that.
fn gpus() -> Option<[&'static str; 2]> {
    let emulated = |device: &Device| cuda::describe(device.as_cuda_device().unwrap()).unwrap().name == "Emulated GPU";
    match (cuda::open(0), cuda::collective::version()) {
        (Ok(device), Ok(_)) if emulated(&device) => Some(["cuda:0"; 2]),
        (Ok(_), Ok(_)) if cuda::count() >= Ok(2) => Some(["cuda:0", "cuda:1"]),
        (_, version) => {
            assert!(std::env::var_os("POTSTILL_TEST_DEVICE").is_none(), "{version:?}");
            None
        }
    }
}

fn by(backend: DistBackend, device: &str, out: &Path) -> TrainConfig {
    TrainConfig { device: device.into(), dist_backend: backend, batch_size: 3, steps: Some(3), ..config(out) }
}

fn run_on(gpus: [&str; 2], config: &TrainConfig) -> Vec<TrainReport> {
    let of_rank = |rank: u32| TrainConfig { device: gpus[rank as usize].into(), ..config.clone() };
    train(2, of_rank, &contexts(2)).into_iter().map(Result::unwrap).collect()
}

#[test]
fn two_ranks_have_the_bits_that_tcp_gives_them() {
    let Some(gpus) = gpus() else { return };
    let dir = tempfile::tempdir().unwrap();
    let tcp = by(DistBackend::Tcp, "", &dir.path().join("tcp"));
    let nccl = by(DistBackend::Nccl, "", &dir.path().join("nccl"));
    assert!(run_on(gpus, &tcp).iter().all(|report| report.nccl.is_none()));
    assert!(run_on(gpus, &nccl).iter().all(|report| report.nccl.is_some() && report.ranks == Some(2)));
    assert_eq!(numbers(&tcp.out, 3), numbers(&nccl.out, 3));
    assert_eq!(losses(&tcp.out), losses(&nccl.out));
    // By which way they crossed is no part of a checkpoint.
    let cut = by(DistBackend::Nccl, "", &dir.path().join("cut"));
    run_on(gpus, &TrainConfig { steps: Some(2), ..cut.clone() });
    let reports = run_on(gpus, &TrainConfig { dist_backend: DistBackend::Tcp, ..cut.clone() });
    assert!(reports.iter().all(|report| report.resumed_from == 2));
    assert_eq!(numbers(&cut.out, 3), numbers(&tcp.out, 3));
}

#[test]
fn one_rank_goes_the_same_way() {
    let Some([gpu, _]) = gpus() else { return };
    let dir = tempfile::tempdir().unwrap();
    let tcp = by(DistBackend::Tcp, gpu, &dir.path().join("tcp"));
    let nccl = by(DistBackend::Nccl, gpu, &dir.path().join("nccl"));
    train::run(&tcp, &RunContext::default()).unwrap();
    let report = train::run(&nccl, &RunContext::default()).unwrap();
    assert!(report.nccl.is_some() && report.ranks.is_none());
    assert_eq!(numbers(&tcp.out, 3), numbers(&nccl.out, 3));
}

#[test]
fn ranks_by_different_ways_are_refused() {
    let Some([gpu, _]) = gpus() else { return };
    let dir = tempfile::tempdir().unwrap();
    let backend = |rank| if rank == 0 { DistBackend::Nccl } else { DistBackend::Tcp };
    let results = train(2, |rank| by(backend(rank), gpu, &dir.path().join("run")), &contexts(2));
    assert!(results.iter().all(|result| result.as_ref().unwrap_err().class() == ErrorClass::Mismatch));
    let said = failures(results);
    assert!(said[0].starts_with("rank 1 does not belong to this run: dist_backend: rank 0 has nccl, it has tcp;"), "{said:?}");
}

/// Two ranks that are connected, of which `victim` goes when all have said what their passes came to, and before the gradients cross.
fn lost(victim: u32, gpus: [&str; 2]) -> (String, Vec<f32>) {
    let ended = together(
        2,
        |ranks, context| {
            let device = crate::device::pick(gpus[ranks.rank() as usize], context).unwrap();
            ranks.connect(DistBackend::Nccl, &device, context).unwrap();
            if ranks.rank() == victim {
                let part = Part { step: 5, scored: 4, tokens: 9, sums: Some([0.0; 3]) };
                match &ranks.links {
                    Links::First(link) => {
                        link.send(&Message::Part(part)).unwrap();
                        link.sums().unwrap();
                    }
                    Links::Others(links) => _ = sums::of_parts(part, links).unwrap(),
                    Links::Alone => panic!("two ranks"),
                }
                return None;
            }
            let gradient = Tensor::from_vec(vec![1f32, 2.0, 3.0], 3, &device).unwrap();
            let step = Step { gradients: vec![gradient.clone()], tokens: 9, scored: 4, ..Step::default() };
            let error = ranks.add_up(5, Own { step: Some(step), scored: 4, tokens: 9 }, &[]).unwrap_err();
            // What ran on the GPU has ended with that, so that a checkpoint can be written.
            Some((error.to_string(), gradient.to_vec1().unwrap()))
        },
        &contexts(2),
    );
    ended.into_iter().flatten().next().unwrap()
}

#[test]
fn a_rank_that_dies_in_the_exchange_ends_the_others() {
    let Some(gpus) = gpus() else { return };
    for victim in [0, 1] {
        let (said, values) = lost(victim, gpus);
        assert!(said.starts_with(&format!("rank {victim} is gone: it has closed the connection;")), "{said}");
        assert_eq!(values.len(), 3);
    }
}

#[test]
fn nobody_waits_for_a_rank_that_does_not_connect() {
    let Some([gpu, _]) = gpus() else { return };
    for stopped in [false, true] {
        let errors = together(
            2,
            |ranks, context| {
                let device = crate::device::pick(gpu, context).unwrap();
                if let Links::First(link) = &ranks.links {
                    link.id().unwrap();
                    // Goes at once, or when rank 0 has.
                    return (stopped && ranks.word(Next::Step, false, 0, || panic!()).is_ok()).then(String::new);
                }
                context.stop.store(stopped, std::sync::atomic::Ordering::Relaxed);
                let error = ranks.connect(DistBackend::Nccl, &device, context).unwrap_err();
                assert!(matches!(error.class(), ErrorClass::Interrupted) == stopped, "{error}");
                Some(error.to_string())
            },
            &contexts(2),
        );
        let said = errors[0].as_ref().unwrap();
        let expected = if stopped { "stopped by a signal; " } else { "rank 1 is gone: it has closed the connection;" };
        assert!(said.starts_with(expected) && errors[1].is_none(), "{errors:?}");
    }
}
