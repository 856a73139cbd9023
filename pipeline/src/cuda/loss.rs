//! The student's head and loss on the GPU; `loss/` has the definitions, `kernels/loss.cu` the plan. Nothing here waits for the GPU but who
//! asks for the sums.

use super::launch::{Argument, Grid, device_of, floats, launch, place, room};
use super::linear::{Way, times_weight};
use super::pinned::{Fetched, fetch, send};
use super::product::Factor;
use crate::kernel::Precision;
use crate::linear::Head;
use crate::loss::{Batch, Divergence, LossError, LossSettings, LossSums, Tail, refuse_repeated};
use crate::run::RunContext;
use crate::{Error, Result};
use candle_core::{CudaDevice, DType, Tensor};

/// Most kept ids of a position.
const MOST_KEPT: usize = 256;

/// What a row's status says.
const NO_MASS: u32 = 1;
const REPEATED_ID: u32 = 2;

/// Everything about a batch's rows that the kernel reads, on the device.
struct Rows {
    labels: Tensor,
    /// (offsets `[n + 1]`, ids, log-probabilities, tails `[n]`).
    targets: Option<[Tensor; 4]>,
    lse_t: Option<Tensor>,
    settings: [u64; 6],
}

/// What the kernel says of each row.
struct Said {
    kd: Tensor,
    ce: Tensor,
    status: Tensor,
}

/// The same on its way to the host.
#[derive(Debug)]
pub(crate) struct Owed {
    kd: Fetched<f64>,
    ce: Fetched<f64>,
    status: Fetched<u32>,
    /// What a row is looked up in that was refused: (offsets `[n + 1]`, ids).
    targets: Option<[Tensor; 2]>,
}

/// Sums and d(total · scale) / d(hidden) of a batch that was checked; `None` when a stop was asked for.
pub(crate) fn fused_batch(
    hidden: &Tensor,
    head: Head<'_>,
    batch: &Batch<'_>,
    chunk: usize,
    context: &RunContext,
) -> Result<Option<(Owed, Tensor)>> {
    let (device, (n, width), vocab) = (device_of(hidden)?, hidden.dims2()?, head.weight.outputs());
    let Some(placed) = head.placed else {
        return Err(candle_core::Error::Msg("loss: the head was not copied to the GPU".into()).into());
    };
    // For all chunks, there and back.
    let weight = placed.held(head.precision)?;
    let gradient = room((n, width), DType::F32, &device)?;
    let rows = Rows::new(batch, &device)?;
    let f64s = || room(n, DType::F64, &device);
    let said = Said { kd: f64s()?, ce: f64s()?, status: room(n, DType::U32, &device)? };
    for start in (0..n).step_by(chunk) {
        if context.stopping() {
            return Ok(None);
        }
        let rows_now = chunk.min(n - start);
        let (hidden, out) = (hidden.narrow(0, start, rows_now)?, gradient.narrow(0, start, rows_now)?);
        let logits = room((rows_now, vocab), DType::F32, &device)?;
        times_weight(&Factor::rounded(&hidden, head.precision)?, &weight, head.precision, Way::Forward, 0.0, &logits)?;
        let slopes = rows.differentiate(&logits, start, head.precision, &said)?;
        times_weight(&slopes, &weight, head.precision, Way::Backward, 0.0, &out)?;
    }
    let (kd, ce, status) = (fetch(&said.kd)?, fetch(&said.ce)?, fetch(&said.status)?);
    let targets = rows.targets.map(|[offsets, ids, ..]| [offsets, ids]);
    Ok(Some((Owed { kd, ce, status, targets }, gradient)))
}

impl Owed {
    /// The sums without weights, added in the rows' order. Waits for them. Errors: as the CPU's, of the first row that has one.
    pub(crate) fn wait(self) -> Result<LossSums> {
        let (kd, ce, status) = (self.kd.wait()?, self.ce.wait()?, self.status.wait()?);
        if let Some((row, status)) = status.iter().copied().enumerate().find(|(_, status)| *status != 0) {
            let ids = match &self.targets {
                None => Vec::new(),
                Some([offsets, ids]) => {
                    let bounds = offsets.narrow(0, row, 2)?.to_vec1::<u32>()?;
                    ids.narrow(0, bounds[0] as usize, (bounds[1] - bounds[0]) as usize)?.to_vec1()?
                }
            };
            return Err(refused(status, row, &ids));
        }
        Ok(LossSums { kd: kd.iter().sum(), ce: ce.iter().sum(), ..LossSums::default() })
    }
}

/// Why a row that keeps these ids has no loss.
fn refused(status: u32, row: usize, ids: &[u32]) -> Error {
    match (status, refuse_repeated(ids, row)) {
        (NO_MASS, _) => LossError::NoMass { row, kept: ids.len() }.into(),
        (REPEATED_ID, Err(repeated)) => repeated.into(),
        _ => candle_core::Error::Msg(format!("loss: row {row} ended with status {status}")).into(),
    }
}

impl Rows {
    fn new(batch: &Batch<'_>, device: &CudaDevice) -> Result<Self> {
        let targets = match batch.targets {
            None => None,
            Some(targets) => {
                let (mut offsets, mut ids, mut logprobs, mut tails) = (vec![0u32], Vec::new(), Vec::new(), Vec::new());
                for row in 0..batch.labels.len() {
                    let target = targets.position(row);
                    if target.ids.len() > MOST_KEPT {
                        let kept = target.ids.len();
                        return Err(candle_core::Error::Msg(format!(
                            "loss: row {row} keeps {kept} ids; on a GPU at most {MOST_KEPT} are taken: use --device cpu, or repack the cache"
                        ))
                        .into());
                    }
                    ids.extend_from_slice(target.ids);
                    logprobs.extend_from_slice(target.logprobs);
                    tails.push(target.tail_logprob);
                    offsets.push(ids.len() as u32);
                }
                // Rows of which none keeps anything: the kernel reads nothing, but wants a place.
                if ids.is_empty() {
                    (ids, logprobs) = (vec![0], vec![0.0]);
                }
                let u32s = |values: &[u32]| send(values, values.len(), device);
                let f32s = |values: &[f32]| send(values, values.len(), device);
                Some([u32s(&offsets)?, u32s(&ids)?, f32s(&logprobs)?, f32s(&tails)?])
            }
        };
        Ok(Self {
            labels: send(batch.labels, batch.labels.len(), device)?,
            targets,
            lse_t: batch
                .lse_t
                .filter(|_| batch.settings.needs_lse_t())
                .map(|lse_t| send(lse_t, lse_t.len(), device))
                .transpose()?,
            settings: words(batch.settings, batch.scale),
        })
    }

    /// Puts the gradient in the logits' place [n, V], whose first row is row `first` of the batch; gives it as a factor.
    fn differentiate(&self, logits: &Tensor, first: usize, precision: Precision, said: &Said) -> candle_core::Result<Factor> {
        let (device, (n, vocab)) = (device_of(logits)?, logits.dims2()?);
        let copy = match precision {
            Precision::F32 => None,
            Precision::Bf16 => Some(room((n, vocab), DType::BF16, &device)?),
        };
        const NOWHERE: Argument = Argument::Place(0);
        let part = |t: &Tensor, rows: usize, dtype| place(&t.narrow(0, first, rows)?, dtype);
        let [offsets, ids, logprobs, tails] = match &self.targets {
            None => [NOWHERE; 4],
            Some([offsets, ids, logprobs, tails]) => {
                [part(offsets, n + 1, DType::U32)?, place(ids, DType::U32)?, floats(logprobs)?, part(tails, n, DType::F32)?]
            }
        };
        let arguments = [
            floats(logits)?,
            copy.as_ref().map_or(Ok(NOWHERE), |copy| place(copy, DType::BF16))?,
            Argument::Int(vocab as i32),
            part(&self.labels, n, DType::U32)?,
            offsets,
            ids,
            logprobs,
            tails,
            self.lse_t.as_ref().map_or(Ok(NOWHERE), |lse_t| part(lse_t, n, DType::F32))?,
            Argument::Words(self.settings),
            part(&said.kd, n, DType::F64)?,
            part(&said.ce, n, DType::F64)?,
            part(&said.status, n, DType::U32)?,
        ];
        // SAFETY: n rows of everything; labels and ids are below V, as the batch's check saw; offsets are those of the ids.
        unsafe { launch(&device, "loss_rows", Grid::blocks(n), &arguments) }?;
        Factor::of(copy.as_ref().unwrap_or(logits))
    }
}

/// `loss::Settings` of `kernels/loss_settings.cuh`: five f64, two i32.
fn words(settings: &LossSettings, scale: f64) -> [u64; 6] {
    let LossSettings { divergence, tail, temperature, kd_alpha, kd_ce_alpha } = *settings;
    let (kind, parameter): (u32, f64) = match divergence {
        Divergence::ForwardKl => (0, 0.0),
        Divergence::ReverseKl => (1, 0.0),
        Divergence::Jsd { beta } => (2, beta),
        Divergence::SkewedKl { skew } => (3, skew),
        Divergence::SkewedReverseKl { skew } => (4, skew),
        Divergence::TotalVariation => (5, 0.0),
    };
    let tail: u32 = match tail {
        Tail::Bucket => 0,
        Tail::Renorm => 1,
        Tail::StudentFull => 2,
        Tail::ExactTail => 3,
        Tail::None => 4,
    };
    let [t, alpha, ce, scale, parameter] = [temperature, kd_alpha, kd_ce_alpha, scale, parameter].map(f64::to_bits);
    [t, alpha, ce, scale, parameter, u64::from(kind) | u64::from(tail) << 32]
}
