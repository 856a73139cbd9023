//! Which row of which cache becomes which row of the new one, from numbers and keys alone; and the proof that rows which several caches
//! of the same data hold are the same.

use super::merged::{Group, Merged};
use crate::progress::ScanProgress;
use crate::{Cache, Error, Result, RowKey};
use rayon::prelude::*;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};
use std::path::PathBuf;

/// A row of the new cache.
#[derive(Debug, Clone, Copy)]
pub(super) struct Planned {
    /// The cache it comes from.
    pub(super) input: u32,
    /// Its row there.
    pub(super) row: u64,
    /// Its number in the new data.
    pub(super) seq_id: u64,
    /// Its key.
    pub(super) key: RowKey,
}

/// Two rows that have to be the same.
#[derive(Debug, Clone, Copy)]
pub(super) struct Twins {
    kept: Planned,
    other: Planned,
}

/// All rows of the new cache in order.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) rows: Vec<Planned>,
    /// Rows of the same data that are kept once only, if they prove the same.
    pub(super) twins: Vec<Twins>,
    /// How many these are.
    pub(super) shared: u64,
    /// Conversations that earlier data had already, by their key.
    pub(super) duplicates: u64,
}

impl Plan {
    /// Errors: `Conflict` where two caches of the same data hold different conversations under one number; damage.
    pub(super) fn of(inputs: &[Cache], merged: &Merged) -> Result<Self> {
        let mut plan = Plan::default();
        // Keys in the data before this one; one data alone needs none of it.
        let mut known: HashSet<RowKey> = HashSet::new();
        for (group, shift) in merged.groups.iter().zip(merged.shifts()) {
            let begin = plan.rows.len();
            for planned in plan.merge(inputs, group)? {
                match known.contains(&planned.key) {
                    true => plan.duplicates += 1,
                    false => plan.rows.push(Planned { seq_id: planned.seq_id.saturating_add(shift), ..planned }),
                }
            }
            if merged.groups.len() > 1 {
                known.extend(plan.rows.iter().skip(begin).map(|planned| planned.key));
            }
        }
        Ok(plan)
    }

    /// The rows of caches of the same data by rising number.
    fn merge(&mut self, inputs: &[Cache], group: &Group) -> Result<Vec<Planned>> {
        let mut streams = Vec::with_capacity(group.inputs.len());
        for &input in &group.inputs {
            let Some(cache) = inputs.get(input) else { continue };
            let labels = cache.shards().iter().map(|shard| shard.labels()).collect::<Result<Vec<_>>>()?;
            let planned = labels.into_iter().flatten().zip(0u64..);
            streams.push(planned.map(move |((seq_id, key), row)| Planned { input: input as u32, row, seq_id, key }));
        }
        let mut heap = BinaryHeap::new();
        let mut heads: Vec<Option<Planned>> = streams.iter_mut().map(Iterator::next).collect();
        heap.extend(heads.iter().enumerate().filter_map(|(i, head)| head.map(|planned| Reverse((planned.seq_id, i)))));
        let mut rows: Vec<Planned> = Vec::new();
        while let Some(Reverse((_, i))) = heap.pop() {
            let (Some(head), Some(stream)) = (heads.get_mut(i), streams.get_mut(i)) else { continue };
            let Some(planned) = head.take() else { continue };
            match rows.last() {
                Some(&kept) if kept.seq_id == planned.seq_id && kept.input != planned.input => {
                    if kept.key != planned.key {
                        return Err(conflict(inputs, &kept, &planned, "tokens"));
                    }
                    self.shared += 1;
                    self.twins.push(Twins { kept, other: planned });
                }
                _ => rows.push(planned),
            }
            *head = stream.next();
            heap.extend(head.map(|planned| Reverse((planned.seq_id, i))));
        }
        Ok(rows)
    }

    /// Reads all rows that several caches of the same data hold and compares their distributions. Errors: `Conflict`; damage.
    pub(super) fn check_twins(&self, inputs: &[Cache], progress: &ScanProgress) -> Result<()> {
        self.twins.par_iter().try_for_each(|Twins { kept, other }| {
            let read = |planned: &Planned| match inputs.get(planned.input as usize) {
                Some(cache) => cache.row(planned.row),
                None => Err(Error::NoRow { row: planned.row, rows: 0 }),
            };
            let (a, b) = (read(kept)?, read(other)?);
            progress.add_rows(1);
            if (&a.input_ids, &a.positions) != (&b.input_ids, &b.positions) {
                return Err(conflict(inputs, kept, other, "tokens"));
            }
            if a.targets != b.targets {
                return Err(conflict(inputs, kept, other, "distributions"));
            }
            Ok(())
        })
    }
}

fn conflict(inputs: &[Cache], kept: &Planned, other: &Planned, what: &'static str) -> Error {
    let dir = |planned: &Planned| inputs.get(planned.input as usize).map_or(PathBuf::new(), |c| c.dir().to_path_buf());
    let (first, second, key) = (dir(kept), dir(other), other.key.to_string());
    Error::Conflict { first, first_row: kept.row, second, second_row: other.row, seq_id: other.seq_id, key, what }
}
