//! Where CUDA's libraries lie on this machine, and opening them once.
//!
//! Folders named in `POTSTILL_CUDA_LIBRARIES` come first, so that whoever names one gets it; then what the system's loader finds; then where
//! pip, conda and NVIDIA's installer put them. Refuses to call anything of CUDA.

use super::bind::{self, Part};
use crate::device::CUDA_LIBRARIES;
use libloading::Library;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::{env, fs};

/// Opens and binds the driver, once a process; later calls give the first one's answer. Error: one sentence about what is missing.
pub(super) fn driver() -> Result<(), String> {
    static OPENED: OnceLock<Result<(), String>> = OnceLock::new();
    OPENED.get_or_init(|| open(Part::Driver)).clone()
}

/// The same for the libraries that compute.
pub(super) fn mathematics() -> Result<(), String> {
    static OPENED: OnceLock<Result<(), String>> = OnceLock::new();
    OPENED.get_or_init(|| open(Part::Blas).and_then(|()| open(Part::Random))).clone()
}

/// The same for NCCL, which only ranks that ask for it need.
pub(super) fn collectives() -> Result<(), String> {
    static OPENED: OnceLock<Result<(), String>> = OnceLock::new();
    OPENED.get_or_init(|| open(Part::Collectives)).clone()
}

fn open(part: Part) -> Result<(), String> {
    let named = env::var_os(CUDA_LIBRARIES).map(|folders| env::split_paths(&folders).collect::<Vec<_>>()).unwrap_or_default();
    let (place, library) = find(part, &named)?;
    bind::bind(part, &library).map_err(|lacking| format!("{place} is too old, it lacks {lacking}"))?;
    // Trampolines point into it until the process ends.
    std::mem::forget(library);
    Ok(())
}

/// The first library that opens, with its place. A file that is there and does not open is the answer: skipping it would hide why.
fn find(part: Part, named: &[PathBuf]) -> Result<(String, Library), String> {
    if let Some(path) = first_file(named, part) {
        return load(&path);
    }
    for file in part.files() {
        // SAFETY: running the initialisers of NVIDIA's libraries is what a program linked to them would do at its start.
        if let Ok(library) = unsafe { Library::new(*file) } {
            return Ok((file.to_string(), library));
        }
    }
    // The driver's own library comes with it, never with a package.
    let packed = if part == Part::Driver { None } else { first_file(&usual_folders(), part) };
    load(&packed.ok_or_else(|| missing(part))?)
}

/// What is said of a library that is nowhere.
fn missing(part: Part) -> String {
    let file = part.files()[0];
    let how = match part {
        Part::Driver => return format!("{file} was not found, so no NVIDIA driver is installed here"),
        Part::Blas | Part::Random => {
            "install CUDA's libraries (pip install nvidia-cublas nvidia-curand) or name their folders in"
        }
        Part::Collectives => "install NCCL (pip install nvidia-nccl-cu13, or -cu12) or name its folder in",
    };
    format!("{file} was not found; {how} {CUDA_LIBRARIES}")
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
        let said = std::error::Error::source(&e).unwrap_or(&e).to_string();
        let why = said.trim_start_matches(&*path.to_string_lossy()).trim_start_matches(": ");
        format!("{} cannot be loaded: {why}", path.display())
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
    let below = prefixes.iter().flat_map(|prefix| folders_below(prefix));
    below.chain([PathBuf::from("/usr/local/cuda/lib64")]).collect()
}

/// The folders below the prefix of a python, or of conda, that may hold the libraries: of NVIDIA's wheels for CUDA 13 and 12, then `lib`.
fn folders_below(prefix: &Path) -> Vec<PathBuf> {
    let lib = prefix.join("lib");
    let entries = fs::read_dir(&lib).into_iter().flatten().flatten();
    let pythons = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("python3")).map(|entry| entry.path());
    let packages = pythons.flat_map(|python| ["site-packages", "dist-packages"].map(|kind| python.join(kind).join("nvidia")));
    let wheels = packages.flat_map(|nvidia| ["cu13", "cublas", "curand", "nccl"].map(|wheel| nvidia.join(wheel).join("lib")));
    wheels.filter(|folder| folder.is_dir()).chain([lib.clone()]).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Were it passed over, the loader's own library would be opened, or said to be missing, and nobody would know why.
    #[test]
    fn a_named_folder_comes_first_and_is_not_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("libcuda.so.1");
        fs::write(&file, "no library").unwrap();
        let Err(why) = find(Part::Driver, &["/nowhere".into(), folder.path().into()]) else {
            panic!("text was opened as a library")
        };
        assert_eq!(why, format!("{} cannot be loaded: file too short", file.display()));
    }

    #[test]
    fn wheels_are_found_beside_a_python() {
        let prefix = tempfile::tempdir().unwrap();
        let wheel = prefix.path().join("lib/python3.12/site-packages/nvidia/cu13/lib");
        fs::create_dir_all(&wheel).unwrap();
        fs::create_dir_all(prefix.path().join("lib/perl5/site-packages/nvidia/cu13/lib")).unwrap();
        fs::write(wheel.join("libcublas.so.13"), "").unwrap();
        let folders = folders_below(prefix.path());
        assert_eq!(folders, [wheel.clone(), prefix.path().join("lib")]);
        assert_eq!(first_file(&folders, Part::Blas), Some(wheel.join("libcublas.so.13")));
        assert_eq!(first_file(&folders, Part::Random), None);
    }

    #[test]
    fn what_is_missing_is_said_with_what_helps() {
        let said = missing(Part::Collectives);
        assert_eq!(
            said,
            "libnccl.so.2 was not found; install NCCL (pip install nvidia-nccl-cu13, or -cu12) or name its folder in POTSTILL_CUDA_LIBRARIES"
        );
        assert!(missing(Part::Driver).ends_with("no NVIDIA driver is installed here"));
    }
}
