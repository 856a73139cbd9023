//! What the feature `cuda` needs before anything is compiled: our kernels, and empty libraries to link to.
//!
//! Refuses to look for CUDA in a build without the feature. The tensor library's crates ask the linker for CUDA's libraries by name;
//! archives without members satisfy that, and `src/cuda/bind.rs` brings the functions, from the real libraries, when a GPU is asked for.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs, io};

/// What the tensor library's crates name to the linker.
const LINKED: [&str; 7] = ["cuda", "cudart", "cublas", "cublasLt", "curand", "nccl", "nvrtc"];

/// Machine code for Hopper, with the instructions that are Hopper's alone.
const MACHINE_CODE: [&str; 2] = ["-cubin", "-gencode=arch=compute_90a,code=sm_90a"];

/// PTX, which every GPU of compute capability 8.0 and newer has its driver compile.
const PTX: [&str; 2] = ["-ptx", "-gencode=arch=compute_80,code=compute_80"];

/// The version that PTX is marked with: CUDA 12.0's. nvcc marks it with its own, which older drivers refuse whatever it holds.
const PTX_VERSION: &str = "8.0";

/// Variables that name nvcc, the first that is set wins.
const NVCC: [&str; 2] = ["KERNEL_NVCC", "NVCC"];

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
    compile_kernels(Path::new("kernels"), &out)?;
    for library in LINKED {
        let file = out.join(format!("lib{library}.a"));
        fs::write(&file, b"!<arch>\n").map_err(|e| format!("{}: {e}", file.display()))?;
    }
    println!("cargo::rustc-link-search=native={}", out.display());
    Ok(())
}

/// Compiles `all.cu` of a folder to `kernels.cubin` and `kernels.ptx`, and has cargo look at every source beside it.
fn compile_kernels(folder: &Path, out: &Path) -> Result<(), String> {
    let unreadable = |e: io::Error| format!("{}: {e}", folder.display());
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|ending| ["cu", "cuh", "h"].iter().any(|known| ending == *known)) {
            println!("cargo::rerun-if-changed={}", path.display());
        }
    }
    const OPTIONS: [&str; 3] = ["-std=c++17", "-O3", "-lineinfo"];
    let (nvcc, source, ptx) = (nvcc(), folder.join("all.cu"), out.join("kernels.ptx"));
    run(Command::new(&nvcc).args(MACHINE_CODE).args(OPTIONS).arg("-o").arg(out.join("kernels.cubin")).arg(&source))?;
    run(Command::new(&nvcc).args(PTX).args(OPTIONS).arg("-o").arg(&ptx).arg(&source))?;
    let failed = |e: io::Error| format!("{}: {e}", ptx.display());
    let text = fs::read_to_string(&ptx).map_err(failed)?;
    fs::write(&ptx, marked_older(&text).ok_or_else(|| format!("{} names no version", ptx.display()))?).map_err(failed)?;
    // The assembler refuses what is newer than the mark.
    run(Command::new(&nvcc).args(["-cubin", "-arch=sm_80", "-Xptxas=-O0", "-o"]).arg(out.join("tried.cubin")).arg(&ptx))
}

/// PTX with `PTX_VERSION` in the place of its own version.
fn marked_older(ptx: &str) -> Option<String> {
    let start = ptx.lines().find(|line| line.starts_with(".version "))?;
    Some(ptx.replacen(start, &format!(".version {PTX_VERSION}"), 1))
}

fn run(nvcc: &mut Command) -> Result<(), String> {
    let name = nvcc.get_program().to_string_lossy().into_owned();
    let ran = nvcc
        .output()
        .map_err(|e| format!("{name}: {e}; the feature cuda is built with nvcc (scripts/build-cuda.sh fetches one)"))?;
    if ran.status.success() {
        return Ok(());
    }
    let said = [ran.stdout, ran.stderr].concat();
    Err(format!("{name} cannot compile the kernels: {}", String::from_utf8_lossy(&said).trim().replace('\n', " | ")))
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
