//! How a record's values become stored values. It owns rounding, the order inside a list, the row checksum and the measure of what
//! rounding costs; it refuses to know about Parquet. The one idea: encoding is idempotent, so an encoded record is exactly what a
//! reader gets back, and encoding it again costs nothing.

mod checksum;
mod divergence;
mod value;

pub use value::{TAIL_FLOOR_LOGPROB, round_to_mantissa, stored_logprob, stored_tail_logprob};

pub(crate) use checksum::row_checksum;
pub(crate) use divergence::mass;

use crate::{CodecError, Record, SoftTargets, Storage, Values};

/// `tail_logprob` stored where nothing is kept: the whole probability lies in the tail, and ln 1 = 0.
pub const UNSCORED_TAIL_LOGPROB: f32 = 0.0;
/// Mantissa bits of a tail beside logits: all of an f32, since such a cache loses nothing.
const EXACT_BITS: u8 = 23;

/// Mantissa bits of the tails of a cache that is stored so.
pub(crate) fn tail_bits(storage: &Storage) -> u8 {
    if storage.values == Values::LogitBf16 { EXACT_BITS } else { storage.mantissa_bits }
}

/// Name of the value codec, as the shards' footers state it: `logprob-m7` keeps 7 mantissa bits.
pub(crate) fn value_codec_name(storage: &Storage) -> String {
    match (storage.selection.head(), storage.values) {
        (0, _) => format!("count-m{}", storage.mantissa_bits),
        (_, Values::LogitBf16) => "logit-bf16".into(),
        _ => format!("logprob-m{}", storage.mantissa_bits),
    }
}

/// The record as it will be read back: log-probabilities and tails rounded as `storage` says, entries by falling stored value, ties
/// by rising id. `codec` becomes what it was plus what this step costs.
///
/// Which entries are there is the selection's business and not changed; entries must come by falling value, as the rules demand.
pub fn encode(record: &Record, storage: &Storage) -> Record {
    encode_measured(record, storage).0
}

/// The record as stored, and the least and the largest given probability of all that a position keeps, with its number: 1 each
/// where nothing is kept exactly.
pub(crate) fn encode_measured(record: &Record, storage: &Storage) -> (Record, [(usize, f64); 2]) {
    let given = &record.targets;
    let tails: Vec<f32> = given.tail_logprobs().iter().map(|&l| stored_tail_logprob(l, tail_bits(storage))).collect();
    let mut ids = given.ids().to_vec();
    let logits = given.logits().to_vec();
    let exact = !logits.is_empty() && logits.len() == ids.len();
    let bits = storage.mantissa_bits;
    let logprobs: Vec<f32> = match exact {
        true => Vec::new(),
        false => given.logprobs().iter().map(|&l| stored_logprob(l, bits)).collect(),
    };
    order_ties(&mut ids, if exact { &logits } else { &logprobs }, given.offsets());
    let mut codec = CodecError::default();
    let mut masses = [(0, 1.0); 2];
    if storage.selection.head() > 0 {
        let mut measurer = divergence::Measurer::default();
        // What a row of logits says is what they and their log-sum-exp come to, whatever log-probabilities came with them.
        let derived = if exact { given.logprobs_of_logits() } else { Vec::new() };
        let (given_logprobs, stored) = if exact { (&derived[..], &derived) } else { (given.logprobs(), &logprobs) };
        for (i, bounds) in given.offsets().windows(2).enumerate() {
            let range = bounds[0] as usize..bounds[1] as usize;
            let tail = (given.tail_logprobs()[i], tails[i]);
            let measure = measurer.measure(&given_logprobs[range.clone()], &stored[range], tail);
            masses = widened(masses, (i, measure.mass));
            if !exact {
                codec.kl_sum += measure.kl as f32;
                codec.kl_max = codec.kl_max.max(measure.kl as f32);
            }
        }
    }
    let targets = SoftTargets::from_parts(
        (given.offsets().to_vec(), ids, logprobs),
        tails,
        (given.sample_offsets().to_vec(), given.sample_ids().to_vec(), given.sample_counts().to_vec()),
        (logits, given.logsumexps().to_vec()),
        given.lse_t().to_vec(),
    );
    let codec = CodecError { kl_sum: record.codec.kl_sum + codec.kl_sum, kl_max: record.codec.kl_max + codec.kl_max };
    let (input_ids, positions) = (record.input_ids.clone(), record.positions.clone());
    (Record { seq_id: record.seq_id, input_ids, positions, targets, codec }, masses)
}

/// Least and largest with one more.
fn widened([least, largest]: [(usize, f64); 2], mass: (usize, f64)) -> [(usize, f64); 2] {
    [if mass.1 < least.1 { mass } else { least }, if mass.1 > largest.1 { mass } else { largest }]
}

/// Sorts ids inside runs of equal values. Rounding keeps falling values falling, so nothing else can be out of order.
fn order_ties(ids: &mut [u32], values: &[f32], offsets: &[u32]) {
    for bounds in offsets.windows(2) {
        let range = bounds[0] as usize..bounds[1] as usize;
        let (values, ids) = (&values[range.clone()], &mut ids[range]);
        let mut start = 0;
        for end in 1..=values.len() {
            if end < values.len() && values[end].to_bits() == values[start].to_bits() {
                continue;
            }
            if end - start > 1 {
                ids[start..end].sort_unstable();
            }
            start = end;
        }
    }
}
