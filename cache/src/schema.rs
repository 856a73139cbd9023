//! Records <-> the values of columns. It owns how a row's lists line up; it refuses rows whose lists do not, whose checksum or key
//! differs, or whose place in the lists contradicts [`crate::Record`].
//!
//! The one idea: a list column of any type is a run of 32-bit words and, where lists are nested, the end of each token's list. Both
//! readers (pages, Arrow) deliver that, and one function makes a record of it.

use crate::codec::{UNSCORED_TAIL_LOGPROB, row_checksum};
use crate::error::Flaw;
use crate::layout::{Column, Layout, Shape, element};
use crate::{CodecError, Record, RowKey, SoftTargets};
use arrow_array::{Array, ArrayRef, Float32Array, ListArray, StringArray, UInt16Array, UInt32Array, UInt64Array};
use arrow_buffer::OffsetBuffer;
use arrow_schema::ArrowError;
use std::sync::Arc;

/// A list column's part of one row.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Lists {
    /// The values' bits.
    pub(crate) words: Vec<u32>,
    /// Where each token's list ends in `words`; empty where there is one value a token.
    pub(crate) ends: Vec<u32>,
}

/// The single values of a row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RowHead {
    pub(crate) key: RowKey,
    pub(crate) seq_id: u64,
    pub(crate) k: u16,
    pub(crate) codec: CodecError,
    pub(crate) crc32: u32,
}

/// The array of `column` for these records, one row each.
pub(crate) fn array_of(layout: &Layout, column: Column, records: &[Record]) -> Result<ArrayRef, ArrowError> {
    let k = layout.selection.max_entries();
    Ok(match column {
        Column::Key => Arc::new(StringArray::from_iter_values(records.iter().map(|r| r.key().to_string()))),
        Column::SeqId => Arc::new(UInt64Array::from_iter_values(records.iter().map(|r| r.seq_id))),
        Column::Selection => Arc::new(StringArray::from_iter_values(records.iter().map(|_| &layout.selection_text))),
        Column::K => Arc::new(UInt16Array::from_iter_values(records.iter().map(|_| k))),
        Column::CodecKlSum => Arc::new(Float32Array::from_iter_values(records.iter().map(|r| r.codec.kl_sum))),
        Column::CodecKlMax => Arc::new(Float32Array::from_iter_values(records.iter().map(|r| r.codec.kl_max))),
        Column::Crc32 => Arc::new(UInt32Array::from_iter_values(records.iter().map(|r| row_checksum(&r.key(), layout, r)))),
        _ => lists_of(column, records)?,
    })
}

/// The array of a list column.
fn lists_of(column: Column, records: &[Record]) -> Result<ArrayRef, ArrowError> {
    let targets = || records.iter().map(|record| &record.targets);
    let values: ArrayRef = match column {
        Column::InputIds => Arc::new(UInt32Array::from(joined(records.iter().map(|r| r.input_ids.as_slice())))),
        Column::TopkIds => Arc::new(UInt32Array::from(joined(targets().map(SoftTargets::ids)))),
        Column::SampleIds => Arc::new(UInt32Array::from(joined(targets().map(SoftTargets::sample_ids)))),
        Column::SampleCounts => Arc::new(UInt16Array::from(joined(targets().map(SoftTargets::sample_counts)))),
        Column::TopkLogprobs => Arc::new(Float32Array::from(joined(targets().map(SoftTargets::logprobs)))),
        Column::TopkLogits => Arc::new(Float32Array::from(joined(targets().map(SoftTargets::logits)))),
        Column::Logsumexp => Arc::new(spread(records, |t, i| t.logsumexps().get(i))),
        Column::TailLogprob => Arc::new(spread(records, |t, i| t.tail_logprobs().get(i))),
        Column::LseT(number) => Arc::new(spread(records, |t, i| t.lse_t().get(i * t.temperatures() + number))),
        _ => return Err(ArrowError::SchemaError(format!("{column:?} is no list column"))),
    };
    let tokens = || records.iter().map(|record| record.input_ids.len());
    let values: ArrayRef = match column.shape() {
        Shape::Nested => {
            let samples = matches!(column, Column::SampleIds | Column::SampleCounts);
            let offsets = |t: &SoftTargets| if samples { t.sample_offsets().to_vec() } else { t.offsets().to_vec() };
            let lengths = records.iter().flat_map(|record| lengths_of(record, &offsets(&record.targets)));
            Arc::new(ListArray::try_new(element(column.data_type()), OffsetBuffer::from_lengths(lengths), values, None)?)
        }
        _ => values,
    };
    let rows = OffsetBuffer::from_lengths(tokens());
    Ok(Arc::new(ListArray::try_new(element(values.data_type().clone()), rows, values, None)?))
}

/// Slices end to end.
fn joined<'a, T: Copy + 'a>(slices: impl Iterator<Item = &'a [T]> + Clone) -> Vec<T> {
    let mut all = Vec::with_capacity(slices.clone().map(<[T]>::len).sum());
    slices.for_each(|slice| all.extend_from_slice(slice));
    all
}

/// Length of each token's list, from where each scored position's ends.
fn lengths_of(record: &Record, offsets: &[u32]) -> Vec<usize> {
    let mut lengths = vec![0; record.input_ids.len()];
    for (&position, bounds) in record.positions.iter().zip(offsets.windows(2)) {
        if let Some(length) = lengths.get_mut(position as usize) {
            *length = (bounds[1] - bounds[0]) as usize;
        }
    }
    lengths
}

/// One value a token, from one value a scored position.
fn spread<'a>(records: &'a [Record], value: impl Fn(&'a SoftTargets, usize) -> Option<&'a f32>) -> Float32Array {
    let mut values = Vec::with_capacity(records.iter().map(|r| r.input_ids.len()).sum());
    for record in records {
        let start = values.len();
        values.resize(start + record.input_ids.len(), UNSCORED_TAIL_LOGPROB);
        for (i, &position) in record.positions.iter().enumerate() {
            if let (Some(to), Some(value)) = (values.get_mut(start + position as usize), value(&record.targets, i)) {
                *to = *value;
            }
        }
    }
    Float32Array::from(values)
}

/// The record that these values are, with checksum, key and alignment checked. `lists` delivers a list column's part of the row.
pub(crate) fn assemble(
    layout: &Layout,
    head: &RowHead,
    mut lists: impl FnMut(Column) -> Result<Lists, Flaw>,
) -> Result<Record, Flaw> {
    let k = layout.selection.max_entries();
    if head.k != k {
        return Err(Flaw::new(format!("k = {k}"), head.k));
    }
    let input_ids = lists(Column::InputIds)?.words;
    let tokens = input_ids.len();
    let mut nested = |column| {
        let lists = lists(column)?;
        match lists.ends.len() {
            n if n == tokens => Ok(lists),
            n => Err(Flaw::new(format!("{tokens} lists in {}", layout.name(column)), n)),
        }
    };
    let (mut ids, mut values, mut sample_ids, mut counts) = (None, None, None, None);
    if layout.has_head() {
        let value_column = if layout.has_logits() { Column::TopkLogits } else { Column::TopkLogprobs };
        (ids, values) = (Some(nested(Column::TopkIds)?), Some(nested(value_column)?));
    }
    if layout.has_samples() {
        (sample_ids, counts) = (Some(nested(Column::SampleIds)?), Some(nested(Column::SampleCounts)?));
    }
    let alike = |a: &Option<Lists>, b: &Option<Lists>| match (a, b) {
        (Some(a), Some(b)) => a.ends == b.ends && a.words.len() == b.words.len(),
        _ => true,
    };
    if !alike(&ids, &values) || !alike(&sample_ids, &counts) {
        return Err(Flaw::new("ids and their values in lists of equal lengths", "different lengths"));
    }
    let positions = scored(ids.as_ref().or(sample_ids.as_ref()));
    if let Some(lists) = &sample_ids
        && let Some(token) = scored(Some(lists)).into_iter().find(|token| positions.binary_search(token).is_err())
    {
        return Err(Flaw::new(format!("position {token}: no draws where nothing is kept"), "some"));
    }
    let mut flat = |column| {
        let words = lists(column)?.words;
        gather(&layout.name(column), &words, &positions, tokens)
    };
    let tail_logprobs = flat(Column::TailLogprob)?;
    let logsumexps = if layout.has_logits() { flat(Column::Logsumexp)? } else { Vec::new() };
    let m = layout.temperatures();
    let mut lse_t = vec![0f32; m * positions.len()];
    for i in 0..m {
        let values = flat(Column::LseT(i))?;
        lse_t.iter_mut().skip(i).step_by(m).zip(values).for_each(|(to, value)| *to = value);
    }
    let floats = |lists: Option<Lists>| lists.map(|l| l.words.into_iter().map(f32::from_bits).collect()).unwrap_or_default();
    let offsets = |lists: &Option<Lists>| offsets_at(lists.as_ref(), &positions);
    let (head_offsets, sample_offsets) = (offsets(&ids), offsets(&sample_ids));
    let numbers: Vec<f32> = floats(values);
    let (logprobs, logits) = if layout.has_logits() { (Vec::new(), numbers) } else { (numbers, Vec::new()) };
    let counts = counts.map(|l| l.words.into_iter().map(|w| u16::try_from(w).unwrap_or(0)).collect()).unwrap_or_default();
    let words = |lists: Option<Lists>| lists.map(|l| l.words).unwrap_or_default();
    let targets = SoftTargets::from_parts(
        (head_offsets, words(ids), logprobs),
        tail_logprobs,
        (sample_offsets, words(sample_ids), counts),
        (logits, logsumexps),
        lse_t,
    );
    let record = Record { seq_id: head.seq_id, input_ids, positions, targets, codec: head.codec };
    check_identity(layout, head, record)
}

fn check_identity(layout: &Layout, head: &RowHead, record: Record) -> Result<Record, Flaw> {
    let computed = row_checksum(&head.key, layout, &record);
    if head.crc32 != computed {
        return Err(Flaw::new(format!("crc32 {:08x}", head.crc32), format!("values with crc32 {computed:08x}")));
    }
    match record.key() {
        key if key != head.key => Err(Flaw::new(format!("the row with key {}", head.key), format!("tokens with key {key}"))),
        _ => Ok(record),
    }
}

/// Tokens whose list is not empty.
fn scored(lists: Option<&Lists>) -> Vec<u32> {
    let mut start = 0;
    let mut positions = Vec::new();
    for (token, &end) in lists.into_iter().flat_map(|l| &l.ends).enumerate() {
        if end != start {
            positions.push(token as u32);
        }
        start = end;
    }
    positions
}

/// N + 1 offsets of the scored positions; what lies between them is empty.
fn offsets_at(lists: Option<&Lists>, positions: &[u32]) -> Vec<u32> {
    let end = |&position: &u32| lists.and_then(|l| l.ends.get(position as usize).copied()).unwrap_or(0);
    std::iter::once(0).chain(positions.iter().map(end)).collect()
}

/// The values at scored positions; all others hold 0.
fn gather(name: &str, words: &[u32], positions: &[u32], tokens: usize) -> Result<Vec<f32>, Flaw> {
    if words.len() != tokens {
        return Err(Flaw::new(format!("{tokens} values in {name}"), words.len()));
    }
    let mut values = Vec::with_capacity(positions.len());
    let mut rest = positions.iter().copied().peekable();
    for (token, &word) in words.iter().enumerate() {
        if rest.next_if_eq(&(token as u32)).is_some() {
            values.push(f32::from_bits(word));
        } else if word != UNSCORED_TAIL_LOGPROB.to_bits() {
            let found = f32::from_bits(word);
            return Err(Flaw::new(format!("position {token}: {name} {UNSCORED_TAIL_LOGPROB} where nothing is kept"), found));
        }
    }
    Ok(values)
}
