//! One comparison: two outputs to one instruction, shown in one order or both, and what the judge's choices come to.

use super::super::judge::chat::{ChatRequest, Logprobs};
use super::super::judge::{self, Answer, Client, JudgeError};
use super::output::{Annotation, OutputRow};
use super::preference::{Choice, PairPrompt};
use super::{AlpacaEvalConfig, Choices, Orders};

/// Set apart from digests of anything else.
const DRAW: &str = "potstill 2026 order of outputs in AlpacaEval";

/// Two outputs.
pub(super) struct Pair<'a> {
    /// The instruction's place in the benchmark.
    pub(super) place: usize,
    pub(super) baseline: &'a OutputRow,
    pub(super) model: &'a OutputRow,
}

/// Which output stands first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum First {
    Baseline,
    Model,
}

/// What became of a comparison.
pub(super) struct Judged {
    pub(super) place: usize,
    pub(super) annotation: Annotation,
    /// From 0 (the baseline's is better) to 1 (the model's), with the baseline's first and with the model's first.
    pub(super) by_order: [Option<f64>; 2],
    pub(super) left_out: Option<String>,
    pub(super) choices: Choices,
}

impl Pair<'_> {
    fn is_identical(&self) -> bool {
        self.baseline.output == self.model.output
    }

    fn orders(&self, orders: Orders) -> Vec<First> {
        match orders {
            _ if self.is_identical() => Vec::new(),
            Orders::Both => vec![First::Baseline, First::Model],
            Orders::One(seed) => {
                let material = [&seed.to_le_bytes()[..], self.baseline.instruction.as_bytes()].concat();
                let swapped = blake3::derive_key(DRAW, &material)[0] & 1 == 1;
                vec![if swapped { First::Model } else { First::Baseline }]
            }
        }
    }

    fn request(&self, config: &AlpacaEvalConfig, prompt: &PairPrompt, first: First) -> ChatRequest {
        let (one, two) = match first {
            First::Baseline => (self.baseline, self.model),
            First::Model => (self.model, self.baseline),
        };
        ChatRequest {
            model: config.judge.clone(),
            messages: prompt.messages(&self.baseline.instruction, &one.output, &two.output),
            // As the original: it is there for the sampling, which log-probabilities make no use of. A label alone is to be the likeliest.
            temperature: if config.logprobs == Logprobs::Top { 1.0 } else { 0.0 },
            top_p: None,
            max_tokens: config.max_tokens,
            limit_field: config.limit_field,
            seed: None,
            logprobs: config.logprobs,
        }
    }

    /// What is asked of the judge, if it chooses at once.
    pub(super) fn requests(&self, config: &AlpacaEvalConfig, prompt: &PairPrompt) -> Vec<ChatRequest> {
        self.orders(config.orders).into_iter().map(|first| self.request(config, prompt, first)).collect()
    }

    /// Has the pair judged. A comparison of which one order has no choice has no judgement.
    pub(super) fn judge(
        &self,
        config: &AlpacaEvalConfig,
        prompt: &PairPrompt,
        client: &Client<'_>,
    ) -> Result<Judged, JudgeError> {
        let mut judged = Judged {
            place: self.place,
            annotation: Annotation {
                dataset: self.baseline.dataset.clone(),
                instruction: self.baseline.instruction.clone(),
                output_1: self.baseline.output.clone(),
                generator_1: self.baseline.generator.clone(),
                output_2: self.model.output.clone(),
                generator_2: self.model.generator.clone(),
                annotator: config.judge.clone(),
                preference: None,
            },
            by_order: [None; 2],
            left_out: None,
            choices: Choices::default(),
        };
        let orders = self.orders(config.orders);
        for first in &orders {
            match choice(client, &self.request(config, prompt, *first))? {
                Ok(choice) => judged.count(choice, *first),
                Err(reason) => judged.left_out = Some(reason),
            }
        }
        let shares: Vec<f64> = judged.by_order.iter().flatten().copied().collect();
        if let [one, two] = shares[..] {
            judged.choices.both_orders = 1;
            judged.choices.flips = u64::from((one - 0.5) * (two - 0.5) < 0.0);
        }
        judged.choices.identical = u64::from(self.is_identical());
        judged.annotation.preference = match judged.left_out {
            Some(_) => None,
            None if orders.is_empty() => Some(1.5),
            None => Some(1.0 + shares.iter().sum::<f64>() / shares.len() as f64),
        };
        Ok(judged)
    }
}

impl Judged {
    fn count(&mut self, choice: Choice, first: First) {
        let Some(p) = choice.first() else { return };
        match choice {
            Choice::Probability(_) => self.choices.by_probability += 1,
            _ => self.choices.by_label += 1,
        }
        self.choices.first_wins += u64::from(p > 0.5);
        self.choices.second_wins += u64::from(p < 0.5);
        match first {
            First::Baseline => self.by_order[0] = Some(1.0 - p),
            First::Model => self.by_order[1] = Some(p),
        }
    }
}

impl Choices {
    /// Adds another comparison's.
    pub(super) fn add(&mut self, other: &Self) {
        self.by_probability += other.by_probability;
        self.by_label += other.by_label;
        self.identical += other.identical;
        self.both_orders += other.both_orders;
        self.flips += other.flips;
        self.first_wins += other.first_wins;
        self.second_wins += other.second_wins;
    }
}

/// Asks for one choice, again where the judge chose neither label; or why there is none.
fn choice(client: &Client<'_>, request: &ChatRequest) -> Result<Result<Choice, String>, JudgeError> {
    for attempt in 0..=judge::REPEATS_WITHOUT_VERDICT {
        match client.ask(request, attempt)? {
            Answer::Failed(reason) => return Ok(Err(reason)),
            Answer::Reply(reply) => match Choice::of(&reply) {
                Choice::None => {}
                choice => return Ok(Ok(choice)),
            },
        }
    }
    Ok(Err("the judge chose neither label".into()))
}
