//! Owns an adapter's folder: `adapter_config.json`, `adapter_model.safetensors`, a card, the run's record and the tokenizer's files.
//! Refuses tensors that the configuration does not explain.

use super::module::{self, FILE_PREFIX, Matrix};
use super::staging::{Staging, refuse_occupied};
use super::{AdapterConfig, AdapterError, Checked, MAX_RANK, Surroundings, card};
use crate::model::weights::Weights;
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

pub(crate) const CONFIG_NAME: &str = "adapter_config.json";
pub(crate) const TENSORS_NAME: &str = "adapter_model.safetensors";

/// Writes an adapter folder that PEFT reads; an earlier adapter (or an empty folder) there is replaced.
///
/// `tensors` are f32, named as in the program: `model.layers.N.MODULE.lora_A.weight` `[r, in]` and `.lora_B.weight` `[out, r]`.
/// Errors: another name, shape or dtype, a matrix without its partner, a rank beyond [`MAX_RANK`], a folder with other things
/// in it, a failing disk.
pub fn save(folder: &Path, config: &AdapterConfig, tensors: &[(String, Tensor)], surroundings: &Surroundings<'_>) -> Checked<()> {
    if !folder.join(CONFIG_NAME).is_file() {
        refuse_occupied(folder)?;
    }
    let path = folder.join(TENSORS_NAME);
    if config.rank == 0 || config.rank > MAX_RANK {
        let (expected, found) = (format!("1 to {MAX_RANK}"), config.rank.to_string());
        return Err(AdapterError::Config { path: folder.join(CONFIG_NAME), key: "r", expected, found });
    }
    let shapes = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.dims(), format!("{:?}", tensor.dtype())));
    let modules = pairs(&path, config, shapes)?;
    if let Some((name, tensor)) = tensors.iter().find(|(_, tensor)| tensor.dtype() != DType::F32) {
        let found = format!("{:?} {:?}", tensor.dtype(), tensor.dims());
        return Err(AdapterError::Shape { path, name: name.clone(), expected: format!("F32 {:?}", tensor.dims()), found });
    }
    if modules.is_empty() {
        return Err(AdapterError::Empty { path });
    }
    let staging = Staging::beside(folder)?;
    staging.write(CONFIG_NAME, &config.text())?;
    staging.write("README.md", &card::text(config, surroundings))?;
    if let Some(run) = surroundings.run {
        staging.write(card::RUN_FILE, &format!("{run:#}\n"))?;
    }
    let named = tensors.iter().map(|(name, tensor)| (format!("{FILE_PREFIX}{name}"), tensor));
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(named, Some(metadata), &staging.file(TENSORS_NAME))
        .map_err(|source| AdapterError::Safetensors { path, source })?;
    staging.share(TENSORS_NAME, CONFIG_NAME)?;
    staging.copy_companions(surroundings.base)?;
    staging.publish()
}

/// Reads an adapter folder: what it is, and its tensors as f32 on the CPU under the program's names.
///
/// Errors: an adapter that is not plain LoRA, a rank beyond [`MAX_RANK`], an unknown name, a matrix without its partner, shapes
/// that contradict the configuration.
pub fn load(folder: &Path) -> Checked<(AdapterConfig, BTreeMap<String, Tensor>)> {
    if !folder.join(CONFIG_NAME).is_file() {
        let within = folder.join("adapter");
        let found = match (folder.is_dir(), within.join(CONFIG_NAME).is_file()) {
            (_, true) => format!("one in {}", within.display()),
            (true, false) => format!("no {CONFIG_NAME} in it"),
            (false, false) => "nothing there".into(),
        };
        return Err(AdapterError::NoAdapter { folder: folder.to_path_buf(), found });
    }
    let config = AdapterConfig::read(&folder.join(CONFIG_NAME))?;
    let path = folder.join(TENSORS_NAME);
    let weights = Weights::open_file(&path)?;
    let mut infos = Vec::new();
    for name in weights.names() {
        let Some((own, info)) = name.strip_prefix(FILE_PREFIX).zip(weights.info(name)) else {
            return Err(unknown(&path, name, &config));
        };
        infos.push((own, info));
    }
    let shapes = infos.iter().map(|(name, info)| (*name, info.shape.as_slice(), format!("{:?}", info.dtype)));
    if pairs(&path, &config, shapes)?.is_empty() {
        return Err(AdapterError::Empty { path });
    }
    let mut tensors = BTreeMap::new();
    for (name, info) in &infos {
        let stored = weights.tensor(&format!("{FILE_PREFIX}{name}"), &info.shape, &Device::Cpu)?;
        let tensor = stored.to_dtype(DType::F32);
        let tensor = tensor.map_err(|source| AdapterError::Tensor { name: name.to_string(), source: source.into() })?;
        tensors.insert(name.to_string(), tensor);
    }
    Ok((config, tensors))
}

/// Checks names and shapes, (name, shape, dtype) each; gives the module names in order.
fn pairs<'a>(
    path: &Path,
    config: &AdapterConfig,
    tensors: impl Iterator<Item = (&'a str, &'a [usize], String)>,
) -> Checked<Vec<&'a str>> {
    let rank = config.rank as usize;
    let mut seen: BTreeMap<&str, Vec<Matrix>> = BTreeMap::new();
    for (name, shape, dtype) in tensors {
        let known = module::parse(name).filter(|(module, _)| {
            module::projection(module).is_some_and(|last| config.target_modules.iter().any(|target| target == last))
        });
        let (module, matrix) = known.ok_or_else(|| unknown(path, name, config))?;
        let (fits, expected) = match (matrix, shape) {
            (Matrix::A, &[r, inputs]) => (r == rank && inputs > 0, format!("[{rank}, in]")),
            (Matrix::A, _) => (false, format!("[{rank}, in]")),
            (Matrix::B, &[outputs, r]) => (r == rank && outputs > 0, format!("[out, {rank}]")),
            (Matrix::B, _) => (false, format!("[out, {rank}]")),
        };
        if !fits {
            let found = format!("{dtype} {shape:?}");
            return Err(AdapterError::Shape { path: path.to_path_buf(), name: name.to_string(), expected, found });
        }
        let matrices = seen.entry(module).or_default();
        if matrices.contains(&matrix) {
            let (expected, found) = ("each matrix once".to_string(), "it twice".to_string());
            return Err(AdapterError::Shape { path: path.to_path_buf(), name: name.to_string(), expected, found });
        }
        matrices.push(matrix);
    }
    for (module, matrices) in &seen {
        if let [only] = matrices[..] {
            let (found, missing) = (only.name(), only.partner().name());
            return Err(AdapterError::Partner { path: path.to_path_buf(), module: module.to_string(), found, missing });
        }
    }
    Ok(seen.into_keys().collect())
}

fn unknown(path: &Path, name: &str, config: &AdapterConfig) -> AdapterError {
    let name = name.chars().take(200).collect();
    AdapterError::Name { path: path.to_path_buf(), name, modules: config.target_modules.join(", ") }
}
