//! How many bytes a model's tensors take as they are stored: by their headers, or before there are any by the config alone. Reads no
//! weight.

use super::config::ModelConfig;
use super::decoder::{EMBEDDING, HEAD, expected};
use super::weights::Weights;
use safetensors::Dtype;
use serde::Serialize;

/// Bytes of a model's tensors by where they are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct StoredBytes {
    /// All of them.
    pub total: u64,
    /// The largest layer's.
    pub layer: u64,
    /// The embedding's.
    pub embedding: u64,
    /// The head's; the embedding's where it is the head too.
    pub head: u64,
}

impl StoredBytes {
    /// Of a model of this config. Without `weights` packed words are taken for 32 bits and all other numbers for 16, as models are
    /// published today.
    pub fn of(config: &ModelConfig, weights: Option<&Weights>) -> Self {
        let mut bytes = Self::default();
        let mut layers = vec![0u64; config.layers];
        for (name, shape) in expected(config) {
            let width = weights.and_then(|w| w.info(&name)).map_or_else(|| assumed_width(&name), |info| width(info.dtype));
            let size = shape.iter().map(|n| *n as u64).product::<u64>() * width;
            bytes.total += size;
            match name.as_str() {
                EMBEDDING => bytes.embedding = size,
                HEAD => bytes.head = size,
                _ => {
                    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
                    if let Some(layer) = layer.and_then(|i| layers.get_mut(i)) {
                        *layer += size;
                    }
                }
            }
        }
        bytes.layer = layers.into_iter().max().unwrap_or(0);
        if config.tied {
            bytes.head = bytes.embedding;
        }
        bytes
    }
}

fn width(dtype: Dtype) -> u64 {
    match dtype {
        Dtype::F16 | Dtype::BF16 => 2,
        // A decoder takes no other types than these and 32-bit words (`Decoder::check_folder`).
        _ => 4,
    }
}

fn assumed_width(name: &str) -> u64 {
    if name.ends_with(".qweight") || name.ends_with(".qzeros") { 4 } else { 2 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use std::path::Path;

    #[test]
    fn headers_and_config_agree_with_the_files() {
        let golden = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden"));
        for folder in ["teacher-awq", "student"] {
            let folder = golden.join(folder);
            let config = ModelConfig::from_folder(&folder).unwrap();
            let weights = Weights::open(&folder).unwrap();
            let stored = StoredBytes::of(&config, Some(&weights));
            // The files hold these tensors, each once, and a header of a few KiB.
            let files = weights.total_bytes();
            assert!(stored.total < files && files - stored.total < 32 << 10, "{folder:?}: {stored:?}, {files}");
            let others = stored.total - config.layers as u64 * stored.layer - stored.embedding;
            let head = if config.tied { 0 } else { stored.head };
            // All layers are alike, and beside them and both ends there is one norm of H numbers.
            assert!((1..=4).contains(&((others - head) / config.hidden_size as u64)), "{folder:?}: {stored:?}");
            assert_eq!(stored.head, stored.embedding);
        }
    }

    #[test]
    fn a_config_alone_says_what_a_published_model_takes() {
        let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden/teacher-awq"));
        let config = ModelConfig::from_folder(folder).unwrap();
        let (told, read) = (StoredBytes::of(&config, None), StoredBytes::of(&config, Some(&Weights::open(folder).unwrap())));
        // The layers are AWQ, whose types are given; the fixture's norms may be 32 bits wide.
        assert!(told.layer <= read.layer && read.layer - told.layer < read.layer / 20, "{told:?} {read:?}");
    }
}
