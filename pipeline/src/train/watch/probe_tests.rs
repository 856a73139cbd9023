//! The probe beside a dense twin in f64 with formulas of its own.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::loss::Tail;
use potstill_cache::Selection;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

const VOCAB: usize = 40;
/// Ids of the cache's vocabulary; the student has a few more.
const KNOWN: usize = 37;

fn values(random: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| (random.next_u32() >> 8) as f32 / (1 << 21) as f32 - 4.0).collect()
}

fn shares(z: &[f32]) -> Vec<f64> {
    let e: Vec<f64> = z.iter().map(|z| f64::from(*z).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|e| e / sum).collect()
}

/// All of p, likeliest first, as a cache keeps it.
fn dense(p: &[f64]) -> SoftTargets {
    let mut ids: Vec<u32> = (0..p.len() as u32).collect();
    ids.sort_by(|a, b| p[*b as usize].total_cmp(&p[*a as usize]));
    let logprobs: Vec<f32> = ids.iter().map(|id| p[*id as usize].ln() as f32).collect();
    let mut targets = SoftTargets::default();
    targets.push(&ids, &logprobs, f32::NEG_INFINITY);
    targets
}

/// Student's logits, the teacher's whole distribution, and that as a cache keeps it.
fn position(random: &mut ChaCha8Rng) -> (Vec<f32>, Vec<f64>, SoftTargets) {
    let z = values(random, VOCAB);
    let p = shares(&values(random, KNOWN));
    let targets = dense(&p);
    (z, p, targets)
}

/// The angle by its cosine.
fn by_cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()).acos().to_degrees()
}

#[test]
fn the_angle_is_that_of_a_dense_twin() {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    let mixed = LossSettings { kd_alpha: 0.7, kd_ce_alpha: 0.3, tail: Tail::Bucket, ..LossSettings::default() };
    for (settings, k) in [(LossSettings::default(), 1), (LossSettings::default(), 5), (LossSettings::default(), 20), (mixed, 5)] {
        for _ in 0..20 {
            let (z, p, whole) = position(&mut random);
            let q = shares(&z);
            let label = random.next_u32() % KNOWN as u32;
            let read = whole.narrowed(&Selection::TopK { k });
            let look = Look::of(&z, whole.position(0), (label, Some(&read), None), &settings).unwrap();
            // Forward KL on kept ids and one bucket: Q − P on those, and for another token its share of the bucket's Q − P.
            let kept: Vec<usize> = read.ids().iter().map(|id| *id as usize).collect();
            let (p_kept, q_kept): (f64, f64) = (kept.iter().map(|v| p[*v]).sum(), kept.iter().map(|v| q[*v]).sum());
            let narrow = |v: usize| match kept.contains(&v) {
                true => q[v] - p[v],
                false => q[v] / (1.0 - q_kept) * (p_kept - q_kept),
            };
            let ce = |v: usize| q[v] - if v == label as usize { 1.0 } else { 0.0 };
            let run: Vec<f64> = (0..VOCAB).map(|v| settings.kd_alpha * narrow(v) + settings.kd_ce_alpha * ce(v)).collect();
            let full: Vec<f64> = (0..VOCAB).map(|v| q[v] - p.get(v).copied().unwrap_or(0.0)).collect();
            let (found, expected) = (look.angle.unwrap(), by_cosine(&run, &full));
            // The run's gradient is f32, 1e-6 of itself: 6e-5 degrees; the twin's cosine loses far less at these angles.
            assert!(expected > 0.1 && (found - expected).abs() < 2e-4, "k = {k}: {found} {expected}");
        }
    }
}

#[test]
fn who_reads_everything_goes_straight() {
    let mut random = ChaCha8Rng::seed_from_u64(12);
    let mut looks = Looks::default();
    for _ in 0..10 {
        let z = values(&mut random, KNOWN);
        let (_, _, whole) = position(&mut random);
        let look = Look::of(&z, whole.position(0), (0, Some(&whole), None), &LossSettings::default()).unwrap();
        // As in the test above; a cosine in f64 could not tell angles below 1e-6 degrees from 0, one in f32 below 0.03.
        assert!(look.angle.unwrap() < 1e-4, "{look:?}");
        looks.add(&look);
    }
    assert!(looks.close().0.unwrap() < 1e-4);
    assert_eq!(degrees_between(&[1.0, 0.0], &[0.0, 2.0]), Some(90.0));
    assert_eq!(degrees_between(&[1.0, 1.0], &[-3.0, -3.0]), Some(180.0));
    let tiny = degrees_between(&[1.0, 0.0], &[1.0, 1e-9]).unwrap();
    assert!((tiny.to_radians() - 1e-9).abs() < 1e-15, "{tiny:e}");
    assert_eq!(degrees_between(&[0.0, 0.0], &[1.0, 0.0]), None);
    assert_eq!(degrees_between(&[f64::NAN, 0.0], &[1.0, 0.0]), None);
}

#[test]
fn calibration_against_the_teacher_is_binned_by_what_the_student_says() {
    let mut random = ChaCha8Rng::seed_from_u64(13);
    let (mut looks, mut naive) = (Looks::default(), [0.0; BINS]);
    for _ in 0..30 {
        let (z, p, whole) = position(&mut random);
        for (v, q) in shares(&z).into_iter().enumerate() {
            let bin = (0..BINS - 1).find(|b| q > 0.5f64.powi(*b as i32 + 1)).unwrap_or(BINS - 1);
            naive[bin] += p.get(v).copied().unwrap_or(0.0) - q;
        }
        looks.add(&Look::of(&z, whole.position(0), (0, Some(&whole), None), &LossSettings::default()).unwrap());
    }
    let expected: f64 = naive.iter().map(|gap| gap.abs()).sum::<f64>() / 30.0;
    // P is stored as f32 logarithms: 1e-6 of values that add up to 1.
    assert!((looks.close().1.unwrap() - expected).abs() < 2e-6, "{looks:?} {expected}");
    assert!(expected > 0.01, "{expected}");
    assert_eq!([1.0, 0.6, 0.5, 0.49, 0.25, 1e-9, 0.0].map(bin), [0, 0, 1, 1, 2, 14, 14]);
    assert_eq!(Looks::default().close(), (None, None));

    // A student that is the teacher is calibrated, whatever the positions.
    let z: Vec<f32> = values(&mut random, KNOWN);
    let own = dense(&shares(&z));
    let mut looks = Looks::default();
    looks.add(&Look::of(&z, own.position(0), (0, Some(&own), None), &LossSettings::default()).unwrap());
    assert!(looks.close().1.unwrap() < 1e-6);
    assert!(is_dense(own.position(0), KNOWN as u32) && !is_dense(own.position(0), VOCAB as u32));
}
