//! The row checksum: CRC-32 over the decoded values, so it catches damage, encoder bugs and reader bugs alike.

use crate::layout::Layout;
use crate::{Record, RowKey};

/// Values turned into bytes at once.
const BLOCK: usize = 1024;

/// CRC-32 (the polynomial of zip and PNG) of a stored row, over little-endian values. `FORMAT.md` lists them for each version:
///
/// ```text
/// 2: key (16 bytes) | seq_id u64 | length u32 and bytes of the selection's words | k u16 | tokens u64 | input_ids u32...
///    | positions u64 | positions u32... | head, where there is one: ends u32... | ids u32... | logits or logprobs f32...
///    | logsumexps f32... with logits | tails f32... | samples, where there are any: ends u32... | ids u32... | counts u32...
///    | lse_t f32..., position by position | codec_kl_sum f32 | codec_kl_max f32
/// 1: key | seq_id u64 | k u16 | tokens u64 | input_ids u32... | positions u64
///    | for every scored position: position u32 | entries u32 | ids u32... | logprobs f32... | tail f32
/// ```
pub(crate) fn row_checksum(key: &RowKey, layout: &Layout, record: &Record) -> u32 {
    let mut crc = Crc::default();
    let k = layout.selection.max_entries();
    crc.0.update(&key.0);
    crc.0.update(&record.seq_id.to_le_bytes());
    if layout.version >= 2 {
        crc.0.update(&(layout.selection_text.len() as u32).to_le_bytes());
        crc.0.update(layout.selection_text.as_bytes());
    }
    crc.0.update(&k.to_le_bytes());
    crc.0.update(&(record.input_ids.len() as u64).to_le_bytes());
    crc.words(&record.input_ids);
    crc.0.update(&(record.positions.len() as u64).to_le_bytes());
    if layout.version >= 2 {
        update(&mut crc, layout, record);
    } else {
        update_version_1(&mut crc, record);
    }
    crc.0.finalize()
}

fn update(crc: &mut Crc, layout: &Layout, record: &Record) {
    let targets = &record.targets;
    crc.words(&record.positions);
    if layout.has_head() {
        crc.words(targets.offsets().get(1..).unwrap_or_default());
        crc.words(targets.ids());
        crc.floats(if layout.has_logits() { targets.logits() } else { targets.logprobs() });
        crc.floats(targets.logsumexps());
    }
    crc.floats(targets.tail_logprobs());
    if layout.has_samples() {
        crc.words(targets.sample_offsets().get(1..).unwrap_or_default());
        crc.words(targets.sample_ids());
        targets.sample_counts().iter().for_each(|&count| crc.0.update(&u32::from(count).to_le_bytes()));
    }
    crc.floats(targets.lse_t());
    crc.floats(&[record.codec.kl_sum, record.codec.kl_max]);
}

fn update_version_1(crc: &mut Crc, record: &Record) {
    for (i, &position) in record.positions.iter().enumerate().take(record.targets.len()) {
        let target = record.targets.position(i);
        crc.words(&[position, target.ids.len() as u32]);
        crc.words(target.ids);
        crc.floats(target.logprobs);
        crc.floats(&[target.tail_logprob]);
    }
}

#[derive(Default)]
struct Crc(crc32fast::Hasher);

impl Crc {
    fn words(&mut self, words: &[u32]) {
        self.blocks(words, |word| word.to_le_bytes());
    }

    fn floats(&mut self, floats: &[f32]) {
        self.blocks(floats, |float| float.to_le_bytes());
    }

    fn blocks<T: Copy>(&mut self, values: &[T], bytes: impl Fn(T) -> [u8; 4]) {
        let mut buffer = [0u8; 4 * BLOCK];
        for block in values.chunks(BLOCK) {
            for (to, &value) in buffer.chunks_exact_mut(4).zip(block) {
                to.copy_from_slice(&bytes(value));
            }
            self.0.update(&buffer[..4 * block.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::{CodecError, IdEncoding, Selection, SoftTargets, Target, Values};

    fn layout(version: u32, selection: Selection, values: Values) -> Layout {
        Layout::of(&crate::fingerprint::tests_description(selection, values), version)
    }

    fn record(targets: SoftTargets) -> Record {
        let codec = CodecError { kl_sum: 0.25, kl_max: 0.125 };
        Record { seq_id: 1, input_ids: vec![5, 7, 2, 1], positions: vec![0, 1], targets, codec }
    }

    #[test]
    fn keys_and_checksums_never_change_between_releases() {
        assert_eq!(IdEncoding::default(), IdEncoding::ByteStreamSplit);
        let mut targets = SoftTargets::default();
        targets.push(&[7, 3], &[-0.222_656_25, -1.898_437_5], -3.0);
        targets.push(&[2], &[-0.105_468_75], -2.296_875);
        let exact = record(targets);
        let key = exact.key();
        assert_eq!(key.to_string(), "02423e74b6528437f6c06012228269e8");
        let top = Selection::TopK { k: 2 };
        // The same by zlib's crc32 over the bytes that FORMAT.md lists.
        assert_eq!(row_checksum(&key, &layout(1, top, Values::Logprob), &exact), 0xc20e_5721);
        assert_eq!(row_checksum(&key, &layout(2, top, Values::Logprob), &exact), 0xc1f2_919b);
        let mut drawn = SoftTargets::default();
        let sample = Target { tail_logprob: -3.0, sample_ids: &[3, 7], sample_counts: &[4, 6], ..Target::default() };
        (0..2).for_each(|_| drawn.push_target(&sample));
        let sampled = layout(2, Selection::Sampled { draws: 10, seed: 0 }, Values::Logprob);
        assert_eq!(row_checksum(&key, &sampled, &record(drawn)), 0xbaa7_f950);
    }
}
