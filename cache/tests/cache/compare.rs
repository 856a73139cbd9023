//! Two caches held against each other: by hand, by what must be 0, and by what a smaller cache loses.

use crate::made::{self, description};
use potstill_cache::{Cache, Comparison, Knobs, Record, Reshape, ScanProgress, SoftTargets};

fn near(found: f64, expected: f64) {
    // f64 sums of a handful of terms near 1.
    assert!((found - expected).abs() < 1e-12, "{found} against {expected}");
}

fn compared(first: &std::path::Path, second: &std::path::Path) -> Comparison {
    let progress = ScanProgress::default();
    let found = Comparison::of(&Cache::open(first).unwrap(), &Cache::open(second).unwrap(), &progress).unwrap();
    assert_eq!(progress.rows(), (found.rows, found.rows));
    found
}

/// One row of 20 positions, each with these entries and tail; tokens differ with `seq_id`.
fn row(seq_id: u64, ids: &[u32], logprobs: &[f32], tail: f32) -> Record {
    let mut targets = SoftTargets::default();
    (0..20).for_each(|_| targets.push(ids, logprobs, tail));
    Record { seq_id, input_ids: vec![seq_id as u32; 21], positions: (0..20).collect(), targets, codec: Default::default() }
}

#[test]
fn divergences_over_what_both_keep_and_the_rest() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Powers of 2 have logarithms that 7 bits round alike in both; what counts are the stored values.
    let stored = |p: f64| f64::from(potstill_cache::stored_logprob(p.ln() as f32, 7)).exp();
    let (half, quarter, eighth) = (stored(0.5), stored(0.25), stored(0.125));
    let ln = |p: f32| p.ln();
    let first = [row(0, &[1, 2, 3], &[ln(0.5), ln(0.25), ln(0.125)], ln(0.125)), row(1, &[1], &[ln(0.5)], ln(0.5))];
    let second = [row(0, &[2, 1, 9], &[ln(0.5), ln(0.125), ln(0.125)], ln(0.25)), row(2, &[1], &[ln(0.5)], ln(0.5))];
    made::write(here.path(), &description(2, 2, 3), &first);
    made::write(there.path(), &description(2, 2, 3), &second);
    let found = compared(here.path(), there.path());
    assert_eq!((found.rows, found.only_first, found.only_second, found.positions), (1, 1, 1, 20));
    let figures = found.figures.unwrap();
    // 1 and 2 are in both; 3 and 9 go to the rest.
    let normalised = |p: [f64; 3]| p.map(|x| x / p.iter().sum::<f64>());
    let (p, q) = (normalised([half, quarter, 2.0 * eighth]), normalised([eighth, half, eighth + quarter]));
    let kl = |p: [f64; 3], q: [f64; 3]| p.iter().zip(q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
    near(figures.forward.mean, kl(p, q));
    near(figures.backward.mean, kl(q, p));
    near(figures.forward.largest, kl(p, q));
    assert!(kl(p, q) - kl(q, p) > 0.05, "they tell one way from the other");
    assert!(
        (figures.backward.median / kl(q, p) - 1.0).abs() < 0.004 && figures.forward.median == figures.forward.p99,
        "{figures:?}"
    );
    assert_eq!((figures.top1_agrees, figures.mean_shared_ids), (0.0, 2.0));
    near(figures.mean_rest_first, 2.0 * eighth);
    near(figures.mean_rest_second, eighth + quarter);
    assert_eq!(figures.forward_log10_histogram.counts.iter().position(|&count| count == 20), Some(19));
    assert_eq!((figures.most_different.len(), figures.most_different[0].first, figures.most_different[0].scored), (1, 0, 20));
}

#[test]
fn a_cache_is_nowhere_from_itself_and_a_smaller_one_is_near() {
    let (dir, _) = made::cache(40, 16, 8);
    let same = compared(dir.path(), dir.path());
    let figures = same.figures.unwrap();
    assert_eq!((same.rows, same.only_first, same.only_second, figures.top1_agrees), (40, 0, 0, 1.0));
    // Sums of the same dozen terms in two orders: a few units in the last place of 1, which no quantile sees.
    assert!(figures.forward.largest < 1e-15 && figures.backward.largest < 1e-15, "{figures:?}");
    assert_eq!((figures.forward.median, figures.backward.p99), (0.0, 0.0));
    // What was dropped goes to the tail: over the kept ids and the rest nothing differs but for rounding of the tail.
    let out = tempfile::tempdir().unwrap();
    let smaller = out.path().join("smaller");
    let reshape = Reshape { knobs: Knobs { top_k: Some(3), ..Knobs::default() }, ..Reshape::default() };
    potstill_cache::repack(dir.path(), &smaller, &reshape, &ScanProgress::default()).unwrap();
    let found = compared(dir.path(), &smaller);
    let figures = found.figures.unwrap();
    assert_eq!((found.rows, found.positions, figures.top1_agrees), (40, same.positions, 1.0));
    assert!(figures.mean_shared_ids <= 3.0 && figures.forward.largest < 1e-4 && figures.forward.largest > 0.0, "{figures:?}");
}

#[test]
fn figures_do_not_depend_on_threads() {
    let (dir, _) = made::cache(40, 16, 8);
    let (other, _) = made::cache(60, 7, 5);
    let once = compared(dir.path(), other.path());
    let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    assert_eq!(once, alone.install(|| compared(dir.path(), other.path())));
}
