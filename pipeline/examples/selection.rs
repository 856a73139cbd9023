//! Times what a cache keeps of a row of logits: microseconds a position on one thread, for every preset.
//!
//!     cargo run --release -p potstill-pipeline --example selection -- [VOCABULARY] [POSITIONS]
//!
//! Logits are made up: a normal distribution of deviation 2.5. The median of several runs is printed.

use candle_core::{Device, Tensor};
use potstill_cache::{Preset, RowKey};
use potstill_pipeline::ops::capture::Capture;
use potstill_pipeline::ops::draw::Place;
use std::time::Instant;

/// Runs of which the median is taken.
const RUNS: usize = 9;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: usize| arguments.next().map_or(Ok(default), |text| text.parse());
    let (vocabulary, positions) = (number(151_936)?, number(64)?);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    let logits = Tensor::randn(0f32, 2.5, (positions, vocabulary), &Device::Cpu)?;
    let places: Vec<Place> = (0..positions).map(|i| Place { row: RowKey([1; 16]), position: i as u32 }).collect();
    println!("{vocabulary} ids, {positions} positions, one thread, median of {RUNS}");
    for preset in Preset::ALL {
        for temperatures in [&[][..], &[2.0]] {
            let capture = Capture::of(&preset.storage(), temperatures);
            let mut times = Vec::new();
            for _ in 0..RUNS {
                let started = Instant::now();
                pool.install(|| capture.targets(&logits, &places))?;
                times.push(started.elapsed().as_secs_f64() / positions as f64 * 1e6);
            }
            times.sort_by(f64::total_cmp);
            println!("{:<9} {} temperatures {:>8.1} us a position", preset.name(), temperatures.len(), times[RUNS / 2]);
        }
    }
    Ok(())
}
