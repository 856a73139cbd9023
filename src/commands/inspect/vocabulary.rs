//! What turns ids into text: the tokenizer that lies in the cache itself, so that a cache is read without any model. A cache may have
//! none; its tokens are then shown as their numbers.

use crate::exit::UsageError;
use anyhow::Context;
use potstill_cache::Cache;
use potstill_pipeline::data::ChatTokenizer;

/// Where a cache keeps the tokenizer that made its ids.
const TOKENIZER: &str = "tokenizer/tokenizer.json";

/// The tokens of a cache.
pub struct Vocabulary {
    tokenizer: Option<ChatTokenizer>,
}

impl Vocabulary {
    /// Reads the cache's tokenizer, if it has one.
    pub fn of(cache: &Cache) -> anyhow::Result<Self> {
        if !cache.manifest().companions.iter().any(|companion| companion.path == TOKENIZER) {
            return Ok(Self { tokenizer: None });
        }
        // It is read from a copy: its bytes were checked against the manifest, and the file may not be touched.
        let folder = tempfile::tempdir().context("making a temporary folder for the tokenizer")?;
        let copy = folder.path().join("tokenizer.json");
        std::fs::write(&copy, cache.companion(TOKENIZER)?).with_context(|| format!("{}: cannot write", copy.display()))?;
        let tokenizer = ChatTokenizer::tokenizer_only(folder.path()).map_err(potstill_pipeline::Error::from)?;
        Ok(Self { tokenizer: Some(tokenizer) })
    }

    /// The same, of a cache in whose text something is looked for.
    pub fn required(cache: &Cache) -> anyhow::Result<Self> {
        let this = Self::of(cache)?;
        if this.tokenizer.is_none() {
            let dir = cache.dir().display();
            return Err(UsageError(format!("{dir}: --find needs the tokenizer in the cache ({TOKENIZER}), found none")).into());
        }
        Ok(this)
    }

    /// A token's bytes, which may be part of a character.
    pub fn bytes(&self, id: u32) -> Vec<u8> {
        match &self.tokenizer {
            Some(tokenizer) => tokenizer.token_bytes(id),
            None => format!("<id {id}>").into_bytes(),
        }
    }
}
