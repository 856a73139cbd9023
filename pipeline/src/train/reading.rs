//! How a run reads its cache: narrower than it is, as estimates where tokens were drawn, with the tail formed at T where the cache
//! knows how. Refuses, before any weight is read, what a cache cannot give.
//!
//! | cache (after narrowing) | T = 1 | T ≠ 1 |
//! |---|---|---|
//! | exact entries | kept ids and the tail as one bucket | the tail formed at T, where the cache declares `lse_t` at T; else one bucket |
//! | drawn entries | estimate against the student's whole distribution | refused |
//!
//! A tail formed at T is exact where the cache keeps logits, else as exact as its rounded values.
//!
//! Drawn counts estimate probabilities without bias, so a loss must be linear in them: forward KL at temperature 1 with the student's
//! full distribution is, but for the teacher's own entropy, which has no gradient. Its value is therefore not the divergence from the
//! teacher and not to be compared with that of an exact cache; its gradient has the same expectation.

use super::{TrainConfig, TrainError};
use crate::Result;
use crate::loss::{Divergence, LossSettings, Tail};
use potstill_cache::{Cache, Description, Knobs, Selection, SelectionKind, SoftTargets, Storage};
use std::path::Path;

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
}

impl Reading {
    /// How `cache` is read for `loss`, whose tail is chosen here.
    ///
    /// Errors: a selection that the cache's own does not cover, draws with another loss than forward KL at temperature 1.
    pub(super) fn of(config: &TrainConfig, cache: &Cache, loss: &mut LossSettings) -> Result<Self> {
        let description = &cache.manifest().description;
        let own = description.selection;
        // A cache's own selection asks for nothing: the run is the one without these settings.
        let narrower = narrower(config, &description.storage())?.filter(|narrower| *narrower != own);
        if let Some(narrower) = &narrower {
            own.check_narrows_to(narrower)?;
        }
        let drawn = narrower.unwrap_or(own).draws().is_some();
        // Without a distillation term the distributions are not looked at.
        if loss.kd_alpha == 0.0 {
            return Ok(Self { own, narrower, temperature: None, drawn });
        }
        if drawn {
            let loss_is_linear = loss.divergence == Divergence::ForwardKl && loss.temperature == 1.0;
            if !loss_is_linear {
                return Err(drawn_error(config, description, loss).into());
            }
            loss.tail = Tail::StudentFull;
        }
        let temperature = temperature(description, loss.temperature);
        if temperature.is_some() {
            loss.tail = Tail::ExactTail;
        }
        Ok(Self { own, narrower, temperature, drawn })
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
        Ok(Self { own, narrower: (own != wanted).then_some(wanted), temperature, drawn: self.drawn })
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
    pub(super) fn in_words(&self, description: &Description, loss: &LossSettings) -> String {
        let part = description.part.map(|part| format!("; part {} of {} of the data", part.number, part.of)).unwrap_or_default();
        if loss.kd_alpha == 0.0 {
            return format!("the data's tokens{part}");
        }
        let draws = self.own.draws().is_some();
        let what = match &self.narrower {
            Some(narrower) if draws && narrower.draws().is_none() => format!("{narrower} of {}, without its draws", self.own),
            Some(narrower) => format!("{narrower} of {}", self.own),
            None => self.own.to_string(),
        };
        let t = loss.temperature;
        let tail = match (self.drawn, self.temperature) {
            (true, _) => ", as estimates of the whole distribution".to_string(),
            (false, Some(_)) => format!(", the tail formed at temperature {t}"),
            (false, None) if t == 1.0 => ", the tail as one bucket".into(),
            (false, None) => format!(", the tail as one bucket tempered to {t} (known at {:?})", description.lse_temperatures),
        };
        format!("{what}{tail}{part}")
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

fn drawn_error(config: &TrainConfig, description: &Description, loss: &LossSettings) -> TrainError {
    let divergence = match loss.divergence {
        Divergence::ForwardKl => "forward KL",
        Divergence::ReverseKl => "reverse KL",
        Divergence::Jsd { .. } => "Jensen-Shannon divergence",
    };
    TrainError::Drawn {
        cache: config.cache.clone(),
        selection: description.selection,
        found: format!("{divergence} at temperature {}", loss.temperature),
    }
}
