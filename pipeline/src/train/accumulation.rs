//! One step's gradient: its rows cut into packs, each through the student and back, summed. Of several ranks each takes a stretch of the
//! rows; what it sums are parts of the mean over all ranks' scored positions.

use super::TrainConfig;
use super::ranks::{Own, Ranks, share};
use super::reading::Reading;
use crate::Result;
use crate::data::pack::{self, Pack, Sequence};
use crate::loss::{self, Batch, LossSettings, LossSums};
use crate::run::RunContext;
use crate::student::{Moment, Student, Walk};
use candle_core::Tensor;
use potstill_cache::{Record, SoftTargets};

/// What the packs of a step add up to.
#[derive(Debug, Default)]
pub(super) struct Step {
    /// Losses, as means over the step's scored positions.
    pub mean: LossSums,
    /// Gradients of that mean, in the order of the parameters.
    pub gradients: Vec<Tensor>,
    /// Tokens of the step.
    pub tokens: u64,
    /// Scored positions of the step.
    pub scored: u64,
}

/// Mean loss over the scored positions of a step's rows, and its gradients: a sum over packs, and over ranks. `None` when a stop was asked
/// for, of this rank or another.
pub(super) fn accumulate(
    (student, number): (&Student, u64),
    records: &[Record],
    config: &TrainConfig,
    loss: (&LossSettings, Option<&Reading>),
    (ranks, context): (&Ranks, &RunContext),
) -> Result<Option<Step>> {
    // A row without scored positions is a conversation that the teacher could not score.
    let records: Vec<&Record> = records.iter().filter(|r| !r.positions.is_empty()).collect();
    let lengths: Vec<usize> = records.iter().map(|r| r.input_ids.len()).collect();
    let scored = records.iter().map(|r| r.positions.len() as u64).sum();
    let tokens = lengths.iter().map(|length| *length as u64).sum();
    let share = share::of(&lengths, ranks.rank(), ranks.of());
    let moment = Moment { step: number, first_row: share.first_token };
    let sums = over_packs((student, moment), &records[share.rows], config, loss, (scored, context))?;
    let step = sums.map(|sums| Step { tokens, scored, ..sums });
    ranks.add_up(number, Own { step, scored, tokens }, &student.parameters())
}

/// Sums over the packs of these rows, the first of whose tokens has the moment's number; `scored` is what means are over. `None` when a
/// stop was asked for.
fn over_packs(
    (student, mut moment): (&Student, Moment),
    records: &[&Record],
    config: &TrainConfig,
    (settings, reading): (&LossSettings, Option<&Reading>),
    (scored, context): (u64, &RunContext),
) -> Result<Option<Step>> {
    let scale = 1.0 / scored.max(1) as f64;
    let (mut step, mut pending) = (Step::default(), Vec::new());
    for range in pack::plan(records.iter().map(|r| r.input_ids.len()), config.pack_tokens as usize) {
        if context.stopping() {
            return Ok(None);
        }
        let records = &records[range];
        let pack = Pack::new(records.iter().map(|r| Sequence { input_ids: &r.input_ids, positions: &r.positions }));
        // Without a distillation term the distributions are not looked at.
        let reading = reading.filter(|_| settings.kd_alpha > 0.0);
        let targets = reading.map(|reading| {
            let mut targets = SoftTargets::with_capacity(pack.scored().len(), 0);
            records.iter().for_each(|r| targets.extend(&reading.targets(&r.targets)));
            targets
        });
        let lse_t = targets.as_ref().zip(reading).and_then(|(targets, reading)| reading.lse_t(targets));
        let (targets, lse_t) = (targets.as_ref(), lse_t.as_deref());
        let batch = Batch { labels: pack.labels(), targets, lse_t, settings, scale };
        let Some((hidden, tape)) = student.forward_training(&pack, moment, context)? else { return Ok(None) };
        let fused = loss::fused_batch(&hidden, student.head(), &batch, config.head_chunk as usize, context)?;
        let Some((sums, d_hidden)) = fused else { return Ok(None) };
        if student.backward_training(tape, &d_hidden, &mut step.gradients, context)? == Walk::Stopped {
            return Ok(None);
        }
        pending.push(sums);
        moment.first_row += pack.input_ids().len();
    }
    // A GPU has the next pack's work before it is through with a pack: only here, after all of them, is it waited for.
    for sums in pending {
        let sums = sums.wait()?;
        step.mean.total += sums.total * scale;
        step.mean.kd += sums.kd * scale;
        step.mean.ce += sums.ce * scale;
    }
    Ok(Some(step))
}
