//! The loss family: values by PyTorch, never below 0, what the unnormalised loss is, drawn tokens without bias, names.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use potstill_cache::{SoftTargets, Target};
use potstill_pipeline::loss::{DEFAULT_SKEW, Divergence, LossSettings, Tail, rows};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

const ALL: [Divergence; 8] = [
    Divergence::ForwardKl,
    Divergence::ReverseKl,
    Divergence::Jsd { beta: 0.5 },
    Divergence::Jsd { beta: 0.9 },
    Divergence::SkewedKl { skew: DEFAULT_SKEW },
    Divergence::SkewedReverseKl { skew: DEFAULT_SKEW },
    Divergence::SkewedReverseKl { skew: 0.9 },
    Divergence::TotalVariation,
];
const SKEWED: Divergence = Divergence::SkewedKl { skew: 0.1 };
const SKEWED_REVERSE: Divergence = Divergence::SkewedReverseKl { skew: 0.1 };

/// Divergence, tail, T, loss, and its gradient by the student's logits, without T².
type Case = (Divergence, Tail, f64, f64, [f64; 6]);

/// PyTorch 2 in float64 with automatic differentiation, from whole distributions: teacher P, student's logits Z, the first three kept.
const P: [f64; 6] = [0.5, 0.2, 0.1, 0.08, 0.07, 0.05];
const Z: [f32; 6] = [1.0, -0.5, 2.0, 0.25, -1.5, 0.75];
#[rustfmt::skip]
const CASES: [Case; 14] = [
    (SKEWED, Tail::Bucket, 1.0, 0.4582203515352748, [-0.235106550656, -0.09729794398, 0.31414773957, 0.006468303285, 0.001124022569, 0.010664429211]),
    (SKEWED_REVERSE, Tail::Bucket, 1.0, 0.4846378213717981, [-0.228134790024, -0.074094119919, 0.345771249648, -0.01542689585, -0.002680792527, -0.025434651328]),
    (Divergence::TotalVariation, Tail::Bucket, 1.0, 0.46811222757724014, [-0.145622959213, -0.032492874211, 0.119502641195, 0.020766445213, 0.003608667076, 0.03423807994]),
    (SKEWED, Tail::ExactTail, 1.0, 0.4582203515352748, [-0.235106550656, -0.09729794398, 0.31414773957, 0.006468303285, 0.001124022569, 0.010664429211]),
    (SKEWED_REVERSE, Tail::ExactTail, 1.0, 0.4846378213717981, [-0.228134790024, -0.074094119919, 0.345771249648, -0.01542689585, -0.002680792527, -0.025434651328]),
    (Divergence::TotalVariation, Tail::ExactTail, 1.0, 0.46811222757724014, [-0.145622959213, -0.032492874211, 0.119502641195, 0.020766445213, 0.003608667076, 0.03423807994]),
    (Divergence::ForwardKl, Tail::None, 1.0, 0.6316123514501024, [-0.348331580741, -0.166158201321, 0.312277508024, 0.071643088365, 0.012449701986, 0.118119483686]),
    (SKEWED, Tail::Bucket, 2.0, 0.13546518077553843, [-0.05480831121, -0.04623270108, 0.08957564416, 0.004062139086, 0.000705893928, 0.006697335116]),
    (SKEWED_REVERSE, Tail::Bucket, 2.0, 0.14019814904224998, [-0.057624250667, -0.04153836925, 0.098071317169, 0.000386644676, 6.718877e-05, 0.000637469302]),
    (Divergence::TotalVariation, Tail::Bucket, 2.0, 0.2575576620334966, [-0.076670402234, -0.0362165336, 0.066390801515, 0.016473414759, 0.002862650245, 0.027160069315]),
    (SKEWED, Tail::ExactTail, 2.0, 0.11498592322995732, [-0.04619615583, -0.039249930905, 0.077903009441, 0.002792814389, 0.001164218247, 0.003586044659]),
    (SKEWED_REVERSE, Tail::ExactTail, 2.0, 0.11927662415449161, [-0.047500255007, -0.034731962587, 0.08738221679, -0.001906780389, -0.000794864324, -0.002448354483]),
    (Divergence::TotalVariation, Tail::ExactTail, 2.0, 0.219148391629514, [-0.070738876303, -0.033414679144, 0.048992748124, 0.020423215933, 0.008513663042, 0.026223928348]),
    (Divergence::ForwardKl, Tail::None, 2.0, 0.17013671334745806, [-0.091824027691, -0.068624728181, 0.038116279723, 0.045293437446, 0.018881113812, 0.05815792489]),
];

#[test]
fn values_and_gradients_are_those_of_pytorch() {
    let mut targets = SoftTargets::default();
    let kept: Vec<f32> = P[..3].iter().map(|p| p.ln() as f32).collect();
    targets.push(&[0, 1, 2], &kept, P[3..].iter().sum::<f64>().ln() as f32);
    for (divergence, tail, temperature, value, slopes) in CASES {
        let settings = LossSettings { divergence, tail, temperature, kd_alpha: 1.0, kd_ce_alpha: 0.0 };
        let lse_t = [P.iter().map(|p| p.powf(1.0 / temperature)).sum::<f64>().ln() as f32];
        let mut z = Z;
        let scale = temperature.powi(-2);
        let sums = rows(&mut z, 6, &[0], Some(&targets), Some(&lse_t), &settings, scale).unwrap();
        // f32 teacher values and exponentials: some 1e-7 of values of size 1.
        assert!((sums.kd - value).abs() < 1e-6, "{settings:?}: expected {value}, found {}", sums.kd);
        for (found, expected) in z.iter().zip(slopes) {
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{settings:?}: expected {expected}, found {found}");
        }
    }
}

struct Dice(ChaCha8Rng);

impl Dice {
    /// Uniform in 0..1.
    fn share(&mut self) -> f64 {
        f64::from(self.0.next_u32()) / f64::from(u32::MAX)
    }

    fn logits(&mut self, n: usize, size: f64) -> Vec<f64> {
        (0..n).map(|_| (self.share() - 0.5) * size).collect()
    }
}

/// A mantissa of `bits` bits.
fn rounded(x: f64, bits: u32) -> f32 {
    let bits = 23 - bits;
    f32::from_bits(((x as f32).to_bits() + (1 << bits >> 1)) & !((1 << bits) - 1))
}

/// The target of a teacher of these logits, rounded: the `k` likeliest, the tail, ln Z_T.
fn stored(z: &[f64], k: usize, bits: u32, t: f64) -> (SoftTargets, f32) {
    let lse = |z: &[f64]| z.iter().map(|z| z.exp()).sum::<f64>().ln();
    let mut ln: Vec<(usize, f64)> = z.iter().map(|v| v - lse(z)).enumerate().collect();
    ln.sort_by(|a, b| b.1.total_cmp(&a.1));
    let tail: f64 = ln[k..].iter().map(|(_, l)| l.exp()).sum();
    let mut targets = SoftTargets::default();
    let ids: Vec<u32> = ln[..k].iter().map(|(i, _)| *i as u32).collect();
    let logprobs: Vec<f32> = ln[..k].iter().map(|(_, l)| rounded(*l, bits).min(0.0)).collect();
    targets.push(&ids, &logprobs, rounded(tail.ln(), bits));
    (targets, lse(&ln.iter().map(|(_, l)| l / t).collect::<Vec<_>>()) as f32)
}

#[track_caller]
fn never_negative(z: &[f32], targets: &SoftTargets, lse_t: f32, temperature: f64) {
    for divergence in ALL {
        for tail in [Tail::Bucket, Tail::Renorm, Tail::StudentFull, Tail::ExactTail] {
            let settings = LossSettings { divergence, tail, temperature, ..LossSettings::default() };
            if settings.check().is_err() {
                continue;
            }
            let mut z = z.to_vec();
            let vocab = z.len();
            let sums = rows(&mut z, vocab, &[0], Some(targets), Some(&[lse_t]), &settings, 1.0).unwrap();
            assert!(sums.kd >= 0.0, "{settings:?}: {:e}", sums.kd);
            assert!(sums.kd.is_finite() && z.iter().all(|g| g.is_finite()), "{settings:?}: {:e}", sums.kd);
        }
    }
}

#[test]
fn none_is_ever_below_zero() {
    let mut dice = Dice(ChaCha8Rng::seed_from_u64(11));
    for case in 0..300 {
        let size = [0.0, 0.5, 4.0, 30.0, 120.0][case % 5];
        let teacher = dice.logits(24, size);
        let (k, bits) = (1 + case % 24, [4, 5, 7, 23][case % 4]);
        let t = [0.05, 0.25, 0.5, 1.0, 2.0, 5.0, 100.0][case % 7];
        let (targets, lse_t) = stored(&teacher, k, bits, t);
        // A student that is the teacher but for rounding, one that is near, and one that is far.
        for distance in [0.0, 1e-4, 20.0] {
            let student: Vec<f32> = teacher.iter().map(|z| (z + dice.logits(1, distance)[0]) as f32).collect();
            never_negative(&student, &targets, lse_t, t);
        }
    }
}

#[test]
fn edges_are_not_below_zero_either() {
    let nothing = f32::NEG_INFINITY;
    for (ids, logprobs, tail) in [
        (&[2][..], &[0.0_f32][..], nothing),
        (&[2], &[-1e-7], -16.0),
        (&[0, 1], &[-0.693, -0.693], nothing),
        (&[1, 0], &[0.0, nothing], nothing),
        (&[3, 2, 1, 0], &[-1.386, -1.386, -1.386, -1.386], nothing),
        (&[3, 2, 1, 0], &[-0.1, -4.0, -5.0, -6.0], -20.72),
    ] {
        let mut targets = SoftTargets::default();
        targets.push(ids, logprobs, tail);
        for z in [[0.0; 4], [1e4, 1e4 + 1.0, 1e4 - 2.0, 1e4], [80.0, 0.0, -80.0, 0.0], [0.0, 0.0, 90.0, 0.0]] {
            for t in [0.5, 1.0, 2.0] {
                never_negative(&z, &targets, 0.1, t);
            }
        }
    }
}

#[test]
fn the_unnormalised_loss_is_what_it_says() {
    let mut targets = SoftTargets::default();
    targets.push(&[0, 1], &[0.5_f32.ln(), 0.25_f32.ln()], 0.25_f32.ln());
    let settings = LossSettings { tail: Tail::None, ..LossSettings::default() };
    // A student that gives the kept ids their proportions and the rest nothing (e⁻⁴⁰): Σ p ln(p / q) = 0.75 ln 0.75.
    let mut z = [2.0_f32.ln(), 0.0, -40.0, -40.0];
    let sums = rows(&mut z, 4, &[0], Some(&targets), None, &settings, 1.0).unwrap();
    assert!((sums.kd - 0.75 * 0.75_f64.ln()).abs() < 1e-6, "{}", sums.kd);
    assert!(z.iter().all(|g| g.abs() < 1e-6), "its least value lies there: {z:?}");
    // Anywhere, the gradient is M q − p.
    let mut z = [0.3, -1.0, 0.8, 0.1];
    let sum: f64 = z.iter().map(|z: &f32| f64::from(*z).exp()).sum();
    let expected: Vec<f64> = z.iter().zip([0.5, 0.25, 0.0, 0.0]).map(|(z, p)| 0.75 * f64::from(*z).exp() / sum - p).collect();
    rows(&mut z, 4, &[0], Some(&targets), None, &settings, 1.0).unwrap();
    assert!(z.iter().zip(&expected).all(|(g, e)| (f64::from(*g) - e).abs() < 1e-6), "{z:?} {expected:?}");
}

/// Every sequence of `draws` draws from `p`, as counts, with its probability.
fn outcomes(p: &[f64], draws: usize) -> Vec<(Vec<u16>, f64)> {
    let mut all = vec![(vec![0; p.len()], 1.0)];
    for _ in 0..draws {
        let one_more = |(counts, probability): &(Vec<u16>, f64)| {
            let (counts, probability) = (counts.clone(), *probability);
            (0..p.len())
                .map(|i| {
                    let mut counts = counts.clone();
                    counts[i] += 1;
                    (counts, probability * p[i])
                })
                .collect::<Vec<_>>()
        };
        all = all.iter().flat_map(one_more).collect();
    }
    all
}

#[test]
fn drawn_tokens_give_the_dense_gradient_on_average() {
    let (p, z) = ([0.45, 0.3, 0.2, 0.05], [0.4_f32, -0.3, 1.0, -2.0]);
    let sum: f64 = z.iter().map(|z| f64::from(*z).exp()).sum();
    let q: Vec<f64> = z.iter().map(|z| f64::from(*z).exp() / sum).collect();
    let settings = LossSettings { tail: Tail::StudentFull, ..LossSettings::default() };
    // All drawn; and the likeliest kept, the others drawn.
    for head in [0, 1] {
        let tail: f64 = p[head..].iter().sum();
        let proposal: Vec<f64> = p[head..].iter().map(|p| p / tail).collect();
        let (mut mean, mut cross_entropy) = ([0.0; 4], 0.0);
        let all = outcomes(&proposal, 3);
        assert_eq!(all.len(), (4 - head).pow(3));
        for (counts, probability) in all {
            let drawn: Vec<u32> = (0..4 - head).filter(|i| counts[*i] > 0).map(|i| (i + head) as u32).collect();
            let mut targets = SoftTargets::default();
            targets.push_target(&Target {
                ids: &[0][..head],
                logprobs: &[p[0].ln() as f32][..head],
                tail_logprob: if head == 0 { f32::NEG_INFINITY } else { tail.ln() as f32 },
                sample_ids: &drawn,
                sample_counts: &counts.iter().copied().filter(|c| *c > 0).collect::<Vec<_>>(),
                ..Target::default()
            });
            let weights: Vec<f64> = targets.estimate().logprobs().iter().map(|l| f64::from(*l).exp()).collect();
            let mut g = z;
            let sums = rows(&mut g, 4, &[0], Some(&targets.estimate()), None, &settings, 1.0).unwrap();
            mean.iter_mut().zip(g).for_each(|(mean, g)| *mean += probability * f64::from(g));
            // The loss is the weighted cross entropy, less the weights' entropy, which has no gradient.
            cross_entropy += probability * (sums.kd - weights.iter().map(|w| w * w.ln()).sum::<f64>());
        }
        // f32 weights and exponentials: some 1e-7 each, averaged.
        for (i, found) in mean.iter().enumerate() {
            assert!((found - (q[i] - p[i])).abs() < 1e-6, "head {head}, id {i}: {found}, expected {}", q[i] - p[i]);
        }
        let dense: f64 = -p.iter().zip(&q).map(|(p, q)| p * q.ln()).sum::<f64>();
        assert!((cross_entropy - dense).abs() < 1e-6, "head {head}: {cross_entropy}, expected {dense}");
    }
}

#[test]
fn names_of_tails() {
    for (name, tail) in [
        ("bucket", Tail::Bucket),
        ("ghost", Tail::Bucket),
        ("renorm", Tail::Renorm),
        ("studentfull", Tail::StudentFull),
        ("exact_tail", Tail::ExactTail),
        ("none", Tail::None),
    ] {
        assert_eq!(serde_json::from_str::<Tail>(&format!("{name:?}")).unwrap(), tail);
        assert!(name == "ghost" || tail.name() == name);
    }
}
