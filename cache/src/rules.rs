//! What a record must obey to be a row: before it is written and when it is verified, so nothing enters a cache that `verify` would
//! refuse, and nothing leaves it that a trainer would trip over.

use crate::codec::{self, TAIL_FLOOR_LOGPROB, round_to_mantissa, stored_tail_logprob, tail_bits};
use crate::error::Flaw;
use crate::layout::Layout;
use crate::shard::page::Most;
use crate::{Description, Record, Selection, Storage, Target};
use std::sync::Arc;

/// A log-probability may lie this far above 0 (float error of a log-softmax in f32); it is stored as 0.
pub const LOGPROB_EPSILON: f32 = 1e-5;
/// A distribution's mass may differ this much from what rounding explains (float error of the teacher's log-sum-exp).
pub const MASS_EPSILON: f64 = 1e-3;
/// Most entries of one row, over all its positions: keeps every page far below Parquet's 2 GiB.
pub const MAX_ROW_ENTRIES: usize = 1 << 28;
/// Most tokens of one row.
pub const MAX_ROW_TOKENS: usize = 1 << 24;

/// In which form a record is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// As a teacher gives it: unrounded values.
    Given,
    /// As it is stored: rounded values.
    Stored,
}

/// The rules of one cache.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    pub(crate) layout: Arc<Layout>,
    pub(crate) storage: Storage,
    vocab_size: u32,
    max_tokens: usize,
    mass_bound: f64,
}

impl Rules {
    pub(crate) fn of(description: &Description, version: u32) -> Self {
        let (layout, storage) = (Arc::new(Layout::of(description, version)), description.storage());
        let max_tokens = (description.encoding.max_length as usize).clamp(2, MAX_ROW_TOKENS);
        let mass_bound = mass_bound(description);
        Self { layout, storage, vocab_size: description.vocab_size, max_tokens, mass_bound }
    }

    /// What a reader believes of the pages of a row of so many tokens, or of any row.
    pub(crate) fn most(&self, tokens: Option<usize>) -> Most {
        let tokens = tokens.unwrap_or(self.max_tokens);
        let entries = usize::from(self.storage.selection.max_entries()).max(self.draws());
        Most { tokens, values: tokens.saturating_mul(entries).min(MAX_ROW_ENTRIES) }
    }

    /// The record in stored form, every rule checked: before it is encoded, and what encoding it shows of its mass.
    pub(crate) fn encode(&self, record: &Record) -> Result<Record, Flaw> {
        self.check_but_mass(record, Form::Given)?;
        let (stored, masses) = codec::encode_measured(record, &self.storage);
        let position = |i: usize| record.positions.get(i).copied().unwrap_or_default();
        masses.into_iter().try_for_each(|(i, mass)| self.check_mass(position(i), mass)).map(|()| stored)
    }

    /// Every rule: shape, alignment, ids, order, values and mass.
    pub(crate) fn check(&self, record: &Record, form: Form) -> Result<(), Flaw> {
        self.check_but_mass(record, form)?;
        // Of drawn entries no probability is known.
        if !self.layout.has_head() {
            return Ok(());
        }
        record.positions.iter().enumerate().try_for_each(|(i, &position)| {
            let target = record.targets.position(i);
            self.check_mass(position, codec::mass(target.logprobs, target.tail_logprob))
        })
    }

    fn check_but_mass(&self, record: &Record, form: Form) -> Result<(), Flaw> {
        self.check_shape(record)?;
        // One bit for each id of the vocabulary, set while a position is looked at: finds repeated ids in one pass.
        let mut seen = vec![0u64; (self.vocab_size as usize).div_ceil(64)];
        for (i, &position) in record.positions.iter().enumerate() {
            let target = record.targets.position(i);
            let at = |flaw: Flaw| Flaw::new(format!("position {position}: {}", flaw.expected), flaw.found);
            self.check_lists(&target).map_err(at)?;
            self.check_once(&target, &mut seen).map_err(at)?;
            self.check_values(&target, form).map_err(at)?;
        }
        Ok(())
    }

    /// The rules whose breach would make a reader fail or mislead it, cheap enough for every read: shape, alignment, ids in range,
    /// values at most 0 and finite. Everything else was checked when the row was written and is covered by its checksum.
    pub(crate) fn check_read(&self, record: &Record) -> Result<(), Flaw> {
        self.check_shape(record)?;
        let targets = &record.targets;
        // Over all positions at once; a row in which something is wrong is gone through again to say where.
        let ids = below(targets.ids(), self.vocab_size) && below(targets.sample_ids(), self.vocab_size);
        let others = [targets.logits(), targets.logsumexps(), targets.lse_t()];
        let k = u32::from(self.storage.selection.head());
        let lengths = targets.offsets().windows(2).fold(true, |fine, bounds| fine & (bounds[1].wrapping_sub(bounds[0]) <= k));
        let values = at_most_zero(targets.logprobs()) && at_most_zero(targets.tail_logprobs());
        if ids && lengths && values && others.into_iter().all(finite) {
            return Ok(());
        }
        self.check(record, Form::Stored).and(Err(Flaw::new("ids of the vocabulary and log-probabilities at most 0", "others")))
    }

    fn draws(&self) -> usize {
        self.storage.selection.draws().map_or(0, usize::from)
    }

    /// Tokens, positions, and one target of the right parts for each position.
    fn check_shape(&self, record: &Record) -> Result<(), Flaw> {
        let tokens = record.input_ids.len();
        if !(2..=self.max_tokens).contains(&tokens) {
            return Err(Flaw::new(format!("2 to {} tokens", self.max_tokens), tokens));
        }
        let codec = [record.codec.kl_sum, record.codec.kl_max];
        if let Some(kl) = codec.into_iter().find(|kl| !(kl.is_nan() || (kl.is_finite() && *kl >= 0.0))) {
            return Err(Flaw::new("a codec error of 0 or more, or NaN for one that is not known", kl));
        }
        if let Some(id) = record.input_ids.iter().find(|&&id| id >= self.vocab_size) {
            return Err(Flaw::new(format!("input ids below the vocabulary size {}", self.vocab_size), id));
        }
        let (positions, targets) = (record.positions.len(), record.targets.len());
        if positions != targets {
            return Err(Flaw::new(format!("one target for each of {positions} positions"), format!("{targets} targets")));
        }
        let entries = record.targets.ids().len().max(record.targets.sample_ids().len());
        if entries > MAX_ROW_ENTRIES {
            return Err(Flaw::new(format!("at most {MAX_ROW_ENTRIES} entries in a row"), entries));
        }
        check_positions(record)?;
        self.check_parts(record)
    }

    /// The record has the parts that the cache keeps, and no others.
    fn check_parts(&self, record: &Record) -> Result<(), Flaw> {
        let (t, n) = (&record.targets, record.positions.len());
        let (logits, samples) = (self.layout.has_logits(), self.layout.has_samples());
        let parts = [
            ("logits", t.logits().len(), if logits { t.ids().len() } else { 0 }),
            ("log-sum-exps", t.logsumexps().len(), if logits { n } else { 0 }),
            ("log-sum-exps at temperatures", t.lse_t().len(), n * self.layout.temperatures()),
            ("drawn ids", t.sample_ids().len(), if samples { t.sample_ids().len() } else { 0 }),
            ("kept ids", t.ids().len(), if self.layout.has_head() { t.ids().len() } else { 0 }),
            ("log-probabilities", t.logprobs().len(), t.ids().len()),
        ];
        match parts.into_iter().find(|(_, found, expected)| found != expected) {
            Some((part, found, expected)) => Err(Flaw::new(format!("{expected} {part} in the row"), found)),
            None => Ok(()),
        }
    }

    /// How many entries, how many draws, in which order.
    fn check_lists(&self, target: &Target<'_>) -> Result<(), Flaw> {
        let (kept, most) = (target.ids.len(), usize::from(self.storage.selection.head()));
        if self.layout.has_head() && !(1..=most).contains(&kept) {
            return Err(Flaw::new(format!("1 to {most} entries"), kept));
        }
        if self.layout.has_samples() {
            let drawn: usize = target.sample_counts.iter().map(|&count| usize::from(count)).sum();
            // Where the head is the whole vocabulary, or the rest has no probability in f32, nothing is left to draw from.
            let nothing = kept == self.vocab_size as usize || target.tail_logprob <= TAIL_FLOOR_LOGPROB;
            let none = self.layout.has_head() && drawn == 0 && nothing;
            if drawn != self.draws() && !none {
                return Err(Flaw::new(format!("{} draws", self.draws()), drawn));
            }
            if target.sample_counts.contains(&0) {
                return Err(Flaw::new("a count of 1 or more for each drawn id", 0));
            }
            if let Some(pair) = target.sample_ids.windows(2).find(|pair| pair[0] >= pair[1]) {
                return Err(Flaw::new("rising drawn ids", format!("id {} before id {}", pair[0], pair[1])));
            }
        }
        check_order(target.ids, if self.layout.has_logits() { target.logits } else { target.logprobs })
    }

    /// Each id once, all of them ids of the vocabulary.
    fn check_once(&self, target: &Target<'_>, seen: &mut [u64]) -> Result<(), Flaw> {
        let lists = [target.ids, target.sample_ids];
        let ids = || lists.into_iter().flatten().copied();
        if !lists.iter().all(|ids| below(ids, self.vocab_size)) {
            let id = ids().find(|id| *id >= self.vocab_size).unwrap_or_default();
            return Err(Flaw::new(format!("ids below the vocabulary size {}", self.vocab_size), id));
        }
        let mut twice = None;
        for id in ids() {
            let (word, bit) = (&mut seen[(id / 64) as usize], 1u64 << (id % 64));
            if *word & bit != 0 {
                twice = Some(id);
            }
            *word |= bit;
        }
        ids().for_each(|id| seen[(id / 64) as usize] = 0);
        twice.map_or(Ok(()), |id| Err(Flaw::new("each id once", format!("id {id} twice"))))
    }

    /// Finite numbers in range, rounded where they are stored.
    fn check_values(&self, target: &Target<'_>, form: Form) -> Result<(), Flaw> {
        if !at_most_zero(target.logprobs)
            && let Some(l) = target.logprobs.iter().find(|l| !l.is_finite() || **l > LOGPROB_EPSILON)
        {
            return Err(Flaw::new("finite log-probabilities of at most 0", l));
        }
        let others = target.logits.iter().chain(target.lse_t).chain(target.logsumexp.as_ref());
        if let Some(x) = others.into_iter().find(|x| !x.is_finite()) {
            return Err(Flaw::new("finite logits and log-sum-exps", x));
        }
        if let Some(lse) = target.logsumexp
            && let Some(z) = target.logits.iter().find(|z| **z - lse > LOGPROB_EPSILON)
        {
            return Err(Flaw::new(format!("logits of at most their log-sum-exp {lse}"), z));
        }
        // Logits are never rounded here: they come as a bf16 head gives them, or the log-sum-exp would belong to other numbers.
        if let Some(z) = target.logits.iter().find(|z| round_to_mantissa(**z, 7).to_bits() != z.to_bits()) {
            return Err(Flaw::new("logits that are bfloat16 numbers", z));
        }
        let tail = target.tail_logprob;
        if form == Form::Given {
            if let Selection::Cutoff { rule, .. } = &self.storage.selection
                && rule.kept(target.logprobs) != target.logprobs.len()
            {
                let found = format!("{}, of which it keeps {}", target.logprobs.len(), rule.kept(target.logprobs));
                return Err(Flaw::new(format!("the entries that {} keeps", self.storage.selection), found));
            }
            return match tail == f32::NEG_INFINITY || tail.is_finite() && tail <= LOGPROB_EPSILON {
                true => Ok(()),
                false => Err(Flaw::new("a tail log-probability of at most 0", tail)),
            };
        }
        let bits = self.storage.mantissa_bits;
        let rounded = |l: f32| round_to_mantissa(l, bits).to_bits() == l.to_bits() && l <= 0.0;
        if !self.layout.has_logits() && !target.logprobs.iter().all(|&l| rounded(l)) {
            return Err(Flaw::new(format!("log-probabilities at most 0 with {bits} mantissa bits"), "others"));
        }
        let bits = tail_bits(&self.storage);
        if stored_tail_logprob(tail, bits).to_bits() != tail.to_bits() && !at_floor(tail, bits) {
            return Err(Flaw::new(format!("a tail between ln 1e-9 and 0 with {bits} mantissa bits"), tail));
        }
        Ok(())
    }

    /// Kept and tail probability of a position make up 1.
    fn check_mass(&self, position: u32, mass: f64) -> Result<(), Flaw> {
        let bound = self.mass_bound;
        let least = 1.0 / bound;
        if mass >= least && mass <= bound {
            return Ok(());
        }
        let expected = format!("position {position}: kept and tail probability of {least:.4} to {bound:.4}");
        Err(Flaw::new(expected, format!("{mass:.4}")))
    }
}

/// Largest mass that rounding alone can make of a distribution; its inverse bounds the smallest.
///
/// With d = 2^-(bits + 1) a stored log-probability is at least l (1 + d) and at most l (1 - d), so p becomes at most p^(1 - d) and at
/// least p^(1 + d). Over n = k + 1 outcomes with sum 1, the sum of p^(1 - d) is largest and that of p^(1 + d) smallest where all are
/// equal: n^d and n^-d. Doubled, for the tail of a shortened list is rounded once more. A cache made of another carries the roundings
/// of all that it comes from, each over its own number of outcomes. Given values get the same room: they may have been rounded by
/// whoever made them.
fn mass_bound(description: &Description) -> f64 {
    let earlier = description.derived.iter().map(|d| (d.selection, d.mantissa_bits));
    let steps = earlier.chain([(description.selection, description.mantissa_bits)]);
    let bound = |(selection, bits): (Selection, u8)| (f64::from(selection.max_entries()) + 1.0).powf(2f64.powi(-i32::from(bits)));
    steps.map(bound).product::<f64>() * (1.0 + MASS_EPSILON)
}

/// Whether all ids are below `bound`. Signed comparisons become vectors on every machine; ids beyond them show in their top bit.
fn below(ids: &[u32], bound: u32) -> bool {
    let (largest, bits) = ids.iter().fold((0i32, 0u32), |(largest, bits), &id| (largest.max(id as i32), bits | id));
    bits <= i32::MAX as u32 && (largest as u32) < bound || ids.is_empty()
}

/// Whether all values are finite: their exponents are not all ones.
fn finite(values: &[f32]) -> bool {
    const INFINITY: u32 = f32::INFINITY.to_bits();
    values.iter().fold(0, |any, x| any | u32::from((x.to_bits() & INFINITY) == INFINITY)) == 0
}

/// Whether all values are finite and at most 0: their bits are 0, or those of a negative number below minus infinity's.
fn at_most_zero(values: &[f32]) -> bool {
    const NEG_INFINITY: i32 = f32::NEG_INFINITY.to_bits() as i32;
    let bad = |l: &f32| {
        let bits = l.to_bits() as i32;
        u32::from((bits >= NEG_INFINITY) & (bits != 0))
    };
    values.iter().fold(0, |any, l| any | bad(l)) == 0
}

fn check_positions(record: &Record) -> Result<(), Flaw> {
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

/// The floor itself may round to just below the floor; that value is the stored floor.
fn at_floor(tail: f32, bits: u8) -> bool {
    tail.to_bits() == stored_tail_logprob(f32::NEG_INFINITY, bits).to_bits()
}

fn check_order(ids: &[u32], values: &[f32]) -> Result<(), Flaw> {
    // Looked at as a whole first, without branches; where something is wrong, again to say what.
    let n = values.len().min(ids.len());
    let (Some(next), Some(next_ids)) = (values[..n].get(1..), ids[..n].get(1..)) else { return Ok(()) };
    let pairs = values.iter().zip(next).zip(ids.iter().zip(next_ids));
    if pairs.fold(true, |ok, ((a, b), (i, j))| ok & ((a > b) | (a == b) & (i <= j))) {
        return Ok(());
    }
    for (values, ids) in values.windows(2).zip(ids.windows(2)) {
        if let (&[a, b], &[i, j]) = (values, ids)
            && (a < b || (a == b && i > j))
        {
            let found = format!("id {i} with {a} before id {j} with {b}");
            return Err(Flaw::new("entries by falling log-probability, ties by rising id", found));
        }
    }
    Ok(())
}
