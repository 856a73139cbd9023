//! An interrupted run, continued, ends byte-identical to one never interrupted, wherever it stopped.

use crate::made::{self, companions, description, files, records};
use potstill_cache::{Cache, CacheWriter, ErrorClass, Record, RowKey};
use std::path::Path;

const ROWS: u64 = 8;
const ROWS_PER_SHARD: u32 = 3;
const K: u16 = 4;

/// Opens, proves that the committed rows are the first ones, and appends up to row `stop`.
fn go_on(dir: &Path, records: &[Record], stop: usize) -> CacheWriter {
    let mut writer = CacheWriter::open(dir, &description(ROWS, ROWS_PER_SHARD, K), companions()).unwrap();
    let committed = writer.committed_rows() as usize;
    let keys: Vec<RowKey> = records[..committed].iter().map(Record::key).collect();
    assert_eq!(writer.committed_keys().unwrap(), keys);
    records[committed..stop.max(committed)].iter().for_each(|record| writer.append(record).unwrap());
    writer
}

#[test]
fn stopped_anywhere_it_ends_the_same() {
    let records = records(ROWS, K);
    let whole = tempfile::tempdir().unwrap();
    made::write(whole.path(), &description(ROWS, ROWS_PER_SHARD, K), &records);
    let expected = files(whole.path());
    for stop in 0..=ROWS as usize {
        let dir = tempfile::tempdir().unwrap();
        let writer = go_on(dir.path(), &records, stop);
        let committed = stop / ROWS_PER_SHARD as usize * ROWS_PER_SHARD as usize;
        assert_eq!(writer.committed_rows(), committed as u64);
        drop(writer);
        let left_open = stop % ROWS_PER_SHARD as usize > 0;
        assert_eq!(files(dir.path()).keys().any(|name| name.ends_with(".tmp")), left_open, "stopped at {stop}");
        // A partial cache reads as what it has.
        let partial = Cache::open(dir.path()).unwrap();
        assert_eq!((partial.len(), partial.is_complete()), (committed as u64, false));
        // Stopped once more, a row later, before it is finished.
        drop(go_on(dir.path(), &records, (stop + 1).min(ROWS as usize)));
        let manifest = go_on(dir.path(), &records, ROWS as usize).finish().unwrap();
        assert!(manifest.complete);
        assert_eq!(files(dir.path()), expected, "stopped at {stop}");
        // With nothing left to do, nothing is done.
        let writer = go_on(dir.path(), &records, ROWS as usize);
        assert_eq!(writer.committed_rows(), ROWS);
        assert_eq!(writer.finish().unwrap(), manifest);
        assert_eq!(files(dir.path()), expected);
    }
}

#[test]
fn what_a_crash_leaves_is_cleared_away() {
    let records = records(ROWS, K);
    let whole = tempfile::tempdir().unwrap();
    made::write(whole.path(), &description(ROWS, ROWS_PER_SHARD, K), &records);
    let expected = files(whole.path());
    let dir = tempfile::tempdir().unwrap();
    drop(go_on(dir.path(), &records, 4));
    // Killed after the rename of a shard and before the manifest named it; while the manifest was written; while a companion was.
    std::fs::copy(whole.path().join("shard-00001.parquet"), dir.path().join("shard-00001.parquet")).unwrap();
    std::fs::write(dir.path().join("manifest.json.tmp"), "{").unwrap();
    std::fs::write(dir.path().join("tokenizer/tokenizer.json.tmp"), "{").unwrap();
    go_on(dir.path(), &records, ROWS as usize).finish().unwrap();
    assert_eq!(files(dir.path()), expected);
}

#[test]
fn a_start_that_was_killed_is_a_start() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("tokenizer")).unwrap();
    std::fs::write(dir.path().join("tokenizer/tokenizer.json.tmp"), "{").unwrap();
    std::fs::write(dir.path().join("manifest.json.tmp"), "{").unwrap();
    std::fs::write(dir.path().join("cache.lock"), "").unwrap();
    let records = records(ROWS, K);
    go_on(dir.path(), &records, ROWS as usize).finish().unwrap();
    assert!(files(dir.path()).keys().all(|name| !name.ends_with(".tmp")));
}

#[test]
fn a_damaged_committed_shard_is_not_continued() {
    let records = records(ROWS, K);
    let dir = tempfile::tempdir().unwrap();
    drop(go_on(dir.path(), &records, 6));
    let path = dir.path().join("shard-00000.parquet");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let writer = CacheWriter::open(dir.path(), &description(ROWS, ROWS_PER_SHARD, K), companions()).unwrap();
    let error = writer.committed_keys().unwrap_err();
    assert_eq!(error.class(), ErrorClass::Integrity);
    assert!(error.to_string().contains("/shard-00000.parquet: expected contents with BLAKE3 "), "{error}");
}

#[test]
fn a_folder_may_be_named_relative_to_the_current_one() {
    // A bare name has the empty path for its parent. The companion lies beside the shards.
    let dir = tempfile::Builder::new().prefix("relative-").tempdir_in(".").unwrap();
    let relative = Path::new(dir.path().file_name().unwrap());
    let options = potstill_cache::WriterOptions {
        companions: vec![potstill_cache::Companion { path: "note.txt".into(), bytes: b"x".to_vec() }],
    };
    let mut writer = CacheWriter::open(relative, &description(2, 1, K), options).unwrap();
    records(2, K).iter().for_each(|record| writer.append(record).unwrap());
    writer.finish().unwrap();
    assert_eq!(Cache::open(relative).unwrap().companion("note.txt").unwrap(), b"x");
}

#[test]
fn pieces_that_make_up_a_shard_are_joined_before_anything_else() {
    let whole = tempfile::tempdir().unwrap();
    let description = description(10, 4, 16);
    let records: Vec<_> = (0..10).map(|i| made::record(i, 9, 16)).collect();
    made::write(whole.path(), &description, &records);
    let dir = tempfile::tempdir().unwrap();
    let mut writer = CacheWriter::open(dir.path(), &description, made::companions()).unwrap();
    writer.extend(&records[..3]).unwrap();
    writer.seal().unwrap();
    // Where a folder stands in the shard's place its pieces are all durable when publishing it fails.
    let shard = dir.path().join("shard-00000.parquet");
    std::fs::create_dir(&shard).unwrap();
    assert!(writer.append(&records[3]).is_err());
    drop(writer);
    std::fs::remove_dir(&shard).unwrap();
    let mut writer = CacheWriter::open(dir.path(), &description, made::companions()).unwrap();
    assert_eq!((writer.committed_rows(), writer.manifest().shards.len()), (4, 1));
    writer.extend(&records[4..]).unwrap();
    writer.finish().unwrap();
    assert!(files(dir.path()) == files(whole.path()), "other bytes");
}
