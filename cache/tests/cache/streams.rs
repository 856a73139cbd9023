//! Writing and reading beside the caller: the same rows in the same order, errors that are not lost.

use crate::made::{self, companions, description, files, records};
use potstill_cache::{Batches, Cache, CacheWriter, Error, ErrorClass, Order, Record, Sampler, WriterQueue};
use std::sync::Arc;
use std::time::Duration;

fn queue(dir: &std::path::Path, seal_every: Duration) -> WriterQueue {
    WriterQueue::start(CacheWriter::open(dir, &description(30, 8, 4), companions()).unwrap(), seal_every).unwrap()
}

#[test]
fn a_queue_writes_the_same_bytes_however_often_it_seals() {
    let records = records(30, 4);
    let whole = tempfile::tempdir().unwrap();
    made::write(whole.path(), &description(30, 8, 4), &records);
    for seal_every in [Duration::MAX, Duration::ZERO] {
        let dir = tempfile::tempdir().unwrap();
        let mut queue = queue(dir.path(), seal_every);
        records.chunks(7).for_each(|batch| queue.send(batch.to_vec()).unwrap());
        let writer = queue.close().unwrap();
        let durable = if seal_every.is_zero() { 30 } else { 24 };
        assert_eq!((writer.rows(), writer.committed_rows()), (30, durable));
        writer.finish().unwrap();
        assert!(files(dir.path()) == files(whole.path()), "sealed every {seal_every:?}: other bytes");
    }
}

#[test]
fn an_error_in_the_queue_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut queue = queue(dir.path(), Duration::MAX);
    let bad = Record { positions: vec![9999], ..made::record(0, 5, 4) };
    let mut error = queue.send(vec![bad]).err();
    // The thread may not have looked at it yet; it has before the third batch is taken.
    for record in records(3, 4) {
        error = error.or(queue.send(vec![record]).err());
    }
    let error = error.or(queue.close().err()).expect("an error");
    assert!(matches!(error, Error::BadRecord { row: 0, .. }), "{error}");
    // The lock is free again.
    drop(CacheWriter::open(dir.path(), &description(30, 8, 4), companions()).unwrap());
}

#[test]
fn batches_come_in_the_samplers_order_from_any_place() {
    let (dir, stored) = made::cache(23, 8, 4);
    let cache = Arc::new(Cache::open(dir.path()).unwrap());
    let sampler = Sampler::new(23, 5, Order::Seeded);
    let expected = |batch: u64| -> Vec<Record> {
        (batch * 4..batch * 4 + 4).map(|i| stored[sampler.row(i / 23, i % 23) as usize].clone()).collect()
    };
    for first in [0, 3, 11] {
        let batches = Batches::start(cache.clone(), sampler, first, 4).unwrap();
        for (number, batch) in (first..).zip(batches).take(9) {
            assert_eq!(batch.unwrap(), expected(number), "batch {number} from {first}");
        }
    }
    for left_out in [vec![0, 1, 5, 21, 22], vec![11], (1..23).collect(), (0..22).collect()] {
        let remaining: Vec<u64> = (0..23).filter(|row| !left_out.contains(row)).collect();
        let (n, sampler) = (remaining.len() as u64, Sampler::new(remaining.len() as u64, 5, Order::Seeded));
        let row = |i: u64| stored[remaining[sampler.row(i / n, i % n) as usize] as usize].clone();
        let batches = Batches::start_without(cache.clone(), left_out.clone(), sampler, 2, 4).unwrap();
        for (number, batch) in (2..).zip(batches).take(7) {
            assert_eq!(batch.unwrap(), (number * 4..number * 4 + 4).map(row).collect::<Vec<_>>(), "{left_out:?}");
        }
    }
    let all = Batches::start_without(cache, (0..23).collect(), Sampler::new(0, 1, Order::Seeded), 0, 4);
    assert!(all.unwrap().next().is_none());
    let empty = tempfile::tempdir().unwrap();
    made::write(empty.path(), &description(0, 4, 3), &[]);
    let nothing = Arc::new(Cache::open(empty.path()).unwrap());
    assert!(Batches::start(nothing, Sampler::new(0, 1, Order::Seeded), 0, 4).unwrap().next().is_none());
}

#[test]
fn a_shard_that_vanishes_shrinks_or_changes_ends_in_an_error() {
    made::quiet();
    let (dir, stored) = made::cache(23, 8, 4);
    let path = dir.path().join("shard-00001.parquet");
    let good = std::fs::read(&path).unwrap();
    let cache = Arc::new(Cache::open(dir.path()).unwrap());
    let sampler = Sampler::new(23, 5, Order::Seeded);
    let first_error = || {
        let batches = Batches::start(cache.clone(), sampler, 0, 4).unwrap();
        batches.take(12).find_map(Result::err)
    };
    assert!(first_error().is_none());
    std::fs::write(&path, &good[..good.len() / 2]).unwrap();
    assert_eq!(first_error().unwrap().class(), ErrorClass::Integrity);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(first_error().unwrap().class(), ErrorClass::Integrity);
    std::fs::write(&path, good.iter().map(|byte| byte ^ 1).collect::<Vec<u8>>()).unwrap();
    assert_eq!(first_error().unwrap().class(), ErrorClass::Integrity);
    // Rows of other shards are read all the same.
    assert_eq!(cache.row(0).unwrap(), stored[0]);
    std::fs::write(&path, &good).unwrap();
    assert!(first_error().is_none());
}
