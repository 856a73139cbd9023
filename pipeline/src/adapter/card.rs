//! Owns the model card of an adapter folder. Refuses to invent a licence: the base model's is carried over or none is named.

use super::AdapterConfig;
use std::path::Path;

/// Longest base model card looked at for its licence, in bytes.
const MAX_CARD_BYTES: u64 = 1 << 20;
/// Front-matter keys of the base model's card that hold for the adapter too.
const CARRIED: [&str; 3] = ["license", "license_name", "license_link"];

/// What stands around an adapter's tensors in its folder.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// The base model's folder: tokenizer files are copied from it, and the licence is read from its card.
    pub base: &'a Path,
    /// What the card tells of the training: (name, value), in this order.
    pub facts: &'a [(String, String)],
}

/// The text of `README.md`.
pub(super) fn text(config: &AdapterConfig, surroundings: &Surroundings<'_>) -> String {
    let mut card = String::from("---\nlibrary_name: peft\n");
    if !config.base_model.is_empty() {
        card.push_str(&format!("base_model: {}\n", quoted(&config.base_model)));
    }
    card.push_str("pipeline_tag: text-generation\ntags:\n- lora\n- distillation\n");
    for line in licence(surroundings.base) {
        card.push_str(&line);
        card.push('\n');
    }
    card.push_str("---\n\n# LoRA adapter\n\nTrained by potstill");
    card.push_str(" on an NF4 base (double quantised, blocks of 64) from cached teacher distributions.\n\n");
    let own = [
        ("base model", config.base_model.clone()),
        ("rank", config.rank.to_string()),
        ("alpha", config.alpha.to_string()),
        ("factor of B (A x)", config.factor().to_string()),
        ("modules", config.target_modules.join(", ")),
    ];
    card.push_str("| | |\n|---|---|\n");
    let given = surroundings.facts.iter().map(|(name, value)| (name.as_str(), value.clone()));
    for (name, value) in own.into_iter().chain(given) {
        card.push_str(&format!("| {} | {} |\n", cell(name), cell(&value)));
    }
    card.push_str("\n```python\nfrom peft import PeftModel\nmodel = PeftModel.from_pretrained(base, this_folder)\n```\n");
    card
}

/// The licence lines of the base model's card.
fn licence(base: &Path) -> Vec<String> {
    let path = base.join("README.md");
    let short = std::fs::metadata(&path).is_ok_and(|m| m.is_file() && m.len() <= MAX_CARD_BYTES);
    let text = if short { std::fs::read_to_string(&path).unwrap_or_default() } else { String::new() };
    let mut lines = text.lines();
    if lines.next() != Some("---") {
        return Vec::new();
    }
    let value = |line: &str| line.split_once(':').map(|(key, value)| (key.to_string(), value.trim().to_string()));
    lines
        .take_while(|line| *line != "---")
        .filter_map(value)
        .filter(|(key, value)| CARRIED.contains(&key.as_str()) && !value.is_empty())
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
