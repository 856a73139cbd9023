//! The miniature decoder against golden logits, its gradient against finite differences, its training.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use candle_core::{D, DType, Device, Tensor, Var};
use potstill_pipeline::Error;
use potstill_pipeline::miniature::decoder::{Decoder, DecoderShape, Head};
use potstill_pipeline::miniature::dice::Dice;
use potstill_pipeline::miniature::pretrain::{PretrainConfig, batch_loss, train};
use potstill_pipeline::run::RunContext;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden");

fn load(path: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(format!("{GOLDEN}/{path}"), &Device::Cpu).unwrap()
}

fn golden_student() -> DecoderShape {
    DecoderShape {
        vocabulary: 2048,
        hidden: 128,
        intermediate: 320,
        layers: 2,
        heads: 4,
        kv_heads: 4,
        rope_theta: 1e6,
        rms_norm_eps: 1e-6,
        head: Head::Tied,
    }
}

fn tiny(head: Head) -> DecoderShape {
    DecoderShape {
        vocabulary: 12,
        hidden: 16,
        intermediate: 24,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        rope_theta: 1e4,
        rms_norm_eps: 1e-6,
        head,
    }
}

/// The sequences of the reference, each as (first row, ids).
fn sequences(expected: &HashMap<String, Tensor>) -> Vec<(usize, Vec<u32>)> {
    let offsets = expected["offsets"].to_vec1::<i64>().unwrap();
    let ids = expected["input_ids"].to_dtype(DType::U32).unwrap().to_vec1::<u32>().unwrap();
    offsets.windows(2).map(|w| (w[0] as usize, ids[w[0] as usize..w[1] as usize].to_vec())).collect()
}

/// Logits of the dense student equal the reference's within 1e-4 (two f32 implementations agree to 6.3e-5 there: most of it
/// is the rounding of the rotary angles).
#[test]
fn the_forward_gives_the_golden_student_logits() {
    let weights: BTreeMap<String, Tensor> = load("student/model.safetensors").into_iter().collect();
    let decoder = Decoder::from_tensors(&golden_student(), &weights).unwrap();
    let expected = load("expected/student_logits.safetensors");
    let (mut worst, mut rows) = (0f32, 0);
    for (first, ids) in sequences(&expected) {
        let count = ids.len();
        let logits = decoder.forward(&ids).unwrap();
        assert_eq!(logits.dims(), [count, 2048]);
        let lse = logits.log_sum_exp(D::Minus1).unwrap();
        let part = |name: &str| expected[name].narrow(0, first, count).unwrap();
        let places = part("base.ids").to_dtype(DType::U32).unwrap().contiguous().unwrap();
        let logprobs = logits.gather(&places, 1).unwrap().broadcast_sub(&lse.unsqueeze(1).unwrap()).unwrap();
        for (ours, theirs) in [(logprobs, part("base.logprobs")), (lse, part("base.logsumexp"))] {
            let gap = (ours - theirs).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            worst = worst.max(gap.to_scalar::<f32>().unwrap());
        }
        rows += count;
    }
    println!("largest difference over {rows} rows: {worst:e}");
    assert_eq!(rows, 269);
    assert!(worst < 1e-4, "{worst}");
}

/// Grouped-query attention with its own head: stacking query heads equals repeating each key head for its query heads.
#[test]
fn grouped_queries_equal_repeated_keys() {
    let shape = tiny(Head::Own);
    let (decoder, _) = Decoder::random(&shape, &mut Dice::new(3, 0)).unwrap();
    let wide = DecoderShape { kv_heads: 4, ..shape.clone() };
    let tensors: BTreeMap<String, Tensor> = decoder
        .tensors()
        .map(|(name, tensor)| {
            let repeated = name.contains("k_proj") || name.contains("v_proj");
            let tensor = if repeated {
                let heads: Vec<Tensor> = [0, 0, 1, 1].map(|head| tensor.narrow(0, head * 4, 4).unwrap()).into();
                Tensor::cat(&heads, 0).unwrap()
            } else {
                tensor.clone()
            };
            (name.to_string(), tensor)
        })
        .collect();
    let ids = [3, 1, 4, 1, 5, 9, 2, 6];
    let narrow = decoder.forward(&ids).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let wide = Decoder::from_tensors(&wide, &tensors).unwrap().forward(&ids).unwrap();
    for (a, b) in narrow.iter().zip(wide.flatten_all().unwrap().to_vec1::<f32>().unwrap()) {
        // The same sums in another order: some units of f32's last place of numbers about 1.
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
}

/// Row t of the logits knows nothing of the ids after t.
#[test]
fn the_future_is_not_seen() {
    let (decoder, _) = Decoder::random(&tiny(Head::Tied), &mut Dice::new(4, 0)).unwrap();
    let rows = |ids: &[u32]| decoder.forward(ids).unwrap().to_vec2::<f32>().unwrap();
    let (long, short) = (rows(&[1, 2, 3, 4, 5]), rows(&[1, 2, 3]));
    for (t, row) in short.iter().enumerate() {
        assert!(row.iter().zip(&long[t]).all(|(a, b)| (a - b).abs() < 1e-6), "row {t}");
    }
    assert!(rows(&[2, 2, 3])[2].iter().zip(&short[2]).any(|(a, b)| (a - b).abs() > 1e-3), "the past must be seen");
}

/// Each variable's gradient equals the slope of the loss along a random direction. Central differences of an f32 loss near
/// 2.5 with a step of 1e-2: rounding 2.5·2^-24/1e-2 ≈ 2e-5, truncation of order 1e-4; and no gradient may be missing.
#[test]
fn every_gradient_equals_the_slope() {
    for head in [Head::Own, Head::Tied] {
        let mut dice = Dice::new(7, 0);
        let (decoder, variables) = Decoder::random(&tiny(head), &mut dice).unwrap();
        let names: Vec<String> = decoder.tensors().map(|(name, _)| name.to_string()).collect();
        let batch: [&[u32]; 2] = [&[1, 5, 3, 7, 2, 9], &[4, 4, 8]];
        let grads = batch_loss(&decoder, &batch).unwrap().backward().unwrap();
        assert_eq!(names.len(), variables.len());
        for (name, variable) in names.iter().zip(&variables) {
            let gradient = grads.get(variable.as_tensor()).unwrap_or_else(|| panic!("{name} has no gradient"));
            let direction = dice.normals(variable.elem_count(), 1.0);
            let length = direction.iter().map(|x| x * x).sum::<f32>().sqrt();
            let direction: Vec<f32> = direction.iter().map(|x| x / length).collect();
            let direction = Tensor::from_vec(direction, variable.dims(), &Device::Cpu).unwrap();
            let exact = (gradient * &direction).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap();
            let slope = slope(&decoder, &batch, variable, &direction);
            assert!((exact - slope).abs() < 4e-4, "{name}: gradient {exact}, slope {slope}");
            // A key bias moves all scores of a query alike: only rotary angles give it a slope at all.
            let size = gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            assert!(size > 1e-6, "{name}: gradient of size {size}");
        }
    }
}

fn slope(decoder: &Decoder, batch: &[&[u32]], variable: &Var, direction: &Tensor) -> f32 {
    let start = variable.as_tensor().copy().unwrap();
    let at = |step: f64| {
        variable.set(&(&start + (direction * step).unwrap()).unwrap()).unwrap();
        batch_loss(decoder, batch).unwrap().to_scalar::<f32>().unwrap()
    };
    let rise = at(1e-2) - at(-1e-2);
    at(0.0);
    rise / 2e-2
}

/// A batch with padding has the mean loss of all its tokens, as if each row were alone.
#[test]
fn padding_does_not_count() {
    let (decoder, _) = Decoder::random(&tiny(Head::Own), &mut Dice::new(9, 0)).unwrap();
    let (long, short): (&[u32], &[u32]) = (&[1, 5, 3, 7, 2, 9], &[4, 11, 8]);
    let loss = |batch: &[&[u32]]| batch_loss(&decoder, batch).unwrap().to_scalar::<f32>().unwrap();
    let apart = (5.0 * loss(&[long]) + 2.0 * loss(&[short])) / 7.0;
    assert!((loss(&[long, short]) - apart).abs() < 1e-6, "{} {apart}", loss(&[long, short]));
    assert!(batch_loss(&decoder, &[&[1, 12]]).is_err(), "an id beyond the vocabulary");
}

/// A cycle of ids can be predicted with certainty after its first: the loss must come near 0.
#[test]
fn training_falls() {
    let sequences: Vec<Vec<u32>> = (0..12).map(|start| (0..10).map(|i| (start + i) % 12).collect()).collect();
    let config = PretrainConfig { steps: 60, batch: 6, learning_rate: 1e-2, ..PretrainConfig::default() };
    let context = RunContext::default();
    let trained = train("cycle", &tiny(Head::Own), &sequences, &config, &mut Dice::new(1, 1), &context).unwrap();
    let (first, last) = trained.loss;
    assert!((first - 12f64.ln()).abs() < 0.2, "nearly uniform at first: {first}");
    assert!(last < 0.1, "{last}");

    context.stop.store(true, Ordering::Relaxed);
    let stopped = train("cycle", &tiny(Head::Own), &sequences, &config, &mut Dice::new(1, 1), &context);
    assert!(matches!(stopped, Err(Error::Interrupted { .. })));
}

#[test]
fn tensors_that_do_not_fit_are_refused() {
    let (decoder, _) = Decoder::random(&tiny(Head::Own), &mut Dice::new(2, 0)).unwrap();
    let tensors: BTreeMap<String, Tensor> = decoder.tensors().map(|(n, t)| (n.to_string(), t.clone())).collect();
    let mut fewer = tensors.clone();
    fewer.remove("model.layers.1.mlp.up_proj.weight");
    let message = Decoder::from_tensors(&tiny(Head::Own), &fewer).unwrap_err().to_string();
    assert!(message.contains("model.layers.1.mlp.up_proj.weight is missing"), "{message}");
    let wider = DecoderShape { vocabulary: 13, ..tiny(Head::Own) };
    let message = Decoder::from_tensors(&wider, &tensors).unwrap_err().to_string();
    assert!(message.contains("expected [13, 16], found [12, 16]"), "{message}");
    assert!(Decoder::from_tensors(&DecoderShape { kv_heads: 3, ..tiny(Head::Own) }, &tensors).is_err());
    assert!(Decoder::from_tensors(&DecoderShape { heads: 0, ..tiny(Head::Own) }, &tensors).is_err());
}
