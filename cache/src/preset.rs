//! How a cache stores what the teacher said: selection, values and compression, as named presets with every knob settable.
//!
//! ```text
//! preset    selection              values                         zstd   for
//! exact     top-k 64               bf16 logits and log-sum-exp      12   nothing lost against a bf16 head
//! standard  top-k 64               log-probabilities, 7 bits         3   the default: far below the teacher's own rounding
//! compact   cutoff 64 p>=1e-5      log-probabilities, 5 bits        12   half the bytes at the same kept mass
//! small     cutoff 64 mass>=0.999  log-probabilities, 4 bits        12   the smallest with exact heads
//! sampled   50 draws               counts                           12   unbiased, a tenth of the bytes
//! ```

use crate::{Cutoff, Error, Result, Selection};
use serde::{Deserialize, Serialize};

/// Default number of kept entries, k.
pub const DEFAULT_TOP_K: u16 = 64;
/// Default probability from which preset `compact` and selection `cutoff` keep.
pub const DEFAULT_MIN_PROB: f32 = 1e-5;
/// Default mass that preset `small` keeps.
pub const DEFAULT_MIN_MASS: f32 = 0.999;
/// Default number of draws.
pub const DEFAULT_DRAWS: u16 = 50;
/// Mantissa bits of a bfloat16, which hold the logits of a bf16 head exactly.
pub const LOGIT_MANTISSA_BITS: u8 = 7;

/// A named way to store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// bf16 logits and their log-sum-exp.
    Exact,
    /// 64 entries with 7 mantissa bits.
    #[default]
    Standard,
    /// Entries of at least 1e-5 with 5 mantissa bits.
    Compact,
    /// As many entries as make up 0.999, with 4 mantissa bits.
    Small,
    /// 50 draws.
    Sampled,
}

/// What the stored numbers of kept entries are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Values {
    /// Log-probabilities, rounded to `mantissa_bits`.
    #[default]
    Logprob,
    /// Logits rounded to bfloat16, as a bf16 head gives them, with the log-sum-exp over the rounded logits.
    LogitBf16,
}

/// How token ids are laid out in a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IdEncoding {
    /// Byte by byte (BYTE_STREAM_SPLIT of 32-bit integers): smallest; DuckDB 2.0, pyarrow, polars 1.43 and later read it.
    #[default]
    ByteStreamSplit,
    /// Value by value (PLAIN): a few per cent larger; every reader of Parquet reads it.
    Plain,
}

/// Which kind of selection; the numbers that go with it are knobs of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SelectionKind {
    /// [`Selection::TopK`].
    TopK,
    /// [`Selection::Cutoff`].
    Cutoff,
    /// [`Selection::Sampled`].
    Sampled,
    /// [`Selection::Hybrid`].
    Hybrid,
}

impl SelectionKind {
    /// The kind's name.
    pub fn name(self) -> &'static str {
        match self {
            SelectionKind::TopK => "top-k",
            SelectionKind::Cutoff => "cutoff",
            SelectionKind::Sampled => "sampled",
            SelectionKind::Hybrid => "hybrid",
        }
    }
}

/// Departures from a preset; `None` leaves the preset's value.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Knobs {
    /// The kind of selection.
    pub selection: Option<SelectionKind>,
    /// Most entries kept exactly.
    pub top_k: Option<u16>,
    /// Keep entries of at least this probability. Makes a top-k selection a cutoff.
    pub min_prob: Option<f32>,
    /// Keep the fewest entries that make up this mass. Makes a top-k selection a cutoff.
    pub min_mass: Option<f32>,
    /// Draws at each position.
    pub draws: Option<u16>,
    /// Seed of the draws.
    pub sample_seed: Option<u64>,
    /// What is stored of kept entries.
    pub values: Option<Values>,
    /// Mantissa bits of log-probabilities and tails, 1 to 23.
    pub mantissa_bits: Option<u8>,
    /// zstd level, 1 to 22.
    pub zstd_level: Option<i32>,
    /// How ids are laid out.
    pub id_encoding: Option<IdEncoding>,
}

/// A complete way to store: what a [`Preset`] and its [`Knobs`] come to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Storage {
    /// What is kept.
    pub selection: Selection,
    /// What the numbers of kept entries are.
    pub values: Values,
    /// Mantissa bits of log-probabilities and tails.
    pub mantissa_bits: u8,
    /// zstd level of the pages.
    pub zstd_level: i32,
    /// How ids are laid out.
    pub id_encoding: IdEncoding,
}

impl Preset {
    /// All presets, most exact first.
    pub const ALL: [Preset; 5] = [Preset::Exact, Preset::Standard, Preset::Compact, Preset::Small, Preset::Sampled];

    /// The preset's name.
    pub fn name(&self) -> &'static str {
        match self {
            Preset::Exact => "exact",
            Preset::Standard => "standard",
            Preset::Compact => "compact",
            Preset::Small => "small",
            Preset::Sampled => "sampled",
        }
    }

    /// The preset as it is.
    pub fn storage(&self) -> Storage {
        let k = DEFAULT_TOP_K;
        let cutoff = |rule| Selection::Cutoff { k, rule };
        let (selection, mantissa_bits, zstd_level) = match self {
            Preset::Exact => (Selection::TopK { k }, LOGIT_MANTISSA_BITS, 12),
            Preset::Standard => (Selection::TopK { k }, 7, 3),
            Preset::Compact => (cutoff(Cutoff::MinProb(DEFAULT_MIN_PROB)), 5, 12),
            Preset::Small => (cutoff(Cutoff::MinMass(DEFAULT_MIN_MASS)), 4, 12),
            Preset::Sampled => (Selection::Sampled { draws: DEFAULT_DRAWS, seed: 0 }, 4, 12),
        };
        let values = if *self == Preset::Exact { Values::LogitBf16 } else { Values::Logprob };
        Storage { selection, values, mantissa_bits, zstd_level, id_encoding: IdEncoding::default() }
    }

    /// The preset with `knobs` turned. Errors: a knob that says nothing about the selection it comes to, two rules of cutoff, logits
    /// where none are kept.
    pub fn with(&self, knobs: &Knobs) -> Result<Storage> {
        self.storage().with(knobs)
    }
}

impl Storage {
    /// This way to store with `knobs` turned. Errors: as [`Preset::with`].
    pub fn with(&self, knobs: &Knobs) -> Result<Storage> {
        let base = self;
        let selection = select(base.selection, knobs)?;
        let values = match knobs.values {
            Some(Values::LogitBf16) if selection.draws().is_some() => {
                return Err(refused("values", "logit-bf16", &format!("logprob, for the selection is {}", selection.kind())));
            }
            values => values.unwrap_or(if selection.draws().is_some() { Values::Logprob } else { base.values }),
        };
        let mantissa_bits = knobs.mantissa_bits.unwrap_or(base.mantissa_bits);
        if values == Values::LogitBf16 && mantissa_bits != LOGIT_MANTISSA_BITS {
            return Err(refused(
                "mantissa_bits",
                mantissa_bits,
                &format!("{LOGIT_MANTISSA_BITS}, for the values are bf16 logits"),
            ));
        }
        Ok(Storage {
            selection,
            values,
            mantissa_bits,
            zstd_level: knobs.zstd_level.unwrap_or(base.zstd_level),
            id_encoding: knobs.id_encoding.unwrap_or(base.id_encoding),
        })
    }
}

/// The selection that a preset's own and the knobs come to.
fn select(base: Selection, knobs: &Knobs) -> Result<Selection> {
    let base_kind = base.which();
    let asked_cutoff = knobs.min_prob.is_some() || knobs.min_mass.is_some();
    let kind = match knobs.selection {
        Some(kind) => kind,
        None if asked_cutoff && base_kind == SelectionKind::TopK => SelectionKind::Cutoff,
        None => base_kind,
    };
    let drawn = matches!(kind, SelectionKind::Sampled | SelectionKind::Hybrid);
    let idle = [
        ("top_k", knobs.top_k.map(|k| k.to_string()), kind != SelectionKind::Sampled),
        ("min_prob", knobs.min_prob.map(|p| p.to_string()), kind == SelectionKind::Cutoff),
        ("min_mass", knobs.min_mass.map(|m| m.to_string()), kind == SelectionKind::Cutoff),
        ("draws", knobs.draws.map(|n| n.to_string()), drawn),
        ("sample_seed", knobs.sample_seed.map(|n| n.to_string()), drawn),
    ];
    if let Some((knob, Some(value), _)) = idle.into_iter().find(|(_, value, fits)| value.is_some() && !fits) {
        return Err(refused(knob, value, &format!("nothing, for the selection is {}", kind.name())));
    }
    let k = knobs.top_k.unwrap_or(if base.head() > 0 { base.head() } else { DEFAULT_TOP_K });
    let base_seed = match base {
        Selection::Sampled { seed, .. } | Selection::Hybrid { seed, .. } => seed,
        _ => 0,
    };
    let (draws, seed) = (knobs.draws.or(base.draws()).unwrap_or(DEFAULT_DRAWS), knobs.sample_seed.unwrap_or(base_seed));
    Ok(match kind {
        SelectionKind::TopK => Selection::TopK { k },
        SelectionKind::Sampled => Selection::Sampled { draws, seed },
        SelectionKind::Hybrid => Selection::Hybrid { k, draws, seed },
        SelectionKind::Cutoff => {
            let rule = match (knobs.min_prob, knobs.min_mass, base) {
                (Some(_), Some(m), _) => return Err(refused("min_mass", m, "either min_prob or min_mass")),
                (Some(p), None, _) => Cutoff::MinProb(p),
                (None, Some(m), _) => Cutoff::MinMass(m),
                (None, None, Selection::Cutoff { rule, .. }) => rule,
                (None, None, _) => Cutoff::MinProb(DEFAULT_MIN_PROB),
            };
            Selection::Cutoff { k, rule }
        }
    })
}

fn refused(name: &'static str, found: impl ToString, expected: &str) -> Error {
    Error::Setting { name, found: found.to_string(), expected: expected.into() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn knobs_turn_a_preset_and_idle_ones_are_refused() {
        let with = |preset: Preset, knobs: Knobs| preset.with(&knobs);
        let none = Knobs::default();
        for preset in Preset::ALL {
            assert_eq!(with(preset, none).unwrap(), preset.storage(), "{}", preset.name());
        }
        let k16 = with(Preset::Compact, Knobs { top_k: Some(16), ..none }).unwrap();
        assert_eq!(k16.selection, Selection::Cutoff { k: 16, rule: Cutoff::MinProb(1e-5) });
        let cut = with(Preset::Standard, Knobs { min_mass: Some(0.9), ..none }).unwrap();
        assert_eq!((cut.selection, cut.mantissa_bits), (Selection::Cutoff { k: 64, rule: Cutoff::MinMass(0.9) }, 7));
        let hybrid = with(Preset::Standard, Knobs { selection: Some(SelectionKind::Hybrid), draws: Some(9), ..none }).unwrap();
        assert_eq!(hybrid.selection, Selection::Hybrid { k: 64, draws: 9, seed: 0 });
        let exact_cut = with(Preset::Exact, Knobs { min_prob: Some(1e-5), ..none }).unwrap();
        assert_eq!(exact_cut.values, Values::LogitBf16);
        let seeded = Storage { selection: Selection::Hybrid { k: 4, draws: 9, seed: 5 }, ..Preset::Standard.storage() };
        assert_eq!(seeded.with(&Knobs { zstd_level: Some(9), ..none }).unwrap(), Storage { zstd_level: 9, ..seeded });
        let sampled = with(Preset::Exact, Knobs { selection: Some(SelectionKind::Sampled), ..none }).unwrap();
        assert_eq!(sampled.values, Values::Logprob);
        for (preset, knobs) in [
            (Preset::Standard, Knobs { draws: Some(3), ..none }),
            (Preset::Sampled, Knobs { top_k: Some(3), ..none }),
            (Preset::Sampled, Knobs { min_prob: Some(0.1), ..none }),
            (Preset::Small, Knobs { min_prob: Some(0.1), min_mass: Some(0.9), ..none }),
            (Preset::Sampled, Knobs { values: Some(Values::LogitBf16), ..none }),
            (Preset::Exact, Knobs { mantissa_bits: Some(5), ..none }),
        ] {
            assert!(matches!(with(preset, knobs), Err(Error::Setting { .. })), "{} {knobs:?}", preset.name());
        }
    }
}
