//! Writing a shard again in place of a damaged one: the same steps as for a new shard, but the new file takes the old one's name.

use super::{CacheWriter, OpenShard, WriterOptions, check_seq_id, companion, folder};
use crate::error::Flaw;
use crate::manifest::{Manifest, ShardEntry};
use crate::rules::{Form, Rules};
use crate::{Description, Error, Record, Result, durable};
use std::path::Path;

/// A shard being written in place of another.
pub(crate) struct MendedShard {
    open: OpenShard,
    rows: u64,
    last_seq_id: Option<u64>,
}

impl CacheWriter {
    /// A writer of a cache whose shards may be damaged or missing. Only [`start_mending`](Self::start_mending) makes sense with it.
    pub(crate) fn of_damaged(dir: &Path, manifest: Manifest, lock: durable::Lock) -> Self {
        let rules = Rules::of(&manifest.description, manifest.format_version);
        Self { dir: dir.into(), rules, manifest, open: None, last_seq_id: None, failed: false, _lock: lock }
    }

    pub(crate) fn manifest_mut(&mut self) -> &mut Manifest {
        &mut self.manifest
    }

    /// Begins the shard of `entry` anew.
    pub(crate) fn start_mending(&self, entry: &ShardEntry) -> Result<MendedShard> {
        durable::remove(&durable::tmp_of(&self.dir.join(&entry.file)))?;
        let open = self.start_file(entry.file.clone(), entry.first_row)?;
        Ok(MendedShard { open, rows: entry.rows, last_seq_id: None })
    }

    /// Adds a row: `Given` by the teacher, or `Stored` as the damaged shard still has it.
    pub(crate) fn mend_row(&self, shard: &mut MendedShard, record: &Record, form: Form) -> Result<()> {
        let row = shard.open.entry.first_row + shard.open.entry.rows;
        let bad = |flaw: Flaw| Error::BadRecord { row, seq_id: record.seq_id, expected: flaw.expected, found: flaw.found };
        check_seq_id(shard.last_seq_id, record).map_err(bad)?;
        let record = match form {
            Form::Given => self.rules.encode(record).map_err(bad)?,
            Form::Stored => self.rules.check(record, form).map(|()| record.clone()).map_err(bad)?,
        };
        shard.last_seq_id = Some(record.seq_id);
        shard.open.count(&record);
        shard.open.writer.append(record)
    }

    /// Closes the shard, checks every row of it, and puts it in the old one's place. Gives what the manifest is to say of it.
    pub(crate) fn finish_mending(&self, shard: MendedShard) -> Result<ShardEntry> {
        let MendedShard { open, rows, .. } = shard;
        if open.entry.rows != rows {
            return Err(Error::RowCount { dir: self.dir.clone(), expected: rows, found: open.entry.rows });
        }
        let name = open.entry.file.clone();
        let (tmp, entry) = self.close(open, name)?;
        durable::supersede(&tmp, &self.dir.join(&entry.file))?;
        Ok(entry)
    }
}

/// Refuses a cache that was made from something else.
pub(crate) fn compare(dir: &Path, manifest: &Manifest, here: &Description, options: &WriterOptions) -> Result<()> {
    folder::compare(dir, manifest, here, &companion::entries(&options.companions)?)
}
