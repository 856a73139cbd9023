//! The command line of potstill: `main` → one verb → one line of outcome.
//!
//! Owns what belongs to the process: the allocator, signals, panics and the exit code. Refuses to know a tensor.

mod cli;
mod cluster;
mod commands;
mod config;
mod exit;
mod ink;
mod plot;
mod print;
mod progress;
mod ranks;
mod settings;
mod text;

use std::process::ExitCode;

/// Tensors above 32 MB would go back to the system after each use; keeping them makes a forward pass 1.6 times as fast.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    calm_the_tensor_library();
    keep_freed_memory();
    exit::record_panics();
    let invocation = cli::parse();
    exit::conclude(std::panic::catch_unwind(|| commands::run(invocation)))
}

/// Has the allocator keep what is freed for the next layer or step, unless the user asked for something else.
///
/// A pass frees and asks for the same gigabytes again and again; given back to the system in between, every page comes back cleared, at
/// 5 to 13 parts in a hundred of a training step.
fn keep_freed_memory() {
    const NEVER: std::ffi::c_long = -1;
    if std::env::var_os("MIMALLOC_PURGE_DELAY").is_none() {
        // SAFETY: sets a number in the allocator's own table, at a place that it has (a test holds the place).
        unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, NEVER) };
    }
}

/// The allocator's `mi_option_purge_delay`, which its crate does not name: the one before `mi_option_use_numa_nodes`.
const PURGE_DELAY: libmimalloc_sys::mi_option_t = libmimalloc_sys::mi_option_use_numa_nodes - 1;

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

#[cfg(test)]
mod tests {
    use super::PURGE_DELAY;

    /// Were it another option's place, it would have another default: 1,000 ms in this allocator, and in no neighbour.
    #[test]
    fn the_option_is_the_purge_delay() {
        if std::env::var_os("MIMALLOC_PURGE_DELAY").is_none() {
            // SAFETY: reads the allocator's own table within its bounds.
            let around = [-1, 0, 1].map(|by| unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY + by) });
            assert_eq!((around[1], around[0] == 1000, around[2] == 1000), (1000, false, false));
        }
    }
}
