//! Files that appear whole or not at all. Refuses files that must also survive being told apart call by call (stage two's own, `train/files.rs`).

use std::fs::File;
use std::io::{Result, Write};
use std::path::Path;

/// Writes `bytes` beside `path` and renames, durably: whoever looks sees what was there before, or all of them. Whoever may read the folder
/// may read the file.
///
/// Errors: the folder is not there or cannot be written in, a disk that is full or fails.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    // A temporary file is its owner's alone.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))?;
    }
    file.as_file().sync_all()?;
    file.persist(path).map_err(|e| e.error)?;
    // Elsewhere folders cannot be opened, and the rename has to do.
    if cfg!(unix) {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}
