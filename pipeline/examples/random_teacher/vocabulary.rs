//! A tokenizer as wide as a real one.

use crate::{Failure, Flags};
use potstill_pipeline::data::ChatTokenizer;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Instant;

/// Ids of Qwen's tokenizer.
const QWEN_IDS: usize = 151_646;

/// Copies the tokenizer and fills its vocabulary up.
pub fn fill_up(flags: &Flags) -> Result<(), Failure> {
    let wanted = flags.sizes.ids.unwrap_or(QWEN_IDS.min(flags.sizes.vocab));
    let from = |name: &str| flags.tokenizer.join(name);
    for name in ["tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
        if from(name).is_file() {
            fs::write(flags.out.join(name), fs::read(from(name))?)?;
        }
    }
    let path = from("tokenizer.json");
    let text = fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut document: Value = serde_json::from_slice(&text)?;
    let added = document["added_tokens"].as_array().cloned().unwrap_or_default();
    let vocabulary = document["model"]["vocab"].as_object_mut().ok_or("tokenizer.json: expected a vocabulary, found none")?;
    // Added tokens keep their ids in a larger vocabulary only as a part of it.
    for token in &added {
        if let (Some(content), id) = (token["content"].as_str(), &token["id"]) {
            vocabulary.insert(content.into(), id.clone());
        }
    }
    let first = vocabulary.values().filter_map(Value::as_u64).max().map_or(0, |id| id as usize + 1);
    if first > wanted || wanted > flags.sizes.vocab {
        return Err(
            format!("--ids: expected from {first} (the tokenizer's) to {} (--vocab), found {wanted}", flags.sizes.vocab).into()
        );
    }
    for id in first..wanted {
        // No merge makes these, and no byte is spelled as a blank.
        vocabulary.insert(format!("no text {id}"), id.into());
    }
    fs::write(flags.out.join("tokenizer.json"), document.to_string())?;
    report(&flags.out)
}

fn report(out: &Path) -> Result<(), Failure> {
    let begun = Instant::now();
    let ids = ChatTokenizer::from_folder(out)?.tokenizer_fingerprint().size;
    println!("tokenizer of {ids} ids, loaded in {:.2} s", begun.elapsed().as_secs_f64());
    Ok(())
}
