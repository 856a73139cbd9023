//! What a file system has left.

use std::path::Path;

/// Bytes that may still be written where `dir` lies; `None` where the system does not say.
pub fn free_bytes(dir: &Path) -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        let stat = rustix::fs::statvfs(dir).ok()?;
        stat.f_bavail.checked_mul(stat.f_frsize)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = dir;
        None
    }
}
