//! Which run this is: every setting that decides the adapter's bits, as names and values to compare and to show.
//!
//! Where a checkpoint's identity differs, continuing from it would give an adapter that no single command describes. Settings
//! that change nothing (device, folders, how often a checkpoint is written, how many logits exist at once) are left out.

use super::distillation::LossPlan;
use super::reading::Reading;
use super::rows::Rows;
use super::schedule::Schedule;
use super::{TrainConfig, TrainError};
use crate::Result;
use crate::kernel::{Isa, Precision};
use crate::model::config::ModelConfig;
use crate::model::weights::Weights;
use crate::run::RunContext;
use potstill_cache::MANIFEST_FILE;
use std::collections::BTreeMap;
use std::path::Path;

/// Names and values.
pub(super) type Identity = BTreeMap<String, String>;

/// The identity of a run of `total` steps by so many ranks.
pub(super) fn of(
    config: &TrainConfig,
    (plan, reading): (&LossPlan, Option<&Reading>),
    rows: &Rows,
    (total, ranks): (u64, u32),
    context: &RunContext,
) -> Result<Identity> {
    let student = Weights::open(&config.student)?.fingerprint(context)?;
    let mut identity: Identity = [
        ("student_blake3", student),
        ("student_config_blake3", ModelConfig::fingerprint(&config.student)?),
        ("objective", config.objective.to_string()),
        ("kd_alpha", plan.start().kd_alpha.to_string()),
        ("kd_ce_alpha", plan.start().kd_ce_alpha.to_string()),
        ("batch_size", config.batch_size.to_string()),
        // Sums over packs are added in the packs' order, so other packs give other last bits.
        ("pack_tokens", config.pack_tokens.to_string()),
        ("compute", format!("{:?}", config.compute).to_lowercase()),
        ("lr", config.lr.to_string()),
        ("optimizer", config.optimizer.to_string()),
        ("schedule", format!("{:?}", config.schedule).to_lowercase()),
        ("warmup_steps", config.warmup_steps.to_string()),
        ("rank", config.rank.to_string()),
        ("alpha", config.alpha.to_string()),
        ("rslora", config.rslora.to_string()),
        ("target_modules", config.target_modules.to_string()),
        ("dropout", config.dropout.to_string()),
        ("weight_decay", config.weight_decay.to_string()),
        ("beta1", config.beta1.to_string()),
        ("beta2", config.beta2.to_string()),
        ("eps", config.eps.to_string()),
        ("max_grad_norm", config.max_grad_norm.to_string()),
        ("seed", config.seed.to_string()),
        ("shuffle", config.shuffle.to_string()),
    ]
    .into_iter()
    .chain(rows.identity(config)?)
    .map(|(name, value)| (name.to_string(), value))
    .collect();
    if ranks > 1 {
        // They are added up rank by rank, too.
        identity.insert("ranks".into(), ranks.to_string());
    }
    if let Some(narrower) = reading.filter(|_| plan.distils()).and_then(Reading::narrower) {
        identity.insert("selection".into(), narrower.to_string());
    }
    if config.compute == Precision::Bf16 {
        // A processor that multiplies pairs adds up otherwise than one that multiplies the same values as f32.
        identity.insert("bf16_products".into(), bf16_products(Isa::best()).into());
    }
    identity.extend(plan.identity(config).into_iter().map(|(name, value)| (name.to_string(), value)));
    // What is held out is not learned from, and decides which adapter is the best.
    if config.eval_rows > 0 {
        identity.insert("eval_rows".into(), config.eval_rows.to_string());
    }
    if let Some(cache) = &config.eval_cache {
        identity.insert("eval_cache_blake3".into(), digest(cache)?);
    }
    // Patience is left out as the number of steps is: it says where a run ends, and a run may be made longer.
    if config.evaluates() {
        identity.insert("eval_every".into(), config.eval_every.to_string());
    }
    // A constant rate and loss do not look at the end, so such a run may be made longer.
    if config.schedule != Schedule::Constant || !plan.is_constant() {
        identity.insert("steps".into(), total.to_string());
        identity.insert("min_lr_ratio".into(), config.min_lr_ratio.to_string());
    }
    if config.schedule == Schedule::Wsd {
        identity.insert("decay_steps".into(), config.rates(total).decay_steps.to_string());
    }
    Ok(identity)
}

/// How products of values rounded to bf16 are formed.
fn bf16_products(isa: Isa) -> &'static str {
    if isa.multiplies_pairs() { "pairs" } else { "f32" }
}

/// BLAKE3 (hex) of a cache's manifest, which names everything in it by its digest.
pub(super) fn digest(cache: &Path) -> Result<String> {
    let path = cache.join(MANIFEST_FILE);
    let manifest = std::fs::read(&path).map_err(|source| TrainError::Io { path, source })?;
    Ok(blake3::hash(&manifest).to_hex().to_string())
}

/// What differs, each as `said` of name, our value and theirs, joined; `None` when nothing does.
pub(super) fn differences(ours: &Identity, theirs: &Identity, said: impl Fn(&str, &str, &str) -> String) -> Option<String> {
    let names: std::collections::BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
    let show = |identity: &Identity, name: &String| identity.get(name).cloned().unwrap_or_else(|| "nothing".into());
    let different: Vec<String> = names
        .into_iter()
        .filter(|name| ours.get(*name) != theirs.get(*name))
        .map(|name| said(name, &show(ours, name), &show(theirs, name)))
        .collect();
    (!different.is_empty()).then(|| different.join("; "))
}
