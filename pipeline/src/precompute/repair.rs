//! Scoring again what a check found damaged, and nothing else: a row's bits do not depend on what it was scored beside.

use super::{PrecomputeConfig, score};
use crate::data::Example;
use crate::data::pack;
use crate::ops::capture::Capture;
use crate::run::RunContext;
use crate::teacher::Teacher;
use crate::{Error, Result};
use potstill_cache::{Description, Repair, RepairReport, ShardRepair, WriterOptions};
use std::ops::Range;
use std::path::Path;

/// How an interrupted repair goes on.
const AGAIN: &str = "run the same command again: shards that are mended are good";

/// Mends the cache as far as `list` says. `examples` are the cache's rows in order; `teacher` is loaded only if a row needs it.
///
/// Errors: as [`Repair::open`]; scoring; a stop asked for by `context` (mended shards stay).
pub(super) fn run(
    config: &PrecomputeConfig,
    list: &Path,
    (description, options): (&Description, &WriterOptions),
    (examples, capture): (&[Example], &Capture),
    teacher: impl FnOnce() -> Result<Teacher>,
    context: &RunContext,
) -> Result<RepairReport> {
    let mut repair = Repair::open(&config.cache, description, options, list)?;
    let shards = repair.shards().to_vec();
    let packs: Vec<Vec<Range<usize>>> = shards.iter().map(|shard| packs_of(shard, examples, config)).collect();
    let needed = || packs.iter().flatten().flat_map(|pack| examples.get(pack.clone()).unwrap_or_default());
    let tokens: u64 = needed().map(|example| example.input_ids.len() as u64).sum();
    let teacher = if tokens > 0 { Some(teacher()?) } else { None };
    context.progress.begin("repairing", "tokens", tokens);
    for (done, (shard, packs)) in shards.iter().zip(&packs).enumerate() {
        let mut mending = repair.mend(shard)?;
        for pack in packs {
            let Some(teacher) = &teacher else { continue };
            let block = std::slice::from_ref(pack);
            let Some(scored) = score(teacher, examples, block, capture, config.head_chunk as usize, context)? else {
                return Err(Error::Interrupted { kept: format!("{done} of {} shards are mended", shards.len()), again: AGAIN });
            };
            for (records, _) in &scored {
                mending.extend(records)?;
            }
        }
        mending.finish()?;
    }
    context.progress.end();
    Ok(repair.finish()?)
}

/// A shard's listed rows, neighbours in packs, as ranges of all rows.
fn packs_of(shard: &ShardRepair, examples: &[Example], config: &PrecomputeConfig) -> Vec<Range<usize>> {
    let mut packs = Vec::new();
    for neighbours in shard.recompute.chunk_by(|a, b| a + 1 == *b) {
        let first = neighbours[0] as usize;
        let rows = examples.get(first..first + neighbours.len()).unwrap_or_default();
        let planned = pack::plan(rows.iter().map(|e| e.input_ids.len()), config.pack_tokens as usize);
        packs.extend(planned.into_iter().map(|pack| first + pack.start..first + pack.end));
    }
    packs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listed_rows_are_scored_and_no_others() {
        let examples: Vec<Example> =
            (0..20).map(|seq_id| Example { seq_id, input_ids: vec![1; 10], scored: vec![true; 10] }).collect();
        let config = PrecomputeConfig { pack_tokens: 30, ..PrecomputeConfig::default() };
        let packs = |recompute: &[u64]| {
            let shard = ShardRepair { index: 1, file: String::new(), first_row: 8, rows: 8, recompute: recompute.to_vec() };
            packs_of(&shard, &examples, &config)
        };
        assert_eq!(packs(&[9, 11]), [9..10, 11..12]);
        assert_eq!(packs(&[8, 9, 11, 12, 13, 14, 15]), [8..10, 11..14, 14..16]);
        assert_eq!(packs(&[]), [0..0; 0]);
    }
}
