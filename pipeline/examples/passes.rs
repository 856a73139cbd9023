//! How fast the parts of a pass through a model are on this machine, there and back, each beside the most it could be: products of every
//! encoding in f32 and bf16, an adapter's gradients, attention, and the passes over rows. CPU time of all threads, so that a busy machine
//! tells the truth too.
//!
//!     cargo run --release -p potstill-pipeline --example passes -- [rows] [rounds]
//!
//! GFLOP/s are those of one core: floating-point operations / CPU seconds.

use candle_core::{Device, Tensor};
use half::f16;
use potstill_pipeline::kernel::{Isa, Precision, Rows, TILE_COLUMNS, TILE_ROWS};
use potstill_pipeline::linear::Weight;
use potstill_pipeline::linear::awq::AwqWeight;
use potstill_pipeline::linear::dense::{DenseWeight, Stored};
use potstill_pipeline::linear::nf4::Nf4Weight;
use potstill_pipeline::linear::outer::{Lies, add_outer};
use potstill_pipeline::linear::panel::Factor;
use potstill_pipeline::linear::product::{Product, products};
use potstill_pipeline::ops::{attention, rms_norm, swiglu};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1).map(|a| a.parse::<usize>());
    let rows = arguments.next().transpose()?.unwrap_or(1024);
    let rounds = arguments.next().transpose()?.unwrap_or(5);
    println!("{} rows, best instructions: {}", rows, Isa::best().name());
    tiles(rounds);
    for (name, outputs, inputs) in [("gate_proj 0.5B", 4864, 896), ("down_proj 0.5B", 896, 4864), ("q_proj 32B", 5120, 5120)] {
        let x = values(rows * inputs);
        for (encoding, weight) in encodings(outputs, inputs)? {
            for precision in [Precision::F32, Precision::Bf16] {
                let flops = 2.0 * (rows * outputs * inputs) as f64;
                let pack = best(rounds, || drop(Rows::pack(&x, inputs, precision)));
                let packed = Rows::pack(&x, inputs, precision);
                let time = best(rounds, || drop(products(&[Product::of(&packed, Factor::forward(&weight))])));
                let per_weight = 1e9 * time / (outputs * inputs) as f64;
                let dy = Rows::pack(&values(rows * outputs), outputs, precision);
                let back = best(rounds, || drop(products(&[Product::of(&dy, Factor::backward(&weight))])));
                println!(
                    "{name:<16} {encoding:<5} {precision:<4?}: {:>6.1} GFLOP/s, {per_weight:.2} ns a weight; packing x {:.1} % of that; \
                     back {:>6.1} GFLOP/s",
                    flops / time / 1e9,
                    100.0 * pack / time,
                    flops / back / 1e9
                );
            }
        }
    }
    for (name, m, n) in [("4864 inputs", 4864, 64), ("896 outputs", 896, 64), ("896 outputs", 896, 16)] {
        let (x, y, mut sum) = (values(rows * m), values(rows * n), vec![0f32; m * n]);
        let time = best(rounds, || add_outer((&x, m), (&y, n), Lies::Turned, &mut sum));
        println!("gradient of rank {n} by {name}: {:.1} GFLOP/s", 2.0 * (rows * m * n) as f64 / time / 1e9);
    }
    let (heads, kv, d) = (14, 2, 64);
    let tensor = |n: usize, heads: usize| Tensor::from_vec(values(n * heads * d), (n, heads, d), &Device::Cpu);
    let (q, k, v) = (tensor(rows, heads)?, tensor(rows, kv)?, tensor(rows, kv)?);
    let time = best(rounds, || drop(attention::forward(&q, &k, &v, &[0, rows as u32])));
    println!(
        "attention of one conversation, 14 heads of 64: {:.1} ms, {:.1} GFLOP/s of what is above the diagonal",
        1e3 * time,
        2.0 * (rows * rows * heads * d) as f64 / time / 1e9
    );
    let attended = attention::forward(&q, &k, &v, &[0, rows as u32])?;
    let time = best(rounds, || drop(attention::backward(&q, &k, &v, &attended, &q, &[0, rows as u32])));
    println!(
        "its backward: {:.1} ms, {:.1} GFLOP/s of the five products above the diagonal",
        1e3 * time,
        5.0 * (rows * rows * heads * d) as f64 / time / 1e9
    );
    let x = Tensor::from_vec(values(rows * 896), (rows, 896), &Device::Cpu)?;
    let w = Tensor::from_vec(values(896), 896, &Device::Cpu)?;
    let time = best(rounds, || drop(rms_norm::forward(&x, &w, 1e-6)));
    let back = best(rounds, || drop(rms_norm::backward(&x, &w, 1e-6, &x)));
    let each = 1e9 / (rows * 896) as f64;
    println!("rms_norm: {:.2} ns a value, back {:.2}", each * time, each * back);
    let g = Tensor::from_vec(values(rows * 4864), (rows, 4864), &Device::Cpu)?;
    let time = best(rounds, || drop(swiglu::forward(&g, &g)));
    let back = best(rounds, || drop(swiglu::backward(&g, &g, &g)));
    let each = 1e9 / (rows * 4864) as f64;
    println!("SwiGLU: {:.2} ns a value, back {:.2}", each * time, each * back);
    Ok(())
}

/// The tile alone, from the first cache.
fn tiles(rounds: usize) {
    let (steps, times) = (512, 20_000);
    let (a, b) = (values(steps * TILE_ROWS), values(steps * TILE_COLUMNS));
    let words: Vec<u32> = b.iter().map(|v| v.to_bits()).collect();
    let flops = 2.0 * (steps * TILE_ROWS * TILE_COLUMNS * times) as f64;
    let mut out = vec![0f32; TILE_ROWS * TILE_COLUMNS];
    for isa in Isa::all().into_iter().rev().take(3) {
        let time = best(rounds, || {
            for _ in 0..times {
                isa.tile(steps, (&a, TILE_ROWS), (&b, TILE_COLUMNS), &mut out);
            }
        });
        print!("tile, {}: f32 {:.1} GFLOP/s", isa.name(), flops / time / 1e9);
        // Elsewhere bf16 goes through the tile of f32.
        if isa.multiplies_pairs() {
            let pairs = best(rounds, || {
                for _ in 0..times {
                    isa.tile_pairs(steps, (&words, TILE_ROWS), (&words, TILE_COLUMNS), &mut out);
                }
            });
            print!(", bf16 {:.1}", 2.0 * flops / pairs / 1e9);
        }
        println!();
    }
}

fn encodings(outputs: usize, inputs: usize) -> Result<Vec<(&'static str, Weight)>, Failure> {
    let dense = values(outputs * inputs);
    let halves: Vec<u8> = dense.iter().flat_map(|v| (v.to_bits() >> 16).to_le_bytes()[..2].to_vec()).collect();
    let words: Vec<u32> = (0..inputs * outputs / 8).map(|i| (i as u32).wrapping_mul(0x9e37_79b9)).collect();
    let groups = inputs / 128;
    let scales = vec![f16::from_f32(0.01); groups * outputs];
    let awq = AwqWeight::from_values(inputs, outputs, 128, &words, &words[..groups * outputs / 8], &scales);
    let bf16 = DenseWeight::new(outputs, inputs, Stored::Bf16, halves.into());
    Ok(vec![
        ("bf16", Weight::Dense(bf16.ok_or("lengths fit")?)),
        ("AWQ", Weight::Awq(awq.ok_or("lengths fit")?)),
        ("NF4", Weight::Nf4(Nf4Weight::quantize(&dense, outputs, inputs).ok_or("lengths fit")?)),
    ])
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 100_003) as f32 / 50_001.5 - 1.0).collect()
}

/// Fewest CPU seconds of all threads over some rounds.
fn best(rounds: usize, mut work: impl FnMut()) -> f64 {
    let mut least = f64::INFINITY;
    for _ in 0..rounds {
        let before = cpu();
        work();
        least = least.min(cpu() - before);
    }
    least
}

fn cpu() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
