//! A JSON object of a model folder that knows its file: every value is asked for by kind and bounds, and what is wrong is said with
//! file, key, expected and found.

use crate::model::ModelError;
use serde_json::Value;
use std::path::PathBuf;

/// A JSON object that knows its file.
pub(super) struct Object {
    pub(super) value: Value,
    pub(super) file: PathBuf,
}

impl Object {
    pub(super) fn wrong(&self, key: &str, expected: &str, found: &str) -> ModelError {
        ModelError::Config { path: self.file.clone(), key: key.into(), expected: expected.into(), found: found.into() }
    }

    pub(super) fn present(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|v| !v.is_null())
    }

    pub(super) fn size(&self, key: &str, min: usize, max: usize) -> Result<usize, ModelError> {
        let found = self.present(key);
        let number = found.and_then(Value::as_u64).map(|v| v as usize).filter(|v| (min..=max).contains(v));
        number.ok_or_else(|| {
            self.wrong(key, &format!("a whole number from {min} to {max}"), &found.map_or("nothing".into(), Value::to_string))
        })
    }

    pub(super) fn size_or(&self, key: &str, default: usize, min: usize, max: usize) -> Result<usize, ModelError> {
        if self.present(key).is_some() { self.size(key, min, max) } else { Ok(default) }
    }

    pub(super) fn positive(&self, key: &str, default: Option<f64>) -> Result<f64, ModelError> {
        let found = self.present(key);
        let number = found.map_or(default, |v| v.as_f64().filter(|v| *v > 0.0 && v.is_finite()));
        number.ok_or_else(|| self.wrong(key, "a positive number", &found.map_or("nothing".into(), Value::to_string)))
    }

    pub(super) fn flag(&self, key: &str) -> Result<bool, ModelError> {
        match self.present(key) {
            None => Ok(false),
            Some(v) => v.as_bool().ok_or_else(|| self.wrong(key, "true or false", &v.to_string())),
        }
    }
}
