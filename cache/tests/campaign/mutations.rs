//! Random damage to caches of every way to store, and to the version-1 fixture: `verify` reports every one, and a row that is read
//! is the row that was stored or an error. No panic leaves the fence.

use crate::modes::{Random, modes};
use crate::process::{complete, files, options, scratch};
use crate::{golden, seed, size};
use potstill_cache::{Cache, CacheWriter, MANIFEST_FILE, Record, ScanProgress, verify};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// A cache with all that is needed to put it right again.
struct Pristine {
    name: String,
    dir: tempfile::TempDir,
    files: BTreeMap<String, Vec<u8>>,
    stored: Vec<Record>,
    /// Manifests of earlier states.
    earlier: Vec<Vec<u8>>,
}

/// Kinds of damage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Bit,
    Byte,
    Zeroed,
    Noise,
    Truncated,
    Appended,
    Shifted,
    Removed,
    Swapped,
    Doubled,
    Stale,
    Manifest,
    Companion,
}

/// In proportion to how often they are tried.
const KINDS: [Kind; 20] = [
    Kind::Bit,
    Kind::Bit,
    Kind::Bit,
    Kind::Bit,
    Kind::Byte,
    Kind::Byte,
    Kind::Byte,
    Kind::Zeroed,
    Kind::Zeroed,
    Kind::Noise,
    Kind::Noise,
    Kind::Truncated,
    Kind::Appended,
    Kind::Shifted,
    Kind::Removed,
    Kind::Swapped,
    Kind::Doubled,
    Kind::Stale,
    Kind::Manifest,
    Kind::Companion,
];

impl Pristine {
    fn new(name: &str, dir: tempfile::TempDir, stored: Vec<Record>, earlier: Vec<Vec<u8>>) -> Self {
        let files = files(dir.path());
        let report = verify(dir.path(), &ScanProgress::default()).unwrap();
        assert!(report.is_good(), "{name}: {:?}", report.problems);
        Self { name: name.into(), dir, files, stored, earlier }
    }

    fn shards(&self) -> Vec<&String> {
        self.files.keys().filter(|name| name.ends_with(".parquet")).collect()
    }

    /// Changes the folder; gives what was changed, or nothing where the change changes nothing.
    fn damage(&self, kind: Kind, random: &mut Random) -> Option<String> {
        let shards = self.shards();
        let companions: Vec<&String> = self.files.keys().filter(|name| name.contains('/')).collect();
        let one = |names: &[&String], random: &mut Random| names[random.below(names.len())].clone();
        let put = |name: &str, bytes: &[u8]| {
            std::fs::write(self.dir.path().join(name), bytes).unwrap();
            (self.files[name] != bytes).then_some(())
        };
        let name = match kind {
            Kind::Manifest | Kind::Stale => MANIFEST_FILE.to_string(),
            Kind::Companion => one(&companions, random),
            _ => one(&shards, random),
        };
        let good = &self.files[&name];
        match kind {
            Kind::Removed => std::fs::remove_file(self.dir.path().join(&name)).unwrap(),
            Kind::Swapped => {
                let other = one(&shards, random);
                put(&name, &self.files[&other])?;
                put(&other, good)?;
                return Some(format!("{name} and {other}"));
            }
            Kind::Doubled => put(&name, &self.files[&one(&shards, random)])?,
            Kind::Stale => put(&name, &self.earlier[random.below(self.earlier.len())])?,
            Kind::Manifest | Kind::Companion => {
                let inner = [Kind::Bit, Kind::Byte, Kind::Zeroed, Kind::Noise, Kind::Truncated, Kind::Appended, Kind::Shifted];
                put(&name, &changed(good, inner[random.below(inner.len())], random))?;
            }
            _ => put(&name, &changed(good, kind, random))?,
        }
        Some(name)
    }

    /// Puts every file back that is not as it was, and removes what was added.
    fn restore(&self) {
        for (name, bytes) in &self.files {
            let path = self.dir.path().join(name);
            if std::fs::read(&path).map_or(true, |found| &found != bytes) {
                std::fs::write(path, bytes).unwrap();
            }
        }
        for name in files(self.dir.path()).keys().filter(|name| !self.files.contains_key(*name)) {
            std::fs::remove_file(self.dir.path().join(name)).unwrap();
        }
    }
}

/// A file's bytes with damage done to them.
fn changed(good: &[u8], kind: Kind, random: &mut Random) -> Vec<u8> {
    let mut bytes = good.to_vec();
    let at = random.below(bytes.len());
    let block = |length: usize| at / length * length..(at / length * length + length).min(good.len());
    match kind {
        Kind::Bit => bytes[at] ^= 1 << random.below(8),
        Kind::Byte => bytes[at] = random.next() as u8,
        Kind::Zeroed => bytes[block(4096)].fill(0),
        Kind::Noise => bytes[block(512)].iter_mut().for_each(|byte| *byte = random.next() as u8),
        Kind::Truncated => bytes.truncate(at),
        Kind::Appended => bytes.extend((0..1 + random.below(64)).map(|_| random.next() as u8)),
        Kind::Shifted if random.below(2) == 0 => drop(bytes.remove(at)),
        Kind::Shifted => bytes.insert(at, random.next() as u8),
        other => unreachable!("{other:?} is not done to bytes"),
    }
    bytes
}

/// A cache of each way to store, one of them unfinished with a piece of a shard, and the fixture of version 1.
fn pristine() -> Vec<Pristine> {
    let mut all = Vec::new();
    for mode in modes(9, 4) {
        let dir = scratch();
        let given = mode.given();
        let mut earlier = Vec::new();
        for rows in [0, 3, 4, 8] {
            let mut writer = CacheWriter::open(dir.path(), &mode.description, options()).unwrap();
            let from = writer.committed_rows() as usize;
            given[from..rows].iter().for_each(|record| writer.append(record).unwrap());
            writer.seal().unwrap();
            earlier.push(std::fs::read(dir.path().join(MANIFEST_FILE)).unwrap());
        }
        complete(CacheWriter::open(dir.path(), &mode.description, options()).unwrap(), &given).unwrap();
        all.push(Pristine::new(mode.name, dir, mode.stored(), earlier.clone()));
        if mode.name == "top-k" {
            let dir = scratch();
            let mut writer = CacheWriter::open(dir.path(), &mode.description, options()).unwrap();
            for record in &given[..7] {
                writer.append(record).unwrap();
                if record.seq_id == given[5].seq_id {
                    writer.seal().unwrap();
                }
            }
            writer.seal().unwrap();
            drop(writer);
            let stored = mode.stored()[..4].to_vec();
            all.push(Pristine::new("top-k, unfinished", dir, stored, earlier[..2].to_vec()));
        }
    }
    let dir = scratch();
    golden::copy(&golden::folder().join("version-1"), dir.path());
    // The older manifests of this one are those of another cache.
    let earlier = all[0].earlier.clone();
    let stored = golden::rows(&golden::folder().join("version-1.json"));
    all.push(Pristine::new("version 1", dir, stored, earlier));
    all
}

/// What a trial found.
struct Found {
    reported: bool,
    unreadable: bool,
}

/// Verifies and reads everything, then lets a writer look at it. Panics where a row is wrong.
fn look(cache: &Pristine, with_writer: bool, what: &str) -> Found {
    let reported = match verify(cache.dir.path(), &ScanProgress::default()) {
        // A manifest that is one event behind is what a crash leaves too: it is no damage, and what the writer continues from.
        Ok(report) => !report.is_good() || one_event_behind(cache),
        Err(_) => true,
    };
    let mut found = Found { reported, unreadable: false };
    match Cache::open(cache.dir.path()) {
        Err(_) => found.unreadable = true,
        Ok(opened) => {
            for (row, stored) in cache.stored.iter().enumerate() {
                match opened.row(row as u64) {
                    Ok(record) => assert!(&record == stored, "{what}: row {row} came back wrong without an error"),
                    Err(_) => found.unreadable = true,
                }
                if let Ok(Some(at)) = opened.find(&stored.key()) {
                    assert_eq!(opened.row(at).unwrap().key(), stored.key(), "{what}");
                }
            }
        }
    }
    if with_writer {
        continue_it(cache.dir.path(), &cache.name);
    }
    found
}

/// Whether the manifest differs from the one there was by the last thing that the writer did: naming a shard or a piece of it, or
/// calling the cache complete.
fn one_event_behind(cache: &Pristine) -> bool {
    let found = std::fs::read(cache.dir.path().join(MANIFEST_FILE)).unwrap();
    let changed =
        files(cache.dir.path()).iter().any(|(name, bytes)| name != MANIFEST_FILE && cache.files.get(name) != Some(bytes));
    !changed && cache.earlier.last() == Some(&found)
}

/// A writer on a damaged folder may refuse it; whatever it does, it does not panic.
fn continue_it(dir: &Path, name: &str) {
    let mode = modes(9, 4).into_iter().find(|mode| name.starts_with(mode.name));
    let Some(mode) = mode else { return };
    if let Ok(writer) = CacheWriter::open(dir, &mode.description, options())
        && writer.committed_keys().is_ok()
    {
        let _ = complete(writer, &mode.given());
    }
}

static FENCED: AtomicU64 = AtomicU64::new(0);

/// Panics that the fence catches are counted; all others are shown.
fn count_fenced_panics() {
    let shown = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| match potstill_cache::decoding() {
        true => drop(FENCED.fetch_add(1, Ordering::Relaxed)),
        false => shown(info),
    }));
}

#[test]
fn all_damage_is_reported_and_no_row_comes_back_wrong() {
    count_fenced_panics();
    let (trials, mut random) = (size("MUTATIONS", 300), Random(seed() ^ 0x6d75_7461));
    let all = pristine();
    let mut kinds: BTreeMap<Kind, u64> = BTreeMap::new();
    let (mut done, mut unreadable, mut idle) = (0, 0, 0u64);
    while done < trials {
        let cache = &all[random.below(all.len())];
        let kind = KINDS[random.below(KINDS.len())];
        let Some(file) = cache.damage(kind, &mut random) else {
            cache.restore();
            idle += 1;
            continue;
        };
        let what = format!("seed {}, trial {done}: {kind:?} of {file} in {:?}", seed(), cache.name);
        let found = catch_unwind(AssertUnwindSafe(|| look(cache, done % 8 == 0, &what)));
        let found = found.unwrap_or_else(|_| panic!("{what}: a panic, above"));
        assert!(found.reported, "{what}: not reported");
        unreadable += u64::from(found.unreadable);
        *kinds.entry(kind).or_default() += 1;
        done += 1;
        cache.restore();
    }
    assert!(trials < 300 || kinds.len() == 13, "{kinds:?}");
    let fenced = FENCED.load(Ordering::Relaxed);
    eprintln!(
        "mutations: {done} in {} caches, all reported, 0 silent; {unreadable} made a row unreadable; {fenced} panics of the decoder \
         caught by the fence; {idle} changed nothing and were not counted; {kinds:?}",
        all.len()
    );
}
