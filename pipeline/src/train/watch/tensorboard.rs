//! TensorBoard event files, written by hand: scalars by step, nothing else.
//!
//! A file is a sequence of records, a record is framed bytes of one protobuf message `tensorflow.Event`:
//!
//! ```text
//! record   length u64 LE │ masked CRC-32C of the length, u32 LE │ message │ masked CRC-32C of the message, u32 LE
//! Event    1 wall_time double · 2 step int64 · 3 file_version string │ 5 summary │ 7 session_log { 1 status: START = 1 }
//! summary  1 value (one a scalar) { 1 tag string · 2 simple_value float }
//! ```
//! Each process writes a file of its own, whose name sorts after those that are there. It opens with a START at the first step that it
//! will take: a reader drops every earlier record of that step or a later one, so that what lies beyond a checkpoint is not shown twice.

use crate::Result;
use crate::train::TrainError;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Name of the folder of event files within `out`.
const FOLDER: &str = "tensorboard";
/// What TensorBoard knows event files by; the seconds since 1970 and the host follow.
const PREFIX: &str = "events.out.tfevents.";
/// The version whose readers honour a START.
const FILE_VERSION: &str = "brain.Event:2";
/// Where Linux says the host's name.
const HOST_FILE: &str = "/proc/sys/kernel/hostname";
/// What stands for the host where its name is not known.
const NO_HOST: &str = "localhost";
/// Largest length of a host's name, in bytes.
const HOST_BYTES: usize = 64;
/// Added to a rotated checksum, so that a checksum of bytes that hold checksums says something (TFRecord).
const MASK: u32 = 0xa282_ead8;

/// An open event file.
#[derive(Debug)]
pub(super) struct Board {
    path: PathBuf,
    file: File,
}

impl Board {
    /// Begins a file in `out/tensorboard` for a run whose next step is `next`, counted from 1.
    pub(super) fn create(out: &Path, next: u64) -> Result<Self> {
        let folder = out.join(FOLDER);
        let io = |path: &Path| {
            let path = path.to_path_buf();
            move |source| TrainError::Io { path, source }
        };
        std::fs::create_dir_all(&folder).map_err(io(&folder))?;
        let mut time = since_1970().as_secs();
        for entry in std::fs::read_dir(&folder).map_err(io(&folder))? {
            let name = entry.map_err(io(&folder))?.file_name();
            let digits = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).and_then(|rest| rest.split('.').next());
            // A clock that went back, or two runs in one second.
            if let Some(earlier) = digits.and_then(|digits| digits.parse::<u64>().ok()) {
                time = time.max(earlier.saturating_add(1));
            }
        }
        let path = folder.join(format!("{PREFIX}{time:010}.{}", host()));
        let file = File::options().create_new(true).append(true).open(&path).map_err(io(&path))?;
        let mut board = Self { path, file };
        let mut version = Event::at(0).0;
        text(&mut version, 3, FILE_VERSION);
        let mut start = Event::at(next).0;
        bytes(&mut start, 7, &[1 << 3, 1]);
        board.write(&[record(&version), record(&start)].concat())?;
        Ok(board)
    }

    /// Appends the scalars of a step, as f32.
    pub(super) fn scalars(&mut self, step: u64, scalars: &[(String, f64)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in scalars {
            let mut scalar = Vec::new();
            text(&mut scalar, 1, tag);
            scalar.push(2 << 3 | 5);
            scalar.extend((*value as f32).to_le_bytes());
            bytes(&mut summary, 1, &scalar);
        }
        let mut event = Event::at(step).0;
        bytes(&mut event, 5, &summary);
        self.write(&record(&event))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.file.write_all(bytes).map_err(|source| TrainError::Io { path: self.path.clone(), source })?)
    }
}

/// The beginning of a message.
struct Event(Vec<u8>);

impl Event {
    /// An event of this moment and step.
    fn at(step: u64) -> Self {
        let mut message = vec![1 << 3 | 1];
        message.extend(since_1970().as_secs_f64().to_le_bytes());
        message.push(2 << 3);
        varint(&mut message, step);
        Self(message)
    }
}

/// A number, seven bits a byte, lowest first.
fn varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 1 << 7 {
        message.push(value as u8 | 1 << 7);
        value >>= 7;
    }
    message.push(value as u8);
}

/// A field of length and bytes.
fn bytes(message: &mut Vec<u8>, field: u8, value: &[u8]) {
    message.push(field << 3 | 2);
    varint(message, value.len() as u64);
    message.extend(value);
}

fn text(message: &mut Vec<u8>, field: u8, value: &str) {
    bytes(message, field, value.as_bytes());
}

/// A message in its frame.
fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let mut framed = length.to_vec();
    framed.extend(masked(crc32c(&length)).to_le_bytes());
    framed.extend(message);
    framed.extend(masked(crc32c(message)).to_le_bytes());
    framed
}

fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(MASK)
}

/// CRC-32C (Castagnoli), bit by bit: an event has a few hundred bytes.
fn crc32c(bytes: &[u8]) -> u32 {
    const REVERSED_POLYNOMIAL: u32 = 0x82f6_3b78;
    let step = |crc: u32, _| crc >> 1 ^ (REVERSED_POLYNOMIAL & (crc & 1).wrapping_neg());
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

fn since_1970() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// The host's name as far as it is fit for a file's name.
fn host() -> String {
    let name = std::fs::read_to_string(HOST_FILE).unwrap_or_default();
    let fit: String = name.trim().chars().filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c)).take(HOST_BYTES).collect();
    if fit.is_empty() { NO_HOST.into() } else { fit }
}

#[cfg(test)]
#[path = "tensorboard_tests.rs"]
mod tests;
