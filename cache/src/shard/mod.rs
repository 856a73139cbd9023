//! One shard: a Parquet file that is written once and never changes. Nothing here knows of folders or manifests.

pub(crate) mod arrow;
pub(crate) mod footer;
mod header;
mod heads;
pub(crate) mod page;
pub(crate) mod read;
pub(crate) mod sizing;
mod table;
pub(crate) mod write;

/// Rows in a row group: few, because a random read handles its row group's whole list of pages.
pub(crate) const ROWS_PER_GROUP: usize = 64;

/// File name of shard `index`.
pub(crate) fn file_name(index: usize) -> String {
    format!("shard-{index:05}.parquet")
}

/// Number of the shard that has this file name.
pub(crate) fn index_of(name: &str) -> Option<usize> {
    let index = name.strip_prefix("shard-")?.strip_suffix(".parquet")?.parse().ok()?;
    (file_name(index) == name).then_some(index)
}

/// File name of piece `part` of shard `index` while that shard is under way.
pub(crate) fn part_name(index: usize, part: usize) -> String {
    format!("part-{index:05}-{part:03}.parquet")
}
