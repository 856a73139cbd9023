//! The order in which rows are drawn: a pure function of (seed, epoch, place), in constant memory.
//!
//! A Feistel network is a permutation of the numbers below a power of 4, whatever its round function; walking along its cycle
//! until the value lies below `rows` makes it one of the rows (Black and Rogaway, "Ciphers with arbitrary finite domains",
//! 2002). No list of rows is ever shuffled or stored, so a resumed run needs only its place.

use serde::{Deserialize, Serialize};

/// Rounds of the network. Four make a strong pseudo-random permutation of large domains; small ones need more.
const ROUNDS: u64 = 8;
/// Least bits of half a number. Below this a network reaches only some of the permutations of a few rows.
const MIN_HALF_BITS: u32 = 4;

/// How rows are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Another permutation in each epoch, decided by the seed.
    #[default]
    Seeded,
    /// 0, 1, 2, ... in every epoch.
    Sequential,
}

/// An order of `rows` rows for every epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampler {
    rows: u64,
    seed: u64,
    order: Order,
}

impl Sampler {
    /// The order of `rows` rows under `seed`.
    pub fn new(rows: u64, seed: u64, order: Order) -> Self {
        Self { rows, seed, order }
    }

    /// Rows in an epoch.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// The row drawn at place `i` (0-based, below [`rows`](Self::rows)) of `epoch`. As `i` runs over an epoch, every row comes
    /// exactly once. A place beyond the epoch's end counts from its start again; of no rows, the answer is 0.
    pub fn row(&self, epoch: u64, i: u64) -> u64 {
        if self.rows < 2 {
            return 0;
        }
        let place = i % self.rows;
        match self.order {
            Order::Sequential => place,
            Order::Seeded => self.permute(epoch, place),
        }
    }

    fn permute(&self, epoch: u64, place: u64) -> u64 {
        let bits = u64::BITS - (self.rows - 1).leading_zeros();
        let half = bits.div_ceil(2).max(MIN_HALF_BITS);
        let key = mix(mix(self.seed).wrapping_add(epoch));
        let mut value = place;
        // The domain has at most 4 values a row (256 in all for a few rows), and the cycle comes back to `place` itself.
        loop {
            value = feistel(value, half, key);
            if value < self.rows {
                return value;
            }
        }
    }
}

/// A permutation of the numbers below 4^`half`.
fn feistel(value: u64, half: u32, key: u64) -> u64 {
    let mask = (1u64 << half) - 1;
    let (mut left, mut right) = (value >> half, value & mask);
    for round in 0..ROUNDS {
        let f = mix(right.wrapping_add(mix(key.wrapping_add(round)))) >> (u64::BITS - half);
        (left, right) = (right, left ^ f);
    }
    left << half | right
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn epoch(sampler: Sampler, epoch: u64) -> Vec<u64> {
        (0..sampler.rows()).map(|i| sampler.row(epoch, i)).collect()
    }

    #[test]
    fn every_epoch_draws_every_row_once() {
        for rows in (0..300).chain([1000, 4096, 4097]) {
            for order in [Order::Seeded, Order::Sequential] {
                for e in 0..2 {
                    let mut drawn = epoch(Sampler::new(rows, 17, order), e);
                    drawn.sort_unstable();
                    assert!(drawn.iter().copied().eq(0..rows), "{rows} rows, {order:?}, epoch {e}");
                }
            }
        }
    }

    #[test]
    fn large_counts_stay_in_range() {
        for rows in [1 << 33, (1 << 40) + 7, u64::MAX] {
            let sampler = Sampler::new(rows, 3, Order::Seeded);
            let drawn: Vec<u64> = (0..100).map(|i| sampler.row(0, i)).collect();
            let mut unique = drawn.clone();
            unique.sort_unstable();
            unique.dedup();
            assert!(unique.len() == 100 && drawn.iter().all(|&row| row < rows), "{rows}");
        }
    }

    #[test]
    fn all_orders_of_a_few_rows_are_equally_likely() {
        // 24 orders of 4 rows over 12,000 seeds: 500 each, standard deviation sqrt(500 * 23/24) = 21.9. Six of them are 131.
        let mut counts = std::collections::HashMap::new();
        for seed in 0..12_000 {
            *counts.entry(epoch(Sampler::new(4, seed, Order::Seeded), 0)).or_insert(0u32) += 1;
        }
        assert_eq!(counts.len(), 24);
        assert!(counts.values().all(|&n| n.abs_diff(500) < 131), "{counts:?}");
        // The same over epochs of one seed.
        let first: Vec<u32> = (0..12_000).map(|e| Sampler::new(4, 9, Order::Seeded).row(e, 0) as u32).collect();
        for row in 0..4 {
            // 3,000 each, standard deviation sqrt(3000 * 3/4) = 47.4; six of them are 285.
            assert!(first.iter().filter(|&&r| r == row).count().abs_diff(3000) < 285);
        }
    }

    #[test]
    fn neighbours_are_torn_apart() {
        // In a random order of 1,000 rows about 2 of 999 neighbours differ by one; 15 would be a pattern.
        let drawn = epoch(Sampler::new(1000, 5, Order::Seeded), 1);
        assert!(drawn.windows(2).filter(|w| w[0].abs_diff(w[1]) == 1).count() < 15);
        assert_ne!(drawn, epoch(Sampler::new(1000, 5, Order::Seeded), 2));
        assert_ne!(drawn, epoch(Sampler::new(1000, 6, Order::Seeded), 1));
    }

    #[test]
    fn the_order_never_changes_between_releases() {
        // A checkpoint remembers only its place, so these numbers are part of the format.
        assert_eq!(epoch(Sampler::new(10, 42, Order::Seeded), 0), [3, 6, 0, 1, 7, 4, 2, 8, 9, 5]);
    }
}
