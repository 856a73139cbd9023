//! `potstill inspect`: what a cache is and how it looks on one screen, one conversation token by token, or both as a page.
//!
//! The tokenizer needed to show tokens lies in the cache itself, so a cache can be read without any model. Figures come from the
//! cache's crate; here they are only drawn.

mod conversation;
mod find;
mod page;
mod reading;
mod summary;
mod vocabulary;

pub use conversation::Conversation;
pub use summary::lines as summary_lines;
pub use vocabulary::Vocabulary;

use super::scanned;
use crate::cli::{self, Manner};
use crate::exit::{Outcome, UsageError};
use crate::ink::Ink;
use crate::print;
use potstill_cache::{Cache, RowKey, Summary};
use std::io::Write;

/// Shows a cache, or one of its rows.
pub fn run(flags: &cli::Inspect, manner: Manner) -> anyhow::Result<Outcome> {
    let cache = Cache::open(&flags.cache)?;
    if let Some(wanted) = &flags.find {
        return find::run(&cache, wanted, flags, manner);
    }
    if let Some(file) = &flags.html {
        page::run(&cache, file, flags, manner)?;
        return Ok(Outcome::Done);
    }
    match wanted_row(&cache, flags)? {
        Some(row) => {
            let vocabulary = Vocabulary::of(&cache)?;
            let conversation = Conversation::of(row, &cache.row(row)?, |id| vocabulary.bytes(id));
            if manner.json {
                print::json(&conversation)?;
            } else {
                let mut out = print::out();
                conversation.write(flags.top, Ink::of_stdout(), &mut out)?;
                out.flush()?;
            }
        }
        None => {
            let summary = scanned("reading", manner, |scan| Summary::of(&cache, scan))?;
            if manner.json {
                print::json(&summary::Whole::of(&cache, &summary))?;
            } else {
                let mut out = print::out();
                Ink::of_stdout().write_all(&summary_lines(&cache, &summary)?, &mut out)?;
                out.flush()?;
            }
        }
    }
    Ok(Outcome::Done)
}

fn wanted_row(cache: &Cache, flags: &cli::Inspect) -> anyhow::Result<Option<u64>> {
    let Some(key) = &flags.key else { return Ok(flags.row) };
    let key: RowKey = key.parse()?;
    match cache.find(&key)? {
        Some(row) => Ok(Some(row)),
        None => Err(UsageError(format!("{}: no row has the key {key}", flags.cache.display())).into()),
    }
}
