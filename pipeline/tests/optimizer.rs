//! AdamW against a float64 twin and hand numbers, its state through a file, and clipping.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use candle_core::{DType, Device, Tensor};
use potstill_cache::ErrorClass;
use potstill_pipeline::model::weights::Weights;
use potstill_pipeline::train::optimizer::{AdamW, AdamWConfig, clip};
use std::collections::HashMap;

fn tensor(values: &[f32], shape: &[usize]) -> Tensor {
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
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

const CONFIG: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };

#[test]
fn the_first_step_moves_by_the_rate() {
    // At t = 1 the corrected moments are g and g²: p ← p (1 − rate wd) − rate g / (|g| + eps).
    let mut p = vec![("p".to_string(), tensor(&[1.0, 1.0, 1.0], &[3]))];
    let mut adam = AdamW::new(AdamWConfig { weight_decay: 0.5, ..CONFIG }, &p).unwrap();
    adam.step(&mut p, &[tensor(&[2.0, -0.001, 0.0], &[3])], 0.1).unwrap();
    for (found, expected) in flat(&p[0].1).iter().zip([0.85, 1.05, 0.95]) {
        // f32 moments: relative 1e-7; eps over a gradient of 1e-3: 1e-5 of the step.
        assert!((found - expected).abs() < 2e-6, "{found} {expected}");
    }
}

#[test]
fn ten_steps_equal_the_float64_rule() {
    let mut p = parameters();
    let mut adam = AdamW::new(CONFIG, &p).unwrap();
    let mut twin: Vec<[f64; 3]> = p.iter().flat_map(|(_, t)| flat(t)).map(|v| [f64::from(v), 0.0, 0.0]).collect();
    for t in 1..=10 {
        let (g, rate) = (gradients(t), 0.01 * t as f64);
        adam.step(&mut p, &g, rate).unwrap();
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
    let (mut p, mut q) = (parameters(), parameters());
    let mut whole = AdamW::new(CONFIG, &p).unwrap();
    (1..=6).for_each(|t| whole.step(&mut p, &gradients(t), 0.01).unwrap());

    let mut first = AdamW::new(CONFIG, &q).unwrap();
    (1..=3).for_each(|t| first.step(&mut q, &gradients(t), 0.01).unwrap());
    let state: HashMap<String, Tensor> = first.state_tensors().unwrap().into_iter().collect();
    let mut names: Vec<_> = state.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["a.m", "a.v", "b.m", "b.v", "step"]);
    candle_core::safetensors::save(&state, &file).unwrap();
    let mut second = AdamW::new(CONFIG, &q).unwrap();
    second.load_state(&Weights::open_file(&file).unwrap()).unwrap();
    assert_eq!(second.steps(), 3);
    (4..=6).for_each(|t| second.step(&mut q, &gradients(t), 0.01).unwrap());

    let bits = |p: &[(String, Tensor)]| p.iter().flat_map(|(_, t)| flat(t)).map(f32::to_bits).collect::<Vec<_>>();
    assert_eq!(bits(&p), bits(&q));
    let values = |a: &AdamW| a.state_tensors().unwrap().iter().take(4).flat_map(|(_, t)| flat(t)).collect::<Vec<_>>();
    assert_eq!(values(&whole), values(&second));
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
    refused(&mut p, &[g[0].to_dtype(DType::F64).unwrap(), g[1].clone()], &["gradient", "F64"]);
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
    let given = vec![tensor(&[3.0, 0.0], &[2]), tensor(&[0.0, 0.0, 4.0], &[1, 3])];
    let mut g = given.clone();
    assert_eq!(clip(&mut g, 1.0).unwrap(), 5.0);
    // Two f32 elements rounded once, and 1e-6 in the denominator.
    assert!((norms(&g) - 1.0).abs() < 4e-7, "{}", norms(&g));
    assert!((flat(&g[0])[0] - 0.6).abs() < 2e-7 && (flat(&g[1])[2] - 0.8).abs() < 2e-7);
    for off in [0.0, 5.1] {
        let mut g = given.clone();
        assert_eq!(clip(&mut g, off).unwrap(), 5.0);
        assert_eq!((flat(&g[0]), flat(&g[1])), (flat(&given[0]), flat(&given[1])));
    }
    let mut bad = vec![tensor(&[f32::NAN, 2.0], &[2])];
    assert!(clip(&mut bad, 1.0).unwrap().is_nan());
    assert_eq!(flat(&bad[0])[1], 2.0);
    // Squares beyond f32's range still add in f64.
    assert!((clip(&mut [tensor(&[3e30, 4e30], &[2])], 1.0).unwrap() / 5e30 - 1.0).abs() < 1e-6);
}
