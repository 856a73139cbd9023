//! The test bodies of everything that runs on a GPU, in one binary that can be carried to one, and what only a GPU can do.
//!
//! `scripts/test-cuda-emulated.sh` runs it on an emulated GPU, `scripts/gpu-check.sh` on a real one. Each module is a test file of its own,
//! which runs on the CPU too.
#![cfg(feature = "cuda")]
// Each module is a file of its own elsewhere, and brings its support.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::duplicate_mod)]

#[path = "adapter_options.rs"]
mod adapter_options;
#[path = "capture.rs"]
mod capture;
#[path = "decoders.rs"]
mod decoders;
#[path = "linear.rs"]
mod linear;
#[path = "loss_gradient.rs"]
mod loss_gradient;
#[path = "ops.rs"]
mod ops;
#[path = "optimizer.rs"]
mod optimizer;
#[path = "student.rs"]
mod student;
mod support;
#[path = "teacher.rs"]
mod teacher;

/// The modules above would pass on a CPU as well.
#[test]
fn this_is_a_gpu() {
    assert!(support::device().is_cuda(), "POTSTILL_TEST_DEVICE names no GPU: run scripts/test-cuda-emulated.sh");
}

/// Prints what scripts/gpu-check.sh measures everything else by.
#[test]
#[ignore = "a figure and no check"]
fn matrix_peak() {
    let n = std::env::var("POTSTILL_MATRIX").map_or(8192, |n| n.parse().unwrap());
    println!("matrix_peak {:e}", potstill_pipeline::cuda::matrix_rate(&support::device(), n, 20).unwrap());
}
