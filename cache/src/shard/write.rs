//! Writing a shard: one page a row for every list column, so that reading a row touches its own pages and no others.
//!
//! Row groups are independent, so they are encoded beside each other and beside the caller, on rayon; they reach the file in order.
//! At most [`MAX_GROUPS_UNDER_WAY`] of them wait: a caller that is faster than the encoders is held up, never the memory.

use super::{ROWS_PER_GROUP, footer};
use crate::layout::{Column, Layout, Shape};
use crate::{Error, Record, Result, durable, schema};
use arrow_schema::SchemaRef;
use durable::HashedFile;
use parquet::arrow::ArrowSchemaConverter;
use parquet::arrow::arrow_writer::{ArrowColumnChunk, ArrowRowGroupWriterFactory, compute_leaves};
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterVersion};
use parquet::file::writer::SerializedFileWriter;
use std::collections::VecDeque;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, TryRecvError};

/// A page is cut by rows alone; this only has to be larger than any row.
const PAGE_BYTES: usize = 1 << 30;
/// Row groups that may be encoding or waiting for their turn, for each thread of the pool.
const MAX_GROUPS_UNDER_WAY: usize = 2;

/// A row group's columns, or why there are none.
type Encoded = std::result::Result<Vec<ArrowColumnChunk>, ParquetError>;

/// A shard being written: to a new file, or to memory where only its size is asked for.
pub(crate) struct ShardWriter<W: Write + Send = HashedFile> {
    path: PathBuf,
    layout: Arc<Layout>,
    schema: SchemaRef,
    writer: SerializedFileWriter<W>,
    factory: Arc<ArrowRowGroupWriterFactory>,
    /// Rows of the row group that is not full yet.
    pending: Vec<Record>,
    groups: usize,
    under_way: VecDeque<Receiver<Encoded>>,
}

/// What was written.
pub(crate) struct Written {
    pub(crate) bytes: u64,
    pub(crate) blake3: String,
}

impl ShardWriter {
    /// Creates `path`, which must not exist, with these key-values in its footer.
    pub(crate) fn create(
        path: &Path,
        footer_entries: &[(String, String)],
        zstd_level: i32,
        layout: &Arc<Layout>,
    ) -> Result<Self> {
        let sink = || durable::create_new(path).map(HashedFile::new);
        Self::begin(path, sink, footer_entries, zstd_level, layout)
    }

    /// Writes the footer and makes the bytes durable.
    pub(crate) fn close(self) -> Result<Written> {
        let path = self.path.clone();
        self.finish()?.finish(&path)
    }
}

impl ShardWriter<Vec<u8>> {
    /// A shard in memory, named `path` in errors alone.
    pub(crate) fn in_memory(
        path: &Path,
        footer_entries: &[(String, String)],
        zstd_level: i32,
        layout: &Arc<Layout>,
    ) -> Result<Self> {
        Self::begin(path, || Ok(Vec::new()), footer_entries, zstd_level, layout)
    }
}

impl<W: Write + Send> ShardWriter<W> {
    fn begin(
        path: &Path,
        sink: impl FnOnce() -> Result<W>,
        footer_entries: &[(String, String)],
        zstd_level: i32,
        layout: &Arc<Layout>,
    ) -> Result<Self> {
        let failed = |source| Error::Parquet { path: path.to_path_buf(), source };
        let properties = Arc::new(properties(footer_entries, zstd_level, layout).map_err(failed)?);
        let schema = layout.schema();
        let root = ArrowSchemaConverter::new().convert(&schema).map_err(failed)?.root_schema_ptr();
        let writer = SerializedFileWriter::new(sink()?, root, properties).map_err(failed)?;
        let factory = Arc::new(ArrowRowGroupWriterFactory::new(&writer, schema.clone()));
        let (pending, under_way) = (Vec::with_capacity(ROWS_PER_GROUP), VecDeque::new());
        Ok(Self { path: path.to_path_buf(), layout: layout.clone(), schema, writer, factory, pending, groups: 0, under_way })
    }

    /// Adds one encoded record.
    pub(crate) fn append(&mut self, record: Record) -> Result<()> {
        self.pending.push(record);
        if self.pending.len() < ROWS_PER_GROUP {
            return Ok(());
        }
        self.start_group();
        while self.under_way.len() >= MAX_GROUPS_UNDER_WAY * rayon::current_num_threads() {
            self.write_oldest()?;
        }
        Ok(())
    }

    /// Writes the footer.
    pub(crate) fn finish(mut self) -> Result<W> {
        if !self.pending.is_empty() {
            self.start_group();
        }
        while !self.under_way.is_empty() {
            self.write_oldest()?;
        }
        let path = self.path;
        self.writer.into_inner().map_err(|source| Error::Parquet { path, source })
    }

    fn start_group(&mut self) {
        let records = std::mem::replace(&mut self.pending, Vec::with_capacity(ROWS_PER_GROUP));
        let (layout, schema, factory, group) = (self.layout.clone(), self.schema.clone(), self.factory.clone(), self.groups);
        self.groups += 1;
        let (sender, receiver) = mpsc::sync_channel(1);
        let encode = move || {
            // The writer may be gone by now; then nobody asks for this row group.
            let _ = sender.send(encode_group(&layout, &schema, &factory, group, &records));
        };
        // A thread of the pool must not wait for work that only the pool can do.
        if rayon::current_thread_index().is_some() {
            encode()
        } else {
            rayon::spawn(encode)
        }
        self.under_way.push_back(receiver);
    }

    fn write_oldest(&mut self) -> Result<()> {
        let Some(receiver) = self.under_way.pop_front() else { return Ok(()) };
        let written = wait(&receiver).and_then(|chunks| {
            let mut group = self.writer.next_row_group()?;
            chunks.into_iter().try_for_each(|chunk| chunk.append_to_row_group(&mut group))?;
            group.close().map(|_| ())
        });
        written.map_err(|source| Error::Parquet { path: self.path.clone(), source })
    }
}

/// The encoded row group. A thread of the pool does other work of the pool meanwhile: that may be the very work it waits for.
fn wait(receiver: &Receiver<Encoded>) -> Encoded {
    let lost = || Err(ParquetError::General("the encoder of a row group ended early".into()));
    if rayon::current_thread_index().is_none() {
        return receiver.recv().unwrap_or_else(|_| lost());
    }
    loop {
        match receiver.try_recv() {
            Ok(encoded) => return encoded,
            Err(TryRecvError::Disconnected) => return lost(),
            Err(TryRecvError::Empty) if rayon::yield_now() == Some(rayon::Yield::Executed) => {}
            Err(TryRecvError::Empty) => std::thread::yield_now(),
        }
    }
}

/// The encoded columns of one row group.
fn encode_group(
    layout: &Layout,
    schema: &SchemaRef,
    factory: &ArrowRowGroupWriterFactory,
    group: usize,
    records: &[Record],
) -> Encoded {
    let mut writers = factory.create_column_writers(group)?.into_iter();
    let mut chunks = Vec::new();
    for (column, field) in layout.columns().into_iter().zip(schema.fields()) {
        let array = schema::array_of(layout, column, records)?;
        // Every column of ours has one leaf.
        for (leaf, mut writer) in compute_leaves(field, &array)?.iter().zip(writers.by_ref()) {
            writer.write(leaf)?;
            chunks.push(writer.close()?);
        }
    }
    Ok(chunks)
}

fn properties(
    footer_entries: &[(String, String)],
    zstd_level: i32,
    layout: &Layout,
) -> std::result::Result<WriterProperties, ParquetError> {
    let mut builder = WriterProperties::builder()
        .set_writer_version(WriterVersion::PARQUET_1_0)
        .set_encoding(Encoding::PLAIN)
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(zstd_level)?))
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .set_column_statistics_enabled(layout.path(Column::SeqId), EnabledStatistics::Chunk)
        .set_offset_index_disabled(false)
        .set_max_row_group_row_count(Some(ROWS_PER_GROUP))
        .set_max_row_group_bytes(None)
        .set_data_page_size_limit(PAGE_BYTES)
        .set_data_page_row_count_limit(ROWS_PER_GROUP)
        // One level at a time: a page border is looked for after every row.
        .set_write_batch_size(1)
        .set_key_value_metadata(Some(footer::key_values(footer_entries)));
    for column in layout.columns().into_iter().filter(|column| column.shape() != Shape::Scalar) {
        let path = layout.path(column);
        builder =
            builder.set_column_encoding(path.clone(), layout.encoding(column)).set_column_data_page_row_count_limit(path, 1);
    }
    Ok(builder.build())
}
