//! Where the reference data lies, and how tests read it.
#![allow(clippy::unwrap_used, clippy::expect_used, dead_code)]

use candle_core::{DType, Device, Tensor};
use potstill_pipeline::run::RunContext;
use std::collections::HashMap;
use std::path::PathBuf;

/// Where the tests compute: on the CPU, or on what the variable `POTSTILL_TEST_DEVICE` names.
pub fn device() -> Device {
    std::env::var("POTSTILL_TEST_DEVICE")
        .map_or(Device::Cpu, |name| potstill_pipeline::device::pick(&name, &RunContext::default()).unwrap())
}

/// A file or folder of the fixtures, which lie where the variable `POTSTILL_FIXTURES` says when the tests run far from their sources.
pub fn fixture(name: &str) -> PathBuf {
    let sources = || concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures").into();
    PathBuf::from(std::env::var_os("POTSTILL_FIXTURES").unwrap_or_else(sources)).join(name)
}

/// A file or folder of the reference data.
pub fn golden(name: &str) -> PathBuf {
    fixture("golden").join(name)
}

/// All tensors of a safetensors file of the reference data.
pub fn load(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(golden(name), &Device::Cpu).unwrap()
}

/// A tensor's values as f32, row-major.
pub fn floats(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// A u8 tensor's values.
pub fn bytes(t: &Tensor) -> Vec<u8> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// An i32 tensor's values as ids.
pub fn ids(t: &Tensor) -> Vec<u32> {
    t.flatten_all().unwrap().to_vec1::<i32>().unwrap().into_iter().map(|v| v as u32).collect()
}

/// An i64 tensor's values.
pub fn offsets(t: &Tensor) -> Vec<usize> {
    t.flatten_all().unwrap().to_vec1::<i64>().unwrap().into_iter().map(|v| v as usize).collect()
}

/// Largest difference of two lists of equal length.
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// ‖a − b‖ / ‖b‖ in L2.
pub fn relative_l2(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |v: f64| v * v;
    let difference: f64 = a.iter().zip(b).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    (difference / b.iter().map(|b| square(f64::from(*b))).sum::<f64>()).sqrt()
}
