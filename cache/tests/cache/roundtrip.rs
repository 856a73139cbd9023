//! What is appended comes back: equal after rounding, by row and by key, from many threads.

use crate::made::{self, VOCAB, description, record};
use potstill_cache::{Cache, CacheWriter, Error, Record, RowKey, ScanProgress, SoftTargets, WriterOptions, verify};
use proptest::prelude::*;
use rayon::prelude::*;

#[test]
fn rows_come_back_by_number_and_by_key() {
    let (dir, stored) = made::cache(150, 70, 5);
    let cache = Cache::open(dir.path()).unwrap();
    assert_eq!((cache.len(), cache.is_complete(), cache.manifest().shards.len()), (150, true, 3));
    // Backwards and in parallel, so that no read depends on the one before.
    (0..150usize).into_par_iter().rev().for_each(|row| assert_eq!(cache.row(row as u64).unwrap(), stored[row]));
    for row in [0u64, 63, 64, 69, 70, 149] {
        let key = stored[row as usize].key();
        assert_eq!(cache.key(row).unwrap(), key);
        assert_eq!(cache.find(&key.to_string().parse().unwrap()).unwrap(), Some(row));
    }
    assert_eq!(cache.find(&RowKey([7; 16])).unwrap(), None);
    assert!(matches!(cache.row(150), Err(Error::NoRow { row: 150, rows: 150 })));
    assert_eq!(cache.companion("tokenizer/tokenizer.json").unwrap(), b"{\"model\": 1}");
    assert!(matches!(cache.companion("tokenizer/other.json"), Err(Error::NoCompanion { .. })));
}

#[test]
fn keys_are_read_from_hex() {
    let key = RowKey::of(&[1, 2, 3], &[0, 1]);
    assert_eq!(key.to_string().to_uppercase().parse::<RowKey>().unwrap(), key);
    for text in ["", "12", "zz", &"g".repeat(32), &"é".repeat(16), &"1".repeat(33)] {
        assert!(matches!(text.parse::<RowKey>(), Err(Error::BadKey { .. })), "{text}");
    }
    // Ids and positions cannot be told for one another.
    assert_ne!(RowKey::of(&[1, 2], &[3]), RowKey::of(&[1], &[2, 3]));
}

#[test]
fn ids_above_seventeen_bits_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let top = VOCAB - 1;
    let mut targets = SoftTargets::default();
    targets.push(&[top, 1 << 17, (1 << 17) + 1, 0], &[-0.5, -2.0, -3.0, -4.0], -1.65625);
    let given = Record { seq_id: 0, input_ids: vec![top, 1 << 17, 5], positions: vec![1], targets, codec: Default::default() };
    made::write(dir.path(), &description(1, 4, 4), std::slice::from_ref(&given));
    // All values have few mantissa bits already, so the record comes back as it was given.
    assert_eq!(Cache::open(dir.path()).unwrap().row(0).unwrap(), given);
}

#[test]
fn equal_stored_values_are_ordered_by_id_and_tails_have_a_floor() {
    let dir = tempfile::tempdir().unwrap();
    let mut targets = SoftTargets::default();
    // 7 mantissa bits cannot tell -1.1001 from -1.1002, nor 1e-6 above 0 from 0.
    targets.push(&[9, 4, 2], &[-1.1, -1.1001, -1.1002], f32::NEG_INFINITY);
    targets.push(&[3], &[1e-6], -30.0);
    let given = Record { seq_id: 0, input_ids: vec![1, 2, 3], positions: vec![0, 1], targets, codec: Default::default() };
    made::write(dir.path(), &description(1, 4, 3), &[given]);
    let row = Cache::open(dir.path()).unwrap().row(0).unwrap();
    assert_eq!(row.targets.position(0).ids, [2, 4, 9]);
    assert_eq!(row.targets.position(0).logprobs, [-1.101_562_5; 3]);
    assert_eq!(row.targets.position(1).logprobs, [0.0]);
    // ln 1e-9 = -20.723 lies between the multiples of 1/8 -20.75 and -20.625.
    assert_eq!(row.targets.tail_logprobs(), [-20.75, -20.75]);
}

#[test]
fn empty_caches_are_caches() {
    let dir = tempfile::tempdir().unwrap();
    let manifest = made::write(dir.path(), &description(0, 4, 3), &[]);
    assert!(manifest.complete && manifest.shards.is_empty());
    assert!(Cache::open(dir.path()).unwrap().is_empty());
    assert!(verify(dir.path(), &ScanProgress::default()).unwrap().is_good());
}

#[test]
fn stored_records_may_be_stored_again() {
    let (dir, stored) = made::cache(9, 4, 5);
    let again = tempfile::tempdir().unwrap();
    made::write(again.path(), &description(9, 4, 5), &stored);
    assert_eq!(made::files(dir.path()), made::files(again.path()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_records_come_back(
        lengths in prop::collection::vec(2usize..40, 1..12),
        k in 1u16..20,
        bits in 1u8..=23,
        rows_per_shard in 1u32..6,
        level in 1i32..8,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let records: Vec<Record> = lengths.iter().enumerate().map(|(i, &n)| record(i as u64, n, k)).collect();
        let mut settings = description(records.len() as u64, rows_per_shard, k);
        (settings.mantissa_bits, settings.zstd_level) = (bits, level);
        let mut writer = CacheWriter::open(dir.path(), &settings, WriterOptions::default()).unwrap();
        for record in &records {
            writer.append(record).unwrap();
        }
        writer.finish().unwrap();
        let report = verify(dir.path(), &ScanProgress::default()).unwrap();
        prop_assert!(report.is_good(), "{:?}", report.problems);
        let cache = Cache::open(dir.path()).unwrap();
        for (row, given) in records.iter().enumerate() {
            let found = cache.row(row as u64).unwrap();
            prop_assert_eq!((found.seq_id, &found.input_ids, &found.positions), (given.seq_id, &given.input_ids, &given.positions));
            for i in 0..given.targets.len() {
                let (a, b) = (given.targets.position(i), found.targets.position(i));
                let mut pairs: Vec<(u32, f32)> = a.ids.iter().copied().zip(a.logprobs.iter().copied()).collect();
                for (id, stored) in b.ids.iter().zip(b.logprobs) {
                    let at = pairs.iter().position(|(other, _)| other == id).unwrap();
                    // Rounding to the nearest of `bits` mantissa bits: relative error at most 2^-(bits + 1).
                    let (_, exact) = pairs.swap_remove(at);
                    prop_assert!((stored - exact).abs() <= exact.abs() * 2f32.powi(-i32::from(bits) - 1));
                }
                prop_assert!(pairs.is_empty());
                let exact = a.tail_logprob.max(potstill_cache::TAIL_FLOOR_LOGPROB);
                prop_assert!((b.tail_logprob - exact).abs() <= exact.abs() * 2f32.powi(-i32::from(bits) - 1));
            }
        }
    }
}
