//! What the fuzz targets share: caches of every way to store whose manifest is made to fit any shard, and a panic hook that lets
//! the panics pass which the crate itself catches.

#[path = "../../tests/campaign/modes.rs"]
pub mod modes;

use modes::Mode;
use potstill_cache::{CacheWriter, Record, WriterOptions};
use std::path::PathBuf;

/// The name of the only shard.
pub const SHARD: &str = "shard-00000.parquet";
/// Rows in it.
pub const ROWS: u64 = 3;

/// A finished cache of one shard, whose shard is replaced again and again.
pub struct Base {
    pub dir: PathBuf,
    pub stored: Vec<Record>,
    manifest: serde_json::Value,
}

impl Base {
    /// A cache of this mode under the folder `parent`.
    pub fn of(mode: &Mode, parent: &std::path::Path) -> Self {
        let dir = parent.join(mode.name);
        let mut writer = CacheWriter::open(&dir, &mode.description, WriterOptions::default()).unwrap();
        writer.extend(&mode.given()).unwrap();
        writer.finish().unwrap();
        let mut manifest: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.join("manifest.json")).unwrap()).unwrap();
        manifest.as_object_mut().unwrap().shift_remove("manifest_blake3");
        Self { dir, stored: mode.stored(), manifest }
    }

    /// Puts `bytes` in the shard's place, with a manifest that believes them.
    pub fn put(&mut self, bytes: &[u8]) {
        std::fs::write(self.dir.join(SHARD), bytes).unwrap();
        self.manifest["shards"][0]["bytes"] = bytes.len().into();
        self.manifest["shards"][0]["blake3"] = blake3::hash(bytes).to_hex().to_string().into();
        let text = serde_json::to_string_pretty(&self.manifest).unwrap();
        std::fs::write(self.dir.join("manifest.json"), signed(&text)).unwrap();
    }
}

/// The text of a manifest without its digest, with its digest.
pub fn signed(text: &str) -> Vec<u8> {
    let body = format!("{}\n", text.strip_prefix("{\n").unwrap_or(text));
    format!("{{\n  \"manifest_blake3\": \"{}\",\n{body}", blake3::hash(body.as_bytes()).to_hex()).into_bytes()
}

/// libFuzzer's own hook ends the process at any panic. Those that happen behind the crate's fence become errors and may pass.
pub fn let_fenced_panics_pass() {
    let fatal = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !potstill_cache::decoding() {
            fatal(info);
        }
    }));
}
