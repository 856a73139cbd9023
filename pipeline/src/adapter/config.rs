//! Owns `adapter_config.json` both ways. Refuses every setting that changes what the two matrices mean.

use super::{AdapterError, Checked};
use serde_json::{Map, Value, json};
use std::io::Read;
use std::path::Path;

/// Largest rank read or written.
pub const MAX_RANK: u32 = 1024;
/// Largest `adapter_config.json` read, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// The oldest PEFT known to read these files.
const PEFT_VERSION: &str = "0.13.0";
/// Settings that must be absent, null, false or empty: each changes the adapter's meaning in a way not carried out here.
const MUST_BE_OFF: [&str; 14] = [
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "megatron_config",
    "alora_invocation_tokens",
    "arrow_config",
];
/// Ways to initialise that leave the base weights as they are.
const HARMLESS_STARTS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// How B (A x) is scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scaling {
    /// alpha / r.
    #[default]
    Standard,
    /// alpha / √r (rank-stabilised LoRA, `use_rslora`).
    RankStabilised,
}

impl Scaling {
    /// The factor of B (A x).
    pub fn factor(self, alpha: f64, rank: u32) -> f64 {
        match self {
            Scaling::Standard => alpha / f64::from(rank),
            Scaling::RankStabilised => alpha / f64::from(rank).sqrt(),
        }
    }
}

/// What an adapter is, apart from its tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterConfig {
    /// r, 1 to [`MAX_RANK`].
    pub rank: u32,
    /// `lora_alpha`.
    pub alpha: f64,
    /// How alpha becomes a factor.
    pub scaling: Scaling,
    /// `lora_dropout`, the share of inputs of A that training left out, from 0 to below 1. It means nothing after training.
    pub dropout: f64,
    /// Name or folder of the base model.
    pub base_model: String,
    /// The base model's commit, where it is known.
    pub revision: Option<String>,
    /// Last parts of the adapted modules' names, e.g. `q_proj`.
    pub target_modules: Vec<String>,
}

impl AdapterConfig {
    /// The factor of B (A x).
    pub fn factor(&self) -> f64 {
        self.scaling.factor(self.alpha, self.rank)
    }

    /// Reads and checks `adapter_config.json`.
    pub(super) fn read(path: &Path) -> Checked<AdapterConfig> {
        let io = |source| AdapterError::Io { path: path.to_path_buf(), source };
        let mut text = Vec::new();
        let file = std::fs::File::open(path).map_err(io)?;
        file.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut text).map_err(io)?;
        if text.len() as u64 > MAX_CONFIG_BYTES {
            return Err(wrong(path, "size", format!("at most {MAX_CONFIG_BYTES} bytes"), "more".into()));
        }
        let keys: Map<String, Value> =
            serde_json::from_slice(&text).map_err(|source| AdapterError::Json { path: path.to_path_buf(), source })?;
        check(path, &keys)?;
        let config = AdapterConfig {
            rank: rank(path, &keys)?,
            alpha: alpha(path, &keys)?,
            scaling: if is_off(keys.get("use_rslora")) { Scaling::Standard } else { Scaling::RankStabilised },
            dropout: dropout(path, &keys)?,
            base_model: keys.get("base_model_name_or_path").and_then(Value::as_str).unwrap_or_default().to_string(),
            revision: keys.get("revision").and_then(Value::as_str).map(String::from),
            target_modules: target_modules(path, &keys)?,
        };
        Ok(config)
    }

    /// The file's text: every key that PEFT 0.13 knows and whose default could be read otherwise, sorted.
    pub(super) fn text(&self) -> String {
        let mut modules = self.target_modules.clone();
        modules.sort();
        let whole = self.alpha.fract() == 0.0 && self.alpha.abs() < 1e15;
        let config = json!({
            "alpha_pattern": {},
            "base_model_name_or_path": self.base_model,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": if whole { json!(self.alpha as i64) } else { json!(self.alpha) },
            "lora_dropout": self.dropout,
            "modules_to_save": null,
            "peft_type": "LORA",
            "peft_version": PEFT_VERSION,
            "r": self.rank,
            "rank_pattern": {},
            "revision": self.revision,
            "target_modules": modules,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.scaling == Scaling::RankStabilised,
        });
        format!("{config:#}\n")
    }
}

fn check(path: &Path, keys: &Map<String, Value>) -> Checked<()> {
    let text = |key| keys.get(key).map_or("nothing".to_string(), Value::to_string);
    if keys.get("peft_type").and_then(Value::as_str) != Some("LORA") {
        return Err(wrong(path, "peft_type", "\"LORA\"".into(), text("peft_type")));
    }
    if let Some(key) = MUST_BE_OFF.into_iter().find(|key| !is_off(keys.get(*key))) {
        return Err(wrong(path, key, "it to be off (only plain LoRA is supported)".into(), text(key)));
    }
    if keys.get("bias").is_some_and(|bias| *bias != "none" && !bias.is_null()) {
        return Err(wrong(path, "bias", "\"none\"".into(), text("bias")));
    }
    let harmless = match keys.get("init_lora_weights") {
        Some(Value::String(start)) => HARMLESS_STARTS.contains(&start.as_str()),
        _ => true,
    };
    if !harmless {
        let expected = format!("true, false or one of {HARMLESS_STARTS:?} (others change the base weights)");
        return Err(wrong(path, "init_lora_weights", expected, text("init_lora_weights")));
    }
    Ok(())
}

fn rank(path: &Path, keys: &Map<String, Value>) -> Checked<u32> {
    let found = keys.get("r");
    let rank = found.and_then(Value::as_u64).and_then(|r| u32::try_from(r).ok()).filter(|r| (1..=MAX_RANK).contains(r));
    rank.ok_or_else(|| wrong(path, "r", format!("a whole number, 1 to {MAX_RANK}"), shown(found)))
}

fn alpha(path: &Path, keys: &Map<String, Value>) -> Checked<f64> {
    let found = keys.get("lora_alpha");
    let alpha = found.and_then(Value::as_f64).filter(|a| a.is_finite());
    alpha.ok_or_else(|| wrong(path, "lora_alpha", "a finite number".into(), shown(found)))
}

/// Whether a share of inputs can be left out: some, never all.
pub(crate) fn is_dropout(p: f64) -> bool {
    (0.0..1.0).contains(&p)
}

fn dropout(path: &Path, keys: &Map<String, Value>) -> Checked<f64> {
    let Some(found) = keys.get("lora_dropout").filter(|v| !v.is_null()) else { return Ok(0.0) };
    let dropout = found.as_f64().filter(|p| is_dropout(*p));
    dropout.ok_or_else(|| wrong(path, "lora_dropout", "a number from 0 to below 1".into(), shown(Some(found))))
}

/// A list of module names, or PEFT's word for all of them.
fn target_modules(path: &Path, keys: &Map<String, Value>) -> Checked<Vec<String>> {
    let short = super::MODULES;
    let found = keys.get("target_modules");
    let expected = || format!("\"all-linear\" or a list of {short:?}");
    match found {
        Some(Value::String(all)) if all == "all-linear" => Ok(short.map(String::from).to_vec()),
        Some(Value::Array(list)) if !list.is_empty() => list
            .iter()
            .map(|item| match item.as_str().filter(|name| short.contains(name)) {
                Some(name) => Ok(name.to_string()),
                None => Err(wrong(path, "target_modules", expected(), item.to_string())),
            })
            .collect(),
        _ => Err(wrong(path, "target_modules", expected(), shown(found))),
    }
}

fn is_off(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::Array(list)) => list.is_empty(),
        Some(Value::Object(map)) => map.is_empty(),
        Some(_) => false,
    }
}

fn shown(value: Option<&Value>) -> String {
    value.map_or("nothing".to_string(), |v| v.to_string().chars().take(80).collect())
}

fn wrong(path: &Path, key: &'static str, expected: String, found: String) -> AdapterError {
    AdapterError::Config { path: path.to_path_buf(), key, expected, found: found.chars().take(80).collect() }
}
