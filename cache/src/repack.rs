//! One cache stored anew, offline: another preset, a narrower selection, fewer bits, another zstd level, other shards. Nothing that
//! was not kept comes back: what would raise fidelity is refused.
//!
//! It is [`combine`](crate::combine()) of a single cache; this file owns how the new shape is asked for.

use crate::progress::ScanProgress;
use crate::{Knobs, Preset, Result, Rewritten, Storage, combine};
use std::path::Path;

/// How rows are to be stored in the new cache.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Reshape {
    /// Where to start from; `None` starts from how the rows are stored already. How ids are laid out is no part of it.
    pub preset: Option<Preset>,
    /// Departures from that.
    pub knobs: Knobs,
    /// Rows in a shard; `None` leaves what it is.
    pub rows_per_shard: Option<u32>,
}

impl Reshape {
    /// What rows that are stored as `has` become. Errors: knobs that do not go together; `Raise`, with both sides.
    pub(crate) fn storage(&self, has: &Storage) -> Result<Storage> {
        // Of the layout of ids, which decides who can read the cache, a preset says nothing.
        let base = self.preset.map_or(*has, |preset| Storage { id_encoding: has.id_encoding, ..preset.storage() });
        // A preset's k is how many at most; only a k that was asked for by itself can be too many.
        let (most, head) = (base.selection.head(), has.selection.head());
        let k = self.knobs.top_k.or((head > 0 && most > head).then_some(head));
        let asked = base.with(&Knobs { top_k: k, ..self.knobs })?;
        has.check_narrows_to(&asked)?;
        Ok(asked)
    }
}

/// Writes the rows of the cache in `source` into `out`, stored as `reshape` says. Run again, it continues.
///
/// The new description differs from the old one in what was changed alone; where something was taken away (selection, values,
/// mantissa bits) it says so in `derived`. A cache of an older format version becomes one of this version. A partial cache stays
/// partial, and can be continued by the command that made it: this is refused where something is taken away or its last row ends
/// no shard. Errors: `Raise`, `Incomplete`, damage, as [`CacheWriter::open`](crate::CacheWriter::open), I/O.
pub fn repack(source: &Path, out: &Path, reshape: &Reshape, progress: &ScanProgress) -> Result<Rewritten> {
    combine::rewrite("repack", &[source.to_path_buf()], out, reshape, progress)
}
