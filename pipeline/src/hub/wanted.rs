//! Owns which files of a repository are used: of a model its settings, tokenizer and safetensors weights, of a dataset the files of
//! a split. Refuses pickles and other formats by not wanting them.

use super::name::{self, HubName, Kind};
use super::{HubError, split};
#[cfg(feature = "hub")]
use crate::data::COMPANIONS;
pub(super) use crate::model::weights::INDEX_NAME as INDEX;
use crate::model::weights::{ADAPTER_NAME as ADAPTER, MAX_INDEX_BYTES, SINGLE_NAME as SINGLE};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Files that are fetched where they are there, beside [`COMPANIONS`].
#[cfg(feature = "hub")]
const BESIDE: [&str; 6] = ["quant_config.json", "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"];
/// Files without which no folder is a model.
pub(super) const NEEDED: [&str; 2] = ["tokenizer.json", "config.json"];

/// How the weights of a model are named.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Weights {
    /// These files.
    Files(Vec<String>),
    /// Those that the index names.
    Indexed,
    /// None that can be used.
    None,
}

/// Which weights files there are among `paths`: `model.safetensors`, else those of the index, else the only other one.
pub(super) fn weights(paths: &[String]) -> Weights {
    let has = |name: &str| paths.iter().any(|path| path == name);
    let other = |path: &&String| path.ends_with(".safetensors") && !path.contains('/') && *path != ADAPTER;
    match (has(SINGLE), has(INDEX)) {
        (true, _) => Weights::Files(vec![SINGLE.into()]),
        (_, true) => Weights::Indexed,
        _ => match paths.iter().filter(other).collect::<Vec<_>>()[..] {
            [only] => Weights::Files(vec![only.clone()]),
            _ => Weights::None,
        },
    }
}

/// Of `paths`, the settings and tokenizer of a model, and its index where the weights go by one. `config.json` comes last: it is
/// the sign that the rest is there.
#[cfg(feature = "hub")]
pub(super) fn beside(paths: &[String]) -> Vec<String> {
    let index = (weights(paths) == Weights::Indexed).then_some(INDEX);
    let all = COMPANIONS.into_iter().chain(BESIDE).chain(index).chain(NEEDED);
    all.filter(|name| paths.iter().any(|path| path == name)).map(String::from).collect()
}

/// The weights files that an index names.
pub(super) fn indexed(path: &Path) -> Result<Vec<String>, HubError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let wrong = |found: String| HubError::Index { path: path.to_path_buf(), found };
    let bytes = crate::bounded::read(path, MAX_INDEX_BYTES).map_err(|e| wrong(e.to_string()))?;
    let index: Index = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
    let files: BTreeSet<String> = index.weight_map.into_values().collect();
    match files.iter().find(|file| !name::is_plain_path(file) || file.contains('/') || !file.ends_with(".safetensors")) {
        Some(file) => Err(wrong(format!("the file name {:?}", file.chars().take(100).collect::<String>()))),
        None if files.is_empty() => Err(wrong("no tensor".into())),
        None => Ok(files.into_iter().collect()),
    }
}

/// What a model's snapshot, in which there are `paths`, lacks.
pub(super) fn lacking_of_model(snapshot: &Path, paths: &[String]) -> Result<Vec<String>, HubError> {
    let lacks = |file: &&str| !paths.iter().any(|path| path == file);
    let mut lacking: Vec<String> = NEEDED.iter().copied().filter(lacks).map(String::from).collect();
    match weights(paths) {
        Weights::Files(_) => {}
        Weights::Indexed => {
            let files = indexed(&snapshot.join(INDEX))?;
            lacking.extend(files.iter().map(String::as_str).filter(lacks).map(String::from));
        }
        Weights::None => lacking.push(SINGLE.into()),
    }
    Ok(lacking)
}

/// The files of a dataset's split among `paths`.
pub(super) fn of_dataset(name: &HubName, paths: &[String]) -> Result<Vec<String>, HubError> {
    debug_assert_eq!(name.kind, Kind::Dataset);
    split::files_of(paths, name.split.as_deref()).map_err(|splits| HubError::NoSplit {
        name: name.to_string(),
        found: match splits.is_empty() {
            true => "no file of chats".into(),
            false => format!("the splits {}", splits.join(", ")),
        },
    })
}
