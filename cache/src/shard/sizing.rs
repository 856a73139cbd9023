//! What a cache will take on disk: a sample of its rows is written as a shard is, by the shard writer itself, into memory, and carried
//! over to all rows. It refuses to guess: what no row was sampled for has no size.
//!
//! The one idea: a list column has a page for each row and compresses it by itself, so a row's bytes are its own, whatever stands beside
//! it. What rows share is found by writing groups of one row and of many, and a shard of none:
//!
//! ```text
//! all bytes  =  tokens · (pages of input_ids / tokens)  +  scored · (other pages / scored)      ratios over the sampled rows
//!            +  rows · what a row adds to its row group  +  row groups · what a group takes  +  shards · an empty shard
//! ```
//!
//! How far the sum may be off is the standard error of these ratios as between-row differences show it (Cochran, "Sampling
//! Techniques", 1977, chapter 6), with the correction for a sample that is a part of a finite whole.

use super::write::ShardWriter;
use super::{ROWS_PER_GROUP, footer, table};
use crate::layout::{Column, Shape};
use crate::manifest::FORMAT_VERSION;
use crate::rules::Rules;
use crate::{Description, Error, Record, Result};
use bytes::Bytes;
use parquet::errors::ParquetError;
use parquet::file::metadata::{PageIndexPolicy, ParquetMetaDataReader};
use rayon::prelude::*;
use serde::Serialize;
use std::path::Path;

/// What errors call the shard in memory.
const NAME: &str = "(a sample in memory)";

/// How much there is of a dataset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Extent {
    /// Conversations.
    pub rows: u64,
    /// Tokens in them.
    pub tokens: u64,
    /// Scored positions in them.
    pub scored: u64,
}

/// What rows of one description take, by a sample of them.
#[derive(Debug, Clone, PartialEq)]
pub struct Sizing {
    sampled: Vec<RowBytes>,
    rows_per_shard: u64,
    /// What a row adds to its group: single values, its places in the page indexes.
    row: f64,
    /// What a row group takes beside its rows.
    group: f64,
    /// Bytes of a shard without a row.
    shard: u64,
}

/// An estimate of all shards' bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SizeEstimate {
    /// Bytes of all shards.
    pub bytes: u64,
    /// Standard error of that, in bytes: 0 where all rows were sampled; nothing where one row says nothing of others.
    pub standard_error: Option<f64>,
    /// Bytes of the largest shard.
    pub largest_shard: u64,
    /// `bytes` a scored position.
    pub per_scored: f64,
}

/// A sampled row's pages.
#[derive(Debug, Clone, Copy, PartialEq)]
struct RowBytes {
    tokens: f64,
    scored: f64,
    /// Of `input_ids`.
    ids: f64,
    /// Of all other list columns.
    others: f64,
}

impl Sizing {
    /// Writes `records` as a cache of this description stores them. Values are unrounded, as for
    /// [`CacheWriter::append`](crate::CacheWriter::append).
    ///
    /// Errors: a description out of range, no record, a record that breaks a rule.
    pub fn of(description: &Description, records: &[Record]) -> Result<Self> {
        description.validate()?;
        let rules = Rules::of(description, FORMAT_VERSION);
        let encode = |(row, record): (usize, &Record)| {
            rules.encode(record).map_err(|flaw| Error::BadRecord {
                row: row as u64,
                seq_id: record.seq_id,
                expected: flaw.expected,
                found: flaw.found,
            })
        };
        let stored: Vec<Record> = records.par_iter().enumerate().map(encode).collect::<Result<_>>()?;
        let Some(first) = stored.first() else {
            let expected = "at least one sampled row".into();
            return Err(Error::Setting { name: "records", found: "none".into(), expected });
        };
        // Whole groups: the sample's rows come round again until the last one is full.
        let filled = stored.len().next_multiple_of(ROWS_PER_GROUP);
        let shard = written(description, &rules, std::iter::empty())?.bytes;
        let one = written(description, &rules, std::iter::once(first))?;
        let all = written(description, &rules, stored.iter().cycle().take(filled))?;
        let beside = |file: &InMemory| (file.bytes - shard - file.pages()) as f64;
        let full = beside(&all) * ROWS_PER_GROUP as f64 / filled as f64;
        let row = (full - beside(&one)) / (ROWS_PER_GROUP - 1) as f64;
        let sampled = all.rows.into_iter().take(stored.len()).collect();
        Ok(Self { sampled, rows_per_shard: description.rows_per_shard.into(), row, group: beside(&one) - row, shard })
    }

    /// Rows that were sampled.
    pub fn sampled(&self) -> Extent {
        let sum = |of: fn(&RowBytes) -> f64| self.sampled.iter().map(of).sum::<f64>() as u64;
        Extent { rows: self.sampled.len() as u64, tokens: sum(|row| row.tokens), scored: sum(|row| row.scored) }
    }

    /// The shards of all of `whole`, of which the sampled rows are a part.
    pub fn of_all(&self, whole: &Extent) -> SizeEstimate {
        let sum = |of: fn(&RowBytes) -> f64| self.sampled.iter().map(of).sum::<f64>();
        let ratio = |bytes: f64, of: f64| if of > 0.0 { bytes / of } else { 0.0 };
        let ids = ratio(sum(|row| row.ids), sum(|row| row.tokens));
        let others = ratio(sum(|row| row.others), sum(|row| row.scored));
        let groups_of = |rows: u64| rows.div_ceil(ROWS_PER_GROUP as u64);
        let (full, last) = (whole.rows / self.rows_per_shard, whole.rows % self.rows_per_shard);
        let shards = full + u64::from(last > 0);
        let groups = groups_of(self.rows_per_shard) * full + groups_of(last);
        let pages = whole.tokens as f64 * ids + whole.scored as f64 * others;
        let of_rows = pages + whole.rows as f64 * self.row + groups as f64 * self.group;
        let bytes = (of_rows + (shards * self.shard) as f64).round() as u64;
        let share = self.rows_per_shard.min(whole.rows) as f64 / whole.rows.max(1) as f64;
        SizeEstimate {
            bytes,
            standard_error: self.standard_error(whole, ids, others),
            largest_shard: (of_rows * share).round() as u64 + self.shard,
            per_scored: ratio(bytes as f64, whole.scored as f64),
        }
    }

    /// Of N rows, n sampled: N · √((1 − n/N) · s² / n), with s² the variance of what the ratios say too little or too much of a row.
    fn standard_error(&self, whole: &Extent, ids: f64, others: f64) -> Option<f64> {
        let (n, all) = (self.sampled.len() as f64, whole.rows as f64);
        if n >= all {
            return Some(0.0);
        }
        if n < 2.0 {
            return None;
        }
        let off = |row: &RowBytes| row.ids - ids * row.tokens + row.others - others * row.scored;
        let variance = self.sampled.iter().map(|row| off(row).powi(2)).sum::<f64>() / (n - 1.0);
        Some(all * ((1.0 - n / all) * variance / n).sqrt())
    }
}

/// A shard in memory.
struct InMemory {
    bytes: u64,
    rows: Vec<RowBytes>,
}

impl InMemory {
    /// Bytes of the rows' own pages.
    fn pages(&self) -> u64 {
        self.rows.iter().map(|row| row.ids + row.others).sum::<f64>() as u64
    }
}

/// Writes encoded records and looks where their pages lie.
fn written<'a>(description: &Description, rules: &Rules, records: impl Iterator<Item = &'a Record>) -> Result<InMemory> {
    let path = Path::new(NAME);
    let failed = |source| Error::Parquet { path: path.to_path_buf(), source };
    let footer = footer::entries(description, FORMAT_VERSION, 0);
    let mut writer = ShardWriter::in_memory(path, &footer, description.zstd_level, &rules.layout)?;
    let mut sizes = Vec::new();
    for record in records {
        let (tokens, scored) = (record.input_ids.len() as f64, record.positions.len() as f64);
        sizes.push(RowBytes { tokens, scored, ids: 0.0, others: 0.0 });
        writer.append(record.clone())?;
    }
    let file = Bytes::from(writer.finish()?);
    let mut reader = ParquetMetaDataReader::new().with_offset_index_policy(PageIndexPolicy::Required);
    let meta = reader.try_parse(&file).and_then(|()| reader.finish()).map_err(failed)?;
    let columns = rules.layout.columns();
    let bytes = file.len() as u64;
    let groups = table::groups(&meta, &rules.layout, &columns, bytes)
        .map_err(|flaw| failed(ParquetError::General(format!("expected {}, found {}", flaw.expected, flaw.found))))?;
    let mut rows = sizes.iter_mut();
    for group in &groups {
        for within in 0..group.rows as usize {
            let Some(row) = rows.next() else { break };
            for (column, pages) in columns.iter().zip(&group.pages).filter(|(column, _)| column.shape() != Shape::Scalar) {
                let length = pages.get(within).map_or(0.0, |page| f64::from(page.length));
                *(if *column == Column::InputIds { &mut row.ids } else { &mut row.others }) += length;
            }
        }
    }
    Ok(InMemory { bytes, rows: sizes })
}
