//! What `inspect` says of a whole cache: sizes by column and figures of its distributions. One streaming pass over all rows;
//! sums are taken in row order, so the figures do not depend on the number of threads.

use crate::progress::ScanProgress;
use crate::{Cache, Record, Result, Selection, Target};
use rayon::prelude::*;
use serde::Serialize;

/// Bytes an entry takes uncompressed in the plainest layout: a 4-byte id and a 2-byte log-probability, logit or count.
pub const RAW_ENTRY_BYTES: u64 = 6;
/// Bins of the top-1 histogram; the median is exact to half a bin.
const BINS: usize = 4096;
/// Rows read at once before their sums are added up.
const BLOCK_ROWS: u64 = 256;

/// Figures of a cache.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Whether all expected rows are there.
    pub complete: bool,
    /// Shards.
    pub shards: u64,
    /// Rows.
    pub rows: u64,
    /// Rows without a scored position: conversations that the teacher could not score.
    pub left_out: u64,
    /// Tokens.
    pub tokens: u64,
    /// Scored positions.
    pub scored: u64,
    /// Kept entries over all scored positions.
    pub entries: u64,
    /// Different drawn ids over all scored positions.
    pub drawn: u64,
    /// Bytes of all shards.
    pub bytes: u64,
    /// `bytes / scored`; absent where nothing is scored, as are the next two.
    pub bytes_per_scored: Option<f64>,
    /// 6 bytes (a 4-byte id, a 2-byte value) for each entry and each draw that a scored position may have.
    pub raw_bytes: u64,
    /// `raw_bytes / bytes`: how many times smaller the cache is.
    pub raw_ratio: Option<f64>,
    /// Bytes by column.
    pub columns: Vec<ColumnBytes>,
    /// Bytes of footers and page indexes: everything that is no column's page.
    pub other_bytes: u64,
    /// Figures of the distributions; absent where nothing is scored.
    pub distributions: Option<Distributions>,
}

/// Size of one column.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ColumnBytes {
    /// The column's name.
    pub name: String,
    /// Bytes in the files.
    pub compressed: u64,
    /// Bytes of the encoded pages before zstd.
    pub uncompressed: u64,
}

/// Figures over all scored positions, from the stored (rounded) values. What a selection does not tell is absent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Distributions {
    /// Of the kept entries; absent where all entries are drawn.
    #[serde(flatten)]
    pub kept: Option<Kept>,
    /// Mean stored probability of the tail: outside the kept ids, or outside the drawn ones where all are drawn.
    pub mean_tail_mass: f64,
    /// Of the drawn entries; absent where none are drawn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drawn: Option<Drawn>,
}

/// Figures of kept entries.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Kept {
    /// Mean probability of the most likely token.
    pub mean_top1: f64,
    /// Median of the same, to within 1/8192.
    pub median_top1: f64,
    /// Mean entropy in nats of the kept tokens and the tail as one outcome: a lower bound of the teacher's entropy.
    pub mean_entropy: f64,
    /// Mean sum of the kept probabilities.
    pub mean_kept_mass: f64,
    /// Share of positions where the teacher's most likely token is the data's next token.
    pub top1_is_next: f64,
    /// Share of positions where the data's next token is among the kept.
    pub next_is_kept: f64,
    /// exp(-mean log-probability of the data's next token) over the positions where that token is kept. Positions where it is
    /// not are left out, so this is below the teacher's perplexity on the data. Absent where no next token is kept.
    pub perplexity_where_kept: Option<f64>,
}

/// Figures of drawn entries. Counts say nothing without bias of the most likely token, of entropy or of log-probabilities.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Drawn {
    /// Mean number of different ids drawn at a position.
    pub mean_ids: f64,
    /// Share of positions where the data's next token was drawn.
    pub next_is_drawn: f64,
    /// Mean probability of the data's next token: of kept ones as stored, of drawn ones as counts estimate it. Without bias.
    pub mean_next_probability: f64,
}

impl Summary {
    /// Reads all rows of `cache`. Stops at the first damaged one.
    pub fn of(cache: &Cache, progress: &ScanProgress) -> Result<Self> {
        let manifest = cache.manifest();
        progress.begin(cache.len(), 0);
        let mut sums = Sums::default();
        let mut first = 0;
        while first < cache.len() {
            let end = first.saturating_add(BLOCK_ROWS).min(cache.len());
            let look = |row| {
                let record = cache.row(row)?;
                progress.add_rows(1);
                Ok(Sums::of(&record))
            };
            let block: Vec<Sums> = (first..end).into_par_iter().map(look).collect::<Result<_>>()?;
            block.iter().for_each(|row| sums.add(row));
            first = end;
        }
        let columns = columns(cache);
        let (bytes, scored) = (manifest.bytes(), manifest.scored());
        let selection = &manifest.description.selection;
        let most = u64::from(selection.head()) + u64::from(selection.draws().unwrap_or(0));
        let raw_bytes = scored.saturating_mul(most).saturating_mul(RAW_ENTRY_BYTES);
        let ratio = |a: u64, b: u64| (b > 0 && scored > 0).then(|| a as f64 / b as f64);
        Ok(Self {
            complete: manifest.complete,
            shards: manifest.shards.len() as u64,
            rows: cache.len(),
            left_out: sums.left_out,
            tokens: manifest.tokens(),
            scored,
            entries: sums.entries,
            drawn: sums.drawn,
            bytes,
            bytes_per_scored: ratio(bytes, scored),
            raw_bytes,
            raw_ratio: ratio(raw_bytes, bytes),
            other_bytes: bytes.saturating_sub(columns.iter().map(|c| c.compressed).sum()),
            columns,
            distributions: sums.figures(selection),
        })
    }
}

fn columns(cache: &Cache) -> Vec<ColumnBytes> {
    let mut columns: Vec<ColumnBytes> = Vec::new();
    for size in cache.shards().iter().flat_map(|shard| shard.column_sizes().iter().cloned()) {
        match columns.iter_mut().find(|c| c.name == size.name) {
            Some(c) => {
                c.compressed = c.compressed.saturating_add(size.compressed);
                c.uncompressed = c.uncompressed.saturating_add(size.uncompressed);
            }
            None => columns.push(ColumnBytes { name: size.name, compressed: size.compressed, uncompressed: size.uncompressed }),
        }
    }
    columns
}

/// Sums over scored positions.
#[derive(Debug, Clone, Default)]
struct Sums {
    left_out: u64,
    positions: u64,
    entries: u64,
    top1: f64,
    entropy: f64,
    kept: f64,
    tail: f64,
    top1_is_next: u64,
    next_kept: u64,
    next_logprob: f64,
    drawn: u64,
    next_drawn: u64,
    next_probability: f64,
    /// Top-1 probabilities: of one row as bin numbers, of many as a histogram.
    bins: Vec<u16>,
    histogram: Vec<u64>,
}

impl Sums {
    fn of(record: &Record) -> Self {
        let mut sums = Sums { left_out: u64::from(record.positions.is_empty()), ..Sums::default() };
        for (i, &position) in record.positions.iter().enumerate() {
            let next = record.input_ids.get(position as usize + 1).copied();
            sums.position(&record.targets.position(i), next);
        }
        sums
    }

    fn position(&mut self, target: &Target<'_>, next: Option<u32>) {
        let top1 = target.logprobs.first().map_or(0.0, |&l| f64::from(l).exp());
        let tail = f64::from(target.tail_logprob);
        self.positions += 1;
        self.entries += target.ids.len() as u64;
        self.top1 += top1;
        self.tail += tail.exp();
        self.entropy -= tail.exp() * tail;
        for &l in target.logprobs {
            let (l, p) = (f64::from(l), f64::from(l).exp());
            self.kept += p;
            self.entropy -= p * l;
        }
        self.bins.push(((top1 * BINS as f64) as usize).min(BINS - 1) as u16);
        self.top1_is_next += u64::from(next.is_some() && target.ids.first().copied() == next);
        if let Some((_, &l)) = target.ids.iter().zip(target.logprobs).find(|(id, _)| Some(**id) == next) {
            self.next_kept += 1;
            self.next_logprob += f64::from(l);
            self.next_probability += f64::from(l).exp();
        }
        self.drawn += target.sample_ids.len() as u64;
        if let Some((_, estimate)) = target.drawn_probabilities().find(|(id, _)| Some(*id) == next) {
            self.next_drawn += 1;
            self.next_probability += estimate;
        }
    }

    fn add(&mut self, row: &Sums) {
        self.left_out += row.left_out;
        self.positions += row.positions;
        self.entries += row.entries;
        self.top1 += row.top1;
        self.entropy += row.entropy;
        self.kept += row.kept;
        self.tail += row.tail;
        self.top1_is_next += row.top1_is_next;
        self.next_kept += row.next_kept;
        self.next_logprob += row.next_logprob;
        self.drawn += row.drawn;
        self.next_drawn += row.next_drawn;
        self.next_probability += row.next_probability;
        self.histogram.resize(BINS, 0);
        for &bin in &row.bins {
            if let Some(count) = self.histogram.get_mut(usize::from(bin)) {
                *count += 1;
            }
        }
    }

    fn figures(&self, selection: &Selection) -> Option<Distributions> {
        if self.positions == 0 {
            return None;
        }
        let n = self.positions as f64;
        let perplexity = (self.next_kept > 0).then(|| (-self.next_logprob / self.next_kept as f64).exp());
        let kept = (selection.head() > 0).then(|| Kept {
            mean_top1: self.top1 / n,
            median_top1: self.median(),
            mean_entropy: self.entropy / n,
            mean_kept_mass: self.kept / n,
            top1_is_next: self.top1_is_next as f64 / n,
            next_is_kept: self.next_kept as f64 / n,
            perplexity_where_kept: perplexity,
        });
        let drawn = selection.draws().map(|_| Drawn {
            mean_ids: self.drawn as f64 / n,
            next_is_drawn: self.next_drawn as f64 / n,
            mean_next_probability: self.next_probability / n,
        });
        Some(Distributions { kept, mean_tail_mass: self.tail / n, drawn })
    }

    /// Middle of the bin that holds the lower median.
    fn median(&self) -> f64 {
        let mut left = self.positions.div_ceil(2);
        for (bin, &count) in self.histogram.iter().enumerate() {
            if count >= left {
                return (bin as f64 + 0.5) / BINS as f64;
            }
            left -= count;
        }
        1.0
    }
}
