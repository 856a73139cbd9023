//! `potstill combine`: several caches become one.

use super::{repack, scanned};
use crate::cli::{self, Manner};
use crate::exit::Outcome;

/// Joins caches.
pub fn run(flags: &cli::Combine, manner: Manner) -> anyhow::Result<Outcome> {
    let reshape = flags.storing.reshape();
    let report = scanned("combining", manner, |scan| potstill_cache::combine(&flags.sources, &flags.out, &reshape, scan))?;
    repack::conclude(&report, &flags.out, manner)
}
