//! A record is one conversation with the teacher's distributions.
//!
//! **The alignment sentence**: entry *i* of a record's targets is the teacher's distribution *after* tokens 0..=i, so it
//! predicts token *i + 1*. A position without an entry is not trained on; the last position never has one.

use crate::SoftTargets;

/// One row of a cache.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Number of the conversation in the data it came from (0-based, skipped rows counted).
    pub seq_id: u64,
    /// The conversation's tokens.
    pub input_ids: Vec<u32>,
    /// Rising positions that have a target, each below `input_ids.len() - 1`; one for each entry of `targets`.
    pub positions: Vec<u32>,
    /// The teacher's distributions at `positions`.
    pub targets: SoftTargets,
}

/// A row's identity: the first 16 bytes of BLAKE3 over its ids and scored positions. Shown as 32 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowKey(pub [u8; 16]);

impl RowKey {
    /// The key of a row with these tokens and scored positions.
    pub fn of(input_ids: &[u32], positions: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"potstill row v1\0");
        for part in [input_ids, positions] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            for value in part {
                hasher.update(&value.to_le_bytes());
            }
        }
        let mut key = [0; 16];
        key.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Self(key)
    }
}

impl std::fmt::Display for RowKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
