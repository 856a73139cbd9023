//! What the feature `cuda` needs before anything is compiled: our kernels as one fatbin, and empty libraries to link to.
//!
//! Refuses to look for CUDA in a build without the feature. The tensor library's crates ask the linker for CUDA's libraries by name;
//! archives without members satisfy that, and `src/cuda/bind.rs` brings the functions, from the real libraries, when a GPU is asked for.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs, io};

/// What the tensor library's crates name to the linker.
const LINKED: [&str; 6] = ["cuda", "cudart", "cublas", "cublasLt", "curand", "nvrtc"];

/// PTX that every newer GPU compiles for itself, and machine code of Hopper with its own instructions.
const TARGETS: [&str; 2] = ["-gencode=arch=compute_80,code=compute_80", "-gencode=arch=compute_90a,code=sm_90a"];

/// Variables that name nvcc, the first that is set wins.
const NVCC: [&str; 2] = ["POTSTILL_NVCC", "NVCC"];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return ExitCode::SUCCESS;
    }
    match prepare() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("cargo::error={why}");
            ExitCode::FAILURE
        }
    }
}

fn prepare() -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets no OUT_DIR")?);
    compile_kernels(Path::new("kernels"), &out.join("kernels.fatbin"))?;
    for library in LINKED {
        let file = out.join(format!("lib{library}.a"));
        fs::write(&file, b"!<arch>\n").map_err(|e| format!("{}: {e}", file.display()))?;
    }
    println!("cargo::rustc-link-search=native={}", out.display());
    Ok(())
}

/// Compiles `all.cu` of a folder, and has cargo look at every source beside it.
fn compile_kernels(folder: &Path, fatbin: &Path) -> Result<(), String> {
    let unreadable = |e: io::Error| format!("{}: {e}", folder.display());
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|ending| ["cu", "cuh", "h"].iter().any(|known| ending == *known)) {
            println!("cargo::rerun-if-changed={}", path.display());
        }
    }
    let nvcc = nvcc();
    let ran = Command::new(&nvcc)
        .args(["-fatbin", "-std=c++17", "-O3", "-lineinfo"])
        .args(TARGETS)
        .arg("-o")
        .arg(fatbin)
        .arg(folder.join("all.cu"))
        .output()
        .map_err(|e| {
            format!("{}: {e}; the feature cuda is built with nvcc 13 (scripts/build-cuda.sh fetches one)", nvcc.display())
        })?;
    if ran.status.success() {
        return Ok(());
    }
    let said = [ran.stdout, ran.stderr].concat();
    Err(format!("{} cannot compile the kernels: {}", nvcc.display(), String::from_utf8_lossy(&said).replace('\n', " | ")))
}

/// The compiler: named, else on the path, else of the toolkit that `CUDA_HOME` names.
fn nvcc() -> PathBuf {
    NVCC.iter().for_each(|name| println!("cargo::rerun-if-env-changed={name}"));
    if let Some(named) = NVCC.iter().find_map(env::var_os) {
        return named.into();
    }
    ["PATH", "CUDA_HOME"].iter().for_each(|name| println!("cargo::rerun-if-env-changed={name}"));
    let folders = env::var_os("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>()).unwrap_or_default();
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin"));
    folders.into_iter().chain(home).map(|folder| folder.join("nvcc")).find(|file| file.is_file()).unwrap_or_else(|| "nvcc".into())
}
