//! A whole dataset as examples: files in order, rows in parallel, results in order again.
//!
//! What comes out depends on the files and the options alone, never on the number of threads. Rows that hold nothing to learn
//! from are skipped and counted by reason; anything malformed stops the reading with its place.

use super::rows::{Row, RowReader};
use super::schema::{self, Fault};
use super::skip::Skip;
use super::source::{self, SourceFile};
use super::{BadRoles, ChatTokenizer, DataError, Example, Message, Truncation, encoding};
use crate::run::RunContext;
use potstill_cache::{DataFingerprint, RowKey};
use rayon::prelude::*;
use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

/// Rows that are encoded at once, at most.
const BATCH_ROWS: usize = 512;
/// Bytes of rows after which a batch is not filled further.
const BATCH_BYTES: usize = 32 << 20;

/// How rows become examples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataOptions {
    /// Longest example, in tokens.
    pub max_length: u32,
    /// What to do with longer ones.
    pub truncation: Truncation,
    /// What to do with roles that cannot be trained on.
    pub on_bad_roles: BadRoles,
}

/// A dataset ready to be scored or trained on.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// In the data's order; each has a scored token that is not its first.
    pub examples: Vec<Example>,
    /// The files, how many rows they hold, and how many were skipped for which reason.
    pub fingerprint: DataFingerprint,
    /// Tokens cut away from `examples` by truncation (rows skipped because nothing was left are not counted here).
    pub truncated_tokens: u64,
    /// Examples that were cut.
    pub truncated_rows: u64,
    /// The first skipped row of each reason: `file:line`, or `file:row N` in Parquet.
    pub first_skipped: BTreeMap<String, String>,
}

/// Reads `paths` (files, folders, globs) and encodes every conversation in them.
///
/// Errors: a path that leads nowhere; a file, row, role or template that is wrong, with its place; no rows; nothing to learn
/// from; a stop asked for by `context`.
pub fn load(
    paths: &[PathBuf],
    tokenizer: &ChatTokenizer,
    options: &DataOptions,
    context: &RunContext,
) -> Result<Dataset, DataError> {
    let files = source::files(paths)?;
    let mut gathered = Gathered::new();
    let total = files.iter().map(|file| std::fs::metadata(&file.path).map_or(0, |m| m.len())).sum();
    context.progress.begin("encoding chats", "bytes", total);
    let read = files.iter().try_for_each(|file| read_file(file, tokenizer, options, context, &mut gathered));
    context.progress.end();
    read?;
    gathered.finish(paths)
}

fn read_file(
    file: &SourceFile,
    tokenizer: &ChatTokenizer,
    options: &DataOptions,
    context: &RunContext,
    gathered: &mut Gathered,
) -> Result<(), DataError> {
    gathered.fingerprint.files.push(file.fingerprint()?);
    let mut reader = RowReader::open(file)?;
    let (mut counted, mut failure, mut ended) = (0, None, false);
    while !ended {
        let mut batch: Vec<Row> = Vec::with_capacity(BATCH_ROWS);
        let mut bytes = 0;
        while batch.len() < BATCH_ROWS && bytes < BATCH_BYTES && !ended {
            match reader.next() {
                Some(Ok(row)) => {
                    bytes += row.bytes();
                    batch.push(row);
                }
                other => (failure, ended) = (other.and_then(Result::err), true),
            }
        }
        if context.stopping() {
            return Err(DataError::Interrupted);
        }
        // The rows before a failure come first: of two wrong rows the earlier is reported.
        let outcomes: Vec<_> = batch.par_iter().map(|row| example(row, tokenizer, options)).collect();
        for (row, outcome) in batch.iter().zip(outcomes) {
            gathered.add(row, outcome?);
        }
        context.progress.add(reader.bytes_read().saturating_sub(counted));
        counted = reader.bytes_read();
    }
    failure.map_or(Ok(()), Err)
}

/// What became of a row.
enum Outcome {
    Kept(encoding::Fitted),
    Skipped(Skip),
}

fn example(row: &Row, tokenizer: &ChatTokenizer, options: &DataOptions) -> Result<Outcome, DataError> {
    let place = || row.place.to_string();
    let messages: Vec<Message> = match schema::conversation(row.value()?.as_ref()) {
        Ok(messages) => messages,
        Err(Fault::Skip(reason)) => return Ok(Outcome::Skipped(reason)),
        Err(Fault::Schema { expected, found }) => return Err(DataError::Schema { place: place(), expected, found }),
        Err(Fault::UnknownRole { expected, found, index }) => {
            let error = DataError::UnknownRole { place: place(), expected, found, index };
            return bad_roles(options, Skip::UnknownRole, error);
        }
        Err(Fault::RoleOrder { expected, found, index }) => {
            let error = DataError::RoleOrder { place: place(), expected, found, index };
            return bad_roles(options, Skip::RoleOrder, error);
        }
    };
    let max_length = options.max_length as usize;
    let fitted = match encoding::fit(tokenizer, &messages, max_length, options.truncation) {
        Ok(fitted) => fitted,
        Err(source @ DataError::Refused { .. }) => {
            return bad_roles(options, Skip::Refused, DataError::At { place: place(), source: Box::new(source) });
        }
        Err(source) => return Err(DataError::At { place: place(), source: Box::new(source) }),
    };
    Ok(match (fitted.encoded.is_trainable(), fitted.cut) {
        (true, _) => Outcome::Kept(fitted),
        (false, 1..) => Outcome::Skipped(Skip::NothingLeft),
        (false, 0) if fitted.encoded.ids.is_empty() => Outcome::Skipped(Skip::EmptyText),
        (false, 0) => Outcome::Skipped(Skip::NothingScored),
    })
}

fn bad_roles(options: &DataOptions, reason: Skip, error: DataError) -> Result<Outcome, DataError> {
    match options.on_bad_roles {
        BadRoles::Skip => Ok(Outcome::Skipped(reason)),
        BadRoles::Error => Err(error),
    }
}

/// The dataset as far as it is read.
struct Gathered {
    examples: Vec<Example>,
    fingerprint: DataFingerprint,
    truncated_tokens: u64,
    truncated_rows: u64,
    first_skipped: BTreeMap<String, String>,
    keys: HashSet<RowKey>,
}

impl Gathered {
    fn new() -> Self {
        Self {
            examples: Vec::new(),
            fingerprint: DataFingerprint { files: Vec::new(), rows: 0, skipped: BTreeMap::new() },
            truncated_tokens: 0,
            truncated_rows: 0,
            first_skipped: BTreeMap::new(),
            keys: HashSet::new(),
        }
    }

    fn add(&mut self, row: &Row, outcome: Outcome) {
        let seq_id = self.fingerprint.rows;
        self.fingerprint.rows += 1;
        match outcome {
            Outcome::Skipped(reason) => self.skip(row, reason),
            Outcome::Kept(fitted) => {
                let encoding::Encoded { ids, scored, .. } = fitted.encoded;
                let example = Example { seq_id, input_ids: ids, scored };
                // The key the cache will know the row by.
                if !self.keys.insert(RowKey::of(&example.input_ids, &example.positions())) {
                    return self.skip(row, Skip::Duplicate);
                }
                self.truncated_tokens += fitted.cut as u64;
                self.truncated_rows += u64::from(fitted.cut > 0);
                self.examples.push(example);
            }
        }
    }

    fn skip(&mut self, row: &Row, reason: Skip) {
        *self.fingerprint.skipped.entry(reason.as_str().to_string()).or_default() += 1;
        self.first_skipped.entry(reason.as_str().to_string()).or_insert_with(|| row.place.to_string());
    }

    fn finish(self, paths: &[PathBuf]) -> Result<Dataset, DataError> {
        let paths = || paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        if self.fingerprint.rows == 0 {
            return Err(DataError::Empty { paths: paths() });
        }
        if self.examples.is_empty() {
            let reasons = self.fingerprint.skipped.iter().map(|(reason, n)| format!("{reason}: {n}"));
            let reasons = reasons.collect::<Vec<_>>().join(", ");
            return Err(DataError::NothingToLearn { paths: paths(), rows: self.fingerprint.rows, reasons });
        }
        Ok(Dataset {
            examples: self.examples,
            fingerprint: self.fingerprint,
            truncated_tokens: self.truncated_tokens,
            truncated_rows: self.truncated_rows,
            first_skipped: self.first_skipped,
        })
    }
}
