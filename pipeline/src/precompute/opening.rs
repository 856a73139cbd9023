//! What stage one and a plan of it find out before a weight is computed with: the settings held against the teacher's config and
//! tokenizer, and the whole data encoded and cut to this run's share.

use super::{PrecomputeConfig, part};
use crate::data::{self, ChatTokenizer, DataOptions, Dataset};
use crate::model::config::ModelConfig;
use crate::run::RunContext;
use crate::{Error, Result, device};
use candle_core::Device;
use potstill_cache::{Part, Storage};

/// Settings, teacher and data that go together.
pub(super) struct Opened {
    /// How rows are stored.
    pub storage: Storage,
    /// Where the teacher computes.
    pub device: Device,
    /// The teacher's sizes.
    pub model: ModelConfig,
    pub tokenizer: ChatTokenizer,
    /// The tokenizer's ids: the width of a distribution.
    pub width: u32,
    /// The conversations of this run's share; its fingerprint is of all data.
    pub dataset: Dataset,
    /// The share, where it is not all of them.
    pub part: Option<Part>,
}

impl Opened {
    /// Errors: settings that do not go with the teacher, a model folder without config or tokenizer, data.
    pub(super) fn of(config: &PrecomputeConfig, context: &RunContext) -> Result<Self> {
        let storage = config.storage()?;
        let device = device::pick(&config.device, context)?;
        let model = ModelConfig::from_folder(&config.teacher)?;
        if config.max_length as usize > model.context {
            let expected = format!("at most the teacher's context of {} tokens", model.context);
            return Err(Error::Setting { name: "max_length", found: config.max_length.to_string(), expected });
        }
        let tokenizer = ChatTokenizer::from_folder(&config.teacher)?;
        let width = tokenizer.tokenizer_fingerprint().size;
        if u32::from(storage.selection.head()) > width {
            let expected = format!("at most the tokenizer's {width} ids");
            return Err(Error::Setting { name: "top_k", found: storage.selection.head().to_string(), expected });
        }
        let options =
            DataOptions { max_length: config.max_length, truncation: config.truncate, on_bad_roles: config.on_bad_roles };
        let mut dataset = data::load(&config.data, &tokenizer, &options, context)?;
        let part = part::cut(&mut dataset.examples, config.part, config.rows_per_shard);
        Ok(Self { storage, device, model, tokenizer, width, dataset, part })
    }
}
