//! The mask against Philox's published words, and its statistics.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;

const PLACE: Place = Place { seed: 42, step: 7, layer: 3, projection: 5 };

/// 1 where an input stays, 0 where it is left out.
fn kept(mask: &Mask, width: usize, rows: usize) -> Vec<f64> {
    let mut out = vec![f32::NAN; width * rows];
    mask.apply(&vec![1.0; width * rows], width, 0, &mut out);
    out.into_iter().map(|v| f64::from(v > 0.0)).collect()
}

#[test]
fn philox_gives_the_published_words() {
    // The known answers of Philox4x32 with 7 rounds that its authors publish beside the code: counter, key, words.
    let answers: [([u32; 4], [u32; 2], [u32; 4]); 3] = [
        ([0; 4], [0; 2], [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x5207_ddc2, 0x4516_5e59, 0x4d8e_e751, 0x8c52_f662]),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0x4dfc_caba, 0x190a_87f0, 0xc473_62ba, 0xb6b5_242a],
        ),
    ];
    for (counter, key, words) in answers {
        assert_eq!(philox(counter.map(|word| [word; BLOCKS]), key), words.map(|word| [word; BLOCKS]));
    }
}

#[test]
fn a_column_takes_the_word_that_the_page_says() {
    let mask = Mask::new(0.3, PLACE).unwrap();
    let (width, row) = (77, (1 << 33) + 5_usize);
    let x: Vec<f32> = (0..width).map(|i| i as f32 - 20.5).collect();
    let (mut out, mut sum) = (vec![0.0; width], vec![1.0; width]);
    mask.apply(&x, width, row, &mut out);
    mask.add(&x, width, row, &mut sum);
    for (column, (x, out)) in x.iter().zip(&out).enumerate() {
        let (group, word, block) = (column / 32, column / 8 % 4, column % 8);
        let counter = [(8 * group + block) as u32, 5, 2, 0].map(|word| [word; BLOCKS]);
        let word = philox(counter, [mask.key as u32, (mask.key >> 32) as u32])[word][0];
        let expected = if f64::from(word) < 0.3 * 2f64.powi(32) { 0.0 } else { x * (1.0 / 0.7_f64) as f32 };
        assert_eq!((*out, sum[column]), (expected, 1.0 + expected), "{column}");
    }
}

#[test]
fn the_share_left_out_is_p() {
    let (width, rows) = (896, 1117);
    let n = (width * rows) as f64;
    for p in [0.001, 0.05, 0.3, 0.5, 0.999] {
        let mask = Mask::new(p, PLACE).unwrap();
        let share = 1.0 - kept(&mask, width, rows).iter().sum::<f64>() / n;
        // Five standard deviations of a binomial share: by chance beyond it once in two million seeds.
        assert!((share - p).abs() < 5.0 * (p * (1.0 - p) / n).sqrt(), "{p}: {share}");
        assert_eq!(mask.scale, (1.0 / (1.0 - p)) as f32);
    }
}

#[test]
fn every_row_and_column_is_left_out_as_often() {
    // Sums of 0.25-masks over rows and over columns: each is binomial, so (sum - n p)² / (n p q) adds up to about as many as there
    // are, give or take √(2 · as many).
    let (width, rows, p) = (512, 768, 0.25);
    let all = kept(&Mask::new(p, PLACE).unwrap(), width, rows);
    let chi_square = |sums: Vec<f64>, n: usize| {
        let n = n as f64;
        sums.iter().map(|s| (s - n * (1.0 - p)).powi(2) / (n * p * (1.0 - p))).sum::<f64>()
    };
    let by_row = all.chunks(width).map(|row| row.iter().sum()).collect();
    let by_column = (0..width).map(|c| all.iter().skip(c).step_by(width).sum()).collect();
    for (found, degrees) in [(chi_square(by_row, width), rows as f64), (chi_square(by_column, rows), width as f64)] {
        assert!((found - degrees).abs() < 5.0 * (2.0 * degrees).sqrt(), "{found} of {degrees}");
    }
}

#[test]
fn masks_of_different_places_and_neighbours_do_not_agree_more_than_by_chance() {
    let (width, rows, p) = (640, 500, 0.5);
    let at = |place| kept(&Mask::new(p, place).unwrap(), width, rows);
    let own = at(PLACE);
    assert_eq!(own, at(PLACE));
    let shifted = |by: usize| -> Vec<f64> { own.iter().cycle().skip(by).take(own.len()).copied().collect() };
    let others = [
        at(Place { seed: 43, ..PLACE }),
        at(Place { step: 8, ..PLACE }),
        at(Place { layer: 4, ..PLACE }),
        at(Place { projection: 6, ..PLACE }),
        // The same numbers in other places.
        at(Place { step: 3, layer: 7, ..PLACE }),
        at(Place { layer: 5, projection: 3, ..PLACE }),
        shifted(1),
        shifted(8),
        shifted(32),
        shifted(width),
    ];
    let n = own.len() as f64;
    for (i, other) in others.iter().enumerate() {
        let agree = own.iter().zip(other).filter(|(a, b)| a == b).count() as f64 / n;
        // Half of them agree by chance, within five standard deviations.
        assert!((agree - 0.5).abs() < 5.0 * (0.25 / n).sqrt(), "{i}: {agree}");
    }
}

#[test]
fn the_mask_is_the_same_on_any_number_of_threads_and_cuts() {
    let (width, rows) = (101, 64);
    let mask = Mask::new(0.1, PLACE).unwrap();
    let x: Vec<f32> = (0..width * rows).map(|i| (i as f32).sin()).collect();
    let mut whole = vec![0.0; x.len()];
    mask.apply(&x, width, 1000, &mut whole);
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let mut cut = vec![0.0; x.len()];
        let part = 5 * width;
        pool.install(|| {
            cut.par_chunks_mut(part).zip(x.par_chunks(part)).enumerate().for_each(|(i, (out, x))| {
                mask.apply(x, width, 1000 + 5 * i, out);
            });
        });
        assert_eq!(cut, whole, "{threads} threads");
    }
    assert!(whole.contains(&0.0));
}

#[test]
fn nothing_left_out_needs_no_mask_and_odd_lengths_do_no_harm() {
    for p in [0.0, -0.1, 1.0, 2.0, f64::NAN] {
        assert_eq!(Mask::new(p, PLACE), None);
    }
    let mask = Mask::new(1.0 - f64::EPSILON, PLACE).unwrap();
    assert_eq!(mask.threshold, u32::MAX);
    let mut out = [9.0; 5];
    mask.apply(&[f32::NAN; 7], 2, 0, &mut out);
    assert_eq!(out, [0.0, 0.0, 0.0, 0.0, 9.0], "whole rows alone, and what is left out is 0 whatever it was");
    mask.apply(&[], 0, 0, &mut []);
}
