//! What a cluster engine says of this process: which worker it is, and of how many. A pure function of the environment.
//!
//! It refuses to guess: what an engine leaves unsaid, what two engines say differently, and what does not fit together are errors
//! that name the variables. The one idea: a variable with the index of a process identifies its engine; the count goes with it.
//!
//! | engine | index | count |
//! |---|---|---|
//! | Slurm array | `SLURM_ARRAY_TASK_ID`, less `_MIN`, by `_STEP` | `SLURM_ARRAY_TASK_COUNT` |
//! | Kubernetes Indexed Job | `JOB_COMPLETION_INDEX` | `JOB_COMPLETIONS`, which the Job's author sets, or `auto/N` |
//! | torchrun | `RANK` | `WORLD_SIZE` |
//! | SkyPilot | `SKYPILOT_NODE_RANK` | `SKYPILOT_NUM_NODES` |

use crate::exit::UsageError;
use potstill_pipeline::precompute::Worker;
use std::ffi::OsString;

/// The worker setting that asks for what the engine says.
const AUTO: &str = "auto";
/// Engine, variable with the index, variable with the count; Slurm, whose arrays may begin anywhere, is read by [`Sight::of_array`].
const RANKED: [(&str, &str, &str); 3] = [
    ("Kubernetes Indexed Job", "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
    ("torchrun", "RANK", "WORLD_SIZE"),
    ("SkyPilot", "SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES"),
];
const ARRAY: &str = "Slurm array";
const ARRAY_ID: &str = "SLURM_ARRAY_TASK_ID";
const ARRAY_COUNT: &str = "SLURM_ARRAY_TASK_COUNT";
const ARRAY_MIN: &str = "SLURM_ARRAY_TASK_MIN";
const ARRAY_MAX: &str = "SLURM_ARRAY_TASK_MAX";
const ARRAY_STEP: &str = "SLURM_ARRAY_TASK_STEP";

/// What an engine says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// The worker that this process is.
    pub worker: Worker,
    /// The variables that say so, with their values.
    pub by: String,
}

/// A value of the setting `worker`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// `I/N`: this worker.
    Named(Worker),
    /// `auto`: the engine's, and `auto/N`: the engine's, of N.
    Auto(Option<u32>),
}

impl Wish {
    /// Reads `I/N`, `auto` or `auto/N`.
    pub fn of(text: &str) -> Option<Self> {
        match text.strip_prefix(AUTO) {
            None => text.parse().ok().map(Wish::Named),
            Some("") => Some(Wish::Auto(None)),
            Some(rest) => rest.strip_prefix('/').and_then(whole).filter(|&of| of > 0).map(|of| Wish::Auto(Some(of))),
        }
    }
}

/// The worker that the engine says this process is, of `stated` workers where that is given.
///
/// Errors: no engine, half of what is needed, or a contradiction.
pub fn worker(stated: Option<u32>, variable: &dyn Fn(&str) -> Option<OsString>) -> Result<Said, UsageError> {
    let sight = Sight { stated, variable };
    let mut found: Vec<Said> = sight.of_array()?.into_iter().collect();
    for ranked in RANKED {
        found.extend(sight.of_ranked(ranked)?);
    }
    let mut found = found.into_iter();
    let Some(mut said) = found.next() else { return sight.wrong(&nobody()) };
    for other in found {
        if other.worker != said.worker {
            let [a, b] = [&said, &other].map(|said| format!("{} means worker {}", said.by, said.worker));
            return sight.wrong(&format!("{a}, but {b}; give --worker I/N"));
        }
        said.by = format!("{}, {}", said.by, other.by);
    }
    Ok(said)
}

fn nobody() -> String {
    let ranked = RANKED.map(|(engine, index, _)| format!("{index} ({engine})")).join(", ");
    format!("no engine says which worker this is; looked for {ARRAY_ID} ({ARRAY}), {ranked}; give --worker I/N")
}

/// What can be seen from here.
struct Sight<'a> {
    stated: Option<u32>,
    variable: &'a dyn Fn(&str) -> Option<OsString>,
}

impl Sight<'_> {
    fn wrong<T>(&self, what: &str) -> Result<T, UsageError> {
        Err(UsageError(format!("worker = {}: {what}", self.wish())))
    }

    fn wish(&self) -> String {
        self.stated.map_or(AUTO.into(), |of| format!("{AUTO}/{of}"))
    }

    /// A variable's whole number, if it is set.
    fn number(&self, name: &str) -> Result<Option<u32>, UsageError> {
        let Some(text) = (self.variable)(name) else { return Ok(None) };
        match text.to_str().and_then(whole) {
            Some(number) => Ok(Some(number)),
            None => self.wrong(&format!("{name} = {text:?}: expected a whole number")),
        }
    }

    fn of_ranked(&self, (engine, index_name, count_name): (&str, &str, &str)) -> Result<Option<Said>, UsageError> {
        let Some(index) = self.number(index_name)? else { return Ok(None) };
        let count = self.number(count_name)?;
        let of = match (count, self.stated) {
            (Some(count), Some(stated)) if count != stated => {
                return self.wrong(&format!("{count_name} = {count}, but {} says {stated}", self.wish()));
            }
            (None, None) => {
                let advice = format!("set {count_name}, or give --worker auto/N");
                return self.wrong(&format!("{index_name} = {index} ({engine}), but not of how many; {advice}"));
            }
            (count, stated) => count.or(stated).unwrap_or(0),
        };
        let by = std::iter::once(format!("{index_name}={index}")).chain(count.map(|n| format!("{count_name}={n}")));
        self.said(index_name, index, index, of, by.collect::<Vec<_>>().join(", "))
    }

    /// A task of an array. `auto` takes the array's tasks as the workers: its first id is worker 0, its count the number of workers.
    /// `auto/N` takes ids as workers of N, so that an array of only some tasks can be submitted again.
    fn of_array(&self) -> Result<Option<Said>, UsageError> {
        let Some(id) = self.number(ARRAY_ID)? else { return Ok(None) };
        let [count, min, max, step] = [ARRAY_COUNT, ARRAY_MIN, ARRAY_MAX, ARRAY_STEP].map(|name| self.number(name));
        let (count, min, max, step) = (count?, min?, max?, step?);
        if let Some(of) = self.stated {
            if count == Some(of) && (min.is_some_and(|min| min != 0) || max.is_some_and(|max| max != of - 1)) {
                let range = format!("{ARRAY_MIN} = {} and {ARRAY_MAX} = {}", shown(min), shown(max));
                return self.wrong(&format!("{range}: expected the array 0-{}, whose ids are the workers", of - 1));
            }
            return self.said(ARRAY_ID, id, id, of, format!("{ARRAY_ID}={id}"));
        }
        let (Some(count), Some(min), Some(max), Some(step)) = (count, min, max, step) else {
            let needed = [(ARRAY_COUNT, count), (ARRAY_MIN, min), (ARRAY_MAX, max), (ARRAY_STEP, step)];
            let absent: Vec<&str> = needed.iter().filter(|(_, value)| value.is_none()).map(|(name, _)| *name).collect();
            return self.wrong(&format!("{ARRAY_ID} = {id} ({ARRAY}), but {} not set", absent.join(", ")));
        };
        let by = format!("{ARRAY_ID}={id}, {ARRAY_COUNT}={count}, {ARRAY_MIN}={min}, {ARRAY_STEP}={step}");
        let last = u64::from(min) + u64::from(count.saturating_sub(1)) * u64::from(step);
        let within = id.checked_sub(min).filter(|_| id <= max && step > 0);
        match within {
            Some(offset) if last == u64::from(max) && offset.is_multiple_of(step) => {
                self.said(ARRAY_ID, id, offset / step, count, by)
            }
            _ => {
                let advice = "submit such an array with --worker auto/N, whose workers are the ids";
                self.wrong(&format!("{by}, {ARRAY_MAX}={max} are no evenly spaced array; {advice}"))
            }
        }
    }

    fn said(&self, name: &str, value: u32, index: u32, of: u32, by: String) -> Result<Option<Said>, UsageError> {
        if index >= of {
            return self.wrong(&format!("{name} = {value}: expected a worker from 0 to below {of}"));
        }
        Ok(Some(Said { worker: Worker { index, of }, by }))
    }
}

/// A whole number, digits alone.
fn whole(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

fn shown(number: Option<u32>) -> String {
    number.map_or("nothing".into(), |number| number.to_string())
}

#[cfg(test)]
#[path = "cluster_tests.rs"]
mod tests;
