//! Every way to store, from end to end: what comes back is what was encoded, by both decoders, in one piece or in many.

use crate::made::{self, described, files, modes, record_as};
use potstill_cache::{Cache, CacheWriter, Record, ScanProgress, Summary, encode, verify};

fn records(storage: &potstill_cache::Storage, temperatures: &[f32], rows: u64) -> Vec<Record> {
    let one = |i: u64| {
        let record = record_as(3 * i, 3 + (i as usize * 7) % 23, storage, temperatures);
        // One in nine was left out: a row of tokens alone.
        if i % 9 == 4 { Record { positions: vec![], targets: Default::default(), ..record } } else { record }
    };
    (0..rows).map(one).collect()
}

#[test]
fn what_is_stored_comes_back_by_both_decoders() {
    for (name, storage, temperatures) in modes() {
        let dir = tempfile::tempdir().unwrap();
        let records = records(&storage, &temperatures, 90);
        made::write(dir.path(), &described(&storage, &temperatures, 90, 70), &records);
        let cache = Cache::open(dir.path()).unwrap();
        for (row, given) in records.iter().enumerate() {
            let stored = encode(given, &storage);
            assert_eq!(encode(&stored, &storage), stored, "{name}: encoding again changes something");
            assert_eq!(cache.row(row as u64).unwrap(), stored, "{name}, row {row}");
            assert_eq!(cache.row_by_arrow(row as u64).unwrap(), stored, "{name}, row {row} by Arrow");
        }
        let summary = Summary::of(&cache, &ScanProgress::default()).unwrap();
        assert_eq!((summary.rows, summary.left_out), (90, 10), "{name}");
        let report = verify(dir.path(), &ScanProgress::default()).unwrap();
        assert!(report.is_good() && report.good_rows == 90, "{name}: {:?}", report.problems);
        let (mean, largest) = cache.manifest().codec_kl().unwrap();
        let rounded = storage.selection.head() > 0 && storage.values == potstill_cache::Values::Logprob;
        assert_eq!((mean > 0.0, largest >= mean), (rounded, true), "{name}: KL {mean} and {largest}");
        let all: f64 = records.iter().map(|r| f64::from(encode(r, &storage).codec.kl_sum)).sum();
        // Sums of f32 numbers in another order, and rounded to f32 at last: a millionth.
        assert!((mean * cache.manifest().scored() as f64 - all).abs() <= 1e-6 * all, "{name}");
    }
}

#[test]
fn logits_come_back_exactly() {
    let (_, storage, temperatures) = modes().remove(1);
    let dir = tempfile::tempdir().unwrap();
    let records = records(&storage, &temperatures, 9);
    made::write(dir.path(), &described(&storage, &temperatures, 9, 4), &records);
    let cache = Cache::open(dir.path()).unwrap();
    for (row, given) in records.iter().enumerate() {
        let found = cache.row(row as u64).unwrap();
        assert_eq!((found.targets.logits(), found.targets.logsumexps()), (given.targets.logits(), given.targets.logsumexps()));
        assert_eq!((found.targets.logprobs(), found.targets.lse_t()), (given.targets.logprobs(), given.targets.lse_t()));
        assert_eq!((found.codec.kl_sum, found.codec.kl_max), (0.0, 0.0));
    }
}

#[test]
fn rows_made_durable_in_pieces_end_as_the_same_bytes() {
    for (name, storage, temperatures) in modes() {
        let description = described(&storage, &temperatures, 10, 4);
        let records = records(&storage, &temperatures, 10);
        let whole = tempfile::tempdir().unwrap();
        made::write(whole.path(), &description, &records);
        // Sealed after every row but those that end a shard, and opened anew after every seventh.
        let dir = tempfile::tempdir().unwrap();
        let mut writer = CacheWriter::open(dir.path(), &description, made::companions()).unwrap();
        for (row, record) in records.iter().enumerate() {
            writer.append(record).unwrap();
            writer.seal().unwrap();
            assert_eq!(writer.committed_rows(), row as u64 + 1);
            // Readers see whole shards only.
            assert_eq!(Cache::open(dir.path()).unwrap().len(), (row as u64 + 1) / 4 * 4, "{name}");
            if row % 7 == 6 {
                drop(writer);
                writer = CacheWriter::open(dir.path(), &description, made::companions()).unwrap();
                let keys: Vec<_> = records[..=row].iter().map(Record::key).collect();
                assert_eq!(writer.committed_keys().unwrap(), keys);
            }
        }
        writer.finish().unwrap();
        assert_eq!(files(dir.path()).keys().collect::<Vec<_>>(), files(whole.path()).keys().collect::<Vec<_>>(), "{name}");
        assert!(files(dir.path()) == files(whole.path()), "{name}: other bytes");
    }
}
