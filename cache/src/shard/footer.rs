//! The key-values in a shard's footer: enough to know, from the file alone, what it holds and where it belongs.

use crate::codec::value_codec_name;
use crate::{Description, FORMAT_VERSION};
use parquet::file::metadata::KeyValue;

/// The key-values of the shard that starts at row `first_row` of a cache with this description.
pub(crate) fn entries(description: &Description, first_row: u64) -> Vec<(String, String)> {
    let d = description;
    let pairs: [(&str, String); 16] = [
        ("format_version", FORMAT_VERSION.to_string()),
        ("first_row", first_row.to_string()),
        ("selection", d.selection.name().into()),
        ("k", d.selection.max_entries().to_string()),
        ("vocab_size", d.vocab_size.to_string()),
        ("value_codec", value_codec_name(d.mantissa_bits)),
        ("alignment", "next".into()),
        ("temperature", "1".into()),
        ("teacher", d.teacher.name.clone()),
        ("teacher_config_blake3", d.teacher.config_blake3.clone()),
        ("teacher_weights_blake3", d.teacher.weights_blake3.clone()),
        ("tokenizer_vocabulary_blake3", d.tokenizer.vocabulary_blake3.clone()),
        ("tokenizer_blake3", d.tokenizer.blake3.clone()),
        ("template_blake3", d.template.blake3.clone()),
        ("data_blake3", d.data.digest()),
        ("description_blake3", d.digest()),
    ];
    pairs.into_iter().map(|(key, value)| (format!("potstill.{key}"), value)).collect()
}

/// As the Parquet library wants them.
pub(crate) fn key_values(entries: &[(String, String)]) -> Vec<KeyValue> {
    entries.iter().map(|(key, value)| KeyValue::new(key.clone(), value.clone())).collect()
}
