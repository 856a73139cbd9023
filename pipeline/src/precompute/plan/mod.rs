//! STAGE ONE, FORESEEN: what a run over this data by this teacher will take, before a day of it is spent. Writes nothing.
//!
//! The one idea: nothing is said by a formula that can be tried. All data are encoded, so conversations, tokens and scored positions are
//! those of the run. The teacher scores some conversations for some seconds, by the run's own code; that is the speed. What it said
//! of them is stored by the cache's own encoder and zstd, once for each way to store; those are the sizes. Only memory is a sum of
//! shapes (`memory.rs`), since the run's largest moment comes later.

mod memory;
mod sample;
mod sizes;

pub use memory::{Memory, MemoryPart, Moment, PlannedMemory};
pub use sample::Measured;
pub use sizes::{ComparedSize, PlannedSize, TypicalSize};

use super::block::Plan;
use super::opening::Opened;
use super::{PrecomputeConfig, description};
use crate::data::{self, Example};
use crate::model::ModelError;
use crate::model::config::Quantization;
use crate::model::stored::StoredBytes;
use crate::model::weights::Weights;
use crate::run::RunContext;
use crate::teacher::{Residency, Teacher};
use crate::{Error, Result};
use memory::MemorySettings;
use potstill_cache::{Description, Extent, Part, free_bytes};
use sample::Sample;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Whether the teacher is asked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Measure {
    /// It scores conversations for about so long, at least one of them.
    For(Duration),
    /// It is not: nothing is known of its speed, and sizes are those of other distributions.
    No,
}

/// What is to be planned.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanConfig {
    /// The run.
    pub run: PrecomputeConfig,
    /// Whether the teacher is asked.
    pub measure: Measure,
    /// The k that sizes are compared at.
    pub compare_k: Vec<u16>,
}

/// What a run will take.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlanReport {
    /// Conversations in the data, those among them that are skipped and those of other shares.
    pub data_rows: u64,
    /// What the run scores: conversations, tokens, scored positions.
    pub extent: Extent,
    /// The share of the data that this is, where it is not all.
    pub part: Option<Part>,
    /// Skipped conversations of all data by reason.
    pub skipped: BTreeMap<String, u64>,
    /// The first skipped conversation of each reason: `file:line`.
    pub first_skipped: BTreeMap<String, String>,
    /// Tokens of the longest conversation.
    pub longest: u64,
    /// Conversations of all data that are cut to the longest length allowed.
    pub truncated_rows: u64,
    /// Tokens that are cut away.
    pub truncated_tokens: u64,
    /// Shards.
    pub shards: u64,
    /// How the teacher's layers are stored.
    pub weights: &'static str,
    /// Bytes of its tensors.
    pub stored: StoredBytes,
    /// What was measured; nothing where the teacher was not asked.
    pub measured: Option<Measured>,
    /// Seconds that scoring all of it takes on this machine, by that measurement.
    pub seconds: Option<f64>,
    /// The cache as it is set.
    pub size: Option<PlannedSize>,
    /// The same data stored otherwise.
    pub compared: Vec<ComparedSize>,
    /// Of the first k ids, how much of the distributions they make up.
    pub kept_mass: BTreeMap<u16, f64>,
    /// What caches of other distributions took, where this teacher was not asked.
    pub typical: Vec<TypicalSize>,
    /// What it needs in memory.
    pub memory: PlannedMemory,
    /// What it needs on disk beside its shards, and what there is.
    pub disk: Disk,
}

/// Where a cache is to lie.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Disk {
    /// The nearest folder that is there.
    pub folder: PathBuf,
    /// Bytes that may be written there; nothing where the system does not say.
    pub free: Option<u64>,
    /// Bytes of the tokenizer, which lies in the cache.
    pub tokenizer: u64,
    /// Most bytes that are there twice while a shard is joined from its pieces.
    pub joining: Option<u64>,
}

impl Disk {
    /// Bytes that a cache with shards of so many needs at the most, its manifest apart.
    pub fn needs(&self, shards: u64) -> u64 {
        shards + self.tokenizer + self.joining.unwrap_or(0)
    }
}

/// Looks ahead at the run that `config` describes.
///
/// Errors: as [`run`](super::run) before it loads the teacher, and as scoring; a k to compare that is no number of the tokenizer's ids; with
/// [`Measure::For`] a folder without weights.
pub fn plan(config: &PlanConfig, context: &RunContext) -> Result<PlanReport> {
    if config.run.part.is_some() {
        // Refuses a worker beside it.
        config.run.placed()?;
    }
    // A worker's folder is none of a plan's business; its share is.
    let part = config.run.worker.map(|worker| worker.share()).or(config.run.part);
    let run = &PrecomputeConfig { part, worker: None, ..config.run.clone() };
    let opened = Opened::of(run, context)?;
    check_compared(&config.compare_k, opened.width)?;
    let weights = weights(run, config.measure)?;
    if let Some(weights) = &weights {
        Teacher::check_folder(&run.teacher, &opened.model, weights, opened.width)?;
    }
    let stored = StoredBytes::of(&opened.model, weights.as_ref());
    let extent = extent(&opened.dataset.examples);
    let (loaded, available) = (crate::memory::resident(), crate::memory::available_on(&opened.device));
    let on_disk = weights.as_ref().map_or(stored.total, Weights::total_bytes);
    let (mut sample, mut sizes) = (None, sizes::Sizes::default());
    if let (Measure::For(time), Some(weights)) = (config.measure, &weights)
        && extent.rows > 0
    {
        let fingerprint = description::unread(run, (&opened.model, weights))?;
        let description = description::describe(run, &opened.storage, fingerprint, &opened.tokenizer, &opened.dataset)?;
        let description = Description { part: opened.part, ..description };
        let plan = Plan::new(run, (&opened.storage, &opened.model), on_disk, available);
        let found = Sample::take(run, &opened, &plan, (time, &config.compare_k), context)?;
        sizes = sizes::Sizes::of(&found, &description, &extent, &config.compare_k, context)?;
        sample = Some(found);
    } else if config.measure == Measure::No {
        sizes.typical = sizes::typical(&extent);
    }
    let measured = sample.map(|sample| sample.measured);
    let seconds = measured.as_ref().map(|measured| measured.seconds_for(&extent) + sizes.storing_seconds);
    let kept = sizes.size.as_ref().map(|size| size.per_scored_in_memory);
    let memory = memories(run, &opened, (&stored, on_disk), (&extent, loaded, available), (measured.as_ref(), kept));
    let joining = sizes.size.as_ref().map(|size| size.estimate.largest_shard);
    let sizes::Sizes { size, compared, kept_mass, typical, .. } = sizes;
    Ok(PlanReport {
        data_rows: opened.dataset.fingerprint.rows,
        extent,
        part: opened.part,
        longest: opened.dataset.examples.iter().map(|e| e.input_ids.len() as u64).max().unwrap_or(0),
        truncated_rows: opened.dataset.truncated_rows,
        truncated_tokens: opened.dataset.truncated_tokens,
        shards: extent.rows.div_ceil(run.rows_per_shard.into()),
        weights: if opened.model.quantization == Quantization::None { "dense" } else { "AWQ int4" },
        stored,
        measured,
        seconds,
        size,
        compared,
        kept_mass,
        typical,
        memory,
        disk: Disk { joining, ..disk(run)? },
        skipped: opened.dataset.fingerprint.skipped,
        first_skipped: opened.dataset.first_skipped,
    })
}

/// Memory in both ways to hold weights. Streamed, a block is as long as the run would make it.
fn memories(
    run: &PrecomputeConfig,
    opened: &Opened,
    (stored, on_disk): (&StoredBytes, u64),
    (extent, loaded, available): (&Extent, Option<u64>, Option<u64>),
    (measured, kept): (Option<&Measured>, Option<f64>),
) -> PlannedMemory {
    let plan = |run: &PrecomputeConfig| Plan::new(run, (&opened.storage, &opened.model), on_disk, available);
    let streamed = PrecomputeConfig { residency: Some(Residency::Streamed), ..run.clone() };
    let block = plan(&streamed).most_tokens(run.pack_tokens.into());
    // Half the time that a kill may cost is a block's, as in the run.
    let in_time = measured.map(|measured| (measured.tokens_per_second * run.seal_interval().as_secs_f64() / 2.0) as u64);
    let block = in_time.filter(|_| run.block_tokens.is_none()).map_or(block, |tokens| block.min(tokens)).min(extent.tokens);
    let largest = largest_pack(&opened.dataset.examples, run);
    let memory = |residency| {
        let settings = MemorySettings { residency, largest, block, extent: *extent, loaded, kept };
        memory::memory(opened, run, stored, &settings)
    };
    PlannedMemory {
        chosen: plan(run).residency,
        available,
        resident: memory(Residency::Resident),
        streamed: memory(Residency::Streamed),
    }
}

/// The weights' headers. A plan that asks no teacher also does without them where the folder has none.
fn weights(run: &PrecomputeConfig, measure: Measure) -> Result<Option<Weights>> {
    match Weights::open(&run.teacher) {
        Err(ModelError::WeightsMissing { .. }) if measure == Measure::No => Ok(None),
        opened => Ok(Some(opened?)),
    }
}

fn check_compared(compared: &[u16], width: u32) -> Result<()> {
    match compared.iter().find(|k| **k == 0 || u32::from(**k) > width) {
        Some(k) => {
            let expected = format!("1 to the tokenizer's {width} ids");
            Err(Error::Setting { name: "compare_k", found: k.to_string(), expected })
        }
        None => Ok(()),
    }
}

fn extent(examples: &[Example]) -> Extent {
    Extent {
        rows: examples.len() as u64,
        tokens: examples.iter().map(|e| e.input_ids.len() as u64).sum(),
        scored: examples.iter().map(Example::scored_positions).sum(),
    }
}

/// Tokens of the largest pack.
fn largest_pack(examples: &[Example], run: &PrecomputeConfig) -> u64 {
    let packs = super::packs(examples, 0, run);
    let tokens = |pack: &std::ops::Range<usize>| examples[pack.clone()].iter().map(|e| e.input_ids.len() as u64).sum();
    packs.iter().map(tokens).max().unwrap_or(0)
}

/// Where the cache would lie; the current folder where none is named.
fn disk(run: &PrecomputeConfig) -> Result<Disk> {
    let named = run.cache.as_path();
    if named.is_file() {
        let expected = "a folder, or a place for one: this is a file".into();
        return Err(Error::Setting { name: "cache", found: named.display().to_string(), expected });
    }
    let there = named.ancestors().find(|folder| folder.is_dir()).filter(|folder| !folder.as_os_str().is_empty());
    let folder = there.unwrap_or(Path::new(".")).to_path_buf();
    let file = run.teacher.join("tokenizer.json");
    let tokenizer = std::fs::metadata(&file).map_err(|source| ModelError::Io { path: file, source })?.len();
    debug_assert!(tokenizer <= data::MAX_TOKENIZER_BYTES);
    Ok(Disk { free: free_bytes(&folder), folder, tokenizer, joining: None })
}
