//! Which entries of a distribution are kept: the closed set of selections, what each keeps of a sorted list, and which can be read
//! from which. It refuses to compute a distribution; it only chooses.

use crate::{Error, Result, SelectionKind};
use serde::{Deserialize, Serialize};

/// Most draws of a sampled selection: counts are 16-bit numbers.
pub const MAX_DRAWS: u16 = u16::MAX;

/// Which entries of a distribution are kept.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Selection {
    /// The `k` most likely tokens; ties go to the smaller id.
    TopK {
        /// Entries kept at each scored position (1 to 65,535).
        k: u16,
    },
    /// The most likely tokens as far as a rule goes, 1 to `k` of them.
    Cutoff {
        /// Most entries kept (1 to 65,535).
        k: u16,
        /// The rule.
        rule: Cutoff,
    },
    /// Random-sampling distillation: `draws` tokens drawn from the teacher's own distribution, with how often each came.
    ///
    /// `count / draws` is an unbiased estimate of every token's probability. The proposal is the distribution itself, so all
    /// importance weights are 1 and the counts say everything.
    Sampled {
        /// Draws at each position (1 to [`MAX_DRAWS`]).
        draws: u16,
        /// Seed of the draws.
        seed: u64,
    },
    /// The `k` most likely tokens exactly, the tail's probability exactly, and `draws` tokens drawn from the tail:
    /// `tail · count / draws` is an unbiased estimate of the probability of a token outside the head.
    Hybrid {
        /// Entries of the head (1 to 65,535).
        k: u16,
        /// Draws from the tail at each position (1 to [`MAX_DRAWS`]).
        draws: u16,
        /// Seed of the draws.
        seed: u64,
    },
}

/// How far a cutoff keeps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Cutoff {
    /// Tokens with at least this probability (above 0, below 1).
    MinProb(f32),
    /// The fewest tokens whose probabilities add up to at least this (above 0, below 1).
    MinMass(f32),
}

impl Cutoff {
    /// How many of the given entries are kept: log-probabilities in nats, falling. At least 1 where there is any.
    pub fn kept(&self, logprobs: &[f32]) -> usize {
        let kept = match self {
            Cutoff::MinProb(p) => {
                let least = f64::from(*p).ln();
                logprobs.partition_point(|&l| f64::from(l) >= least)
            }
            Cutoff::MinMass(mass) => {
                let mut sum = 0.0;
                let below = logprobs.iter().take_while(|&&l| {
                    let open = sum < f64::from(*mass);
                    sum += f64::from(l).exp();
                    open
                });
                below.count()
            }
        };
        kept.max(1).min(logprobs.len())
    }
}

impl Selection {
    /// Most entries that a scored position may keep: of the exact ones, or of the drawn ones where there are only those.
    pub fn max_entries(&self) -> u16 {
        match self {
            Selection::TopK { k } | Selection::Cutoff { k, .. } | Selection::Hybrid { k, .. } => *k,
            Selection::Sampled { draws, .. } => *draws,
        }
    }

    /// Entries whose probabilities are kept exactly, at most; 0 where all is drawn.
    pub fn head(&self) -> u16 {
        match self {
            Selection::Sampled { .. } => 0,
            other => other.max_entries(),
        }
    }

    /// Draws at each position, where there are any.
    pub fn draws(&self) -> Option<u16> {
        match self {
            Selection::Sampled { draws, .. } | Selection::Hybrid { draws, .. } => Some(*draws),
            _ => None,
        }
    }

    /// Which kind of selection it is.
    pub fn which(&self) -> SelectionKind {
        match self {
            Selection::TopK { .. } => SelectionKind::TopK,
            Selection::Cutoff { .. } => SelectionKind::Cutoff,
            Selection::Sampled { .. } => SelectionKind::Sampled,
            Selection::Hybrid { .. } => SelectionKind::Hybrid,
        }
    }

    /// The kind's name.
    pub fn kind(&self) -> &'static str {
        self.which().name()
    }

    /// How many of the given entries (log-probabilities in nats, falling) are kept exactly.
    pub fn kept(&self, logprobs: &[f32]) -> usize {
        let head = logprobs.len().min(usize::from(self.head()));
        match self {
            Selection::Cutoff { rule, .. } => rule.kept(&logprobs[..head]),
            _ => head,
        }
    }

    /// Name of the first number out of its range, what is allowed and what was found.
    pub(crate) fn check(&self, vocab_size: u32) -> std::result::Result<(), (&'static str, String, String)> {
        let most = u64::from(vocab_size.min(u32::from(u16::MAX)));
        let within = |name, value: u16, most: u64| match u64::from(value) {
            v if v >= 1 && v <= most => Ok(()),
            v => Err((name, format!("1 to {most}"), v.to_string())),
        };
        if !matches!(self, Selection::Sampled { .. }) {
            within("selection.k", self.head(), most)?;
        }
        if let Some(draws) = self.draws() {
            within("selection.draws", draws, u64::from(MAX_DRAWS))?;
        }
        let (name, x) = match self {
            Selection::Cutoff { rule: Cutoff::MinProb(p), .. } => ("selection.min_prob", *p),
            Selection::Cutoff { rule: Cutoff::MinMass(mass), .. } => ("selection.min_mass", *mass),
            _ => return Ok(()),
        };
        if x > 0.0 && x < 1.0 { Ok(()) } else { Err((name, "a number above 0 and below 1".into(), x.to_string())) }
    }

    /// Whether `narrower` can be read from a cache of this selection without the teacher. Errors: `Raise`, with both.
    ///
    /// A smaller k can, and a cutoff; nothing that was not kept can come back. Draws can be left out (hybrid to top-k or cutoff)
    /// but not made fewer or redrawn.
    pub fn check_narrows_to(&self, narrower: &Selection) -> Result<()> {
        let possible = match (self, narrower) {
            (a, b) if a == b => true,
            (Selection::Sampled { .. }, _) | (_, Selection::Sampled { .. }) => false,
            (Selection::Hybrid { k, draws, seed }, Selection::Hybrid { k: k2, draws: d2, seed: s2 }) => {
                (k, draws, seed) == (k2, d2, s2)
            }
            (_, Selection::Hybrid { .. }) => false,
            (Selection::Cutoff { .. }, Selection::TopK { .. }) => false,
            (Selection::Cutoff { k, rule }, Selection::Cutoff { k: k2, rule: r2 }) => k2 <= k && rule.covers(r2),
            (_, Selection::TopK { k } | Selection::Cutoff { k, .. }) => *k <= self.head(),
        };
        if possible {
            return Ok(());
        }
        Err(Error::Raise { what: "selection", has: self.to_string(), asked: narrower.to_string() })
    }
}

impl Cutoff {
    /// Whether this rule keeps all that `other` keeps, whatever the distribution.
    fn covers(&self, other: &Cutoff) -> bool {
        match (self, other) {
            (Cutoff::MinProb(a), Cutoff::MinProb(b)) => a <= b,
            (Cutoff::MinMass(a), Cutoff::MinMass(b)) => a >= b,
            _ => false,
        }
    }
}

/// As rows and footers state it: `top-k 64`, `cutoff 64 p>=1e-5`, `cutoff 64 mass>=0.999`, `sampled 50 seed 0`, `hybrid 16+32 seed 0`.
impl std::fmt::Display for Selection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Selection::TopK { k } => write!(f, "top-k {k}"),
            Selection::Cutoff { k, rule: Cutoff::MinProb(p) } => write!(f, "cutoff {k} p>={p:e}"),
            Selection::Cutoff { k, rule: Cutoff::MinMass(mass) } => write!(f, "cutoff {k} mass>={mass}"),
            Selection::Sampled { draws, seed } => write!(f, "sampled {draws} seed {seed}"),
            Selection::Hybrid { k, draws, seed } => write!(f, "hybrid {k}+{draws} seed {seed}"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_cutoff_keeps_at_least_one_and_stops_where_it_says() {
        let logprobs: Vec<f32> = [0.5f32, 0.3, 0.1, 0.05, 1e-6].iter().map(|p| p.ln()).collect();
        let by_prob = |p| Selection::Cutoff { k: 4, rule: Cutoff::MinProb(p) }.kept(&logprobs);
        assert_eq!([by_prob(0.9), by_prob(0.2), by_prob(0.01), by_prob(1e-7)], [1, 2, 4, 4]);
        let by_mass = |m| Selection::Cutoff { k: 4, rule: Cutoff::MinMass(m) }.kept(&logprobs);
        // 0.5 + 0.3 = 0.8: one more is needed for 0.85, all four for more than they have.
        assert_eq!([by_mass(0.1), by_mass(0.6), by_mass(0.85), by_mass(0.99)], [1, 2, 3, 4]);
        assert_eq!(Selection::TopK { k: 3 }.kept(&logprobs), 3);
        assert_eq!(Selection::Sampled { draws: 9, seed: 0 }.kept(&logprobs), 0);
    }

    #[test]
    fn nothing_that_was_not_kept_comes_back() {
        let cutoff = |k, p| Selection::Cutoff { k, rule: Cutoff::MinProb(p) };
        let mass = |k, m| Selection::Cutoff { k, rule: Cutoff::MinMass(m) };
        let top = |k| Selection::TopK { k };
        let (sampled, hybrid) = (Selection::Sampled { draws: 5, seed: 1 }, Selection::Hybrid { k: 8, draws: 5, seed: 1 });
        for (from, to, possible) in [
            (top(64), top(16), true),
            (top(16), top(64), false),
            (top(64), cutoff(64, 1e-3), true),
            (cutoff(64, 1e-5), top(8), false),
            (cutoff(64, 1e-5), cutoff(64, 1e-4), true),
            (cutoff(64, 1e-4), cutoff(64, 1e-5), false),
            (mass(64, 0.99), mass(64, 0.9), true),
            (mass(64, 0.9), mass(64, 0.99), false),
            (mass(64, 0.99), cutoff(64, 0.1), false),
            (hybrid, top(8), true),
            (hybrid, top(9), false),
            (hybrid, Selection::Hybrid { k: 4, draws: 5, seed: 1 }, false),
            (sampled, sampled, true),
            (sampled, top(1), false),
            (top(64), sampled, false),
        ] {
            assert_eq!(from.check_narrows_to(&to).is_ok(), possible, "{from} to {to}");
        }
    }

    #[test]
    fn the_json_of_a_selection_is_strict() {
        let selection = Selection::Cutoff { k: 64, rule: Cutoff::MinProb(1e-5) };
        let text = serde_json::to_string(&selection).unwrap();
        assert_eq!(text, r#"{"kind":"cutoff","k":64,"rule":{"min_prob":0.00001}}"#);
        assert_eq!(serde_json::from_str::<Selection>(&text).unwrap(), selection);
        assert_eq!(selection.to_string(), "cutoff 64 p>=1e-5");
        assert!(serde_json::from_str::<Selection>(r#"{"kind":"top-k","k":64,"draws":3}"#).is_err());
    }
}
