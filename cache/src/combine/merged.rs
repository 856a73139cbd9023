//! What several caches have in common and what their union is: descriptions compared, shares of the same data put together, missing
//! rows found. Rows themselves are not looked at here.

use crate::error::Difference;
use crate::{Cache, DataFingerprint, Description, Error, Part, Result};
use std::ops::Range;

/// What the caches come to.
pub(super) struct Merged {
    first: Description,
    /// Caches of the same data, in the order in which each data was named first.
    pub(super) groups: Vec<Group>,
}

/// Caches of the same data.
pub(super) struct Group {
    /// Numbers of the caches.
    pub(super) inputs: Vec<usize>,
    data: DataFingerprint,
    truncated_tokens: u64,
    /// Rows of all of it, or of its one part.
    expected: u64,
    part: Option<Part>,
    /// Rows that none of the caches holds.
    missing: Vec<Range<u64>>,
    /// The first cache's folder, for messages.
    dir: std::path::PathBuf,
}

impl Merged {
    /// Compares the caches. Errors: `Unlike`, `Incomplete` where parts are missing altogether.
    pub(super) fn of(inputs: &[Cache]) -> Result<Self> {
        let first = super::first_of(inputs)?;
        for other in inputs.iter().skip(1) {
            compare(first, other)?;
        }
        let mut members: Vec<(&DataFingerprint, Vec<usize>)> = Vec::new();
        for (index, cache) in inputs.iter().enumerate() {
            let data = &cache.manifest().description.data;
            match members.iter_mut().find(|(known, _)| *known == data) {
                Some((_, group)) => group.push(index),
                None => members.push((data, vec![index])),
            }
        }
        let groups = members.into_iter().map(|(data, members)| Group::of(inputs, data, members)).collect::<Result<Vec<_>>>()?;
        let mut description = first.manifest().description.clone();
        description.derived = derived(inputs);
        Ok(Self { first: description, groups })
    }

    /// How far the seq_ids of each group are shifted: by the data rows of the groups before it.
    pub(super) fn shifts(&self) -> Vec<u64> {
        let mut rows = 0u64;
        let shift = |group: &Group| {
            let shift = rows;
            rows = rows.saturating_add(group.data.rows);
            shift
        };
        self.groups.iter().map(shift).collect()
    }

    /// The union's description, stored as the caches are.
    pub(super) fn description(&self, duplicates: u64) -> Description {
        let mut description = self.first.clone();
        let mut data = DataFingerprint { files: Vec::new(), rows: 0, skipped: Default::default() };
        for group in &self.groups {
            data.files.extend(group.data.files.iter().cloned());
            data.rows = data.rows.saturating_add(group.data.rows);
            for (reason, n) in &group.data.skipped {
                *data.skipped.entry(reason.clone()).or_default() += n;
            }
        }
        if duplicates > 0 {
            *data.skipped.entry(super::DUPLICATE.into()).or_default() += duplicates;
        }
        description.data = data;
        description.encoding.truncated_tokens = self.groups.iter().map(|group| group.truncated_tokens).sum();
        description.expected_rows = self.groups.iter().map(|group| group.expected).sum::<u64>().saturating_sub(duplicates);
        description.part = match self.groups.as_slice() {
            [only] => only.part,
            _ => None,
        };
        description
    }

    /// Rows that the caches hold between them, one that several of the same data hold counted once.
    pub(super) fn rows(&self) -> u64 {
        let missing = |group: &Group| group.missing.iter().map(|range| range.end - range.start).sum::<u64>();
        self.groups.iter().map(|group| group.expected.saturating_sub(missing(group))).sum()
    }

    /// Whether a union with `rows` rows is complete, or can be continued by the command that makes such a cache.
    pub(super) fn check_continuable(&self, description: &Description, rows: u64) -> Result<()> {
        let Some(group) = self.groups.iter().find(|group| !group.missing.is_empty()) else { return Ok(()) };
        let incomplete = |advice| {
            let missing = spoken(&group.missing, group.expected);
            Err(Error::Incomplete { dir: group.dir.clone(), missing, advice })
        };
        let last = matches!(group.missing.as_slice(), [only] if only.end == group.expected);
        if !last {
            return incomplete("name a cache that has them");
        }
        if self.groups.len() > 1 || !description.derived.is_empty() {
            return incomplete("finish that cache with the command that made it, then join or rewrite it");
        }
        if !rows.is_multiple_of(u64::from(description.rows_per_shard)) {
            return incomplete("the first of them begins no shard, so nothing could continue; leave rows-per-shard as it is");
        }
        Ok(())
    }
}

impl Group {
    fn of(inputs: &[Cache], data: &DataFingerprint, members: Vec<usize>) -> Result<Self> {
        let caches: Vec<&Cache> = members.iter().filter_map(|&i| inputs.get(i)).collect();
        let first = super::first_of(inputs)?;
        let lead = caches.first().copied().unwrap_or(first);
        for cache in &caches {
            let tokens = |cache: &Cache| cache.manifest().description.encoding.truncated_tokens;
            agree(lead, cache, "encoding.truncated_tokens", tokens(lead), tokens(cache))?;
        }
        let (expected, part) = extent(&caches, lead)?;
        let mut covered: Vec<Range<u64>> = Vec::with_capacity(caches.len());
        for cache in &caches {
            let description = &cache.manifest().description;
            let place = match description.part {
                Some(own) if part.is_none() => own.rows(expected, description.rows_per_shard),
                _ => 0..expected,
            };
            agree(lead, cache, "expected_rows", place.end - place.start, description.expected_rows)?;
            covered.push(place.start..place.start + cache.len());
        }
        let encoding = &lead.manifest().description.encoding;
        let missing = gaps(covered, expected);
        let (data, truncated_tokens, dir) = (data.clone(), encoding.truncated_tokens, lead.dir().to_path_buf());
        Ok(Self { inputs: members, data, truncated_tokens, expected, part, missing, dir })
    }
}

/// Rows of the union of caches of the same data, and which part of the data it is where it is not all of it.
fn extent(caches: &[&Cache], lead: &Cache) -> Result<(u64, Option<Part>)> {
    let description = |cache: &&Cache| cache.manifest().description.clone();
    if let Some(whole) = caches.iter().map(description).find(|d| d.part.is_none()) {
        return Ok((whole.expected_rows, None));
    }
    let Some(first) = lead.manifest().description.part else { return Ok((0, None)) };
    if caches.iter().all(|cache| cache.manifest().description.part == Some(first)) {
        return Ok((lead.manifest().description.expected_rows, Some(first)));
    }
    let mut rows: std::collections::BTreeMap<u32, u64> = Default::default();
    for cache in caches {
        let (part, expected) = (cache.manifest().description.part, cache.manifest().description.expected_rows);
        agree(lead, cache, "part.of", u64::from(first.of), part.map_or(0, |part| u64::from(part.of)))?;
        rows.insert(part.map_or(0, |part| part.number), expected);
    }
    let absent: Vec<String> = (1..=first.of).filter(|n| !rows.contains_key(n)).map(|n| n.to_string()).take(20).collect();
    if absent.is_empty() {
        return Ok((rows.values().sum(), None));
    }
    let (s, are) = if absent.len() == 1 { ("", "is") } else { ("s", "are") };
    let missing = format!("part{s} {} of {} {are} missing", absent.join(", "), first.of);
    Err(Error::Incomplete { dir: lead.dir().to_path_buf(), missing, advice: "name a cache of each part" })
}

/// What no range covers of `0..end`.
fn gaps(mut covered: Vec<Range<u64>>, end: u64) -> Vec<Range<u64>> {
    covered.sort_by_key(|range| range.start);
    let (mut gaps, mut reached) = (Vec::new(), 0);
    for range in covered {
        if range.start > reached {
            gaps.push(reached..range.start);
        }
        reached = reached.max(range.end);
    }
    if reached < end {
        gaps.push(reached..end);
    }
    gaps
}

/// `rows 3 to 7, 9 of 12 are missing`, at most some of them.
fn spoken(ranges: &[Range<u64>], of: u64) -> String {
    let one = |range: &Range<u64>| match range.end - range.start {
        1 => range.start.to_string(),
        _ => format!("{} to {}", range.start, range.end - 1),
    };
    let more = if ranges.len() > 5 { " and more" } else { "" };
    let rows = ranges.iter().take(5).map(one).collect::<Vec<_>>().join(", ");
    match ranges {
        [only] if only.end - only.start == 1 => format!("row {rows} of {of} is missing"),
        _ => format!("rows {rows}{more} of {of} are missing"),
    }
}

fn agree(first: &Cache, second: &Cache, field: &str, a: u64, b: u64) -> Result<()> {
    match a == b {
        true => Ok(()),
        false => unlike(first, second, vec![Difference { field: field.into(), cache: a.to_string(), here: b.to_string() }]),
    }
}

fn unlike(first: &Cache, second: &Cache, differences: Vec<Difference>) -> Result<()> {
    Err(Error::Unlike { first: first.dir().to_path_buf(), second: second.dir().to_path_buf(), differences })
}

/// Everything has to be alike but which conversations there are, and how shards are cut and compressed.
fn compare(first: &Cache, second: &Cache) -> Result<()> {
    let alike = |cache: &Cache| {
        let mut description = cache.manifest().description.clone();
        description.data = DataFingerprint { files: Vec::new(), rows: 0, skipped: Default::default() };
        description.encoding.truncated_tokens = 0;
        (description.expected_rows, description.part) = (0, None);
        (description.rows_per_shard, description.zstd_level) = (1, 1);
        description.derived.iter_mut().for_each(|derivation| derivation.from.clear());
        description
    };
    let mut differences = alike(first).differences(&alike(second));
    let (ours, theirs) = (&first.manifest().companions, &second.manifest().companions);
    let only_theirs = theirs.iter().filter(|c| !ours.iter().any(|d| d.path == c.path));
    for path in ours.iter().chain(only_theirs).map(|c| &c.path) {
        let digest = |list: &[crate::CompanionEntry]| {
            list.iter().find(|c| &c.path == path).map_or("nothing".to_string(), |c| format!("{:?}", c.blake3))
        };
        let (cache, here) = (digest(ours), digest(theirs));
        if cache != here {
            differences.push(Difference { field: format!("companions[{path}].blake3"), cache, here });
        }
    }
    if differences.is_empty() { Ok(()) } else { unlike(first, second, differences) }
}

/// The rewritings that the caches have in common, each with all that it was made from.
fn derived(inputs: &[Cache]) -> Vec<crate::Derivation> {
    let mut lists = inputs.iter().map(|cache| &cache.manifest().description.derived);
    let mut derived = lists.next().cloned().unwrap_or_default();
    for list in lists {
        for (ours, theirs) in derived.iter_mut().zip(list) {
            for digest in &theirs.from {
                if !ours.from.contains(digest) {
                    ours.from.push(digest.clone());
                }
            }
        }
    }
    derived
}
