//! What a record must obey to be a row: the same rules before it is written and every time it is read, so nothing enters a
//! cache that `verify` would refuse, and nothing leaves it that a trainer would trip over.

use crate::codec::{round_to_mantissa, stored_tail_logprob};
use crate::error::Flaw;
use crate::{Description, Record, Target};

/// A log-probability may lie this far above 0 (float error of a log-softmax in f32); it is stored as 0.
pub const LOGPROB_EPSILON: f32 = 1e-5;
/// A distribution's mass may lie this far above what rounding explains (float error of the teacher's log-sum-exp).
pub const MASS_EPSILON: f64 = 1e-3;
/// Most entries of one row, over all its positions: keeps every page far below Parquet's 2 GiB.
pub const MAX_ROW_ENTRIES: usize = 1 << 28;
/// Most tokens of one row.
pub const MAX_ROW_TOKENS: usize = 1 << 24;

/// In which form a record is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// As a caller gives it: unrounded values.
    Given,
    /// As it is stored: rounded values in canonical order.
    Stored,
}

/// The rules of one cache.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    pub(crate) vocab_size: u32,
    pub(crate) k: u16,
    pub(crate) mantissa_bits: u8,
}

impl Rules {
    pub(crate) fn of(description: &Description) -> Self {
        let k = description.selection.max_entries();
        Self { vocab_size: description.vocab_size, k, mantissa_bits: description.mantissa_bits }
    }

    /// Checks shape, alignment, ids, values and (stored form) order, rounding and mass.
    pub(crate) fn check(&self, record: &Record, form: Form) -> Result<(), Flaw> {
        self.check_tokens(record)?;
        self.check_positions(record)?;
        let bound = self.mass_bound();
        // One bit for each id of the vocabulary, set while a position is looked at: finds repeated ids in one pass.
        let mut seen = vec![0u64; (self.vocab_size as usize).div_ceil(64)];
        for (i, &position) in record.positions.iter().enumerate() {
            let target = record.targets.position(i);
            let at = |flaw: Flaw| Flaw::new(format!("position {position}: {}", flaw.expected), flaw.found);
            self.check_ids(target.ids, &mut seen).map_err(at)?;
            check_order(&target, form).map_err(at)?;
            if form == Form::Stored {
                self.check_stored(&target, bound).map_err(at)?;
            }
        }
        Ok(())
    }

    fn check_tokens(&self, record: &Record) -> Result<(), Flaw> {
        let tokens = record.input_ids.len();
        if !(2..=MAX_ROW_TOKENS).contains(&tokens) {
            return Err(Flaw::new(format!("2 to {MAX_ROW_TOKENS} tokens"), tokens));
        }
        match record.input_ids.iter().find(|&&id| id >= self.vocab_size) {
            Some(id) => Err(Flaw::new(format!("input ids below the vocabulary size {}", self.vocab_size), id)),
            None => Ok(()),
        }
    }

    fn check_positions(&self, record: &Record) -> Result<(), Flaw> {
        let (positions, targets) = (record.positions.len(), record.targets.len());
        if positions != targets {
            return Err(Flaw::new(format!("one target for each of {positions} positions"), format!("{targets} targets")));
        }
        if positions == 0 {
            return Err(Flaw::new("at least one scored position", "none"));
        }
        let entries = record.targets.ids().len();
        if entries > MAX_ROW_ENTRIES {
            return Err(Flaw::new(format!("at most {MAX_ROW_ENTRIES} entries in a row"), entries));
        }
        let last = record.input_ids.len() as u64 - 1;
        let mut next = 0;
        for &position in &record.positions {
            let position = u64::from(position);
            if position < next {
                return Err(Flaw::new(format!("rising positions (at least {next} here)"), position));
            }
            if position >= last {
                return Err(Flaw::new(format!("scored positions below {last} (the last token predicts nothing)"), position));
            }
            next = position + 1;
        }
        Ok(())
    }

    fn check_ids(&self, ids: &[u32], seen: &mut [u64]) -> Result<(), Flaw> {
        if ids.is_empty() || ids.len() > usize::from(self.k) {
            return Err(Flaw::new(format!("1 to {} entries", self.k), ids.len()));
        }
        let mut flaw = None;
        for &id in ids {
            let bit = 1u64 << (id % 64);
            match seen.get_mut((id / 64) as usize) {
                Some(word) if id < self.vocab_size && *word & bit == 0 => *word |= bit,
                Some(_) if id < self.vocab_size => flaw = Some(Flaw::new("each id once", format!("id {id} twice"))),
                _ => flaw = Some(Flaw::new(format!("ids below the vocabulary size {}", self.vocab_size), id)),
            }
        }
        for &id in ids {
            if let Some(word) = seen.get_mut((id / 64) as usize) {
                *word = 0;
            }
        }
        flaw.map_or(Ok(()), Err)
    }

    fn check_stored(&self, target: &Target<'_>, bound: f64) -> Result<(), Flaw> {
        let bits = self.mantissa_bits;
        if let Some(l) = target.logprobs.iter().find(|l| round_to_mantissa(**l, bits).to_bits() != l.to_bits() || **l > 0.0) {
            return Err(Flaw::new(format!("log-probabilities at most 0 with {bits} mantissa bits"), l));
        }
        let tail = target.tail_logprob;
        if stored_tail_logprob(tail, bits).to_bits() != tail.to_bits() && !at_floor(tail, bits) {
            return Err(Flaw::new(format!("a tail between ln 1e-9 and 0 with {bits} mantissa bits"), tail));
        }
        let mass = target.logprobs.iter().chain([&tail]).map(|&l| f64::from(l).exp()).sum::<f64>();
        if mass > bound {
            return Err(Flaw::new(format!("kept and tail probability of at most {bound:.4}"), format!("{mass:.4}")));
        }
        Ok(())
    }

    /// Largest mass that rounding alone can make of a distribution.
    ///
    /// With d = 2^-(bits + 1) a stored log-probability is at least l (1 + d) and at most l (1 - d), so p becomes at most
    /// p^(1 - d). Over n = k + 1 outcomes with sum 1, the sum of p^(1 - d) is largest where all are equal: n^d.
    fn mass_bound(&self) -> f64 {
        let d = 2f64.powi(-i32::from(self.mantissa_bits) - 1);
        (f64::from(self.k) + 1.0).powf(d) * (1.0 + MASS_EPSILON)
    }
}

/// The floor itself may round to just below the floor; that value is the stored floor.
fn at_floor(tail: f32, bits: u8) -> bool {
    tail.to_bits() == stored_tail_logprob(f32::NEG_INFINITY, bits).to_bits()
}

fn check_order(target: &Target<'_>, form: Form) -> Result<(), Flaw> {
    if let Some(l) = target.logprobs.iter().find(|l| !l.is_finite() || **l > LOGPROB_EPSILON) {
        return Err(Flaw::new("finite log-probabilities of at most 0", l));
    }
    let tail = target.tail_logprob;
    let endless = form == Form::Given && tail == f32::NEG_INFINITY;
    if !endless && (!tail.is_finite() || tail > LOGPROB_EPSILON) {
        return Err(Flaw::new("a tail log-probability of at most 0", tail));
    }
    let pairs = target.logprobs.windows(2).zip(target.ids.windows(2));
    for (logprobs, ids) in pairs {
        if let (&[a, b], &[i, j]) = (logprobs, ids)
            && (a < b || (a == b && i > j))
        {
            let found = format!("id {i} with {a} before id {j} with {b}");
            return Err(Flaw::new("entries by falling log-probability, ties by rising id", found));
        }
    }
    Ok(())
}
