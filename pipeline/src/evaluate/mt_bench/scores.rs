//! MT-Bench's scores: by turn, by category, over all, with what was not graded counted by reason.

use super::super::mean::{grouped_error, mean, standard_error};
use serde::Serialize;
use std::collections::BTreeMap;

/// A grade of one answer to one turn, or why there is none.
#[derive(Debug, Clone, PartialEq)]
pub struct Graded {
    /// The question's number.
    pub question_id: u64,
    /// Its category.
    pub category: String,
    /// 1 or 2.
    pub turn: usize,
    /// 1 to 10, or why there is no grade.
    pub grade: Result<f64, String>,
}

/// A mean of grades.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Score {
    /// Grades in it.
    pub graded: u64,
    /// Their mean; null of none.
    pub mean: Option<f64>,
    /// Standard error of the mean: questions are what is drawn, so the two turns of one belong together; null of fewer than two.
    pub standard_error: Option<f64>,
}

/// A category's scores.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CategoryScores {
    /// Its name.
    pub category: String,
    /// Of first turns.
    pub first: Score,
    /// Of second turns.
    pub second: Score,
    /// Of both.
    pub both: Score,
}

/// All scores.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scores {
    /// Of first turns.
    pub first: Score,
    /// Of second turns.
    pub second: Score,
    /// Over all grades: FastChat's number. Where all are there it is the mean of the two turns' means.
    pub overall: Score,
    /// By category, in the order of the questions.
    pub categories: Vec<CategoryScores>,
    /// Answers that have no grade, by reason; they are in no mean.
    pub ungraded: BTreeMap<String, u64>,
}

impl Scores {
    /// Of all grades.
    pub fn of(all: &[Graded]) -> Self {
        let mut names: Vec<&str> = Vec::new();
        let mut ungraded = BTreeMap::new();
        for graded in all {
            if !names.contains(&graded.category.as_str()) {
                names.push(&graded.category);
            }
            if let Err(reason) = &graded.grade {
                *ungraded.entry(reason.clone()).or_default() += 1;
            }
        }
        let three = |category: Option<&str>| {
            let of = |turn: Option<usize>| score(all, category, turn);
            (of(Some(1)), of(Some(2)), of(None))
        };
        let categories = names.iter().map(|name| {
            let (first, second, both) = three(Some(name));
            CategoryScores { category: name.to_string(), first, second, both }
        });
        let (first, second, overall) = three(None);
        Self { first, second, overall, categories: categories.collect(), ungraded }
    }
}

/// The mean of what belongs to a category and a turn, or to all of them.
fn score(all: &[Graded], category: Option<&str>, turn: Option<usize>) -> Score {
    let mut questions: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
    for graded in all {
        let wanted = category.is_none_or(|c| c == graded.category) && turn.is_none_or(|t| t == graded.turn);
        if let (true, Ok(grade)) = (wanted, &graded.grade) {
            questions.entry(graded.question_id).or_default().push(*grade);
        }
    }
    let groups: Vec<Vec<f64>> = questions.into_values().collect();
    let grades: Vec<f64> = groups.iter().flatten().copied().collect();
    let mean = mean(&grades);
    let grouped = || grouped_error(groups.iter().map(Vec::as_slice), mean?);
    let error = if turn.is_some() { standard_error(&grades) } else { grouped() };
    Score { graded: grades.len() as u64, mean, standard_error: error }
}
