//! The row checksum: CRC-32 over the decoded values, so it catches damage, encoder bugs and reader bugs alike.

use crate::{Record, RowKey};

/// CRC-32 (the polynomial of zip and PNG) of a stored row, over these little-endian values in this order:
///
/// ```text
/// key (16 bytes) | seq_id u64 | k u16 | tokens u64 | input_ids u32... | positions u64
///   then for every scored position: position u32 | entries u32 | ids u32... | logprobs f32... | tail f32
/// ```
pub(crate) fn row_checksum(key: &RowKey, k: u16, record: &Record) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    let mut buffer = Vec::new();
    crc.update(&key.0);
    crc.update(&record.seq_id.to_le_bytes());
    crc.update(&k.to_le_bytes());
    crc.update(&(record.input_ids.len() as u64).to_le_bytes());
    update_u32(&mut crc, &mut buffer, record.input_ids.iter().copied());
    crc.update(&(record.positions.len() as u64).to_le_bytes());
    for (i, &position) in record.positions.iter().enumerate().take(record.targets.len()) {
        let target = record.targets.position(i);
        crc.update(&position.to_le_bytes());
        crc.update(&(target.ids.len() as u32).to_le_bytes());
        update_u32(&mut crc, &mut buffer, target.ids.iter().copied());
        update_u32(&mut crc, &mut buffer, target.logprobs.iter().map(|l| l.to_bits()));
        crc.update(&target.tail_logprob.to_le_bytes());
    }
    crc.finalize()
}

fn update_u32(crc: &mut crc32fast::Hasher, buffer: &mut Vec<u8>, values: impl Iterator<Item = u32>) {
    buffer.clear();
    buffer.extend(values.flat_map(u32::to_le_bytes));
    crc.update(buffer);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::SoftTargets;

    #[test]
    fn key_and_checksum_never_change_between_releases() {
        let mut targets = SoftTargets::default();
        targets.push(&[7, 3], &[-0.222_656_25, -1.898_437_5], -3.0);
        targets.push(&[2], &[-0.105_468_75], -2.296_875);
        let record = Record { seq_id: 1, input_ids: vec![5, 7, 2, 1], positions: vec![0, 1], targets };
        assert_eq!(record.key().to_string(), "02423e74b6528437f6c06012228269e8");
        // The same by zlib's crc32 over the bytes that FORMAT.md lists.
        assert_eq!(row_checksum(&record.key(), 2, &record), 0xc20e_5721);
    }
}
