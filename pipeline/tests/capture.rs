//! What is kept of logits, against float64 twins written from the definitions, and the law of the draws.
//!
//! Tolerances: a weight exp(z − max) is an f32 within 2 units (2.4e-7) whose exponent x was rounded once (6e-8 |x|; at a temperature
//! three times). Sums are f64, so two of them, of ids that lie 17 nats below the largest at most, are off by 5e-7 + 6e-8 · (17 + 3)
//! in all, if every rounding went the same way; the result is rounded to f32 (6e-8 of up to 20 nats): 2e-6 of a value of 1 or more.
//! A kept log-probability has only the whole sum's error in it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use candle_core::Tensor;
use potstill_cache::{Cutoff, RowKey, Selection, SoftTargets, Storage, Values};
use potstill_pipeline::loss::{self, LossSettings, Tail};
use potstill_pipeline::ops::capture::Capture;
use potstill_pipeline::ops::draw::Place;

const TEMPERATURES: [f32; 2] = [0.5, 2.0];

fn tensor(rows: &[Vec<f32>]) -> Tensor {
    let vocab = rows[0].len();
    Tensor::from_vec(rows.concat(), (rows.len(), vocab), &support::device()).unwrap()
}

fn places(n: usize) -> Vec<Place> {
    (0..n).map(|i| Place { row: RowKey([9; 16]), position: i as u32 }).collect()
}

/// Logits of a peaked distribution, with ties, that do not repeat soon.
fn rows(n: usize, vocab: usize) -> Vec<Vec<f32>> {
    let one = |r: usize| {
        let value = move |i: usize| {
            let x = ((i * 7919 + r * 104_729 + 13) % 1009) as f32 / 1009.0;
            // Cubing makes most small and few large; rounding some makes ties.
            let z = 14.0 * x * x * x - 3.0;
            if i.is_multiple_of(5) { (z * 2.0).round() / 2.0 } else { z }
        };
        (0..vocab).map(value).collect()
    };
    (0..n).map(one).collect()
}

fn selections() -> Vec<Selection> {
    vec![
        Selection::TopK { k: 1 },
        Selection::TopK { k: 12 },
        Selection::Cutoff { k: 40, rule: Cutoff::MinProb(2e-3) },
        Selection::Cutoff { k: 40, rule: Cutoff::MinMass(0.9) },
        Selection::Cutoff { k: 40, rule: Cutoff::MinProb(0.9) },
    ]
}

/// Round to nearest even to 8 significant bits, by hand.
fn bf16(x: f32) -> f32 {
    if x == 0.0 {
        return 0.0;
    }
    let step = 2f64.powf(f64::from(x.abs()).log2().floor() - 7.0);
    let (below, value) = ((f64::from(x) / step).floor(), f64::from(x) / step);
    let up = match value - below {
        r if r > 0.5 => true,
        r if r < 0.5 => false,
        _ => below.rem_euclid(2.0) == 1.0,
    };
    ((below + f64::from(u8::from(up))) * step) as f32
}

/// ln p of every id, from the definition.
fn ln_p(z: &[f32]) -> Vec<f64> {
    let sum: f64 = z.iter().map(|z| f64::from(*z).exp()).sum();
    z.iter().map(|z| f64::from(*z) - sum.ln()).collect()
}

/// Ids by falling value, ties by rising id.
fn sorted(values: &[f32]) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..values.len() as u32).collect();
    ids.sort_by(|a, b| values[*b as usize].partial_cmp(&values[*a as usize]).unwrap().then(a.cmp(b)));
    ids
}

fn kept_by(selection: &Selection, order: &[u32], ln_p: &[f64]) -> usize {
    let p = |i: usize| ln_p[order[i] as usize].exp();
    match *selection {
        Selection::TopK { k } => usize::from(k),
        Selection::Cutoff { k, rule: Cutoff::MinProb(least) } => {
            (1..usize::from(k)).find(|i| p(*i) < f64::from(least)).unwrap_or(usize::from(k))
        }
        Selection::Cutoff { k, rule: Cutoff::MinMass(mass) } => {
            let upto = |n: usize| (0..n).map(p).sum::<f64>();
            (1..=usize::from(k)).find(|n| upto(*n) >= f64::from(mass)).unwrap_or(usize::from(k))
        }
        _ => unreachable!("exact selections only"),
    }
}

fn near(found: f32, twin: f64, what: &str) {
    assert!((f64::from(found) - twin).abs() <= 2e-6 * twin.abs().max(1.0), "{what}: {found} against {twin}");
}

#[test]
fn kept_entries_tail_and_log_sum_exps_equal_the_twin() {
    // Within one block of weights; several; as many as a chunk of groups, and one more.
    for (n, vocab) in [(20, 97), (3, 300), (3, 1024), (2, 5003)] {
        check_against_the_twin(&rows(n, vocab));
    }
}

fn check_against_the_twin(rows: &[Vec<f32>]) {
    for values in [Values::Logprob, Values::LogitBf16] {
        for selection in selections() {
            let capture = Capture { selection, values, lse_temperatures: TEMPERATURES.to_vec() };
            let targets = capture.targets(&tensor(rows), &places(rows.len())).unwrap();
            for (r, given) in rows.iter().enumerate() {
                let what = format!("{values:?}, {selection}, row {r}");
                let z: Vec<f32> =
                    if values == Values::LogitBf16 { given.iter().map(|z| bf16(*z)).collect() } else { given.clone() };
                let (order, ln_p, target) = (sorted(&z), ln_p(&z), targets.position(r));
                let kept = kept_by(&selection, &order, &ln_p);
                assert_eq!(target.ids, &order[..kept], "{what}");
                for (i, id) in target.ids.iter().enumerate() {
                    near(target.logprobs[i], ln_p[*id as usize], &what);
                }
                let tail: f64 = order[kept..].iter().map(|id| ln_p[*id as usize].exp()).sum();
                near(target.tail_logprob, tail.ln(), &what);
                for (found, t) in target.lse_t.iter().zip(TEMPERATURES) {
                    near(*found, ln_p.iter().map(|l| (l / f64::from(t)).exp()).sum::<f64>().ln(), &what);
                }
                assert!(target.sample_ids.is_empty());
                if values == Values::LogitBf16 {
                    let lse = target.logsumexp.unwrap();
                    near(lse, z.iter().map(|z| f64::from(*z).exp()).sum::<f64>().ln(), &what);
                    let logits: Vec<f32> = target.ids.iter().map(|id| z[*id as usize]).collect();
                    assert_eq!(target.logits, logits, "{what}");
                    // To the bit as a reader derives them.
                    let derived = |z: &f32| ((f64::from(*z) - f64::from(lse)) as f32).min(0.0);
                    assert_eq!(target.logprobs, logits.iter().map(derived).collect::<Vec<_>>(), "{what}");
                } else {
                    assert!(target.logits.is_empty() && target.logsumexp.is_none());
                }
            }
        }
    }
}

#[test]
fn small_rows_by_hand() {
    let top = |row: &[f32], k: u16| {
        let capture = Capture::top_k(k);
        capture
            .targets(&tensor(&[row.to_vec()]), &places(1))
            .map(|t| (t.ids().to_vec(), t.logprobs().to_vec(), t.tail_logprobs()[0]))
    };
    assert_eq!(top(&[1.0, 3.0, 3.0, -2.0, 0.5], 2).unwrap().0, [1, 2]);
    assert_eq!(top(&[0.0; 5], 2).unwrap().0, [0, 1], "ties go to the smaller id");
    assert_eq!(top(&[0.0, -0.0, 0.0], 2).unwrap().0, [0, 1], "zeros of either sign are ties");
    assert_eq!(top(&[1.0, 3.0], 2).unwrap().2, f32::NEG_INFINITY, "nothing is left");
    // 0.001 and the next f32 above it differ, but not once about 20 is taken away: f32 steps there are 2e-6.
    let (ids, logprobs, _) = top(&[1e-3, 1e-3f32.next_up(), 20.0], 3).unwrap();
    assert_eq!((ids, logprobs[1] == logprobs[2]), (vec![2, 0, 1], true), "logits that meet in one log-probability are ties");
    // A tail of e^-40 is kept to every digit: 1 minus the kept mass would be 0.
    near(top(&[40.0, 0.0], 1).unwrap().2, -40.0, "small tail");
    // e^-100 is nothing in f32: such a tail is weighed against its own largest.
    near(top(&[100.0, 0.0, -0.5], 1).unwrap().2, -100.0 + (1.0 + (-0.5f64).exp()).ln(), "tail below f32");
    near(top(&[40.0, 0.0, -60.0], 1).unwrap().2, -40.0, "tail next to it");
    let says = |row: &[f32], k| top(row, k).unwrap_err().to_string();
    assert!(says(&[1.0, f32::NAN], 1).contains("row 0: the logit of id 1 is NaN"), "{}", says(&[1.0, f32::NAN], 1));
    assert!(says(&[1.0], 2).contains("top-k 2: expected 1 to 1 kept ids"), "{}", says(&[1.0], 2));
    assert!(says(&[1.0], 0).contains("top-k 0"));
    let bf16 = Capture { values: Values::LogitBf16, ..Capture::top_k(1) };
    let error = bf16.targets(&tensor(&[vec![0.0, f32::MAX]]), &places(1)).unwrap_err().to_string();
    assert!(error.contains("row 0: the logit of id 1 is") && error.contains("more than bfloat16 holds"), "{error}");
    let drawn = Capture { selection: Selection::Sampled { draws: 1, seed: 0 }, ..bf16 };
    assert!(drawn.targets(&tensor(&[vec![0.0]]), &places(1)).is_err(), "no logits of draws");
    assert!(Capture::top_k(1).targets(&tensor(&[vec![0.0]]), &[]).is_err(), "a place for each row");
}

#[test]
fn bfloat16_ties_of_either_sign_come_by_rising_id() {
    let capture = Capture { values: Values::LogitBf16, ..Capture::top_k(4) };
    let row = vec![1e-40, -0.0, 1.001, 1.0, 0.0];
    let targets = capture.targets(&tensor(&[row]), &places(1)).unwrap();
    // 1.001 rounds to 1; the smallest numbers stay apart from 0 and are less than any step from 1.
    assert_eq!(targets.position(0).ids, [2, 3, 0, 1]);
    assert_eq!(targets.position(0).logits[3].to_bits(), 0);
}

#[test]
fn a_bad_logit_takes_its_own_row_away_and_nothing_else() {
    let rows = rows(4, 47);
    let mut modes: Vec<(Selection, Values)> =
        selections().into_iter().flat_map(|s| [(s, Values::Logprob), (s, Values::LogitBf16)]).collect();
    modes.push((Selection::Sampled { draws: 9, seed: 3 }, Values::Logprob));
    modes.push((Selection::Hybrid { k: 5, draws: 9, seed: 3 }, Values::Logprob));
    for (selection, values) in modes {
        let capture = Capture { selection, values, lse_temperatures: TEMPERATURES.to_vec() };
        let clean = capture.targets(&tensor(&rows), &places(4)).unwrap();
        let too_large = if values == Values::LogitBf16 { f32::MAX } else { f32::NAN };
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, too_large] {
            for (row, id) in (0..4).flat_map(|row| (0..47).map(move |id| (row, id))) {
                let mut rows = rows.clone();
                rows[row][id] = value;
                let found = capture.rows(&tensor(&rows), &places(4)).unwrap();
                let bad: Vec<_> = found.bad.iter().map(|bad| (bad.row, bad.id, bad.value.to_bits())).collect();
                assert_eq!(bad, [(row, id as u32, value.to_bits())], "{selection}, {values:?}");
                assert_eq!(found.targets.len(), 4);
                for other in (0..4).filter(|other| *other != row) {
                    assert_eq!(found.targets.position(other), clean.position(other), "{selection}, {values:?}");
                }
                let refused = found.sound().unwrap_err().to_string();
                assert!(refused.contains(&format!("row {row}: the logit of id {id} is {value}")), "{refused}");
            }
        }
        // Two rows of a chunk and one of the next: the first id of each, rows counted on.
        let mut rows = rows.clone();
        (rows[0][7], rows[0][30], rows[2][36]) = (f32::NAN, f32::INFINITY, f32::INFINITY);
        let mut both = capture.rows(&tensor(&rows), &places(4)).unwrap();
        both.extend(&both.clone());
        assert_eq!(both.bad.iter().map(|bad| (bad.row, bad.id)).collect::<Vec<_>>(), [(0, 7), (2, 36), (4, 7), (6, 36)]);
        assert_eq!((both.targets.len(), both.targets.position(5)), (8, clean.position(1)));
    }
}

#[test]
fn chunks_and_threads_change_no_bit() {
    let rows = rows(33, 97);
    let (all, here) = (tensor(&rows), places(rows.len()));
    let mut modes: Vec<(Selection, Values)> =
        selections().into_iter().flat_map(|s| [(s, Values::Logprob), (s, Values::LogitBf16)]).collect();
    modes.push((Selection::Sampled { draws: 50, seed: 3 }, Values::Logprob));
    modes.push((Selection::Hybrid { k: 5, draws: 20, seed: 3 }, Values::Logprob));
    for (selection, values) in modes {
        let capture = Capture { selection, values, lse_temperatures: TEMPERATURES.to_vec() };
        let whole = capture.targets(&all, &here).unwrap();
        for (chunk, threads) in [(1, 1), (7, 2), (33, 5)] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut parts = SoftTargets::default();
            for start in (0..rows.len()).step_by(chunk) {
                let n = chunk.min(rows.len() - start);
                let logits = all.narrow(0, start, n).unwrap();
                parts.extend(&pool.install(|| capture.targets(&logits, &here[start..start + n])).unwrap());
            }
            assert_eq!(parts, whole, "{selection}, {values:?}, chunks of {chunk}, {threads} threads");
        }
    }
}

/// Sum of (observed − expected)² / expected, and a bound 6 standard deviations either side of its mean: its mean is the number of free
/// cells f, its variance at most 2 f + Σ 1 / expected.
fn chi_square(observed: &[f64], expected: &[f64]) -> (f64, std::ops::Range<f64>) {
    let value = observed.iter().zip(expected).map(|(o, e)| (o - e).powi(2) / e).sum();
    let free = observed.len() as f64 - 1.0;
    let width = 6.0 * (2.0 * free + expected.iter().map(|e| 1.0 / e).sum::<f64>()).sqrt();
    (value, free - width..free + width)
}

/// Counts of every id over `positions` places of one distribution, with the sum over places of squared counts.
fn tally(capture: &Capture, row: &[f32], positions: usize) -> (Vec<f64>, Vec<f64>, SoftTargets) {
    let logits = tensor(&vec![row.to_vec(); positions]);
    let targets = capture.targets(&logits, &places(positions)).unwrap();
    let (mut sums, mut squares) = (vec![0.0; row.len()], vec![0.0; row.len()]);
    for (&id, &count) in targets.sample_ids().iter().zip(targets.sample_counts()) {
        sums[id as usize] += f64::from(count);
        squares[id as usize] += f64::from(count).powi(2);
    }
    (sums, squares, targets)
}

#[test]
fn draws_follow_the_distribution_without_bias() {
    // Within one block of weights, and over several.
    check_draws(&rows(1, 40)[0]);
    check_draws(&rows(1, 400)[0]);
}

fn check_draws(row: &[f32]) {
    const POSITIONS: usize = 4000;
    let p: Vec<f64> = ln_p(row).iter().map(|l| l.exp()).collect();
    let draws = 50;
    let capture = Capture { selection: Selection::Sampled { draws, seed: 11 }, ..Capture::top_k(1) };
    let (sums, squares, targets) = tally(&capture, row, POSITIONS);
    let all = f64::from(draws) * POSITIONS as f64;
    let (value, bound) = chi_square(&sums, &p.iter().map(|p| p * all).collect::<Vec<_>>());
    assert!(bound.contains(&value), "{value} outside {bound:?}");
    // Draws of a position are independent: counts vary as binomial numbers do. The sample variance of n numbers is off by a standard
    // deviation of about sqrt(2 / n) of itself; 6 of them are 13 %.
    let likely = (0..p.len()).max_by(|a, b| p[*a].total_cmp(&p[*b])).unwrap();
    let mean = sums[likely] / POSITIONS as f64;
    let variance = squares[likely] / POSITIONS as f64 - mean * mean;
    let binomial = f64::from(draws) * p[likely] * (1.0 - p[likely]);
    assert!((variance / binomial - 1.0).abs() < 0.13, "{variance} against {binomial}");
    for i in [0, 17, POSITIONS - 1] {
        let target = targets.position(i);
        assert!(target.ids.is_empty() && target.sample_ids.windows(2).all(|w| w[0] < w[1]));
        assert_eq!(target.sample_counts.iter().sum::<u16>(), draws);
        let left: f64 = (0..p.len()).filter(|id| !target.sample_ids.contains(&(*id as u32))).map(|id| p[id]).sum();
        near(target.tail_logprob, left.ln(), "outside the drawn ids");
    }
    // Estimates, averaged, are the probabilities: a mean of n estimates has the deviation sqrt(p (1 - p) / draws / n).
    let estimate = targets.estimate();
    let mut means = vec![0.0; p.len()];
    estimate
        .ids()
        .iter()
        .zip(estimate.logprobs())
        .for_each(|(id, l)| means[*id as usize] += f64::from(*l).exp() / POSITIONS as f64);
    for (mean, p) in means.iter().zip(&p) {
        // An id that is hardly ever drawn is not normal: two draws more are nothing strange.
        assert!((mean - p).abs() < 6.0 * (p * (1.0 - p) / all).sqrt() + 2.0 / all, "{mean} against {p}");
    }
}

#[test]
fn draws_beside_a_head_follow_the_tail() {
    const POSITIONS: usize = 4000;
    let row = &rows(1, 40)[0];
    let ln_p = ln_p(row);
    let (k, draws) = (6, 20);
    let order = sorted(row);
    let capture = Capture { selection: Selection::Hybrid { k, draws, seed: 11 }, ..Capture::top_k(1) };
    let (sums, _, targets) = tally(&capture, row, POSITIONS);
    let (head, rest) = order.split_at(usize::from(k));
    assert!(head.iter().all(|id| sums[*id as usize] == 0.0), "nothing of the head is drawn");
    let tail: f64 = rest.iter().map(|id| ln_p[*id as usize].exp()).sum();
    let all = f64::from(draws) * POSITIONS as f64;
    let observed: Vec<f64> = rest.iter().map(|id| sums[*id as usize]).collect();
    let expected: Vec<f64> = rest.iter().map(|id| ln_p[*id as usize].exp() / tail * all).collect();
    let (value, bound) = chi_square(&observed, &expected);
    assert!(bound.contains(&value), "{value} outside {bound:?}");
    let target = targets.position(3);
    assert_eq!(target.ids, head);
    near(target.tail_logprob, tail.ln(), "tail");
    for (id, estimate) in target.drawn_probabilities() {
        let at = target.sample_ids.iter().position(|i| *i == id).unwrap();
        // The stored f32 tail: relative 6e-8.
        assert!((estimate / (tail * f64::from(target.sample_counts[at]) / f64::from(draws)) - 1.0).abs() < 1e-6);
    }
}

#[test]
fn gradients_of_draws_average_to_that_of_the_whole_distribution() {
    const POSITIONS: usize = 4000;
    let (teacher, student) = (&rows(1, 40)[0], &rows(2, 40)[1]);
    let p: Vec<f64> = ln_p(teacher).iter().map(|l| l.exp()).collect();
    let mean = |selection, tail, positions: usize| -> Vec<f64> {
        let (_, _, targets) = tally(&Capture { selection, ..Capture::top_k(1) }, teacher, positions);
        let targets = if selection.draws().is_some() { targets.estimate() } else { targets };
        let mut logits = vec![student.clone(); positions].concat();
        let settings = LossSettings { tail, ..LossSettings::default() };
        let labels = vec![0; positions];
        loss::rows(&mut logits, 40, &labels, Some(&targets), None, &settings, 1.0).unwrap();
        (0..40).map(|id| logits.iter().skip(id).step_by(40).map(|g| f64::from(*g)).sum::<f64>() / positions as f64).collect()
    };
    let whole = mean(Selection::TopK { k: 40 }, Tail::Bucket, 1);
    for (selection, draws) in
        [(Selection::Sampled { draws: 50, seed: 5 }, 50.0), (Selection::Hybrid { k: 6, draws: 20, seed: 5 }, 20.0)]
    {
        for ((found, whole), p) in mean(selection, Tail::StudentFull, POSITIONS).iter().zip(&whole).zip(&p) {
            // An estimate's deviation is at most that of counts drawn from the whole; f32 gradients leave 1e-7.
            let deviation = (p * (1.0 - p) / draws / POSITIONS as f64).sqrt();
            assert!((found - whole).abs() < 6.0 * deviation + 1e-7, "{selection}: {found} against {whole}");
        }
    }
    // The three most likely alone, renormalised, are off by far more than 6 deviations of the estimates, 0.006 at most.
    let renormalised = mean(Selection::TopK { k: 3 }, Tail::StudentFull, 1);
    assert!(renormalised.iter().zip(&whole).any(|(a, b)| (a - b).abs() > 0.02), "{renormalised:?} {whole:?}");
}

#[test]
fn nothing_is_drawn_from_an_empty_tail() {
    let capture = Capture { selection: Selection::Hybrid { k: 3, draws: 9, seed: 0 }, ..Capture::top_k(1) };
    // The whole vocabulary is head; and a vocabulary whose rest has probability 0 in f64.
    for row in [vec![1.0, 2.0, 3.0], vec![1.0, 2.0, 3.0, -800.0]] {
        let targets = capture.targets(&tensor(&[row]), &places(1)).unwrap();
        let target = targets.position(0);
        assert_eq!((target.ids, target.tail_logprob, target.sample_ids), (&[2, 1, 0][..], f32::NEG_INFINITY, &[][..]));
    }
    // The least weight that there is takes all draws.
    let targets = capture.targets(&tensor(&[vec![1.0, 2.0, 3.0, -741.5]]), &places(1)).unwrap();
    assert_eq!((targets.position(0).sample_ids, targets.position(0).sample_counts), (&[3][..], &[9][..]));
}

#[test]
fn a_capture_is_what_the_storage_says() {
    let storage: Storage = potstill_cache::Preset::Exact.storage();
    let capture = Capture::of(&storage, &TEMPERATURES);
    assert_eq!((capture.selection, capture.values), (storage.selection, Values::LogitBf16));
}
