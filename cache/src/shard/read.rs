//! Reading a shard: load its footer once, keep where every page lies, then fetch any row with one read a column. Every row that
//! leaves here has passed its checksum and its cache's rules; every panic of a decoder has become an error.
//!
//! A shard is mapped, so that the system can be told which pages will be wanted ([`Shard::will_need`]), but its bytes are fetched with
//! positioned reads: a file that shrinks under a map kills the process that looks at it, and under a read it is an error. The copy
//! costs a twentieth of a row's decoding. The file is opened for each row: a thousand shards would be a thousand open files.

use super::arrow::{self, ArrowShard};
use super::heads;
use super::page::{self, KnownLevels, Span};
use super::table::{Group, groups};
use crate::error::{Flaw, Place};
use crate::guard::fenced;
use crate::layout::{Column, Shape};
use crate::rules::Rules;
use crate::schema::{self, RowHead};
use crate::{Description, Error, Record, Result, RowKey, ShardEntry, durable};
use memmap2::Mmap;
use parquet::arrow::ArrowSchemaConverter;
use parquet::errors::ParquetError;
use parquet::file::metadata::{
    PageIndexPolicy, ParquetMetaData, ParquetMetaDataOptions, ParquetMetaDataReader, ParquetStatisticsPolicy,
};
use parquet::schema::types::{SchemaDescriptor, TypePtr};
use rayon::prelude::*;
use std::cell::Cell;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What all shards of a cache have in common.
pub(crate) struct Family {
    pub(crate) rules: Rules,
    pub(crate) columns: Vec<Column>,
    /// Key-values of the footers; that of the first row is the first shard's.
    pub(crate) footer: Vec<(String, String)>,
    pub(crate) schema: SchemaDescriptor,
}

impl Family {
    pub(crate) fn of(description: &Description, version: u32) -> std::result::Result<Self, ParquetError> {
        let rules = Rules::of(description, version);
        let schema = ArrowSchemaConverter::new().convert(&rules.layout.schema())?;
        let footer = super::footer::entries(description, version, 0);
        Ok(Self { columns: rules.layout.columns(), rules, footer, schema })
    }
}

/// Size of one column in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ColumnSize {
    pub(crate) name: String,
    pub(crate) compressed: u64,
    pub(crate) uncompressed: u64,
}

/// An open shard.
pub(crate) struct Shard {
    path: PathBuf,
    place: Place,
    bytes: u64,
    map: Mmap,
    groups: Vec<Group>,
    sizes: Vec<ColumnSize>,
    rows: u64,
    first_row: u64,
    family: Arc<Family>,
    /// Set where pages are of an older version, whose tokens only the Arrow reader decodes.
    arrow: Option<ArrowShard>,
}

impl Shard {
    /// Maps `path` and checks size, schema, rows, pages and footer against what the manifest says of it.
    pub(crate) fn open(path: &Path, expected: &ShardEntry, place: Place, family: Arc<Family>) -> Result<Self> {
        let damage = |flaw: Flaw| flaw.damage(&place, None, None);
        let (rows, first_row, bytes) = (expected.rows, expected.first_row, expected.bytes);
        let file = open_file(path, bytes).map_err(|e| e.at(path, &place))?;
        // SAFETY: the map is never read from; it only names a range of the file to the system (`will_need`).
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        // Rows are read in random order; without this the system reads megabytes ahead for each. It is advice: failing is harmless.
        #[cfg(unix)]
        let _ = map.advise(memmap2::Advice::Random);
        let load = || {
            // Statistics are for those who query shards; nothing here looks at them.
            let (skip, options) = (ParquetStatisticsPolicy::SkipAll, ParquetMetaDataOptions::new());
            let options = options.with_column_stats_policy(skip.clone()).with_size_stats_policy(skip.clone());
            let mut reader = ParquetMetaDataReader::new()
                .with_metadata_options(Some(options.with_encoding_stats_policy(skip)))
                .with_offset_index_policy(PageIndexPolicy::Required);
            reader.try_parse(&file).and_then(|()| reader.finish()).map_err(|e| Flaw::new("a readable Parquet footer", e))
        };
        let meta = fenced(load).unwrap_or_else(|panic| Err(Flaw::new("a readable Parquet footer", panic))).map_err(damage)?;
        let check = || {
            super::footer::check(&meta, &family, expected)?;
            groups(&meta, &family.rules.layout, &family.columns, bytes)
        };
        let groups = fenced(check).unwrap_or_else(|panic| Err(Flaw::new("a readable Parquet footer", panic))).map_err(damage)?;
        let sizes = column_sizes(&meta);
        let layout = &family.rules.layout;
        let arrow = (layout.version == 1).then(|| ArrowShard::new(meta, layout)).transpose().map_err(damage)?;
        Ok(Self { path: path.to_path_buf(), place, bytes, map, groups, sizes, rows, first_row, family, arrow })
    }

    /// Rows in this shard.
    pub(crate) fn rows(&self) -> u64 {
        self.rows
    }

    /// Bytes of every column, summed over row groups, in schema order.
    pub(crate) fn column_sizes(&self) -> &[ColumnSize] {
        &self.sizes
    }

    /// Row `row` of this shard (0-based), checked.
    pub(crate) fn row(&self, row: u64) -> Result<Record> {
        self.checked_row(row, |record| self.family.rules.check_read(record))
    }

    /// The same, with every rule of the cache checked.
    pub(crate) fn row_by_all_rules(&self, row: u64) -> Result<Record> {
        self.checked_row(row, |record| self.family.rules.check(record, crate::rules::Form::Stored))
    }

    fn checked_row(&self, row: u64, check: impl Fn(&Record) -> std::result::Result<(), Flaw>) -> Result<Record> {
        self.row_through(row, |file, index, group, within| {
            let record = match &self.arrow {
                Some(arrow) => {
                    self.check_sizes(file, group, within)?;
                    arrow.row(file, index, within)?
                }
                None => self.decode(file, group, within)?,
            };
            check(&record).map(|()| record).map_err(Trouble::from)
        })
    }

    /// Row `row` by the Arrow reader: slower, and an independent witness of this file's own decoder.
    pub(crate) fn row_by_arrow(&self, row: u64) -> Result<Record> {
        self.row_through(row, |file, index, _, within| arrow::load(file, &self.family.rules.layout)?.row(file, index, within))
    }

    /// A row by a decoder, which gets the open file, number and pages of the row group, and the row's place in it.
    fn row_through(
        &self,
        row: u64,
        decode: impl FnOnce(&File, usize, &Group, usize) -> std::result::Result<Record, Trouble>,
    ) -> Result<Record> {
        let cache_row = self.first_row.saturating_add(row);
        let Some((index, group)) = self.locate(row) else {
            return Err(Error::NoRow { row: cache_row, rows: self.first_row + self.rows });
        };
        let found = self.fenced(|file| decode(file, index, group, (row - group.first) as usize));
        found.map_err(|trouble| trouble.at_row(&self.path, &self.place, index as u64, cache_row))
    }

    /// Reads from the file, opened again, behind the fence.
    fn fenced<T>(&self, read: impl FnOnce(&File) -> std::result::Result<T, Trouble>) -> std::result::Result<T, Trouble> {
        let read = || read(&self.open_again()?);
        fenced(read).unwrap_or_else(|panic| Err(Flaw::new("pages that decode", panic).into()))
    }

    /// Asks the system to fetch a row's pages, without waiting for them.
    pub(crate) fn will_need(&self, row: u64) {
        let Some((_, group)) = self.locate(row) else { return };
        let within = (row - group.first) as usize;
        for (column, pages) in self.family.columns.iter().zip(&group.pages) {
            let single = column.shape() == Shape::Scalar;
            if single && group.heads.get().is_some() {
                continue;
            }
            // Advice: failing is harmless.
            #[cfg(unix)]
            if let Some(page) = pages.get(if single { 0 } else { within }) {
                let _ = self.map.advise_range(memmap2::Advice::WillNeed, page.offset as usize, page.length as usize);
            }
        }
    }

    /// Bytes that a read of `row` fetches once its row group's single values are known.
    pub(crate) fn row_bytes(&self, row: u64) -> u64 {
        let Some((_, group)) = self.locate(row) else { return 0 };
        let within = (row - group.first) as usize;
        let lists = self.family.columns.iter().zip(&group.pages).filter(|(column, _)| column.shape() != Shape::Scalar);
        lists.filter_map(|(_, pages)| pages.get(within)).map(|page| u64::from(page.length)).sum()
    }

    /// The keys of all rows: not covered by the rows' checksums here.
    pub(crate) fn keys(&self) -> Result<Vec<RowKey>> {
        let mut keys = Vec::with_capacity(usize::try_from(self.rows).unwrap_or_default().min(1 << 20));
        for index in 0..self.groups.len() {
            match &self.arrow {
                Some(arrow) => {
                    let found = self.fenced(|file| arrow.keys(file, index));
                    keys.extend(found.map_err(|trouble| trouble.at_group(&self.path, &self.place, index as u64))?);
                }
                None => keys.extend(self.group_heads(index)?.iter().map(|head| head.key)),
            }
        }
        Ok(keys)
    }

    /// Number and key of every row, in order: not covered by the rows' checksums here.
    pub(crate) fn labels(&self) -> Result<Vec<(u64, RowKey)>> {
        if self.arrow.is_some() {
            let label = |row| self.row(row).map(|record| (record.seq_id, record.key()));
            return (0..self.rows).into_par_iter().map(label).collect();
        }
        let mut labels = Vec::with_capacity(usize::try_from(self.rows).unwrap_or_default().min(1 << 20));
        for index in 0..self.groups.len() {
            labels.extend(self.group_heads(index)?.iter().map(|head| (head.seq_id, head.key)));
        }
        Ok(labels)
    }

    /// What the single values of a row say is its number in the data, if they can be read.
    pub(crate) fn stated_seq_id(&self, row: u64) -> Option<u64> {
        let (index, group) = self.locate(row).filter(|_| self.arrow.is_none())?;
        let heads = self.group_heads(index).ok()?;
        heads.get((row - group.first) as usize).map(|head| head.seq_id)
    }

    fn group_heads(&self, index: usize) -> Result<&[RowHead]> {
        let group = &self.groups[index];
        let found = self.fenced(|file| self.heads(file, group));
        found.map_err(|trouble| trouble.at_group(&self.path, &self.place, index as u64))
    }

    fn decode(&self, file: &File, group: &Group, within: usize) -> std::result::Result<Record, Trouble> {
        let heads = self.heads(file, group)?;
        let head = heads.get(within).ok_or_else(|| Flaw::new("the row's single values", "none"))?;
        let layout = &self.family.rules.layout;
        let (mut buffer, mut known) = (FETCHED.take(), KnownLevels::default());
        let mut io = None;
        // Until the tokens are read, they are as many as a row may have.
        let mut most = self.family.rules.most(None);
        let record = schema::assemble(layout, head, |column| {
            let index = self.family.columns.iter().position(|c| *c == column);
            let page = index.and_then(|i| group.pages.get(i)?.get(within));
            let page = page.ok_or_else(|| Flaw::new(format!("a page of {}", layout.name(column)), "none"))?;
            let bytes = fetch(file, page, &mut buffer).map_err(|e| {
                let flaw = Flaw::new("bytes that can be read", &e);
                io = Some(e);
                flaw
            })?;
            let within_column = |flaw: Flaw| Flaw::new(format!("{}: {}", layout.name(column), flaw.expected), flaw.found);
            let lists = page::lists(bytes, column.shape(), most, &mut known).map_err(within_column)?;
            if column == Column::InputIds {
                most = self.family.rules.most(Some(lists.words.len()));
            }
            Ok(lists)
        });
        FETCHED.set(buffer);
        match io {
            Some(e) => Err(Trouble::reading(e)),
            None => Ok(record?),
        }
    }

    /// Refuses a row whose page headers claim more than a row can have, before a reader that believes them gets to see it.
    fn check_sizes(&self, file: &File, group: &Group, within: usize) -> std::result::Result<(), Trouble> {
        let (mut buffer, most) = (Vec::new(), self.family.rules.most(None));
        for (column, pages) in self.family.columns.iter().zip(&group.pages).filter(|(column, _)| column.shape() != Shape::Scalar)
        {
            let page = pages.get(within).ok_or_else(|| Flaw::new("a page for each row", "fewer"))?;
            page::check_size(fetch(file, page, &mut buffer).map_err(Trouble::reading)?, column.shape(), most)?;
        }
        Ok(())
    }

    /// The single values of a row group, read once.
    fn heads<'a>(&self, file: &File, group: &'a Group) -> std::result::Result<&'a [RowHead], Trouble> {
        if let Some(heads) = group.heads.get() {
            return Ok(heads);
        }
        let heads = heads::read(file, &self.family.rules.layout, &self.family.columns, group)?;
        Ok(group.heads.get_or_init(|| heads.into_boxed_slice()))
    }

    /// Row group of a row.
    fn locate(&self, row: u64) -> Option<(usize, &Group)> {
        let index = self.groups.partition_point(|group| group.first <= row).checked_sub(1)?;
        let group = self.groups.get(index)?;
        (row - group.first < u64::from(group.rows)).then_some((index, group))
    }

    /// The file, if it still is what was opened first.
    fn open_again(&self) -> std::result::Result<File, Trouble> {
        open_file(&self.path, self.bytes)
    }
}

/// Why something could not be read, before it is known where.
pub(crate) enum Trouble {
    Flaw(Flaw),
    Io(std::io::Error),
}

impl From<Flaw> for Trouble {
    fn from(flaw: Flaw) -> Self {
        Trouble::Flaw(flaw)
    }
}

impl Trouble {
    /// A read that failed: a file that ends too early is damage, anything else the system's trouble.
    pub(super) fn reading(e: std::io::Error) -> Self {
        match e.kind() {
            std::io::ErrorKind::UnexpectedEof => Flaw::new("the bytes of a page", "the file's end before them").into(),
            _ => Trouble::Io(e),
        }
    }

    fn at(self, path: &Path, place: &Place) -> Error {
        match self {
            Trouble::Flaw(flaw) => flaw.damage(place, None, None),
            Trouble::Io(e) => Error::io(path)(e),
        }
    }

    fn at_group(self, path: &Path, place: &Place, group: u64) -> Error {
        match self {
            Trouble::Flaw(flaw) => flaw.damage(place, Some(group), None),
            io => io.at(path, place),
        }
    }

    fn at_row(self, path: &Path, place: &Place, group: u64, row: u64) -> Error {
        match self {
            Trouble::Flaw(flaw) => flaw.damage(place, Some(group), Some(row)),
            io => io.at(path, place),
        }
    }
}

/// Opens a plain file of this size that is not empty.
fn open_file(path: &Path, bytes: u64) -> std::result::Result<File, Trouble> {
    let file = match durable::call(|| File::open(path)) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(Flaw::new("this shard", "no such file").into()),
        opened => opened.map_err(Trouble::Io)?,
    };
    let info = durable::call(|| file.metadata()).map_err(Trouble::Io)?;
    if !info.is_file() {
        return Err(Flaw::new("a plain file", "something else").into());
    }
    // One read asks for a page and no more; without this the system would read ahead on a cold file. It is advice.
    #[cfg(target_os = "linux")]
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random);
    match info.len() {
        found if found != bytes => Err(Flaw::new(format!("{bytes} bytes"), format!("{found} bytes")).into()),
        0 => Err(Flaw::new("a Parquet file", "0 bytes").into()),
        _ => Ok(file),
    }
}

thread_local! {
    /// A thread's buffer for pages as they are on disk, used again for every row.
    static FETCHED: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Reads a page into the start of `buffer`, which never shrinks: bytes that are overwritten need no zeros first.
pub(super) fn fetch<'a>(file: &File, page: &Span, buffer: &'a mut Vec<u8>) -> std::io::Result<&'a [u8]> {
    let length = page.length as usize;
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    let bytes = &mut buffer[..length];
    durable::call(|| read_exact_at(file, bytes, page.offset))?;
    Ok(bytes)
}

#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(not(unix))]
fn read_exact_at(mut file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(buffer)
}

/// Bytes of every column. All row groups have the same columns in the same order: that was checked.
fn column_sizes(meta: &ParquetMetaData) -> Vec<ColumnSize> {
    let size = |stated: i64| u64::try_from(stated).unwrap_or(0);
    let schema = meta.file_metadata().schema_descr().root_schema();
    let named = |field: &TypePtr| ColumnSize { name: field.name().to_string(), compressed: 0, uncompressed: 0 };
    let mut sizes: Vec<ColumnSize> = schema.get_fields().iter().map(named).collect();
    for group in meta.row_groups() {
        for (sum, column) in sizes.iter_mut().zip(group.columns()) {
            sum.compressed = sum.compressed.saturating_add(size(column.compressed_size()));
            sum.uncompressed = sum.uncompressed.saturating_add(size(column.uncompressed_size()));
        }
    }
    sizes
}
