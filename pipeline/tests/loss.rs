//! Losses and gradients against the reference data (float64 results from float32 inputs).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use potstill_cache::SoftTargets;
use potstill_pipeline::loss::{DEFAULT_BETA, Divergence, LossSettings, LossSums, Tail, rows};
use safetensors::SafeTensors;

struct File(Vec<u8>);

impl File {
    fn open(name: &str) -> File {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden/expected/").to_string() + name;
        File(std::fs::read(path).unwrap())
    }

    fn bytes<const N: usize>(&self, name: &str) -> Vec<[u8; N]> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let view = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        view.data().chunks_exact(N).map(|b| b.try_into().unwrap()).collect()
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        self.bytes(name).into_iter().map(f32::from_le_bytes).collect()
    }

    fn f64(&self, name: &str) -> Vec<f64> {
        self.bytes(name).into_iter().map(f64::from_le_bytes).collect()
    }

    fn u32(&self, name: &str) -> Vec<u32> {
        self.bytes(name).into_iter().map(|b| u32::try_from(i32::from_le_bytes(b)).unwrap()).collect()
    }
}

/// Rows with everything the losses need.
struct Reference {
    /// Positions in the [2, 64] batch.
    at: Vec<usize>,
    vocab: usize,
    logits: Vec<f32>,
    labels: Vec<u32>,
    targets: SoftTargets,
    lse_t2: Vec<f32>,
}

const K: usize = 32;

fn batch() -> Reference {
    let file = File::open("loss_batch.safetensors");
    let at: Vec<usize> = file.bytes::<1>("loss_mask").iter().enumerate().filter(|(_, m)| m[0] == 1).map(|(i, _)| i).collect();
    let (ids, logprobs) = (file.u32("teacher_ids"), file.f32("teacher_logprobs"));
    let (tails, labels, lse) = (file.f32("teacher_tail_logprob"), file.u32("labels"), file.f32("teacher_logsumexp_T2"));
    let mut targets = SoftTargets::default();
    at.iter().for_each(|&i| targets.push(&ids[i * K..][..K], &logprobs[i * K..][..K], tails[i]));
    Reference {
        vocab: 2048,
        logits: file.f32("student_logits"),
        labels: at.iter().map(|i| labels[*i]).collect(),
        lse_t2: at.iter().map(|i| lse[*i]).collect(),
        targets,
        at,
    }
}

fn edge() -> Reference {
    let file = File::open("loss_edge.safetensors");
    let (ids, logprobs, tails) = (file.u32("teacher_ids"), file.f32("teacher_logprobs"), file.f32("teacher_tail_logprob"));
    let mut targets = SoftTargets::default();
    (0..8).for_each(|i| targets.push(&ids[i * 8..][..8], &logprobs[i * 8..][..8], tails[i]));
    Reference {
        at: (0..8).collect(),
        vocab: 96,
        logits: file.f32("student_logits"),
        labels: file.u32("labels"),
        targets,
        lse_t2: Vec::new(),
    }
}

/// `forward_kl.bucket.T2` as settings.
fn settings(name: &str) -> LossSettings {
    let parts: Vec<&str> = name.split('.').collect();
    let divergence = match parts[0] {
        "forward_kl" => Divergence::ForwardKl,
        "reverse_kl" => Divergence::ReverseKl,
        "jsd" => Divergence::Jsd { beta: DEFAULT_BETA },
        other => panic!("{other}"),
    };
    let tail = match parts[1] {
        "bucket" => Tail::Bucket,
        "renorm" => Tail::Renorm,
        "studentfull" => Tail::StudentFull,
        "exact_tail" => Tail::ExactTail,
        other => panic!("{other}"),
    };
    let temperature = parts[2].strip_prefix('T').unwrap().parse().unwrap();
    LossSettings { divergence, tail, temperature, kd_alpha: 1.0, kd_ce_alpha: 0.0 }
}

/// Sums and gradient (of `scale` times the total).
fn run(r: &Reference, settings: &LossSettings, scale: f64) -> (LossSums, Vec<f32>) {
    let mut logits = r.logits.clone();
    let lse_t = settings.needs_lse_t().then_some(&r.lse_t2[..]);
    let sums = rows(&mut logits, r.vocab, &r.labels, Some(&r.targets), lse_t, settings, scale).unwrap();
    (sums, logits)
}

/// One row of a reference, as a batch of its own.
fn single(r: &Reference, i: usize) -> Reference {
    Reference {
        at: vec![r.at[i]],
        vocab: r.vocab,
        logits: r.logits[i * r.vocab..][..r.vocab].to_vec(),
        labels: vec![r.labels[i]],
        targets: r.targets.slice(i..i + 1),
        lse_t2: r.lse_t2.get(i).copied().into_iter().collect(),
    }
}

/// Float32 exponentials over 2048 logits err by some 1e-7 of a loss of size 1; the reference data asks for 1e-5.
const LOSS: f64 = 1e-6;

#[test]
fn every_mean_of_the_batch() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden/expected/losses.json");
    let json: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let r = batch();
    let n = json["positions"].as_u64().unwrap() as f64;
    assert_eq!(r.labels.len() as f64, n);
    let mut compared = 0;
    for (name, expected) in json["values"].as_object().unwrap() {
        let expected = expected.as_f64().unwrap();
        let found = if name == "cross_entropy" {
            run(&r, &LossSettings::default(), 1.0).0.ce / n
        } else if let Some(rest) = name.strip_prefix("weighted.") {
            let base = settings(&format!("forward_kl.{rest}"));
            run(&r, &LossSettings { kd_alpha: 0.7, kd_ce_alpha: 0.3, ..base }, 1.0).0.total / n
        } else {
            run(&r, &settings(name), 1.0).0.kd / n
        };
        // Relative for the weighted values too: they are of size 1.
        assert!((found - expected).abs() < LOSS, "{name}: expected {expected}, found {found}");
        compared += 1;
    }
    assert_eq!(compared, 21);
}

#[test]
fn every_value_of_every_position() {
    let (file, r) = (File::open("loss_positions.safetensors"), batch());
    let parsed = SafeTensors::deserialize(&file.0).unwrap();
    let mut compared = 0;
    for name in parsed.names().into_iter().filter(|n| !n.starts_with("grad_")) {
        let expected = file.f64(name);
        for i in 0..r.at.len() {
            let setting = if name == "cross_entropy" { LossSettings::default() } else { settings(name) };
            let sums = run(&single(&r, i), &setting, 1.0).0;
            let found = if name == "cross_entropy" { sums.ce } else { sums.kd };
            let expected = expected[r.at[i]];
            // A single position's loss reaches 20 nats, the mean's tolerance holds relative to it.
            assert!((found - expected).abs() < LOSS * expected.max(1.0), "{name} at {i}: expected {expected}, found {found}");
            assert!(found >= 0.0, "{name} at {i}: {found}");
            compared += 1;
        }
    }
    assert_eq!(compared, 18 * 49);
}

#[test]
fn gradients_of_the_mean() {
    let (file, r) = (File::open("loss_positions.safetensors"), batch());
    let n = r.at.len();
    for name in ["forward_kl.bucket.T1", "forward_kl.renorm.T1", "forward_kl.renorm.T2", "jsd.renorm.T1", "reverse_kl.renorm.T1"]
    {
        let setting = settings(name);
        // The reference carries no T².
        let scale = 1.0 / n as f64 / setting.temperature.powi(2);
        let (_, gradient) = run(&r, &setting, scale);
        let kept = file.f32(&format!("grad_topk.{name}"));
        let (sum, abs_sum) = (file.f32(&format!("grad_sum.{name}")), file.f32(&format!("grad_abs_sum.{name}")));
        for i in 0..n {
            let row = &gradient[i * r.vocab..][..r.vocab];
            for (j, &id) in r.targets.position(i).ids.iter().enumerate() {
                let (found, expected) = (row[id as usize], kept[r.at[i] * K + j]);
                // Entries are at most 1/49 = 0.02, rounded to f32 in both (1e-9), from losses good to 1e-6 relative.
                assert!((found - expected).abs() < 2e-8, "{name} at {i}, {id}: expected {expected:e}, found {found:e}");
            }
            let total: f64 = row.iter().map(|g| f64::from(*g)).sum();
            let absolute: f64 = row.iter().map(|g| f64::from(g.abs())).sum();
            let (expected, magnitude) = (f64::from(sum[r.at[i]]), f64::from(abs_sum[r.at[i]]));
            // Both are 0 mathematically; f32 entries of up to 0.02 leave their roundings.
            assert!((total - expected).abs() < 2e-8, "{name} at {i}: sum expected {expected:e}, found {total:e}");
            assert!((absolute - magnitude).abs() < 5e-8, "{name} at {i}: expected {magnitude:e}, found {absolute:e}");
        }
    }
}

#[test]
fn hard_rows() {
    let (file, r) = (File::open("loss_edge.safetensors"), edge());
    for name in SafeTensors::deserialize(&file.0).unwrap().names() {
        if !(name.contains("kl.") || name.contains("jsd.") || name == "cross_entropy") {
            continue;
        }
        let expected = file.f64(name);
        for (i, &expected) in expected.iter().enumerate() {
            let setting = if name == "cross_entropy" { LossSettings::default() } else { settings(name) };
            let (sums, gradient) = run(&single(&r, i), &setting, 1.0);
            let found = if name == "cross_entropy" { sums.ce } else { sums.kd };
            assert!((found - expected).abs() < LOSS * expected.abs().max(1.0), "{name}, row {i}: {expected} {found}");
            assert!(found >= 0.0, "{name}, row {i}: {found:e}");
            assert!(gradient.iter().all(|g| g.is_finite()), "{name}, row {i}");
        }
    }
    // Row 3's student is the teacher: no loss, no gradient.
    let (sums, gradient) = run(&single(&r, 3), &settings("forward_kl.bucket.T1"), 1.0);
    assert!(sums.kd < 1e-10, "{:e}", sums.kd);
    // The teacher's log-probabilities are f32: relative 6e-8, times a probability of up to 1 and a value of some nats.
    assert!(gradient.iter().all(|g| g.abs() < 1e-6));
}
