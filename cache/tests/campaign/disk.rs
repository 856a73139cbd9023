//! The disk runs full for real: a writer that may make no file larger than so much, and one on a file system of so many bytes where
//! the system lets this test make one. A clean error each time; with room again, the cache is completed byte-identical.

use crate::process::{command, differing, files, mode, reference, scratch, wait};
use potstill_cache::{Cache, Error, ScanProgress, verify};
use std::path::Path;
use std::process::{Command, Stdio};

const ROLE: &str = "process::writer";

/// The writer under `script`, a line of bash that ends in `exec "$@"`.
fn under(script: &str, dir: &Path, number: usize) -> std::process::Output {
    let writer = command(ROLE, dir, number);
    let mut bash = Command::new("bash");
    bash.args(["-c", script, "bash"]).arg(writer.get_program()).args(writer.get_args());
    bash.envs(writer.get_envs().filter_map(|(name, value)| Some((name, value?))));
    bash.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    wait(bash.spawn().unwrap(), script)
}

fn whole_so_far(dir: &Path, what: &str) {
    match Cache::open(dir) {
        Ok(_) => assert!(verify(dir, &ScanProgress::default()).unwrap().is_good(), "{what}"),
        Err(Error::NoManifest { .. } | Error::NoFolder { .. }) => {}
        Err(error) => panic!("{what}: {error}"),
    }
}

fn rerun(dir: &Path, number: usize, what: &str) {
    let ended = wait(command(ROLE, dir, number).spawn().unwrap(), what);
    assert!(ended.status.success(), "{what}: the rerun failed: {}", String::from_utf8_lossy(&ended.stderr));
    assert!(differing(&reference(number), &files(dir)).is_empty(), "{what}");
}

#[test]
fn a_file_that_cannot_grow_is_a_clean_error() {
    let mut stopped = 0;
    for (number, kib) in [1u64, 2, 3, 4, 5, 6, 7, 8].into_iter().enumerate() {
        let parent = scratch();
        let dir = parent.path().join("cache");
        let what = format!("files of at most {kib} KiB, {}", mode(number).name);
        // Without the trap the signal alone would end the process.
        let ended = under(&format!("trap '' XFSZ; ulimit -f {kib}; exec \"$@\""), &dir, number);
        let text = String::from_utf8_lossy(&ended.stderr).into_owned();
        if !ended.status.success() {
            assert_eq!(ended.status.code(), Some(1), "{what}: {text}");
            assert!(text.contains("File too large"), "{what}: {text}");
            stopped += 1;
        }
        whole_so_far(&dir, &what);
        rerun(&dir, number, &what);
    }
    assert!(stopped >= 3, "{stopped} of 8 writers ran into the limit");
}

#[test]
fn a_full_file_system_is_a_clean_error() {
    // Needs a mount namespace of its own, which containers may deny.
    let mut probe = Command::new("unshare");
    probe.args(["--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]);
    probe.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    if !probe.status().is_ok_and(|status| status.success()) {
        eprintln!("full file system: not tried, this system makes none for a test");
        return;
    }
    let mut stopped = 0;
    for (number, kib) in [8u64, 16, 24, 32, 48, 64].into_iter().enumerate() {
        let parent = scratch();
        let (dir, small) = (parent.path().join("cache"), parent.path().join("small"));
        std::fs::create_dir(&small).unwrap();
        let what = format!("a file system of {kib} KiB, {}", mode(number).name);
        let inside = small.join("cache");
        // What the writer left is copied out before its file system goes.
        let script = format!(
            "mount -t tmpfs -o size={kib}k none {small}; \"$@\"; code=$?; cp -r {inside} {dir} 2>/dev/null; exit $code",
            small = small.display(),
            inside = inside.display(),
            dir = dir.display()
        );
        let ended =
            under(&format!("exec unshare --user --map-root-user --mount bash -c '{script}' bash \"$@\""), &inside, number);
        let text = String::from_utf8_lossy(&ended.stderr).into_owned();
        if !ended.status.success() {
            assert_eq!(ended.status.code(), Some(1), "{what}: {text}");
            assert!(text.contains("No space left on device"), "{what}: {text}");
            stopped += 1;
        }
        whole_so_far(&dir, &what);
        rerun(&dir, number, &what);
    }
    assert!(stopped >= 3, "{stopped} of 6 writers ran full");
}
