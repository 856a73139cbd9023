//! Every setting of every verb with the values it may have: one table a verb.
//!
//! The one idea: a value is checked against its rule where it comes from (file, environment, flag), so that a sentence can
//! name the place, the key, what was found and what is allowed.

use crate::cluster::Wish;
use potstill_pipeline::adapter::{ALL_MODULES, MODULES};
use toml::Value;

/// The settings of one verb; in a config file, the table of this name.
#[derive(Debug, Clone, Copy)]
pub struct Section {
    /// The verb.
    pub name: &'static str,
    /// Its settings.
    pub settings: &'static [Setting],
}

/// One setting.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Its name in a config file; the flag has hyphens instead of underscores.
    pub key: &'static str,
    /// The values it may have.
    pub rule: Rule,
}

/// The values a setting may have.
#[derive(Debug, Clone, Copy)]
pub enum Rule {
    /// A path.
    Path,
    /// A path that may be left out.
    PathOr,
    /// Paths or globs, at least one.
    Paths,
    /// The same, which may be left out where another setting is given instead.
    PathsOr,
    /// A whole number between both ends, ends included.
    Whole(i64, i64),
    /// A finite number ≥ 0.
    NotNegative,
    /// A finite number > 0.
    Positive,
    /// A number in [0, 1).
    Decay,
    /// A number in (0, 1).
    Share,
    /// A number in [0, 1].
    Ratio,
    /// Finite numbers > 0, perhaps none; as text separated by commas.
    Positives,
    /// `all`, or modules that an adapter may stand on; as text separated by commas.
    Modules,
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// true or false.
    Switch,
    /// `auto`, `cpu`, `cuda` or `cuda:N`.
    Device,
    /// `latest`, `never` or a checkpoint folder.
    Resume,
    /// A part `N/T`, N from 1 to T.
    PartOf,
    /// A worker `I/N`, I from 0 to N - 1, or the engine's: `auto`, `auto/N`.
    Worker,
}

/// Names of the tables a config file may hold.
pub const SECTIONS: [&Section; 3] = [&PRECOMPUTE, &TRAIN, &MERGE];

/// Most tokens of a row or a pack; far above any context window, far below what overflows.
const MOST_TOKENS: i64 = 1 << 24;

/// Names of the divergences of `train`.
const DIVERGENCES: &[&str] = &["forward-kl", "reverse-kl", "jsd", "skewed-kl", "skewed-reverse-kl", "total-variation"];

/// `potstill precompute`.
pub const PRECOMPUTE: Section = Section {
    name: "precompute",
    settings: &[
        Setting { key: "teacher", rule: Rule::Path },
        Setting { key: "data", rule: Rule::Paths },
        Setting { key: "cache", rule: Rule::Path },
        Setting { key: "preset", rule: Rule::OneOf(&["exact", "standard", "compact", "small", "sampled"]) },
        Setting { key: "selection", rule: Rule::OneOf(&["top-k", "cutoff", "sampled", "hybrid"]) },
        Setting { key: "top_k", rule: Rule::Whole(1, u16::MAX as i64) },
        Setting { key: "min_prob", rule: Rule::Share },
        Setting { key: "min_mass", rule: Rule::Share },
        Setting { key: "draws", rule: Rule::Whole(1, u16::MAX as i64) },
        Setting { key: "sample_seed", rule: Rule::Whole(0, i64::MAX) },
        Setting { key: "values", rule: Rule::OneOf(&["logprob", "logit-bf16"]) },
        Setting { key: "mantissa_bits", rule: Rule::Whole(1, 23) },
        Setting { key: "zstd_level", rule: Rule::Whole(1, 22) },
        Setting { key: "compat", rule: Rule::Switch },
        Setting { key: "lse_temperatures", rule: Rule::Positives },
        Setting { key: "max_length", rule: Rule::Whole(2, MOST_TOKENS) },
        Setting { key: "truncate", rule: Rule::OneOf(&["turns", "right"]) },
        Setting { key: "on_bad_roles", rule: Rule::OneOf(&["skip", "error"]) },
        Setting { key: "device", rule: Rule::Device },
        Setting { key: "compute", rule: Rule::OneOf(&["f32", "bf16"]) },
        Setting { key: "residency", rule: Rule::OneOf(&["resident", "streamed"]) },
        Setting { key: "pack_tokens", rule: Rule::Whole(1, MOST_TOKENS) },
        Setting { key: "block_tokens", rule: Rule::Whole(1, MOST_TOKENS) },
        Setting { key: "head_chunk", rule: Rule::Whole(1, MOST_TOKENS) },
        Setting { key: "rows_per_shard", rule: Rule::Whole(1, 1 << 20) },
        Setting { key: "seal_minutes", rule: Rule::NotNegative },
        Setting { key: "max_bad", rule: Rule::Decay },
        Setting { key: "part", rule: Rule::PartOf },
        Setting { key: "worker", rule: Rule::Worker },
    ],
};

/// `potstill train`.
pub const TRAIN: Section = Section {
    name: "train",
    settings: &[
        Setting { key: "student", rule: Rule::Path },
        Setting { key: "cache", rule: Rule::PathOr },
        Setting { key: "data", rule: Rule::PathsOr },
        Setting { key: "max_length", rule: Rule::Whole(2, MOST_TOKENS) },
        Setting { key: "truncate", rule: Rule::OneOf(&["turns", "right"]) },
        Setting { key: "on_bad_roles", rule: Rule::OneOf(&["skip", "error"]) },
        Setting { key: "out", rule: Rule::Path },
        Setting { key: "objective", rule: Rule::OneOf(&["sft", "distill", "distill+sft"]) },
        Setting { key: "kd_alpha", rule: Rule::NotNegative },
        Setting { key: "kd_ce_alpha", rule: Rule::NotNegative },
        Setting { key: "temperature", rule: Rule::Positive },
        Setting { key: "divergence", rule: Rule::OneOf(DIVERGENCES) },
        Setting { key: "beta", rule: Rule::Share },
        Setting { key: "skew", rule: Rule::Share },
        Setting { key: "tail", rule: Rule::OneOf(&["auto", "bucket", "ghost", "renorm", "studentfull", "none"]) },
        Setting { key: "max_unknown_mass", rule: Rule::Ratio },
        Setting { key: "kd_alpha_end", rule: Rule::NotNegative },
        Setting { key: "kd_ce_alpha_end", rule: Rule::NotNegative },
        Setting { key: "temperature_end", rule: Rule::Positive },
        Setting { key: "loss_schedule", rule: Rule::OneOf(&["constant", "linear", "cosine"]) },
        Setting { key: "top_k", rule: Rule::Whole(1, u16::MAX as i64) },
        Setting { key: "min_prob", rule: Rule::Share },
        Setting { key: "min_mass", rule: Rule::Share },
        Setting { key: "steps", rule: Rule::Whole(1, 1 << 40) },
        Setting { key: "epochs", rule: Rule::Positive },
        Setting { key: "batch_size", rule: Rule::Whole(1, 1 << 20) },
        Setting { key: "pack_tokens", rule: Rule::Whole(1, MOST_TOKENS) },
        Setting { key: "head_chunk", rule: Rule::Whole(1, MOST_TOKENS) },
        Setting { key: "keep_layers", rule: Rule::Whole(0, 1 << 20) },
        Setting { key: "compute", rule: Rule::OneOf(&["f32", "bf16"]) },
        Setting { key: "lr", rule: Rule::Positive },
        Setting { key: "schedule", rule: Rule::OneOf(&["constant", "cosine", "linear", "wsd"]) },
        Setting { key: "warmup_steps", rule: Rule::Whole(0, 1 << 40) },
        Setting { key: "decay_steps", rule: Rule::Whole(1, 1 << 40) },
        Setting { key: "min_lr_ratio", rule: Rule::Decay },
        Setting { key: "optimizer", rule: Rule::OneOf(&["adamw", "adamw-8bit"]) },
        Setting { key: "rank", rule: Rule::Whole(1, 1024) },
        Setting { key: "alpha", rule: Rule::Positive },
        Setting { key: "rslora", rule: Rule::Switch },
        Setting { key: "target_modules", rule: Rule::Modules },
        Setting { key: "dropout", rule: Rule::Decay },
        Setting { key: "weight_decay", rule: Rule::NotNegative },
        Setting { key: "beta1", rule: Rule::Decay },
        Setting { key: "beta2", rule: Rule::Decay },
        Setting { key: "eps", rule: Rule::Positive },
        Setting { key: "max_grad_norm", rule: Rule::NotNegative },
        Setting { key: "seed", rule: Rule::Whole(0, i64::MAX) },
        Setting { key: "shuffle", rule: Rule::Switch },
        Setting { key: "eval_rows", rule: Rule::Whole(0, u32::MAX as i64) },
        Setting { key: "eval_cache", rule: Rule::PathOr },
        Setting { key: "eval_every", rule: Rule::Whole(1, 1 << 40) },
        Setting { key: "patience", rule: Rule::Whole(0, u32::MAX as i64) },
        Setting { key: "probe_cache", rule: Rule::PathOr },
        Setting { key: "tensorboard", rule: Rule::Switch },
        Setting { key: "checkpoint_every", rule: Rule::Whole(0, 1 << 40) },
        Setting { key: "keep_checkpoints", rule: Rule::Whole(2, 1 << 20) },
        Setting { key: "resume", rule: Rule::Resume },
        Setting { key: "device", rule: Rule::Device },
        Setting { key: "dist_backend", rule: Rule::OneOf(&["tcp", "nccl"]) },
    ],
};

/// `potstill merge`.
pub const MERGE: Section = Section {
    name: "merge",
    settings: &[
        Setting { key: "student", rule: Rule::Path },
        Setting { key: "adapter", rule: Rule::Path },
        Setting { key: "out", rule: Rule::Path },
        Setting { key: "weights", rule: Rule::OneOf(&["original", "nf4"]) },
        Setting { key: "dtype", rule: Rule::OneOf(&["auto", "f32", "bf16", "f16"]) },
    ],
};

impl Section {
    /// The setting called `key`.
    pub fn find(&self, key: &str) -> Option<&Setting> {
        self.settings.iter().find(|setting| setting.key == key)
    }

    /// The setting whose name is nearest to `wrong`, if any is near.
    pub fn nearest(&self, wrong: &str) -> Option<&'static str> {
        nearest(wrong, self.settings.iter().map(|setting| setting.key))
    }
}

/// The name nearest to `wrong` by edit distance, if about a third of it, or one letter, differs.
pub fn nearest(wrong: &str, names: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    let wrong = wrong.to_lowercase().replace('-', "_");
    let limit = ((wrong.chars().count() + 1) / 3).max(1);
    names.map(|name| (distance(&wrong, name), name)).filter(|&(far, _)| far <= limit).min().map(|(_, name)| name)
}

/// Levenshtein's distance in characters, row by row.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, cb) in row.iter_mut().skip(1).zip(&b) {
            let above = *cell;
            left = (diagonal + usize::from(ca != *cb)).min(above + 1).min(left + 1);
            diagonal = above;
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

impl Rule {
    /// What is allowed, as the end of "expected …".
    pub fn expected(&self) -> String {
        match self {
            Rule::Path | Rule::PathOr => "a path".into(),
            Rule::Paths | Rule::PathsOr => "one path or glob, or a list of them".into(),
            Rule::Whole(low, high) => format!("a whole number from {low} to {high}"),
            Rule::NotNegative => "a finite number, 0 or above".into(),
            Rule::Positive => "a finite number above 0".into(),
            Rule::Decay => "a number from 0 to below 1".into(),
            Rule::Share => "a number above 0 and below 1".into(),
            Rule::Ratio => "a number from 0 to 1".into(),
            Rule::Positives => "a list of finite numbers above 0".into(),
            Rule::Modules => format!("{ALL_MODULES}, or some of {}", MODULES.join(", ")),
            Rule::OneOf(words) => words.join(", ").replacen(", ", " or ", usize::from(words.len() == 2)),
            Rule::Switch => "true or false".into(),
            Rule::Device => "auto, cpu, cuda or cuda:N".into(),
            Rule::Resume => "latest, never or a checkpoint folder".into(),
            Rule::PartOf => "N/T with N from 1 to T".into(),
            Rule::Worker => "I/N with I from 0 to N - 1, auto, or auto/N".into(),
        }
    }

    /// Whether `value` is allowed.
    pub fn holds(&self, value: &Value) -> bool {
        let text = |allowed: &dyn Fn(&str) -> bool| value.as_str().is_some_and(|s| !s.is_empty() && allowed(s));
        let real = |allowed: &dyn Fn(f64) -> bool| number(value).is_some_and(|x| x.is_finite() && allowed(x));
        match self {
            Rule::Path | Rule::PathOr => text(&|_| true),
            Rule::Resume => match value {
                Value::Table(table) => table.len() == 1 && table.get("path").is_some_and(|path| Rule::Path.holds(path)),
                word => matches!(word.as_str(), Some("latest" | "never")),
            },
            Rule::Paths | Rule::PathsOr => {
                value.as_array().is_some_and(|list| !list.is_empty() && list.iter().all(|v| Rule::Path.holds(v)))
            }
            Rule::Whole(low, high) => value.as_integer().is_some_and(|n| (*low..=*high).contains(&n)),
            Rule::NotNegative => real(&|x| x >= 0.0),
            Rule::Positive => real(&|x| x > 0.0),
            Rule::Decay => real(&|x| (0.0..1.0).contains(&x)),
            Rule::Share => real(&|x| x > 0.0 && x < 1.0),
            Rule::Ratio => real(&|x| (0.0..=1.0).contains(&x)),
            Rule::Positives => value.as_array().is_some_and(|list| list.iter().all(|v| Rule::Positive.holds(v))),
            Rule::Modules => match value {
                Value::Array(list) => !list.is_empty() && list.iter().all(|v| v.as_str().is_some_and(|s| MODULES.contains(&s))),
                word => word.as_str() == Some(ALL_MODULES),
            },
            Rule::OneOf(words) => text(&|s| words.contains(&s)),
            Rule::Switch => value.is_bool(),
            Rule::PartOf => text(&|s| s.parse::<potstill_pipeline::precompute::Share>().is_ok()),
            Rule::Worker => text(&|s| Wish::of(s).is_some()),
            Rule::Device => text(&|s| {
                matches!(s, "auto" | "cpu" | "cuda") || s.strip_prefix("cuda:").is_some_and(|n| n.parse::<u16>().is_ok())
            }),
        }
    }

    /// The word that a refused value probably means.
    pub fn nearest(&self, value: &Value) -> Option<&'static str> {
        let Rule::Modules = self else { return None };
        let names = value.as_array().into_iter().flatten().chain([value]).filter_map(Value::as_str);
        let wrong = names.into_iter().find(|name| !MODULES.contains(name))?;
        nearest(wrong, MODULES.into_iter().chain([ALL_MODULES]))
    }

    /// Reads the text of an environment variable. What cannot be read stays text, which [`holds`](Self::holds) then refuses.
    pub fn read(&self, text: &str) -> Value {
        let trimmed = text.trim();
        let parsed = match self {
            Rule::Whole(..) => trimmed.parse().ok().map(Value::Integer),
            Rule::NotNegative | Rule::Positive | Rule::Decay | Rule::Share | Rule::Ratio => {
                trimmed.parse().ok().map(Value::Float)
            }
            Rule::Positives => {
                let numbers = trimmed.trim_matches(['[', ']']).split(',').map(|n| n.trim().parse().map(Value::Float));
                numbers.collect::<Result<_, _>>().ok().map(Value::Array)
            }
            Rule::Switch => trimmed.parse().ok().map(Value::Boolean),
            Rule::Paths | Rule::PathsOr if trimmed.starts_with('[') => {
                format!("list = {trimmed}").parse::<toml::Table>().ok().and_then(|mut table| table.remove("list"))
            }
            _ => None,
        };
        self.shape(parsed.unwrap_or_else(|| Value::String(text.to_string())))
    }

    /// A value in the shape the settings are kept in: one path becomes a list of one, a whole
    /// number where a real one is wanted a real one, a checkpoint folder `{ path = … }`.
    pub fn shape(&self, value: Value) -> Value {
        match (self, value) {
            (Rule::Paths | Rule::PathsOr, Value::String(one)) => Value::Array(vec![Value::String(one)]),
            (Rule::NotNegative | Rule::Positive | Rule::Decay | Rule::Share | Rule::Ratio, Value::Integer(n)) => {
                Value::Float(n as f64)
            }
            (Rule::Positives, Value::Array(list)) => Value::Array(list.into_iter().map(|v| Rule::Positive.shape(v)).collect()),
            (Rule::Positives, one @ (Value::Integer(_) | Value::Float(_))) => Value::Array(vec![Rule::Positive.shape(one)]),
            (Rule::Modules, Value::String(text)) if text != ALL_MODULES => {
                Value::Array(text.split(',').map(|name| Value::String(name.trim().into())).collect())
            }
            (Rule::Modules, Value::Array(list)) if matches!(&list[..], [all] if all.as_str() == Some(ALL_MODULES)) => {
                Value::String(ALL_MODULES.into())
            }
            (Rule::Resume, Value::String(path)) if !matches!(path.as_str(), "latest" | "never") => {
                Value::Table(toml::Table::from_iter([("path".to_string(), Value::String(path))]))
            }
            (_, value) => value,
        }
    }
}

fn number(value: &Value) -> Option<f64> {
    value.as_float().or_else(|| value.as_integer().map(|n| n as f64))
}

#[cfg(test)]
#[path = "settings_tests.rs"]
mod tests;
