//! Owns the model card of an adapter folder, in the form that PEFT gives it. Refuses to invent a licence: the base model's is carried
//! over or none is named.

use super::AdapterConfig;
use serde_json::Value;
use std::path::Path;

/// The run's record beside the card, for machines. It is a file of its own because PEFT drops keys of `adapter_config.json` that it
/// does not know.
pub const RUN_FILE: &str = "distill_run.json";
/// Longest base model card looked at for its licence, in bytes.
const MAX_CARD_BYTES: u64 = 1 << 20;
/// Front-matter keys of the base model's card that hold for the adapter too.
const CARRIED: [&str; 3] = ["license", "license_name", "license_link"];
/// The base as training held it, in the words of the library that made the format.
const QUANTISATION: [(&str, &str); 5] = [
    ("load_in_4bit", "True"),
    ("bnb_4bit_quant_type", "nf4"),
    ("bnb_4bit_use_double_quant", "True"),
    ("block sizes", "64 weights, 256 absolute maxima"),
    ("quantised", "the seven projections of every layer; embedding, norms and head are as stored"),
];

/// What an adapter was trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LearnedFrom {
    /// A teacher's distributions.
    Teacher,
    /// The data's own tokens.
    Tokens,
    /// Both.
    Both,
}

impl LearnedFrom {
    /// The end of "Trained by potstill …".
    fn sentence(self) -> &'static str {
        match self {
            LearnedFrom::Teacher => "from cached teacher distributions",
            LearnedFrom::Tokens => "on the data's own tokens",
            LearnedFrom::Both => "from cached teacher distributions and on the data's own tokens",
        }
    }

    /// The hub's words for it.
    fn tags(self) -> &'static [&'static str] {
        match self {
            LearnedFrom::Teacher => &["distillation"],
            LearnedFrom::Tokens => &["sft"],
            LearnedFrom::Both => &["distillation", "sft"],
        }
    }
}

/// What stands around an adapter's tensors in its folder.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// The base model's folder: tokenizer files are copied from it, and the licence is read from its card.
    pub base: &'a Path,
    /// What the card says the adapter was trained on.
    pub learned_from: LearnedFrom,
    /// What the card tells of the training: (name, value), in this order.
    pub facts: &'a [(String, String)],
    /// What [`RUN_FILE`] holds, if there is to be one.
    pub run: Option<&'a Value>,
}

/// The text of `README.md`.
pub(super) fn text(config: &AdapterConfig, surroundings: &Surroundings<'_>) -> String {
    let own = [
        ("base model", base_model(config)),
        ("rank", config.rank.to_string()),
        ("alpha", config.alpha.to_string()),
        ("factor of B (A x)", config.factor().to_string()),
        ("dropout", config.dropout.to_string()),
        ("modules", config.target_modules.join(", ")),
    ];
    let given = surroundings.facts.iter().map(|(name, value)| (name.as_str(), value.clone()));
    let mut card = front_matter(config, surroundings);
    card.push_str("\n# LoRA adapter\n\nTrained by potstill ");
    card.push_str(surroundings.learned_from.sentence());
    card.push_str(", the base held in 4 bits.\n\n## Use\n\n");
    card.push_str("```python\nfrom peft import PeftModel\nmodel = PeftModel.from_pretrained(base, this_folder)\n```\n\n");
    card.push_str("## Training procedure\n\n| | |\n|---|---|\n");
    for (name, value) in own.into_iter().chain(given) {
        card.push_str(&format!("| {} | {} |\n", cell(name), cell(&value)));
    }
    card.push_str("\nThe base model's weights while training:\n\n");
    for (name, value) in QUANTISATION {
        card.push_str(&format!("- {name}: {value}\n"));
    }
    if surroundings.run.is_some() {
        card.push_str(&format!(
            "\n`{RUN_FILE}` beside this card says the same for machines, with the digests of everything used.\n"
        ));
    }
    if surroundings.base.join("LICENSE").is_file() {
        card.push_str("\n## Licence\n\nThe base model's, beside this card: `LICENSE`.\n");
    }
    card.push_str(&format!("\n### Framework versions\n\n- potstill {}\n", env!("CARGO_PKG_VERSION")));
    card
}

/// The YAML that the hub reads.
fn front_matter(config: &AdapterConfig, surroundings: &Surroundings<'_>) -> String {
    let mut lines = vec!["---".to_string(), "library_name: peft".into()];
    let mut tags = vec!["lora".to_string()];
    tags.extend(surroundings.learned_from.tags().iter().map(|tag| (*tag).into()));
    if !config.base_model.is_empty() {
        lines.push(format!("base_model: {}", quoted(&config.base_model)));
        tags.insert(0, quoted(&format!("base_model:adapter:{}", config.base_model)));
    }
    lines.push("pipeline_tag: text-generation".into());
    lines.push("tags:".into());
    lines.extend(tags.into_iter().map(|tag| format!("- {tag}")));
    lines.extend(licence(surroundings.base));
    lines.push("---\n".into());
    lines.join("\n")
}

fn base_model(config: &AdapterConfig) -> String {
    let revision = config.revision.as_ref().map(|revision| format!(", revision {revision}")).unwrap_or_default();
    format!("{}{revision}", config.base_model)
}

/// The licence lines of the base model's card.
fn licence(base: &Path) -> Vec<String> {
    let text = crate::bounded::read(&base.join("README.md"), MAX_CARD_BYTES).unwrap_or_default();
    let text = String::from_utf8(text).unwrap_or_default();
    let mut lines = text.lines().map(str::trim_end);
    if lines.next() != Some("---") {
        return Vec::new();
    }
    lines
        .take_while(|line| *line != "---")
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key, value.trim()))
        // What opens a block or names something said elsewhere means nothing on a line of its own.
        .filter(|(key, value)| CARRIED.contains(key) && !value.is_empty() && !value.starts_with(['|', '>', '&', '*']))
        .map(|(key, value)| format!("{key}: {value}"))
        .collect()
}

/// A YAML string: JSON's form is one.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// One line of a table that its text cannot break.
fn cell(text: &str) -> String {
    text.replace(['\n', '\r'], " ").replace('|', "\\|")
}
