//! AWQ packing against the golden reference data and against a plain reading of the layout's formula.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use half::f16;
use potstill_pipeline::miniature::awq_pack::{AwqMatrix, pack, quantise};
use potstill_pipeline::miniature::dice::Dice;
use safetensors::SafeTensors;
use std::collections::HashMap;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden");
/// Shift of output column j within its word, written from the other side than the packer: column → shift.
const SHIFT: [u32; 8] = [0, 16, 4, 20, 8, 24, 12, 28];

fn file(path: &str) -> Vec<u8> {
    std::fs::read(format!("{GOLDEN}/{path}")).unwrap()
}

fn words(bytes: &[u8]) -> Vec<i32> {
    bytes.chunks_exact(4).map(|word| i32::from_le_bytes(word.try_into().unwrap())).collect()
}

fn code(words: &[i32], row: usize, column: usize, outputs: usize) -> u8 {
    ((words[row * (outputs / 8) + column / 8] as u32 >> SHIFT[column % 8]) & 15) as u8
}

/// W[o][i] by the formula.
fn weight(packed: &AwqMatrix, output: usize, input: usize) -> (f32, f32) {
    let part = input / packed.group;
    let scale = packed.scales[part * packed.outputs + output].to_f32();
    let q = f32::from(code(&packed.qweight, input, output, packed.outputs));
    let z = f32::from(code(&packed.qzeros, part, output, packed.outputs));
    ((q - z) * scale, scale)
}

/// Every weight comes back within half a scale. (q − z)·scale is exact in f32 (a 5-bit integer times an 11-bit one), and so
/// the only slack is the rounding of value/scale before it is rounded to a code: 16 · 2^-24 of a scale, and that of the difference.
fn assert_half_step(values: &[f32], packed: &AwqMatrix) {
    for output in 0..packed.outputs {
        for input in 0..packed.inputs {
            let value = values[output * packed.inputs + input];
            let (back, scale) = weight(packed, output, input);
            let error = (back - value).abs();
            assert!(error <= scale * (0.5 + 2e-6), "output {output}, input {input}: {value} came back as {back}, scale {scale}");
        }
    }
}

#[test]
fn every_weight_comes_back_within_half_a_step() {
    let (outputs, inputs, group) = (24, 256, 64);
    let mut values = Dice::new(5, 0).normals(outputs * inputs, 0.05);
    // Rows that are hard: all positive, all negative, all zero, one outlier, subnormal scale, and a range no f16 step divides.
    for (row, make) in [
        (1, (|v: f32| v.abs() + 0.2) as fn(f32) -> f32),
        (2, |v| -v.abs() - 0.2),
        (3, |_| 0.0),
        (5, |v| v * 1e-6),
        (6, |v| v * 1e5),
    ] {
        values[row * inputs..(row + 1) * inputs].iter_mut().for_each(|value| *value = make(*value));
    }
    values[4 * inputs + 7] = 3.0;
    let packed = quantise(&values, outputs, inputs, group).unwrap();
    assert_eq!(packed.scales.len(), inputs / group * outputs);
    assert_half_step(&values, &packed);
    // The codes are used: an ordinary group has both ends of its range.
    let codes: Vec<u8> = (0..group).map(|input| code(&packed.qweight, input, 0, outputs)).collect();
    assert!(codes.iter().max().unwrap() - codes.iter().min().unwrap() >= 14, "{codes:?}");
}

#[test]
fn golden_codes_pack_into_the_golden_words() {
    let unpacked = file("expected/awq_unpacked.safetensors");
    let unpacked = SafeTensors::deserialize(&unpacked).unwrap();
    let shards: Vec<Vec<u8>> = (1..=2).map(|n| file(&format!("teacher-awq/model-0000{n}-of-00002.safetensors"))).collect();
    let teacher: HashMap<String, (Vec<usize>, Vec<u8>)> = shards
        .iter()
        .flat_map(|shard| SafeTensors::deserialize(shard).unwrap().tensors())
        .map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec())))
        .collect();
    let mut compared = 0;
    for module in ["model.layers.0.self_attn.k_proj", "model.layers.2.mlp.down_proj"] {
        for (plain, packed) in [("codes", "qweight"), ("zeros", "qzeros")] {
            let codes = unpacked.tensor(&format!("{module}.{plain}")).unwrap();
            let (shape, bytes) = &teacher[&format!("{module}.{packed}")];
            let ours = pack(codes.data()).unwrap();
            // The reference may hold the first outputs only: compare the words that it covers.
            let (width, all) = (codes.shape()[1] / 8, shape[1]);
            assert_eq!(codes.shape()[0], shape[0], "{module}.{packed}");
            for (row, theirs) in words(bytes).chunks_exact(all).enumerate() {
                assert_eq!(ours[row * width..(row + 1) * width], theirs[..width], "{module}.{packed}, row {row}");
                compared += width;
            }
        }
    }
    assert_eq!(compared, 256 * 8 + 2 * 8 + 512 * 2 + 4 * 2);
}

/// The quantiser takes the golden dequantised weights back to weights as good: each within half of its own step.
#[test]
fn golden_weights_survive_being_quantised_again() {
    let bytes = file("expected/awq_unpacked.safetensors");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let view = tensors.tensor("model.layers.0.self_attn.k_proj.weight_f32").unwrap();
    let values: Vec<f32> = view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let packed = quantise(&values, view.shape()[0], view.shape()[1], 128).unwrap();
    assert_half_step(&values, &packed);
}

#[test]
fn what_cannot_be_packed_is_refused() {
    assert!(quantise(&[0.0; 8 * 64], 8, 64, 64).is_ok());
    for (outputs, inputs, group, count) in [(8, 64, 0, 512), (8, 64, 48, 512), (7, 64, 64, 448), (8, 64, 64, 511)] {
        assert!(quantise(&vec![0.0; count], outputs, inputs, group).is_err(), "{outputs} {inputs} {group} {count}");
    }
    for wrong in [f32::NAN, f32::INFINITY, 1e7] {
        let mut values = vec![0.0; 8 * 64];
        values[70] = wrong;
        let message = quantise(&values, 8, 64, 64).unwrap_err().to_string();
        assert!(message.contains("output 1, inputs 0..64"), "{message}");
    }
    assert!(pack(&[16; 8]).is_err());
    assert!(pack(&[1; 9]).is_err());
    assert_eq!(pack(&[1, 2, 3, 4, 5, 6, 7, 8]).unwrap(), [0x8642_7531_u32 as i32]);
}

#[test]
fn the_smallest_scale_is_positive() {
    let packed = quantise(&[0.0; 8 * 64], 8, 64, 64).unwrap();
    assert!(packed.scales.iter().all(|scale| *scale > f16::ZERO));
}
