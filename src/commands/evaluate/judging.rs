//! What the sub-verbs with a judge share: settings from flags, and how calls are shown.

use crate::cli::{Answering, Asking, Manner};
use crate::exit::{Outcome, UsageError};
use crate::print::{self, Out, Side, Table};
use potstill_pipeline::evaluate::judge::{self, Calls, Endpoint, Outlook, Patience, endpoint};
use potstill_pipeline::evaluate::{AnswerSettings, AnswerSource};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Hexadecimal digits of a digest that people are shown.
const DIGEST_SHOWN: usize = 12;

impl Asking {
    /// Judge, results and replies.
    pub(super) fn places(&self) -> Result<(String, PathBuf, PathBuf), UsageError> {
        let missing = |flag: &str| UsageError(format!("{flag} is missing"));
        let judge = self.judge.clone().ok_or_else(|| missing("--judge"))?;
        let out = self.out.clone().ok_or_else(|| missing("--out"))?;
        let replies = self.replies.clone().unwrap_or_else(|| out.join("replies"));
        Ok((judge, out, replies))
    }

    pub(super) fn patience(&self) -> Patience {
        Patience {
            concurrency: self.concurrency,
            tries: self.tries,
            timeout: Duration::from_secs(self.timeout),
            requests_per_minute: self.requests_per_minute,
            ..Patience::default()
        }
    }
}

impl Answering {
    pub(super) fn source(&self, asking: &Asking) -> Result<AnswerSource, UsageError> {
        match (&self.answers, &self.answers_model) {
            (Some(path), _) => Ok(AnswerSource::File(path.clone())),
            (None, Some(model)) => Ok(AnswerSource::Endpoint(AnswerSettings {
                model: model.clone(),
                temperature: self.answers_temperature,
                top_p: self.answers_top_p,
                max_tokens: self.answers_max_tokens,
                limit_field: asking.limit_field,
                seed: self.answers_seed,
            })),
            (None, None) => Err(UsageError("expected --answers or --answers-model".into())),
        }
    }

    /// Who writes answers, where they are to be asked for.
    pub(super) fn endpoint(&self) -> anyhow::Result<Option<Endpoint>> {
        let endpoint = self.answers_model.as_ref().map(|_| Endpoint::of_process(endpoint::ANSWERS)).transpose();
        Ok(endpoint.map_err(potstill_pipeline::Error::from)?)
    }
}

/// What a dry run says.
pub(super) fn write_outlook(
    judge: &Outlook,
    answers: &Outlook,
    manner: Manner,
    value: &impl serde::Serialize,
) -> anyhow::Result<Outcome> {
    if manner.json {
        print::json(value)?;
        return Ok(Outcome::Done);
    }
    let mut table = Table::with_heads(&[
        ("asked", Side::Left),
        ("calls", Side::Right),
        ("on disk", Side::Right),
        ("to send", Side::Right),
        ("prompt tokens", Side::Right),
        ("reply tokens, most", Side::Right),
    ]);
    for (who, outlook) in [("answers", answers), ("judge", judge)] {
        if outlook.calls > 0 {
            table.row([
                who.to_string(),
                print::count(outlook.calls),
                print::count(outlook.on_disk),
                print::count(outlook.calls - outlook.on_disk),
                print::count(outlook.prompt_tokens),
                print::count(outlook.most_completion_tokens),
            ]);
        }
    }
    let mut out = print::out();
    table.write(&mut out)?;
    writeln!(out, "\nEstimated at {} characters a token; nothing was sent.", judge::CHARACTERS_PER_TOKEN)?;
    if answers.calls > 0 {
        writeln!(out, "Answers that are not written yet are taken to be as long as they may become.")?;
    }
    out.flush()?;
    Ok(Outcome::Done)
}

/// What was asked, as facts.
pub(super) fn add_calls(table: &mut Table, who: &str, calls: &Calls) {
    let (asked, known) = (print::count(calls.asked), print::count(calls.from_disk));
    table.fact(who, format!("{asked} asked, {known} on disk before"));
    if calls.asked > 0 {
        let (prompt, completion) = (print::count(calls.prompt_tokens_now), print::count(calls.completion_tokens_now));
        table.fact("  tokens", format!("{prompt} sent, {completion} received"));
    }
    let models: Vec<String> = calls.models.iter().map(|(name, n)| format!("{name} ({})", print::count(*n))).collect();
    if !models.is_empty() {
        table.fact("  answered by", models.join(", "));
    }
    if calls.torn > 0 {
        table.fact("  asked again", format!("{} whose file was torn", print::count(calls.torn)));
    }
    for (kind, n) in &calls.passing {
        table.fact("  failed tries", format!("{}: {kind}", print::count(*n)));
    }
}

/// A line for each reason why something is missing from the figures.
pub(super) fn write_remarks(out: &mut Out, title: &str, reasons: &BTreeMap<String, u64>) -> std::io::Result<()> {
    for (reason, n) in reasons {
        writeln!(out, "{title}: {} ({})", print::count(*n), crate::text::visible(reason))?;
    }
    Ok(())
}

/// A file by its name and the beginning of its digest.
pub(super) fn digest_of(digest: &str, path: &Path) -> String {
    let name = path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned());
    format!("{name}, BLAKE3 {}", digest.get(..DIGEST_SHOWN).unwrap_or(digest))
}

/// A number with so many digits after its point, or a dash.
pub(super) fn number(x: Option<f64>, digits: usize) -> String {
    x.map_or_else(|| "-".into(), |x| format!("{x:.digits$}"))
}

/// A mean and its standard error.
pub(super) fn with_error(x: Option<f64>, error: Option<f64>, digits: usize) -> String {
    match error {
        Some(error) => format!("{} ± {error:.digits$}", number(x, digits)),
        None => number(x, digits),
    }
}
