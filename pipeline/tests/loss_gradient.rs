//! Gradients against finite differences of a float64 twin, the fused head against a dense one, and what is refused.
#![allow(clippy::result_large_err, clippy::unwrap_used, clippy::expect_used)]

mod support;

use candle_core::{DType, Tensor};
use potstill_cache::SoftTargets;
use potstill_pipeline::kernel::Precision;
use potstill_pipeline::linear::dense::DenseWeight;
use potstill_pipeline::linear::{DeviceWeight, Head, Weight};
use potstill_pipeline::loss::{Batch, Divergence, LossSettings, LossSums, Tail, fused, fused_batch, rows};
use potstill_pipeline::run::RunContext;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// The loss of one row, written from its definition: whole distributions, no logarithm trick, all in f64.
struct Twin<'a> {
    ids: &'a [u32],
    logprobs: &'a [f32],
    tail: f32,
    lse_t: f64,
    label: usize,
    settings: LossSettings,
}

impl Twin<'_> {
    fn loss(&self, z: &[f64]) -> f64 {
        let s = &self.settings;
        let ce = lse(z) - z[self.label];
        let kd = s.kd_alpha * s.temperature.powi(2) * self.divergence(z);
        kd + s.kd_ce_alpha * ce
    }

    fn divergence(&self, z: &[f64]) -> f64 {
        let t = self.settings.temperature;
        let kept: Vec<f64> = self.ids.iter().map(|i| z[*i as usize]).collect();
        let l: Vec<f64> = self.logprobs.iter().map(|l| f64::from(*l)).collect();
        let softmax = |x: &[f64]| x.iter().map(|v| (v - lse(x)).exp()).collect::<Vec<f64>>();
        let scaled = |x: &[f64]| x.iter().map(|v| v / t).collect::<Vec<f64>>();
        let at = |x: &[f64]| self.ids.iter().map(|i| x[*i as usize]).collect::<Vec<f64>>();
        let rest = |x: &[f64]| (0..x.len()).filter(|i| !self.ids.contains(&(*i as u32))).map(|i| x[i]).sum::<f64>();
        let (p, q) = match self.settings.tail {
            Tail::Renorm => (softmax(&scaled(&l)), softmax(&scaled(&kept))),
            Tail::StudentFull => {
                let (mut p, full) = (softmax(&scaled(&l)), softmax(&scaled(z)));
                let mut q = at(&full);
                p.push(0.0);
                q.push(rest(&full));
                (p, q)
            }
            Tail::None => {
                let lse_t = if t == 1.0 { 0.0 } else { self.lse_t };
                let kept = l.iter().map(|l| (l / t - lse_t).exp()).collect();
                (kept, at(&softmax(&scaled(z))))
            }
            Tail::ExactTail if t != 1.0 => {
                let full = softmax(&scaled(z));
                let mut p: Vec<f64> = l.iter().map(|l| (l / t - self.lse_t).exp()).collect();
                p.push(if self.tail == f32::NEG_INFINITY { 0.0 } else { 1.0 - p.iter().sum::<f64>() });
                let mut q = at(&full);
                q.push(rest(&full));
                (p, q)
            }
            Tail::Bucket | Tail::ExactTail => {
                let full = softmax(z);
                let mut p: Vec<f64> = l.clone();
                p.push(f64::from(self.tail));
                let mut q: Vec<f64> = at(&full).iter().map(|q| q.ln()).collect();
                q.push(rest(&full).ln());
                (softmax(&scaled(&p)), softmax(&scaled(&q)))
            }
        };
        let kl = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| if *a == 0.0 { 0.0 } else { a * (a / b).ln() }).sum::<f64>();
        match self.settings.divergence {
            Divergence::ForwardKl => kl(&p, &q),
            Divergence::ReverseKl => kl(&q, &p),
            Divergence::Jsd { beta } => {
                let m: Vec<f64> = p.iter().zip(&q).map(|(p, q)| beta * p + (1.0 - beta) * q).collect();
                beta * kl(&p, &m) + (1.0 - beta) * kl(&q, &m)
            }
            Divergence::SkewedKl { skew } => {
                let m: Vec<f64> = p.iter().zip(&q).map(|(p, q)| skew * p + (1.0 - skew) * q).collect();
                kl(&p, &m)
            }
            Divergence::SkewedReverseKl { skew } => {
                let m: Vec<f64> = p.iter().zip(&q).map(|(p, q)| (1.0 - skew) * p + skew * q).collect();
                kl(&q, &m)
            }
            Divergence::TotalVariation => 0.5 * p.iter().zip(&q).map(|(p, q)| (p - q).abs()).sum::<f64>(),
        }
    }

    fn slope(&self, z: &[f64], v: usize) -> f64 {
        // Central difference: error h²/6 · L''' ≈ 1e-10 and 1e-16 · L / h ≈ 1e-10.
        let h = 2e-5;
        let moved = |by: f64| {
            let mut z = z.to_vec();
            z[v] += by;
            self.loss(&z)
        };
        (moved(h) - moved(-h)) / (2.0 * h)
    }
}

fn lse(x: &[f64]) -> f64 {
    let m = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    m + x.iter().map(|v| (v - m).exp()).sum::<f64>().ln()
}

struct Dice(ChaCha8Rng);

impl Dice {
    fn new(seed: u64) -> Dice {
        Dice(ChaCha8Rng::seed_from_u64(seed))
    }

    /// Uniform in -1..1.
    fn signed(&mut self) -> f64 {
        f64::from(self.0.next_u32()) / f64::from(u32::MAX) * 2.0 - 1.0
    }

    fn below(&mut self, n: usize) -> usize {
        self.0.next_u32() as usize % n
    }

    fn values(&mut self, n: usize, size: f64) -> Vec<f32> {
        (0..n).map(|_| (self.signed() * size) as f32).collect()
    }
}

/// A teacher over `width` ids of which the `k` likeliest are kept: ids, log-probabilities, the tail's, and ln Z_T.
fn teacher(dice: &mut Dice, width: usize, k: usize, t: f64) -> (Vec<u32>, Vec<f32>, f32, f64) {
    let z: Vec<f64> = (0..width).map(|_| dice.signed() * 4.0).collect();
    let l: Vec<f64> = z.iter().map(|v| v - lse(&z)).collect();
    let mut order: Vec<usize> = (0..width).collect();
    order.sort_by(|a, b| l[*b].total_cmp(&l[*a]));
    let tail: Vec<f64> = order[k..].iter().map(|i| l[*i]).collect();
    let lse_t = lse(&l.iter().map(|l| l / t).collect::<Vec<f64>>());
    let tail = if tail.is_empty() { f64::NEG_INFINITY } else { lse(&tail) };
    (order[..k].iter().map(|i| *i as u32).collect(), order[..k].iter().map(|i| l[*i] as f32).collect(), tail as f32, lse_t)
}

const DIVERGENCES: [Divergence; 7] = [
    Divergence::ForwardKl,
    Divergence::ReverseKl,
    Divergence::Jsd { beta: 0.5 },
    Divergence::Jsd { beta: 0.2 },
    Divergence::SkewedKl { skew: 0.1 },
    Divergence::SkewedReverseKl { skew: 0.1 },
    Divergence::TotalVariation,
];
const TAILS: [Tail; 5] = [Tail::Bucket, Tail::Renorm, Tail::StudentFull, Tail::ExactTail, Tail::None];

fn all_settings() -> Vec<LossSettings> {
    let mut all = Vec::new();
    for divergence in DIVERGENCES {
        for tail in TAILS {
            for temperature in [1.0, 2.0, 0.5] {
                for (kd_alpha, kd_ce_alpha) in [(1.0, 0.0), (0.6, 0.4), (0.0, 1.0)] {
                    all.push(LossSettings { divergence, tail, temperature, kd_alpha, kd_ce_alpha });
                }
            }
        }
    }
    all.retain(|s| s.check().is_ok());
    all
}

#[test]
fn gradients_equal_finite_differences() {
    let mut dice = Dice::new(1);
    let mut compared = 0;
    for settings in all_settings() {
        for (vocab, width, k) in [(11, 11, 4), (11, 9, 4), (7, 7, 1), (6, 6, 6), (9, 6, 6)] {
            // Reverse KL to a teacher that gave the tail nothing is infinite in the twin (floored in ours).
            let infinite = settings.divergence == Divergence::ReverseKl && k == width && vocab > width;
            if infinite && settings.tail != Tail::Renorm {
                continue;
            }
            let (ids, logprobs, tail, lse_t) = teacher(&mut dice, width, k, settings.temperature);
            let z = dice.values(vocab, 3.0);
            let label = dice.below(vocab);
            // The cache's value is f32, so what the entries leave of it is the same in both.
            let lse_t = lse_t as f32;
            let twin = Twin { ids: &ids, logprobs: &logprobs, tail, lse_t: f64::from(lse_t), label, settings };
            let exact: Vec<f64> = z.iter().map(|z| f64::from(*z)).collect();
            let mut targets = SoftTargets::default();
            targets.push(&ids, &logprobs, tail);
            let mut gradient = z.clone();
            let sums = rows(&mut gradient, vocab, &[label as u32], Some(&targets), Some(&[lse_t]), &settings, 1.0).unwrap();
            let expected = twin.loss(&exact);
            // Sums of f32 exponentials: some 1e-7 relative, times T² = 4 in the loss. Entries of the gradient are at most T in size
            // and are rounded to f32 themselves: some 4e-7.
            let context = format!("{settings:?} V {vocab} of {width} k {k}");
            assert!((sums.total - expected).abs() < 1e-6 * expected.abs().max(1.0), "{context}: {} {expected}", sums.total);
            for (v, &found) in gradient.iter().enumerate() {
                let expected = twin.slope(&exact, v);
                assert!((f64::from(found) - expected).abs() <= 1e-6, "{context} at {v}: {expected:e} {found:e}");
                compared += 1;
            }
        }
    }
    assert!(compared > 8000, "{compared}");
}

/// A problem of `n` positions: hidden states, head, labels, targets.
struct Problem {
    hidden: Tensor,
    head: DenseWeight,
    placed: Option<DeviceWeight>,
    labels: Vec<u32>,
    targets: SoftTargets,
    lse_t: Vec<f32>,
}

impl Problem {
    fn head(&self) -> Head<'_> {
        Head { placed: self.placed.as_ref(), ..Head::new(&self.head, Precision::F32) }
    }

    /// Loss and gradient to the hidden states.
    fn through_the_head(&self, batch: &Batch<'_>, chunk: usize) -> (LossSums, Tensor) {
        let (sums, gradient) = fused_batch(&self.hidden, self.head(), batch, chunk, &RunContext::default()).unwrap().unwrap();
        (sums.wait().unwrap(), gradient)
    }
}

const H: usize = 72;
const V: usize = 203;
const KEPT: usize = 12;

fn problem(n: usize, t: f64) -> Problem {
    let mut dice = Dice::new(7);
    let (hidden, head) = (dice.values(n * H, 1.0), dice.values(V * H, 0.5));
    let head = DenseWeight::from_f32(V, H, &head).unwrap();
    let (mut targets, mut lse_t) = (SoftTargets::default(), Vec::new());
    for _ in 0..n {
        let (ids, logprobs, tail, lse) = teacher(&mut dice, V - 3, KEPT, t);
        targets.push(&ids, &logprobs, tail);
        lse_t.push(lse as f32);
    }
    Problem {
        hidden: Tensor::from_vec(hidden, (n, H), &support::device()).unwrap(),
        placed: Weight::Dense(head.clone()).placed(&support::device()).unwrap(),
        head,
        labels: (0..n).map(|_| dice.below(V) as u32).collect(),
        targets,
        lse_t,
    }
}

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn the_fused_head_equals_a_dense_one_in_float64() {
    for settings in all_settings().into_iter().filter(|s| s.kd_ce_alpha > 0.0) {
        let n = 5;
        let p = problem(n, settings.temperature);
        let (hidden, head) = (flat(&p.hidden), p.head.dequantize());
        let batch = Batch {
            labels: &p.labels,
            targets: Some(&p.targets),
            lse_t: Some(&p.lse_t),
            settings: &settings,
            scale: 1.0 / n as f64,
        };
        let (sums, gradient) = p.through_the_head(&batch, 2);
        let (gradient, mut total) = (flat(&gradient), 0.0);
        for i in 0..n {
            let logit = |h: &[f64], v: usize| (0..H).map(|j| h[j] * f64::from(head[v * H + j])).sum::<f64>();
            let h: Vec<f64> = hidden[i * H..][..H].iter().map(|h| f64::from(*h)).collect();
            let target = p.targets.position(i);
            let twin = Twin {
                ids: target.ids,
                logprobs: target.logprobs,
                tail: target.tail_logprob,
                lse_t: f64::from(p.lse_t[i]),
                label: p.labels[i] as usize,
                settings,
            };
            let loss = |h: &[f64]| twin.loss(&(0..V).map(|v| logit(h, v)).collect::<Vec<f64>>());
            total += loss(&h);
            for j in [0, 1, H / 2, H - 1] {
                let step = |by: f64| {
                    let mut h = h.clone();
                    h[j] += by;
                    loss(&h)
                };
                let expected = (step(1e-5) - step(-1e-5)) / 2e-5 / n as f64;
                let found = f64::from(gradient[i * H + j]);
                // Products of 72 and 203 f32 terms of size up to 1: some 1e-6.
                assert!((found - expected).abs() < 3e-6, "{settings:?} at {i}, {j}: {expected:e} {found:e}");
            }
        }
        assert!((sums.total - total).abs() < 1e-5 * total, "{settings:?}: {total} {}", sums.total);
    }
}

#[test]
fn chunks_do_not_change_a_bit() {
    let n = 23;
    let p = problem(n, 2.0);
    for tail in [Tail::Bucket, Tail::ExactTail] {
        let settings = LossSettings { tail, temperature: 2.0, kd_alpha: 0.7, kd_ce_alpha: 0.3, ..LossSettings::default() };
        let batch =
            Batch { labels: &p.labels, targets: Some(&p.targets), lse_t: Some(&p.lse_t), settings: &settings, scale: 0.1 };
        let (whole, gradient) = p.through_the_head(&batch, n);
        let bits = |t: &Tensor| flat(t).iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
        for chunk in [1, 2, 3, 7, 22, 1000] {
            let (sums, part) = p.through_the_head(&batch, chunk);
            assert_eq!((sums.kd.to_bits(), sums.ce.to_bits()), (whole.kd.to_bits(), whole.ce.to_bits()), "chunk {chunk}");
            assert_eq!(bits(&part), bits(&gradient), "chunk {chunk}");
        }
        let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let (sums, part) = alone.install(|| p.through_the_head(&batch, 7));
        assert_eq!((sums, bits(&part)), (whole, bits(&gradient)));
    }
}

#[test]
fn without_targets_it_is_plain_cross_entropy() {
    let p = problem(4, 1.0);
    let settings = LossSettings { kd_alpha: 0.0, kd_ce_alpha: 1.0, ..LossSettings::default() };
    let (alone, gradient) = fused(&p.hidden, p.head(), &p.labels, None, &settings, 1.0, 3).unwrap();
    let (both, same) = fused(&p.hidden, p.head(), &p.labels, Some(&p.targets), &settings, 1.0, 3).unwrap();
    assert_eq!((alone.kd, alone.total), (0.0, alone.ce));
    assert!((alone.ce - both.ce).abs() < 1e-6 && both.kd > 0.0);
    assert!(flat(&gradient).iter().zip(flat(&same)).all(|(a, b)| (a - b).abs() < 1e-6));
}

#[test]
fn no_position_no_loss() {
    let p = problem(1, 1.0);
    // A GPU has no memory of nothing.
    let hidden = Tensor::zeros((1, H), DType::F32, &support::device()).unwrap().narrow(0, 0, 0).unwrap();
    let (sums, gradient) =
        fused(&hidden, p.head(), &[], Some(&SoftTargets::default()), &LossSettings::default(), 1.0, 8).unwrap();
    assert_eq!((sums.total, gradient.dims()), (0.0, &[0, H][..]));
}

#[test]
fn a_row_that_is_not_finite_shows_in_the_sums() {
    for bad in [f32::NAN, f32::INFINITY] {
        for at in [0, 3] {
            let mut targets = SoftTargets::default();
            targets.push(&[0, 1], &[-0.5, -1.5], -1.7);
            let mut z = vec![0.5, 0.1, -0.2, 1.0];
            z[at] = bad;
            let sums = rows(&mut z, 4, &[2], Some(&targets), None, &LossSettings::default(), 1.0).unwrap();
            assert!(!sums.kd.is_finite() && !sums.ce.is_finite(), "{bad} at {at}: {sums:?}");
        }
    }
}

#[test]
fn rounded_teachers_never_give_a_negative_loss() {
    let mut dice = Dice::new(3);
    for _ in 0..200 {
        let (ids, logprobs, tail, _) = teacher(&mut dice, 30, 8, 1.0);
        // Mantissas of 7 bits, as a cache stores them.
        let round = |x: f32| f32::from_bits((x.to_bits() + 0x8000) & 0xffff_0000);
        let stored: Vec<f32> = logprobs.iter().map(|l| round(*l)).collect();
        let mut targets = SoftTargets::default();
        targets.push(&ids, &stored, round(tail));
        let mut z = vec![-8.0_f32; 30];
        ids.iter().zip(&stored).for_each(|(i, l)| z[*i as usize] = *l);
        for tail in [Tail::Bucket, Tail::Renorm] {
            for divergence in DIVERGENCES {
                let settings = LossSettings { divergence, tail, ..LossSettings::default() };
                let sums = rows(&mut z.clone(), 30, &[0], Some(&targets), None, &settings, 1.0).unwrap();
                assert!(sums.kd >= 0.0, "{settings:?}: {:e}", sums.kd);
            }
        }
    }
}

#[track_caller]
fn refused(result: potstill_pipeline::Result<potstill_pipeline::loss::LossSums>, words: &[&str]) {
    let text = result.unwrap_err().to_string();
    words.iter().for_each(|word| assert!(text.contains(word), "{word:?} is not in {text:?}"));
}

#[test]
fn inputs_that_lie_are_refused() {
    let plain = LossSettings::default();
    let one = |ids: &[u32], logprobs: &[f32], tail: f32| {
        let mut targets = SoftTargets::default();
        targets.push(ids, logprobs, tail);
        targets
    };
    let good = one(&[0, 2], &[-0.5, -1.5], -1.7);
    let run = |logits: usize, labels: &[u32], targets: &SoftTargets, lse_t: Option<&[f32]>, settings: &LossSettings| {
        rows(&mut vec![0.0; logits], 4, labels, Some(targets), lse_t, settings, 1.0)
    };
    run(4, &[3], &good, None, &plain).unwrap();
    refused(run(5, &[3], &good, None, &plain), &["logits", "1 rows of 4", "found 5"]);
    refused(run(8, &[3, 1], &good, None, &plain), &["targets", "expected 2", "found 1"]);
    refused(run(4, &[4], &good, None, &plain), &["position 0", "label 4", "vocabulary of 4"]);
    refused(run(4, &[3], &one(&[0, 4], &[-0.5, -1.5], -1.7), None, &plain), &["id 4", "vocabulary of 4"]);
    refused(run(4, &[3], &one(&[2, 2], &[-0.5, -1.5], -1.7), None, &plain), &["id 2", "listed twice"]);
    refused(run(4, &[3], &one(&[2, 0], &[f32::NAN, -1.5], -1.7), None, &plain), &["log-probabilities", "NaN"]);
    refused(run(4, &[3], &one(&[2, 0], &[-0.5, -1.5], f32::INFINITY), None, &plain), &["log-probabilities", "inf"]);
    refused(run(4, &[3], &one(&[2, 0], &[5.0, -1.5], -1.7), None, &plain), &["log-probabilities", "at most 0", "found 5"]);
    refused(run(4, &[3], &one(&[2, 0], &[-0.5, -1.5], 1e-3), None, &plain), &["log-probabilities", "found 0.001"]);
    let zero = one(&[2, 0], &[f32::NEG_INFINITY; 2], f32::NEG_INFINITY);
    refused(run(4, &[3], &zero, None, &plain), &["2 kept ids", "no probability"]);

    let exact = LossSettings { tail: Tail::ExactTail, temperature: 2.0, ..plain };
    refused(run(4, &[3], &good, None, &exact), &["ln Z_T", "expected 1", "found 0"]);
    refused(run(4, &[3], &good, None, &LossSettings { tail: Tail::None, ..exact }), &["ln Z_T", "expected 1", "found 0"]);
    refused(run(4, &[3], &good, Some(&[f32::NAN]), &exact), &["position 0", "ln Z_T", "NaN"]);
    for (settings, words) in [
        (LossSettings { temperature: 0.0, ..plain }, ["temperature = 0", "above 0"]),
        (LossSettings { temperature: f64::NAN, ..plain }, ["temperature = NaN", "above 0"]),
        (LossSettings { kd_alpha: -1.0, ..plain }, ["kd_alpha = -1", "0 or above"]),
        (LossSettings { kd_ce_alpha: f64::INFINITY, ..plain }, ["kd_ce_alpha = inf", "finite"]),
        (LossSettings { divergence: Divergence::Jsd { beta: 1.0 }, ..plain }, ["beta = 1", "between 0 and 1"]),
        (LossSettings { divergence: Divergence::ReverseKl, tail: Tail::StudentFull, ..plain }, ["studentfull", "reverse KL"]),
        (LossSettings { divergence: Divergence::SkewedKl { skew: 1.0 }, ..plain }, ["skew = 1", "between 0 and 1"]),
        (LossSettings { divergence: Divergence::TotalVariation, tail: Tail::None, ..plain }, ["tail = none", "total variation"]),
    ] {
        refused(run(4, &[3], &good, None, &settings), &words);
    }

    let p = problem(3, 1.0);
    let wrong = |hidden: &Tensor, chunk| fused(hidden, p.head(), &p.labels, None, &plain, 1.0, chunk).map(|r| r.0);
    refused(wrong(&p.hidden.narrow(0, 0, 2).unwrap(), 4), &["hidden states", "F32 [3, 72]", "F32 [2, 72]"]);
    refused(wrong(&p.hidden.narrow(1, 0, 2).unwrap(), 4), &["hidden states", "F32 [3, 72]", "F32 [3, 2]"]);
    refused(
        wrong(&Tensor::zeros((3, H), DType::BF16, &support::device()).unwrap(), 4),
        &["hidden states", "F32 [3, 72]", "BF16 [3, 72]"],
    );
    refused(wrong(&p.hidden, 0), &["head_chunk = 0"]);
}
