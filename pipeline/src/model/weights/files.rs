//! Owns which files a folder's weights are, and the mapping of each; refuses paths out of the folder and headers or
//! indexes beyond the limits below. Knows nothing of what the tensors mean.
//!
//! The one idea: sizes are compared with the file and with fixed limits before the bytes are parsed, because a header of
//! many empty tensors costs a parser a hundred times its own size in memory.

use super::{ModelError, TensorInfo};
use bytes::Bytes;
use memmap2::Mmap;
use safetensors::SafeTensors;
use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Longest header read, in bytes.
const MAX_HEADER_BYTES: usize = 16 << 20;
/// Most tensors in one file, and most entries of an index.
const MAX_TENSORS: usize = 100_000;
/// Most dimensions of a tensor.
const MAX_DIMENSIONS: usize = 8;
/// Longest index read, in bytes.
pub(crate) const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Most files an index may name.
const MAX_FILES: usize = 10_000;
/// Bytes of the little-endian header length that opens a file.
const LENGTH_BYTES: usize = 8;

/// The smallest page in use.
const PAGE: usize = 4 << 10;

pub(crate) const SINGLE_NAME: &str = "model.safetensors";
pub(crate) const INDEX_NAME: &str = "model.safetensors.index.json";
pub(crate) const ADAPTER_NAME: &str = "adapter_model.safetensors";

/// The files of a folder.
#[derive(Debug)]
pub(super) struct Found {
    /// File name to canonical path.
    pub(super) files: BTreeMap<String, PathBuf>,
    /// The index's path (only for messages; there is none when `listed` is empty).
    pub(super) index: PathBuf,
    /// What the index says: (tensor, file).
    pub(super) listed: Vec<(String, String)>,
}

/// A mapped file whose header was checked.
#[derive(Debug)]
pub(super) struct MappedFile {
    name: String,
    path: PathBuf,
    map: Arc<Mmap>,
    /// The map's bytes, to be shared with whoever computes with them.
    bytes: Bytes,
}

/// A map that [`Bytes`] may own.
struct Shared(Arc<Mmap>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// A tensor's name, dtype and shape, and where its bytes lie in the file.
pub(super) type Placed = (String, TensorInfo, Range<usize>);

impl MappedFile {
    /// Maps a file and reads its header.
    pub(super) fn open(name: &str, path: &Path) -> Result<(MappedFile, Vec<Placed>), ModelError> {
        let io = |source| ModelError::Io { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        if length < LENGTH_BYTES as u64 {
            return Err(header(path, format!("expected at least {LENGTH_BYTES} bytes, found {length}")));
        }
        // SAFETY: the map is only ever read. A file that another process shortens while it is mapped ends this process by
        // SIGBUS; weights are never written in place by us, and the fingerprint covers their contents.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let tensors = read_header(path, &map)?;
        let map = Arc::new(map);
        let bytes = Bytes::from_owner(Shared(Arc::clone(&map)));
        Ok((MappedFile { name: name.to_string(), path: path.to_path_buf(), map, bytes }, tensors))
    }

    /// The file's name in the folder.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Its canonical path.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// All its bytes, header included.
    pub(super) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Brings a stretch into memory, if the system can do it ahead of use; whoever calls waits for the disk.
    pub(super) fn populate(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        let advised = self.map.advise_range(memmap2::Advice::PopulateRead, range.start, range.len());
        #[cfg(not(target_os = "linux"))]
        let advised: std::io::Result<()> = Err(std::io::ErrorKind::Unsupported.into());
        if advised.is_err() {
            // A page is read when it is touched; a system without the advice has at least this.
            let touched: u8 = self.bytes[range].iter().step_by(PAGE).fold(0, |all, byte| all ^ byte);
            std::hint::black_box(touched);
        }
    }

    /// Lets go of a stretch: its pages no longer count as this process's memory, and are read again when they are touched.
    pub(super) fn release(&self, range: Range<usize>) {
        // SAFETY: the map is of a file and is never written, so a page that was let go comes back with the same bytes. What the
        // system says to an advice changes nothing.
        #[cfg(unix)]
        let _ = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len()) };
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Finds a folder's weight files.
pub(super) fn find(folder: &Path) -> Result<Found, ModelError> {
    let root = folder.canonicalize().map_err(|source| ModelError::Io { path: folder.to_path_buf(), source })?;
    if !root.is_dir() {
        return Err(ModelError::WeightsMissing { folder: folder.to_path_buf(), why: "it is not a folder".into() });
    }
    let index = root.join(INDEX_NAME);
    let mut listed = Vec::new();
    let names = if root.join(SINGLE_NAME).is_file() {
        BTreeSet::from([SINGLE_NAME.to_string()])
    } else if index.is_file() {
        listed = read_index(&contained(&root, INDEX_NAME)?)?;
        listed.iter().map(|(_, file)| file.clone()).collect()
    } else {
        BTreeSet::from([only_other(&root)?])
    };
    if names.len() > MAX_FILES {
        return Err(ModelError::WeightsIndex {
            path: index,
            why: format!("it names {} files, at most {MAX_FILES} are read", names.len()),
        });
    }
    let mut files = BTreeMap::new();
    for name in names {
        let path = contained(&root, &name)?;
        files.insert(name, path);
    }
    Ok(Found { files, index, listed })
}

/// The canonical path of `root/name`, which must lie in `root` or, for a snapshot of a Hugging Face cache, be one of the blobs that
/// its links lead to. `root` is canonical.
pub(crate) fn contained(root: &Path, name: &str) -> Result<PathBuf, ModelError> {
    let asked = root.join(name);
    let path = asked.canonicalize().map_err(|source| ModelError::Io { path: asked.clone(), source })?;
    if crate::hub::holds(root, &path) {
        return Ok(path);
    }
    Err(ModelError::WeightsOutside { path: asked, leads_to: path })
}

/// The only `*.safetensors` of a folder that has neither of the usual names.
fn only_other(root: &Path) -> Result<String, ModelError> {
    let io = |source| ModelError::Io { path: root.to_path_buf(), source };
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(root).map_err(io)? {
        let name = entry.map_err(io)?.file_name();
        if let Some(name) = name.to_str().filter(|n| n.ends_with(".safetensors") && *n != ADAPTER_NAME) {
            names.insert(name.to_string());
        }
    }
    match (names.len(), names.pop_first()) {
        (1, Some(name)) => Ok(name),
        (n, _) => {
            let why = format!("expected {SINGLE_NAME}, {INDEX_NAME} or exactly one other .safetensors file, found {n} others");
            Err(ModelError::WeightsMissing { folder: root.to_path_buf(), why })
        }
    }
}

/// Reads an index: (tensor, file) pairs with plain file names.
fn read_index(path: &Path) -> Result<Vec<(String, String)>, ModelError> {
    let io = |source| ModelError::Io { path: path.to_path_buf(), source };
    let bad = |why: String| ModelError::WeightsIndex { path: path.to_path_buf(), why };
    let text = crate::bounded::read(path, MAX_INDEX_BYTES).map_err(io)?;
    let index: Index = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
    if index.weight_map.0.is_empty() {
        return Err(bad("its weight_map names no tensor".into()));
    }
    for (tensor, file) in &index.weight_map.0 {
        if !is_plain(file) {
            return Err(bad(format!("tensor {tensor:?}: expected the plain name of a .safetensors file, found {file:?}")));
        }
    }
    Ok(index.weight_map.0)
}

/// Whether a name is one ordinary path component, so that joining it to a folder cannot leave the folder.
fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let one = matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name);
    one && name.len() <= 255
        && name.ends_with(".safetensors")
        && !name.chars().any(|c| matches!(c, '/' | '\\' | ':') || c.is_control())
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: WeightMap,
}

/// An index's map with its order kept and a repeated tensor refused.
struct WeightMap(Vec<(String, String)>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = WeightMap;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a map from tensor name to file name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let (mut pairs, mut seen) = (Vec::new(), HashSet::new());
                while let Some((tensor, file)) = map.next_entry::<String, String>()? {
                    if !seen.insert(tensor.clone()) {
                        return Err(A::Error::custom(format!("tensor {tensor:?} is listed twice")));
                    }
                    pairs.push((tensor, file));
                    if pairs.len() > MAX_TENSORS {
                        return Err(A::Error::custom(format!("it lists more than {MAX_TENSORS} tensors")));
                    }
                }
                Ok(WeightMap(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

/// Checks a file's header against the limits, then has the safetensors crate parse it and check offsets, sizes and overlaps.
fn read_header(path: &Path, bytes: &[u8]) -> Result<Vec<Placed>, ModelError> {
    let length = bytes.first_chunk::<LENGTH_BYTES>().map(|b| u64::from_le_bytes(*b)).unwrap_or_default();
    if length > MAX_HEADER_BYTES as u64 {
        return Err(header(path, format!("it says it has {length} bytes, at most {MAX_HEADER_BYTES} are read")));
    }
    let data = LENGTH_BYTES + length as usize;
    let Some(text) = bytes.get(LENGTH_BYTES..data) else {
        return Err(header(path, format!("it says it has {length} bytes, but the file has {} in all", bytes.len())));
    };
    let nested = nested_values(text);
    // One value more than tensors: `__metadata__`.
    if nested > MAX_TENSORS + 1 {
        return Err(header(path, format!("it lists {nested} tensors, at most {MAX_TENSORS} are read")));
    }
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| header(path, describe(e, bytes.len())))?;
    let mut placed = Vec::with_capacity(nested);
    for (name, info) in metadata.tensors() {
        if info.shape.len() > MAX_DIMENSIONS {
            let why = format!("tensor {name:?} has {} dimensions, at most {MAX_DIMENSIONS} are read", info.shape.len());
            return Err(header(path, why));
        }
        let range = data + info.data_offsets.0..data + info.data_offsets.1;
        placed.push((name, TensorInfo { dtype: info.dtype, shape: info.shape.clone() }, range));
    }
    Ok(placed)
}

/// Counts the objects and arrays directly inside a JSON object without building anything: one for each tensor.
fn nested_values(text: &[u8]) -> usize {
    let (mut depth, mut count, mut quoted, mut escaped) = (0_usize, 0_usize, false, false);
    for &byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ if quoted => {}
            b'{' | b'[' => {
                count += usize::from(depth == 1);
                depth += 1;
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    count
}

fn header(path: &Path, why: String) -> ModelError {
    ModelError::WeightsHeader { path: path.to_path_buf(), why }
}

/// The parser's verdict in words a user can act on.
fn describe(error: safetensors::SafeTensorError, length: usize) -> String {
    match error {
        safetensors::SafeTensorError::MetadataIncompleteBuffer => {
            format!("its tensors do not end where the file does ({length} bytes): the file is cut short or has bytes too many")
        }
        other => other.to_string(),
    }
}
