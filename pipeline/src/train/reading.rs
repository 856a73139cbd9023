//! How a run reads its cache: narrower than it is, as estimates where tokens were drawn, with the tail formed at T where the cache
//! knows how. Refuses, before any weight is read, what a cache cannot give.
//!
//! | cache (after narrowing) | T = 1 | T ≠ 1 |
//! |---|---|---|
//! | exact entries | kept ids and the tail as one bucket | the tail formed at T, where the cache declares `lse_t` at T; else one bucket |
//! | drawn entries | estimate against the student's whole distribution | refused |
//!
//! That is the tail `auto`; another one is taken as it is asked for. A tail formed at T is exact where the cache keeps logits, else
//! as exact as its rounded values. A temperature that changes meets no declared one, so all its steps take one bucket. A tail as one
//! bucket at T ≠ 1 is a guess: how far off it can be is worked out for the first rows ([`TailBounds`]), and too much is refused.
//!
//! Drawn counts estimate probabilities without bias, so a loss must be linear in them: forward KL at temperature 1 with the student's
//! full distribution is, but for the teacher's own entropy, which has no gradient: the cross entropy with each drawn token weighted by
//! its count, that is, by importance: p / proposal = 1 (Sparse Logit Sampling, arXiv 2503.16870). Its value is therefore not the
//! divergence from the teacher and not to be compared with that of an exact cache; its gradient has the same expectation.

use super::distillation::{LossPlan, TailName};
use super::{TrainConfig, TrainError};
use crate::loss::{Divergence, LossSettings, Tail, TailBounds};
use crate::{Error, Result};
use potstill_cache::{Cache, Description, Knobs, Selection, SelectionKind, SoftTargets, Storage};
use std::path::Path;

/// Positions of the cache's first rows in which the unknown mass is looked for. Its mean over them has a deviation of at most
/// 0.5 / √10,000 = 0.005 where positions are independent, a tenth of the default bound.
const UNKNOWN_MASS_POSITIONS: u64 = 10_000;
/// Temperatures at which it is looked for where the temperature changes, first and last included.
const UNKNOWN_MASS_TEMPERATURES: u32 = 9;

/// What a cache cannot tell of its teacher at a temperature.
#[derive(Debug, Clone, Copy, PartialEq)]
struct UnknownMass {
    temperature: f64,
    /// Mean over positions of [`TailBounds::unknown`].
    mean: f64,
    positions: u64,
}

/// How distributions are taken from the cache.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Reading {
    /// What the cache keeps.
    own: Selection,
    /// What is read of it, where that is less.
    narrower: Option<Selection>,
    /// Which of the cache's temperatures is the loss's, with the number of them.
    temperature: Option<(usize, usize)>,
    /// Whether counts become estimates.
    drawn: bool,
    /// How far off the tail can be, where it is one bucket at T ≠ 1.
    unknown: Option<UnknownMass>,
}

impl Reading {
    /// How `cache` is read for the losses of `plan`, whose tail is chosen here. Reads the cache's first rows where T ≠ 1.
    ///
    /// Errors: a selection that the cache's own does not cover, draws with another loss than forward KL at temperature 1, a tail that
    /// needs what the cache does not declare, more unknown mass than `config` allows.
    pub(super) fn of(config: &TrainConfig, cache: &Cache, plan: &mut LossPlan) -> Result<Self> {
        let description = &cache.manifest().description;
        let own = description.selection;
        // A cache's own selection asks for nothing: the run is the one without these settings.
        let narrower = narrower(config, &description.storage())?.filter(|narrower| *narrower != own);
        if let Some(narrower) = &narrower {
            own.check_narrows_to(narrower)?;
        }
        let drawn = narrower.unwrap_or(own).draws().is_some();
        let mut reading = Self { own, narrower, temperature: None, drawn, unknown: None };
        // Without a distillation term training does not look at the distributions: nothing is refused. Evaluations do.
        if !plan.distils() {
            let declared = plan.temperature().and_then(|t| temperature(description, t)).filter(|_| !drawn);
            match config.tail {
                TailName::Auto if declared.is_some() => {
                    plan.set_tail(Tail::ExactTail);
                    reading.temperature = declared;
                }
                TailName::None if declared.is_some() => reading.temperature = declared,
                TailName::None if plan.start().needs_lse_t() => plan.set_tail(Tail::Bucket),
                _ => {}
            }
            return Ok(reading);
        }
        if drawn {
            check_drawn(config, description, plan)?;
            plan.set_tail(Tail::StudentFull);
            return Ok(reading);
        }
        let declared = plan.temperature().and_then(|t| temperature(description, t));
        match config.tail {
            TailName::Auto if declared.is_some() => {
                plan.set_tail(Tail::ExactTail);
                reading.temperature = declared;
            }
            TailName::None if plan.temperature() != Some(1.0) => {
                reading.temperature = Some(declared.ok_or_else(|| undeclared(description, plan))?);
            }
            _ => {}
        }
        if plan.start().tail == Tail::Bucket {
            reading.unknown = reading.unknown_mass(cache, plan)?;
            reading.check_unknown(config, declared.is_some(), plan)?;
        }
        Ok(reading)
    }

    /// What the cache's first rows cannot tell, at the temperature of the plan at which that is most; `None` where T = 1 throughout.
    fn unknown_mass(&self, cache: &Cache, plan: &LossPlan) -> Result<Option<UnknownMass>> {
        let vocab = cache.manifest().description.vocab_size as usize;
        let temperatures = plan.temperatures(UNKNOWN_MASS_TEMPERATURES).into_iter().filter(|t| *t != 1.0);
        let mut sums: Vec<(f64, f64)> = temperatures.map(|t| (t, 0.0)).collect();
        if sums.is_empty() {
            return Ok(None);
        }
        let mut positions = 0;
        for row in 0..cache.len() {
            let targets = self.targets(&cache.row(row)?.targets);
            for at in 0..targets.len() {
                let target = targets.position(at);
                sums.iter_mut().for_each(|(t, sum)| *sum += TailBounds::of(target, vocab, *t).unknown());
            }
            positions += targets.len() as u64;
            if positions >= UNKNOWN_MASS_POSITIONS {
                break;
            }
        }
        let most = sums.into_iter().max_by(|a, b| a.1.total_cmp(&b.1));
        Ok(most.map(|(temperature, sum)| UnknownMass { temperature, mean: sum / positions.max(1) as f64, positions }))
    }

    /// Refuses more unknown mass than is allowed.
    fn check_unknown(&self, config: &TrainConfig, declared: bool, plan: &LossPlan) -> Result<()> {
        let Some(unknown) = self.unknown.filter(|unknown| unknown.mean > config.max_unknown_mass) else { return Ok(()) };
        let know = match plan.temperature() {
            Some(_) if declared => "take --tail auto, for the cache declares this temperature,".to_string(),
            Some(t) => format!("precompute with --lse-temperatures {t} or with more entries, take a temperature nearer to 1,"),
            None => "precompute with more entries, take temperatures nearer to 1,".into(),
        };
        Err(TrainError::UnknownMass {
            cache: config.cache.clone(),
            temperature: unknown.temperature,
            unknown: unknown.mean,
            positions: unknown.positions,
            allowed: config.max_unknown_mass,
            remedy: format!("{know} or raise --max-unknown-mass"),
        }
        .into())
    }

    /// What is read here, of another cache that has it: its figures are to be compared with the run's.
    ///
    /// Errors: a cache that keeps less, or does not know the tail at the loss's temperature where the run's own does.
    pub(super) fn of_other(&self, cache: &Cache, path: &Path, loss: &LossSettings) -> Result<Self> {
        let description = &cache.manifest().description;
        let (own, wanted) = (description.selection, self.narrower.unwrap_or(self.own));
        own.check_narrows_to(&wanted)?;
        let temperature = match self.temperature {
            None => None,
            Some(_) => Some(temperature(description, loss.temperature).ok_or_else(|| TrainError::OtherTail {
                cache: path.to_path_buf(),
                expected: loss.temperature,
                found: description.lse_temperatures.clone(),
            })?),
        };
        Ok(Self { own, narrower: (own != wanted).then_some(wanted), temperature, drawn: self.drawn, unknown: None })
    }

    /// Whether the distributions read are estimates from draws.
    pub(super) fn drawn(&self) -> bool {
        self.drawn
    }

    /// What is read of a wider cache.
    pub(super) fn narrower(&self) -> Option<&Selection> {
        self.narrower.as_ref()
    }

    /// What is learned from, in words.
    pub(super) fn in_words(&self, description: &Description, plan: &LossPlan) -> String {
        let part = description.part.map(|part| format!("; part {} of {} of the data", part.number, part.of)).unwrap_or_default();
        if !plan.distils() {
            return format!("the data's tokens{part}");
        }
        let draws = self.own.draws().is_some();
        let what = match &self.narrower {
            Some(narrower) if draws && narrower.draws().is_none() => format!("{narrower} of {}, without its draws", self.own),
            Some(narrower) => format!("{narrower} of {}", self.own),
            None => self.own.to_string(),
        };
        let by = match plan.start().divergence {
            Divergence::ForwardKl => String::new(),
            other => format!("; {other}"),
        };
        format!("{what}{}{by}{part}", self.tail_in_words(description, plan))
    }

    /// How the tail is formed, in words that go on from the selection.
    fn tail_in_words(&self, description: &Description, plan: &LossPlan) -> String {
        let t = plan.temperature_in_words();
        match (plan.start().tail, self.unknown) {
            _ if self.drawn => ", as estimates of the whole distribution".into(),
            (Tail::ExactTail, _) => format!(", the tail formed at temperature {t}"),
            (Tail::Renorm, _) => ", without the tail, both renormalised".into(),
            (Tail::StudentFull, _) => ", the teacher renormalised without the tail".into(),
            (Tail::None, _) => ", without the tail, not renormalised (biased)".into(),
            (Tail::Bucket, None) => ", the tail as one bucket".into(),
            // The figure first: a table cuts what is long.
            (Tail::Bucket, Some(unknown)) => format!(
                ", the tail as one bucket (up to {:.4} unknown) tempered to {t}; known at {:?}, mean of {} positions",
                unknown.mean, description.lse_temperatures, unknown.positions
            ),
        }
    }

    /// A row's targets as the loss takes them.
    pub(super) fn targets(&self, stored: &SoftTargets) -> SoftTargets {
        let narrowed = self.narrower.as_ref().map(|selection| stored.narrowed_from(&self.own, selection));
        match self.drawn {
            true => narrowed.as_ref().unwrap_or(stored).estimate(),
            false => narrowed.unwrap_or_else(|| stored.clone()),
        }
    }

    /// ln Z_T of every position, where the loss needs it.
    pub(super) fn lse_t(&self, targets: &SoftTargets) -> Option<Vec<f32>> {
        let (at, of) = self.temperature?;
        Some(targets.lse_t().chunks_exact(of).filter_map(|all| all.get(at).copied()).collect())
    }
}

/// Where the cache's ln Σ p^(1/T) for this temperature stands.
fn temperature(description: &Description, temperature: f64) -> Option<(usize, usize)> {
    let declared = &description.lse_temperatures;
    declared.iter().position(|t| *t == temperature as f32).map(|at| (at, declared.len()))
}

/// What the settings ask to be read of a cache that is stored so; `None` for all of it.
fn narrower(config: &TrainConfig, has: &Storage) -> Result<Option<Selection>> {
    let (min_prob, min_mass) = (config.min_prob.map(|p| p as f32), config.min_mass.map(|mass| mass as f32));
    let by_rule = min_prob.is_some() || min_mass.is_some();
    if config.top_k.is_none() && !by_rule {
        return Ok(None);
    }
    // Draws cannot be made fewer: what is less than a drawn cache is its head.
    let own_rule = matches!(has.selection, Selection::Cutoff { .. });
    let kind = if by_rule || own_rule { SelectionKind::Cutoff } else { SelectionKind::TopK };
    let top_k = config.top_k.or(Some(has.selection.max_entries()));
    let knobs = Knobs { selection: Some(kind), top_k, min_prob, min_mass, ..Knobs::default() };
    Ok(Some(has.with(&knobs)?.selection))
}

/// Refuses losses that drawn tokens give no unbiased gradient of.
fn check_drawn(config: &TrainConfig, description: &Description, plan: &LossPlan) -> Result<()> {
    let divergence = plan.start().divergence;
    let whole = matches!(config.tail, TailName::Auto | TailName::StudentFull);
    if divergence == Divergence::ForwardKl && plan.temperature() == Some(1.0) && whole {
        return Ok(());
    }
    let tail = if whole { String::new() } else { format!(", tail {}", plan.start().tail.name()) };
    let found = format!("{divergence} at temperature {}{tail}", plan.temperature_in_words());
    Err(TrainError::Drawn { cache: config.cache.clone(), selection: description.selection, found }.into())
}

/// The unnormalised loss at a temperature whose ln Z_T is not there.
fn undeclared(description: &Description, plan: &LossPlan) -> Error {
    let (t, known) = (plan.temperature_in_words(), &description.lse_temperatures);
    let expected =
        format!("bucket, renorm or studentfull at temperature {t}: none needs ln Σ p^(1/T), which the cache knows at {known:?}");
    Error::Setting { name: "tail", found: "none".into(), expected }
}
