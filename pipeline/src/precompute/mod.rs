//! STAGE ONE: chats → tokens → teacher → cache. The loop a newcomer reads first.
//!
//! Owns the order of things; what a token, a distribution or a shard is, is said elsewhere. The one idea: the whole dataset is
//! encoded before the teacher is loaded, so the cache knows from the start what it will hold, a second run proves that what is
//! there are its own first rows, and progress has an end. A conversation scores to the same bits in any pack and any block of packs, so
//! neither where a run was stopped nor how many tokens go through the model at once decides a byte. Packs still never cross a shard.

mod bad;
mod block;
mod config;
mod description;
mod opening;
mod outlook;
mod part;
mod plan;
mod repair;

pub use bad::{BadRow, NAMED, NOT_FINITE};
pub use config::*;
pub use part::{Share, Worker};
pub use plan::{
    ComparedSize, Disk, Measure, Measured, Memory, MemoryPart, Moment, PlanConfig, PlanReport, PlannedMemory, PlannedSize,
    TypicalSize, plan,
};

use crate::data::pack::{self, Pack, Sequence};
use crate::data::{Dataset, Example};
use crate::memory;
use crate::model::weights::Weights;
use crate::ops::capture::Capture;
use crate::run::{RUN_AGAIN, RunContext};
use crate::teacher::Teacher;
use crate::{Error, Result};
use bad::BadRows;
use block::Plan;
use opening::Opened;
use outlook::Outlook;
use potstill_cache::{CacheWriter, Description, Manifest, Record, RepairReport, RowKey, WriterOptions, WriterQueue, free_bytes};
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

/// What stage one did.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct PrecomputeReport {
    /// Rows in the cache now.
    pub rows: u64,
    /// Rows that were there before this run.
    pub resumed_rows: u64,
    /// Tokens in the cache.
    pub tokens: u64,
    /// Scored positions in the cache.
    pub scored: u64,
    /// Bytes of all shards.
    pub bytes: u64,
    /// Skipped conversations by reason.
    pub skipped: BTreeMap<String, u64>,
    /// The first skipped conversation of each reason: `file:line`.
    pub first_skipped: BTreeMap<String, String>,
    /// The first conversations that this run left out because a logit of the teacher cannot be kept; all are counted in `skipped`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub left_out: Vec<BadRow>,
    /// Tokens cut away by truncation.
    pub truncated_tokens: u64,
    /// What was mended first, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repair: Option<RepairReport>,
    /// Seconds spent scoring in this run.
    pub seconds: f64,
    /// Tokens that went through the teacher in this run.
    pub scored_tokens: u64,
    /// Scored positions of this run.
    pub scored_now: u64,
    /// Seconds of it spent on the head and the selection of these positions, which are spared at all others.
    pub head_seconds: f64,
}

/// Runs stage one: scores every conversation that the cache does not hold yet.
///
/// A second run with the same settings continues after the last durable row; of a complete cache it only reports. Errors: bad
/// settings, data, model folder or cache; a stop asked for by `context` (every row scored until then stays).
pub fn run(config: &PrecomputeConfig, context: &RunContext) -> Result<PrecomputeReport> {
    let config = &*config.placed()?;
    let Opened { storage, device, model, tokenizer, width, dataset, part } = Opened::of(config, context)?;
    let weights = Weights::open(&config.teacher)?;
    let plan = Plan::new(config, (&storage, &model), weights.total_bytes(), memory::available_on(&device));
    let fingerprint = description::teacher_fingerprint(config, (&model, &weights), width, context)?;
    drop(weights);
    let description = description::describe(config, &storage, fingerprint, &tokenizer, &dataset)?;
    let description = Description { part, ..description };
    let options = WriterOptions { companions: description::companions(&config.teacher)? };
    let capture = Capture::of(&storage, &config.temperatures());
    let teacher = || Teacher::from_folder(&config.teacher, width, (config.compute, plan.residency), &device, context);
    let mend = |list| repair::run(config, list, (&description, &options), (&dataset.examples, &capture), teacher, context);
    let repair = config.repair.as_deref().map(mend).transpose()?;
    let mut writer = CacheWriter::open(&config.cache, &description, options)?;
    let resumed_rows = writer.committed_rows();
    let known = check_committed(&writer, &dataset.examples, &config.cache)?;
    let mut bad = BadRows::of(config.max_bad, dataset.examples.len(), known)?;

    let mut report = PrecomputeReport { resumed_rows, repair, ..PrecomputeReport::default() };
    let packs = packs(&dataset.examples, resumed_rows as usize, config);
    if !packs.is_empty() {
        let teacher = teacher()?;
        let tokens_of = |examples: &[Example]| examples.iter().map(|e| e.input_ids.len() as u64).sum::<u64>();
        // Encoding and compressing go on beside the teacher, which waits only where they are slower than it for long.
        // Half the time for a block, half for rows that wait in the writer: together what a kill may lose.
        let half = config.seal_interval() / 2;
        let mut queue = WriterQueue::start(writer, half)?;
        let started = Instant::now();
        report.scored_tokens = packs.iter().map(|pack| tokens_of(&dataset.examples[pack.clone()])).sum();
        context.progress.begin("scoring", "tokens", report.scored_tokens);
        let mut outlook = Outlook::new(&dataset.examples);
        let mut budget = plan.budget(half);
        let mut packs = packs.into_iter().peekable();
        while packs.peek().is_some() {
            let block = budget.take(&mut packs, |pack| tokens_of(&dataset.examples[pack.clone()]));
            let examples = &dataset.examples[block[0].start..block[block.len() - 1].end];
            let began = Instant::now();
            let Some(scored) = score(&teacher, &dataset.examples, &block, &capture, config.head_chunk as usize, context)? else {
                let mut writer = queue.close()?;
                writer.seal()?;
                let kept = format!("{} of {} rows are durable", writer.committed_rows(), dataset.examples.len());
                return Err(Error::Interrupted { kept, again: RUN_AGAIN });
            };
            budget.took(tokens_of(examples), began.elapsed());
            for (pack, (mut records, left_out)) in block.iter().zip(scored) {
                bad.add(left_out)?;
                // Where a resumed run was given other packs, one may begin before the first row that is missing.
                records.drain(..(resumed_rows as usize).saturating_sub(pack.start));
                outlook.add(records.iter().map(|record| record.positions.len() as u64).sum());
                queue.send(records)?;
                context.progress.note(outlook.remark(pack.end as u64, queue.written(), free_bytes(&config.cache)));
            }
        }
        writer = queue.close()?;
        context.progress.end();
        report.seconds = started.elapsed().as_secs_f64();
        report.scored_now = outlook.scored_now();
        report.head_seconds = teacher.head_time().as_secs_f64();
    }
    let manifest = writer.finish()?;
    let mut report = fill(report, &manifest, dataset);
    bad.report(&mut report);
    Ok(report)
}

/// The packs that hold a row after the first `committed`, as ranges of rows: each shard cut anew from its start, also one of which
/// some rows are there already.
fn packs(examples: &[Example], committed: usize, config: &PrecomputeConfig) -> Vec<Range<usize>> {
    let per_shard = config.rows_per_shard as usize;
    let mut packs = Vec::new();
    for start in (committed - committed % per_shard..examples.len()).step_by(per_shard) {
        let shard = &examples[start..examples.len().min(start + per_shard)];
        let planned = pack::plan(shard.iter().map(|e| e.input_ids.len()), config.pack_tokens as usize);
        packs.extend(planned.into_iter().map(|pack| start + pack.start..start + pack.end).filter(|pack| pack.end > committed));
    }
    packs
}

/// A pack's records, and its conversations that were left out.
type ScoredPack = (Vec<Record>, Vec<BadRow>);

/// The records of each pack of a block, and its conversations that were left out; `None` where a stop was asked for meanwhile.
fn score(
    teacher: &Teacher,
    all: &[Example],
    block: &[Range<usize>],
    capture: &Capture,
    chunk: usize,
    context: &RunContext,
) -> Result<Option<Vec<ScoredPack>>> {
    let examples = |pack: &Range<usize>| all.get(pack.clone()).unwrap_or_default();
    let positions: Vec<Vec<Vec<u32>>> =
        block.iter().map(|pack| examples(pack).iter().map(Example::positions).collect()).collect();
    let packs: Vec<Pack> = block
        .iter()
        .zip(&positions)
        .map(|(pack, positions)| {
            Pack::new(examples(pack).iter().zip(positions).map(|(e, positions)| Sequence { input_ids: &e.input_ids, positions }))
        })
        .collect();
    let number = |example: Option<&Example>| example.map_or(0, |e| e.seq_id);
    let scored = teacher.score(&packs, capture, chunk, context).map_err(|source| Error::Scoring {
        first: number(block.first().and_then(|pack| examples(pack).first())),
        last: number(block.last().and_then(|pack| examples(pack).last())),
        source: Box::new(source),
    })?;
    let Some(scored) = scored else { return Ok(None) };
    let parts = block.iter().zip(&packs).zip(positions.into_iter().zip(scored));
    let records = parts.map(|((range, pack), (positions, captured))| bad::records(examples(range), positions, pack, &captured));
    Ok(Some(records.collect()))
}

/// Proves that the rows already in the cache are this run's first rows. Gives the numbers of those that were left out.
fn check_committed(writer: &CacheWriter, examples: &[Example], cache: &Path) -> Result<Vec<u64>> {
    let mut left_out = Vec::new();
    for (row, (key, example)) in writer.committed_keys()?.into_iter().zip(examples).enumerate() {
        let ours = RowKey::of(&example.input_ids, &example.positions());
        if key == RowKey::of(&example.input_ids, &[]) {
            left_out.push(example.seq_id);
        } else if key != ours {
            let (expected, found) = (ours.to_string(), key.to_string());
            return Err(Error::OtherRow { cache: cache.to_path_buf(), row, expected, found });
        }
    }
    Ok(left_out)
}

fn fill(report: PrecomputeReport, manifest: &Manifest, dataset: Dataset) -> PrecomputeReport {
    PrecomputeReport {
        rows: manifest.rows(),
        tokens: manifest.tokens(),
        scored: manifest.scored(),
        bytes: manifest.bytes(),
        skipped: dataset.fingerprint.skipped,
        first_skipped: dataset.first_skipped,
        truncated_tokens: dataset.truncated_tokens,
        ..report
    }
}
