//! Scoring again what a check found damaged. A listed row is scored in the very pack in which it was scored first, so that the same
//! arithmetic gives the same bits.

use super::{PrecomputeConfig, score};
use crate::data::Example;
use crate::data::pack;
use crate::ops::capture::Capture;
use crate::run::RunContext;
use crate::teacher::Teacher;
use crate::{Error, Result};
use potstill_cache::{Description, Record, Repair, RepairReport, ShardRepair, WriterOptions};
use std::collections::BTreeSet;
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
        let listed: BTreeSet<u64> = shard.recompute.iter().copied().collect();
        let mut mending = repair.mend(shard)?;
        for pack in packs {
            let Some(teacher) = &teacher else { continue };
            let block = std::slice::from_ref(pack);
            let Some(mut scored) = score(teacher, examples, block, capture, config.head_chunk as usize, context)? else {
                return Err(Error::Interrupted { kept: format!("{done} of {} shards are mended", shards.len()), again: AGAIN });
            };
            // Of such a pack only the listed rows are taken.
            let (scored, _) = scored.pop().unwrap_or_default();
            let numbered = scored.into_iter().zip(pack.clone());
            let records: Vec<Record> =
                numbered.filter(|(_, row)| listed.contains(&(*row as u64))).map(|(record, _)| record).collect();
            mending.extend(&records)?;
        }
        mending.finish()?;
    }
    context.progress.end();
    Ok(repair.finish()?)
}

/// The packs of a shard's rows in which a listed row is, as ranges of all rows.
fn packs_of(shard: &ShardRepair, examples: &[Example], config: &PrecomputeConfig) -> Vec<Range<usize>> {
    let first = shard.first_row as usize;
    let rows = examples.get(first..first + shard.rows as usize).unwrap_or_default();
    let packs = pack::plan(rows.iter().map(|e| e.input_ids.len()), config.pack_tokens as usize);
    let packs = packs.into_iter().map(|pack| first + pack.start..first + pack.end);
    packs.filter(|pack| shard.recompute.iter().any(|&row| pack.contains(&(row as usize)))).collect()
}
