//! Record <-> Arrow columns. It owns column names, types and the shape of a row in Arrow memory; it refuses rows whose lists do
//! not align, whose checksum or key differs, or whose place in the lists contradicts [`crate::Record`].
//!
//! Every list column has one entry for each token, so plain SQL can index them alike:
//!
//! ```text
//! input_ids       [ 5,   9,    4,          7,          2  ]
//! topk_ids        [ [],  [],   [7, 3, 1],  [2, 8, 4],  [] ]      entry 2 follows tokens 0..=2 and predicts input_ids[3] = 7
//! topk_logprobs   [ [],  [],   [l, l, l],  [l, l, l],  [] ]
//! tail_logprob    [ 0.0, 0.0,  t,          t,          0.0]      nothing kept: all probability is tail, ln 1 = 0
//! ```

use crate::codec::{UNSCORED_TAIL_LOGPROB, row_checksum};
use crate::error::Flaw;
use crate::{Record, RowKey, SoftTargets};
use arrow_array::types::{ArrowPrimitiveType, Float32Type, UInt16Type, UInt32Type, UInt64Type};
use arrow_array::{
    Array, ArrayRef, Float32Array, ListArray, PrimitiveArray, RecordBatch, StringArray, UInt16Array, UInt32Array, UInt64Array,
};
use arrow_buffer::{OffsetBuffer, ScalarBuffer};
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};
use std::sync::Arc;

/// The row's key, 32 hexadecimal digits.
pub(crate) const KEY: &str = "key";
/// Number of the conversation in its data.
pub(crate) const SEQ_ID: &str = "seq_id";
/// Most entries a position may keep.
pub(crate) const K: &str = "k";
/// The tokens.
pub(crate) const INPUT_IDS: &str = "input_ids";
/// Kept ids of each token's distribution.
pub(crate) const TOPK_IDS: &str = "topk_ids";
/// Their log-probabilities.
pub(crate) const TOPK_LOGPROBS: &str = "topk_logprobs";
/// Log-probability outside the kept ids.
pub(crate) const TAIL_LOGPROB: &str = "tail_logprob";
/// Checksum of the row.
pub(crate) const CRC32: &str = "crc32";
/// Name of the value inside a list, as the Parquet specification has it.
pub(crate) const ELEMENT: &str = "element";

/// The Arrow schema of every shard.
pub(crate) fn arrow_schema() -> SchemaRef {
    let list = |inner: DataType| DataType::List(element(inner));
    Arc::new(Schema::new(vec![
        Field::new(KEY, DataType::Utf8, false),
        Field::new(SEQ_ID, DataType::UInt64, false),
        Field::new(K, DataType::UInt16, false),
        Field::new(INPUT_IDS, list(DataType::UInt32), false),
        Field::new(TOPK_IDS, list(list(DataType::UInt32)), false),
        Field::new(TOPK_LOGPROBS, list(list(DataType::Float32)), false),
        Field::new(TAIL_LOGPROB, list(DataType::Float32), false),
        Field::new(CRC32, DataType::UInt32, false),
    ]))
}

fn element(inner: DataType) -> Arc<Field> {
    Arc::new(Field::new(ELEMENT, inner, false))
}

/// One encoded record as a batch of one row.
pub(crate) fn batch_of(record: &Record, k: u16) -> Result<RecordBatch, ArrowError> {
    let (tokens, targets) = (record.input_ids.len(), &record.targets);
    let mut offsets = Vec::with_capacity(tokens + 1);
    let mut tails = vec![UNSCORED_TAIL_LOGPROB; tokens];
    let mut scored = record.positions.iter().zip(targets.offsets().iter().skip(1)).zip(targets.tail_logprobs()).peekable();
    let mut end = 0i32;
    offsets.push(end);
    for (token, tail) in tails.iter_mut().enumerate() {
        if let Some(((_, &offset), &t)) = scored.next_if(|((p, _), _)| **p as usize == token) {
            (*tail, end) = (t, offset as i32);
        }
        offsets.push(end);
    }
    let inner = OffsetBuffer::new(ScalarBuffer::from(offsets));
    let ids =
        ListArray::try_new(element(DataType::UInt32), inner.clone(), Arc::new(UInt32Array::from(targets.ids().to_vec())), None)?;
    let logprobs = Arc::new(Float32Array::from(targets.logprobs().to_vec()));
    let logprobs = ListArray::try_new(element(DataType::Float32), inner, logprobs, None)?;
    let key = record.key();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from(vec![key.to_string()])),
        Arc::new(UInt64Array::from(vec![record.seq_id])),
        Arc::new(UInt16Array::from(vec![k])),
        Arc::new(one_list(Arc::new(UInt32Array::from(record.input_ids.clone())))?),
        Arc::new(one_list(Arc::new(ids))?),
        Arc::new(one_list(Arc::new(logprobs))?),
        Arc::new(one_list(Arc::new(Float32Array::from(tails)))?),
        Arc::new(UInt32Array::from(vec![row_checksum(&key, k, record)])),
    ];
    RecordBatch::try_new(arrow_schema(), columns)
}

fn one_list(values: ArrayRef) -> Result<ListArray, ArrowError> {
    let field = element(values.data_type().clone());
    ListArray::try_new(field, OffsetBuffer::from_lengths([values.len()]), values, None)
}

/// The only row of `batch`, with its checksum, key and alignment checked. `k` is what the cache's description says.
pub(crate) fn record_of(batch: &RecordBatch, k: u16) -> Result<Record, Flaw> {
    if batch.num_rows() != 1 {
        return Err(Flaw::new("1 row", batch.num_rows()));
    }
    let key = key_at(batch, 0)?;
    let seq_id = scalar::<UInt64Type>(batch, SEQ_ID)?;
    let stored_k = scalar::<UInt16Type>(batch, K)?;
    if stored_k != k {
        return Err(Flaw::new(format!("k = {k}"), stored_k));
    }
    let input_ids = values::<UInt32Type>(&list(batch, INPUT_IDS)?, INPUT_IDS)?.to_vec();
    let (ids, ids_offsets) = nested::<UInt32Type>(batch, TOPK_IDS, input_ids.len())?;
    let (logprobs, logprob_offsets) = nested::<Float32Type>(batch, TOPK_LOGPROBS, input_ids.len())?;
    let tail_list = list(batch, TAIL_LOGPROB)?;
    let tails = values::<Float32Type>(&tail_list, TAIL_LOGPROB)?;
    if tails.len() != input_ids.len() {
        return Err(Flaw::new(format!("{} values in {TAIL_LOGPROB}", input_ids.len()), tails.len()));
    }
    if ids_offsets != logprob_offsets {
        return Err(Flaw::new("topk_ids and topk_logprobs with lists of equal lengths", "different lengths"));
    }
    let (positions, targets) = gather(&ids, &logprobs, &ids_offsets, tails)?;
    let record = Record { seq_id, input_ids, positions, targets };
    let (stored, computed) = (scalar::<UInt32Type>(batch, CRC32)?, row_checksum(&key, k, &record));
    if stored != computed {
        return Err(Flaw::new(format!("crc32 {stored:08x}"), format!("values with crc32 {computed:08x}")));
    }
    match record.key() {
        computed if computed != key => Err(Flaw::new(format!("the row with key {key}"), format!("tokens with key {computed}"))),
        _ => Ok(record),
    }
}

/// The key in `row` of a batch that holds the key column.
pub(crate) fn key_at(batch: &RecordBatch, row: usize) -> Result<RowKey, Flaw> {
    let keys = column(batch, KEY)?
        .as_any()
        .downcast_ref::<StringArray>()
        .ok_or_else(|| Flaw::new("a text column key", "another type"))?;
    let bounds = keys.value_offsets().get(row..row + 2);
    let digits = match bounds {
        Some(&[a, b]) => usize::try_from(a).ok().zip(usize::try_from(b).ok()).and_then(|(a, b)| keys.value_data().get(a..b)),
        _ => None,
    };
    digits.and_then(RowKey::from_hex).ok_or_else(|| Flaw::new("a key of 32 hexadecimal digits", "something else"))
}

/// From one list for each token to one target for each scored position.
fn gather(ids: &[u32], logprobs: &[f32], offsets: &[usize], tails: &[f32]) -> Result<(Vec<u32>, SoftTargets), Flaw> {
    let scored = offsets.windows(2).filter(|w| w[0] != w[1]).count();
    let mut positions = Vec::with_capacity(scored);
    let mut targets = SoftTargets::with_shape(scored, ids.len());
    for (token, (bounds, &tail)) in offsets.windows(2).zip(tails).enumerate() {
        let range = bounds[0]..bounds[1];
        if range.is_empty() {
            if tail.to_bits() != UNSCORED_TAIL_LOGPROB.to_bits() {
                return Err(Flaw::new(format!("position {token}: tail {UNSCORED_TAIL_LOGPROB} where nothing is kept"), tail));
            }
            continue;
        }
        let (Some(ids), Some(logprobs)) = (ids.get(range.clone()), logprobs.get(range)) else {
            return Err(Flaw::new(format!("position {token}: a list inside its column"), "one beyond its end"));
        };
        positions.push(token as u32);
        targets.push(ids, logprobs, tail);
    }
    Ok((positions, targets))
}

fn column<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef, Flaw> {
    batch.column_by_name(name).ok_or_else(|| Flaw::new(format!("a column {name}"), "none"))
}

fn scalar<T: ArrowPrimitiveType>(batch: &RecordBatch, name: &str) -> Result<T::Native, Flaw> {
    values::<T>(column(batch, name)?, name)?.first().copied().ok_or_else(|| Flaw::new(format!("a value in {name}"), "none"))
}

fn values<'a, T: ArrowPrimitiveType>(array: &'a ArrayRef, name: &str) -> Result<&'a [T::Native], Flaw> {
    let array = array.as_any().downcast_ref::<PrimitiveArray<T>>();
    match array {
        Some(array) if array.null_count() == 0 => Ok(array.values()),
        _ => Err(Flaw::new(format!("{name} of type {} without nulls", T::DATA_TYPE), "something else")),
    }
}

/// The values of the only row's list.
fn list(batch: &RecordBatch, name: &str) -> Result<ArrayRef, Flaw> {
    list_slice(column(batch, name)?, name, 0)
}

fn list_slice(array: &ArrayRef, name: &str, row: usize) -> Result<ArrayRef, Flaw> {
    let array =
        array.as_any().downcast_ref::<ListArray>().ok_or_else(|| Flaw::new(format!("lists in {name}"), "another type"))?;
    match array.value_offsets().get(row..row + 2) {
        Some(&[a, b]) if array.null_count() == 0 && 0 <= a && a <= b && b as usize <= array.values().len() => {
            Ok(array.values().slice(a as usize, (b - a) as usize))
        }
        _ => Err(Flaw::new(format!("a list in {name}, row {row}"), "none, or one beyond its column")),
    }
}

/// All values of the only row's lists, and `tokens + 1` offsets into them, rising from 0.
fn nested<T: ArrowPrimitiveType>(batch: &RecordBatch, name: &str, tokens: usize) -> Result<(Vec<T::Native>, Vec<usize>), Flaw> {
    let outer = list(batch, name)?;
    let inner =
        outer.as_any().downcast_ref::<ListArray>().ok_or_else(|| Flaw::new(format!("lists of lists in {name}"), "lists"))?;
    if inner.len() != tokens || inner.null_count() != 0 {
        return Err(Flaw::new(format!("{tokens} lists in {name}"), inner.len()));
    }
    let all = values::<T>(inner.values(), name)?;
    let raw = inner.value_offsets();
    let first = raw.first().copied().unwrap_or(0);
    let bad = || Flaw::new(format!("rising list bounds inside {name}"), "bounds that do not rise or lie outside");
    if first < 0 || raw.windows(2).any(|w| w[0] > w[1]) {
        return Err(bad());
    }
    let last = raw.last().copied().unwrap_or(first);
    let kept = all.get(first as usize..last as usize).ok_or_else(bad)?;
    Ok((kept.to_vec(), raw.iter().map(|o| (o - first) as usize).collect()))
}
