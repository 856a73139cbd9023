//! Any bytes as the shard of a cache whose manifest believes them: opening, reading every row, finding by key, verifying and
//! summing up end in an error or in the rows that were stored.
//!
//! The first byte chooses the way to store, the rest is the shard.
#![no_main]

use libfuzzer_sys::fuzz_target;
use potstill_cache::{Cache, ScanProgress, verify};
use potstill_cache_fuzz::modes::modes;
use potstill_cache_fuzz::{Base, ROWS, let_fenced_panics_pass};
use std::sync::{LazyLock, Mutex};

static BASES: LazyLock<Mutex<Vec<Base>>> = LazyLock::new(|| {
    // Left behind when the fuzzer ends; one folder a run, of a few small files.
    let parent = tempfile::Builder::new().prefix("potstill-fuzz-").tempdir().unwrap().keep();
    Mutex::new(modes(ROWS, 4).iter().map(|mode| Base::of(mode, &parent)).collect())
});

fuzz_target!(init: let_fenced_panics_pass(), |data: &[u8]| {
    let Some((&mode, shard)) = data.split_first() else { return };
    let mut bases = BASES.lock().unwrap();
    let number = usize::from(mode) % bases.len();
    let base = &mut bases[number];
    base.put(shard);
    let report = verify(&base.dir, &ScanProgress::default()).unwrap();
    let Ok(cache) = Cache::open(&base.dir) else {
        assert!(!report.is_good());
        return;
    };
    for (row, stored) in base.stored.iter().enumerate() {
        if let Ok(found) = cache.row(row as u64) {
            // Bytes that nothing looks at may differ; what is read may not, unless its checksum was made to fit.
            assert_eq!(found.key() == stored.key(), found.input_ids == stored.input_ids && found.positions == stored.positions);
        }
        let _ = cache.find(&stored.key());
    }
});
