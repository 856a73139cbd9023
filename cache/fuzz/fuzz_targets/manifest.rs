//! Any bytes as a manifest: as they are, and signed with the digest that fits them. What is accepted must say the same when it is
//! read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use potstill_cache::Manifest;
use potstill_cache_fuzz::{let_fenced_panics_pass, signed};
use std::path::Path;

fn read(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::from_bytes(bytes, Path::new("fuzz")) {
        // Sums and names that the crate relies on.
        let _ = (manifest.rows(), manifest.tokens(), manifest.scored(), manifest.bytes(), manifest.codec_kl());
        assert!(manifest.shards.iter().all(|shard| !shard.file.contains('/') && !shard.file.starts_with('.')));
        assert!(manifest.rows() <= manifest.description.expected_rows);
        let text = serde_json::to_string_pretty(&manifest).unwrap();
        let again = Manifest::from_bytes(&signed(&text), Path::new("fuzz")).unwrap();
        assert_eq!(serde_json::to_string_pretty(&again).unwrap(), text);
    }
}

fuzz_target!(init: let_fenced_panics_pass(), |data: &[u8]| {
    read(data);
    if let Ok(text) = std::str::from_utf8(data) {
        read(&signed(text));
    }
});
