//! Any bytes as a page: as they are, and as the contents of a page whose header and zstd frame fit, so that levels and values are
//! reached.
//!
//! Bytes 0: bit 0 a list of lists or a list, bit 1 as they are or wrapped, bits 2 and 3 the encoding. Bytes 1 to 4: levels, of which a header
//! may claim any number.
#![no_main]

use libfuzzer_sys::fuzz_target;
use potstill_cache::fuzzing;
use potstill_cache_fuzz::let_fenced_panics_pass;

const MOST: usize = 1 << 16;

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A page with these contents, as Thrift's compact protocol has its header.
fn wrapped(plain: &[u8], levels: u32, encoding: u64) -> Vec<u8> {
    let body = zstd::bulk::compress(plain, 1).unwrap();
    let mut page = Vec::new();
    let mut field = |tag: u8, value: u64| {
        page.push(tag);
        varint(&mut page, value << 1);
    };
    field(0x15, 0);
    field(0x15, plain.len() as u64);
    field(0x15, body.len() as u64);
    page.push(0x2c);
    let mut field = |value: u64| {
        page.push(0x15);
        varint(&mut page, value << 1);
    };
    field(u64::from(levels));
    field(encoding);
    field(3);
    field(3);
    page.extend([0, 0]);
    page.extend(body);
    page
}

fuzz_target!(init: let_fenced_panics_pass(), |data: &[u8]| {
    let Some((&[flags, a, b, c, d], rest)) = data.split_first_chunk::<5>() else { return };
    let levels = u32::from_le_bytes([a, b, c, d]);
    let page = match flags & 2 {
        0 => rest.to_vec(),
        _ => wrapped(rest, levels, [0, 9, 3, 1][usize::from(flags >> 2 & 3)]),
    };
    if let Ok((words, ends)) = fuzzing::lists(&page, flags & 1 == 1, MOST) {
        assert!(words.len() <= MOST * 2 + 256);
        assert!(ends.windows(2).all(|pair| pair[0] <= pair[1]));
        assert!(flags & 1 == 0 || ends.last().copied().unwrap_or(0) as usize == words.len());
    }
    let _ = fuzzing::scalars(&page, levels as usize & 0xffff);
});
