//! The manifest: what a cache is, and every file that belongs to it. It holds no time, host or absolute path, so equal runs write
//! equal manifests. It is replaced whole, and names a shard only once that shard is durable.
//!
//! The first field is the BLAKE3 of all bytes after its line, so a change of any byte of the file is seen:
//!
//! ```text
//! {
//!   "manifest_blake3": "<64 hex digits>",      <- digest of everything below this line
//!   "format_version": 2,
//!   ...
//! }
//! ```

use crate::error::{Flaw, Place};
use crate::{Description, Error, IdEncoding, Result, Selection, Values, durable, parts};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Version of the format that this crate writes. It reads all versions from 1.
pub const FORMAT_VERSION: u32 = 2;
/// The manifest's file name.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Largest manifest that is read: some 300,000 shards.
pub const MAX_MANIFEST_BYTES: u64 = 64 << 20;

const DIGEST_OPENING: &str = "{\n  \"manifest_blake3\": \"";
const DIGEST_CLOSING: &str = "\",\n";
const DIGEST_DIGITS: usize = 64;

/// A cache's contents.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the format.
    pub format_version: u32,
    /// Whether all expected rows are there.
    pub complete: bool,
    /// What the cache was made from.
    pub description: Description,
    /// Small files kept beside the shards.
    pub companions: Vec<CompanionEntry>,
    /// The shards in row order.
    pub shards: Vec<ShardEntry>,
    /// Durable pieces of the shard under way, in row order. Readers ignore them; the writer joins them into the shard.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<ShardEntry>,
}

/// One shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardEntry {
    /// Plain file name.
    pub file: String,
    /// Row of the cache that its first row is.
    pub first_row: u64,
    /// Rows in it.
    pub rows: u64,
    /// Tokens in its rows.
    pub tokens: u64,
    /// Positions with a target.
    pub scored: u64,
    /// Size in bytes.
    pub bytes: u64,
    /// BLAKE3 (hex) of its bytes.
    pub blake3: String,
    /// What storing its rows cost; absent in version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub codec: Option<ShardCodec>,
}

/// What storing a shard's distributions cost, as KL(given, stored) over the kept tokens and the tail, in nats.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardCodec {
    /// Summed over scored positions.
    pub kl_sum: f32,
    /// The largest of one position.
    pub kl_max: f32,
}

impl Eq for ShardCodec {}

/// One companion file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompanionEntry {
    /// Path relative to the cache's folder, with `/` between its parts.
    pub path: String,
    /// Size in bytes.
    pub bytes: u64,
    /// BLAKE3 (hex) of its bytes.
    pub blake3: String,
}

impl Manifest {
    /// The manifest of a cache without rows.
    pub(crate) fn new(description: Description, companions: Vec<CompanionEntry>) -> Self {
        Self { format_version: FORMAT_VERSION, complete: false, description, companions, shards: Vec::new(), parts: Vec::new() }
    }

    /// Rows in the cache.
    pub fn rows(&self) -> u64 {
        self.shards.last().map_or(0, |shard| shard.first_row + shard.rows)
    }

    /// Rows in pieces of the shard under way, which readers do not see.
    pub fn part_rows(&self) -> u64 {
        self.parts.iter().map(|part| part.rows).sum()
    }

    /// Tokens in the cache.
    pub fn tokens(&self) -> u64 {
        self.shards.iter().map(|shard| shard.tokens).sum()
    }

    /// Positions with a target.
    pub fn scored(&self) -> u64 {
        self.shards.iter().map(|shard| shard.scored).sum()
    }

    /// Bytes of all shards.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes).sum()
    }

    /// What storing the cache's distributions cost: mean and largest KL(given, stored) of a scored position, in nats. Absent where
    /// it was not measured (version 1) or nothing is scored.
    pub fn codec_kl(&self) -> Option<(f64, f64)> {
        let codecs: Option<Vec<ShardCodec>> = self.shards.iter().map(|shard| shard.codec).collect();
        let codecs = codecs.filter(|_| self.scored() > 0)?;
        let mean = codecs.iter().map(|codec| f64::from(codec.kl_sum)).sum::<f64>() / self.scored() as f64;
        Some((mean, codecs.iter().map(|codec| f64::from(codec.kl_max)).fold(0.0, f64::max)))
    }

    /// Reads and checks the manifest of the cache in `dir`.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(MANIFEST_FILE);
        let damaged = |flaw: Flaw| flaw.damage(&Place::new(dir, MANIFEST_FILE), None, None);
        if !dir.is_dir() {
            return Err(Error::NoFolder { dir: dir.to_path_buf() });
        }
        let info = match durable::call(|| std::fs::metadata(&path)) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(parts::no_manifest(dir)),
            info => info.map_err(Error::io(&path))?,
        };
        if !info.is_file() || info.len() > MAX_MANIFEST_BYTES {
            let found = format!("{} bytes, plain file: {}", info.len(), info.is_file());
            return Err(damaged(Flaw::new(format!("a plain file of at most {MAX_MANIFEST_BYTES} bytes"), found)));
        }
        let bytes = durable::call(|| std::fs::read(&path)).map_err(Error::io(&path))?;
        Self::from_bytes(&bytes, dir)
    }

    /// Replaces the manifest of the cache in `dir`, durably.
    pub(crate) fn save(&self, dir: &Path) -> Result<()> {
        durable::replace(&dir.join(MANIFEST_FILE), self.to_text(dir)?.as_bytes())
    }

    fn to_text(&self, dir: &Path) -> Result<String> {
        let json = serde_json::to_string_pretty(self).map_err(|e| Error::io(&dir.join(MANIFEST_FILE))(e.into()))?;
        let body = format!("{}\n", json.strip_prefix("{\n").unwrap_or(&json));
        let digest = blake3::hash(body.as_bytes()).to_hex();
        Ok(format!("{DIGEST_OPENING}{digest}{DIGEST_CLOSING}{body}"))
    }

    /// Reads and checks a manifest's bytes; `dir` is for messages.
    pub fn from_bytes(bytes: &[u8], dir: &Path) -> Result<Self> {
        let damaged = |flaw: Flaw| flaw.damage(&Place::new(dir, MANIFEST_FILE), None, None);
        check_digest(bytes).map_err(damaged)?;
        let unreadable = |e: serde_json::Error| damaged(Flaw::new("the fields of a manifest", e));
        let mut value: serde_json::Value = serde_json::from_slice(bytes).map_err(unreadable)?;
        let version = value.get("format_version").and_then(serde_json::Value::as_u64).unwrap_or(0);
        if version > u64::from(FORMAT_VERSION) {
            return Err(Error::NewerFormat { file: dir.join(MANIFEST_FILE), found: version, known: FORMAT_VERSION });
        }
        if let Some(fields) = value.as_object_mut() {
            fields.shift_remove("manifest_blake3");
        }
        let manifest: Manifest = serde_json::from_value(value).map_err(unreadable)?;
        manifest.check().map_err(damaged)?;
        Ok(manifest)
    }

    fn is_of_version_1(&self) -> bool {
        let d = &self.description;
        let plain = matches!(d.selection, Selection::TopK { .. }) && d.values == Values::Logprob;
        plain && d.lse_temperatures.is_empty() && d.id_encoding == IdEncoding::ByteStreamSplit && d.part.is_none()
    }

    /// Names are plain, counts add up, settings are in range: whoever wrote the manifest, nothing else is believed.
    fn check(&self) -> std::result::Result<(), Flaw> {
        if self.format_version == 0 {
            return Err(Flaw::new("a format version from 1", 0));
        }
        if self.format_version == 1 && !self.is_of_version_1() {
            return Err(Flaw::new("top-k log-probabilities, all that format version 1 knows", self.description.selection));
        }
        self.description
            .check()
            .map_err(|(name, expected, found)| Flaw::new(format!("description.{name}: {expected}"), found))?;
        let mut rows = 0u64;
        let mut totals = [0u64; 3];
        let parts = self.parts.iter().enumerate().map(|(i, part)| (format!("parts[{i}]"), part));
        for (name, shard) in self.shards.iter().enumerate().map(|(i, shard)| (format!("shards[{i}]"), shard)).chain(parts) {
            let at = |what: &str| format!("{name}.{what}");
            if !is_plain_name(&shard.file) || !shard.file.ends_with(".parquet") {
                return Err(Flaw::new(
                    format!("{} to be a plain name ending in .parquet", at("file")),
                    format!("{:?}", shard.file),
                ));
            }
            if shard.first_row != rows || shard.rows == 0 {
                return Err(Flaw::new(
                    format!("{} {rows} and a row or more", at("first_row")),
                    format!("{} and {}", shard.first_row, shard.rows),
                ));
            }
            let sum = |a: u64, b: u64| a.checked_add(b).filter(|&n| n <= i64::MAX as u64);
            let overflow =
                || Flaw::new(format!("{} small enough to add up", at("rows, tokens, scored and bytes")), "an overflow");
            rows = sum(rows, shard.rows).ok_or_else(overflow)?;
            for (total, n) in totals.iter_mut().zip([shard.tokens, shard.scored, shard.bytes]) {
                *total = sum(*total, n).ok_or_else(overflow)?;
            }
        }
        let expected = self.description.expected_rows;
        if rows > expected || self.complete && (rows != expected || !self.parts.is_empty()) {
            return Err(Flaw::new(
                format!("{expected} rows in the finished cache"),
                format!("{rows}, complete: {}", self.complete),
            ));
        }
        self.companions.iter().try_for_each(|c| check_companion_path(&c.path))
    }
}

/// The file starts with a digest line, and the digest is that of the bytes after the line.
fn check_digest(bytes: &[u8]) -> std::result::Result<(), Flaw> {
    let rest = bytes.strip_prefix(DIGEST_OPENING.as_bytes());
    let split = rest.and_then(|rest| rest.split_at_checked(DIGEST_DIGITS));
    let Some((digest, body)) = split.and_then(|(digest, rest)| Some((digest, rest.strip_prefix(DIGEST_CLOSING.as_bytes())?)))
    else {
        return Err(Flaw::new("a manifest that opens with manifest_blake3", "something else"));
    };
    let computed = blake3::hash(body).to_hex();
    if digest != computed.as_bytes() {
        return Err(Flaw::new(
            format!("contents with BLAKE3 {}", String::from_utf8_lossy(digest)),
            format!("contents with {computed}"),
        ));
    }
    Ok(())
}

/// 1 to 128 of `[A-Za-z0-9._-]`, not starting with a dot.
pub(crate) fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (1..=128).contains(&name.len()) && !name.starts_with('.') && name.chars().all(plain)
}

/// Plain names joined by `/`, at most 4, none of them a name that the cache itself uses.
pub(crate) fn check_companion_path(path: &str) -> std::result::Result<(), Flaw> {
    let parts: Vec<&str> = path.split('/').collect();
    let first = parts.first().copied().unwrap_or_default();
    let taken =
        first == MANIFEST_FILE || first == crate::writer::LOCK_FILE || first.starts_with("shard-") || first.starts_with("part-");
    let tmp = parts.iter().any(|part| part.ends_with(durable::TMP_SUFFIX));
    if taken || tmp || parts.len() > 4 || !parts.iter().all(|part| is_plain_name(part)) {
        return Err(Flaw::new(
            "companion files with plain relative paths that the cache does not use itself",
            format!("{path:?}"),
        ));
    }
    Ok(())
}
