//! The student: a frozen NF4 base and trainable LoRA factors on all seven projections.
//!
//! Owns the walk down and up the layers and the list of trainable tensors; knows nothing of losses, caches or optimisers. Only
//! layer inputs are kept between the two walks ([`Tape`]); everything else is computed again on the way back.
//!
//! ```text
//! forward     embed ─ x0 ─ layer 0 ─ x1 ─ … ─ xL ─ scored rows ─ norm ─► [N, H]  ─► head and loss (not here)
//! backward    dA, dB of layer 0 ◄─ … ◄─ layer L-1 ◄─ scatter ◄─ norm ◄─ d[N, H] ◄─┘
//! ```

use crate::adapter::MAX_RANK;
use crate::data::pack::Pack;
use crate::kernel::Precision;
use crate::linear::{Head, Lora};
use crate::model::decoder::{Decoder, Holding, features};
use crate::model::layer::{Geometry, PROJECTIONS};
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
    /// alpha; y += alpha / r · B (A x).
    pub alpha: f64,
    /// Seed of A's start (B starts at 0, so that training starts from the base model).
    pub seed: u64,
}

/// A base model with an adapter.
#[derive(Debug, Clone)]
pub struct Student {
    decoder: Decoder,
}

/// What the backward walk needs of the forward walk.
#[derive(Debug)]
pub struct Tape {
    geometry: Geometry,
    /// Each layer's input, f32 [T, H].
    inputs: Vec<Tensor>,
    /// Hidden states of the scored places before the final norm, f32 [N, H].
    scored: Tensor,
    /// The scored places, u32 `[N]`.
    rows: Tensor,
    tokens: usize,
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
        Self::new(Decoder::from_folder(folder, Holding::Nf4, precision, device, context)?, lora)
    }

    /// Puts a fresh adapter on a decoder. Errors: a rank out of its range.
    ///
    /// A is uniform in ±1/√in, the bound that PEFT's `kaiming_uniform_(a=√5)` works out to; B is 0.
    pub fn new(mut decoder: Decoder, lora: &LoraSettings) -> Result<Self> {
        if lora.rank == 0 || lora.rank > MAX_RANK {
            let expected = format!("a whole number from 1 to {MAX_RANK}");
            return Err(Error::Setting { name: "rank", found: lora.rank.to_string(), expected });
        }
        let (rank, scale) = (lora.rank as usize, lora.alpha / f64::from(lora.rank));
        let mut random = ChaCha8Rng::seed_from_u64(lora.seed);
        let device = decoder.device().clone();
        let config = decoder.config.clone();
        for layer in &mut decoder.layers {
            for (projection, linear) in layer.linears_mut().into_iter().enumerate() {
                let (outputs, inputs) = features(&config, projection);
                let bound = 1.0 / (inputs as f32).sqrt();
                let a: Vec<f32> = (0..rank * inputs).map(|_| (2.0 * unit(&mut random) - 1.0) * bound).collect();
                let a = Tensor::from_vec(a, (rank, inputs), &device)?;
                let b = Tensor::zeros((outputs, rank), candle_core::DType::F32, &device)?;
                linear.lora = Some(Lora { a, b, scale });
            }
        }
        Ok(Self { decoder })
    }

    /// The model.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The head as the loss takes it.
    pub fn head(&self) -> Head<'_> {
        Head { weight: self.decoder.head(), precision: self.decoder.precision() }
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

    /// Replaces the trainable tensors by ones of the same names and shapes, in the order of [`parameters`](Self::parameters).
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
        let mut tensors = parameters.iter().map(|(_, tensor)| tensor.clone());
        for linear in self.decoder.layers.iter_mut().flat_map(|layer| layer.linears_mut()) {
            if let (Some(lora), Some(a), Some(b)) = (&mut linear.lora, tensors.next(), tensors.next()) {
                (lora.a, lora.b) = (a, b);
            }
        }
        Ok(())
    }

    /// Hidden states of the pack's scored places after the final norm, f32 [N, H], and what the way back needs.
    pub fn forward(&self, pack: &Pack) -> Result<(Tensor, Tape)> {
        let geometry = Geometry::new(pack, &self.decoder.config);
        let mut x = self.decoder.embed(pack.input_ids())?;
        let mut inputs = Vec::with_capacity(self.decoder.layers.len());
        for layer in &self.decoder.layers {
            let y = layer.forward(&x, &geometry)?;
            inputs.push(std::mem::replace(&mut x, y));
        }
        let rows = Tensor::new(pack.scored(), self.decoder.device())?;
        let scored = x.index_select(&rows, 0)?;
        let normed = self.decoder.final_norm(&scored)?;
        Ok((normed, Tape { geometry, inputs, scored, rows, tokens: pack.input_ids().len() }))
    }

    /// From dL/d(result of [`forward`](Self::forward)): the gradients of the trainable tensors, in the order of
    /// [`parameters`](Self::parameters).
    pub fn backward(&self, tape: Tape, d_normed: &Tensor) -> Result<Vec<Tensor>> {
        let d_scored = self.decoder.final_norm_backward(&tape.scored, d_normed)?;
        let zeros = Tensor::zeros((tape.tokens, self.decoder.config.hidden_size), d_scored.dtype(), d_scored.device())?;
        let mut dx = zeros.index_add(&tape.rows, &d_scored, 0)?;
        let mut by_layer = Vec::with_capacity(tape.inputs.len());
        for (layer, x) in self.decoder.layers.iter().zip(&tape.inputs).rev() {
            let (below, gradients) = layer.backward(x, &dx, &tape.geometry)?;
            by_layer.push(gradients);
            dx = below;
        }
        Ok(by_layer.into_iter().rev().flatten().flatten().flat_map(|g| [g.a, g.b]).collect())
    }
}

/// Uniform in [0, 1), 24 bits.
fn unit(random: &mut ChaCha8Rng) -> f32 {
    (random.next_u32() >> 8) as f32 / (1 << 24) as f32
}
