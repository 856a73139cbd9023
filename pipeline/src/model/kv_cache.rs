//! What a model keeps of a conversation so that it can go on: keys and values of every layer. And the forward over new tokens alone.
//!
//! The same layers as everywhere, whose attention sees kept rows too (`ops/attention/cached.rs`); f32, so that the bits are those of the
//! whole conversation computed at once.

use super::config::ModelConfig;
use super::decoder::Decoder;
use super::layer::Geometry;
use crate::ops::attention::KeysValues;
use crate::ops::rows;
use crate::run::RunContext;
use candle_core::Tensor;

/// Keys and values of a conversation so far.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<KeysValues>,
}

impl KvCache {
    /// Nothing yet of a conversation that may become `capacity` tokens long.
    pub fn new(config: &ModelConfig, capacity: usize) -> Self {
        let layer = || KeysValues::new(config.kv_heads, config.head_dim, capacity);
        Self { layers: (0..config.layers).map(|_| layer()).collect() }
    }

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, KeysValues::len)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that a token takes in a model of these sizes.
    pub fn token_bytes(config: &ModelConfig) -> u64 {
        (config.layers * KeysValues::row_bytes(config.kv_heads, config.head_dim)) as u64
    }
}

impl Decoder {
    /// Hidden states before the final norm of each conversation's last new token, f32 [n, H], from its new tokens and what is kept of
    /// those before; the new ones are kept too. The bits are those of [`hidden`](Self::hidden) over the whole conversation.
    ///
    /// `None` when a stop was asked for: the caches mean nothing then.
    pub fn hidden_cached(&self, new: &mut [(&[u32], &mut KvCache)], context: &RunContext) -> candle_core::Result<Option<Tensor>> {
        let lengths: Vec<(usize, usize)> = new.iter().map(|(ids, past)| (past.len(), ids.len())).collect();
        let geometry = Geometry::continued(&lengths, &self.config, self.device())?;
        let ids: Vec<u32> = new.iter().flat_map(|(ids, _)| ids.iter().copied()).collect();
        let mut x = self.embed(&ids)?;
        for (i, layer) in self.layers.iter().enumerate() {
            if context.stopping() {
                return Ok(None);
            }
            let mut past: Vec<&mut KeysValues> = new.iter_mut().filter_map(|(_, past)| past.layers.get_mut(i)).collect();
            x = layer.forward_cached(&x, &geometry, &mut past)?;
        }
        let mut end = 0;
        let last = lengths.iter().map(|(_, new)| {
            end += *new as u32;
            end.saturating_sub(1)
        });
        let last = Tensor::new(last.collect::<Vec<u32>>(), self.device())?;
        rows::gather(&x, &last).map(Some)
    }
}
