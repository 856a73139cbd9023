//! AdamW against a float64 twin, hand numbers and bitsandbytes, its state through a file, and clipping.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use candle_core::{DType, Device, Tensor};
use potstill_cache::ErrorClass;
use potstill_pipeline::dynamic_map::{self, Sign};
use potstill_pipeline::model::weights::Weights;
use potstill_pipeline::train::optimizer::{AdamW, AdamWConfig, OptimizerKind, clip};
use std::collections::HashMap;

fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &support::device()).unwrap()
}

fn flat(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

fn parameters() -> Vec<(String, Tensor)> {
    vec![("a".into(), tensor(&[0.5, -1.0, 2.0, 0.0, 1e-3, -3.0], &[2, 3])), ("b".into(), tensor(&[0.25, -0.125], &[2]))]
}

fn gradients(step: usize) -> Vec<Tensor> {
    let g = |i: usize| ((step * 7 + i * 3) % 11) as f32 * 0.1 - 0.5;
    vec![tensor(&(0..6).map(g).collect::<Vec<_>>(), &[2, 3]), tensor(&[g(6), 1e-4 * g(7)], &[2])]
}

const CONFIG: AdamWConfig = AdamWConfig { kind: OptimizerKind::AdamW, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };

#[test]
fn the_first_step_moves_by_the_rate() {
    // At t = 1 the corrected moments are g and g²: p ← p (1 − rate wd) − rate g / (|g| + eps).
    let p = vec![("p".to_string(), tensor(&[1.0, 1.0, 1.0], &[3]))];
    let mut adam = AdamW::new(AdamWConfig { weight_decay: 0.5, ..CONFIG }, &p).unwrap();
    adam.step(&p, &[tensor(&[2.0, -0.001, 0.0], &[3])], 0.1).unwrap();
    for (found, expected) in flat(&p[0].1).iter().zip([0.85, 1.05, 0.95]) {
        // f32 moments: relative 1e-7; eps over a gradient of 1e-3: 1e-5 of the step.
        assert!((found - expected).abs() < 2e-6, "{found} {expected}");
    }
}

#[test]
fn ten_steps_equal_the_float64_rule() {
    let p = parameters();
    let mut adam = AdamW::new(CONFIG, &p).unwrap();
    let mut twin: Vec<[f64; 3]> = p.iter().flat_map(|(_, t)| flat(t)).map(|v| [f64::from(v), 0.0, 0.0]).collect();
    for t in 1..=10 {
        let (g, rate) = (gradients(t), 0.01 * t as f64);
        adam.step(&p, &g, rate).unwrap();
        for ([p, m, v], g) in twin.iter_mut().zip(g.iter().flat_map(flat)) {
            let g = f64::from(g);
            *p *= 1.0 - rate * 0.01;
            *m = 0.9 * *m + 0.1 * g;
            *v = 0.999 * *v + 0.001 * g * g;
            *p -= rate * (*m / (1.0 - 0.9_f64.powi(t as i32))) / ((*v / (1.0 - 0.999_f64.powi(t as i32))).sqrt() + 1e-8);
        }
    }
    assert_eq!(adam.steps(), 10);
    for (found, expected) in p.iter().flat_map(|(_, t)| flat(t)).zip(twin.iter().map(|s| s[0])) {
        // Ten roundings of p (3e-8 · 3 each) and steps of at most 0.1 from moments good to 1e-7.
        assert!((f64::from(found) - expected).abs() < 1e-6, "{found} {expected}");
    }
}

#[test]
fn a_state_through_a_file_continues_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("optimizer.safetensors");
    let (p, q) = (parameters(), parameters());
    let mut whole = AdamW::new(CONFIG, &p).unwrap();
    (1..=6).for_each(|t| whole.step(&p, &gradients(t), 0.01).unwrap());

    let mut first = AdamW::new(CONFIG, &q).unwrap();
    (1..=3).for_each(|t| first.step(&q, &gradients(t), 0.01).unwrap());
    let state: HashMap<String, Tensor> = first.state_tensors().unwrap().into_iter().collect();
    let mut names: Vec<_> = state.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["a.m", "a.v", "b.m", "b.v", "step"]);
    candle_core::safetensors::save(&state, &file).unwrap();
    let mut second = AdamW::new(CONFIG, &q).unwrap();
    second.load_state(&Weights::open_file(&file).unwrap()).unwrap();
    assert_eq!(second.steps(), 3);
    (4..=6).for_each(|t| second.step(&q, &gradients(t), 0.01).unwrap());

    let bits = |p: &[(String, Tensor)]| p.iter().flat_map(|(_, t)| flat(t)).map(f32::to_bits).collect::<Vec<_>>();
    assert_eq!(bits(&p), bits(&q));
    let values = |a: &AdamW| a.state_tensors().unwrap().iter().take(4).flat_map(|(_, t)| flat(t)).collect::<Vec<_>>();
    assert_eq!(values(&whole), values(&second));
}

/// The tensors of `scripts/make_optimizer_fixtures.py`.
fn bitsandbytes() -> HashMap<String, Tensor> {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/optimizer/adamw_8bit.safetensors");
    candle_core::safetensors::load(file, &Device::Cpu).unwrap()
}

const ELEMENTS: usize = 4196;

/// The script's starting values and gradients: whole numbers over powers of two.
fn start_8bit() -> Vec<(String, Tensor)> {
    let values: Vec<f32> = (0..ELEMENTS).map(|i| ((i * 31 % 257) as f32 - 128.0) / 256.0).collect();
    vec![("p".into(), tensor(&values, &[4, ELEMENTS / 4]))]
}

fn gradient_8bit(step: usize) -> Vec<Tensor> {
    let value = |i: usize| (((i * 7919 + step * 104_729) % 2003) as f32 - 1001.0) / 1024.0 / (1u32 << (i / 16 % 6)) as f32;
    vec![tensor(&(0..ELEMENTS).map(value).collect::<Vec<_>>(), &[4, ELEMENTS / 4])]
}

const EIGHT_BIT: AdamWConfig = AdamWConfig { kind: OptimizerKind::AdamW8bit, ..CONFIG };

#[test]
fn the_maps_are_those_of_bitsandbytes() {
    let theirs = bitsandbytes();
    for (sign, name) in [(Sign::Signed, "map.signed"), (Sign::Unsigned, "map.unsigned")] {
        for (i, (ours, theirs)) in dynamic_map::values(sign).iter().zip(flat(&theirs[name])).enumerate() {
            assert_eq!(ours.to_bits(), theirs.to_bits(), "{name} {i}: {ours} {theirs}");
        }
    }
}

#[test]
fn ten_steps_in_eight_bits_equal_bitsandbytes() {
    let theirs = bitsandbytes();
    let p = start_8bit();
    let mut adam = AdamW::new(EIGHT_BIT, &p).unwrap();
    (1..=10).for_each(|t| adam.step(&p, &gradient_8bit(t), 0.01).unwrap());
    // Each of ten steps moves by about 0.01, good to 1e-6 of itself; a value that lies on the border of two codes, to a rounding, falls
    // to either side, and shifts what follows by a code's width, some per cent of it. One in a hundred may; 13 of 4,196 do.
    let moved: Vec<f32> = flat(&p[0].1).iter().zip(flat(&theirs["p"])).map(|(ours, theirs)| (ours - theirs).abs()).collect();
    let (near, worst) = (moved.iter().filter(|d| **d < 1e-6).count(), moved.iter().fold(0f32, |a, b| a.max(*b)));
    println!("{near} of {ELEMENTS} equal, worst {worst:e}");
    assert!(near >= ELEMENTS - 42 && worst < 1e-3, "{near} of {ELEMENTS}, worst {worst}");
    let state: HashMap<String, Tensor> = adam.state_tensors().unwrap().into_iter().collect();
    for name in ["m", "v"] {
        let codes = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<u8>().unwrap();
        let (ours, want) = (codes(&state[&format!("p.{name}")]), codes(&theirs[name]));
        let same = ours.iter().zip(&want).filter(|(a, b)| a == b).count();
        println!("{name}: {same} of {ELEMENTS} codes equal");
        assert!(same >= ELEMENTS - 42, "{name}: {same} of {ELEMENTS} codes");
        for (ours, theirs) in flat(&state[&format!("p.{name}.absmax")]).iter().zip(flat(&theirs[&format!("{name}.absmax")])) {
            assert!((ours - theirs).abs() < 1e-5 * theirs, "{name}: {ours} {theirs}");
        }
    }
    // Eight bits are not thirty-two: the f32 optimizer goes elsewhere, but not far.
    let q = start_8bit();
    let mut full = AdamW::new(CONFIG, &q).unwrap();
    (1..=10).for_each(|t| full.step(&q, &gradient_8bit(t), 0.01).unwrap());
    let apart: f32 = flat(&p[0].1).iter().zip(flat(&q[0].1)).map(|(a, b)| (a - b).abs()).sum::<f32>() / ELEMENTS as f32;
    assert!(apart > 1e-5 && apart < 3e-3, "{apart}");
}

#[test]
fn an_eight_bit_state_is_small_and_continues_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("optimizer.safetensors");
    // A tensor below 4096 values keeps f32 state.
    let all = || [start_8bit(), vec![("small".to_string(), tensor(&[0.5; 4095], &[4095]))]].concat();
    let given = |t: usize| [gradient_8bit(t), vec![tensor(&[0.1 * t as f32; 4095], &[4095])]].concat();
    let (p, q) = (all(), all());
    let mut whole = AdamW::new(EIGHT_BIT, &p).unwrap();
    (1..=6).for_each(|t| whole.step(&p, &given(t), 0.01).unwrap());
    let mut first = AdamW::new(EIGHT_BIT, &q).unwrap();
    (1..=3).for_each(|t| first.step(&q, &given(t), 0.01).unwrap());
    let state: HashMap<String, Tensor> = first.state_tensors().unwrap().into_iter().collect();
    let bytes = |name: &str| state[name].elem_count() * state[name].dtype().size_in_bytes();
    assert_eq!(["p.m", "p.m.absmax", "p.v", "p.v.absmax", "small.m", "small.v"].map(bytes), [4196, 68, 4196, 68, 16380, 16380]);
    candle_core::safetensors::save(&state, &file).unwrap();
    let mut second = AdamW::new(EIGHT_BIT, &q).unwrap();
    second.load_state(&Weights::open_file(&file).unwrap()).unwrap();
    (4..=6).for_each(|t| second.step(&q, &given(t), 0.01).unwrap());
    let bits = |p: &[(String, Tensor)]| p.iter().flat_map(|(_, t)| flat(t)).map(f32::to_bits).collect::<Vec<_>>();
    assert_eq!(bits(&p), bits(&q));
    // A state of the other kind is refused.
    let error = AdamW::new(CONFIG, &p).unwrap().load_state(&Weights::open_file(&file).unwrap()).unwrap_err();
    assert_eq!(
        (error.class(), error.to_string().contains("expected 5 tensors, found 7")),
        (ErrorClass::Mismatch, true),
        "{error}"
    );
}

#[test]
fn an_update_changes_values_where_they_lie() {
    let p = parameters();
    let same = p[0].1.clone();
    let (before, mut g) = (flat(&same), gradients(1));
    let shared = g[0].clone();
    clip(&mut g, 0.1).unwrap();
    assert_eq!(flat(&shared), flat(&g[0]), "clipped in place");
    AdamW::new(CONFIG, &p).unwrap().step(&p, &g, 0.1).unwrap();
    assert_ne!(flat(&same), before);
    assert_eq!(flat(&same), flat(&p[0].1));
    // A gradient that does not lie row by row, such as a transposed one, is read as what it means.
    let (p, q) = (parameters(), parameters());
    let turned = Tensor::from_slice(&[1.0f32, 4.0, 2.0, 5.0, 3.0, 6.0], (3, 2), &Device::Cpu).unwrap().t().unwrap();
    // What a GPU's products give lies row by row.
    let turned = if support::device().is_cuda() { turned.contiguous().unwrap() } else { turned };
    let mut turned = [turned.to_device(&support::device()).unwrap(), tensor(&[0.0, 0.0], &[2])];
    let plain = [tensor(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3]), tensor(&[0.0, 0.0], &[2])];
    assert!((clip(&mut turned, 0.0).unwrap() - 91f64.sqrt()).abs() < 1e-12);
    AdamW::new(CONFIG, &p).unwrap().step(&p, &turned, 0.1).unwrap();
    AdamW::new(CONFIG, &q).unwrap().step(&q, &plain, 0.1).unwrap();
    assert_eq!(flat(&p[0].1), flat(&q[0].1));
}

#[test]
fn a_state_of_another_adapter_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let saved = |tensors: Vec<(&str, Tensor)>| {
        let file = dir.path().join("state.safetensors");
        let tensors: HashMap<&str, Tensor> = tensors.into_iter().collect();
        candle_core::safetensors::save(&tensors, &file).unwrap();
        Weights::open_file(&file).unwrap()
    };
    let refused = |state: &Weights, words: &[&str], class: ErrorClass| {
        let mut adam = AdamW::new(CONFIG, &[("b".into(), tensor(&[1.0, 2.0], &[2]))]).unwrap();
        let error = adam.load_state(state).unwrap_err();
        assert_eq!(error.class(), class);
        words.iter().for_each(|w| assert!(error.to_string().contains(w), "{w:?} is not in {error}"));
        assert_eq!(adam.steps(), 0);
    };
    let (two, three) = (tensor(&[0.0; 2], &[2]), tensor(&[0.0; 3], &[3]));
    let step = |n: i64| ("step", Tensor::from_vec(vec![n], 1, &Device::Cpu).unwrap());
    refused(&saved(vec![step(1)]), &["expected 3 tensors, found 1"], ErrorClass::Mismatch);
    let misshapen = saved(vec![step(1), ("b.m", two.clone()), ("b.v", three)]);
    refused(&misshapen, &["\"b.v\"", "F32 [2]", "F32 [3]"], ErrorClass::Mismatch);
    refused(&saved(vec![step(1), ("b.m", two.clone()), ("c.v", two.clone())]), &["\"b.v\""], ErrorClass::Mismatch);
    refused(&saved(vec![step(-1), ("b.m", two.clone()), ("b.v", two)]), &["step -1"], ErrorClass::Runtime);
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let mut p = parameters();
    let mut adam = AdamW::new(CONFIG, &p).unwrap();
    let mut refused = |p: &mut [(String, Tensor)], g: &[Tensor], words: &[&str]| {
        let text = adam.step(p, g, 0.1).unwrap_err().to_string();
        words.iter().for_each(|w| assert!(text.contains(w), "{w:?} is not in {text:?}"));
        assert_eq!(adam.steps(), 0);
    };
    let g = gradients(1);
    refused(&mut p, &g[..1], &["gradients", "expected 2", "found 1"]);
    refused(&mut p, &[g[1].clone(), g[0].clone()], &["gradient", "a F32 [2, 3]", "[2]"]);
    refused(&mut p, &[Tensor::zeros((2, 3), DType::F64, &support::device()).unwrap(), g[1].clone()], &["gradient", "F64"]);
    p.reverse();
    refused(&mut p, &g, &["parameter", "a F32 [2, 3]", "b F32 [2]"]);
    for (config, words) in [
        (AdamWConfig { beta1: 1.0, ..CONFIG }, "beta1 = 1"),
        (AdamWConfig { beta2: f64::NAN, ..CONFIG }, "beta2 = NaN"),
        (AdamWConfig { eps: 0.0, ..CONFIG }, "eps = 0"),
        (AdamWConfig { weight_decay: -0.1, ..CONFIG }, "weight_decay = -0.1"),
    ] {
        let error = AdamW::new(config, &p).unwrap_err();
        assert!(error.to_string().contains(words) && error.class() == ErrorClass::Usage, "{error}");
    }
}

#[test]
fn clipping_is_over_all_tensors() {
    let norms = |g: &[Tensor]| g.iter().flat_map(flat).map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
    let given = || vec![tensor(&[3.0, 0.0], &[2]), tensor(&[0.0, 0.0, 4.0], &[1, 3])];
    let mut g = given();
    assert_eq!(clip(&mut g, 1.0).unwrap(), 5.0);
    // Two f32 elements rounded once, and 1e-6 in the denominator.
    assert!((norms(&g) - 1.0).abs() < 4e-7, "{}", norms(&g));
    assert!((flat(&g[0])[0] - 0.6).abs() < 2e-7 && (flat(&g[1])[2] - 0.8).abs() < 2e-7);
    for off in [0.0, 5.1] {
        let mut g = given();
        assert_eq!(clip(&mut g, off).unwrap(), 5.0);
        assert_eq!((flat(&g[0]), flat(&g[1])), (flat(&given()[0]), flat(&given()[1])));
    }
    let mut bad = vec![tensor(&[f32::NAN, 2.0], &[2])];
    assert!(clip(&mut bad, 1.0).unwrap().is_nan());
    assert_eq!(flat(&bad[0])[1], 2.0);
    // Squares beyond f32's range still add in f64.
    assert!((clip(&mut [tensor(&[3e30, 4e30], &[2])], 1.0).unwrap() / 5e30 - 1.0).abs() < 1e-6);
}
