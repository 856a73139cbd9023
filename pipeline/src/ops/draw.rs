//! Drawing tokens from weights: which uniform numbers, and which ids they fall on. Refuses to know where weights come from.
//!
//! The one idea: a draw is a function of (seed, row key, position, draw number) and of the weights, of nothing else. No state
//! goes from one draw to the next, so packs, chunks, threads and resumed runs change no draw.
//!
//! ```text
//! key of a row    BLAKE3 keyed derivation of (seed, row key), 32 bytes: the key of a ChaCha8 generator
//! stream          the position
//! draw number j   words 2j and 2j + 1 of the stream, as one 64-bit number; its top 53 bits over 2^53 are u_j in [0, 1)
//! ```

use potstill_cache::RowKey;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What keeps these draws apart from any other use of the same seed.
const CONTEXT: &str = "potstill draws v1";
/// Uniform numbers have this many bits: all that a number below 1 holds in an f64.
const BITS: u32 = 53;

/// Where a distribution stands: the row and the position in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The conversation's key.
    pub row: RowKey,
    /// The position within the conversation.
    pub position: u32,
}

/// The first `draws` uniform numbers of a place, rising.
pub fn sorted_uniforms(seed: u64, place: Place, draws: u16) -> Vec<f64> {
    let mut material = [0; 24];
    material[..8].copy_from_slice(&seed.to_le_bytes());
    material[8..].copy_from_slice(&place.row.0);
    let mut generator = ChaCha8Rng::from_seed(blake3::derive_key(CONTEXT, &material));
    generator.set_stream(u64::from(place.position));
    let mut uniforms: Vec<f64> =
        (0..draws).map(|_| (generator.next_u64() >> (u64::BITS - BITS)) as f64 / (1u64 << BITS) as f64).collect();
    uniforms.sort_unstable_by(f64::total_cmp);
    uniforms
}

/// Ids by rising id with how often they were drawn: uniform u falls on the first id at which the running sum of weights exceeds
/// u · `total`, where `total` is the sum of the weights added in the same order. One walk: O(ids + draws).
///
/// An id is drawn with probability weight / total, to within the rounding of the sum (ids · 2^-53); one of weight 0 never is.
pub fn counts(weights: impl IntoIterator<Item = (u32, f64)>, total: f64, sorted_uniforms: &[f64]) -> (Vec<u32>, Vec<u16>) {
    let (mut ids, mut counts) = (Vec::new(), Vec::new());
    let mut left = sorted_uniforms;
    let mut sum = 0.0;
    for (id, weight) in weights {
        if left.is_empty() {
            break;
        }
        sum += weight;
        // The last weight takes what is left: among numbers as small as f64 has, u · total may round up to the total.
        let here = left.iter().take_while(|u| **u * total < sum || sum >= total).count();
        if here > 0 {
            ids.push(id);
            counts.push(here as u16);
            left = &left[here..];
        }
    }
    (ids, counts)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn place(row: u8, position: u32) -> Place {
        Place { row: RowKey([row; 16]), position }
    }

    #[test]
    fn uniforms_depend_on_seed_row_and_position_and_fewer_draws_are_the_first_ones() {
        let base = sorted_uniforms(1, place(2, 3), 40);
        assert!(base.windows(2).all(|w| w[0] <= w[1]) && base.iter().all(|u| (0.0..1.0).contains(u)));
        assert_eq!(base, sorted_uniforms(1, place(2, 3), 40));
        for other in
            [sorted_uniforms(2, place(2, 3), 40), sorted_uniforms(1, place(3, 3), 40), sorted_uniforms(1, place(2, 4), 40)]
        {
            assert!(base.iter().all(|u| !other.contains(u)));
        }
        assert!(sorted_uniforms(1, place(2, 3), 7).iter().all(|u| base.contains(u)));
    }

    /// Written down once: a change of generator would change every sampled cache.
    #[test]
    fn the_numbers_stay_the_same() {
        let [a, b]: [f64; 2] = sorted_uniforms(0, place(0, 0), 2).try_into().unwrap();
        let scale = (1u64 << BITS) as f64;
        assert_eq!(((a * scale) as u64, (b * scale) as u64), (2_836_533_581_454_474, 4_731_385_282_616_396));
    }

    #[test]
    fn every_uniform_falls_on_an_id_with_weight() {
        let weights = [(3, 0.0), (5, 1.0), (9, 0.0), (12, 3.0), (13, 0.0)];
        assert_eq!(counts(weights, 4.0, &[0.0, 0.2499, 0.25, 0.9]), (vec![5, 12], vec![2, 2]));
        let last = 1.0 - f64::powi(2.0, -53);
        for total in [1.0, 4.0, 3.7, 1e-300, 1.0 + f64::EPSILON, 5e-324] {
            assert_eq!(counts([(7, total)], total, &[0.0, last]), (vec![7], vec![2]), "{total}");
        }
        assert_eq!(counts(weights, 4.0, &[]), (vec![], vec![]));
    }
}
