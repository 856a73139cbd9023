//! How a record's values become stored values. It owns rounding, the order inside a list, and the row checksum; it refuses
//! to know about Parquet. The one idea: encoding is idempotent, so an encoded record is exactly what a reader gets back.

mod checksum;
mod order;
mod value;

pub use value::{TAIL_FLOOR_LOGPROB, round_to_mantissa, stored_logprob, stored_tail_logprob};

pub(crate) use checksum::row_checksum;

use crate::{Record, SoftTargets};

/// `tail_logprob` stored where nothing is kept: the whole probability lies in the tail, and ln 1 = 0.
pub const UNSCORED_TAIL_LOGPROB: f32 = 0.0;

/// Name of the value codec, as the shards' footers state it: `logprob-m7` keeps 7 mantissa bits.
pub(crate) fn value_codec_name(mantissa_bits: u8) -> String {
    format!("logprob-m{mantissa_bits}")
}

/// The record as it will be read back: log-probabilities and tails rounded to `mantissa_bits` (1 to 23), ids ordered by
/// falling stored log-probability, ties by rising id.
pub fn encode(record: &Record, mantissa_bits: u8) -> Record {
    let given = &record.targets;
    let mut targets = SoftTargets::with_shape(given.len(), given.ids().len());
    let mut run = Vec::new();
    for i in 0..given.len() {
        let target = given.position(i);
        run.clear();
        run.extend(target.ids.iter().zip(target.logprobs).map(|(&id, &l)| (id, stored_logprob(l, mantissa_bits))));
        order::sort(&mut run);
        targets.push_pairs(&run, stored_tail_logprob(target.tail_logprob, mantissa_bits));
    }
    Record { seq_id: record.seq_id, input_ids: record.input_ids.clone(), positions: record.positions.clone(), targets }
}
