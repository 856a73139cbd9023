//! Owns the safetensors files of a model folder: finds them, maps them, and hands out tensors whose place, dtype and
//! shape were checked. Refuses to interpret names, to convert dtypes, and to believe a header or an index.
//!
//! The one idea: a file's header is bounded before anything parses it, every tensor's bytes are known to lie inside the
//! mapped file before anybody asks for them, and whoever asks says which dtype and shape is expected.

mod files;

pub(crate) use files::{ADAPTER_NAME, INDEX_NAME, MAX_INDEX_BYTES, SINGLE_NAME, contained};

use super::ModelError;
use crate::run::RunContext;
use bytes::Bytes;
use candle_core::{DType, Device, Tensor};
use files::MappedFile;
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Bytes hashed between two looks at the stop flag.
const FINGERPRINT_STEP: usize = 16 << 20;
/// Names spelled out when several tensors are wrong at once.
const NAMES_SHOWN: usize = 8;

/// The tensors of a model folder, memory-mapped.
#[derive(Debug)]
pub struct Weights {
    /// The folder, or the file when a single file was opened.
    place: PathBuf,
    /// Sorted by name.
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, Entry>,
}

/// How a tensor is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Stored element type.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
}

/// Where a tensor lies: `files[file].bytes()[start..end]`, checked when the file was opened.
#[derive(Debug)]
struct Entry {
    file: usize,
    info: TensorInfo,
    start: usize,
    end: usize,
}

impl Weights {
    /// Opens a Hugging Face model folder: `model.safetensors`, else `model.safetensors.index.json` and the files it names,
    /// else the only other `*.safetensors` in it.
    ///
    /// Errors: no such folder or no weights in it, a file that leads out of the folder, a header or index beyond the limits of
    /// `files.rs` or malformed, a file shorter or longer than its header says, a tensor in two files, an index naming a
    /// tensor that the file lacks.
    pub fn open(folder: &Path) -> Result<Weights, ModelError> {
        let found = files::find(folder)?;
        let mut weights = Weights { place: folder.to_path_buf(), files: Vec::new(), tensors: BTreeMap::new() };
        for (name, path) in &found.files {
            weights.add(name, path)?;
        }
        weights.check_index(&found)?;
        Ok(weights)
    }

    /// Opens one safetensors file. Errors as in [`open`](Self::open).
    pub fn open_file(path: &Path) -> Result<Weights, ModelError> {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let mut weights = Weights { place: path.to_path_buf(), files: Vec::new(), tensors: BTreeMap::new() };
        weights.add(&name, path)?;
        Ok(weights)
    }

    /// The folder or file that was opened.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// All tensor names, in byte order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// How a tensor is stored, `None` when there is none of this name.
    pub fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|entry| entry.info.clone())
    }

    /// Bytes of all files, headers included.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes().len() as u64).sum()
    }

    /// The little-endian bytes of a tensor, row-major, borrowed from the mapped file.
    ///
    /// Errors: no such tensor, or another dtype or shape than expected.
    pub fn bytes(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&[u8], ModelError> {
        let (entry, bytes) = self.stored(name)?;
        if entry.info.dtype != dtype || entry.info.shape != shape {
            return Err(self.mismatch(name, entry, format!("{dtype:?} {shape:?}")));
        }
        Ok(bytes)
    }

    /// The same, to be kept: the file stays mapped as long as anybody holds some of its bytes.
    pub fn shared(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<Bytes, ModelError> {
        self.bytes(name, dtype, shape)?;
        self.extent(name).map(|(file, range)| file.bytes().slice(range)).ok_or_else(|| self.missing(name))
    }

    /// Brings tensors into memory, waiting for the disk. Names that are not there are passed over.
    pub fn populate<'a>(&self, names: impl IntoIterator<Item = &'a str>) {
        names.into_iter().filter_map(|name| self.extent(name)).for_each(|(file, range)| file.populate(range));
    }

    /// Lets go of tensors' pages: they no longer count as this process's memory, and are read again when they are needed.
    pub fn release<'a>(&self, names: impl IntoIterator<Item = &'a str>) {
        names.into_iter().filter_map(|name| self.extent(name)).for_each(|(file, range)| file.release(range));
    }

    /// A copy of a float tensor on `device` in its stored dtype (f32, f16 or bf16).
    ///
    /// Errors: no such tensor, another shape than expected, a dtype that is none of the three, or a device that is full.
    pub fn tensor(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor, ModelError> {
        let (entry, bytes) = self.stored(name)?;
        let dtype = match entry.info.dtype {
            Dtype::F32 => Some(DType::F32),
            Dtype::F16 => Some(DType::F16),
            Dtype::BF16 => Some(DType::BF16),
            _ => None,
        };
        match dtype {
            Some(dtype) if entry.info.shape == shape => Tensor::from_raw_buffer(bytes, dtype, shape, device)
                .map_err(|source| ModelError::TensorCopy { name: name.to_string(), source: source.into() }),
            _ => Err(self.mismatch(name, entry, format!("F32, F16 or BF16 {shape:?}"))),
        }
    }

    /// Checks that every named tensor is there with its shape; one error lists all that are missing or misshapen.
    pub fn require(&self, expected: &[(String, Vec<usize>)]) -> Result<(), ModelError> {
        let wrong: Vec<String> = expected
            .iter()
            .filter_map(|(name, shape)| match self.tensors.get(name) {
                None => Some(format!("{name} missing (expected {shape:?})")),
                Some(entry) if entry.info.shape != *shape => {
                    Some(format!("{name} is {:?} (expected {shape:?})", entry.info.shape))
                }
                Some(_) => None,
            })
            .collect();
        if wrong.is_empty() {
            return Ok(());
        }
        let mut list = wrong[..wrong.len().min(NAMES_SHOWN)].join("; ");
        if wrong.len() > NAMES_SHOWN {
            list.push_str(&format!("; and {} more", wrong.len() - NAMES_SHOWN));
        }
        Err(ModelError::TensorsWrong { place: self.place.clone(), wrong: wrong.len(), asked: expected.len(), list })
    }

    /// BLAKE3 (hex) over the files' names and contents in order of name: the weights' identity wherever the folder lies.
    ///
    /// Counts bytes in a phase of `context.progress`. Errors: a stop was asked for.
    pub fn fingerprint(&self, context: &RunContext) -> Result<String, ModelError> {
        context.progress.begin("hashing weights", "bytes", self.total_bytes());
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"potstill weights v1\0");
        for file in &self.files {
            hasher.update(&(file.name().len() as u64).to_le_bytes());
            hasher.update(file.name().as_bytes());
            hasher.update(&(file.bytes().len() as u64).to_le_bytes());
            for (number, step) in file.bytes().chunks(FINGERPRINT_STEP).enumerate() {
                if context.stopping() {
                    return Err(ModelError::Stopped { place: self.place.clone() });
                }
                hasher.update_rayon(step);
                file.release(number * FINGERPRINT_STEP..number * FINGERPRINT_STEP + step.len());
                context.progress.add(step.len() as u64);
            }
        }
        context.progress.end();
        Ok(hasher.finalize().to_hex().to_string())
    }

    fn extent(&self, name: &str) -> Option<(&MappedFile, Range<usize>)> {
        let entry = self.tensors.get(name)?;
        Some((self.files.get(entry.file)?, entry.start..entry.end))
    }

    fn missing(&self, name: &str) -> ModelError {
        ModelError::TensorMissing { place: self.place.clone(), name: name.to_string() }
    }

    fn stored(&self, name: &str) -> Result<(&Entry, &[u8]), ModelError> {
        let entry = self.tensors.get(name);
        let bytes = entry.and_then(|e| self.files.get(e.file)?.bytes().get(e.start..e.end));
        match (entry, bytes) {
            (Some(entry), Some(bytes)) => Ok((entry, bytes)),
            _ => Err(self.missing(name)),
        }
    }

    fn mismatch(&self, name: &str, entry: &Entry, expected: String) -> ModelError {
        let path = self.files.get(entry.file).map_or_else(|| self.place.clone(), |file| file.path().to_path_buf());
        let found = format!("{:?} {:?}", entry.info.dtype, entry.info.shape);
        ModelError::TensorMismatch { path, name: name.to_string(), expected, found }
    }

    fn add(&mut self, name: &str, path: &Path) -> Result<(), ModelError> {
        let (file, tensors) = MappedFile::open(name, path)?;
        let number = self.files.len();
        for (tensor, info, range) in tensors {
            if let Some(first) = self.tensors.get(&tensor) {
                let first = self.files.get(first.file).map(|f| f.name().to_string()).unwrap_or_default();
                return Err(ModelError::TensorTwice { path: path.to_path_buf(), name: tensor, first });
            }
            self.tensors.insert(tensor, Entry { file: number, info, start: range.start, end: range.end });
        }
        self.files.push(file);
        Ok(())
    }

    fn check_index(&self, found: &files::Found) -> Result<(), ModelError> {
        for (tensor, file) in &found.listed {
            let holder = self.tensors.get(tensor).and_then(|entry| self.files.get(entry.file));
            if holder.is_none_or(|holder| holder.name() != file) {
                let why = format!("tensor {tensor:?} is said to be in {file:?}, which lacks it");
                return Err(ModelError::WeightsIndex { path: found.index.clone(), why });
            }
        }
        Ok(())
    }
}
