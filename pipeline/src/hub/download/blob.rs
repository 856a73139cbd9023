//! Owns one file's way into the cache: `blobs/ETAG.incomplete`, continued where it ended, checked, renamed to `blobs/ETAG`.
//!
//! The one idea: bytes are written at their own place in the file, so two processes whose lock fails them (some network file
//! systems pretend) write the same bytes to the same places.

use super::super::HubError;
use super::super::layout::Repository;
use super::super::listing::Entry;
use super::client::{Client, Fault, Gain, Source, header};
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Largest file, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 42;
/// Bytes read and written at once.
const BLOCK: usize = 1 << 18;
/// Time between two looks at a lock that another process holds.
const LOCK_POLL: Duration = Duration::from_millis(200);

/// A file on its way.
struct Wanted {
    url: String,
    etag: String,
    bytes: u64,
    digest: Digest,
}

/// How the bytes of a file are known.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Digest {
    /// SHA-256 of a large file.
    Sha256(String),
    /// Git's hash of a small one: SHA-1 over `blob LENGTH\0` and the bytes.
    Git(String),
    /// By their length alone.
    None,
}

impl Wanted {
    /// The hub's list and the file's own headers must agree where both say something.
    fn of(entry: &Entry, source: Source, what: &str) -> Result<Self, HubError> {
        let wrong = |expected: String, found: String| HubError::Answer { what: what.to_string(), expected, found };
        let bytes = match (entry.bytes, source.bytes) {
            (Some(listed), Some(found)) if listed != found => {
                return Err(wrong(format!("{listed} bytes, as the hub's list says"), found.to_string()));
            }
            (listed, found) => listed.or(found).ok_or_else(|| wrong("the file's length".into(), "none".into()))?,
        };
        if bytes > MAX_FILE_BYTES {
            return Err(wrong(format!("at most {MAX_FILE_BYTES} bytes"), bytes.to_string()));
        }
        let hash = source.etag.to_ascii_lowercase();
        let is_sha256 = hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit());
        let digest = match &entry.sha256 {
            Some(listed) if is_sha256 && !listed.eq_ignore_ascii_case(&hash) => {
                return Err(wrong(format!("SHA-256 {}, as the hub's list says", listed.escape_debug()), hash));
            }
            Some(listed) => Digest::Sha256(listed.to_ascii_lowercase()),
            None if is_sha256 => Digest::Sha256(hash),
            None if entry.git.as_ref() == Some(&source.etag) => Digest::Git(hash),
            None => Digest::None,
        };
        Ok(Self { url: source.url, etag: source.etag, bytes, digest })
    }
}

impl Digest {
    fn start(&self, bytes: u64) -> Context {
        match self {
            Digest::Git(_) => {
                let mut context = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                context.update(format!("blob {bytes}\0").as_bytes());
                context
            }
            Digest::Sha256(_) | Digest::None => Context::new(&SHA256),
        }
    }

    /// Errors: (expected, found).
    fn check(&self, context: Context) -> Result<(), (String, String)> {
        let found: String = context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            Digest::Sha256(hash) if *hash != found => Err((format!("bytes with SHA-256 {hash}"), found)),
            Digest::Git(hash) if *hash != found => Err((format!("bytes with git hash {hash}"), found)),
            _ => Ok(()),
        }
    }
}

/// Counts a file's bytes once, however often they come.
struct Count(u64);

/// Fetches a file of `commit`, unless the cache has it; gives its name among the blobs.
pub(super) fn fetch(
    client: &Client<'_>,
    repository: &Repository,
    commit: &str,
    path: &str,
    entry: &Entry,
) -> Result<String, HubError> {
    let what = client.what(path);
    let mut count = Count(0);
    let mut fresh = Fresh::No;
    let mut lock = None;
    client.insist(&what, || {
        let wanted = Wanted::of(entry, client.locate(commit, path)?, &what)?;
        let target = repository.blobs().join(&wanted.etag);
        if lock.is_none() {
            lock = Some(locked(client, repository, &wanted.etag)?);
        }
        if fs::metadata(&target).is_ok_and(|m| m.is_file() && m.len() == wanted.bytes) {
            count.advance(client, wanted.bytes);
            return Ok(wanted.etag);
        }
        let partial = repository.blobs().join(format!("{}.incomplete", wanted.etag));
        let received = receive(client, &wanted, &partial, &mut count, &what)?;
        if let Err((expected, found)) = wanted.digest.check(received.context) {
            remove(&partial)?;
            // What an earlier run left may have been wrong; bytes that all came just now are the hub's.
            if received.resumed && fresh == Fresh::No {
                fresh = Fresh::Yes;
                return Err(Fault::Passing(format!("expected {expected}, found {found}"), Gain::Nothing));
            }
            return Err(HubError::Answer { what: what.clone(), expected, found }.into());
        }
        put(&partial, &target)?;
        Ok(wanted.etag)
    })
}

/// Whether a file was begun anew because what an earlier run left was wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fresh {
    No,
    Yes,
}

/// What came.
struct Received {
    context: Context,
    /// Some of it had been there before.
    resumed: bool,
}

/// Writes the file's bytes into `partial`, continuing what is there; all of them are there afterwards, and made durable.
fn receive(client: &Client<'_>, wanted: &Wanted, partial: &Path, count: &mut Count, what: &str) -> Result<Received, Fault> {
    let io = |source| HubError::Io { path: partial.to_path_buf(), source };
    fs::create_dir_all(partial.parent().unwrap_or(Path::new("."))).map_err(io)?;
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(partial).map_err(io)?;
    let length = file.metadata().map_err(io)?.len();
    // Without a digest nobody would notice that what is there belongs to other bytes.
    let mut here = if wanted.digest == Digest::None || length > wanted.bytes { 0 } else { length };
    let mut context = wanted.digest.start(wanted.bytes);
    read_through((&file).take(here), |block| context.update(block)).map_err(io)?;
    let resumed = here > 0;
    if here < wanted.bytes {
        let mut response = client.bytes(&wanted.url, here, what)?;
        let rest = response.status().as_u16() == 206
            && header(&response, "content-range").is_some_and(|range| range.starts_with(&format!("bytes {here}-")));
        if !rest && response.status().as_u16() != 200 {
            remove(partial)?;
            return Err(Fault::Passing("another part of the file than was asked for".into(), Gain::Nothing));
        }
        if !rest && here > 0 {
            (here, context) = (0, wanted.digest.start(wanted.bytes));
        }
        let (expected, length) = (wanted.bytes - here, header(&response, "content-length").and_then(|n| n.parse().ok()));
        if let Some(length) = length.filter(|length: &u64| *length != expected) {
            let (expected, found) = (format!("{expected} bytes"), length.to_string());
            return Err(HubError::Answer { what: what.to_string(), expected, found }.into());
        }
        file.seek(SeekFrom::Start(here)).map_err(io)?;
        count.advance(client, here);
        let from = here;
        let mut block = vec![0; BLOCK];
        while here < wanted.bytes {
            client.go_on()?;
            let gain = if here > from { Gain::Some } else { Gain::Nothing };
            let broken = |why: &str| Fault::Passing(format!("at byte {here} of {}: {why}", wanted.bytes), gain);
            let most = (BLOCK as u64).min(wanted.bytes - here) as usize;
            let n = response.body_mut().as_reader().read(block.get_mut(..most).unwrap_or_default());
            let n = n.map_err(|e| broken(&e.to_string()))?;
            if n == 0 {
                return Err(broken("the connection ended"));
            }
            let bytes = block.get(..n).unwrap_or_default();
            file.write_all(bytes).map_err(io)?;
            context.update(bytes);
            here += n as u64;
            count.advance(client, here);
        }
    }
    count.advance(client, here);
    file.set_len(wanted.bytes).and_then(|()| file.sync_all()).map_err(io)?;
    Ok(Received { context, resumed })
}

impl Count {
    /// Counts up to byte `at`.
    fn advance(&mut self, client: &Client<'_>, at: u64) {
        client.context.progress.add(at.saturating_sub(self.0));
        self.0 = self.0.max(at);
    }
}

/// The lock that every program which knows this cache takes for a blob; held until dropped.
fn locked(client: &Client<'_>, repository: &Repository, etag: &str) -> Result<File, HubError> {
    let (cache, name) = (repository.folder.parent().unwrap_or(Path::new(".")), repository.folder.file_name().unwrap_or_default());
    let folder = cache.join(".locks").join(name);
    let path = folder.join(format!("{etag}.lock"));
    let io = |source| HubError::Io { path: path.clone(), source };
    fs::create_dir_all(&folder).map_err(io)?;
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(io)?;
    loop {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                client.context.progress.note("waiting for another process that fetches the same file");
                client.rest(LOCK_POLL)?;
            }
            // A file system without locks: see the one idea above.
            Ok(()) | Err(TryLockError::Error(_)) => return Ok(file),
        }
    }
}

/// Renames a whole file into its place.
fn put(partial: &Path, target: &Path) -> Result<(), HubError> {
    match fs::rename(partial, target) {
        // Another process whose lock failed it was faster.
        Err(_) if target.is_file() && !partial.exists() => Ok(()),
        done => done.map_err(|source| HubError::Io { path: target.to_path_buf(), source }),
    }
}

fn remove(path: &Path) -> Result<(), HubError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(HubError::Io { path: path.to_path_buf(), source: e }),
        _ => Ok(()),
    }
}

/// Shows `seen` everything that `from` holds.
fn read_through(mut from: impl Read, mut seen: impl FnMut(&[u8])) -> std::io::Result<()> {
    let mut block = vec![0; BLOCK];
    loop {
        match from.read(&mut block)? {
            0 => return Ok(()),
            n => seen(block.get(..n).unwrap_or_default()),
        }
    }
}

/// Makes `snapshots/COMMIT/path` stand for the blob; a copy where the file system has no links.
pub(super) fn point(repository: &Repository, commit: &str, path: &str, etag: &str) -> Result<(), HubError> {
    let link = repository.snapshot(commit).join(path);
    if link.is_file() {
        return Ok(());
    }
    let io = |source| HubError::Io { path: link.clone(), source };
    let folder = link.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(io)?;
    let beside = folder.join(format!(".{etag}.{}.tmp", std::process::id()));
    remove(&beside)?;
    let target = PathBuf::from("../".repeat(2 + path.matches('/').count())).join("blobs").join(etag);
    #[cfg(unix)]
    let linked = std::os::unix::fs::symlink(&target, &beside);
    #[cfg(not(unix))]
    let linked: std::io::Result<()> = Err(std::io::Error::other(target.display().to_string()));
    linked.or_else(|_| fs::copy(repository.blobs().join(etag), &beside).map(|_| ())).map_err(io)?;
    fs::rename(&beside, &link).map_err(io)
}
