//! Time and peak memory of the fused head and loss beside its naive twin, which holds all logits: what is claimed of it, measured.
//!
//!     cargo run --release -p potstill-pipeline --example head -- CHUNK [positions] [vocab] [hidden]
//!
//! CHUNK positions' logits exist at once; CHUNK = positions is the naive twin (in place, so still half of what automatic differentiation
//! holds). Defaults: 8192 positions, 152064 ids, 896 hidden. Linux: peaks are VmHWM of this process, so one process a measurement.

use candle_core::{Device, Tensor};
use potstill_cache::SoftTargets;
use potstill_pipeline::kernel::Precision;
use potstill_pipeline::linear::Head;
use potstill_pipeline::linear::dense::{DenseWeight, Stored};
use potstill_pipeline::loss::{LossSettings, fused};
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Failure = Box<dyn std::error::Error>;

/// Entries kept at a position.
const KEPT: u32 = 64;

fn main() -> Result<(), Failure> {
    let numbers = std::env::args().skip(1).map(|a| a.parse::<usize>()).collect::<Result<Vec<_>, _>>()?;
    let number = |i: usize, default| numbers.get(i).copied().unwrap_or(default);
    let chunk = *numbers.first().ok_or("expected a number of positions")?;
    let (n, vocab, hidden) = (number(1, 8192), number(2, 152_064), number(3, 896));

    let halves: Vec<u8> = (0..vocab * hidden).flat_map(|i| (value(i).to_bits() >> 16).to_le_bytes()[..2].to_vec()).collect();
    let head = DenseWeight::new(vocab, hidden, Stored::Bf16, halves.into()).ok_or("lengths fit")?;
    let states = Tensor::from_vec((0..n * hidden).map(value).collect::<Vec<f32>>(), (n, hidden), &Device::Cpu)?;
    let labels: Vec<u32> = (0..n).map(|i| (i * 7919 % vocab) as u32).collect();
    let mut targets = SoftTargets::default();
    let logprobs: Vec<f32> = (0..KEPT).map(|i| -2.0 - 0.2 * i as f32).collect();
    for i in 0..n as u32 {
        let ids: Vec<u32> = (0..KEPT).map(|j| (i * 31 + j * 2003) % vocab as u32).collect();
        targets.push(&ids, &logprobs, -0.4);
    }

    let before = peak()?;
    let began = Instant::now();
    let head = Head::new(&head, Precision::F32);
    let (sums, _) = fused(&states, head, &labels, Some(&targets), &LossSettings::default(), 1.0 / n as f64, chunk)?;
    println!(
        "chunk {chunk} of {n} positions, {vocab} ids: {:.1} s, {:.0} MiB above the {before:.0} MiB of what goes in; loss {:.6}",
        began.elapsed().as_secs_f64(),
        peak()? - before,
        sums.kd / n as f64
    );
    Ok(())
}

/// Values in ±0.1 that do not repeat soon.
fn value(i: usize) -> f32 {
    (i.wrapping_mul(7919) % 100_003) as f32 / 500_015.0 - 0.1
}

/// MiB of VmHWM.
fn peak() -> Result<f64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
}
