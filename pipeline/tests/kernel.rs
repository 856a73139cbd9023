//! Tiles and products against float64 twins, and against themselves: on every set of instructions, for every cut.
//!
//! Tolerance of a sum of n terms: each step rounds a partial sum, which is at most the sum S of the terms' sizes, by 2^-24 of it at
//! most, 2^-24 · S / √3 on average, and n roundings walk at random: √(n / 3) · 2^-24 · S where all terms have one sign. Some hundred
//! thousand sums are compared, so 2 · √n · 2^-24 · S, 3.5 times that, is allowed.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use half::{bf16, f16};
use potstill_pipeline::kernel::{self, Isa, Precision, Rows, TILE_COLUMNS, TILE_ROWS};
use potstill_pipeline::linear::Weight;
use potstill_pipeline::linear::awq::AwqWeight;
use potstill_pipeline::linear::dense::{DenseWeight, Stored};
use potstill_pipeline::linear::nf4::Nf4Weight;
use potstill_pipeline::linear::outer::{Lies, add_outer};
use potstill_pipeline::linear::panel::{Factor, Matrix, Way};
use potstill_pipeline::linear::product::{Product, Term, add_product, products};

/// Values in ±1 that do not repeat soon.
fn values(n: usize, salt: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919 + salt * 104_729) % 100_003) as f32 / 50_001.5 - 1.0).collect()
}

/// Compares a sum with its float64 twin.
fn close(found: f32, terms: impl Iterator<Item = f64>, what: &str) {
    let (mut sum, mut size, mut n) = (0f64, 0f64, 0);
    terms.for_each(|term| (sum, size, n) = (sum + term, size + term.abs(), n + 1));
    let bound = 2.0 * f64::from(n).sqrt() * f64::powi(2.0, -24) * size;
    assert!((sum - f64::from(found)).abs() <= bound, "{what}: {found} against {sum}, {bound:e} allowed");
}

/// What a product at this precision takes a factor for.
fn rounded(v: f32, precision: Precision) -> f64 {
    match precision {
        Precision::F32 => f64::from(v),
        Precision::Bf16 => f64::from(bf16::from_f32(v).to_f32()),
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn a_row_alone_has_the_bits_of_a_tiles_row() {
    for (steps, b_step) in [(0, 32), (1, 32), (33, 96), (513, 64)] {
        let (a, b) = (values(steps * TILE_ROWS, 3), values(steps * b_step + 32, 4));
        for isa in Isa::all() {
            let mut tile = vec![f32::NAN; TILE_ROWS * TILE_COLUMNS];
            isa.tile(steps, (&a, TILE_ROWS), (&b, b_step), &mut tile);
            for (r, expected) in tile.chunks_exact(TILE_COLUMNS).enumerate() {
                let row: Vec<f32> = a.iter().skip(r).step_by(TILE_ROWS).copied().collect();
                let mut found = vec![f32::NAN; TILE_COLUMNS];
                isa.row(steps, &row, (&b, b_step), &mut found);
                assert_eq!(bits(&found), bits(expected), "{}: {steps} steps, row {r}", isa.name());
            }
        }
    }
}

#[test]
fn a_tile_has_the_same_bits_on_every_instruction_set() {
    let sets = Isa::all();
    println!("{:?}", sets.iter().map(|isa| isa.name()).collect::<Vec<_>>());
    for (steps, a_step, b_step) in [(0, 12, 32), (1, 12, 32), (7, 32, 32), (512, 12, 32), (513, 40, 64)] {
        let (a, b) = (values(steps * a_step + 12, 1), values(steps * b_step + 32, 2));
        let tile = |isa: Isa| {
            let mut out = vec![f32::NAN; TILE_ROWS * TILE_COLUMNS];
            isa.tile(steps, (&a, a_step), (&b, b_step), &mut out);
            out
        };
        let want = tile(sets[0]);
        for (i, found) in want.iter().enumerate() {
            let (r, c) = (i / TILE_COLUMNS, i % TILE_COLUMNS);
            let terms = (0..steps).map(|k| f64::from(a[k * a_step + r]) * f64::from(b[k * b_step + c]));
            close(*found, terms, &format!("{r} {c}"));
        }
        for isa in &sets[1..] {
            assert_eq!(bits(&tile(*isa)), bits(&want), "{} of {steps} steps", isa.name());
        }
    }
}

/// The processor's bf16 instruction rounds in its own way, so sets agree to rounding only.
#[test]
fn a_tile_of_pairs_is_the_sum_of_both_products() {
    let steps = 512;
    let pair = |a: f32, b: f32| u32::from(bf16::from_f32(a).to_bits()) | u32::from(bf16::from_f32(b).to_bits()) << 16;
    let halves = |word: u32| [f64::from(f32::from_bits(word << 16)), f64::from(f32::from_bits(word & 0xffff_0000))];
    let words = |n: usize, salt| values(2 * n, salt).chunks_exact(2).map(|v| pair(v[0], v[1])).collect::<Vec<u32>>();
    let (a, b) = (words(steps * 12, 3), words(steps * 32, 4));
    for isa in Isa::all() {
        let mut out = vec![f32::NAN; TILE_ROWS * TILE_COLUMNS];
        isa.tile_pairs(steps, (&a, 12), (&b, 32), &mut out);
        for (i, found) in out.iter().enumerate() {
            let (r, c) = (i / TILE_COLUMNS, i % TILE_COLUMNS);
            let term = |k: usize| {
                let (a, b) = (halves(a[k * 12 + r]), halves(b[k * 32 + c]));
                a[0] * b[0] + a[1] * b[1]
            };
            close(*found, (0..steps).map(term), &format!("{} {r} {c}", isa.name()));
        }
    }
}

#[test]
fn transposing_moves_every_value_once() {
    for isa in Isa::all() {
        for (count, width, step, padded, out_step) in [
            (12, 512, 512, 12, 12),
            (32, 100, 130, 32, 32),
            (5, 17, 20, 12, 12),
            (0, 9, 9, 12, 12),
            (31, 1, 7, 32, 40),
            (3, 0, 5, 12, 12),
        ] {
            let rows = values(count * step + width, 5);
            let mut out = vec![7f32; width * out_step + padded];
            kernel::transpose(isa, (&rows, step), (count, width), padded, (&mut out, out_step));
            for k in 0..width {
                for r in 0..out_step {
                    let want = if r < count {
                        rows[r * step + k]
                    } else if r < padded {
                        0.0
                    } else {
                        7.0
                    };
                    assert_eq!(out[k * out_step + r], want, "{}: {count} by {width}, row {r} of column {k}", isa.name());
                }
            }
        }
    }
}

/// A layout that cannot lie in memory must not be taken for a short one because its size wraps around.
#[test]
#[should_panic(expected = "out of range")]
fn a_tile_of_steps_beyond_all_memory_is_refused() {
    let mut out = vec![0f32; TILE_ROWS * TILE_COLUMNS];
    Isa::best().tile(2, (&[1.0; 12], usize::MAX - 10), (&[1.0; 64], 32), &mut out);
}

#[test]
#[should_panic(expected = "out of range")]
fn rows_beyond_all_memory_are_not_transposed() {
    kernel::transpose(Isa::best(), (&[1f32; 20], usize::MAX - 3), (2, 9), 12, (&mut [0f32; 108], 12));
}

#[test]
fn rounding_is_to_nearest_even() {
    let mut all = values(999, 6);
    all.extend([
        0.0,
        -0.0,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN_POSITIVE / 8.0,
        1.0 + 1.0 / 256.0,
        1.0 + 3.0 / 256.0,
    ]);
    all.extend([f32::NAN, -f32::NAN, f32::from_bits(0x7fff_ffff), f32::from_bits(0xffff_ffff), f32::from_bits(0x7f80_0001)]);
    assert_eq!(all.len() % 2, 0);
    let (mut out, mut rounded) = (vec![0u32; all.len() / 2], all.clone());
    kernel::round_to_pairs(&all, &mut out);
    kernel::round_all(&mut rounded);
    for (i, value) in all.iter().enumerate() {
        let want = bf16::from_f32(*value);
        for found in [bf16::from_bits((out[i / 2] >> (16 * (i % 2))) as u16), bf16::from_f32(rounded[i])] {
            assert!(found == want || found.is_nan() && want.is_nan(), "{value} became {found}");
        }
    }
    let mut odd = vec![0u32; 1];
    kernel::round_to_pairs(&[1.0], &mut odd);
    assert_eq!(odd, [0x3f80], "an odd last value stands beside 0");
}

/// One weight in every encoding.
fn encodings(outputs: usize, inputs: usize) -> Vec<(&'static str, Weight)> {
    let dense = values(outputs * inputs, 7);
    let bytes = |stored: Stored| -> Vec<u8> {
        match stored {
            Stored::F32 => dense.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Stored::F16 => dense.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            Stored::Bf16 => dense.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        }
    };
    let stored = |s: Stored| Weight::Dense(DenseWeight::new(outputs, inputs, s, bytes(s).into()).unwrap());
    let mut all = vec![
        ("f32", stored(Stored::F32)),
        ("f16", stored(Stored::F16)),
        ("bf16", stored(Stored::Bf16)),
        ("NF4", Weight::Nf4(Nf4Weight::quantize(&dense, outputs, inputs).unwrap())),
    ];
    if outputs.is_multiple_of(8) && inputs.is_multiple_of(4) {
        let group = inputs / 4;
        let words = |n: usize, salt: u32| (0..n as u32).map(|i| (i + salt).wrapping_mul(0x9e37_79b9)).collect::<Vec<u32>>();
        let scales: Vec<f16> = (0..4 * outputs).map(|i| f16::from_f32(0.01 * (i % 13 + 1) as f32)).collect();
        let (q, z) = (words(inputs * outputs / 8, 1), words(4 * outputs / 8, 2));
        all.push(("AWQ", Weight::Awq(AwqWeight::from_values(inputs, outputs, group, &q, &z, &scales).unwrap())));
    }
    all
}

fn product(x: &[f32], weight: &Weight, bias: Option<&[f32]>, precision: Precision) -> Vec<f32> {
    let rows = Rows::pack(x, weight.inputs(), precision);
    products(&[Product { bias, ..Product::of(&rows, Factor::forward(weight)) }]).remove(0)
}

#[test]
fn products_of_every_encoding_equal_their_float64_twins() {
    for (outputs, inputs, t) in [(32, 512, 12), (40, 1100, 13), (8, 64, 1), (33, 515, 30), (64, 2052, 5), (7, 3, 2)] {
        let (x, bias) = (values(t * inputs, 8), values(outputs, 9));
        for (name, weight) in encodings(outputs, inputs) {
            let w: Vec<f32> = support::floats(&weight.to_tensor().unwrap().contiguous().unwrap());
            for precision in [Precision::F32, Precision::Bf16] {
                let round = |v| rounded(v, precision);
                let found = product(&x, &weight, Some(&bias), precision);
                assert_eq!(found.len(), t * outputs);
                for (i, found) in found.iter().enumerate() {
                    let (row, column) = (&x[i / outputs * inputs..][..inputs], &w[i % outputs * inputs..][..inputs]);
                    let terms = row.iter().zip(column).map(|(x, w)| round(*x) * round(*w));
                    let terms = terms.chain([f64::from(bias[i % outputs])]);
                    close(*found, terms, &format!("{name} {outputs} x {inputs}, {precision:?}, value {i}"));
                }
            }
        }
    }
}

/// Products as wide as a real teacher's; how they are cut must not depend on the number of rows, nor on threads, nor on what is
/// multiplied beside them.
#[test]
fn a_row_of_a_product_does_not_depend_on_anything_else() {
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let many_threads = rayon::ThreadPoolBuilder::new().num_threads(7).build().unwrap();
    for (inner, outer) in [(896, 1024), (5120, 128), (1500, 65), (700, 9)] {
        let weight = Weight::Dense(DenseWeight::from_f32(outer, inner, &values(outer * inner, 10)).unwrap());
        let x = values(401 * inner, 11);
        for precision in [Precision::F32, Precision::Bf16] {
            let whole = product(&x, &weight, None, precision);
            for pool in [&one_thread, &many_threads] {
                assert!(pool.install(|| product(&x, &weight, None, precision)) == whole, "{inner} x {outer}");
            }
            let rows = Rows::pack(&x, inner, precision);
            let one = Product::of(&rows, Factor::forward(&weight));
            let beside = products(&[one.clone(), one]);
            assert!(beside[0] == whole && beside[1] == whole);
            for (start, rows) in [(17, 1), (0, 2), (399, 2), (3, 12), (7, 13), (100, 301)] {
                let part = product(&x[start * inner..(start + rows) * inner], &weight, None, precision);
                assert!(
                    bits(&part) == bits(&whole[start * outer..(start + rows) * outer]),
                    "{inner} x {outer}, {rows} from {start}"
                );
            }
        }
    }
}

/// Where columns are too few for all threads, rows are cut as well: from 768 of them on.
#[test]
fn rows_that_are_cut_among_threads_are_the_same_rows() {
    let many_threads = rayon::ThreadPoolBuilder::new().num_threads(7).build().unwrap();
    let (t, inner) = (1201, 40);
    for outer in [9, 65] {
        let weight = Weight::Dense(DenseWeight::from_f32(outer, inner, &values(outer * inner, 13)).unwrap());
        let (x, bias) = (values(t * inner, 14), values(outer, 15));
        for precision in [Precision::F32, Precision::Bf16] {
            let cut = many_threads.install(|| product(&x, &weight, Some(&bias), precision));
            let whole: Vec<f32> = x.chunks(100 * inner).flat_map(|x| product(x, &weight, Some(&bias), precision)).collect();
            assert!(bits(&cut) == bits(&whole), "{outer} columns, {precision:?}");
        }
    }
}

/// Every set of instructions unpacks the same bits, of scales that are no numbers too.
#[test]
fn awq_panels_are_unpacked_alike() {
    let (inputs, outputs, group) = (60, 72, 20);
    let words = |n: usize, salt: u32| (0..n as u32).map(|i| (i + salt).wrapping_mul(0x9e37_79b9)).collect::<Vec<u32>>();
    let mut scales: Vec<f16> = (0..inputs / group * outputs).map(|i| f16::from_f32(0.01 * (i % 13) as f32 - 0.05)).collect();
    (scales[3], scales[40], scales[77]) = (f16::INFINITY, f16::NEG_ZERO, f16::MIN_POSITIVE_SUBNORMAL);
    let (q, z) = (words(inputs * outputs / 8, 3), words(inputs / group * outputs / 8, 4));
    let weight = AwqWeight::from_values(inputs, outputs, group, &q, &z, &scales).unwrap();
    let all = weight.dequantize();
    for isa in Isa::all() {
        for (first, range) in [(0, 0..60), (32, 7..51), (64, 19..41), (40, 20..40), (0, 59..60)] {
            let mut out = vec![7f32; range.len() * TILE_COLUMNS];
            weight.panel(isa, first, range.clone(), &mut out);
            for (i, row) in range.clone().zip(out.chunks_exact(TILE_COLUMNS)) {
                let columns = (outputs - first).min(TILE_COLUMNS);
                let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                assert!(
                    row.iter().zip(&all[i * outputs + first..][..columns]).all(same),
                    "{} input {i} from {first}",
                    isa.name()
                );
                assert!(row[columns..].iter().all(|v| v.to_bits() == 0), "{} beyond the last column", isa.name());
            }
        }
    }
}

#[test]
fn nothing_times_something_is_nothing() {
    let weight = Weight::Dense(DenseWeight::from_f32(3, 2, &values(6, 12)).unwrap());
    assert!(product(&[], &weight, None, Precision::F32).is_empty());
    assert!(product(&[], &weight, None, Precision::Bf16).is_empty());
}

/// dy W, and a second term dy A after it, as an adapter has it.
#[test]
fn products_the_other_way_and_sums_of_them_equal_their_float64_twins() {
    for (outputs, inputs, t) in
        [(512, 32, 12), (1100, 40, 13), (64, 8, 1), (515, 33, 30), (2056, 64, 5), (3, 7, 2), (72, 100, 401)]
    {
        let rank = 5;
        let (dy, du, a) = (values(t * outputs, 13), values(t * rank, 14), values(rank * inputs, 15));
        for (name, weight) in encodings(outputs, inputs) {
            let w: Vec<f32> = support::floats(&weight.to_tensor().unwrap().contiguous().unwrap());
            for precision in [Precision::F32, Precision::Bf16] {
                let round = |v| rounded(v, precision);
                let (rows, low) = (Rows::pack(&dy, outputs, precision), Rows::pack(&du, rank, Precision::F32));
                let adapter = Factor { matrix: Matrix::Values { values: &a, columns: inputs }, way: Way::Backward };
                let one = Product::of(&rows, Factor::backward(&weight));
                let mut both = one.clone();
                both.terms.push(Term { rows: &low, factor: adapter });
                let found = products(&[both]).remove(0);
                for (i, found) in found.iter().enumerate() {
                    let (row, column) = (i / inputs, i % inputs);
                    let frozen = (0..outputs).map(|k| round(dy[row * outputs + k]) * round(w[k * inputs + column]));
                    let trained = (0..rank).map(|k| f64::from(du[row * rank + k]) * f64::from(a[k * inputs + column]));
                    let what = format!("{name} {outputs} x {inputs}, {precision:?}, value {i}");
                    close(*found, frozen.chain(trained), &what);
                }
                let mut later = products(&[one]).remove(0);
                add_product(&Product::of(&low, adapter), &mut later);
                assert_eq!(bits(&later), bits(&found), "{name}: a term added later");
            }
        }
    }
}

#[test]
fn outer_products_equal_their_float64_twins_whichever_way_they_lie() {
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for (t, m, n) in [(1, 1, 1), (5, 12, 32), (600, 100, 33), (1025, 131, 8), (3, 7, 70)] {
        let (x, y, before) = (values(t * m, 16), values(t * n, 17), values(m * n, 18));
        let (mut straight, mut turned) = (before.clone(), before.clone());
        add_outer((&x, m), (&y, n), Lies::Straight, &mut straight);
        one_thread.install(|| add_outer((&x, m), (&y, n), Lies::Turned, &mut turned));
        for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
            let sum = || (0..t).map(|t| f64::from(x[t * m + i]) * f64::from(y[t * n + j]));
            let what = format!("{t}, {m} x {n} at {i}, {j}");
            close(straight[i * n + j], sum().chain([f64::from(before[i * n + j])]), &what);
            close(turned[j * m + i], sum().chain([f64::from(before[j * m + i])]), &what);
        }
    }
    add_outer((&[], 3), (&[], 2), Lies::Straight, &mut [0.0; 6]);
}

#[test]
fn nf4_is_read_alike_by_every_instruction_set() {
    let (rows, columns) = (5, 131);
    let weight = Nf4Weight::quantize(&values(rows * columns, 19), rows, columns).unwrap();
    let all = weight.dequantize();
    for isa in Isa::all() {
        for (row, first, count) in [(0, 0, 131), (1, 0, 64), (1, 1, 63), (2, 7, 100), (4, 130, 1), (3, 33, 98)] {
            let mut out = vec![0f32; count];
            weight.decode_on(isa, row, first, &mut out);
            assert_eq!(bits(&out), bits(&all[row * columns + first..][..count]), "{} {row} {first}", isa.name());
        }
    }
}
