//! Figures beside float64 ones that numpy computed of the same logits, and what a cache that keeps less leaves out.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use candle_core::{DType, Device, Tensor};
use serde_json::Value;
use std::collections::HashMap;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures");
/// Kept ids of the reference batch.
const K: usize = 32;
const VOCAB: usize = 2048;

/// The 49 scored positions of the reference batch, which is two conversations.
fn batch() -> (Vec<f32>, Vec<u32>, Beside) {
    let file = format!("{FIXTURES}/golden/expected/loss_batch.safetensors");
    let file: HashMap<String, Tensor> = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let floats = |name: &str| file[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let ids = |name: &str| file[name].flatten_all().unwrap().to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap();
    let (labels, all, logprobs, tails) =
        (ids("labels"), ids("teacher_ids"), floats("teacher_logprobs"), floats("teacher_tail_logprob"));
    let scored: Vec<usize> = (0..labels.len()).filter(|i| ids("loss_mask")[*i] == 1).collect();
    let mut beside = Beside { targets: SoftTargets::default(), rows: scored.iter().map(|i| (i / 64) as u64).collect() };
    scored.iter().for_each(|&i| beside.targets.push(&all[i * K..][..K], &logprobs[i * K..][..K], tails[i]));
    (floats("student_logits"), scored.iter().map(|i| labels[*i]).collect(), beside)
}

fn figures(logits: Vec<f32>, labels: &[u32], beside: &Beside) -> Option<Figures> {
    let mut tally = Tally::default();
    let chunk = Chunk { logits, vocab: VOCAB, labels, first: 0 };
    measure(chunk, beside).unwrap().iter().for_each(|position| tally.add(position));
    tally.close()
}

/// The largest difference of the numbers of two JSON values, relative where they are above 1, and where it is. Panics where the shapes
/// differ.
fn difference(found: &Value, expected: &Value, place: &str) -> (f64, String) {
    match (found, expected) {
        (Value::Object(a), Value::Object(b)) => {
            assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>(), "{place}");
            let parts = a.iter().map(|(key, value)| difference(value, &b[key], &format!("{place}.{key}")));
            parts.fold((0.0, String::new()), |worst, part| if part.0 > worst.0 { part } else { worst })
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            ((a - b).abs() / b.abs().max(1.0), place.into())
        }
        (a, b) => {
            assert_eq!(a, b, "{place}");
            (0.0, place.into())
        }
    }
}

#[test]
fn figures_are_those_of_an_independent_float64_computation() {
    let expected = std::fs::read_to_string(format!("{FIXTURES}/evaluate/held_out.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    let (logits, labels, beside) = batch();
    let found = figures(logits, &labels, &beside).unwrap();
    let worst = difference(&serde_json::to_value(&found).unwrap(), &expected["logits"], "");
    println!("worst: {worst:?}");
    // Sums over the vocabulary are of f32 exponentials, each off by at most 2e-7; everything else is f64.
    assert!(worst.0 < 1e-6, "{worst:?}");
}

#[test]
fn a_student_that_is_its_teacher_has_no_distance() {
    let (logits, labels, _) = batch();
    let mut whole = Beside { targets: SoftTargets::default(), rows: vec![0; labels.len()] };
    for z in logits.chunks_exact(VOCAB) {
        let lse = z.iter().map(|z| f64::from(*z).exp()).sum::<f64>().ln();
        let mut ids: Vec<u32> = (0..VOCAB as u32).collect();
        ids.sort_by(|a, b| z[*b as usize].total_cmp(&z[*a as usize]).then(a.cmp(b)));
        let logprobs: Vec<f32> = ids.iter().map(|id| (f64::from(z[*id as usize]) - lse) as f32).collect();
        whole.targets.push(&ids, &logprobs, f32::NEG_INFINITY);
    }
    let found = figures(logits, &labels, &whole).unwrap();
    // Stored logprobs are f32, 1e-6 of 16; divergences are of second order in that.
    for spread in [found.kl, found.reverse_kl, found.jsd].map(Option::unwrap) {
        assert!(spread.minimum >= 0.0 && spread.maximum < 1e-11, "{spread:?}");
    }
    assert!(found.total_variation.unwrap().maximum < 1e-6 && (found.acceptance.unwrap().minimum - 1.0).abs() < 1e-6);
    let kept = found.where_kept.unwrap();
    assert_eq!((kept.positions, found.same_top_token.unwrap().mean), (49, 1.0), "a whole distribution keeps every token");
    assert!((kept.ratio.value - 1.0).abs() < 1e-6 && (kept.correlation.unwrap() - 1.0).abs() < 1e-9, "{kept:?}");
    let calibration = found.calibration_error;
    assert!((calibration.student - calibration.teacher.unwrap()).abs() < 1e-6);
    assert_eq!(found.rows, 1);
    assert_eq!(found.nll.standard_error_by_row, None, "one conversation says nothing of others");
}

#[test]
fn draws_alone_are_nothing_to_compare_with() {
    let (logits, labels, _) = batch();
    let mut drawn = Beside { targets: SoftTargets::default(), rows: vec![7; labels.len()] };
    let target = potstill_cache::Target { sample_ids: &[3, 9], sample_counts: &[4, 1], tail_logprob: -1.0, ..Default::default() };
    labels.iter().for_each(|_| drawn.targets.push_target(&target));
    let found = figures(logits, &labels, &drawn).unwrap();
    assert!(found.kl.is_none() && found.acceptance.is_none() && found.same_top_token.is_none() && found.where_kept.is_none());
    assert!(found.kept_mass.is_none() && found.calibration_error.teacher.is_none() && found.perplexity.value > 1.0);
}

#[test]
fn a_position_that_is_not_finite_is_left_out_and_counted() {
    let (mut logits, labels, beside) = batch();
    logits[3 * VOCAB + 5] = f32::NAN;
    let found = figures(logits.clone(), &labels, &beside).unwrap();
    assert_eq!((found.positions, found.positions_not_finite, found.kl.unwrap().mean.positions), (48, 1, 48));
    logits.fill(f32::INFINITY);
    assert_eq!(figures(logits, &labels, &beside), None);
}

#[test]
fn every_figure_is_defined() {
    let (logits, labels, beside) = batch();
    let found = serde_json::to_value(figures(logits, &labels, &beside).unwrap()).unwrap();
    let counts = ["rows", "positions", "positions_not_finite", "probability_difference_rms"];
    let figures: Vec<&str> =
        found.as_object().unwrap().keys().map(String::as_str).filter(|name| !counts.contains(name)).collect();
    let mut defined: Vec<&str> = DEFINITIONS.iter().map(|(name, _)| *name).collect();
    let mut sorted = figures.clone();
    sorted.sort_unstable();
    defined.sort_unstable();
    assert_eq!(sorted, defined);
}
