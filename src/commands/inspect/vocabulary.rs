//! What turns ids into text: the tokenizer that lies in the cache itself, so that a cache is read without any model.

use anyhow::Context;
use potstill_cache::Cache;
use potstill_pipeline::data::ChatTokenizer;

/// Where a cache keeps the tokenizer that made its ids.
const TOKENIZER: &str = "tokenizer/tokenizer.json";

/// The tokens of a cache.
pub struct Vocabulary {
    tokenizer: ChatTokenizer,
}

impl Vocabulary {
    /// Reads the cache's tokenizer.
    pub fn of(cache: &Cache) -> anyhow::Result<Self> {
        // It is read from a copy: its bytes were checked against the manifest, and the file may not be touched.
        let folder = tempfile::tempdir().context("making a temporary folder for the tokenizer")?;
        let copy = folder.path().join("tokenizer.json");
        std::fs::write(&copy, cache.companion(TOKENIZER)?).with_context(|| format!("{}: cannot write", copy.display()))?;
        let tokenizer = ChatTokenizer::tokenizer_only(folder.path()).map_err(potstill_pipeline::Error::from)?;
        Ok(Self { tokenizer })
    }

    /// The cache's tokenizer, or None where the cache has none.
    pub fn where_kept(cache: &Cache) -> anyhow::Result<Option<Self>> {
        if cache.manifest().companions.iter().any(|companion| companion.path == TOKENIZER) {
            Self::of(cache).map(Some)
        } else {
            Ok(None)
        }
    }

    /// A token's bytes, which may be part of a character.
    pub fn bytes(&self, id: u32) -> Vec<u8> {
        self.tokenizer.token_bytes(id)
    }

    /// The bytes of several tokens, one after another.
    pub fn joined(&self, ids: impl IntoIterator<Item = u32>) -> Vec<u8> {
        ids.into_iter().flat_map(|id| self.bytes(id)).collect()
    }
}
