//! The command line of potstill: `main` → one verb → one line of outcome.
//!
//! Owns what belongs to the process: the allocator, signals, panics and the exit code. Refuses to know a tensor.

mod cli;
mod cluster;
mod commands;
mod config;
mod exit;
mod print;
mod progress;
mod settings;
mod text;

use std::process::ExitCode;

/// Tensors above 32 MB would go back to the system after each use; keeping them makes a forward pass 1.6 times as fast.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    calm_the_tensor_library();
    exit::record_panics();
    let invocation = cli::parse();
    exit::conclude(std::panic::catch_unwind(|| commands::run(invocation)))
}

/// Turns off the tensor library's own spinning threads unless the user asked for a number of them.
///
/// Its element-wise pool spins at a barrier, which on a shared machine costs several times the work itself; the pipeline
/// brings its own parallelism.
fn calm_the_tensor_library() {
    const THREADS: &str = "CANDLE_NUM_THREADS";
    if std::env::var_os(THREADS).is_none() {
        // SAFETY: this is the first statement of `main`; no other thread exists that could read the environment meanwhile.
        unsafe { std::env::set_var(THREADS, "1") };
    }
}
