//! From rows as they lie in memory to the layouts of tiles: out[k·out_step + r] = rows[r·row_step + k].

use super::{Isa, extent};

/// A 32-bit element: f32, or a pair of bf16.
pub trait Word: Copy + Default + Send + Sync {}
impl Word for f32 {}
impl Word for u32 {}

/// out[k·out_step + r] = rows[r·row_step + k] for r < `count` and k < `width`; for r from `count` to `padded` the value is 0.
/// `count` is at most `padded`, and `padded` at most `out_step`.
pub fn transpose<T: Word>(
    isa: Isa,
    (rows, row_step): (&[T], usize),
    (count, width): (usize, usize),
    padded: usize,
    (out, out_step): (&mut [T], usize),
) {
    if width == 0 || padded == 0 {
        return;
    }
    let rows = &rows[..extent(count, row_step, width)];
    let out = &mut out[..extent(width, out_step, padded)];
    #[cfg(target_arch = "x86_64")]
    if isa.has_avx512() {
        for first in (0..padded).step_by(16) {
            let here = count.saturating_sub(first).min(16);
            for k in (0..width).step_by(16) {
                let block = (here, 16.min(width - k), 16.min(padded - first));
                let from = if here == 0 { rows.as_ptr() } else { rows[first * row_step + k..].as_ptr() };
                // SAFETY: the processor has AVX-512. Rows `first..first + here` from k on hold the block's columns, and out holds
                // the places of its columns and padded rows; both were measured above. A `Word` is 32 bits without padding.
                unsafe { x86::block(from.cast(), row_step, block, out[k * out_step + first..].as_mut_ptr().cast(), out_step) };
            }
        }
        return;
    }
    let _ = isa;
    for (k, out) in out.chunks_mut(out_step).enumerate() {
        for (r, value) in out[..padded].iter_mut().enumerate() {
            *value = if r < count { rows[r * row_step + k] } else { T::default() };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// A block of `rows` ≤ 16 rows and `columns` ≤ 16 columns, with `padded` ≤ 16 places written for each column.
    ///
    /// SAFETY: `from` holds the rows at steps of `row_step`, `out` has the places at steps of `out_step`.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn block(
        from: *const i32,
        row_step: usize,
        (rows, columns, padded): (usize, usize, usize),
        out: *mut i32,
        out_step: usize,
    ) {
        let mask = |n: usize| if n == 16 { u16::MAX } else { (1u16 << n) - 1 };
        let mut r = [_mm512_setzero_si512(); 16];
        for (i, r) in r.iter_mut().enumerate().take(rows) {
            // SAFETY: row i is there, and only its first `columns` values are read.
            *r = unsafe { _mm512_maskz_loadu_epi32(mask(columns), from.add(i * row_step)) };
        }
        // Pairs of rows, then pairs of pairs, then quarters of registers twice.
        let mut t = [_mm512_setzero_si512(); 16];
        for i in 0..8 {
            t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
        }
        for i in 0..4 {
            let [a, b, c, d] = [t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]];
            r[4 * i] = _mm512_unpacklo_epi64(a, c);
            r[4 * i + 1] = _mm512_unpackhi_epi64(a, c);
            r[4 * i + 2] = _mm512_unpacklo_epi64(b, d);
            r[4 * i + 3] = _mm512_unpackhi_epi64(b, d);
        }
        for i in 0..4 {
            t[i] = _mm512_shuffle_i32x4::<0x88>(r[i], r[i + 4]);
            t[i + 4] = _mm512_shuffle_i32x4::<0xdd>(r[i], r[i + 4]);
            t[i + 8] = _mm512_shuffle_i32x4::<0x88>(r[i + 8], r[i + 12]);
            t[i + 12] = _mm512_shuffle_i32x4::<0xdd>(r[i + 8], r[i + 12]);
        }
        for i in 0..4 {
            r[i] = _mm512_shuffle_i32x4::<0x88>(t[i], t[i + 8]);
            r[i + 4] = _mm512_shuffle_i32x4::<0x88>(t[i + 4], t[i + 12]);
            r[i + 8] = _mm512_shuffle_i32x4::<0xdd>(t[i], t[i + 8]);
            r[i + 12] = _mm512_shuffle_i32x4::<0xdd>(t[i + 4], t[i + 12]);
        }
        for (k, column) in r.iter().enumerate().take(columns) {
            // SAFETY: only the first `padded` places of column k are written.
            unsafe { _mm512_mask_storeu_epi32(out.add(k * out_step), mask(padded), *column) };
        }
    }
}
