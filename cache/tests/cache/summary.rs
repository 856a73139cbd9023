//! Figures of a cache against figures worked out by hand.

use crate::made::{self, description};
use potstill_cache::{Cache, Description, Drawn, Record, ScanProgress, Selection, SoftTargets, Summary, Target};

#[test]
fn figures_of_two_known_positions() {
    let dir = tempfile::tempdir().unwrap();
    // Numbers of few mantissa bits, so nothing is rounded.
    let mut targets = SoftTargets::default();
    targets.push(&[7, 8], &[-0.5, -1.5], -1.75);
    targets.push(&[9], &[-0.25], -1.5);
    let record = Record { seq_id: 0, input_ids: vec![1, 8, 9], positions: vec![0, 1], targets, codec: Default::default() };
    made::write(dir.path(), &description(1, 2, 2), &[record]);
    let cache = Cache::open(dir.path()).unwrap();
    let progress = ScanProgress::default();
    let summary = Summary::of(&cache, &progress).unwrap();
    assert_eq!(progress.rows(), (1, 1));
    assert_eq!((summary.rows, summary.tokens, summary.scored, summary.entries, summary.shards), (1, 3, 2, 3, 1));
    assert_eq!(summary.raw_bytes, 2 * 2 * 6);
    let file = std::fs::metadata(dir.path().join("shard-00000.parquet")).unwrap().len();
    assert_eq!(summary.bytes, file);
    assert_eq!(summary.columns.iter().map(|c| c.compressed).sum::<u64>() + summary.other_bytes, file);
    assert_eq!(summary.columns.len(), 11);
    assert_eq!(summary.bytes_per_scored, Some(file as f64 / 2.0));
    let whole = summary.distributions.unwrap();
    assert_eq!((summary.drawn, &whole.drawn), (0, &None));
    let figures = whole.kept.unwrap();
    let e = |x: f64| x.exp();
    // f64 sums of a handful of terms near 1: 1e-12 leaves room for a thousand roundings.
    let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12, "{found} against {expected}");
    near(figures.mean_top1, (e(-0.5) + e(-0.25)) / 2.0);
    near(figures.mean_kept_mass, (e(-0.5) + e(-1.5) + e(-0.25)) / 2.0);
    near(whole.mean_tail_mass, (e(-1.75) + e(-1.5)) / 2.0);
    near(figures.mean_entropy, (0.5 * e(-0.5) + 1.5 * e(-1.5) + 1.75 * e(-1.75) + 0.25 * e(-0.25) + 1.5 * e(-1.5)) / 2.0);
    // Position 0 predicts token 1, which is 8: kept, second. Position 1 predicts 9: the first.
    assert_eq!((figures.top1_is_next, figures.next_is_kept), (0.5, 1.0));
    near(figures.perplexity_where_kept.unwrap(), e((1.5 + 0.25) / 2.0));
    // The lower of two values, to half a bin of 1/4096.
    assert!((figures.median_top1 - e(-0.5)).abs() <= 1.0 / 8192.0);
    assert_eq!(figures.perplexity_at_least, figures.perplexity_where_kept.unwrap());
    assert_eq!((figures.by_k.len(), figures.next_rank.len()), (2, 2));
    // The first entries alone; what the others had is one outcome with the tail.
    let first = &figures.by_k[0];
    assert_eq!((first.k, first.mean_entries, first.nearly_all, first.next_is_kept), (1, 1.0, 0.0, 0.5));
    near(first.mean_mass, figures.mean_top1);
    let others = e(-1.5) + e(-1.75);
    near(first.mean_entropy, (0.5 * e(-0.5) - others * others.ln() + 0.25 * e(-0.25) + 1.5 * e(-1.5)) / 2.0);
    let both = &figures.by_k[1];
    assert_eq!((both.k, both.mean_entries, both.next_is_kept), (2, 1.5, 1.0));
    near(both.mean_mass, figures.mean_kept_mass);
    near(both.mean_entropy, figures.mean_entropy);
    let placed: Vec<_> = figures.next_rank.iter().map(|bin| (bin.from, bin.to, bin.positions)).collect();
    assert_eq!(placed, [(1, 1, 1), (2, 2, 1)]);
    // Entropies 0.942 and 0.530 in bins of 1/4; probabilities 0.607 and 0.779 in bins of 1/20 and of 1/10; tails 10^-0.760 and
    // 10^-0.651 in half decades.
    let full = |counts: &[u64]| counts.iter().enumerate().filter(|(_, n)| **n > 0).map(|(i, n)| (i, *n)).collect::<Vec<_>>();
    assert_eq!(full(&figures.entropy_histogram.counts), [(2, 1), (3, 1)]);
    assert_eq!(full(&figures.top1_histogram.counts), [(12, 1), (15, 1)]);
    assert_eq!(full(&whole.tail_log10_histogram.counts), [(16, 2)]);
    let bins: Vec<_> = figures.calibration.iter().map(|bin| (bin.positions, bin.top1_is_next)).collect();
    assert_eq!((bins.len(), bins[6], bins[7], bins[0]), (10, (1, Some(0.0)), (1, Some(1.0)), (0, None)));
    near(figures.calibration_error, (e(-0.5) + 1.0 - e(-0.25)) / 2.0);
    // Two positions are too few to be ranked.
    assert_eq!(figures.most_surprising, []);
}

/// A row of `hits` positions whose first entry came, and `misses` where neither entry did.
fn row(seq_id: u64, hits: usize, misses: usize) -> Record {
    let mut targets = SoftTargets::default();
    (0..hits).for_each(|_| targets.push(&[5, 6], &[-0.5, -1.5], -1.75));
    (0..misses).for_each(|_| targets.push(&[8, 9], &[-0.5, -1.5], -1.75));
    let scored = hits + misses;
    let positions = (0..scored as u32).collect();
    Record { seq_id, input_ids: vec![5; scored + 1], positions, targets, codec: Default::default() }
}

#[test]
fn rows_are_ranked_by_their_mean_surprise() {
    let dir = tempfile::tempdir().unwrap();
    let mut records = vec![row(0, 10, 6), row(1, 16, 0), row(2, 15, 0), row(3, 10, 6), row(4, 0, 20)];
    records.extend((5..20).map(|n| row(n, 30, 2)));
    made::write(dir.path(), &description(20, 2, 8), &records);
    let summary = Summary::of(&Cache::open(dir.path()).unwrap(), &ScanProgress::default()).unwrap();
    let figures = summary.distributions.unwrap().kept.unwrap();
    // 15 positions are too few; equal ones stay in order; ten are enough.
    let ranked: Vec<u64> = figures.most_surprising.iter().map(|row| row.row).collect();
    assert_eq!(ranked, [4, 0, 3, 5, 6, 7, 8, 9, 10, 11]);
    let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12, "{found} against {expected}");
    let second = &figures.most_surprising[1];
    assert_eq!((second.seq_id, second.tokens, second.scored, second.top1_is_next), (0, 17, 16, 0.625));
    // Where what came was not kept, the tail stands for it: it is smaller than the least kept entry.
    near(second.mean_surprise, (10.0 * 0.5 + 6.0 * 1.75) / 16.0);
    near(second.perplexity_at_least, second.mean_surprise.exp());
    assert!(figures.perplexity_at_least > figures.perplexity_where_kept.unwrap());
    assert_eq!(figures.perplexity_where_kept, Some(0.5f64.exp()));
}

#[test]
fn a_search_gives_the_first_answers_in_order() {
    let (dir, records) = made::cache(150, 4, 7);
    let cache = Cache::open(dir.path()).unwrap();
    let progress = ScanProgress::default();
    let third = |row: u64, record: &Record| row.is_multiple_of(3).then_some((row, record.seq_id));
    let found = potstill_cache::search(&cache, 5, &progress, third).unwrap();
    assert_eq!(found, [0, 3, 6, 9, 12].map(|row| (row, records[row as usize].seq_id)));
    // It ended with the block that held the fifth.
    assert_eq!(progress.rows(), (64, 150));
    assert_eq!(potstill_cache::search(&cache, 1000, &progress, third).unwrap().len(), 50);
    assert!(potstill_cache::search(&cache, 1, &progress, |_, _| None::<u64>).unwrap().is_empty());
}

#[test]
fn figures_do_not_depend_on_threads() {
    let (dir, _) = made::cache(40, 16, 5);
    let cache = Cache::open(dir.path()).unwrap();
    let once = Summary::of(&cache, &ScanProgress::default()).unwrap();
    let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let again = alone.install(|| Summary::of(&cache, &ScanProgress::default()).unwrap());
    assert_eq!(once, again);
}

#[test]
fn an_empty_cache_has_no_figures() {
    let dir = tempfile::tempdir().unwrap();
    made::write(dir.path(), &description(0, 2, 2), &[]);
    let summary = Summary::of(&Cache::open(dir.path()).unwrap(), &ScanProgress::default()).unwrap();
    assert_eq!((summary.distributions, summary.bytes_per_scored, summary.raw_ratio), (None, None, None));
}

#[test]
fn draws_give_what_they_tell_and_no_more() {
    let draws = |selection, push: &dyn Fn(&mut SoftTargets)| {
        let dir = tempfile::tempdir().unwrap();
        let mut targets = SoftTargets::default();
        push(&mut targets);
        let record = Record { seq_id: 0, input_ids: vec![1, 8, 9], positions: vec![0, 1], targets, codec: Default::default() };
        made::write(dir.path(), &Description { selection, ..description(1, 2, 2) }, &[record]);
        let summary = Summary::of(&Cache::open(dir.path()).unwrap(), &ScanProgress::default()).unwrap();
        (summary.entries, summary.drawn, summary.raw_bytes, summary.distributions.unwrap())
    };
    // Position 0 predicts 8, drawn once in 4; position 1 predicts 9, not drawn.
    let (entries, drawn, raw, figures) = draws(Selection::Sampled { draws: 4, seed: 0 }, &|targets| {
        let (sample_ids, sample_counts, tail_logprob) = (&[5, 8][..], &[3, 1][..], -0.5);
        targets.push_target(&Target { sample_ids, sample_counts, tail_logprob, ..Target::default() });
        targets.push_target(&Target { sample_ids: &[3], sample_counts: &[4], tail_logprob, ..Target::default() });
    });
    assert_eq!((entries, drawn, raw), (0, 3, 2 * 4 * 6));
    assert_eq!(figures.kept, None);
    // One f64 exponential, added twice and halved.
    assert!((figures.mean_tail_mass - (-0.5f64).exp()).abs() < 1e-15);
    assert_eq!(figures.drawn, Some(Drawn { mean_ids: 1.5, next_is_drawn: 0.5, mean_next_probability: 0.125 }));
    let json = serde_json::to_value(&figures).unwrap();
    assert!(json.get("mean_top1").is_none() && json["drawn"]["mean_ids"] == 1.5, "{json}");

    // ln of what exp(-0.5) leaves, to 8 bits.
    const TAIL: f32 = -239.0 / 256.0;
    // With a head, drawn counts share the tail: 8 has a quarter of it; 9 is kept.
    let (entries, drawn, raw, figures) = draws(Selection::Hybrid { k: 2, draws: 4, seed: 0 }, &|targets| {
        let (sample_ids, sample_counts) = (&[5, 8][..], &[3, 1][..]);
        targets.push_target(&Target {
            ids: &[2],
            logprobs: &[-0.5],
            tail_logprob: TAIL,
            sample_ids,
            sample_counts,
            ..Target::default()
        });
        targets.push_target(&Target {
            ids: &[9],
            logprobs: &[-0.5],
            tail_logprob: TAIL,
            sample_ids,
            sample_counts,
            ..Target::default()
        });
    });
    assert_eq!((entries, drawn, raw), (2, 4, 2 * (2 + 4) * 6));
    let (kept, drawn) = (figures.kept.unwrap(), figures.drawn.unwrap());
    assert_eq!((kept.next_is_kept, drawn.next_is_drawn), (0.5, 0.5));
    // Two exponentials and a mean.
    assert!((drawn.mean_next_probability - (f64::from(TAIL).exp() / 4.0 + (-0.5f64).exp()) / 2.0).abs() < 1e-15, "{drawn:?}");
}
