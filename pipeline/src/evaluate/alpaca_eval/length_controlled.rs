//! AlpacaEval 2's length-controlled win rate (Dubois et al. 2024, `length_controlled_v1`), from coefficients that are given.
//!
//! The model is P(the model's output is better) = σ(λ · tanh(Δ / sd(Δ)) + φ · γ + θ), where Δ is the baseline's length less the model's in
//! characters and γ the instruction's difficulty. The length-controlled rate is its mean with the first term at 0. Refuses to fit the
//! coefficients: the published ones are fitted with data of two further models that are not ours to ship.

use super::super::files::{self, wrong};
use super::super::judge::JudgeError;
use super::super::mean::{deviation, mean, standard_error};
use super::preference::logistic;
use serde::Serialize;
use std::path::Path;
use std::str::FromStr;

/// λ, φ and θ, in the order of AlpacaEval's own files of weights.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Coefficients {
    /// Of tanh(Δ / sd(Δ)).
    pub length: f64,
    /// Of the instruction's difficulty.
    pub difficulty: f64,
    /// Of the model.
    pub model: f64,
}

impl FromStr for Coefficients {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Option<Vec<f64>> = text.split(',').map(|n| n.trim().parse().ok().filter(|x: &f64| x.is_finite())).collect();
        match numbers.as_deref() {
            Some([length, difficulty, model]) => Ok(Self { length: *length, difficulty: *difficulty, model: *model }),
            _ => Err("expected three numbers, LENGTH,DIFFICULTY,MODEL".into()),
        }
    }
}

/// A length-controlled win rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LengthControlled {
    /// In per cent.
    pub win_rate: f64,
    /// Standard error of the mean over instructions, the coefficients held fixed; in per cent; null of fewer than two.
    pub standard_error: Option<f64>,
    /// The same with the lengths as they are: how well the coefficients fit these outputs, beside the plain win rate; null where all
    /// differences of length are alike.
    pub with_lengths: Option<f64>,
}

/// The rate over instructions of difficulties γ, whose outputs have `lengths` (baseline, model) in characters.
pub fn length_controlled(coefficients: Coefficients, difficulties: &[f64], lengths: &[[u64; 2]]) -> Option<LengthControlled> {
    let plain: Vec<f64> = difficulties.iter().map(|gamma| coefficients.model + coefficients.difficulty * gamma).collect();
    let rates: Vec<f64> = plain.iter().map(|x| logistic(*x)).collect();
    let differences: Vec<f64> = lengths.iter().map(|[baseline, model]| *baseline as f64 - *model as f64).collect();
    let spread = deviation(&differences).filter(|sd| *sd > 0.0);
    let with_lengths = spread.and_then(|sd| {
        let one = |(x, difference): (&f64, &f64)| logistic(x + coefficients.length * (difference / sd).tanh());
        mean(&plain.iter().zip(&differences).map(one).collect::<Vec<f64>>())
    });
    Some(LengthControlled {
        win_rate: 100.0 * mean(&rates)?,
        standard_error: standard_error(&rates).map(|e| 100.0 * e),
        with_lengths: with_lengths.map(|p| 100.0 * p),
    })
}

/// Whether a rate is so far from the plain one that the coefficients should be doubted: by more than ten points, and by more than a quarter
/// of the way from the plain one to 0 or 100 (AlpacaEval's own rule). All in per cent.
pub fn is_extreme(plain: f64, controlled: f64) -> bool {
    controlled < (plain - plain / 4.0).min(plain - 10.0) || controlled > (plain + (100.0 - plain) / 4.0).max(plain + 10.0)
}

/// γ of exactly the instructions 0 to `rows` − 1, from AlpacaEval's `instruction_difficulty.csv`: a first column with the instruction's number and one
/// called `instruction_difficulty`.
///
/// Errors: a file that is none, an instruction without a finite number or with two different ones, or more instructions than `rows`: then
/// rows and instructions would not be the same, and difficulties would go to the wrong ones.
pub fn difficulties(path: &Path, rows: usize) -> Result<Vec<f64>, JudgeError> {
    const COLUMN: &str = "instruction_difficulty";
    let text = files::text(path)?;
    let mut lines = text.lines().enumerate();
    let heads: Vec<&str> =
        lines.next().map_or_else(Vec::new, |(_, line)| line.split(',').map(|head| head.trim().trim_matches('"')).collect());
    let expected = "a table with commas, its first line naming a column instruction_difficulty";
    let value =
        heads.iter().position(|head| *head == COLUMN).ok_or_else(|| wrong(path, String::new(), expected, "none".into()))?;
    let number = heads.iter().position(|head| *head == "index").unwrap_or(0);
    let mut found: Vec<Option<f64>> = vec![None; rows];
    for (i, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
        let cells: Vec<&str> = line.split(',').map(str::trim).collect();
        let index = cells.get(number).and_then(|cell| cell.parse::<usize>().ok());
        let gamma = cells.get(value).and_then(|cell| cell.parse::<f64>().ok()).filter(|x| x.is_finite());
        let (Some(index), Some(gamma)) = (index, gamma) else {
            return Err(wrong(
                path,
                format!(", line {}", i + 1),
                "an instruction's number and a finite difficulty",
                format!("{:?}", shown(line)),
            ));
        };
        let Some(slot) = found.get_mut(index) else {
            let expected = format!("difficulties of the {rows} instructions that are judged, by their place");
            return Err(wrong(path, format!(", line {}", i + 1), &expected, format!("one for {index}")));
        };
        if slot.is_some_and(|earlier| earlier != gamma) {
            return Err(wrong(
                path,
                format!(", line {}", i + 1),
                "one difficulty an instruction",
                format!("another one for {index}"),
            ));
        }
        *slot = Some(gamma);
    }
    let missing = |i| {
        wrong(
            path,
            String::new(),
            &format!("a difficulty for each of {rows} instructions, by their place"),
            format!("none for {i}"),
        )
    };
    found.into_iter().enumerate().map(|(i, gamma)| gamma.ok_or_else(|| missing(i))).collect()
}

fn shown(line: &str) -> String {
    line.chars().take(80).collect()
}
