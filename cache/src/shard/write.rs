//! Writing a shard: one page a row for every list column, so that reading a row touches its own pages and no others.

use super::{ROWS_PER_GROUP, footer};
use crate::schema::{self, ELEMENT, INPUT_IDS, SEQ_ID, TAIL_LOGPROB, TOPK_IDS, TOPK_LOGPROBS};
use crate::{Error, Record, Result, durable};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterVersion};
use parquet::schema::types::ColumnPath;
use std::fs::File;
use std::path::{Path, PathBuf};

/// A page is cut by rows alone; this only has to be larger than any row.
const PAGE_BYTES: usize = 1 << 30;
/// Values that one row group's scalar columns hold in a single page.
const LEAF_ROWS: usize = ROWS_PER_GROUP;

/// A shard being written to a new file.
pub(crate) struct ShardWriter {
    path: PathBuf,
    writer: ArrowWriter<File>,
    k: u16,
}

impl ShardWriter {
    /// Creates `path`, which must not exist, with these key-values in its footer.
    pub(crate) fn create(path: &Path, footer_entries: &[(String, String)], zstd_level: i32, k: u16) -> Result<Self> {
        let failed = |source| Error::Parquet { path: path.to_path_buf(), source };
        let properties = properties(footer_entries, zstd_level).map_err(failed)?;
        let file = durable::create_new(path)?;
        let options = ArrowWriterOptions::new().with_properties(properties).with_skip_arrow_metadata(true);
        let writer = ArrowWriter::try_new_with_options(file, schema::arrow_schema(), options).map_err(failed)?;
        Ok(Self { path: path.to_path_buf(), writer, k })
    }

    /// Adds one encoded record.
    pub(crate) fn append(&mut self, record: &Record) -> Result<()> {
        let batch = schema::batch_of(record, self.k).map_err(ParquetError::from);
        let written = batch.and_then(|batch| self.writer.write(&batch));
        written.map_err(|source| Error::Parquet { path: self.path.clone(), source })
    }

    /// Writes the footer and makes the bytes durable.
    pub(crate) fn close(self) -> Result<()> {
        let path = self.path;
        let file = self.writer.into_inner().map_err(|source| Error::Parquet { path: path.clone(), source })?;
        file.sync_all().map_err(Error::io(&path))
    }
}

fn properties(footer_entries: &[(String, String)], zstd_level: i32) -> std::result::Result<WriterProperties, ParquetError> {
    let value_pages = [
        (list_path(INPUT_IDS), Encoding::DELTA_BINARY_PACKED),
        (nested_path(TOPK_IDS), Encoding::BYTE_STREAM_SPLIT),
        (nested_path(TOPK_LOGPROBS), Encoding::BYTE_STREAM_SPLIT),
        (list_path(TAIL_LOGPROB), Encoding::BYTE_STREAM_SPLIT),
    ];
    let mut builder = WriterProperties::builder()
        .set_writer_version(WriterVersion::PARQUET_1_0)
        .set_encoding(Encoding::PLAIN)
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(zstd_level)?))
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_column_statistics_enabled(ColumnPath::from(SEQ_ID), EnabledStatistics::Chunk)
        .set_offset_index_disabled(false)
        .set_max_row_group_row_count(Some(ROWS_PER_GROUP))
        .set_max_row_group_bytes(None)
        .set_data_page_size_limit(PAGE_BYTES)
        .set_data_page_row_count_limit(LEAF_ROWS)
        // One level at a time: a page border is looked for after every row.
        .set_write_batch_size(1)
        .set_key_value_metadata(Some(footer::key_values(footer_entries)));
    for (path, encoding) in value_pages {
        builder = builder.set_column_encoding(path.clone(), encoding).set_column_data_page_row_count_limit(path, 1);
    }
    Ok(builder.build())
}

fn list_path(name: &str) -> ColumnPath {
    ColumnPath::new([name, "list", ELEMENT].map(String::from).to_vec())
}

fn nested_path(name: &str) -> ColumnPath {
    ColumnPath::new([name, "list", ELEMENT, "list", ELEMENT].map(String::from).to_vec())
}
