//! The k largest values of a row, and whether all of it is finite. Refuses to know what the values are.
//!
//! The one idea: a row is cut into groups, and of each only its largest value is looked at. The k-th largest of those is reached by k
//! values at least, so it bounds the k-th largest value of the row from below; only groups that reach it are looked through.
//!
//! ```text
//! chunk of 16 · h values, row by row of 16      group = column of h values, √(V k) of them in all
//! ids 0 .. 15       z z z z … z                 maxima, one vector each chunk: m m m m … m
//! ids 16 .. 31      z z z z … z                 k-th largest m = bound ─► ids with z ≥ bound ─► the k largest
//! ```

use crate::kernel::vectorised;
use std::cmp::Ordering;

/// Values side by side in a row of a chunk: a vector of 512 bits.
const LANES: usize = 16;

/// Finds the largest values; its buffers are kept from row to row.
#[derive(Default)]
pub(super) struct Largest {
    maxima: Vec<f32>,
    ranked: Vec<f32>,
    ids: Vec<u32>,
    /// Rows of a chunk, h.
    height: usize,
}

impl Largest {
    /// Reads the row for its `k` largest values. The largest one (−∞ of no values), or the first id whose value is not finite.
    pub(super) fn read(&mut self, z: &[f32], k: usize) -> Result<f32, usize> {
        self.height = (z.len() / k.max(1)).isqrt().max(1);
        self.maxima.clear();
        if !maxima(z, LANES * self.height, &mut self.maxima) {
            return Err(z.iter().position(|v| !v.is_finite()).unwrap_or_default());
        }
        Ok(self.maxima.iter().copied().fold(f32::NEG_INFINITY, f32::max))
    }

    /// The ids of the k largest values of the row that was read for them, largest first, ties by rising id.
    pub(super) fn ids(&mut self, z: &[f32], k: usize) -> &[u32] {
        let k = k.min(z.len());
        self.ids.clear();
        if k == 0 {
            return &[];
        }
        self.gather(z, k);
        let larger = |a: &u32, b: &u32| falling(z[*a as usize], z[*b as usize]).then(a.cmp(b));
        if k < self.ids.len() {
            self.ids.select_nth_unstable_by(k - 1, larger);
        }
        self.ids.truncate(k);
        self.ids.sort_unstable_by(larger);
        &self.ids
    }

    /// Collects all ids whose value reaches the k-th largest maximum.
    fn gather(&mut self, z: &[f32], k: usize) {
        let mut bound = f32::NEG_INFINITY;
        if k <= self.maxima.len() {
            self.ranked.clone_from(&self.maxima);
            bound = *self.ranked.select_nth_unstable_by(k - 1, |a, b| falling(*a, *b)).1;
        }
        for (group, _) in self.maxima.iter().enumerate().filter(|(_, largest)| **largest >= bound) {
            let (chunk, lane) = (group / LANES, group % LANES);
            let start = chunk * LANES * self.height;
            let column = (start..z.len().min(start + LANES * self.height)).skip(lane).step_by(LANES);
            self.ids.extend(column.filter(|id| z[*id] >= bound).map(|id| id as u32));
        }
    }
}

/// Larger values first. All are finite or −∞; 0 and −0 are equal.
pub(super) fn falling(a: f32, b: f32) -> Ordering {
    b.partial_cmp(&a).unwrap_or(Ordering::Equal)
}

vectorised! {
    /// Appends the [`LANES`] maxima of each chunk of `chunk` values (−∞ where there is none); whether all values are finite.
    fn maxima(z: &[f32], chunk: usize, maxima: &mut Vec<f32>) -> bool {
        const INFINITY: u32 = f32::INFINITY.to_bits();
        let mut wrong = [0u32; LANES];
        for chunk in z.chunks(chunk) {
            let mut largest = [f32::NEG_INFINITY; LANES];
            let (rows, rest) = chunk.as_chunks::<LANES>();
            for row in rows {
                for ((largest, wrong), z) in largest.iter_mut().zip(&mut wrong).zip(row) {
                    *largest = if *z > *largest { *z } else { *largest };
                    *wrong |= u32::from(z.to_bits() & INFINITY == INFINITY);
                }
            }
            for ((largest, wrong), z) in largest.iter_mut().zip(&mut wrong).zip(rest) {
                *largest = if *z > *largest { *z } else { *largest };
                *wrong |= u32::from(z.to_bits() & INFINITY == INFINITY);
            }
            maxima.extend_from_slice(&largest);
        }
        wrong == [0; LANES]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sorts everything.
    fn twin(z: &[f32], k: usize) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..z.len() as u32).collect();
        ids.sort_by(|a, b| falling(z[*a as usize], z[*b as usize]).then(a.cmp(b)));
        ids.truncate(k);
        ids
    }

    proptest! {
        /// Few different values make ties at every bound, of either zero too; lengths lie on both sides of each chunk's end.
        #[test]
        fn equals_a_full_sort(z in prop::collection::vec(prop::sample::select(vec![-1.5f32, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5, 2.0]), 1..700), k in 1usize..80) {
            let mut largest = Largest::default();
            prop_assert_eq!(largest.read(&z, k), Ok(z.iter().copied().fold(f32::NEG_INFINITY, f32::max)));
            prop_assert_eq!(largest.ids(&z, k), &twin(&z, k)[..]);
        }

        #[test]
        fn names_the_first_value_that_is_not_finite(n in 1usize..300, at in any::<prop::sample::Index>(), later in any::<prop::sample::Index>(), kind in 0usize..3, k in 1usize..40) {
            let mut z: Vec<f32> = (0..n).map(|i| i as f32 - 100.0).collect();
            z[later.index(n)] = f32::NAN;
            let at = at.index(n);
            z[at] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][kind];
            prop_assert_eq!(Largest::default().read(&z, k), Err(at.min(later.index(n))));
        }
    }

    /// A buffer that was used for a longer row, a shorter one and another k gives the same as a new one.
    #[test]
    fn rows_leave_nothing_behind() {
        let mut used = Largest::default();
        for (n, k) in [(1000, 3), (10, 64), (5000, 64), (64, 64), (65, 64), (0, 0), (33, 1)] {
            let z: Vec<f32> = (0..n).map(|i| ((i * 7919) % 1009) as f32).collect();
            assert!(used.read(&z, k).is_ok());
            assert_eq!(used.ids(&z, k), twin(&z, k), "{k} of {n}");
        }
    }
}
