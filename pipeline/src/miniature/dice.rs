//! Seeded chance: every random choice of the miniature world is drawn here.
//!
//! The tensor library's own generator cannot be seeded on the CPU; ChaCha8 can, and gives the same numbers everywhere.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// One stream of a seed.
pub struct Dice(ChaCha8Rng);

impl Dice {
    /// Stream `stream` of `seed`; streams of one seed are independent.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        generator.set_stream(stream);
        Self(generator)
    }

    /// A whole number in `0..n`; 0 when `n` is 0. The bias of the multiplication is below n / 2^64.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.0.next_u64()) * n as u128) >> 64) as usize
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of `N` choices, all alike.
    pub fn pick<'a, T, const N: usize>(&mut self, choices: &'a [T; N]) -> &'a T {
        const { assert!(N > 0, "nothing to pick from") };
        &choices[self.below(N)]
    }

    /// The first of three choices most often (60 %), the second sometimes (30 %), the third seldom (10 %).
    pub fn lean<T: Copy>(&mut self, choices: [T; 3]) -> T {
        let [often, sometimes, seldom] = choices;
        match self.below(10) {
            0..=5 => often,
            6..=8 => sometimes,
            _ => seldom,
        }
    }

    /// Puts `items` into a random order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }

    /// `count` numbers of a normal distribution with mean 0 and deviation `sigma` (Box and Muller), in f32.
    pub fn normals(&mut self, count: usize, sigma: f64) -> Vec<f32> {
        let mut numbers = Vec::with_capacity(count + 1);
        while numbers.len() < count {
            // 53 bits each; the radius' number lies in (0, 1], so its logarithm is finite.
            let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt() * sigma;
            let (sin, cos) = (std::f64::consts::TAU * self.unit()).sin_cos();
            numbers.push((radius * cos) as f32);
            numbers.push((radius * sin) as f32);
        }
        numbers.truncate(count);
        numbers
    }

    fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }
}
