//! The teacher: packs in, soft targets out.
//!
//! Owns the model that scores and the width of its distribution: the tokenizer's ids. Head rows beyond them are padding that no
//! text can contain; they are left out before the softmax. Knows nothing of students, chats or files.

use crate::data::pack::Pack;
use crate::linear::product;
use crate::model::ModelError;
use crate::model::config::ModelConfig;
use crate::model::decoder::{Decoder, Holding};
use crate::model::weights::Weights;
use crate::ops::capture::{Capture, Captured};
use crate::ops::draw::Place;
use crate::run::RunContext;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use potstill_cache::{RowKey, SoftTargets};
use std::path::Path;

/// A model that scores given text.
#[derive(Debug, Clone)]
pub struct Teacher {
    decoder: Decoder,
    /// f32 [width, H], the head's rows of the tokenizer's ids.
    head: Tensor,
}

/// A pack's hidden states at its scored places, after the final norm: f32 [N, H].
#[derive(Debug, Clone)]
pub struct ScoredHidden(Tensor);

impl Teacher {
    /// Reads the model folder; `width` is the number of the tokenizer's ids. Errors: as [`Decoder::from_folder`], or a head with fewer
    /// rows than the tokenizer has ids.
    pub fn from_folder(folder: &Path, width: u32, device: &Device, context: &RunContext) -> Result<Self> {
        let decoder = Decoder::from_folder(folder, Holding::AsStored, device, context)?;
        check_width(folder, &decoder.config, width)?;
        let head = decoder.head().narrow(0, 0, width as usize)?;
        Ok(Self { decoder, head })
    }

    /// What [`from_folder`](Self::from_folder) would refuse, found without loading anything.
    pub fn check_folder(folder: &Path, config: &ModelConfig, weights: &Weights, width: u32) -> Result<()> {
        check_width(folder, config, width)?;
        Ok(Decoder::check_folder(config, weights)?)
    }

    /// Hidden states at the pack's scored places.
    pub fn hidden(&self, pack: &Pack) -> Result<ScoredHidden> {
        let hidden = self.decoder.hidden(pack)?;
        let rows = Tensor::new(pack.scored(), self.decoder.device())?;
        Ok(ScoredHidden(self.decoder.final_norm(&hidden.index_select(&rows, 0)?)?))
    }

    /// Logits f32 [n, width] of scored places `start..start + n`.
    pub fn logits(&self, hidden: &ScoredHidden, start: usize, n: usize) -> Result<Tensor> {
        let rows = hidden.0.narrow(0, start, n)?;
        Ok(product(&rows, &self.head.t()?)?)
    }

    /// Soft targets of all scored places of the pack, as `capture` says. Logits of at most `chunk` places exist at once. Errors: as
    /// [`Capture::targets`].
    pub fn score(&self, pack: &Pack, capture: &Capture, chunk: usize) -> Result<SoftTargets> {
        Ok(self.capture(pack, capture, chunk)?.sound()?)
    }

    /// The same, with the places that have none because a logit cannot be kept. Errors: as [`Capture::rows`].
    pub fn capture(&self, pack: &Pack, capture: &Capture, chunk: usize) -> Result<Captured> {
        let n = pack.scored().len();
        let mut captured = Captured::default();
        if n == 0 {
            return Ok(captured);
        }
        let places = places(pack);
        let hidden = self.hidden(pack)?;
        for start in (0..n).step_by(chunk.max(1)) {
            let rows = chunk.max(1).min(n - start);
            captured.extend(&capture.rows(&self.logits(&hidden, start, rows)?, &places[start..start + rows])?);
        }
        Ok(captured)
    }
}

/// Where each of a pack's scored places stands in its own conversation, whatever else is in the pack.
fn places(pack: &Pack) -> Vec<Place> {
    let mut places = Vec::with_capacity(pack.scored().len());
    for (i, bounds) in pack.segments().windows(2).enumerate() {
        let ids = &pack.input_ids()[bounds[0] as usize..bounds[1] as usize];
        let positions: Vec<u32> = pack.scored()[pack.scored_of(i)].iter().map(|at| at - bounds[0]).collect();
        let row = RowKey::of(ids, &positions);
        places.extend(positions.into_iter().map(|position| Place { row, position }));
    }
    places
}

fn check_width(folder: &Path, config: &ModelConfig, width: u32) -> Result<()> {
    if config.vocab_size >= width as usize {
        return Ok(());
    }
    Err(Error::Model(ModelError::Config {
        path: folder.join("config.json"),
        key: "vocab_size".into(),
        expected: format!("at least the tokenizer's {width} ids"),
        found: config.vocab_size.to_string(),
    }))
}
