//! Time and memory as the system counts them. CPU time, not wall time, is what is reported: it hardly depends on what else runs.

use rustix::fs::{Advice, fadvise};
use rustix::time::{ClockId, clock_gettime};
use std::fs::File;
use std::path::Path;

/// Seconds of a clock that only rises.
fn seconds(clock: ClockId) -> f64 {
    let time = clock_gettime(clock);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// CPU seconds of all threads of this process, in user and system mode.
pub fn process_cpu() -> f64 {
    seconds(ClockId::ProcessCPUTime)
}

/// CPU seconds of this thread, in user and system mode.
pub fn thread_cpu() -> f64 {
    seconds(ClockId::ThreadCPUTime)
}

/// Seconds on the wall.
pub fn wall() -> f64 {
    seconds(ClockId::Monotonic)
}

/// CPU microseconds of one call on this thread.
pub fn cpu_micros<T>(call: impl FnOnce() -> T) -> (f64, T) {
    let start = thread_cpu();
    let out = call();
    ((thread_cpu() - start) * 1e6, out)
}

/// Bytes that this process has made the disk deliver, read-ahead included; nothing where the system does not say.
pub fn disk_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/io").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("read_bytes: "))?;
    line.trim().parse().ok()
}

/// Resident memory of this process in bytes.
pub fn resident_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Writes a file out and asks the system to forget its pages.
pub fn forget(path: &Path) -> std::io::Result<()> {
    let file = File::open(path)?;
    file.sync_all()?;
    fadvise(&file, 0, None, Advice::DontNeed)?;
    Ok(())
}

/// The value below which `share` (0 to 1) of these lie; 0 where there are none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (share * sorted.len().saturating_sub(1) as f64).round() as usize;
    sorted.get(index).copied().unwrap_or_default()
}
