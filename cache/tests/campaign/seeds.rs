//! First inputs for the fuzz targets, made of caches that are good.

use crate::modes::modes;
use crate::process::{options, scratch};
use potstill_cache::{CacheWriter, MANIFEST_FILE};
use std::path::Path;

/// A repetition or definition block of runs: a length, then pairs of a run's length and its level.
fn levels(runs: &[(u8, u8)]) -> Vec<u8> {
    let body: Vec<u8> = runs.iter().flat_map(|&(length, level)| [length << 1, level]).collect();
    [&(body.len() as u32).to_le_bytes()[..], &body].concat()
}

/// Writes `manifest/`, `shard/` and `page/` under the folder named by `POTSTILL_FUZZ_CORPUS`.
#[test]
#[ignore = "writes first inputs for the fuzz targets; scripts/campaign.sh calls it"]
fn write_fuzz_seeds() {
    let Some(out) = std::env::var_os("POTSTILL_FUZZ_CORPUS") else { return };
    let out = Path::new(&out);
    for target in ["manifest", "shard", "page"] {
        std::fs::create_dir_all(out.join(target)).unwrap();
    }
    for (number, mode) in modes(3, 4).iter().enumerate() {
        let dir = scratch();
        let mut writer = CacheWriter::open(dir.path(), &mode.description, options()).unwrap();
        writer.append(&mode.given()[0]).unwrap();
        writer.seal().unwrap();
        let partial = std::fs::read(dir.path().join(MANIFEST_FILE)).unwrap();
        writer.extend(&mode.given()[1..]).unwrap();
        writer.finish().unwrap();
        let whole = std::fs::read(dir.path().join(MANIFEST_FILE)).unwrap();
        let shard = std::fs::read(dir.path().join("shard-00000.parquet")).unwrap();
        std::fs::write(out.join("manifest").join(format!("{}-partial", mode.name)), &partial).unwrap();
        std::fs::write(out.join("manifest").join(mode.name), &whole).unwrap();
        // Without its first fields, as the target signs it again.
        let unsigned = whole.split_inclusive(|&b| b == b'\n').skip(2).collect::<Vec<_>>().concat();
        std::fs::write(out.join("manifest").join(format!("{}-unsigned", mode.name)), [b"{\n", &unsigned[..]].concat()).unwrap();
        std::fs::write(out.join("shard").join(mode.name), [&[number as u8], &shard[..]].concat()).unwrap();
    }
    // Two lists of two and one values, and an empty one: repetition 0 2 1 1, definition 2 2 2 1.
    let nested = [levels(&[(1, 0), (1, 2), (2, 1)]), levels(&[(3, 2), (1, 1)]), vec![7; 12]].concat();
    let flat = [levels(&[(1, 0), (2, 1)]), levels(&[(3, 1)]), vec![9; 12]].concat();
    for (name, head, body) in
        [("nested", [0b0111, 4, 0, 0, 0], &nested), ("flat", [0b0110, 3, 0, 0, 0], &flat), ("plain", [2, 3, 0, 0, 0], &flat)]
    {
        std::fs::write(out.join("page").join(name), [&head[..], body].concat()).unwrap();
    }
}
