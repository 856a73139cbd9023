//! The walk over rows of a cache: a student goes forward over packs of them, and whoever measures is shown logits, a few positions at a
//! time. Owns which rows `--rows` and `--eval-rows` mean; refuses to know what is measured.
//!
//! No [T, V] exists: the head's product is made by chunks of positions, whose logits are the visitor's to use up.

use crate::Result;
use crate::data::pack::{self, Pack, Sequence};
use crate::run::RunContext;
use crate::student::{Student, Walk};
use potstill_cache::{Cache, Order, Record, Sampler};
use rayon::prelude::*;
use std::ops::ControlFlow;
use std::sync::Arc;

/// The epoch whose order says which rows are held out; no run is that long.
const NO_EPOCH: u64 = u64::MAX;

/// Rows of a cache.
#[derive(Debug, Clone)]
pub(crate) struct CacheRows {
    pub(crate) cache: Arc<Cache>,
    /// Rising.
    pub(crate) rows: Vec<u64>,
}

/// How much exists at once; figures do not depend on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Portions {
    /// Rows read together.
    pub(crate) rows: usize,
    /// Most tokens of a pack.
    pub(crate) pack_tokens: usize,
    /// Positions whose logits exist at once.
    pub(crate) positions: usize,
}

/// Logits of a few scored positions of a pack.
pub(crate) struct Chunk<'a> {
    /// `[n, vocab]`.
    pub(crate) logits: Vec<f32>,
    pub(crate) vocab: usize,
    /// n next tokens.
    pub(crate) labels: &'a [u32],
    /// Place of the chunk's first position among the pack's scored ones.
    pub(crate) first: usize,
}

/// Which of `rows` rows are held out when `held_out` are, rising: the first of the order that the sampler gives for an epoch that no run
/// reaches, so that they follow from the seed and the number of rows alone.
pub(crate) fn choose(rows: u64, held_out: u64, seed: u64) -> Vec<u64> {
    let order = Sampler::new(rows, seed, Order::Seeded);
    let mut chosen: Vec<u64> = (0..held_out.min(rows)).map(|i| order.row(NO_EPOCH, i)).collect();
    chosen.sort_unstable();
    chosen
}

impl CacheRows {
    /// Takes the student over all rows that have scored positions. `open` sees the rows of each pack and gives what `visit` is to have
    /// beside its chunks of logits.
    pub(crate) fn walk<P>(
        &self,
        student: &Student,
        portions: Portions,
        context: &RunContext,
        mut open: impl FnMut(&[Record]) -> Result<P>,
        mut visit: impl FnMut(Chunk<'_>, &P) -> Result<ControlFlow<()>>,
    ) -> Result<Walk> {
        for rows in self.rows.chunks(portions.rows.max(1)) {
            let records = rows.par_iter().map(|row| Ok(self.cache.row(*row)?)).collect::<Result<Vec<Record>>>()?;
            let records: Vec<Record> = records.into_iter().filter(|r| !r.positions.is_empty()).collect();
            for range in pack::plan(records.iter().map(|r| r.input_ids.len()), portions.pack_tokens) {
                let records = &records[range];
                let opened = open(records)?;
                let visit = |chunk: Chunk<'_>| visit(chunk, &opened);
                if let ControlFlow::Break(end) = walk_pack(student, records, portions.positions, context, visit)? {
                    return Ok(end);
                }
            }
        }
        Ok(Walk::Done)
    }
}

/// One pack of a walk; breaks off with how the walk ends.
fn walk_pack(
    student: &Student,
    records: &[Record],
    positions: usize,
    context: &RunContext,
    mut visit: impl FnMut(Chunk<'_>) -> Result<ControlFlow<()>>,
) -> Result<ControlFlow<Walk>> {
    let pack = Pack::new(records.iter().map(|r| Sequence { input_ids: &r.input_ids, positions: &r.positions }));
    let stopped = Ok(ControlFlow::Break(Walk::Stopped));
    let Some(hidden) = student.hidden(&pack, context)? else { return stopped };
    for first in (0..pack.labels().len()).step_by(positions.max(1)) {
        if context.stopping() {
            return stopped;
        }
        let n = positions.max(1).min(pack.labels().len() - first);
        let (logits, vocab) = {
            let logits = student.decoder().logits(&hidden.narrow(0, first, n)?)?;
            (logits.flatten_all()?.to_vec1::<f32>()?, logits.dim(1)?)
        };
        let chunk = Chunk { logits, vocab, labels: &pack.labels()[first..first + n], first };
        if visit(chunk)?.is_break() {
            return Ok(ControlFlow::Break(Walk::Done));
        }
    }
    Ok(ControlFlow::Continue(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_held_out_follow_from_seed_and_number() {
        for (rows, held_out) in [(1000, 0), (1000, 37), (20, 19), (2, 1)] {
            let chosen = choose(rows, held_out, 7);
            assert!(chosen.len() as u64 == held_out && chosen.is_sorted_by(|a, b| a < b), "{chosen:?}");
            assert!(chosen.iter().all(|row| *row < rows), "{chosen:?}");
            assert_eq!(chosen, choose(rows, held_out, 7));
        }
        assert_ne!(choose(1000, 37, 7), choose(1000, 37, 8));
        // More of them are those and others.
        let more = choose(1000, 60, 7);
        assert!(choose(1000, 37, 7).iter().all(|row| more.contains(row)));
        // A checkpoint does not name them, so they are part of it.
        assert_eq!(choose(10, 3, 42), [0, 3, 7]);
    }
}
