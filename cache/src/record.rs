//! A record is one conversation with the teacher's distributions. This file owns the alignment and the key of a row.
//!
//! **The alignment sentence**: entry *i* of a record's targets is the teacher's distribution *after* tokens 0..=i, so it
//! predicts token *i + 1*. A position without an entry is not trained on; the last position never has one.

use crate::{Error, Result, SoftTargets, Target};

/// One row of a cache.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Number of the conversation in the data it came from (0-based, skipped rows counted). Rises from row to row.
    pub seq_id: u64,
    /// The conversation's tokens.
    pub input_ids: Vec<u32>,
    /// Rising positions that have a target, each below `input_ids.len() - 1`; one for each entry of `targets`. None where the teacher
    /// could not say anything of the conversation: it keeps its row, and nothing is trained on it.
    pub positions: Vec<u32>,
    /// The teacher's distributions at `positions`.
    pub targets: SoftTargets,
    /// What storing the row cost; zero for a record that was not stored yet.
    pub codec: CodecError,
}

/// How far stored distributions lie from those they were made of, as KL(given, stored) over the kept tokens and the tail, both
/// normalised, in nats. A row that was rewritten from a stored one carries the sum of both steps.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct CodecError {
    /// Summed over the row's positions.
    pub kl_sum: f32,
    /// The largest of one position.
    pub kl_max: f32,
}

/// A row's identity: the first 16 bytes of BLAKE3 over its ids and scored positions. Shown as 32 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowKey(pub [u8; 16]);

impl RowKey {
    /// The key of a row with these tokens and scored positions.
    pub fn of(input_ids: &[u32], positions: &[u32]) -> Self {
        // One buffer: the hash takes whole blocks several times faster than single words.
        let mut bytes = b"potstill row v1\0".to_vec();
        bytes.reserve(16 + 4 * (input_ids.len() + positions.len()));
        for part in [input_ids, positions] {
            bytes.extend_from_slice(&(part.len() as u64).to_le_bytes());
            bytes.extend(part.iter().flat_map(|value| value.to_le_bytes()));
        }
        let mut key = [0; 16];
        key.copy_from_slice(&blake3::hash(&bytes).as_bytes()[..16]);
        Self(key)
    }
}

impl Record {
    /// The scored positions in order: the token that follows in the data, and the teacher's distribution of what follows.
    pub fn scored(&self) -> impl Iterator<Item = (u32, Target<'_>)> {
        let next = |position: &u32| self.input_ids.get(*position as usize + 1).copied();
        self.positions.iter().enumerate().filter_map(move |(i, position)| Some((next(position)?, self.targets.position(i))))
    }

    /// The row's key.
    pub fn key(&self) -> RowKey {
        RowKey::of(&self.input_ids, &self.positions)
    }
}

impl std::str::FromStr for RowKey {
    type Err = Error;

    /// Reads 32 hexadecimal digits, of either case.
    fn from_str(text: &str) -> Result<Self> {
        Self::from_hex(text.as_bytes()).ok_or_else(|| Error::BadKey { text: text.chars().take(80).collect() })
    }
}

impl RowKey {
    pub(crate) fn from_hex(digits: &[u8]) -> Option<Self> {
        let mut key = [0; 16];
        if digits.len() != 32 {
            return None;
        }
        for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
            for &digit in pair {
                *byte = *byte << 4 | char::from(digit).to_digit(16)? as u8;
            }
        }
        Some(Self(key))
    }
}

impl std::fmt::Display for RowKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
