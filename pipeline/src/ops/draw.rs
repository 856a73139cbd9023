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

/// Ids by rising id with how often they were drawn. The weights of ids lie in blocks of N, whose sums are `sums`; `total` is those
/// added in their order, and `weights` gives a block's own.
///
/// Uniform u falls on the first block at whose end the running sum exceeds u · `total`; within the block on the first id at which the
/// weights, added one by one to the sum before the block, exceed it. What rounding leaves over goes to the last block, and the last
/// id, that weighs anything. O(blocks + N · draws).
///
/// An id is drawn with probability weight / total, to within the rounding of the sums (2^-53 for each addition); one of weight 0 never
/// is.
pub fn counts<const N: usize>(
    sums: &[f64],
    weights: impl Fn(usize) -> [f32; N],
    total: f64,
    sorted_uniforms: &[f64],
) -> (Vec<u32>, Vec<u16>) {
    let (mut ids, mut counts) = (Vec::new(), Vec::new());
    let mut left = sorted_uniforms;
    let mut before = 0.0;
    for (block, sum) in sums.iter().enumerate() {
        if left.is_empty() {
            break;
        }
        let after = before + sum;
        // Among numbers as small as f64 has, u · total may round up to the total.
        let here = left.iter().take_while(|u| **u * total < after || after >= total).count();
        if here > 0 {
            let weights = weights(block);
            let points = left[..here].iter().map(|u| u * total);
            share_out((block * N) as u32, &weights, before, points).for_each(|(id, count)| {
                ids.push(id);
                counts.push(count);
            });
            left = &left[here..];
        }
        before = after;
    }
    (ids, counts)
}

/// The ids of a block that starts at id `first`, with how many of the rising `points` fall on each.
fn share_out<const N: usize>(
    first: u32,
    weights: &[f32; N],
    before: f64,
    points: impl Iterator<Item = f64>,
) -> impl Iterator<Item = (u32, u16)> {
    let mut points = points.peekable();
    let mut sum = before;
    let last = weights.iter().rposition(|w| *w > 0.0);
    (first..).zip(weights).enumerate().filter_map(move |(i, (id, weight))| {
        sum += f64::from(*weight);
        let mut count = 0;
        while *weight > 0.0 && points.next_if(|point| *point < sum || Some(i) == last).is_some() {
            count += 1;
        }
        (count > 0).then_some((id, count))
    })
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
        let blocks = [[0.0, 1.0], [0.0, 0.0], [0.0, 3.0], [0.0, 0.0]];
        let drawn = |blocks: &[[f32; 2]], uniforms: &[f64]| {
            let sums: Vec<f64> = blocks.iter().map(|block| block.iter().map(|w| f64::from(*w)).sum()).collect();
            counts(&sums, |block| blocks[block], sums.iter().sum(), uniforms)
        };
        assert_eq!(drawn(&blocks, &[0.0, 0.2499, 0.25, 0.9]), (vec![1, 5], vec![2, 2]));
        assert_eq!(drawn(&blocks, &[]), (vec![], vec![]));
        let last = 1.0 - f64::powi(2.0, -53);
        for total in [1.0, 4.0, 3.7, 1e-30, 1.0 + f32::EPSILON, 1e-45] {
            assert_eq!(drawn(&[[0.0, total]], &[0.0, last]), (vec![1], vec![2]), "{total}");
        }
        // Sums that rounding made larger than their weights: what is left over goes to the last id that has a weight.
        assert_eq!(counts(&[1.0, 2.5], |_| [1.0f32, 1.0, 0.0], 3.5, &[0.5, 0.9, last]), (vec![3, 4], vec![1, 2]));
    }

    /// The two walks come to what one walk over all weights does.
    #[test]
    fn blocks_change_nothing() {
        let weights: Vec<f32> = (0..4 * 64).map(|i| ((i * 7919) % 13) as f32 / 16.0).collect();
        let uniforms = sorted_uniforms(5, place(1, 2), 500);
        let draw = |blocks: usize| {
            let blocks: Vec<[f32; 64]> = weights.chunks(64).take(blocks).map(|w| w.try_into().unwrap()).collect();
            // Sixteenths add up without rounding.
            let sums: Vec<f64> = blocks.iter().map(|b| b.iter().map(|w| f64::from(*w)).sum()).collect();
            counts(&sums, |b| blocks[b], sums.iter().sum(), &uniforms)
        };
        let total: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        let whole: [f32; 256] = weights.clone().try_into().unwrap();
        assert_eq!(draw(4), counts(&[total], |_| whole, total, &uniforms));
        assert_eq!(draw(4).1.iter().sum::<u16>(), 500);
    }
}
