//! Made-up descriptions and records, the same on every run.

use potstill_cache::{
    Cache, CacheWriter, Companion, DataFile, DataFingerprint, Description, EncodingFingerprint, IdEncoding, Knobs, Manifest,
    Preset, Record, Selection, SelectionKind, SoftTargets, Storage, Target, TeacherFingerprint, TemplateFingerprint,
    TokenizerFingerprint, Values, WriterOptions,
};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

pub const VOCAB: u32 = 152_064;

pub fn description(rows: u64, rows_per_shard: u32, k: u16) -> Description {
    let digest = |text: &str| blake3::hash(text.as_bytes()).to_hex().to_string();
    Description {
        teacher: TeacherFingerprint {
            name: "teacher-awq".into(),
            config_blake3: digest("config"),
            weights_blake3: digest("weights"),
            weights: "awq-int4".into(),
            compute: "float32".into(),
        },
        tokenizer: TokenizerFingerprint { vocabulary_blake3: digest("vocabulary"), blake3: digest("tokenizer"), size: VOCAB },
        template: TemplateFingerprint { source: "tokenizer_config.json".into(), blake3: digest("template") },
        data: DataFingerprint {
            files: vec![DataFile { name: "chats.jsonl".into(), bytes: 1234, blake3: digest("chats") }],
            rows,
            skipped: BTreeMap::from([("empty".to_string(), 2)]),
        },
        encoding: EncodingFingerprint { max_length: 1024, truncation: "turns".into(), truncated_tokens: 17 },
        selection: Selection::TopK { k },
        mantissa_bits: 7,
        values: Default::default(),
        lse_temperatures: Vec::new(),
        zstd_level: 3,
        id_encoding: Default::default(),
        rows_per_shard,
        vocab_size: VOCAB,
        expected_rows: rows,
        part: None,
        derived: Vec::new(),
    }
}

/// A small generator with a fixed sequence.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// A record of `tokens` tokens (2 or more) in which about two of three positions are scored, with 1 to `k` entries each.
pub fn record(seq_id: u64, tokens: usize, k: u16) -> Record {
    let mut random = Random(seq_id.wrapping_mul(7919) + tokens as u64);
    let input_ids: Vec<u32> = (0..tokens).map(|_| random.below(u64::from(VOCAB)) as u32).collect();
    let mut positions: Vec<u32> = (0..tokens as u32 - 1).filter(|_| random.below(3) > 0).collect();
    if positions.is_empty() {
        positions.push(0);
    }
    let mut targets = SoftTargets::with_capacity(positions.len(), usize::from(k));
    for _ in &positions {
        let entries = 1 + random.below(u64::from(k)) as usize;
        let mut ids = BTreeSet::new();
        while ids.len() < entries {
            ids.insert(random.below(u64::from(VOCAB)) as u32);
        }
        let weights: Vec<f64> = (0..=entries).map(|_| (6.0 * random.unit()).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut pairs: Vec<(u32, f32)> = ids.into_iter().zip(weights.iter().map(|w| (w / total).ln() as f32)).collect();
        pairs.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let (ids, logprobs): (Vec<u32>, Vec<f32>) = pairs.into_iter().unzip();
        targets.push(&ids, &logprobs, (weights[entries] / total).ln() as f32);
    }
    Record { seq_id, input_ids, positions, targets, codec: Default::default() }
}

/// Every way to store, with the temperatures that go with it.
pub fn modes() -> Vec<(&'static str, Storage, Vec<f32>)> {
    let with = |preset: Preset, knobs: Knobs| preset.with(&knobs).unwrap();
    let none = Knobs { top_k: Some(6), ..Knobs::default() };
    let drawn = Knobs { draws: Some(9), ..Knobs::default() };
    vec![
        ("exact", with(Preset::Exact, none), vec![]),
        ("exact-cutoff", with(Preset::Exact, Knobs { min_prob: Some(0.05), ..none }), vec![2.0]),
        ("standard", with(Preset::Standard, none), vec![]),
        ("temperatures", with(Preset::Standard, none), vec![0.5, 1.5, 4.0]),
        ("compact", with(Preset::Compact, Knobs { min_prob: Some(0.05), ..none }), vec![]),
        ("small", with(Preset::Small, Knobs { min_mass: Some(0.8), ..none }), vec![]),
        ("sampled", with(Preset::Sampled, drawn), vec![]),
        ("hybrid", with(Preset::Standard, Knobs { selection: Some(SelectionKind::Hybrid), top_k: Some(3), ..drawn }), vec![3.0]),
        ("plain", with(Preset::Standard, Knobs { id_encoding: Some(IdEncoding::Plain), ..none }), vec![]),
    ]
}

/// A description of a cache that is stored so.
pub fn described(storage: &Storage, temperatures: &[f32], rows: u64, rows_per_shard: u32) -> Description {
    let base = description(rows, rows_per_shard, 1);
    Description { lse_temperatures: temperatures.to_vec(), ..base.stored_as(storage) }
}

/// A record as a teacher would give it to a cache that is stored so. About two of three positions are scored.
pub fn record_as(seq_id: u64, tokens: usize, storage: &Storage, temperatures: &[f32]) -> Record {
    let mut random = Random(seq_id.wrapping_mul(104_729) + tokens as u64);
    let input_ids: Vec<u32> = (0..tokens).map(|_| random.below(u64::from(VOCAB)) as u32).collect();
    let mut positions: Vec<u32> = (0..tokens as u32 - 1).filter(|_| random.below(3) > 0).collect();
    if positions.is_empty() {
        positions.push(0);
    }
    let mut targets = SoftTargets::default();
    positions.iter().for_each(|_| push_position(&mut targets, &mut random, storage, temperatures));
    Record { seq_id, input_ids, positions, targets, codec: Default::default() }
}

/// Adds one position: a distribution over a dozen ids of the vocabulary, and what `storage` keeps of it.
fn push_position(targets: &mut SoftTargets, random: &mut Random, storage: &Storage, temperatures: &[f32]) {
    let mut ids = BTreeSet::new();
    while ids.len() < 12 {
        ids.insert(random.below(u64::from(VOCAB)) as u32);
    }
    let bf16 = |z: f64| potstill_cache::round_to_mantissa(z as f32, 7);
    let mut logits: Vec<(u32, f32)> = ids.into_iter().map(|id| (id, bf16(12.0 * random.unit() - 3.0))).collect();
    logits.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let lse = logits.iter().map(|(_, z)| f64::from(*z).exp()).sum::<f64>().ln() as f32;
    let p: Vec<f64> = logits.iter().map(|(_, z)| (f64::from(*z) - f64::from(lse)).exp()).collect();
    let logprobs: Vec<f32> = logits.iter().map(|(_, z)| ((f64::from(*z) - f64::from(lse)) as f32).min(0.0)).collect();
    let ids: Vec<u32> = logits.iter().map(|(id, _)| *id).collect();
    let logits: Vec<f32> = logits.iter().map(|(_, z)| *z).collect();
    let kept = storage.selection.kept(&logprobs);
    let mut counts = std::collections::BTreeMap::new();
    for _ in 0..storage.selection.draws().unwrap_or(0) {
        let mut left = random.unit() * p[kept..].iter().sum::<f64>();
        let drawn = p[kept..].iter().position(|p| {
            left -= p;
            left <= 0.0
        });
        *counts.entry(ids[kept + drawn.unwrap_or(p.len() - kept - 1)]).or_insert(0u16) += 1;
    }
    let known = |id: &u32| if kept > 0 { ids[..kept].contains(id) } else { counts.contains_key(id) };
    let tail: f64 = ids.iter().zip(&p).filter(|(id, _)| !known(id)).map(|(_, p)| p).sum();
    let lse_t = |t: &f32| p.iter().map(|p| p.powf(1.0 / f64::from(*t))).sum::<f64>().ln() as f32;
    let exact = storage.values == Values::LogitBf16;
    targets.push_target(&Target {
        ids: &ids[..kept],
        logprobs: &logprobs[..kept],
        tail_logprob: tail.ln() as f32,
        sample_ids: &counts.keys().copied().collect::<Vec<u32>>(),
        sample_counts: &counts.values().copied().collect::<Vec<u16>>(),
        logits: if exact { &logits[..kept] } else { &[] },
        logsumexp: exact.then_some(lse),
        lse_t: &temperatures.iter().map(lse_t).collect::<Vec<f32>>(),
    });
}

/// Records of a few lengths, with gaps in their numbers.
pub fn records(rows: u64, k: u16) -> Vec<Record> {
    (0..rows).map(|i| record(2 * i + 1, 3 + (i as usize * 5) % 17, k)).collect()
}

pub fn companions() -> WriterOptions {
    WriterOptions { companions: vec![Companion { path: "tokenizer/tokenizer.json".into(), bytes: b"{\"model\": 1}".to_vec() }] }
}

pub fn write(dir: &Path, description: &Description, records: &[Record]) -> Manifest {
    let mut writer = CacheWriter::open(dir, description, companions()).unwrap();
    records.iter().for_each(|record| writer.append(record).unwrap());
    writer.finish().unwrap()
}

/// A finished cache: its folder, its records as stored.
pub fn cache(rows: u64, rows_per_shard: u32, k: u16) -> (tempfile::TempDir, Vec<Record>) {
    let dir = tempfile::tempdir().unwrap();
    let records = records(rows, k);
    write(dir.path(), &description(rows, rows_per_shard, k), &records);
    let stored =
        records.iter().map(|record| potstill_cache::encode(record, &potstill_cache::Preset::Standard.storage())).collect();
    (dir, stored)
}

/// Every file of a folder with its bytes.
pub fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        if path.is_dir() {
            found.extend(files(&path).into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes)));
        } else {
            found.insert(name, std::fs::read(&path).unwrap());
        }
    }
    found
}

/// Changes the manifest as somebody would who knows the format and repairs its digest.
pub fn forge(dir: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let path = dir.join("manifest.json");
    let mut value: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    value.as_object_mut().unwrap().shift_remove("manifest_blake3");
    change(&mut value);
    let body = format!("{}\n", serde_json::to_string_pretty(&value).unwrap().strip_prefix("{\n").unwrap());
    let digest = blake3::hash(body.as_bytes()).to_hex();
    std::fs::write(path, format!("{{\n  \"manifest_blake3\": \"{digest}\",\n{body}")).unwrap();
}

/// Reads every row; each is what was stored or an error. Gives the number of errors, 1 where the cache does not open.
pub fn errors_or_equal(dir: &Path, stored: &[Record]) -> usize {
    let Ok(cache) = Cache::open(dir) else { return 1 };
    let mut errors = 0;
    for (row, expected) in stored.iter().enumerate() {
        match cache.row(row as u64) {
            Ok(found) => assert_eq!(&found, expected, "row {row} came back wrong without an error"),
            Err(_) => errors += 1,
        }
    }
    errors
}

/// Panics that the fence catches say nothing on stderr; all others do.
pub fn quiet() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let default = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !potstill_cache::decoding() {
                default(info);
            }
        }));
    });
}
