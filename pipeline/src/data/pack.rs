//! A pack is the micro-batch: several conversations end to end, no padding, no batch dimension. Packing decides nothing about the
//! result: each conversation sees only itself, with positions from 0.
//!
//! The shift is done here and nowhere else. With two conversations of 4 and 3 tokens, `x` marking tokens to be trained on:
//!
//! ```text
//! input_ids   a0 a1 a2 a3 | b0 b1 b2      segments   [0, 4, 7]
//! token mask   .  .  x  x |  x  .  x      positions  0 1 2 3 0 1 2
//! scored          1  2    |     5         the position before a marked token of the same conversation:
//! labels         a2 a3    |    b2         b0 has none before it, so it is never trained on
//! ```

use super::Example;

/// One conversation's tokens and the positions that have a target, counted within the conversation.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    /// Tokens.
    pub input_ids: &'a [u32],
    /// Rising positions; position i predicts token i + 1.
    pub positions: &'a [u32],
}

/// Several conversations end to end.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Pack {
    input_ids: Vec<u32>,
    segments: Vec<u32>,
    scored: Vec<u32>,
    labels: Vec<u32>,
    scored_ends: Vec<usize>,
}

impl Example {
    /// The positions that have a target: those before a token to be trained on.
    pub fn positions(&self) -> Vec<u32> {
        self.targets().collect()
    }

    /// How many they are.
    pub fn scored_positions(&self) -> u64 {
        self.targets().count() as u64
    }

    fn targets(&self) -> impl Iterator<Item = u32> + '_ {
        (1..self.scored.len()).filter(|i| self.scored[*i]).map(|i| i as u32 - 1)
    }
}

impl Pack {
    /// Packs the conversations in the order given. Positions beyond the last but one token have no label and are left out.
    pub fn new<'a>(sequences: impl IntoIterator<Item = Sequence<'a>>) -> Self {
        let mut pack = Pack { segments: vec![0], ..Pack::default() };
        for sequence in sequences {
            let start = pack.input_ids.len() as u32;
            pack.input_ids.extend_from_slice(sequence.input_ids);
            for position in sequence.positions {
                if let Some(label) = sequence.input_ids.get(*position as usize + 1) {
                    pack.scored.push(start + position);
                    pack.labels.push(*label);
                }
            }
            pack.segments.push(pack.input_ids.len() as u32);
            pack.scored_ends.push(pack.scored.len());
        }
        pack
    }

    /// Tokens, T.
    pub fn input_ids(&self) -> &[u32] {
        &self.input_ids
    }

    /// Cumulative lengths, from 0 to T.
    pub fn segments(&self) -> &[u32] {
        &self.segments
    }

    /// Position of each token within its conversation, T.
    pub fn positions(&self) -> Vec<u32> {
        self.segments.windows(2).flat_map(|w| 0..w[1] - w[0]).collect()
    }

    /// Places in the pack that have a target, rising, N.
    pub fn scored(&self) -> &[u32] {
        &self.scored
    }

    /// The token that each scored place predicts, N.
    pub fn labels(&self) -> &[u32] {
        &self.labels
    }

    /// Which of the N scored places belong to conversation `i` of the pack.
    pub fn scored_of(&self, i: usize) -> std::ops::Range<usize> {
        let start = if i == 0 { 0 } else { self.scored_ends[i - 1] };
        start..self.scored_ends[i]
    }
}

/// Cuts a list of lengths into consecutive packs of at most `budget` tokens (a longer conversation is a pack of its own).
pub fn plan(lengths: impl IntoIterator<Item = usize>, budget: usize) -> Vec<std::ops::Range<usize>> {
    let mut packs: Vec<std::ops::Range<usize>> = Vec::new();
    let mut tokens = 0;
    for (i, length) in lengths.into_iter().enumerate() {
        match packs.last_mut() {
            Some(pack) if tokens + length <= budget => pack.end = i + 1,
            _ => {
                packs.push(i..i + 1);
                tokens = 0;
            }
        }
        tokens += length;
    }
    packs
}
