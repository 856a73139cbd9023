//! The files of benchmarks: rows in, as a JSON array or one object a line, with the place of what is wrong; whole files out, by rename.

use super::judge::JudgeError;
use crate::whole_file;
use serde::de::DeserializeOwned;
use std::path::Path;

/// Longest file read, in bytes. The largest of AlpacaEval's own is 4 MB.
const MAX_BYTES: u64 = 1 << 30;

/// The whole file as text.
pub(crate) fn text(path: &Path) -> Result<String, JudgeError> {
    let bytes = crate::bounded::read(path, MAX_BYTES).map_err(JudgeError::io(path))?;
    String::from_utf8(bytes)
        .map_err(|e| wrong(path, String::new(), "text in UTF-8", format!("a wrong byte at {}", e.utf8_error().valid_up_to())))
}

/// The rows of a JSON array, or of a file with one JSON object a line (empty lines do not count).
pub(crate) fn rows<T: DeserializeOwned>(path: &Path, expected: &str) -> Result<Vec<T>, JudgeError> {
    let text = text(path)?;
    let rows: Vec<T> = if text.trim_start().starts_with('[') {
        let values: Vec<serde_json::Value> =
            serde_json::from_str(&text).map_err(|e| wrong(path, String::new(), "a JSON array of objects", e.to_string()))?;
        let row =
            |(i, value)| serde_json::from_value(value).map_err(|e| wrong(path, format!(", row {i}"), expected, e.to_string()));
        values.into_iter().enumerate().map(row).collect::<Result<_, _>>()?
    } else {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let row = |(i, line): (usize, &str)| {
            serde_json::from_str(line).map_err(|e| wrong(path, format!(", line {}", i + 1), expected, e.to_string()))
        };
        lines.map(row).collect::<Result<_, _>>()?
    };
    if rows.is_empty() {
        return Err(wrong(path, String::new(), expected, "no row".into()));
    }
    Ok(rows)
}

/// What is wrong where.
pub(crate) fn wrong(path: &Path, place: String, expected: &str, found: String) -> JudgeError {
    JudgeError::File { path: path.to_path_buf(), place, expected: expected.to_string(), found }
}

/// Writes a file that appears whole, by rename, and durably.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), JudgeError> {
    whole_file::write(path, bytes).map_err(JudgeError::io(path))
}

/// Rows as one JSON object a line.
pub(crate) fn lines(rows: &[impl serde::Serialize]) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut bytes, row)?;
        bytes.push(b'\n');
    }
    Ok(bytes)
}

/// Writes `value` as JSON for people too, as [`write`] does.
pub(crate) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), JudgeError> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|e| JudgeError::io(path)(e.into()))?;
    bytes.push(b'\n');
    write(path, &bytes)
}
