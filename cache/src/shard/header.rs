//! The header of a page, in Thrift's compact protocol: the few numbers a reader needs, none of them believed yet.

use crate::error::Flaw;

/// Deepest nesting of a header's structs.
const MAX_DEPTH: usize = 8;

/// What a page's header says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: i64,
    pub(super) uncompressed: i64,
    pub(super) compressed: i64,
    pub(super) values: i64,
    pub(super) encoding: i64,
    pub(super) definition: i64,
    pub(super) repetition: i64,
    /// Bytes of the header itself.
    pub(super) length: usize,
}

impl Header {
    /// Reads the header at the start of `page`.
    pub(super) fn read(page: &[u8]) -> Result<Self, Flaw> {
        let mut header = Header::default();
        let mut bytes = page;
        let read = read_struct(&mut bytes, &mut Vec::new(), &mut |path, value| {
            let field = match path {
                [1] => &mut header.kind,
                [2] => &mut header.uncompressed,
                [3] => &mut header.compressed,
                [5, 1] => &mut header.values,
                [5, 2] => &mut header.encoding,
                [5, 3] => &mut header.definition,
                [5, 4] => &mut header.repetition,
                _ => return,
            };
            *field = value;
        });
        read.ok_or_else(|| Flaw::new("a page header", "something else"))?;
        header.length = page.len() - bytes.len();
        Ok(header)
    }
}

/// Reads a struct of Thrift's compact protocol and hands each integer on with the path of field numbers that leads to it. `None`
/// where the bytes are no such struct.
fn read_struct(bytes: &mut &[u8], path: &mut Vec<i64>, found: &mut dyn FnMut(&[i64], i64)) -> Option<()> {
    if path.len() > MAX_DEPTH {
        return None;
    }
    let mut field = 0i64;
    loop {
        let byte = take(bytes, 1)?[0];
        if byte == 0 {
            return Some(());
        }
        field = match byte >> 4 {
            0 => zigzag(varint(bytes)?),
            delta => field.checked_add(i64::from(delta))?,
        };
        path.push(field);
        match byte & 0x0f {
            // Booleans lie in the type itself.
            1 | 2 => {}
            3 => drop(take(bytes, 1)?),
            4..=6 => found(path, zigzag(varint(bytes)?)),
            7 => drop(take(bytes, 8)?),
            8 => {
                let length = usize::try_from(varint(bytes)?).ok()?;
                take(bytes, length)?;
            }
            12 => read_struct(bytes, path, found)?,
            // Lists, sets and maps have no place in a page header.
            _ => return None,
        }
        path.pop();
    }
}

fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(n)?;
    *bytes = rest;
    Some(taken)
}

/// A number in groups of 7 bits, lowest first.
pub(super) fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    // 63 bits: nothing in a page is larger, and no bit is lost.
    for shift in (0..63).step_by(7) {
        let byte = take(bytes, 1)?[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

fn zigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}
