//! Where CUDA's libraries lie on this machine, and opening them once.
//!
//! Folders named in `POTSTILL_CUDA_LIBRARIES` come first, so that whoever names one gets it; then what the system's loader finds; then where
//! pip, conda and NVIDIA's installer put them. Refuses to call anything of CUDA.

use super::bind::{self, Part};
use libloading::Library;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{env, fs};

/// Folders to search first, separated by colons.
pub(super) const FOLDERS: &str = "POTSTILL_CUDA_LIBRARIES";

/// Opens and binds all libraries, once a process; later calls give the first one's answer. Error: one sentence about what is missing.
pub(super) fn open() -> Result<(), String> {
    static OPENED: OnceLock<Result<(), String>> = OnceLock::new();
    OPENED.get_or_init(|| [Part::Driver, Part::Blas, Part::Random].into_iter().try_for_each(open_part)).clone()
}

fn open_part(part: Part) -> Result<(), String> {
    let (place, library) = find(part)?;
    bind::bind(part, &library).map_err(|lacking| format!("{place} is too old, it lacks {lacking}"))?;
    // Trampolines point into it until the process ends.
    std::mem::forget(library);
    Ok(())
}

/// The first library that opens, with its place. A file that is there and does not open is the answer: skipping it would hide why.
fn find(part: Part) -> Result<(String, Library), String> {
    let named = env::var_os(FOLDERS).map(|folders| env::split_paths(&folders).collect::<Vec<_>>()).unwrap_or_default();
    if let Some(path) = first_file(&named, part) {
        return load(&path);
    }
    for file in part.files() {
        // SAFETY: running the initialisers of NVIDIA's libraries is what a program linked to them would do at its start.
        if let Ok(library) = unsafe { Library::new(*file) } {
            return Ok((file.to_string(), library));
        }
    }
    // The driver's library comes with the driver, never with a package.
    if part != Part::Driver
        && let Some(path) = first_file(&usual_folders(), part)
    {
        return load(&path);
    }
    Err(match part {
        Part::Driver => format!("{} was not found, so no NVIDIA driver is installed here", part.files()[0]),
        _ => format!(
            "{} was not found; install CUDA 13's libraries (pip install nvidia-cublas nvidia-curand) or name their folders in {FOLDERS}",
            part.files()[0]
        ),
    })
}

fn first_file(folders: &[PathBuf], part: Part) -> Option<PathBuf> {
    folders.iter().flat_map(|folder| part.files().iter().map(|file| folder.join(file))).find(|path| path.is_file())
}

fn load(path: &Path) -> Result<(String, Library), String> {
    // cuBLAS asks for this one by name; where it is loaded already, the loader need not find it.
    static BESIDE: [&str; 2] = ["libcublasLt.so.13", "libcublasLt.so.12"];
    if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libcublas.")) {
        for other in BESIDE.map(|name| path.with_file_name(name)).iter().filter(|other| other.is_file()) {
            // SAFETY: as below. Where it does not open, the library that needs it says so.
            unsafe { Library::new(other) }.into_iter().for_each(std::mem::forget);
        }
    }
    // SAFETY: running the initialisers of NVIDIA's libraries is what a program linked to them would do at its start.
    let opened = unsafe { Library::new(path) };
    opened.map(|library| (path.display().to_string(), library)).map_err(|e| {
        let mut said = e.to_string();
        if let Some(cause) = std::error::Error::source(&e) {
            said = cause.to_string();
        }
        format!("{} cannot be loaded: {said}", path.display())
    })
}

/// Where pip, conda and NVIDIA's installer put libraries, as far as it is cheap to know.
fn usual_folders() -> Vec<PathBuf> {
    let mut prefixes: Vec<PathBuf> = ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(env::var_os).map(PathBuf::from).collect();
    let path = env::var_os("PATH").unwrap_or_default();
    for python in env::split_paths(&path).map(|folder| folder.join("python3")).filter(|python| python.is_file()) {
        // A virtual environment's python is a link to another one; either may have the packages.
        for python in [Some(python.clone()), fs::canonicalize(&python).ok()].into_iter().flatten() {
            prefixes.extend(python.parent().and_then(Path::parent).map(Path::to_path_buf));
        }
    }
    let mut folders = Vec::new();
    for prefix in &prefixes {
        folders.extend(packages(prefix).iter().flat_map(|packages| wheels(packages)));
        folders.push(prefix.join("lib"));
    }
    folders.push("/usr/local/cuda/lib64".into());
    folders
}

/// The package folders of a python below a prefix, pip's and Debian's.
fn packages(prefix: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(prefix.join("lib")) else { return Vec::new() };
    let pythons = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"));
    pythons
        .flat_map(|python| ["site-packages", "dist-packages"].map(|kind| python.path().join(kind)))
        .filter(|p| p.is_dir())
        .collect()
}

/// The folders of NVIDIA's wheels for CUDA 13 and 12 that hold the libraries in question.
fn wheels(packages: &Path) -> [PathBuf; 3] {
    ["cu13", "cublas", "curand"].map(|wheel| packages.join("nvidia").join(wheel).join("lib"))
}
