//! The teacher: packs in, soft targets out.
//!
//! Owns the model that scores and the width of its distribution: the tokenizer's ids. Head rows beyond them are padding that no
//! text can contain; they are left out before the softmax. Knows nothing of students, chats or files.
//!
//! The one idea: the teacher only ever scores given text, so a block of packs goes through layer after layer together. A layer's
//! weights are read from their file once a block, the next layer's while this one computes; memory holds two packed layers or the
//! embedding or the head, the block's hidden states, what is kept of its logits, and one chunk of those, whatever the depth.

use crate::data::pack::Pack;
use crate::device;
use crate::kernel::Precision;
use crate::linear::{Linear, Weight, forward_all};
use crate::model::ModelError;
use crate::model::config::ModelConfig;
use crate::model::decoder::{Decoder, Holding};
use crate::model::layer::Geometry;
use crate::model::turns::Turns;
use crate::model::weights::Weights;
use crate::ops::capture::{Capture, Captured, Capturing};
use crate::ops::draw::Place;
use crate::ops::rows;
use crate::run::RunContext;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use potstill_cache::RowKey;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Where a teacher's weights are between two uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Residency {
    /// In memory, all of them.
    Resident,
    /// In their files: a layer is read when its turn comes, and let go after it.
    Streamed,
}

/// A model that scores given text.
#[derive(Debug)]
pub struct Teacher {
    decoder: Decoder,
    /// [width, H], the head's rows of the tokenizer's ids.
    head: Linear,
    residency: Residency,
    /// Whether every layer was in memory once.
    warm: AtomicBool,
    /// Nanoseconds spent on the head and on what is kept of its logits.
    head_nanos: AtomicU64,
}

/// A pack's hidden states at its scored places, after the final norm: f32 [N, H].
#[derive(Debug, Clone)]
pub struct ScoredHidden(Tensor);

impl Teacher {
    /// Reads the model folder; `width` is the number of the tokenizer's ids. Errors: as [`Decoder::from_folder`], or a head with fewer
    /// rows than the tokenizer has ids.
    pub fn from_folder(
        folder: &Path,
        width: u32,
        (precision, residency): (Precision, Residency),
        device: &Device,
        context: &RunContext,
    ) -> Result<Self> {
        let mut decoder = Decoder::from_folder(folder, Holding::AsStored, precision, device, context)?;
        if residency == Residency::Resident {
            decoder.place_layers(context)?;
            decoder.place_embedding()?;
        }
        let head = check_width(folder, &decoder.config, width, decoder.head().first_rows(width as usize))?;
        Ok(Self {
            decoder,
            head: Linear::new(Weight::Dense(head), None).placed(device)?,
            residency,
            warm: AtomicBool::new(false),
            head_nanos: AtomicU64::new(0),
        })
    }

    /// What [`from_folder`](Self::from_folder) would refuse, found without loading anything.
    pub fn check_folder(folder: &Path, config: &ModelConfig, weights: &Weights, width: u32) -> Result<()> {
        check_width(folder, config, width, (config.vocab_size >= width as usize).then_some(()))?;
        Ok(Decoder::check_folder(config, weights)?)
    }

    /// Hidden states at the packs' scored places; `None` where `context` asks for a stop meanwhile. Counts each token in the progress
    /// as far as it got, the head being the last of `layers + 1` equal steps.
    pub fn hidden(&self, packs: &[Pack], context: &RunContext) -> Result<Option<Vec<ScoredHidden>>> {
        let config = &self.decoder.config;
        let device = self.decoder.device();
        let geometries =
            packs.iter().map(|pack| Geometry::new(pack, config, device)).collect::<candle_core::Result<Vec<Geometry>>>()?;
        let mut states =
            packs.iter().map(|pack| self.decoder.embed(pack.input_ids())).collect::<candle_core::Result<Vec<_>>>()?;
        if self.residency == Residency::Streamed {
            // The embedding, of which a long block has touched most pages.
            self.decoder.release_ends();
        }
        let mut turns = Turns::new(&self.decoder, self.residency == Residency::Streamed)?;
        for i in 0..self.decoder.layers.len() {
            let layer = turns.begin(i)?;
            let done = std::thread::scope(|threads| -> Result<bool> {
                // What a GPU holds, or copies for itself, is not read ahead.
                let reads = device.is_cpu() && (self.residency == Residency::Streamed || !self.warm.load(Ordering::Relaxed));
                if reads {
                    // Where there is no thread to be had, the layer is read when it is touched.
                    let _ = std::thread::Builder::new().spawn_scoped(threads, || self.decoder.populate_layer(i + 1));
                }
                for ((x, geometry), pack) in states.iter_mut().zip(&geometries).zip(packs) {
                    if context.stopping() {
                        return Ok(false);
                    }
                    *x = layer.forward(x, geometry, None)?;
                    context.progress.add(self.share(pack, i));
                }
                turns.launched()?;
                Ok(true)
            })?;
            if self.residency == Residency::Streamed {
                self.decoder.release_layer(i);
            }
            if !done {
                return Ok(None);
            }
        }
        self.warm.store(true, Ordering::Relaxed);
        let scored = |(pack, x): (&Pack, Tensor)| -> Result<ScoredHidden> {
            let places = device::tensor(pack.scored(), pack.scored().len(), device)?;
            let scored = rows::gather(&x, &places)?;
            Ok(ScoredHidden(self.decoder.final_norm(&scored)?))
        };
        packs.iter().zip(states).map(scored).collect::<Result<_>>().map(Some)
    }

    /// Logits f32 [n, width] of scored places `start..start + n`.
    pub fn logits(&self, hidden: &ScoredHidden, start: usize, n: usize) -> Result<Tensor> {
        self.logits_by(&self.head, hidden, start..start + n)
    }

    fn logits_by(&self, head: &Linear, hidden: &ScoredHidden, places: Range<usize>) -> Result<Tensor> {
        let [logits] = forward_all([head], &hidden.0.narrow(0, places.start, places.len())?, self.decoder.precision())?;
        Ok(logits)
    }

    /// What `capture` keeps of all scored places of each pack, and the places that have nothing because a logit cannot be kept; `None`
    /// where `context` asks for a stop meanwhile. Logits of at most `chunk` places exist at once. Errors: as [`Capture::rows`].
    pub fn score(&self, packs: &[Pack], capture: &Capture, chunk: usize, context: &RunContext) -> Result<Option<Vec<Captured>>> {
        let scored = self.score_several(packs, &[capture], chunk, context)?;
        Ok(scored.map(|(packs, _)| packs.into_iter().flatten().collect()))
    }

    /// As [`score`](Self::score), for several captures of the same logits: one result each, pack by pack, and the time that those
    /// after the first took.
    pub fn score_several(
        &self,
        packs: &[Pack],
        captures: &[&Capture],
        chunk: usize,
        context: &RunContext,
    ) -> Result<Option<(Vec<Vec<Captured>>, Duration)>> {
        let Some(states) = self.hidden(packs, context)? else { return Ok(None) };
        let (began, mut more) = (Instant::now(), Duration::ZERO);
        let head = self.head.held(self.decoder.precision())?;
        let mut all = vec![vec![Captured::default(); captures.len()]; packs.len()];
        // A chunk's rows are made while a GPU computes the next one's logits.
        let mut under_way: Option<(usize, Capturing)> = None;
        for (number, (pack, hidden)) in packs.iter().zip(states).enumerate() {
            let (n, places) = (pack.scored().len(), places(pack));
            for start in (0..n).step_by(chunk.max(1)) {
                if context.stopping() {
                    return Ok(None);
                }
                let range = start..n.min(start.saturating_add(chunk.max(1)));
                let (logits, places) = (self.logits_by(&head, &hidden, range.clone())?, &places[range]);
                let [first, others @ ..] = captures else { continue };
                let begun = (number, first.begin(&logits, places)?);
                // Before others its work is waited for, so that their time is their own.
                let over = if others.is_empty() { under_way.replace(begun) } else { Some(begun) };
                finish(over, &mut all)?;
                let began = Instant::now();
                for (capture, captured) in others.iter().zip(&mut all[number][1..]) {
                    captured.extend(&capture.rows(&logits, places)?);
                }
                more += began.elapsed();
            }
            context.progress.add(self.share(pack, self.decoder.layers.len()));
        }
        finish(under_way, &mut all)?;
        if self.residency == Residency::Streamed {
            self.decoder.release_ends();
        }
        self.head_nanos.fetch_add(began.elapsed().saturating_sub(more).as_nanos() as u64, Ordering::Relaxed);
        Ok(Some((all, more)))
    }

    /// Time spent on the head and on what is kept of its logits, so far.
    pub fn head_time(&self) -> Duration {
        Duration::from_nanos(self.head_nanos.load(Ordering::Relaxed))
    }

    /// How many of a pack's tokens step `i` of `layers + 1` counts for, so that all steps count each token once.
    fn share(&self, pack: &Pack, i: usize) -> u64 {
        let (tokens, steps) = (pack.input_ids().len() as u64, self.decoder.layers.len() as u64 + 1);
        let until = |step: u64| tokens * step / steps;
        until(i as u64 + 1) - until(i as u64)
    }
}

/// Appends what was captured of a pack's rows, if anything was, to that pack's first result.
fn finish(under_way: Option<(usize, Capturing)>, all: &mut [Vec<Captured>]) -> Result<()> {
    if let Some((pack, capturing)) = under_way {
        all[pack][0].extend(&capturing.finish()?);
    }
    Ok(())
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

/// `found`, or what is wrong where there are fewer rows than ids.
fn check_width<T>(folder: &Path, config: &ModelConfig, width: u32, found: Option<T>) -> Result<T> {
    found.ok_or_else(|| {
        Error::Model(ModelError::Config {
            path: folder.join("config.json"),
            key: "vocab_size".into(),
            expected: format!("at least the tokenizer's {width} ids"),
            found: config.vocab_size.to_string(),
        })
    })
}
