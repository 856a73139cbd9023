//! Owns the kernel of one row: logits in, loss terms out, gradient in the logits' place. Refuses to allocate by the vocabulary.
//!
//! With s the coarse logits (kept z_i / T and the rest's), Q their softmax and g_i = dL / d ln Q_i:
//! dL/ds_i = g_i − Q_i Σ g, a kept logit gets ds_i / T, and another one ds_rest / T times its share of the rest: the
//! softmax over the others of z (bucket, formed at T = 1) or of z / T (exact_tail, studentfull and none).

use super::coarse::{self, Rest, log_sum_exp};
use super::{Batch, LossError, Tail, divergence, exponential};
use potstill_cache::Target;

/// A row's loss terms in nats, unweighted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    pub(super) kd: f64,
    pub(super) ce: f64,
}

/// The kept logits, taken out of a row, and sums over those that stay.
pub(super) struct Split {
    pub(super) kept: Vec<f64>,
    /// The others' largest logit; −∞ when there are none.
    largest: f32,
    /// Σ exp(z − largest) over the others.
    sum: f64,
    /// Σ exp((z − largest) / T) over the others, where the tail is formed at T ≠ 1.
    tempered: Option<f64>,
}

/// How strongly the divergence pulls: on each kept logit, and on the others as a whole.
struct Pull {
    kept: Vec<f64>,
    rest: f64,
}

/// Computes row `row` of the batch from its logits `z` `[V]` and leaves d(total · scale) / dz there.
pub(super) fn differentiate(z: &mut [f32], row: usize, batch: &Batch<'_>) -> Result<Terms, LossError> {
    let label = batch.labels[row] as usize;
    let label_logit = f64::from(z[label]);
    let target = batch.targets.map(|targets| targets.position(row));
    let ids = target.map_or(&[][..], |target| target.ids);
    let split = Split::take(z, ids, row, batch)?;
    let lse = log_sum_exp(&[log_sum_exp(&split.kept), split.rest()]);
    let (kd, pull) = match target {
        Some(target) => pull(target, &split, z.len(), row, batch)?,
        None => (0.0, Pull { kept: Vec::new(), rest: 0.0 }),
    };
    let ce_weight = batch.scale * batch.settings.kd_ce_alpha;
    split.replace(z, ce_weight * (f64::from(split.largest) - lse).exp(), pull.rest, batch);
    for ((&id, &logit), pull) in ids.iter().zip(&split.kept).zip(&pull.kept) {
        z[id as usize] = (ce_weight * (logit - lse).exp() + pull) as f32;
    }
    // The label's share q − 1 is formed in f64: at q near 1 an f32 difference would lose it.
    let certain = ce_weight * (label_logit - lse).exp_m1();
    z[label] = match ids.iter().position(|id| *id as usize == label) {
        Some(i) => (certain + pull.kept.get(i).copied().unwrap_or_default()) as f32,
        None => (certain + split.share_of_rest(label_logit, pull.rest, batch)) as f32,
    };
    Ok(Terms { kd, ce: lse - label_logit })
}

/// The divergence of a row and its pull on the logits, with weight, T² and scale.
fn pull(target: Target<'_>, split: &Split, vocab: usize, row: usize, batch: &Batch<'_>) -> Result<(f64, Pull), LossError> {
    let settings = batch.settings;
    let t = settings.temperature;
    let rest = match settings.tail {
        Tail::Renorm => Rest::Nothing,
        _ if target.ids.len() == vocab => Rest::Nothing,
        _ => Rest::Entry,
    };
    let ln_p = coarse::teacher(target, batch.lse_t.and_then(|l| l.get(row).copied()), settings, rest, row)?;
    let ln_q = coarse::student(&split.kept, (rest == Rest::Entry).then(|| split.rest_at(t)), t);
    let mut slope = Vec::with_capacity(ln_q.len());
    let kd = match settings.tail {
        Tail::None => divergence::unnormalised(&ln_p, &ln_q, &mut slope),
        _ => divergence::evaluate(settings.divergence, &ln_p, &ln_q, &mut slope),
    };
    // d(kd_alpha T² L) / dz = kd_alpha T² · dL/ds / T.
    let weight = batch.scale * settings.kd_alpha * t;
    let total: f64 = slope.iter().sum();
    let mut kept: Vec<f64> = slope.iter().zip(&ln_q).map(|(g, ln_q)| weight * (g - ln_q.exp() * total)).collect();
    let rest = if rest == Rest::Entry { kept.pop().unwrap_or_default() } else { 0.0 };
    Ok((kd, Pull { kept, rest }))
}

impl Split {
    /// Takes the kept logits out of the row (−∞ stays behind) and sums over the others.
    pub(super) fn take(z: &mut [f32], ids: &[u32], row: usize, batch: &Batch<'_>) -> Result<Split, LossError> {
        let mut kept = Vec::with_capacity(ids.len());
        for &id in ids {
            kept.push(f64::from(std::mem::replace(&mut z[id as usize], f32::NEG_INFINITY)));
        }
        if kept.contains(&f64::NEG_INFINITY) {
            refuse_repeated(ids, row)?;
        }
        let settings = batch.settings;
        let largest = exponential::largest(z);
        let apart = batch.targets.is_some()
            && settings.temperature != 1.0
            && matches!(settings.tail, Tail::StudentFull | Tail::ExactTail | Tail::None);
        if largest == f32::NEG_INFINITY {
            // No others, or only −∞ and NaN; their sum tells which.
            let sum = if z.iter().any(|z| z.is_nan()) { f64::NAN } else { 0.0 };
            return Ok(Split { kept, largest, sum, tempered: apart.then_some(sum) });
        }
        let sum = exponential::sum(z, largest, 1.0);
        let tempered = apart.then(|| exponential::sum(z, largest, (1.0 / settings.temperature) as f32));
        Ok(Split { kept, largest, sum, tempered })
    }

    /// ln Σ exp z over the others.
    pub(super) fn rest(&self) -> f64 {
        f64::from(self.largest) + self.sum.ln()
    }

    /// The others' coarse logit at temperature `t`: formed at T where there is a sum at T, else tempered as one bucket.
    fn rest_at(&self, t: f64) -> f64 {
        match self.tempered {
            Some(sum) => f64::from(self.largest) / t + sum.ln(),
            None => self.rest() / t,
        }
    }

    /// Gives every other logit `ce · exp(z − largest)` and its share of the pull on the rest.
    fn replace(&self, z: &mut [f32], ce: f64, pull: f64, batch: &Batch<'_>) {
        if self.largest == f32::NEG_INFINITY {
            z.fill(if self.sum.is_nan() { f32::NAN } else { 0.0 });
            return;
        }
        let (weight, tempered) = match self.tempered {
            Some(sum) => (ce, pull / sum),
            None => (ce + pull / self.sum, 0.0),
        };
        exponential::replace(z, self.largest, weight, tempered, (1.0 / batch.settings.temperature) as f32);
    }

    /// One other logit's share of the pull on the rest.
    fn share_of_rest(&self, logit: f64, pull: f64, batch: &Batch<'_>) -> f64 {
        let below = logit - f64::from(self.largest);
        match self.tempered {
            _ if pull == 0.0 => 0.0,
            Some(sum) => pull / sum * (below / batch.settings.temperature).exp(),
            None => pull / self.sum * below.exp(),
        }
    }
}

/// An id listed twice finds −∞ where its logit was.
pub(crate) fn refuse_repeated(ids: &[u32], row: usize) -> Result<(), LossError> {
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(LossError::RepeatedId { row, id: pair[0] }),
        None => Ok(()),
    }
}
