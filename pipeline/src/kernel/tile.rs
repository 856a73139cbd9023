//! The tile: a few rows by 32 columns of a product, with all sums in registers.

use super::{Isa, TILE_COLUMNS, TILE_ROWS, extent};

/// Columns and rows of the block that plain code keeps in registers.
const COLUMNS: usize = 16;
const ROWS: usize = 4;

impl Isa {
    /// out[r·32 + c] = Σ_k a[k·a_step + r] · b[k·b_step + c] for `steps` k, r < 12, c < 32, added up for rising k by fused multiply-adds.
    pub fn tile(self, steps: usize, (a, a_step): (&[f32], usize), (b, b_step): (&[f32], usize), out: &mut [f32]) {
        let (a, b, out) =
            (covered(a, steps, a_step, TILE_ROWS), covered(b, steps, b_step, TILE_COLUMNS), &mut out[..TILE_ROWS * TILE_COLUMNS]);
        #[cfg(target_arch = "x86_64")]
        {
            if self.has_avx512() {
                // SAFETY: the processor has AVX-512, and the slices hold every element named in the formula.
                return unsafe { x86::tile_avx512(steps, (a, a_step), (b, b_step), out) };
            }
            if self.has_avx2() {
                // SAFETY: the processor has AVX2 and FMA.
                return unsafe { x86::tile_avx2(steps, (a, a_step), (b, b_step), out) };
            }
        }
        tile_plain(steps, (a, a_step), (b, b_step), out);
    }

    /// The same of pairs of bf16: a word of `a` times a word of `b` adds the products of both halves. Fast only where
    /// [`multiplies_pairs`](Self::multiplies_pairs).
    pub fn tile_pairs(self, steps: usize, (a, a_step): (&[u32], usize), (b, b_step): (&[u32], usize), out: &mut [f32]) {
        let (a, b, out) =
            (covered(a, steps, a_step, TILE_ROWS), covered(b, steps, b_step, TILE_COLUMNS), &mut out[..TILE_ROWS * TILE_COLUMNS]);
        #[cfg(target_arch = "x86_64")]
        {
            if self.multiplies_pairs() {
                // SAFETY: the processor has AVX-512 BF16, and the slices hold every element named in the formula.
                return unsafe { x86::pairs_avx512(steps, (a, a_step), (b, b_step), out) };
            }
        }
        pairs_plain(steps, (a, a_step), (b, b_step), out);
    }
}

impl Isa {
    /// A tile's row alone: `out[c] = Σ_k a[k] · b[k·b_step + c]` for `steps` k, c < 32, in the same order and to the same bits.
    pub fn row(self, steps: usize, a: &[f32], (b, b_step): (&[f32], usize), out: &mut [f32]) {
        let (a, b, out) = (&a[..steps], covered(b, steps, b_step, TILE_COLUMNS), &mut out[..TILE_COLUMNS]);
        #[cfg(target_arch = "x86_64")]
        {
            if self.has_avx512() {
                // SAFETY: the processor has AVX-512.
                return unsafe { x86::row_avx512(a, (b, b_step), out) };
            }
            if self.has_avx2() {
                // SAFETY: the processor has AVX2 and FMA.
                return unsafe { x86::row_avx2(a, (b, b_step), out) };
            }
        }
        row_plain(a, (b, b_step), out);
    }
}

#[inline(always)]
fn row_plain(a: &[f32], (b, b_step): (&[f32], usize), out: &mut [f32]) {
    let mut sums = [0f32; TILE_COLUMNS];
    for (k, a) in a.iter().enumerate() {
        let b = &b[k * b_step..][..TILE_COLUMNS];
        for (sum, b) in sums.iter_mut().zip(b) {
            *sum = a.mul_add(*b, *sum);
        }
    }
    out.copy_from_slice(&sums);
}

/// The part of a layout that `steps` steps read.
fn covered<T>(values: &[T], steps: usize, step: usize, width: usize) -> &[T] {
    &values[..extent(steps, step, width)]
}

#[inline(always)]
fn tile_plain(steps: usize, (a, a_step): (&[f32], usize), (b, b_step): (&[f32], usize), out: &mut [f32]) {
    for r in (0..TILE_ROWS).step_by(ROWS) {
        for c in (0..TILE_COLUMNS).step_by(COLUMNS) {
            let mut sums = [[0f32; COLUMNS]; ROWS];
            for k in 0..steps {
                let b = &b[k * b_step + c..][..COLUMNS];
                let a = &a[k * a_step + r..][..ROWS];
                for (sums, a) in sums.iter_mut().zip(a) {
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum = a.mul_add(*b, *sum);
                    }
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                out[(r + i) * TILE_COLUMNS + c..][..COLUMNS].copy_from_slice(sums);
            }
        }
    }
}

/// The definition, for processors on which nobody should call it.
fn pairs_plain(steps: usize, (a, a_step): (&[u32], usize), (b, b_step): (&[u32], usize), out: &mut [f32]) {
    let (low, high) = (|word: u32| f32::from_bits(word << 16), |word: u32| f32::from_bits(word & 0xffff_0000));
    for (i, out) in out.iter_mut().enumerate() {
        let (r, c) = (i / TILE_COLUMNS, i % TILE_COLUMNS);
        let pairs = (0..steps).map(|k| (a[k * a_step + r], b[k * b_step + c]));
        *out = pairs.fold(0.0, |sum, (a, b)| high(a).mul_add(high(b), low(a).mul_add(low(b), sum)));
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{TILE_COLUMNS, TILE_ROWS, row_plain, tile_plain};
    use std::arch::x86_64::*;
    use std::mem::transmute;

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn tile_avx2(steps: usize, a: (&[f32], usize), b: (&[f32], usize), out: &mut [f32]) {
        tile_plain(steps, a, b, out);
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn row_avx2(a: &[f32], b: (&[f32], usize), out: &mut [f32]) {
        row_plain(a, b, out);
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn row_avx512(a: &[f32], b: (&[f32], usize), out: &mut [f32]) {
        row_plain(a, b, out);
    }

    /// SAFETY: the slices must hold a[(steps − 1)·a_step + 11] and b[(steps − 1)·b_step + 31].
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn tile_avx512(steps: usize, (a, a_step): (&[f32], usize), (b, b_step): (&[f32], usize), out: &mut [f32]) {
        let mut sums = [[_mm512_setzero_ps(); 2]; TILE_ROWS];
        let (mut a, mut b) = (a.as_ptr(), b.as_ptr());
        for _ in 0..steps {
            // SAFETY: the caller's promise covers every step; the pointers pass the end only after the last one.
            unsafe {
                let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let a = _mm512_set1_ps(*a.add(r));
                    sums[0] = _mm512_fmadd_ps(a, b0, sums[0]);
                    sums[1] = _mm512_fmadd_ps(a, b1, sums[1]);
                }
                (a, b) = (a.wrapping_add(a_step), b.wrapping_add(b_step));
            }
        }
        store(sums, out);
    }

    /// SAFETY: as [`tile_avx512`].
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn pairs_avx512(steps: usize, (a, a_step): (&[u32], usize), (b, b_step): (&[u32], usize), out: &mut [f32]) {
        let mut sums = [[_mm512_setzero_ps(); 2]; TILE_ROWS];
        let (mut a, mut b) = (a.as_ptr(), b.as_ptr());
        for _ in 0..steps {
            // SAFETY: the caller's promise covers every step; a register of 16 words is one of 32 bf16.
            unsafe {
                let b0: __m512bh = transmute(_mm512_loadu_si512(b.cast()));
                let b1: __m512bh = transmute(_mm512_loadu_si512(b.add(16).cast()));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let a: __m512bh = transmute(_mm512_set1_epi32(*a.add(r) as i32));
                    sums[0] = _mm512_dpbf16_ps(sums[0], a, b0);
                    sums[1] = _mm512_dpbf16_ps(sums[1], a, b1);
                }
                (a, b) = (a.wrapping_add(a_step), b.wrapping_add(b_step));
            }
        }
        store(sums, out);
    }

    /// Writes the sums row by row.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn store(sums: [[__m512; 2]; TILE_ROWS], out: &mut [f32]) {
        for (sums, out) in sums.iter().zip(out.chunks_exact_mut(TILE_COLUMNS)) {
            // SAFETY: a row is 32 values.
            unsafe {
                _mm512_storeu_ps(out.as_mut_ptr(), sums[0]);
                _mm512_storeu_ps(out.as_mut_ptr().add(16), sums[1]);
            }
        }
    }
}
