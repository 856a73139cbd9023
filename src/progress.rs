//! Progress on stderr: a thread that looks at a job's counters and draws them.
//!
//! The job only counts; nothing here can slow it down or stop it. On a terminal a bar with rate and time left; elsewhere (a
//! cluster's log file) a plain line at most every ten seconds; with `--quiet` nothing. What does not fit into [`COLUMNS`] goes onto
//! a second line.

use crate::{print, text};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use potstill_cache::ScanProgress;
use potstill_pipeline::run::{Phase, RunContext};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Widest line, in columns.
const COLUMNS: usize = 80;
/// Columns of a bar's line that stand before its message: name, bar and per cent.
const BAR_COLUMNS: usize = 35;
/// What a second line begins with.
const INDENT: &str = "  ";
/// Time between two looks at the counters.
const POLL: Duration = Duration::from_millis(100);
/// Time between two plain lines.
const PLAIN: Duration = Duration::from_secs(10);

/// Whether progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Show {
    /// As a bar or as lines, whichever stderr takes.
    Yes,
    /// Not at all.
    No,
}

/// What one look at a job shows.
pub struct Glance {
    phase: Phase,
    done: u64,
    stopping: bool,
    /// Sentences to be shown once.
    warnings: Vec<String>,
}

impl Glance {
    /// A look at a stage.
    pub fn at_stage(context: &RunContext) -> Self {
        let (phase, done) = context.progress.snapshot();
        Self { phase, done, stopping: context.stopping(), warnings: context.take_warnings() }
    }

    /// A look at a scan over a cache, which has one phase and ends at once on a signal.
    pub fn at_scan(scan: &ScanProgress, name: &str) -> Self {
        let (done, total) = scan.rows();
        // Before the scan knows how much there is, there is nothing to draw.
        let name = if total == 0 { String::new() } else { name.into() };
        let phase = Phase { name, unit: "rows", total, serial: u64::from(total > 0), ..Phase::default() };
        Self { phase, done, stopping: false, warnings: Vec::new() }
    }
}

/// A drawing thread; dropping it takes the bar away and waits for the thread.
pub struct Drawing {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drawing {
    /// Starts drawing what `look` sees.
    pub fn start(look: impl Fn() -> Glance + Send + 'static, show: Show) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&ended);
        let draw = move || if std::io::stderr().is_terminal() { bars(&look, &flag) } else { lines(&look, &flag) };
        let thread = (show == Show::Yes).then(|| std::thread::spawn(draw));
        Self { ended, thread }
    }
}

impl Drop for Drawing {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A drawing that failed is no reason to fail the job.
            let _ = thread.join();
        }
    }
}

/// How fast a phase goes: from the first look at it on, so that work found done already does not count.
struct Pace {
    serial: u64,
    began: Instant,
    done_then: u64,
}

impl Pace {
    fn new(serial: u64, done: u64) -> Self {
        Self { serial, began: Instant::now(), done_then: done }
    }

    fn per_second(&self, done: u64) -> f64 {
        done.saturating_sub(self.done_then) as f64 / self.began.elapsed().as_secs_f64().max(1e-3)
    }
}

/// One bar a phase.
fn bars(look: &impl Fn() -> Glance, ended: &AtomicBool) {
    let mut shown: Option<(Pace, ProgressBar)> = None;
    let mut warned = false;
    let mut rest = Rest::default();
    while !ended.load(Ordering::Relaxed) {
        let Glance { phase, done, stopping, warnings } = look();
        for warning in warnings.iter().map(|sentence| warning(sentence)) {
            shown.as_ref().map_or_else(|| eprintln!("{warning}"), |(_, bar)| bar.suspend(|| eprintln!("{warning}")));
        }
        if shown.as_ref().is_some_and(|(pace, _)| pace.serial != phase.serial)
            && let Some((_, bar)) = shown.take()
        {
            bar.finish_and_clear();
        }
        if !phase.name.is_empty() {
            let (pace, bar) = shown.get_or_insert_with(|| (Pace::new(phase.serial, done), new_bar(&phase)));
            let [first, second] = fold(&describe(&phase, done, pace.per_second(done)), COLUMNS - BAR_COLUMNS);
            rest.set(&phase, bar, second);
            bar.set_position(done);
            bar.set_message(first);
        }
        if stopping && !warned {
            warned = true;
            let notice = STOPPING;
            shown.as_ref().map_or_else(|| eprintln!("{notice}"), |(_, bar)| bar.suspend(|| eprintln!("{notice}")));
        }
        std::thread::park_timeout(POLL);
    }
    if let Some((_, bar)) = shown {
        bar.finish_and_clear();
    }
}

fn warning(sentence: &str) -> String {
    format!("warning: {}", text::visible(sentence))
}

/// What is said when the first signal arrives.
const STOPPING: &str = "stopping as soon as everything done is on disk; once more to stop at once";

fn new_bar(phase: &Phase) -> ProgressBar {
    let length = (phase.total > 0).then_some(phase.total);
    let bar = ProgressBar::with_draw_target(length, ProgressDrawTarget::stderr());
    bar.set_prefix(text::fit(&text::visible(&phase.name), 24));
    bar
}

/// The second line of a bar.
#[derive(Default)]
struct Rest {
    text: Arc<Mutex<String>>,
    /// The phase that is drawn, and whether with a second line.
    styled: Option<(u64, bool)>,
}

impl Rest {
    /// Shows `text` below the bar; no line where it is empty.
    fn set(&mut self, phase: &Phase, bar: &ProgressBar, text: String) {
        let styled = Some((phase.serial, !text.is_empty()));
        *self.text.lock().unwrap_or_else(PoisonError::into_inner) = text;
        if self.styled != styled {
            self.styled = styled;
            let first = if phase.total > 0 { "{prefix:<12} [{bar:14}] {percent:>3}%" } else { "{prefix:<12} {spinner}" };
            let second = if styled.is_some_and(|(_, second)| second) { "\n{rest}" } else { "" };
            if let Ok(style) = ProgressStyle::with_template(&format!("{first} {{wide_msg}}{second}")) {
                let text = Arc::clone(&self.text);
                let write = move |_: &ProgressState, out: &mut dyn std::fmt::Write| {
                    // A line that cannot be drawn is no reason to fail the job.
                    let _ = out.write_str(&text.lock().unwrap_or_else(PoisonError::into_inner));
                };
                bar.set_style(style.progress_chars("=> ").with_key("rest", write));
            }
        }
    }
}

/// A line now and then.
fn lines(look: &impl Fn() -> Glance, ended: &AtomicBool) {
    let mut pace = Pace::new(0, 0);
    let mut last: Option<Instant> = None;
    let mut warned = false;
    while !ended.load(Ordering::Relaxed) {
        let Glance { phase, done, stopping, warnings } = look();
        warnings.iter().for_each(|sentence| eprintln!("{}", warning(sentence)));
        if phase.serial != pace.serial {
            pace = Pace::new(phase.serial, done);
        }
        if !phase.name.is_empty() && last.is_none_or(|at| at.elapsed() >= PLAIN) {
            let name = text::visible(&phase.name);
            let room = COLUMNS.saturating_sub(text::width(&name) + 2);
            let [first, second] = fold(&describe(&phase, done, pace.per_second(done)), room);
            eprintln!("{name}: {first}");
            if !second.is_empty() {
                eprintln!("{second}");
            }
            last = Some(Instant::now());
        }
        if stopping && !warned {
            warned = true;
            eprintln!("{STOPPING}");
        }
        std::thread::park_timeout(POLL);
    }
}

/// `1,234/5,678 tokens, 321/s, 1 min 05 s left, loss 1.234`.
fn describe(phase: &Phase, done: u64, per_second: f64) -> Vec<String> {
    let mut parts = vec![if phase.total > 0 {
        format!("{}/{} {}", print::count(done), print::count(phase.total), phase.unit)
    } else {
        format!("{} {}", print::count(done), phase.unit)
    }];
    if per_second > 0.0 {
        parts.push(if per_second >= 10.0 {
            format!("{}/s", print::count(per_second as u64))
        } else {
            format!("{per_second:.2}/s")
        });
        if phase.total > done {
            parts.push(format!("{} left", print::duration((phase.total - done) as f64 / per_second)));
        }
    }
    if !phase.note.is_empty() {
        parts.push(text::visible(&phase.note));
    }
    parts
}

/// As many parts as fit into `room` columns, at least one, and the others for a second line, indented.
fn fold(parts: &[String], room: usize) -> [String; 2] {
    let fits = |n: &usize| text::width(&parts[..*n].join(", ")) <= room;
    let n = (1..=parts.len()).rev().find(fits).unwrap_or(1).min(parts.len());
    let rest = parts[n..].join(", ");
    [parts[..n].join(", "), if rest.is_empty() { rest } else { format!("{INDENT}{rest}") }]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_line_says_how_far_how_fast_and_how_long() {
        let phase = Phase { name: "scoring".into(), unit: "tokens", total: 10_000, note: "loss\u{1b}".into(), serial: 1 };
        let line = |phase: &Phase, done, per_second| describe(phase, done, per_second).join(", ");
        assert_eq!(line(&phase, 4_000, 100.0), "4,000/10,000 tokens, 100/s, 1 min 00 s left, loss\\u{1b}");
        assert_eq!(line(&phase, 0, 0.0), "0/10,000 tokens, loss\\u{1b}");
        let unknown = Phase { total: 0, note: String::new(), ..phase };
        assert_eq!(line(&unknown, 3, 0.5), "3 tokens, 0.50/s");
    }

    #[test]
    fn what_does_not_fit_goes_onto_a_second_line() {
        let parts = ["12/300 steps".to_string(), "0.45/s".into(), "loss 1.0".into()];
        let folded = |room| fold(&parts, room);
        assert_eq!(folded(30), ["12/300 steps, 0.45/s, loss 1.0".to_string(), String::new()]);
        assert_eq!(folded(29), ["12/300 steps, 0.45/s".to_string(), "  loss 1.0".into()]);
        assert_eq!(folded(3), ["12/300 steps".to_string(), "  0.45/s, loss 1.0".into()]);
        assert_eq!(fold(&[], 10), [String::new(), String::new()]);
    }

    #[test]
    fn drawing_ends_when_it_is_dropped() {
        let context = RunContext::default();
        context.progress.begin("testing", "things", 3);
        let started = Instant::now();
        drop(Drawing::start(move || Glance::at_stage(&context), Show::Yes));
        assert!(started.elapsed() < Duration::from_secs(5));
    }
}
