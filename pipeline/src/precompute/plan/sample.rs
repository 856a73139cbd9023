//! The measured part: a teacher that scores some of the conversations for some seconds, as a run does.
//!
//! Which conversations: every prefix of the golden ratio's multiples lies evenly over the data, so however few the time allows, files and
//! topics are met in proportion, and a sample grows without being drawn anew. The first pass is one conversation, which fetches the
//! weights and shows how fast this is; each next one is as large as the time that is left allows, at most a pack of the run, or a block
//! where weights are streamed. What the first pass took counts only where there was no other.

use super::super::block::Plan;
use super::super::opening::Opened;
use super::super::{PrecomputeConfig, bad};
use crate::data::Example;
use crate::data::pack::{self, Pack, Sequence};
use crate::ops::capture::Capture;
use crate::run::RunContext;
use crate::teacher::{Residency, Teacher};
use crate::{Error, Result};
use potstill_cache::{Extent, Preset, Record, Selection, Values};
use serde::Serialize;
use std::time::{Duration, Instant};

/// Most entries of all sampled distributions, for each way to keep them: some tens of megabytes.
const MOST_ENTRIES: u64 = 1 << 22;

/// What the teacher's run showed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Measured {
    /// Seconds that it was asked for.
    pub asked_seconds: f64,
    /// Seconds of the passes that count.
    pub seconds: f64,
    /// Conversations, tokens and scored positions of these passes.
    pub extent: Extent,
    /// Tokens a second in them.
    pub tokens_per_second: f64,
    /// Passes that count.
    pub passes: u64,
    /// Seconds of the first pass, where it does not count.
    pub warm_up_seconds: Option<f64>,
    /// All conversations that were scored: those that sizes are taken of.
    pub sampled: Extent,
    /// Conversations among them with a logit that is not finite: a run leaves these out.
    pub not_finite: u64,
    /// Where weights were meanwhile.
    pub residency: Residency,
    /// Most tokens that went through a layer at once.
    pub pack_tokens: u64,
    /// Most that will in the run.
    pub run_pack_tokens: u64,
}

impl Measured {
    /// Seconds that scoring so much takes at this speed.
    pub fn seconds_for(&self, whole: &Extent) -> f64 {
        whole.tokens as f64 / self.tokens_per_second.max(1e-9)
    }
}

/// Conversations with what was kept of their distributions, four times.
pub(super) struct Sample {
    pub(super) measured: Measured,
    /// As the run is set.
    pub(super) own: Vec<Record>,
    /// The largest k that is compared, as log-probabilities and as logits.
    pub(super) logprobs: Vec<Record>,
    pub(super) logits: Vec<Record>,
    /// Drawn as the preset `sampled` draws.
    pub(super) drawn: Vec<Record>,
}

impl Sample {
    /// Has the teacher score for about so long. Errors: a teacher that cannot be loaded, scoring, a stop.
    pub(super) fn take(
        run: &PrecomputeConfig,
        opened: &Opened,
        plan: &Plan,
        (time, compared): (Duration, &[u16]),
        context: &RunContext,
    ) -> Result<Self> {
        let precision = (run.compute, plan.residency);
        let teacher = Teacher::from_folder(&run.teacher, opened.width, precision, &opened.device, context)?;
        let largest = compared.iter().copied().max().unwrap_or(1);
        let with = |values| Capture { values, ..Capture::top_k(largest) };
        let captures = [
            Capture::of(&opened.storage, &run.temperatures()),
            with(Values::Logprob),
            with(Values::LogitBf16),
            Capture::of(&Preset::Sampled.storage(), &[]),
        ];
        let mut taking = Taking::begin(&opened.dataset.examples, run, plan, time);
        taking.most_positions = MOST_ENTRIES / u64::from(most_entries(&opened.storage.selection).max(largest));
        context.progress.begin("measuring the teacher", "tokens", 0);
        while let Some(rows) = taking.next() {
            taking.pass(&teacher, &rows, &captures, context)?;
            let gone = taking.began.elapsed().as_secs_f64();
            context.progress.note(format!("{gone:.0} of {:.0} s", time.as_secs_f64()));
        }
        context.progress.end();
        Ok(taking.finish(plan.residency))
    }
}

/// A sample under way.
struct Taking<'a> {
    examples: &'a [Example],
    run: &'a PrecomputeConfig,
    /// Most tokens of a pass.
    most_tokens: u64,
    most_positions: u64,
    time: Duration,
    began: Instant,
    /// Conversations not met yet are those from this place on in the order.
    order: Vec<usize>,
    met: usize,
    /// Each pass: what went through the teacher, how long it took, the most tokens in a pack.
    passes: Vec<(Extent, Duration, u64)>,
    records: [Vec<Record>; 4],
    not_finite: u64,
}

impl<'a> Taking<'a> {
    fn begin(examples: &'a [Example], run: &'a PrecomputeConfig, plan: &Plan, time: Duration) -> Self {
        let pack_tokens = u64::from(run.pack_tokens);
        let most_tokens = match plan.residency {
            Residency::Resident => pack_tokens,
            Residency::Streamed => plan.most_tokens(pack_tokens),
        };
        Self {
            examples,
            run,
            most_tokens,
            most_positions: u64::MAX,
            time,
            began: Instant::now(),
            order: evenly(examples.len()),
            met: 0,
            passes: Vec::new(),
            records: Default::default(),
            not_finite: 0,
        }
    }

    /// The passes whose time counts.
    fn counted(&self) -> &[(Extent, Duration, u64)] {
        if self.passes.len() > 1 { &self.passes[1..] } else { &self.passes }
    }

    /// The conversations of the next pass; nothing where the time, the data or the room for what is kept has run out.
    fn next(&mut self) -> Option<Vec<usize>> {
        let left = self.time.saturating_sub(self.began.elapsed()).as_secs_f64();
        let seen: u64 = self.passes.iter().map(|(extent, ..)| extent.scored).sum();
        let speed = speed(self.counted());
        let room = if self.passes.is_empty() { 0.0 } else { (speed * left).min(self.most_tokens as f64) };
        let mut tokens = 0.0;
        let mut scored = seen;
        let rows: Vec<usize> = self.order[self.met..]
            .iter()
            .copied()
            .take_while(|row| {
                let example = &self.examples[*row];
                let alone = tokens == 0.0;
                tokens += example.input_ids.len() as f64;
                scored += example.scored_positions();
                // The first pass is one conversation, whatever there is room for.
                if self.passes.is_empty() { alone } else { tokens <= room && scored <= self.most_positions }
            })
            .collect();
        self.met += rows.len();
        (!rows.is_empty()).then_some(rows)
    }

    fn pass(&mut self, teacher: &Teacher, rows: &[usize], captures: &[Capture; 4], context: &RunContext) -> Result<()> {
        let examples: Vec<Example> = rows.iter().map(|row| self.examples[*row].clone()).collect();
        let positions: Vec<Vec<u32>> = examples.iter().map(Example::positions).collect();
        let lengths = examples.iter().map(|e| e.input_ids.len());
        let ranges = pack::plan(lengths, self.run.pack_tokens as usize);
        let sequence = |i: usize| Sequence { input_ids: &examples[i].input_ids, positions: &positions[i] };
        let packs: Vec<Pack> = ranges.iter().map(|range| Pack::new(range.clone().map(sequence))).collect();
        let began = Instant::now();
        let captures: Vec<&Capture> = captures.iter().collect();
        let scored = teacher.score_several(&packs, &captures, self.run.head_chunk as usize, context);
        let scored = scored.map_err(|source| Error::Scoring {
            first: examples.iter().map(|e| e.seq_id).min().unwrap_or(0),
            last: examples.iter().map(|e| e.seq_id).max().unwrap_or(0),
            source: Box::new(source),
        })?;
        let Some((scored, more)) = scored else { return Err(Error::stopped()) };
        let took = began.elapsed().saturating_sub(more);
        for ((range, pack), each) in ranges.iter().zip(&packs).zip(scored) {
            for (number, (kept, captured)) in self.records.iter_mut().zip(&each).enumerate() {
                let (records, left_out) =
                    bad::records(&examples[range.clone()], positions[range.clone()].to_vec(), pack, captured);
                self.not_finite += if number == 0 { left_out.len() as u64 } else { 0 };
                kept.extend(records);
            }
        }
        let largest = packs.iter().map(|pack| pack.input_ids().len() as u64).max().unwrap_or(0);
        self.passes.push((super::extent(&examples), took, largest));
        Ok(())
    }

    fn finish(mut self, residency: Residency) -> Sample {
        // A cache has its rows in the data's order, and so does a sample of it.
        self.records.iter_mut().for_each(|records| records.sort_by_key(|record| record.seq_id));
        let counted = self.counted();
        let sampled = sum(&self.passes);
        let measured = Measured {
            asked_seconds: self.time.as_secs_f64(),
            seconds: counted.iter().map(|(_, took, _)| took.as_secs_f64()).sum(),
            extent: sum(counted),
            tokens_per_second: speed(counted),
            passes: counted.len() as u64,
            warm_up_seconds: (self.passes.len() > 1).then(|| self.passes[0].1.as_secs_f64()),
            sampled,
            not_finite: self.not_finite,
            residency,
            pack_tokens: counted.iter().map(|(_, _, largest)| *largest).max().unwrap_or(0),
            run_pack_tokens: super::largest_pack(self.examples, self.run),
        };
        let [own, logprobs, logits, drawn] = self.records;
        Sample { measured, own, logprobs, logits, drawn }
    }
}

fn most_entries(selection: &Selection) -> u16 {
    selection.head().saturating_add(selection.draws().unwrap_or(0))
}

fn sum(passes: &[(Extent, Duration, u64)]) -> Extent {
    passes.iter().fold(Extent::default(), |all, (one, ..)| Extent {
        rows: all.rows + one.rows,
        tokens: all.tokens + one.tokens,
        scored: all.scored + one.scored,
    })
}

/// Tokens a second; 0 where nothing was measured.
fn speed(passes: &[(Extent, Duration, u64)]) -> f64 {
    let seconds: f64 = passes.iter().map(|(_, took, _)| took.as_secs_f64()).sum();
    if seconds > 0.0 { sum(passes).tokens as f64 / seconds } else { 0.0 }
}

/// The numbers below `n`, each once, so that those of any prefix lie evenly: 0.5 + i / φ modulo 1, of which the next number that was not
/// met yet.
fn evenly(n: usize) -> Vec<usize> {
    const INVERSE_GOLDEN: f64 = 0.618_033_988_749_894_9;
    let mut rank: Vec<(f64, usize)> = (0..n).map(|i| ((0.5 + i as f64 * INVERSE_GOLDEN).fract(), i)).collect();
    // Place i of the order goes to the row whose share of the data is the i-th of the sequence: sorted by value, the sequence's own
    // numbers say when each row's turn is.
    rank.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut order = vec![0; n];
    for (row, (_, turn)) in rank.into_iter().enumerate() {
        order[turn] = row;
    }
    order
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn every_prefix_of_the_order_lies_evenly() {
        assert_eq!(evenly(0), [0usize; 0]);
        for n in [1, 2, 7, 100, 2415] {
            let order = evenly(n);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..n).collect::<Vec<_>>());
            for prefix in [n / 8, n / 3].into_iter().filter(|prefix| *prefix >= 4) {
                let mut taken = order[..prefix].to_vec();
                taken.sort_unstable();
                let widest = taken.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
                // Gaps of such a sequence have three lengths, the longest at most φ² times the mean.
                assert!(widest as f64 <= 2.7 * n as f64 / prefix as f64, "{prefix} of {n}: {widest}");
            }
        }
    }
}
