//! AlpacaEval's figures from preferences: win rates as the original computes them, and a table without ties.

use super::super::mean::{mean, standard_error};
use super::super::proportion::{sign_test, wilson};
use serde::Serialize;

/// Set apart from digests of anything else.
const COIN: &str = "potstill 2026 coin for a tie in AlpacaEval";

/// One instruction and what the judge thinks of its two outputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// The collection that the instruction comes from.
    pub dataset: String,
    /// The instruction.
    pub instruction: String,
    /// From 0 (the baseline's output is better) to 1 (the model's); `None` where there is no judgement.
    pub share: Option<f64>,
    /// Characters (code points) of both outputs: the baseline's, the model's.
    pub lengths: [u64; 2],
}

/// Figures of one model against one baseline. Rates are in per cent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// Comparisons with a judgement.
    pub judged: u64,
    /// Comparisons without one; they are in no figure but the lengths.
    pub left_out: u64,
    /// Mean preference; null of none.
    pub win_rate: Option<f64>,
    /// Its standard error, sd / √n; null of fewer than two.
    pub standard_error: Option<f64>,
    /// Preferences above ½ as 1, below as 0, ½ as ½: their mean; null of none.
    pub discrete_win_rate: Option<f64>,
    /// Preferences above ½.
    pub wins: u64,
    /// Preferences below ½.
    pub losses: u64,
    /// Preferences of exactly ½.
    pub draws: u64,
    /// The same with every draw decided by a coin that depends on the instruction alone.
    pub no_ties: NoTies,
    /// Lengths of outputs.
    pub lengths: Lengths,
}

/// Winners without ties, by collection.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NoTies {
    /// By collection, in alphabetical order.
    pub datasets: Vec<Winners>,
    /// All of them.
    pub total: Winners,
    /// Draws that the coin decided.
    pub forced: u64,
}

/// Winners of a number of comparisons.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Winners {
    /// The collection.
    pub dataset: String,
    /// Comparisons.
    pub judged: u64,
    /// Won by the model.
    pub wins: u64,
    /// Won by the baseline.
    pub losses: u64,
    /// Mean preference, ties included, in per cent; null of none.
    pub win_rate: Option<f64>,
    /// Wilson's 95 % interval of the share of wins, in per cent; null of none.
    pub interval: Option<[f64; 2]>,
    /// Exact two-sided p under a fair coin.
    pub p: f64,
}

/// Lengths of outputs in characters (code points).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Lengths {
    /// Mean of the baseline's; null of none.
    pub baseline: Option<f64>,
    /// Mean of the model's; null of none.
    pub model: Option<f64>,
    /// The model's mean over the baseline's; null where that is 0.
    pub ratio: Option<f64>,
}

impl Figures {
    /// Of all comparisons.
    pub fn of(all: &[Comparison]) -> Self {
        let shares: Vec<f64> = all.iter().filter_map(|c| c.share).collect();
        let count = |wanted: fn(f64) -> bool| shares.iter().filter(|share| wanted(**share)).count() as u64;
        let (wins, losses, draws) = (count(|x| x > 0.5), count(|x| x < 0.5), count(|x| x == 0.5));
        let judged = shares.len() as u64;
        let discrete = (judged > 0).then(|| 100.0 * (wins as f64 + 0.5 * draws as f64) / judged as f64);
        Self {
            judged,
            left_out: all.len() as u64 - judged,
            win_rate: mean(&shares).map(|x| 100.0 * x),
            standard_error: standard_error(&shares).map(|x| 100.0 * x),
            discrete_win_rate: discrete,
            wins,
            losses,
            draws,
            no_ties: NoTies::of(all, draws),
            lengths: Lengths::of(all),
        }
    }
}

impl NoTies {
    fn of(all: &[Comparison], forced: u64) -> Self {
        let mut names: Vec<&str> = all.iter().map(|c| c.dataset.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        let datasets = names.iter().map(|name| Winners::of(name, all.iter().filter(|c| c.dataset == *name)));
        Self { datasets: datasets.collect(), total: Winners::of("total", all.iter()), forced }
    }
}

impl Winners {
    fn of<'a>(name: &str, some: impl Iterator<Item = &'a Comparison>) -> Self {
        let judged: Vec<(f64, &str)> = some.filter_map(|c| Some((c.share?, c.instruction.as_str()))).collect();
        let wins =
            judged.iter().filter(|(share, instruction)| *share > 0.5 || (*share == 0.5 && coin(instruction))).count() as u64;
        let losses = judged.len() as u64 - wins;
        let shares: Vec<f64> = judged.iter().map(|(share, _)| *share).collect();
        Self {
            dataset: name.to_string(),
            judged: judged.len() as u64,
            wins,
            losses,
            win_rate: mean(&shares).map(|x| 100.0 * x),
            interval: wilson(wins, losses).map(|ends| ends.map(|x| 100.0 * x)),
            p: sign_test(wins, losses),
        }
    }
}

impl Lengths {
    fn of(all: &[Comparison]) -> Self {
        let of = |which: usize| mean(&all.iter().map(|c| c.lengths[which] as f64).collect::<Vec<f64>>());
        let (baseline, model) = (of(0), of(1));
        let ratio = baseline.zip(model).filter(|(b, _)| *b > 0.0).map(|(b, m)| m / b);
        Self { baseline, model, ratio }
    }
}

/// Whether the coin of an instruction falls for the model.
fn coin(instruction: &str) -> bool {
    let digest = blake3::derive_key(COIN, instruction.as_bytes());
    digest[0] & 1 == 1
}

/// Characters as AlpacaEval counts them: code points.
pub(super) fn characters(text: &str) -> u64 {
    text.chars().count() as u64
}
