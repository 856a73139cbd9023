//! One linear function a verb, and what all long jobs share: counters, signals, drawing.

mod combine;
mod demo;
mod diff;
mod evaluate;
mod inspect;
mod merge;
mod plan;
mod precompute;
mod profile;
mod proof;
mod repack;
mod train;
mod verify;

use crate::cli::{Invocation, Manner, Verb};
use crate::exit::{self, Outcome};
use crate::progress::{Drawing, Glance, Show};
use potstill_cache::ScanProgress;
use potstill_pipeline::run::RunContext;
use std::io::Write;
use std::sync::Arc;

/// Carries out what was typed.
pub fn run(invocation: Invocation) -> anyhow::Result<Outcome> {
    profile::profiled(|| carry_out(invocation))
}

fn carry_out(invocation: Invocation) -> anyhow::Result<Outcome> {
    let manner = invocation.manner;
    match invocation.verb {
        Verb::Plan(flags) => plan::run(*flags, manner),
        Verb::Precompute(flags) => precompute::run(*flags, manner),
        Verb::Inspect(flags) => inspect::run(&flags, manner),
        Verb::Diff(flags) => diff::run(&flags, manner),
        Verb::Verify(flags) => verify::run(&flags, manner),
        Verb::Repack(flags) => repack::run(&flags, manner),
        Verb::Combine(flags) => combine::run(&flags, manner),
        Verb::Train(flags) => train::run(*flags, manner),
        Verb::Merge(flags) => merge::run(flags, manner),
        Verb::Evaluate(what) => evaluate::run(what, manner),
        Verb::Demo(flags) if flags.proof => proof::run(&flags, manner),
        Verb::Demo(flags) => demo::run(&flags, manner),
    }
}

/// Counters and a stop flag that signals set, for a job that can end early with everything done so far on disk.
fn interruptible() -> anyhow::Result<RunContext> {
    let context = RunContext::default();
    exit::stop_on_signals(&context.stop)?;
    Ok(context)
}

/// Does a stage's `work` while a thread draws its counters; nothing is drawn any more when it returns.
fn drawn<T>(context: &RunContext, manner: Manner, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let looked_at = context.clone();
    let drawing = Drawing::start(move || Glance::at_stage(&looked_at), manner.show());
    let done = work();
    drop(drawing);
    // What nobody drew is said all the same, also where the work failed and where all else is to be quiet.
    for sentence in context.take_warnings() {
        let _ = writeln!(std::io::stderr(), "warning: {}", crate::text::visible(&sentence));
    }
    done
}

/// Does a scan's `work` while a thread draws how far it is.
fn scanned<T>(name: &'static str, manner: Manner, work: impl FnOnce(&ScanProgress) -> T) -> T {
    let scan = Arc::new(ScanProgress::default());
    let looked_at = Arc::clone(&scan);
    let _drawing = Drawing::start(move || Glance::at_scan(&looked_at, name), manner.show());
    work(&scan)
}

impl Manner {
    fn show(self) -> Show {
        if self.quiet { Show::No } else { Show::Yes }
    }

    /// Says something on stderr, unless asked to be quiet.
    fn remark(self, text: &str) {
        if !self.quiet {
            // A remark that nobody can read is no reason to stop.
            let _ = writeln!(std::io::stderr(), "{}", text.trim_end());
        }
    }
}
