//! AWQ and NF4 against the reference files of AutoAWQ and bitsandbytes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use candle_core::Tensor;
use half::f16;
use potstill_pipeline::linear::awq::{self, AwqWeight};
use potstill_pipeline::linear::dense::DenseWeight;
use potstill_pipeline::linear::nf4::{self, Nf4Weight};
use potstill_pipeline::linear::{Linear, Lora, Weight};
use std::collections::{BTreeSet, HashMap};
use support::{bytes, floats, load};

fn words(t: &Tensor) -> Vec<u32> {
    t.flatten_all().unwrap().to_vec1::<i32>().unwrap().into_iter().map(|v| v as u32).collect()
}

fn teacher() -> HashMap<String, Tensor> {
    let mut all = load("teacher-awq/model-00001-of-00002.safetensors");
    all.extend(load("teacher-awq/model-00002-of-00002.safetensors"));
    all
}

fn awq(tensors: &HashMap<String, Tensor>, name: &str) -> AwqWeight {
    let scales = &tensors[&format!("{name}.scales")];
    let (groups, outputs) = scales.dims2().unwrap();
    let inputs = tensors[&format!("{name}.qweight")].dim(0).unwrap();
    let scales: Vec<f16> = scales.flatten_all().unwrap().to_vec1().unwrap();
    let part = |p: &str| words(&tensors[&format!("{name}.{p}")]);
    AwqWeight::from_values(inputs, outputs, inputs / groups, &part("qweight"), &part("qzeros"), &scales).unwrap()
}

#[test]
fn awq_unpacks_exactly() {
    let (teacher, expected) = (teacher(), load("expected/awq_unpacked.safetensors"));
    for name in ["model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj"] {
        let weight = awq(&teacher, name);
        let want = &expected[&format!("{name}.weight_f32")];
        let (outputs, inputs) = want.dims2().unwrap();
        let all = weight.outputs();
        let column = |v: &[u8]| -> Vec<u8> { v.chunks(all).flat_map(|row| row[..outputs].to_vec()).collect() };
        assert_eq!(column(&weight.codes()), bytes(&expected[&format!("{name}.codes")]), "{name} codes");
        assert_eq!(column(&weight.zeros()), bytes(&expected[&format!("{name}.zeros")]), "{name} zeros");
        let ours = weight.dequantize();
        let transposed: Vec<f32> =
            (0..outputs).flat_map(|o| (0..inputs).map(move |i| (o, i))).map(|(o, i)| ours[i * all + o]).collect();
        assert_eq!(transposed, floats(want), "{name} f32, bit for bit");
        let rounded: Vec<f32> = transposed.iter().map(|v| f16::from_f32(*v).to_f32()).collect();
        assert_eq!(rounded, floats(&expected[&format!("{name}.weight_f16")]), "{name} f16, bit for bit");
    }
}

#[test]
fn awq_packing_is_the_inverse() {
    for word in [0u32, 0x6c28_17d3, 0xe4a0_9f5b, u32::MAX, 0x1234_5678] {
        assert_eq!(awq::pack(awq::unpack(word)), word);
    }
    // Column 1 of eight sits in nibble 4.
    assert_eq!(awq::unpack(0x0005_0000), [0, 5, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn awq_refuses_lengths_that_do_not_fit() {
    let parts = || (vec![0u32; 8], vec![0u32; 2], vec![f16::ONE; 16]);
    let (q, z, s) = parts();
    assert!(AwqWeight::from_values(8, 8, 4, &q, &z, &s).is_some());
    let (q, z, s) = parts();
    assert!(AwqWeight::from_values(8, 8, 8, &q, &z, &s).is_none());
    let (q, z, s) = parts();
    assert!(AwqWeight::from_values(8, 8, 0, &q, &z, &s).is_none());
    // 2^62 inputs take 2^64 bytes of codes: 0 of them, to a product that wraps around.
    assert!(AwqWeight::from_values(1 << 62, 8, 1 << 62, &[], &z[..1], &s[..8]).is_none());
}

#[test]
fn nf4_bytes_equal_bitsandbytes() {
    let expected = load("expected/nf4.safetensors");
    let student = load("student/model.safetensors");
    let names: BTreeSet<&str> = expected.keys().filter_map(|k| k.strip_suffix(".quant_map")).collect();
    assert_eq!(names.len(), 7, "one layer of the student");
    for name in names {
        let weight = &student[name];
        let (rows, columns) = weight.dims2().unwrap();
        let ours = Nf4Weight::quantize(&floats(weight), rows, columns).unwrap();
        let part = |p: &str| &expected[&format!("{name}.{p}")];
        assert_eq!(ours.codes(), bytes(&expected[name]), "{name} codes");
        assert_eq!(nf4::LEVELS.to_vec(), floats(part("quant_map")));
        assert_eq!(nf4::dynamic_map(), floats(part("nested_quant_map")), "dynamic map, bit for bit");
        // The library rounds to a grid first, so a byte may be its neighbour's; the nearest entry is also accepted.
        let (library, nearest) = (bytes(part("absmax")), bytes(part("absmax_u8_nearest")));
        for (block, code) in ours.absmax().iter().enumerate() {
            assert!(*code == library[block] || *code == nearest[block], "{name} absmax {block}");
        }
        let state: serde_json::Value = serde_json::from_slice(&bytes(part("quant_state.bitsandbytes__nf4"))).unwrap();
        let offset = state["nested_offset"].as_f64().unwrap();
        assert!((f64::from(ours.nested_offset()) - offset).abs() <= 1e-6 * offset.abs(), "{name} offset");
        for (a, b) in ours.nested_absmax().iter().zip(floats(part("nested_absmax"))) {
            assert!((a - b).abs() <= 1e-6 * b.abs(), "{name} nested absmax {a} {b}");
        }
        if let Some(want) = expected.get(&format!("{name}.dequant_f32")) {
            let (ours_f32, want) = (ours.dequantize(), floats(want));
            for (i, (a, b)) in ours_f32.iter().zip(&want).enumerate() {
                // One step of a nested byte moves a block by at most 0.7 % of its maximum; equal bytes give 3e-7.
                let bound = if ours.absmax()[i / 64] == library[i / 64] { 3e-7 } else { 8e-3 };
                assert!((a - b).abs() <= bound * b.abs().max(1e-6), "{name} element {i}: {a} {b}");
            }
        }
    }
}

#[test]
fn nf4_cases_equal_bitsandbytes() {
    let expected = load("expected/nf4_cases.safetensors");
    let names: BTreeSet<&str> = expected.keys().filter_map(|k| k.strip_suffix(".input")).collect();
    assert_eq!(names.len(), 10, "{names:?}");
    for name in names {
        let input = floats(&expected[&format!("{name}.input")]);
        let ours = Nf4Weight::quantize(&input, 1, input.len()).unwrap();
        assert_eq!(ours.codes(), bytes(&expected[&format!("{name}.packed")]), "{name} codes");
        let Some(nearest) = expected.get(&format!("{name}.nested.absmax_u8_nearest")) else { continue };
        let (nearest, library) = (bytes(nearest), bytes(&expected[&format!("{name}.nested.absmax_u8")]));
        let want = floats(&expected[&format!("{name}.nested.dequant")]);
        for (block, code) in ours.absmax().iter().enumerate() {
            assert!(*code == library[block] || *code == nearest[block], "{name} absmax {block}: {code}");
        }
        for (i, (a, b)) in ours.dequantize().iter().zip(&want).enumerate() {
            let bound = if ours.absmax()[i / 64] == library[i / 64] { 1e-6 } else { 8e-3 };
            assert!((a - b).abs() <= bound * b.abs().max(f32::MIN_POSITIVE), "{name} element {i}: {a} {b}");
        }
    }
}

/// 1 / 1e-40 is no f32, and 0 times it no number: such a block must not come out as a block of its lowest level.
#[test]
fn nf4_of_a_block_next_to_zero_is_zero() {
    let mut values: Vec<f32> = (0..256).map(|i| (i % 17) as f32 / 20.0 - 0.4).collect();
    values[64..128].fill(0.0);
    values[70] = 1e-40;
    let weight = Nf4Weight::quantize(&values, 4, 64).unwrap();
    assert_eq!(weight.dequantize()[64..128], [0.0; 64]);
    assert!(weight.dequantize()[..64].iter().zip(&values).all(|(a, b)| (a - b).abs() < 0.1), "the others are what they were");
}

#[test]
fn nf4_refuses_numbers_of_values_that_do_not_fit() {
    assert!(Nf4Weight::quantize(&[0.0; 6], 2, 3).is_some());
    assert!(Nf4Weight::quantize(&[0.0; 6], 2, 4).is_none());
    assert!(Nf4Weight::quantize(&[], 1 << 32, 1 << 32).is_none(), "2^64 values are not none");
    assert!(Nf4Weight::quantize(&[0.0, f32::NAN], 1, 2).is_none());
}

/// Central differences of sum(y * g) against `backward`, with every encoding of W.
#[test]
fn backward_equals_finite_differences() {
    let (t, inputs, outputs, rank) = (3, 64, 8, 2);
    let value = |i: usize, m: usize| ((i * 37 + m * 11) % 101) as f32 / 50.0 - 1.0;
    let tensor = |rows: usize, columns: usize, m: usize| {
        let values: Vec<f32> = (0..rows * columns).map(|i| value(i, m)).collect();
        Tensor::from_vec(values, (rows, columns), &support::device()).unwrap()
    };
    let dense = tensor(outputs, inputs, 1);
    let scales: Vec<f16> = (0..outputs).map(|i| f16::from_f32(0.01 * (i + 1) as f32)).collect();
    let words: Vec<u32> = (0..64).map(|i| i * 0x0123_4567).collect();
    let quantised = AwqWeight::from_values(inputs, outputs, inputs, &words, &[0x7777_7777], &scales);
    let weights = [
        Weight::Dense(DenseWeight::from_f32(outputs, inputs, &floats(&dense)).unwrap()),
        Weight::Nf4(Nf4Weight::quantize(&floats(&dense), outputs, inputs).unwrap()),
        Weight::Awq(quantised.unwrap()),
    ];
    let (x, g) = (tensor(t, inputs, 2), tensor(t, outputs, 3));
    for weight in weights {
        let lora = Lora { a: tensor(rank, inputs, 4), b: tensor(outputs, rank, 5), scale: 0.5 };
        let mut layer = Linear::new(weight, Some(tensor(1, outputs, 6).squeeze(0).unwrap()));
        layer.lora = Some(lora);
        let layer = layer.placed(&support::device()).unwrap();
        let objective = |layer: &Linear, x: &Tensor| -> f64 {
            let y = layer.forward(x).unwrap();
            floats(&y).iter().zip(floats(&g)).map(|(a, b)| f64::from(*a) * f64::from(b)).sum()
        };
        let (dx, gradient) = layer.backward(&x, &g).unwrap();
        let gradient = gradient.unwrap();
        let nudged = |t: &Tensor, i: usize, by: f32| {
            let mut v = floats(t);
            v[i] += by;
            Tensor::from_vec(v, t.dims(), &support::device()).unwrap()
        };
        // The objective is linear in each single element, so a wide step leaves only f32 rounding: sums below 60, 7e-6 each side.
        let h = 0.25f32;
        let close = |ours: f32, plus: f64, minus: f64, what: &str| {
            let numeric = (plus - minus) / f64::from(2.0 * h);
            assert!((f64::from(ours) - numeric).abs() < 1e-3, "{what}: {ours} against {numeric}");
        };
        for i in [0, 17, 63, 100, t * inputs - 1] {
            close(floats(&dx)[i], objective(&layer, &nudged(&x, i, h)), objective(&layer, &nudged(&x, i, -h)), "dx");
        }
        for i in [0, 5, rank * inputs - 1] {
            let with = |by: f32| {
                let mut l = layer.clone();
                let lora = l.lora.as_mut().unwrap();
                lora.a = nudged(&lora.a, i, by);
                objective(&l, &x)
            };
            close(floats(&gradient.a)[i], with(h), with(-h), "dA");
        }
        for i in [0, 7, outputs * rank - 1] {
            let with = |by: f32| {
                let mut l = layer.clone();
                let lora = l.lora.as_mut().unwrap();
                lora.b = nudged(&lora.b, i, by);
                objective(&l, &x)
            };
            close(floats(&gradient.b)[i], with(h), with(-h), "dB");
        }
    }
}

#[test]
fn a_bias_or_an_input_of_another_width_is_an_error() {
    let weight = || Weight::Dense(DenseWeight::from_f32(4, 3, &[0.5; 12]).unwrap());
    let tensor =
        |rows: usize, columns: usize| Tensor::zeros((rows, columns), candle_core::DType::F32, &support::device()).unwrap();
    let bias = |n: usize| Some(tensor(1, n).squeeze(0).unwrap());
    let layer = |bias: Option<Tensor>| Linear::new(weight(), bias).placed(&support::device()).unwrap();
    assert_eq!(layer(bias(4)).forward(&tensor(2, 3)).unwrap().dims(), [2, 4]);
    let error = layer(bias(2)).forward(&tensor(2, 3)).unwrap_err().to_string();
    assert!(error.contains("a bias of 2 values does not fit 4 outputs"), "{error}");
    let error = layer(None).forward(&tensor(2, 5)).unwrap_err().to_string();
    assert!(error.contains("does not fit 3 inputs"), "{error}");
}
