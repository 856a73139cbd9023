//! What an adapter's folder tells of the run that made it: PEFT's configuration, the facts of its card, and `distill_run.json`.
//!
//! Owns the wording; refuses to tell times, hosts and paths of this machine, so that a resumed run writes the bytes of one that was
//! never interrupted, and a folder can be given away. (PEFT itself needs the base model's place: a name on the hub, else a path.)

use super::TrainConfig;
use super::checkpoint::Progress;
use super::distillation::LossPlan;
use super::identity::Identity;
use super::rows::Rows;
use crate::adapter::{self, AdapterConfig, LearnedFrom, Surroundings};
use crate::loss::LossSettings;
use crate::student::Student;
use crate::{Result, hub};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Version of `distill_run.json`.
const FORMAT_VERSION: u32 = 1;
/// Most data files that a card names.
const FILES_NAMED: usize = 3;

/// What is known of a run from its start.
#[derive(Debug)]
pub(super) struct Provenance {
    base: PathBuf,
    adapter: AdapterConfig,
    learned_from: LearnedFrom,
    facts: Vec<(String, String)>,
    run: Value,
    identity: Identity,
}

impl Provenance {
    /// Of a run that learns from these rows by these losses; `targets` says in words what is read of them.
    pub(super) fn of(config: &TrainConfig, (plan, targets): (&LossPlan, &str), rows: &Rows, identity: Identity) -> Self {
        let name = hub::name_of(&config.student);
        let revision = name.as_ref().and_then(|_| last_name(&config.student));
        let lora = config.lora();
        let adapter = AdapterConfig {
            rank: lora.rank,
            alpha: lora.alpha,
            scaling: lora.scaling,
            dropout: lora.dropout,
            base_model: name.unwrap_or_else(|| config.student.display().to_string()),
            revision,
            target_modules: lora.targets.names().into_iter().map(String::from).collect(),
        };
        let cache = rows.cache().map(|cache| cache.manifest()).map(|manifest| {
            json!({
                "id": manifest.description.digest(),
                "rows": manifest.rows(),
                "tokens": manifest.tokens(),
                "scored": manifest.scored(),
                "description": &manifest.description,
            })
        });
        let mut run = json!({
            "format_version": FORMAT_VERSION,
            "program": format!("potstill {}", env!("CARGO_PKG_VERSION")),
            "cache": cache,
            "data": rows.data(),
            "learned_from": targets,
            "loss": plan.start(),
            "settings": identity,
        });
        if !plan.is_constant() {
            run["loss_at_last"] = json!(plan.end());
        }
        let facts = facts(config, (plan, targets), rows);
        Self { base: config.student.clone(), adapter, learned_from: learned_from(plan), facts, run, identity }
    }

    /// Every setting that decides the adapter's bits.
    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Writes the PEFT folder of the student's adapter.
    pub(super) fn save(&self, folder: &Path, student: &Student, progress: &Progress) -> Result<()> {
        let mut facts = self.facts.clone();
        facts.push(fact("steps", progress.step));
        facts.push(fact("tokens seen", progress.tokens));
        facts.push(fact("loss at last (nats a scored position)", format!("{:.4}", progress.last_loss())));
        let held_out = progress.standing.figures(progress.step);
        facts.extend(held_out.iter().map(|(name, value)| fact(&format!("{name}, held out"), format!("{value:.4}"))));
        let mut run = self.run.clone();
        run["progress"] = json!({
            "steps": progress.step,
            "tokens": progress.tokens,
            "first_loss": progress.first_loss(),
            "last_loss": progress.last_loss(),
        });
        run["held_out"] = Value::Object(held_out.into_iter().map(|(name, value)| (name.into(), json!(value))).collect());
        let surroundings = Surroundings { base: &self.base, learned_from: self.learned_from, facts: &facts, run: Some(&run) };
        adapter::save(folder, &self.adapter, &student.parameters(), &surroundings)?;
        Ok(())
    }
}

/// The card's facts that are known from the start.
fn facts(config: &TrainConfig, (plan, targets): (&LossPlan, &str), rows: &Rows) -> Vec<(String, String)> {
    let data = rows.data();
    let files: Vec<&str> = data.files.iter().map(|file| file.name.as_str()).collect();
    let more = files.len().saturating_sub(FILES_NAMED);
    let named = files.iter().take(FILES_NAMED).copied().collect::<Vec<_>>().join(", ");
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    let description = rows.cache().map(|cache| &cache.manifest().description);
    let mut facts = vec![
        fact("objective", config.objective),
        fact("loss", in_words(plan)),
        fact("data", format!("{named}{more}; {} conversations", data.rows)),
    ];
    if let Some(description) = description.filter(|_| plan.distils()) {
        let teacher = &description.teacher;
        facts.push(fact("teacher", format!("{} ({}), weights BLAKE3 {}", teacher.name, teacher.weights, teacher.weights_blake3)));
        facts.push(fact("learned from", targets));
        facts.push(fact("k (entries kept of a distribution, at most)", description.selection.max_entries()));
        facts.push(fact("temperature", change(plan.start().temperature, plan.end().temperature)));
    }
    facts.extend(description.map(|description| fact("cache id", description.digest())));
    let warm_up = format!("{} steps of warm-up", config.warmup_steps);
    let schedule = format!("{:?}", config.schedule).to_lowercase();
    facts.push(fact("learning rate", format!("{}, {schedule} after {warm_up}", config.lr)));
    facts.push(fact("conversations in a step", config.batch_size));
    facts.push(fact(
        "longest conversation",
        format!("{} tokens", description.map_or(config.max_length, |d| d.encoding.max_length)),
    ));
    facts.push(fact("largest gradient norm", config.max_grad_norm));
    facts.push(fact("seed", config.seed));
    facts
}

/// Which terms any step has.
fn learned_from(plan: &LossPlan) -> LearnedFrom {
    match (plan.distils(), plan.start().kd_ce_alpha > 0.0 || plan.end().kd_ce_alpha > 0.0) {
        (true, true) => LearnedFrom::Both,
        (true, false) => LearnedFrom::Teacher,
        (false, _) => LearnedFrom::Tokens,
    }
}

/// The loss as a sum of its weighted terms, those that any step has.
fn in_words(plan: &LossPlan) -> String {
    let (start, end) = (plan.start(), plan.end());
    let terms = [
        (start.kd_alpha, end.kd_alpha, format!("T² · {}", divergence(start))),
        (start.kd_ce_alpha, end.kd_ce_alpha, "cross entropy".into()),
    ];
    let terms = terms.into_iter().filter(|(from, to, _)| *from > 0.0 || *to > 0.0);
    let term = |(from, to, term)| match from == to {
        true => format!("{from} · {term}"),
        false => format!("({}) · {term}", change(from, to)),
    };
    terms.map(term).collect::<Vec<_>>().join(" + ")
}

/// A value, with that of the last step where it is another.
fn change(from: f64, to: f64) -> String {
    if from == to { from.to_string() } else { format!("{from} -> {to}") }
}

/// The divergence by the name that settings have for it, with its parameters: `forward_kl`, `jsd (beta 0.5)`.
fn divergence(loss: &LossSettings) -> String {
    let Ok(Value::Object(mut fields)) = serde_json::to_value(loss.divergence) else { return String::new() };
    let kind = fields.remove("kind").and_then(|kind| kind.as_str().map(String::from)).unwrap_or_default();
    let parameters: Vec<String> = fields.iter().map(|(name, value)| format!("{name} {value}")).collect();
    if parameters.is_empty() { kind } else { format!("{kind} ({})", parameters.join(", ")) }
}

/// The folder's own name; of a snapshot in a Hugging Face cache this is the commit.
fn last_name(folder: &Path) -> Option<String> {
    Some(folder.canonicalize().ok()?.file_name()?.to_str()?.to_string())
}

fn fact(name: &str, value: impl ToString) -> (String, String) {
    (name.to_string(), value.to_string())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::train::Objective;

    #[test]
    fn a_loss_that_changes_is_told_with_both_ends() {
        let told = |config: TrainConfig| {
            let plan = config.loss_plan().unwrap();
            (in_words(&plan), learned_from(&plan))
        };
        let plain = |objective| TrainConfig { objective, ..TrainConfig::default() };
        let (kd, ce) = ("T² · forward_kl", "cross entropy");
        assert_eq!(told(plain(Objective::Sft)), (format!("1 · {ce}"), LearnedFrom::Tokens));
        assert_eq!(told(plain(Objective::Distill)), (format!("1 · {kd}"), LearnedFrom::Teacher));
        assert_eq!(told(plain(Objective::DistillSft)), (format!("0.5 · {kd} + 0.5 · {ce}"), LearnedFrom::Both));
        let late = TrainConfig { kd_alpha_end: Some(1.0), ..plain(Objective::Sft) };
        assert_eq!(told(late), (format!("(0 -> 1) · {kd} + 1 · {ce}"), LearnedFrom::Both));
        let falling = TrainConfig { kd_alpha_end: Some(0.0), kd_ce_alpha_end: Some(1.0), ..plain(Objective::Distill) };
        assert_eq!(told(falling), (format!("(1 -> 0) · {kd} + (0 -> 1) · {ce}"), LearnedFrom::Both));
        assert_eq!((change(4.0, 1.5), change(2.0, 2.0)), ("4 -> 1.5".into(), "2".into()));
    }
}
