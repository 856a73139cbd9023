//! A cache stored anew: what is kept is what was kept, what was dropped is in the tail, nothing is raised, and nothing changes that was
//! not asked to.

use crate::made::{self, description, files, records};
use potstill_cache::{
    Cache, CacheWriter, Cutoff, Description, Error, ErrorClass, IdEncoding, Knobs, Preset, Record, Reshape, Rewritten,
    ScanProgress, Selection, SelectionKind, SoftTargets, Storage, Target, Values, repack, round_to_mantissa, stored_tail_logprob,
    verify,
};
use std::path::Path;

const ROWS: u64 = 10;
const K: u16 = 8;

fn rewritten(source: &Path, out: &Path, reshape: Reshape) -> Rewritten {
    let progress = ScanProgress::default();
    let report = repack(source, out, &reshape, &progress).unwrap();
    assert_eq!(progress.rows().0, progress.rows().1);
    report
}

fn turned(knobs: Knobs) -> Reshape {
    Reshape { knobs, ..Reshape::default() }
}

fn rows(dir: &Path) -> Vec<Record> {
    let cache = Cache::open(dir).unwrap();
    (0..cache.len()).map(|row| cache.row(row).unwrap()).collect()
}

/// A source of `ROWS` rows, and a folder for what is made of it.
fn source() -> (tempfile::TempDir, tempfile::TempDir) {
    (made::cache(ROWS, 4, K).0, tempfile::tempdir().unwrap())
}

#[test]
fn another_zstd_level_or_cut_changes_nothing_else_and_can_be_taken_back() {
    let (dir, out) = source();
    let again = tempfile::tempdir().unwrap();
    let reshape = Reshape { rows_per_shard: Some(3), ..turned(Knobs { zstd_level: Some(9), ..Knobs::default() }) };
    let report = rewritten(dir.path(), out.path(), reshape);
    assert_eq!((report.rows, report.complete, report.resumed_rows), (ROWS, true, 0));
    assert_eq!(rows(out.path()), rows(dir.path()));
    let (before, after) = (Cache::open(dir.path()).unwrap(), Cache::open(out.path()).unwrap());
    let differing: Vec<String> =
        before.manifest().description.differences(&after.manifest().description).into_iter().map(|d| d.field).collect();
    assert_eq!(differing, ["zstd_level", "rows_per_shard"]);
    let was = |cache: &Cache| cache.manifest().codec_kl().unwrap();
    // Sums of the same numbers, cut elsewhere; each shard's is rounded to f32.
    assert!((was(&before).0 / was(&after).0 - 1.0).abs() < 2.0 * f64::from(f32::EPSILON) && was(&before).1 == was(&after).1);
    let back = Reshape { rows_per_shard: Some(4), ..turned(Knobs { zstd_level: Some(3), ..Knobs::default() }) };
    rewritten(out.path(), again.path(), back);
    assert_eq!(files(again.path()), files(dir.path()));
}

#[test]
fn a_cache_for_old_readers_is_the_one_that_would_have_been_written() {
    let (dir, out) = source();
    rewritten(dir.path(), out.path(), turned(Knobs { id_encoding: Some(IdEncoding::Plain), ..Knobs::default() }));
    let direct = tempfile::tempdir().unwrap();
    let plain = Description { id_encoding: IdEncoding::Plain, ..description(ROWS, 4, K) };
    made::write(direct.path(), &plain, &records(ROWS, K));
    assert_eq!(files(out.path()), files(direct.path()));
    // A preset says nothing of ids: who can read the cache stays as it is unless another layout is asked for.
    let preset = |id_encoding| {
        let knobs = Knobs { top_k: Some(K), id_encoding, ..Knobs::default() };
        let again = tempfile::tempdir().unwrap();
        rewritten(direct.path(), again.path(), Reshape { preset: Some(Preset::Standard), knobs, rows_per_shard: None });
        files(again.path())
    };
    assert_eq!(preset(None), files(direct.path()));
    assert_eq!(preset(Some(IdEncoding::ByteStreamSplit)), files(dir.path()));
}

#[test]
fn what_is_dropped_goes_into_the_tail_and_is_said() {
    let (dir, out) = source();
    let knobs = Knobs { min_mass: Some(0.7), top_k: Some(4), mantissa_bits: Some(5), ..Knobs::default() };
    let report = rewritten(dir.path(), out.path(), turned(knobs));
    assert!(verify(out.path(), &ScanProgress::default()).unwrap().is_good());
    assert_eq!((report.before.selection.as_str(), report.after.selection.as_str()), ("top-k 8", "cutoff 4 mass>=0.7"));
    let mut dropped_some = 0;
    for (wide, narrow) in rows(dir.path()).iter().zip(&rows(out.path())) {
        assert_eq!((wide.seq_id, &wide.input_ids, &wide.positions), (narrow.seq_id, &narrow.input_ids, &narrow.positions));
        assert!(narrow.codec.kl_sum >= wide.codec.kl_sum && narrow.codec.kl_max >= wide.codec.kl_max);
        for i in 0..wide.targets.len() {
            let (a, b) = (wide.targets.position(i), narrow.targets.position(i));
            let (mut mass, mut kept) = (0.0, 0);
            while kept < a.ids.len().min(4) && (kept == 0 || mass < 0.7) {
                mass += f64::from(a.logprobs[kept]).exp();
                kept += 1;
            }
            dropped_some += usize::from(kept < a.ids.len());
            let mut expected: Vec<(u32, f32)> =
                a.ids.iter().zip(a.logprobs).take(kept).map(|(&id, &l)| (id, round_to_mantissa(l, 5))).collect();
            // Coarser values make ties, and ties go by id.
            expected.sort_by(|x, y| y.1.total_cmp(&x.1).then(x.0.cmp(&y.0)));
            let found: Vec<(u32, f32)> = b.ids.iter().copied().zip(b.logprobs.iter().copied()).collect();
            assert_eq!(found, expected);
            let rest: f64 = a.logprobs[kept..].iter().map(|&l| f64::from(l).exp()).sum::<f64>() + f64::from(a.tail_logprob).exp();
            let tail = if kept < a.ids.len() { rest.ln() as f32 } else { a.tail_logprob };
            assert_eq!(b.tail_logprob, stored_tail_logprob(tail, 5));
        }
    }
    assert!(dropped_some > 20, "{dropped_some}");
    let description = Cache::open(out.path()).unwrap().manifest().description.clone();
    let [derivation] = &description.derived[..] else { panic!("{:?}", description.derived) };
    assert_eq!(
        (derivation.verb.as_str(), derivation.selection, derivation.mantissa_bits),
        ("repack", Selection::TopK { k: K }, 7)
    );
    assert_eq!(derivation.from, [Cache::open(dir.path()).unwrap().manifest().description.digest()]);
    // Once more: the history grows.
    let third = tempfile::tempdir().unwrap();
    rewritten(out.path(), third.path(), turned(Knobs { top_k: Some(2), ..Knobs::default() }));
    assert_eq!(Cache::open(third.path()).unwrap().manifest().description.derived.len(), 2);
}

#[test]
fn nothing_is_raised_and_nothing_is_written_then() {
    let (dir, out) = source();
    let never = out.path().join("never");
    for (reshape, sides) in [
        (turned(Knobs { top_k: Some(9), ..Knobs::default() }), ["top-k 8", "top-k 9"]),
        (turned(Knobs { mantissa_bits: Some(8), ..Knobs::default() }), ["has 7", "become 8"]),
        (turned(Knobs { values: Some(Values::LogitBf16), ..Knobs::default() }), ["log-probabilities", "logits"]),
        (turned(Knobs { selection: Some(SelectionKind::Sampled), ..Knobs::default() }), ["top-k 8", "sampled 50 seed 0"]),
        (
            Reshape { preset: Some(Preset::Compact), ..turned(Knobs { top_k: Some(64), ..Knobs::default() }) },
            ["top-k 8", "cutoff 64 p>=1e-5"],
        ),
    ] {
        let error = repack(dir.path(), &never, &reshape, &ScanProgress::default()).unwrap_err();
        assert_eq!(error.class(), ErrorClass::Usage);
        assert!(sides.iter().all(|side| error.to_string().contains(side)), "{error}");
        assert!(!never.exists());
    }
    let error = repack(dir.path(), dir.path(), &Reshape::default(), &ScanProgress::default()).unwrap_err();
    assert!(error.to_string().contains("expected a folder other than those of the caches that are read"), "{error}");
    // Out of range, though narrower.
    let bits = turned(Knobs { mantissa_bits: Some(0), ..Knobs::default() });
    assert!(matches!(repack(dir.path(), &never, &bits, &ScanProgress::default()), Err(Error::Setting { .. })));
}

/// A description and records with what `storage` keeps: bf16 logits with their log-sum-exp, or draws.
fn special(storage: &Storage) -> (Description, Vec<Record>) {
    let described = description(ROWS, 4, K).stored_as(storage);
    let reworked = records(ROWS, K).into_iter().map(|record| {
        let mut targets = SoftTargets::default();
        for i in 0..record.targets.len() {
            let given = record.targets.position(i);
            if storage.values == Values::LogitBf16 {
                // Logits are log-probabilities shifted by 3, cut to bfloat16; their log-sum-exp follows from what they are then.
                let mut pairs: Vec<(u32, f32)> =
                    given.ids.iter().zip(given.logprobs).map(|(&id, &l)| (id, round_to_mantissa(l + 3.0, 7))).collect();
                pairs.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                let (ids, logits): (Vec<u32>, Vec<f32>) = pairs.into_iter().unzip();
                let tail = f64::from(given.tail_logprob) + 3.0;
                let sum: f64 = logits.iter().map(|&z| f64::from(z).exp()).sum::<f64>() + tail.exp();
                let lse = sum.ln() as f32;
                let logprobs: Vec<f32> = logits.iter().map(|&z| ((f64::from(z) - f64::from(lse)) as f32).min(0.0)).collect();
                let tail_logprob = (tail - f64::from(lse)) as f32;
                targets.push_target(&Target {
                    ids: &ids,
                    logprobs: &logprobs,
                    tail_logprob,
                    logits: &logits,
                    logsumexp: Some(lse),
                    ..Target::default()
                });
            } else {
                let (head, drawn) = given.ids.split_at(if storage.selection.head() > 0 { 1 } else { 0 });
                let mut sample_ids: Vec<u32> = drawn.to_vec();
                sample_ids.sort_unstable();
                sample_ids.truncate(3);
                if sample_ids.is_empty() {
                    sample_ids.push(if given.ids[0] == 7 { 8 } else { 7 });
                }
                let mut counts = vec![1u16; sample_ids.len()];
                counts[0] += 3 - counts.len() as u16;
                let l = given.logprobs[0];
                let rest = (1.0 - f64::from(l).exp()).ln() as f32;
                let tail_logprob = if head.is_empty() { -1.0 } else { rest };
                let logprobs = &given.logprobs[..head.len()];
                targets.push_target(&Target {
                    ids: head,
                    logprobs,
                    tail_logprob,
                    sample_ids: &sample_ids,
                    sample_counts: &counts,
                    ..Target::default()
                });
            }
        }
        Record { targets, ..record }
    });
    (described, reworked.collect())
}

#[test]
fn logits_become_log_probabilities_and_draws_go() {
    let standard = Storage { selection: Selection::TopK { k: K }, ..Preset::Standard.storage() };
    let exact = Storage { selection: Selection::TopK { k: K }, ..Preset::Exact.storage() };
    let hybrid = Storage { selection: Selection::Hybrid { k: 1, draws: 3, seed: 5 }, ..standard };
    let sampled = Storage { selection: Selection::Sampled { draws: 3, seed: 5 }, ..standard };
    for (from, knobs) in [
        (exact, Knobs { values: Some(Values::Logprob), mantissa_bits: Some(5), ..Knobs::default() }),
        (exact, Knobs { top_k: Some(3), zstd_level: Some(1), ..Knobs::default() }),
        (hybrid, Knobs { selection: Some(SelectionKind::TopK), ..Knobs::default() }),
        (hybrid, Knobs { zstd_level: Some(9), ..Knobs::default() }),
        (sampled, Knobs { zstd_level: Some(9), ..Knobs::default() }),
    ] {
        let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (description, records) = special(&from);
        made::write(dir.path(), &description, &records);
        let report = rewritten(dir.path(), out.path(), turned(knobs));
        let found = verify(out.path(), &ScanProgress::default()).unwrap();
        assert!(found.is_good(), "{report:?}: {:?}", found.problems);
        let to = from.with(&knobs).unwrap();
        for (wide, narrow) in rows(dir.path()).iter().zip(&rows(out.path())) {
            assert_eq!(narrow.targets.logits().is_empty(), to.values == Values::Logprob, "{report:?}");
            assert_eq!(narrow.targets.sample_ids().is_empty(), to.selection.draws().is_none());
            if to.selection == from.selection && to.values == from.values {
                assert_eq!(wide, narrow);
            }
            if to.values != from.values {
                let rounded: Vec<f32> = wide.targets.logprobs().iter().map(|&l| round_to_mantissa(l, 5)).collect();
                assert_eq!(narrow.targets.logprobs(), rounded);
            }
        }
    }
}

#[test]
fn an_even_distribution_rounded_twice_is_still_a_distribution() {
    // All entries and the tail are alike, so all round the same way; of so many, two and what they leave are kept. 59 outcomes at 7 bits:
    // ln 59 = 4.0775 lies half-way between 4.0625 and 4.09375, and the mass becomes 1.5 % too large, where 3 outcomes can be off by 0.9 %.
    for (entries, bits) in [(58u32, 7u8), (58, 5), (58, 3), (32, 1)] {
        let even = (1.0 / f64::from(entries + 1)).ln() as f32;
        let mut targets = SoftTargets::default();
        targets.push(&(0..entries).collect::<Vec<u32>>(), &vec![even; entries as usize], even);
        let record = Record { seq_id: 0, input_ids: vec![1, 2], positions: vec![0], targets, codec: Default::default() };
        let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let described = Description { mantissa_bits: bits, ..description(1, 4, entries as u16) };
        made::write(dir.path(), &described, std::slice::from_ref(&record));
        rewritten(dir.path(), out.path(), turned(Knobs { top_k: Some(2), ..Knobs::default() }));
        assert!(verify(out.path(), &ScanProgress::default()).unwrap().is_good(), "{entries} entries, {bits} bits");
    }
}

#[test]
fn entries_at_the_border_of_a_cutoff_stay_when_only_the_level_changes() {
    // A probability just above 1e-3 rounds to one below: the rule applied again to stored values would drop the entry.
    let p = 1e-3f64;
    let mut targets = SoftTargets::default();
    targets.push(&[5, 6], &[((1.0 - p) * 0.999).ln() as f32, (p * 1.000_1).ln() as f32], ((1.0 - p) * 0.001).ln() as f32);
    let record = Record { seq_id: 0, input_ids: vec![1, 2], positions: vec![0], targets, codec: Default::default() };
    let mut lost = 0;
    for bits in 1..=12 {
        let selection = Selection::Cutoff { k: 8, rule: Cutoff::MinProb(p as f32) };
        let (dir, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let described = Description { selection, mantissa_bits: bits, ..description(1, 4, 8) };
        made::write(dir.path(), &described, std::slice::from_ref(&record));
        lost += usize::from(selection.kept(rows(dir.path())[0].targets.logprobs()) == 1);
        rewritten(dir.path(), out.path(), turned(Knobs { zstd_level: Some(9), ..Knobs::default() }));
        assert_eq!(rows(out.path()), rows(dir.path()), "{bits} bits");
    }
    assert!(lost > 0, "no width rounds the entry below the border");
}

/// Makes a finished cache look like one that was interrupted after `shards` shards.
fn cut(dir: &Path, shards: usize) {
    made::forge(dir, |manifest| {
        manifest["complete"] = false.into();
        manifest["shards"].as_array_mut().unwrap().truncate(shards);
    });
    for index in shards..10 {
        let _ = std::fs::remove_file(dir.join(format!("shard-{index:05}.parquet")));
    }
}

#[test]
fn an_interrupted_repack_goes_on() {
    let (dir, out) = source();
    let reshape = turned(Knobs { top_k: Some(3), ..Knobs::default() });
    rewritten(dir.path(), out.path(), reshape);
    let whole = files(out.path());
    for shards in 0..3 {
        cut(out.path(), shards);
        let report = rewritten(dir.path(), out.path(), reshape);
        assert_eq!(report.resumed_rows, 4 * shards as u64);
        assert_eq!(files(out.path()), whole);
    }
    assert_eq!(rewritten(dir.path(), out.path(), reshape).resumed_rows, ROWS);
    // Another shape does not go on in the same folder.
    let error = repack(dir.path(), out.path(), &Reshape::default(), &ScanProgress::default()).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Mismatch, "{error}");
}

#[test]
fn a_partial_cache_stays_one_that_can_be_continued() {
    let (dir, out) = source();
    let whole = files(dir.path());
    cut(dir.path(), 2);
    let narrower = turned(Knobs { top_k: Some(3), ..Knobs::default() });
    let never = out.path().join("never");
    let error = repack(dir.path(), &never, &narrower, &ScanProgress::default()).unwrap_err();
    assert!(error.to_string().contains("rows 8 to 9 of 10 are missing; finish that cache with the command"), "{error}");
    let cut_elsewhere = Reshape { rows_per_shard: Some(3), ..Reshape::default() };
    let error = repack(dir.path(), &never, &cut_elsewhere, &ScanProgress::default()).unwrap_err();
    assert!(error.to_string().contains("the first of them begins no shard"), "{error}");
    assert_eq!((error.class(), never.exists()), (ErrorClass::Usage, false));
    let copy = out.path().join("copy");
    let report = rewritten(dir.path(), &copy, Reshape::default());
    assert_eq!((report.rows, report.expected_rows, report.complete), (8, ROWS, false));
    let mut writer = CacheWriter::open(&copy, &description(ROWS, 4, K), made::companions()).unwrap();
    assert_eq!(writer.committed_rows(), 8);
    writer.extend(&records(ROWS, K)[8..]).unwrap();
    writer.finish().unwrap();
    assert_eq!(files(&copy), whole);
}

#[test]
fn a_damaged_source_is_not_rewritten() {
    made::quiet();
    let (dir, out) = source();
    let path = dir.path().join("shard-00001.parquet");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.len() / 3;
    bytes[at..at + 200].fill(0);
    std::fs::write(&path, bytes).unwrap();
    let error = repack(dir.path(), out.path(), &Reshape::default(), &ScanProgress::default()).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Integrity, "{error}");
    assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
    std::fs::write(dir.path().join("tokenizer/tokenizer.json"), "{}").unwrap();
    let error = repack(dir.path(), out.path(), &Reshape::default(), &ScanProgress::default()).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Integrity, "{error}");
}

#[test]
fn version_1_becomes_version_2_and_claims_nothing_about_its_rounding() {
    let old = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/version-1"));
    let out = tempfile::tempdir().unwrap();
    let report = rewritten(old, &out.path().join("new"), Reshape::default());
    assert_eq!((report.rows, report.codec_kl), (5, None));
    let (before, after) = (Cache::open(old).unwrap(), Cache::open(&out.path().join("new")).unwrap());
    assert_eq!((before.manifest().format_version, after.manifest().format_version), (1, 2));
    assert_eq!(before.manifest().description, after.manifest().description);
    assert!(after.manifest().shards.iter().all(|shard| shard.codec.is_none()));
    assert_eq!(before.companion("tokenizer/tokenizer.json").unwrap(), after.companion("tokenizer/tokenizer.json").unwrap());
    for row in 0..5 {
        let (a, b) = (before.row(row).unwrap(), after.row(row).unwrap());
        assert_eq!((a.seq_id, &a.input_ids, &a.positions, &a.targets), (b.seq_id, &b.input_ids, &b.positions, &b.targets));
        assert!(b.codec.kl_sum.is_nan() && b.codec.kl_max.is_nan());
    }
    assert!(verify(after.dir(), &ScanProgress::default()).unwrap().is_good());
    // Both are the same rows to whoever joins them.
    let both = [old.to_path_buf(), after.dir().to_path_buf()];
    let joined = potstill_cache::combine(&both, &out.path().join("both"), &Reshape::default(), &ScanProgress::default()).unwrap();
    assert_eq!((joined.rows, joined.shared_rows), (5, 5));
    assert_eq!(files(&out.path().join("both")), files(after.dir()));
    // An unfinished one cannot be continued as it is, but what it becomes can.
    let partial = out.path().join("partial");
    files(old).iter().for_each(|(name, bytes)| {
        std::fs::create_dir_all(partial.join(name).parent().unwrap()).unwrap();
        std::fs::write(partial.join(name), bytes).unwrap();
    });
    cut(&partial, 2);
    let described = before.manifest().description.clone();
    let error = CacheWriter::open(&partial, &described, made::companions()).unwrap_err();
    assert!(error.to_string().contains("repack what is there"), "{error}");
    let report = rewritten(&partial, &out.path().join("continued"), Reshape::default());
    assert_eq!((report.rows, report.complete), (4, false));
    let mut writer = CacheWriter::open(&out.path().join("continued"), &described, made::companions()).unwrap();
    writer.append(&before.row(4).unwrap()).unwrap();
    writer.finish().unwrap();
    assert_eq!(Cache::open(&out.path().join("continued")).unwrap().row(4).unwrap().targets, before.row(4).unwrap().targets);
}
