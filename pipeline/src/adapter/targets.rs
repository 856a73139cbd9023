//! Owns which projections carry an adapter: `all`, or some of the seven by name. Refuses names that no layer has, and none at all.

use crate::model::layer::PROJECTIONS;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The last parts of [`PROJECTIONS`], in their order: what PEFT's `target_modules` names.
pub const MODULES: [&str; PROJECTIONS.len()] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
/// The word for all of them.
pub const ALL_MODULES: &str = "all";

/// Which of [`MODULES`] carry an adapter, in every layer alike. As text `all`, or names separated by commas; never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TargetModules([bool; MODULES.len()]);

/// Modules that cannot be adapted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected}, found {found}")]
pub struct WrongModules {
    /// What there is.
    pub expected: String,
    /// What was asked for.
    pub found: String,
}

impl TargetModules {
    /// All seven.
    pub const ALL: Self = Self([true; MODULES.len()]);

    /// The modules of these names, or all by [`ALL_MODULES`] alone. Errors: an unknown name, or none at all.
    pub fn of<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Self, WrongModules> {
        let names: Vec<&str> = names.into_iter().collect();
        if names == [ALL_MODULES] {
            return Ok(Self::ALL);
        }
        let mut chosen = [false; MODULES.len()];
        for name in &names {
            match MODULES.iter().zip(&mut chosen).find(|(module, _)| *module == name) {
                Some((_, chosen)) => *chosen = true,
                None => return Err(wrong(format!("{name:?}"))),
            }
        }
        if names.is_empty() { Err(wrong("none".into())) } else { Ok(Self(chosen)) }
    }

    /// Whether projection `i` of [`PROJECTIONS`] is one of them.
    pub fn contains(&self, i: usize) -> bool {
        self.0.get(i).copied().unwrap_or(false)
    }

    /// Their names, in the order of [`MODULES`].
    pub fn names(&self) -> Vec<&'static str> {
        MODULES.into_iter().zip(self.0).filter_map(|(name, chosen)| chosen.then_some(name)).collect()
    }
}

fn wrong(found: String) -> WrongModules {
    WrongModules { expected: format!("{ALL_MODULES}, or some of {}", MODULES.join(", ")), found }
}

impl Default for TargetModules {
    fn default() -> Self {
        Self::ALL
    }
}

impl std::fmt::Display for TargetModules {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if *self == Self::ALL { f.write_str(ALL_MODULES) } else { f.write_str(&self.names().join(",")) }
    }
}

impl Serialize for TargetModules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if *self == Self::ALL {
            return serializer.serialize_str(ALL_MODULES);
        }
        let names = self.names();
        let mut list = serializer.serialize_seq(Some(names.len()))?;
        names.iter().try_for_each(|name| list.serialize_element(name))?;
        list.end()
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = TargetModules;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of module names, or text that separates them by commas")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<TargetModules, E> {
                TargetModules::of(text.split(',').map(str::trim)).map_err(E::custom)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<TargetModules, A::Error> {
                let mut names: Vec<String> = Vec::new();
                while let Some(name) = list.next_element()? {
                    names.push(name);
                }
                TargetModules::of(names.iter().map(String::as_str)).map_err(A::Error::custom)
            }
        }
        deserializer.deserialize_any(Names)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use serde_json::json;

    fn read(value: serde_json::Value) -> Result<TargetModules, String> {
        serde_json::from_value(value).map_err(|e| e.to_string())
    }

    #[test]
    fn modules_are_the_last_parts_of_projections() {
        assert_eq!(PROJECTIONS.map(|p| p.split_once('.').unwrap().1), MODULES);
    }

    #[test]
    fn lists_and_text_mean_the_same_and_come_back() {
        let two = read(json!(["v_proj", "q_proj"])).unwrap();
        assert_eq!(read(json!("v_proj, q_proj")), Ok(two));
        assert_eq!((two.names(), two.to_string()), (vec!["q_proj", "v_proj"], "q_proj,v_proj".to_string()));
        assert_eq!((0..8).map(|i| two.contains(i)).collect::<Vec<_>>(), [true, false, true, false, false, false, false, false]);
        assert_eq!(read(serde_json::to_value(two).unwrap()), Ok(two));
        for all in [json!("all"), json!(["all"]), json!(MODULES), json!(MODULES.join(","))] {
            assert_eq!(read(all), Ok(TargetModules::ALL));
        }
        assert_eq!(serde_json::to_value(TargetModules::ALL).unwrap(), json!("all"));
    }

    #[test]
    fn what_no_layer_has_is_refused() {
        for (value, word) in [
            (json!("lm_head"), "\"lm_head\""),
            (json!(["q_proj", "all"]), "\"all\""),
            (json!([]), "found none"),
            (json!(""), "\"\""),
            (json!(7), "a list of module names"),
        ] {
            let error = read(value).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }
}
