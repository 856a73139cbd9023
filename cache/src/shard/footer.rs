//! The key-values in a shard's footer: enough to know, from the file alone, what it holds and where it belongs.

use super::read::Family;
use crate::Description;
use crate::ShardEntry;
use crate::codec::value_codec_name;
use crate::error::Flaw;
use crate::guard::fenced;
use parquet::file::metadata::{KeyValue, ParquetMetaData, ParquetMetaDataReader};
use std::fs::File;
use std::path::Path;

/// What every key of ours begins with.
const PREFIX: &str = "potstill.";
/// The only key whose value differs from shard to shard.
const FIRST_ROW: &str = "potstill.first_row";

/// The key-values of the shard that starts at row `first_row` of a cache with this description, in this format version.
pub(crate) fn entries(description: &Description, version: u32, first_row: u64) -> Vec<(String, String)> {
    let d = description;
    // Version 1 knew one kind of selection and named only that.
    let selection = if version == 1 { d.selection.kind().to_string() } else { d.selection.to_string() };
    let pairs = [
        ("format_version", version.to_string()),
        (FIRST_ROW.trim_start_matches(PREFIX), first_row.to_string()),
        ("selection", selection),
        ("k", d.selection.max_entries().to_string()),
        ("vocab_size", d.vocab_size.to_string()),
        ("value_codec", value_codec_name(&d.storage())),
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
    pairs.into_iter().map(|(key, value)| (format!("{PREFIX}{key}"), value)).collect()
}

/// As the Parquet library wants them.
pub(crate) fn key_values(entries: &[(String, String)]) -> Vec<KeyValue> {
    entries.iter().map(|(key, value)| KeyValue::new(key.clone(), value.clone())).collect()
}

/// The digest of the description that the shard in `path` says it belongs to, if its footer can be read.
pub(crate) fn stated_description(path: &Path) -> Option<String> {
    let file = File::open(path).ok().filter(|file| file.metadata().is_ok_and(|info| info.is_file()))?;
    let load = || {
        let mut reader = ParquetMetaDataReader::new();
        reader.try_parse(&file).and_then(|()| reader.finish()).ok()
    };
    let meta = fenced(load).ok().flatten()?;
    let stored = meta.file_metadata().key_value_metadata()?;
    stored.iter().find(|kv| kv.key == "potstill.description_blake3")?.value.clone()
}

/// Checks columns, row counts and key-values of an opened file.
pub(crate) fn check(meta: &ParquetMetaData, family: &Family, expected: &ShardEntry) -> Result<(), Flaw> {
    let file = meta.file_metadata();
    let found = file.schema_descr().root_schema().get_fields();
    if found != family.schema.root_schema().get_fields() {
        let names: Vec<&str> = found.iter().map(|field| field.name()).collect();
        let expected = format!("the columns of format version {}", family.rules.layout.version);
        return Err(Flaw::new(expected, format!("{names:?}")));
    }
    let mut end = 0u64;
    for group in meta.row_groups() {
        let rows = u64::try_from(group.num_rows()).ok().filter(|&rows| rows > 0 && rows <= expected.rows);
        end = end.saturating_add(rows.ok_or_else(|| Flaw::new("row groups of 1 row or more", group.num_rows()))?);
    }
    if end != expected.rows || u64::try_from(file.num_rows()) != Ok(end) {
        let found = format!("{} rows, {end} in its row groups", file.num_rows());
        return Err(Flaw::new(format!("{} rows", expected.rows), found));
    }
    let stored = file.key_value_metadata();
    let first_row = expected.first_row.to_string();
    for (key, value) in &family.footer {
        let value = if key == FIRST_ROW { &first_row } else { value };
        let found = stored.into_iter().flatten().find(|kv| &kv.key == key).and_then(|kv| kv.value.as_deref());
        if found != Some(value.as_str()) {
            return Err(Flaw::new(format!("{key} = {value:?} in the footer"), format!("{found:?}")));
        }
    }
    Ok(())
}
