//! What a sample of rows says of a cache's size, held against the caches that the writer makes of all rows.

use crate::made::{described, modes, record_as, write};
use potstill_cache::{Error, Extent, Record, Sizing};

const ROWS: u64 = 300;
/// Four shards of one row group and a half, and a last one that is shorter.
const ROWS_PER_SHARD: u32 = 96;

/// Rows of 20 to 200 tokens, in no order.
fn records(storage: &potstill_cache::Storage, temperatures: &[f32]) -> Vec<Record> {
    (0..ROWS).map(|i| record_as(i, 20 + (i as usize * 67) % 181, storage, temperatures)).collect()
}

fn extent(records: &[Record]) -> Extent {
    Extent {
        rows: records.len() as u64,
        tokens: records.iter().map(|record| record.input_ids.len() as u64).sum(),
        scored: records.iter().map(|record| record.positions.len() as u64).sum(),
    }
}

#[test]
fn a_sample_says_how_large_the_cache_will_be() {
    for (name, storage, temperatures) in modes() {
        let dir = tempfile::tempdir().unwrap();
        let description = described(&storage, &temperatures, ROWS, ROWS_PER_SHARD);
        let all = records(&storage, &temperatures);
        let (whole, manifest) = (extent(&all), write(dir.path(), &description, &all));
        let (bytes, largest) = (manifest.bytes(), manifest.shards.iter().map(|shard| shard.bytes).max().unwrap());
        let off = |estimate: u64| estimate as f64 / bytes as f64 - 1.0;

        // All rows: what is left is how well a group's single values compress beside each other, and offsets of a few digits more.
        let sizing = Sizing::of(&description, &all).unwrap();
        assert_eq!(sizing.sampled(), whole, "{name}");
        let exact = sizing.of_all(&whole);
        assert!(off(exact.bytes).abs() < 0.005, "{name}: {} for {bytes}", exact.bytes);
        assert_eq!(exact.standard_error, Some(0.0), "{name}");
        assert!((exact.per_scored - exact.bytes as f64 / whole.scored as f64).abs() < 1e-9, "{name}");
        assert!((exact.largest_shard as f64 / largest as f64 - 1.0).abs() < 0.1, "{name}: {} {largest}", exact.largest_shard);

        // One row in ten: as far off as it says, and a little for what is above.
        let sample: Vec<Record> = all.iter().step_by(10).cloned().collect();
        let sizing = Sizing::of(&description, &sample).unwrap();
        let estimate = sizing.of_all(&whole);
        let error = estimate.standard_error.unwrap();
        assert!(error > 0.0 && error < 0.02 * bytes as f64, "{name}: {error} of {bytes}");
        assert!(
            (estimate.bytes as f64 - bytes as f64).abs() < 3.0 * error + 0.005 * bytes as f64,
            "{name}: {estimate:?} {bytes}"
        );

        // One row, of middle length, knows nothing of the others' differences. Each page costs some 50 bytes, which is much here.
        let middle = all.iter().find(|record| record.input_ids.len() == 110).unwrap().clone();
        let one = Sizing::of(&description, &[middle]).unwrap().of_all(&whole);
        assert_eq!(one.standard_error, None);
        assert!(off(one.bytes).abs() < 0.15, "{name}: {} for {bytes}", one.bytes);
    }
}

#[test]
fn the_stated_error_is_as_large_as_samples_differ() {
    let (_, storage, temperatures) = modes().remove(2);
    let description = described(&storage, &temperatures, ROWS, ROWS_PER_SHARD);
    let all = records(&storage, &temperatures);
    let whole = extent(&all);
    let truth = Sizing::of(&description, &all).unwrap().of_all(&whole).bytes as f64;
    // Sixty samples of 20 rows, each with a stride of its own through the rows, which have no order.
    let estimates: Vec<(f64, f64)> = (0..60usize)
        .map(|start| {
            let rows = (0..20).map(|i| all[(start * 31 + i * (7 + 2 * start)) % all.len()].clone());
            let estimate = Sizing::of(&description, &rows.collect::<Vec<_>>()).unwrap().of_all(&whole);
            (estimate.bytes as f64, estimate.standard_error.unwrap())
        })
        .collect();
    let n = estimates.len() as f64;
    let seen = (estimates.iter().map(|(bytes, _)| (bytes - truth).powi(2)).sum::<f64>() / n).sqrt();
    let said = estimates.iter().map(|(_, error)| error).sum::<f64>() / n;
    // The ratio of two standard deviations of 60 draws scatters by about a tenth; samples that share rows scatter a little more.
    assert!((0.6..1.6).contains(&(said / seen)), "said {said}, seen {seen}");
}

#[test]
fn what_cannot_be_stored_has_no_size() {
    let (_, storage, temperatures) = modes().remove(2);
    let description = described(&storage, &temperatures, 1, 1);
    assert!(matches!(Sizing::of(&description, &[]), Err(Error::Setting { name: "records", .. })));
    let mut record = record_as(0, 20, &storage, &temperatures);
    record.positions[0] = 19;
    assert!(matches!(Sizing::of(&description, &[record]), Err(Error::BadRecord { row: 0, .. })));
}
