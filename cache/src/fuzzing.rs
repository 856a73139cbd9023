//! The page decoder for the fuzz targets, which alone are built with `cfg(fuzzing)`. No part of the API.

use crate::layout::Shape;
use crate::shard::page::{self, KnownLevels, Most};

/// Values and list ends of a page of at most so many values, a quarter as many tokens; read twice, the second time from levels that are known already.
///
/// # Panics
/// Where the two readings differ: that is what is looked for.
pub fn lists(bytes: &[u8], nested: bool, max_values: usize) -> Result<(Vec<u32>, Vec<u32>), String> {
    let shape = if nested { Shape::Nested } else { Shape::List };
    let most = Most { tokens: if nested { max_values / 4 } else { max_values }, values: max_values };
    let mut known = KnownLevels::default();
    let first = page::lists(bytes, shape, most, &mut known).map_err(|flaw| flaw.expected)?;
    let again = page::lists(bytes, shape, most, &mut known).map_err(|flaw| flaw.expected);
    assert_eq!(again, Ok(first.clone()));
    Ok((first.words, first.ends))
}

/// Bytes of a page of single values.
pub fn scalars(bytes: &[u8], rows: usize) -> Result<Vec<u8>, String> {
    page::scalars(bytes, rows, 128, |plain| Ok(plain.to_vec())).map_err(|flaw| flaw.expected)
}
