//! Figures beside a twin in f64 that knows whole distributions and adds nothing up cleverly.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::loss::Tail;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

const VOCAB: usize = 37;

/// Between −4 and 4.
fn logits(random: &mut ChaCha8Rng) -> Vec<f32> {
    (0..VOCAB).map(|_| (random.next_u32() >> 8) as f32 / (1 << 21) as f32 - 4.0).collect()
}

fn softmax(z: &[f32]) -> Vec<f64> {
    let e: Vec<f64> = z.iter().map(|z| f64::from(*z).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|e| e / sum).collect()
}

/// The `k` likeliest of p, and the tail.
fn kept(p: &[f64], k: usize) -> SoftTargets {
    let mut ids: Vec<u32> = (0..p.len() as u32).collect();
    ids.sort_by(|a, b| p[*b as usize].total_cmp(&p[*a as usize]));
    let logprobs: Vec<f32> = ids[..k].iter().map(|id| p[*id as usize].ln() as f32).collect();
    let tail: f64 = ids[k..].iter().map(|id| p[*id as usize]).sum();
    let mut targets = SoftTargets::default();
    targets.push(&ids[..k], &logprobs, tail.ln() as f32);
    targets
}

fn expected<'a>(label: u32, targets: &'a SoftTargets) -> Expected<'a> {
    Expected { label, read: Some(targets), drawn: false, lse_t: None, stored: Some(targets.position(0)) }
}

#[test]
fn a_row_is_what_a_dense_twin_says() {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let settings = LossSettings { kd_alpha: 0.25, kd_ce_alpha: 2.0, tail: Tail::Bucket, ..LossSettings::default() };
    let (mut hits, mut agreements) = (0, 0);
    for row in 0..200 {
        let z = logits(&mut random);
        let near: Vec<f32> = z.iter().zip(logits(&mut random)).map(|(z, other)| z + 0.3 * other).collect();
        let (q, p) = (softmax(&z), softmax(&near));
        let (label, k) = (random.next_u32() % 3, 1 + row % 20);
        let targets = kept(&p, k);
        let found = Row::of(&mut z.clone(), &expected(label, &targets), &settings).unwrap();

        let argmax = |p: &[f64]| (0..VOCAB).max_by(|a, b| p[*a].total_cmp(&p[*b])).unwrap();
        let ids = targets.ids();
        let (p_kept, q_kept): (f64, f64) =
            ids.iter().map(|id| (p[*id as usize], q[*id as usize])).fold((0.0, 0.0), |s, x| (s.0 + x.0, s.1 + x.1));
        let kd: f64 = ids.iter().map(|id| p[*id as usize] * (p[*id as usize] / q[*id as usize]).ln()).sum::<f64>()
            + (1.0 - p_kept) * ((1.0 - p_kept) / (1.0 - q_kept)).ln();
        let ce = -q[label as usize].ln();
        // Stored values and the loss's exponentials are f32: 1e-7 of numbers up to 10.
        let near = |a: f64, b: f64, what: &str| assert!((a - b).abs() < 2e-6, "row {row}, {what}: {a} {b}");
        near(found.sums.kd, kd, "kd");
        near(found.sums.ce, ce, "ce");
        near(found.sums.total, 0.25 * kd + 2.0 * ce, "loss");
        let (student, teacher) = found.masses.unwrap();
        near(student, q_kept, "student's mass");
        near(teacher, p_kept, "teacher's mass");
        near(found.confidence, q[argmax(&q)], "confidence");
        assert_eq!((found.hit, found.agrees), (argmax(&q) == label as usize, Some(argmax(&q) == argmax(&p))));
        hits += u32::from(found.hit);
        agreements += u32::from(found.agrees == Some(true));
    }
    assert!(hits > 0 && (20..200).contains(&agreements), "both answers occur: {hits} {agreements}");
}

#[test]
fn what_is_not_known_is_not_said() {
    let z = vec![0.5f32, 2.0, 2.0, -1.0];
    let settings = LossSettings { kd_alpha: 0.0, kd_ce_alpha: 1.0, ..LossSettings::default() };
    let bare = Expected { label: 1, read: None, drawn: false, lse_t: None, stored: None };
    let row = Row::of(&mut z.clone(), &bare, &settings).unwrap();
    // Of equal logits the smaller id is the top one.
    assert!(row.hit && row.agrees.is_none() && row.masses.is_none());
    let mut tally = Tally::default();
    tally.add(&row);
    let evaluation = tally.close(3).unwrap();
    assert_eq!((evaluation.kd, evaluation.agreement, evaluation.kept_mass), (None, None, None));
    assert_eq!(evaluation.loss, evaluation.ce);
    let names: Vec<&str> = evaluation.figures().iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["loss", "ce", "perplexity", "ece"]);

    // Draws have a divergence as training takes it, but no mass and, without a head, no top token.
    let mut draws = SoftTargets::default();
    draws.push(&[2], &[0.0], f32::NEG_INFINITY);
    let mut stored = SoftTargets::default();
    stored.push(&[], &[], 0.0);
    let drawn = Expected { label: 2, read: Some(&draws), drawn: true, lse_t: None, stored: Some(stored.position(0)) };
    let settings = LossSettings { tail: Tail::StudentFull, ..LossSettings::default() };
    let row = Row::of(&mut z.clone(), &drawn, &settings).unwrap();
    assert!(row.kd && !row.hit && row.agrees.is_none() && row.masses.is_none());
    assert!(Tally::default().close(1).is_none());
}

#[test]
fn means_are_over_positions() {
    let row = |total, kd, ce, agrees| Row {
        sums: LossSums { total, kd, ce },
        kd: true,
        confidence: 0.5,
        hit: false,
        agrees,
        masses: Some((0.25, 0.75)),
    };
    let mut tally = Tally::default();
    for row in [row(1.0, 2.0, 3.0, Some(true)), row(2.0, 4.0, 1.0, Some(false)), row(6.0, 0.0, 2.0, None)] {
        tally.add(&row);
    }
    assert_eq!(tally.positions(), 3);
    let found = tally.close(7).unwrap();
    assert_eq!((found.step, found.loss, found.kd, found.ce, found.agreement), (7, 3.0, Some(2.0), 2.0, Some(0.5)));
    assert_eq!((found.kept_mass, found.teacher_kept_mass, found.ece), (Some(0.25), Some(0.75), 0.5));
    assert_eq!(found.perplexity, 2.0f64.exp() as f32);
    // What JSON gives back is what was written, to the bit.
    for figure in (0..1000).map(|i| (f64::from(i).sin().powi(9) * 100.0) as f32) {
        let evaluation = Evaluation { loss: figure, angle: Some(figure), ..found.clone() };
        let again: Evaluation = serde_json::from_str(&serde_json::to_string(&evaluation).unwrap()).unwrap();
        assert_eq!(again, evaluation);
    }
}

#[test]
fn a_position_that_is_not_finite_is_left_out_and_counted() {
    let settings = LossSettings { kd_alpha: 0.0, kd_ce_alpha: 1.0, ..LossSettings::default() };
    let row = |z: [f32; 4]| {
        let bare = Expected { label: 1, read: None, drawn: false, lse_t: None, stored: None };
        Row::of(&mut z.clone(), &bare, &settings).unwrap()
    };
    let of = |rows: &[Row]| {
        let mut tally = Tally::default();
        rows.iter().for_each(|row| tally.add(row));
        (tally.positions(), tally.close(3))
    };
    let (good, nan, infinite) =
        (row([0.5, 2.0, 1.0, -1.0]), row([0.5, f32::NAN, 1.0, -1.0]), row([f32::INFINITY, 2.0, 1.0, 0.0]));
    let (positions, found) = of(&[nan, good, infinite]);
    let found = found.unwrap();
    assert_eq!((positions, found.positions_not_finite), (3, 2));
    let whole = of(&[good]).1.unwrap();
    assert_eq!(found, Evaluation { positions_not_finite: 2, ..whole.clone() });
    assert!(found.figures().contains(&("positions_not_finite", 2.0)));
    assert!(!serde_json::to_string(&whole).unwrap().contains("not_finite"));
    assert_eq!(of(&[nan, infinite]), (2, None), "of nothing there is no mean");
}
