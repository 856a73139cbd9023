//! Which tensors go into which file, and the files' headers.

use crate::tensor::Tensor;
use serde_json::{Map, Value, json};

/// One safetensors file.
pub struct Shard {
    pub name: String,
    pub range: std::ops::Range<usize>,
    /// Length and JSON, padded so that the data begins at a multiple of 8.
    pub header: Vec<u8>,
    pub data: u64,
}

/// Whole tensors in their order, as many to a file as fit.
pub fn plan(tensors: &[Tensor], most: u64) -> Vec<Shard> {
    let (mut ranges, mut start, mut filled) = (Vec::new(), 0, 0);
    for (i, tensor) in tensors.iter().enumerate() {
        let bytes = tensor.bytes() as u64;
        if i > start && filled + bytes > most {
            ranges.push(start..i);
            (start, filled) = (i, 0);
        }
        filled += bytes;
    }
    ranges.push(start..tensors.len());
    let count = ranges.len();
    let shard = |(i, range): (usize, std::ops::Range<usize>)| {
        let (mut entries, mut data) = (Map::new(), 0u64);
        entries.insert("__metadata__".into(), json!({ "format": "pt" }));
        for tensor in &tensors[range.clone()] {
            let end = data + tensor.bytes() as u64;
            entries.insert(
                tensor.name.clone(),
                json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [data, end] }),
            );
            data = end;
        }
        let mut text = Value::from(entries).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let header = [&(text.len() as u64).to_le_bytes()[..], &text].concat();
        Shard { name: format!("model-{:05}-of-{count:05}.safetensors", i + 1), range, header, data }
    };
    ranges.into_iter().enumerate().map(shard).collect()
}
