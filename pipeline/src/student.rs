//! The student: a frozen NF4 base and trainable LoRA factors on some or all of the seven projections.
//!
//! Owns the walk up and down the layers and the list of trainable tensors; knows nothing of losses, caches or optimisers. Only
//! layer inputs are kept between the two walks ([`Tape`]), and everything else is computed again on the way back, but for the last
//! layers if memory is given for them ([`Student::keep_layers`]).
//!
//! ```text
//! forward     embed ─ x0 ─ layer 0 ─ x1 ─ … ─ xL ─ scored rows ─ norm ─► [N, H]  ─► head and loss (not here)
//! backward    dA, dB of layer 0 ◄─ … ◄─ layer L-1 ◄─ scatter ◄─ norm ◄─ d[N, H] ◄─┘
//! ```

use crate::adapter::{AdapterConfig, MAX_RANK, Scaling, TargetModules, WrongModules, is_dropout};
use crate::data::pack::Pack;
use crate::device;
use crate::kernel::Precision;
use crate::linear::dropout::Dropout;
use crate::linear::{Head, Lora};
use crate::model::decoder::{Decoder, Holding, features};
use crate::model::layer::{Activations, Geometry, PROJECTIONS};
use crate::ops::{add, rows};
use crate::run::RunContext;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::path::Path;

/// Size and strength of the adapter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraSettings {
    /// r, 1 to [`MAX_RANK`].
    pub rank: u32,
    /// alpha; y += factor · B (A x).
    pub alpha: f64,
    /// How alpha becomes the factor: alpha / r, or alpha / √r.
    pub scaling: Scaling,
    /// The projections that carry the adapter.
    pub targets: TargetModules,
    /// Share of A's inputs that training leaves out, from 0 to below 1; the others grow by 1 / (1 - share).
    pub dropout: f64,
    /// Seed of A's start (B starts at 0, so that training starts from the base model) and of what is left out.
    pub seed: u64,
}

impl LoraSettings {
    /// Plain LoRA: alpha / r on all projections, nothing left out.
    pub fn plain(rank: u32, alpha: f64, seed: u64) -> Self {
        Self { rank, alpha, scaling: Scaling::Standard, targets: TargetModules::ALL, dropout: 0.0, seed }
    }

    /// What a stored adapter was trained with, to go on computing with it: dropout belongs to training alone. Errors: a module that
    /// no layer has.
    pub fn of(config: &AdapterConfig) -> Result<Self> {
        let names = config.target_modules.iter().map(String::as_str);
        let wrong = |why: WrongModules| Error::Setting { name: "target_modules", found: why.found, expected: why.expected };
        let targets = TargetModules::of(names).map_err(wrong)?;
        Ok(Self { scaling: config.scaling, targets, ..Self::plain(config.rank, config.alpha, 0) })
    }

    /// Errors: a rank or a dropout out of its range.
    pub fn check(&self) -> Result<()> {
        if self.rank == 0 || self.rank > MAX_RANK {
            let expected = format!("a whole number from 1 to {MAX_RANK}");
            return Err(Error::Setting { name: "rank", found: self.rank.to_string(), expected });
        }
        if !is_dropout(self.dropout) {
            let expected = "a number from 0 to below 1".into();
            return Err(Error::Setting { name: "dropout", found: self.dropout.to_string(), expected });
        }
        Ok(())
    }
}

/// A base model with an adapter.
#[derive(Debug)]
pub struct Student {
    decoder: Decoder,
    /// Share of A's inputs that training leaves out, and the seed of which.
    dropout: (f64, u64),
    /// How many layers' activations a forward pass keeps.
    keep: usize,
}

/// Which rows a training pass is for: what dropout leaves out depends on nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// The optimiser's step.
    pub step: u64,
    /// Number, in the step, of the pack's first token.
    pub first_row: usize,
}

/// What the backward walk needs of the forward walk.
#[derive(Debug)]
pub struct Tape {
    geometry: Geometry,
    /// Each layer's input, f32 [T, H].
    inputs: Vec<Tensor>,
    /// Activations of the last layers.
    kept: Vec<Activations>,
    /// Hidden states of the scored places before the final norm, f32 [N, H].
    scored: Tensor,
    /// The scored places, u32 `[N]`.
    rows: Tensor,
    tokens: usize,
    /// What was left out of the first layer.
    dropout: Option<Dropout>,
}

impl Student {
    /// Reads a dense model folder, quantises its linear layers to NF4 and puts a fresh adapter on them.
    pub fn from_folder(
        folder: &Path,
        lora: &LoraSettings,
        precision: Precision,
        device: &Device,
        context: &RunContext,
    ) -> Result<Self> {
        let mut decoder = Decoder::from_folder(folder, Holding::Nf4, precision, device, context)?;
        decoder.place(context)?;
        Self::new(decoder, lora)
    }

    /// Puts a fresh adapter on a decoder's target projections. Errors: a rank or a dropout out of its range.
    ///
    /// A is uniform in ±1/√in, the bound that PEFT's `kaiming_uniform_(a=√5)` works out to; B is 0.
    pub fn new(mut decoder: Decoder, lora: &LoraSettings) -> Result<Self> {
        lora.check()?;
        decoder.place(&RunContext::default())?;
        let (rank, scale) = (lora.rank as usize, lora.scaling.factor(lora.alpha, lora.rank));
        let mut random = ChaCha8Rng::seed_from_u64(lora.seed);
        let device = decoder.device().clone();
        let config = decoder.config.clone();
        for layer in &mut decoder.layers {
            let linears = layer.linears_mut().into_iter().enumerate();
            for (projection, linear) in linears.filter(|(projection, _)| lora.targets.contains(*projection)) {
                let (outputs, inputs) = features(&config, projection);
                let bound = 1.0 / (inputs as f32).sqrt();
                let a: Vec<f32> = (0..rank * inputs).map(|_| (2.0 * unit(&mut random) - 1.0) * bound).collect();
                let a = Tensor::from_vec(a, (rank, inputs), &device)?;
                let b = Tensor::zeros((outputs, rank), candle_core::DType::F32, &device)?;
                linear.lora = Some(Lora { a, b, scale });
            }
        }
        Ok(Self { decoder, dropout: (lora.dropout, lora.seed), keep: 0 })
    }

    /// From now on the forward pass of [`backward`](Self::backward) keeps the activations of the last `layers` layers, which are then
    /// not computed again; of all of them where there are fewer. Decides memory and time, and no bit of a result.
    pub fn keep_layers(&mut self, layers: usize) {
        self.keep = layers;
    }

    /// A decoder as it stands, with whatever adapters its layers carry, to compute with.
    pub fn of(decoder: Decoder) -> Self {
        Self { decoder, dropout: (0.0, 0), keep: 0 }
    }

    /// The model.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The head as the loss takes it.
    pub fn head(&self) -> Head<'_> {
        self.decoder.head_of_loss()
    }

    /// The trainable tensors: `model.layers.I.PROJECTION.lora_A.weight` f32 [r, in] and `….lora_B.weight` f32 [out, r], layer by
    /// layer in the order of [`PROJECTIONS`], A before B.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let mut all = Vec::new();
        for (i, layer) in self.decoder.layers.iter().enumerate() {
            for (linear, projection) in layer.linears().into_iter().zip(PROJECTIONS) {
                if let Some(lora) = &linear.lora {
                    all.push((format!("model.layers.{i}.{projection}.lora_A.weight"), lora.a.clone()));
                    all.push((format!("model.layers.{i}.{projection}.lora_B.weight"), lora.b.clone()));
                }
            }
        }
        all
    }

    /// Replaces the trainable tensors by ones of the same names and shapes, wherever those lie, in the order of [`parameters`](Self::parameters).
    pub fn set_parameters(&mut self, parameters: &[(String, Tensor)]) -> Result<()> {
        let expected = self.parameters();
        let fits = |(a, b): (&(String, Tensor), &(String, Tensor))| a.0 == b.0 && a.1.dims() == b.1.dims();
        if expected.len() != parameters.len() || !expected.iter().zip(parameters).all(fits) {
            let wrong = expected.iter().zip(parameters).find(|pair| !fits(*pair));
            let show = |p: &(String, Tensor)| format!("{} {:?}", p.0, p.1.dims());
            return Err(Error::Setting {
                name: "adapter",
                found: wrong.map_or(format!("{} tensors", parameters.len()), |(_, b)| show(b)),
                expected: wrong.map_or(format!("{} tensors", expected.len()), |(a, _)| show(a)),
            });
        }
        let device = self.decoder.device().clone();
        let tensors = parameters.iter().map(|(_, tensor)| tensor.to_device(&device));
        let mut tensors = tensors.collect::<candle_core::Result<Vec<Tensor>>>()?.into_iter();
        let linears = self.decoder.layers.iter_mut().flat_map(|layer| layer.linears_mut());
        for lora in linears.filter_map(|linear| linear.lora.as_mut()) {
            if let (Some(a), Some(b)) = (tensors.next(), tensors.next()) {
                (lora.a, lora.b) = (a, b);
            }
        }
        Ok(())
    }

    /// Hidden states of the pack's scored places after the final norm, f32 [N, H], and what the way back needs. Nothing is left out.
    pub fn forward(&self, pack: &Pack) -> Result<(Tensor, Tape)> {
        self.up(pack, None, &RunContext::default())?.ok_or_else(Error::stopped)
    }

    /// The same while training: with dropout. `None` when a stop was asked for.
    pub fn forward_training(&self, pack: &Pack, moment: Moment, context: &RunContext) -> Result<Option<(Tensor, Tape)>> {
        let ((p, seed), Moment { step, first_row }) = (self.dropout, moment);
        let dropout = Dropout { p, seed, step, layer: 0, first_row };
        self.up(pack, (p > 0.0).then_some(dropout), context)
    }

    fn up(&self, pack: &Pack, dropout: Option<Dropout>, context: &RunContext) -> Result<Option<(Tensor, Tape)>> {
        let layers = self.decoder.layers.len();
        let (mut inputs, mut kept) = (Vec::with_capacity(layers), Vec::new());
        let through = |i: usize, x: &Tensor, geometry: &Geometry| {
            inputs.push(x.clone());
            let (layer, dropout) = (&self.decoder.layers[i], of_layer(dropout, i));
            if i + self.keep < layers {
                return layer.forward(x, geometry, dropout);
            }
            let (y, activations) = layer.forward_keeping(x, geometry, dropout)?;
            kept.push(activations);
            Ok(y)
        };
        let Some((scored, rows, geometry)) = self.climb(pack, context, through)? else { return Ok(None) };
        let tokens = pack.input_ids().len();
        let normed = self.decoder.final_norm(&scored)?;
        Ok(Some((normed, Tape { geometry, inputs, kept, scored, rows, tokens, dropout })))
    }

    /// Hidden states of the pack's scored places after the final norm, f32 [N, H], with nothing left out and nothing kept. `None` when a
    /// stop was asked for.
    pub fn hidden(&self, pack: &Pack, context: &RunContext) -> Result<Option<Tensor>> {
        let through = |i: usize, x: &Tensor, geometry: &Geometry| self.decoder.layers[i].forward(x, geometry, None);
        let Some((scored, ..)) = self.climb(pack, context, through)? else { return Ok(None) };
        Ok(Some(self.decoder.final_norm(&scored)?))
    }

    /// Through all layers, each by its number: hidden states of the scored places, those places, and the geometry.
    fn climb(
        &self,
        pack: &Pack,
        context: &RunContext,
        mut through: impl FnMut(usize, &Tensor, &Geometry) -> candle_core::Result<Tensor>,
    ) -> Result<Option<(Tensor, Tensor, Geometry)>> {
        let geometry = Geometry::new(pack, &self.decoder.config, self.decoder.device())?;
        let mut x = self.decoder.embed(pack.input_ids())?;
        for i in 0..self.decoder.layers.len() {
            if context.stopping() {
                return Ok(None);
            }
            x = through(i, &x, &geometry)?;
        }
        let rows = device::tensor(pack.scored(), pack.scored().len(), self.decoder.device())?;
        Ok(Some((rows::gather(&x, &rows)?, rows, geometry)))
    }

    /// From dL/d(result of [`forward`](Self::forward)): the gradients of the trainable tensors, in the order of
    /// [`parameters`](Self::parameters).
    pub fn backward(&self, tape: Tape, d_normed: &Tensor) -> Result<Vec<Tensor>> {
        let mut gradients = Vec::new();
        match self.backward_training(tape, d_normed, &mut gradients, &RunContext::default())? {
            Walk::Done => Ok(gradients),
            Walk::Stopped => Err(Error::stopped()),
        }
    }

    /// Adds the same to `sums`, which is empty at a step's first pack. Sums mean nothing after a stop.
    pub fn backward_training(&self, tape: Tape, d_normed: &Tensor, sums: &mut Vec<Tensor>, context: &RunContext) -> Result<Walk> {
        let Tape { geometry, mut inputs, mut kept, scored, rows, tokens, dropout } = tape;
        let d_scored = self.decoder.final_norm_backward(&scored, d_normed)?;
        let mut dx = rows::scatter(&d_scored, &rows, tokens)?;
        let mut first = Vec::with_capacity(inputs.len());
        let mut end = sums.len();
        for (i, layer) in self.decoder.layers.iter().enumerate().rev() {
            if context.stopping() {
                return Ok(Walk::Stopped);
            }
            let Some(x) = inputs.pop() else { break };
            let (below, gradients) = layer.backward(&x, kept.pop(), &dx, &geometry, of_layer(dropout, i))?;
            dx = below;
            let gradients: Vec<Tensor> = gradients.into_iter().flatten().flat_map(|g| [g.a, g.b]).collect();
            if sums.is_empty() {
                first.push(gradients);
                continue;
            }
            // Layer by layer, so that all gradients are never held twice.
            end -= gradients.len();
            for (sum, gradient) in sums[end..].iter_mut().zip(&gradients) {
                *sum = add(sum, gradient)?;
            }
        }
        sums.extend(first.into_iter().rev().flatten());
        Ok(Walk::Done)
    }
}

/// How a walk through the layers ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Walk {
    /// At its end.
    Done,
    /// Before, as it was asked to.
    Stopped,
}

fn of_layer(dropout: Option<Dropout>, layer: usize) -> Option<Dropout> {
    dropout.map(|dropout| Dropout { layer, ..dropout })
}

/// Uniform in [0, 1), 24 bits.
fn unit(random: &mut ChaCha8Rng) -> f32 {
    (random.next_u32() >> 8) as f32 / (1 << 24) as f32
}
