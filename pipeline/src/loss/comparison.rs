//! Owns a student's row of logits beside a teacher's distribution, for measuring: any divergence, at temperature 1, from one pass over the
//! row. Refuses gradients and weights. The same coarse distributions and terms as in training, so figures are comparable with losses.

use super::coarse::{self, Rest, log_sum_exp};
use super::row::Split;
use super::{Batch, Divergence, LossSettings, divergence};
use crate::Result;
use potstill_cache::SoftTargets;

/// One position: the student's whole distribution, and both sides' coarse ones.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// ln Σ exp z over the student's vocabulary.
    lse: f64,
    /// −ln q of the label, nats.
    ce: f64,
    /// ln P and ln Q over the kept ids and, last, the rest where there is one; both normalised. Empty without a teacher.
    ln_p: Vec<f64>,
    ln_q: Vec<f64>,
    /// Kept ids.
    kept: usize,
}

impl Comparison {
    /// A row of logits `z` `[V]`, which is used up, with its next token and what is kept of the teacher's distribution there (one position,
    /// exact entries). Errors: as [`rows`](super::rows).
    pub fn of(z: &mut [f32], label: u32, target: Option<&SoftTargets>) -> Result<Self> {
        let settings = LossSettings::default();
        let labels = [label];
        let batch = Batch { labels: &labels, targets: target, lse_t: None, settings: &settings, scale: 0.0 };
        batch.check(z.len())?;
        let logit = z.get(label as usize).copied().map_or(f64::NAN, f64::from);
        let target = target.map(|one| one.position(0));
        let ids = target.map_or(&[][..], |target| target.ids);
        let split = Split::take(z, ids, 0, &batch)?;
        let lse = log_sum_exp(&[log_sum_exp(&split.kept), split.rest()]);
        let (mut ln_p, mut ln_q) = (Vec::new(), Vec::new());
        if let Some(target) = target {
            let rest = if ids.len() == z.len() { Rest::Nothing } else { Rest::Entry };
            ln_p = coarse::teacher(target, None, &settings, rest, 0)?;
            ln_q = coarse::student(&split.kept, (rest == Rest::Entry).then(|| split.rest()), 1.0);
        }
        Ok(Self { lse, ce: lse - logit, ln_p, ln_q, kept: ids.len() })
    }

    /// ln Σ exp z.
    pub fn log_sum_exp(&self) -> f64 {
        self.lse
    }

    /// −ln q(label), nats.
    pub fn cross_entropy(&self) -> f64 {
        self.ce
    }

    /// The divergence of the coarse distributions; 0 without a teacher.
    pub fn divergence(&self, kind: Divergence) -> f64 {
        divergence::evaluate(kind, &self.ln_p, &self.ln_q, &mut Vec::with_capacity(self.ln_q.len()))
    }

    /// Σ min(p, q) over the coarse distributions, and over the kept ids alone: between the two lies that of the whole distributions.
    pub fn overlap(&self) -> (f64, f64) {
        let least = |(p, q): (&f64, &f64)| p.min(*q).exp();
        let kept = self.ln_p.iter().zip(&self.ln_q).take(self.kept).map(least).sum();
        (self.ln_p.iter().zip(&self.ln_q).map(least).sum(), kept)
    }

    /// P and Q of the kept ids together.
    pub fn kept_mass(&self) -> (f64, f64) {
        let mass = |ln: &[f64]| ln.iter().take(self.kept).map(|ln| ln.exp()).sum();
        (mass(&self.ln_p), mass(&self.ln_q))
    }
}
