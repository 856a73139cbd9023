//! How much memory there is to plan with.

use candle_core::Device;
use std::path::{Path, PathBuf};

/// Bytes that this process may still take before the system gets into need: what the kernel calls available, or what is left of the
/// control group's limit where that is less. `None` where the system does not say.
pub fn available() -> Option<u64> {
    let free = meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
    Some(group_left().map_or(free, |left| left.min(free)))
}

/// The same of a device's own memory: a GPU's that nobody holds.
pub fn available_on(device: &Device) -> Option<u64> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return crate::cuda::memory(device).ok().map(|memory| memory.free as u64);
    }
    let _ = device;
    available()
}

/// Bytes of memory that this process has now, those of mapped files that it looked at included. `None` where the system does not say.
pub fn resident() -> Option<u64> {
    kibibytes(&std::fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// `MemAvailable` of /proc/meminfo, in bytes.
fn meminfo(text: &str) -> Option<u64> {
    kibibytes(text, "MemAvailable:")
}

/// The bytes of a line `name   N kB`.
fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What is left below the lowest limit of this process's control group and those above it (version 2 of the interface).
fn group_left() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = Path::new("/sys/fs/cgroup");
    let mut folder: PathBuf = root.join(own);
    let mut least: Option<u64> = None;
    while folder.starts_with(root) {
        let number = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
        // Pages of files count as used there, though they go when memory is short.
        if let (Some(most), Some(used)) = (number("memory.max"), number("memory.current")) {
            let left = most.saturating_sub(used.saturating_sub(file_pages(&folder)));
            least = Some(least.map_or(left, |least| least.min(left)));
        }
        if !folder.pop() {
            break;
        }
    }
    least
}

fn file_pages(group: &Path) -> u64 {
    let stat = std::fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let value = |key: &str| stat.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<u64>().ok()).unwrap_or(0);
    value("inactive_file ") + value("active_file ")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn reads_what_is_available() {
        assert_eq!(meminfo("MemTotal:       100 kB\nMemAvailable:    7 kB\n"), Some(7 * 1024));
        assert_eq!(meminfo("MemTotal:       100 kB\n"), None);
        assert_eq!(meminfo("MemAvailable:    7 MB\n"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_says_something() {
        assert!(available().unwrap() > 1 << 20);
        let before = resident().unwrap();
        let touched = vec![1u8; 64 << 20];
        assert!(std::hint::black_box(&touched).len() as u64 + before / 2 < resident().unwrap());
    }
}
