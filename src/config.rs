//! Settings from four places, later ones winning: defaults, a TOML file, the environment, flags.
//!
//! Owns the layering and the sentences about what is wrong with it; [`crate::settings`] owns what is allowed. Everything is
//! resolved once and checked once, before anything is read or written. A key nobody knows is an error: a misspelt
//! `temprature` that is silently ignored ruins a run.

use crate::exit::UsageError;
use crate::settings::{self, Rule, SECTIONS, Section};
use potstill_pipeline::device;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Variables begin with this: `POTSTILL_TRAIN__LR=1e-4` sets `lr` of `[train]`.
const PREFIX: &str = "POTSTILL_";
/// Largest config file read, in bytes.
const LARGEST_FILE: u64 = 1 << 20;

/// Where settings come from, besides the defaults.
pub struct Sources {
    /// `--config`.
    pub file: Option<PathBuf>,
    /// The environment.
    pub variables: Vec<(OsString, OsString)>,
    /// The flags given, by setting name.
    pub flags: Table,
}

impl Sources {
    /// The process's environment, `--config` and the flags given (absent ones are `None`).
    pub fn of_process(file: Option<PathBuf>, flags: &impl Serialize) -> Result<Self, UsageError> {
        let flags = Table::try_from(flags).map_err(|e| UsageError(format!("a flag cannot be kept as text: {}", one_line(&e))))?;
        Ok(Self { file, variables: std::env::vars_os().collect(), flags })
    }
}

/// Which place a setting came from.
enum Origin<'a> {
    File(&'a Path),
    Variable,
    Flag,
}

impl Origin<'_> {
    /// How a person finds `key` of `section` there.
    fn place(&self, section: &Section, key: &str) -> String {
        match self {
            Origin::File(path) => format!("{}: {}.{key}", path.display(), section.name),
            Origin::Variable => variable(section, key),
            Origin::Flag => flag(key),
        }
    }
}

/// The settings of `section`: defaults < file < environment < flags, each value checked where it comes from.
///
/// Errors: an unreadable file, an unknown table, key or variable, a value that is not allowed, a required path that is
/// nowhere given.
pub fn resolve<T>(section: &Section, sources: &Sources) -> Result<T, UsageError>
where
    T: DeserializeOwned + Serialize + Default,
{
    let all: Vec<&str> = section.settings.iter().map(|setting| setting.key).collect();
    typed(section, layered_needing::<T>(section, sources, &all)?)
}

/// As [`resolve`], for a look at a job that needs fewer of its paths: only those of `needed`; the others may be empty.
pub fn resolve_needing<T>(section: &Section, sources: &Sources, needed: &[&str]) -> Result<T, UsageError>
where
    T: DeserializeOwned + Serialize + Default,
{
    typed(section, layered_needing::<T>(section, sources, needed)?)
}

/// As [`resolve_needing`], for a verb that has to settle some values before they are typed.
pub fn layered_needing<T>(section: &Section, sources: &Sources, needed: &[&str]) -> Result<Table, UsageError>
where
    T: Serialize + Default,
{
    let table = laid::<T>(section, sources)?;
    check_given(section, &table, |key| needed.contains(&key))?;
    Ok(table)
}

/// The layers, one over the other.
fn laid<T: Serialize + Default>(section: &Section, sources: &Sources) -> Result<Table, UsageError> {
    let mut table = table_of(&T::default())?;
    if let Some(path) = &sources.file {
        layer(&mut table, section, &Origin::File(path), from_file(section, path)?)?;
    }
    layer(&mut table, section, &Origin::Variable, from_variables(section, &sources.variables)?)?;
    layer(&mut table, section, &Origin::Flag, sources.flags.clone())?;
    Ok(table)
}

/// Errors: a needed path that no layer gives.
fn check_given(section: &Section, table: &Table, needed: impl Fn(&str) -> bool) -> Result<(), UsageError> {
    for setting in section.settings.iter().filter(|setting| needed(setting.key)) {
        if matches!(setting.rule, Rule::Path | Rule::Paths) && !table.get(setting.key).is_some_and(|v| setting.rule.holds(v)) {
            return Err(UsageError(format!(
                "{key} is not given: use {}, or {key} in the table [{}] of a --config file, or {}",
                flag(setting.key),
                section.name,
                variable(section, setting.key),
                key = setting.key,
            )));
        }
    }
    Ok(())
}

/// The settings of `section` in a recipe's text over the defaults, checked like a file's. `name` says where the text is from.
pub fn recipe<T>(section: &Section, name: &str, text: &str) -> Result<T, UsageError>
where
    T: DeserializeOwned + Serialize + Default,
{
    let mut table = table_of(&T::default())?;
    let path = Path::new(name);
    layer(&mut table, section, &Origin::File(path), from_text(section, path, text)?)?;
    typed(section, table)
}

/// Settled settings as what they are.
pub fn typed<T: DeserializeOwned>(section: &Section, table: Table) -> Result<T, UsageError> {
    table.try_into().map_err(|e| UsageError(format!("settings of {}: {}", section.name, one_line(&e))))
}

/// Resolved settings as TOML text, the form they are echoed in and can be read back from.
pub fn to_toml(section: &Section, settings: &impl Serialize) -> Result<String, UsageError> {
    let mut whole = Table::new();
    whole.insert(section.name.into(), Value::Table(table_of(settings)?));
    toml::to_string(&whole).map_err(|e| UsageError(format!("settings of {}: {}", section.name, one_line(&e))))
}

fn table_of(settings: &impl Serialize) -> Result<Table, UsageError> {
    Table::try_from(settings).map_err(|e| UsageError(format!("a setting cannot be kept as text: {}", one_line(&e))))
}

/// Lays `above` over `table`, checking each value.
fn layer(table: &mut Table, section: &Section, origin: &Origin, above: Table) -> Result<(), UsageError> {
    for (key, found) in above {
        let Some(setting) = section.find(&key) else {
            return Err(unknown(&origin.place(section, &key), section.nearest(&key), section.settings.iter().map(|s| s.key)));
        };
        let value = setting.rule.shape(found.clone());
        if !setting.rule.holds(&value) {
            let place = origin.place(section, &key);
            let near = setting.rule.nearest(&value).map(|near| format!("; did you mean {near}?")).unwrap_or_default();
            return Err(UsageError(format!("{place} = {found}: expected {}{near}", setting.rule.expected())));
        }
        table.insert(key, value);
    }
    Ok(())
}

/// The table of `section` in the file; every other table must at least be known, so that no misspelling hides in it.
fn from_file(section: &Section, path: &Path) -> Result<Table, UsageError> {
    let shown = path.display();
    let fault = |e: std::io::Error| UsageError(format!("{shown}: {e}"));
    let bytes = std::fs::metadata(path).map_err(fault)?.len();
    if bytes > LARGEST_FILE {
        return Err(UsageError(format!("{shown}: {bytes} bytes: expected a config file of at most {LARGEST_FILE}")));
    }
    from_text(section, path, &std::fs::read_to_string(path).map_err(fault)?)
}

/// The table of `section` in the text of the file `path`.
fn from_text(section: &Section, path: &Path, text: &str) -> Result<Table, UsageError> {
    let shown = path.display();
    let whole: Table = toml::from_str(text).map_err(|e| {
        let line = e.span().map_or(1, |span| 1 + text.bytes().take(span.start).filter(|b| *b == b'\n').count());
        UsageError(format!("{shown}: line {line}: {}", one_line(&e.message())))
    })?;
    let mut ours = Table::new();
    for (name, content) in whole {
        let Some(known) = SECTIONS.iter().find(|s| s.name == name) else {
            let names = || SECTIONS.iter().map(|s| s.name);
            return Err(unknown(&format!("{shown}: {name}"), settings::nearest(&name, names()), names()));
        };
        let Value::Table(content) = content else {
            return Err(UsageError(format!("{shown}: {name}: expected a table [{name}], found {}", content.type_str())));
        };
        if let Some(key) = content.keys().find(|key| known.find(key).is_none()) {
            let place = Origin::File(path).place(known, key);
            return Err(unknown(&place, known.nearest(key), known.settings.iter().map(|s| s.key)));
        }
        if known.name == section.name {
            ours = content;
        }
    }
    Ok(ours)
}

/// The settings of `section` in variables such as `POTSTILL_TRAIN__LR`. One that begins like ours and names no setting is an error.
fn from_variables(section: &Section, variables: &[(OsString, OsString)]) -> Result<Table, UsageError> {
    let mut ours = Table::new();
    for (name, text) in variables {
        // No settings: they change no result.
        if [device::CUDA_LIBRARIES, device::CUDA_PROFILE].iter().any(|known| name == known) {
            continue;
        }
        let Some(rest) = name.to_str().and_then(|n| n.strip_prefix(PREFIX)) else { continue };
        let Some((table, key)) = rest.split_once("__") else {
            let name = name.to_string_lossy();
            return Err(UsageError(format!(
                "{name}: expected {PREFIX}VERB__SETTING, with two underscores between verb and setting"
            )));
        };
        let (table, key) = (table.to_lowercase(), key.to_lowercase());
        let shown = name.to_string_lossy();
        let Some(known) = SECTIONS.iter().find(|s| s.name == table) else {
            let names = || SECTIONS.iter().map(|s| s.name);
            return Err(unknown(&shown, settings::nearest(&table, names()), names()));
        };
        let Some(setting) = known.find(&key) else {
            return Err(unknown(&shown, known.nearest(&key), known.settings.iter().map(|s| s.key)));
        };
        let text = text.to_str().ok_or_else(|| UsageError(format!("{shown}: the value is not valid UTF-8")))?;
        if known.name == section.name {
            ours.insert(key, setting.rule.read(text));
        }
    }
    Ok(ours)
}

/// The sentence about a name nobody knows, with the nearest name when there is one, else with all of them.
fn unknown(place: &str, near: Option<&str>, all: impl Iterator<Item = &'static str>) -> UsageError {
    let hint = near.map_or_else(|| format!("known are {}", all.collect::<Vec<_>>().join(", ")), |n| format!("did you mean {n}?"));
    UsageError(format!("{place}: unknown setting; {hint}"))
}

fn variable(section: &Section, key: &str) -> String {
    format!("{PREFIX}{}__{}", section.name.to_uppercase(), key.to_uppercase())
}

fn flag(key: &str) -> String {
    format!("--{}", key.replace('_', "-"))
}

fn one_line(message: &impl ToString) -> String {
    message.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
