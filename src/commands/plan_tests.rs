//! The screen of `plan`, line by line.
#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::*;
use potstill_cache::Extent;
use potstill_pipeline::model::stored::StoredBytes;
use potstill_pipeline::precompute::{ComparedSize, Disk, MemoryPart, PlannedMemory};
use std::collections::BTreeMap;

fn estimate(bytes: u64, share: f64) -> SizeEstimate {
    let standard_error = Some(bytes as f64 * share / NORMAL_95);
    SizeEstimate { bytes, standard_error, largest_shard: bytes / 200, per_scored: bytes as f64 / 1e8 }
}

/// A plan of ultrachat_200k by a 32B.
fn report() -> PlanReport {
    let compared = |(preset, k, bytes): (Preset, u16, u64)| ComparedSize {
        preset,
        k: Some(k),
        estimate: estimate(bytes, 0.013),
        mean_entries: f64::from(k),
    };
    let sizes = [8u16, 64].into_iter().flat_map(|k| {
        let base = u64::from(k) * 300_000_000;
        [
            (Preset::Exact, k, base),
            (Preset::Standard, k, base - (base >> 3)),
            (Preset::Compact, k, base >> 1),
            (Preset::Small, k, base >> 2),
        ]
    });
    let mut compared: Vec<ComparedSize> = sizes.map(compared).collect();
    compared.push(ComparedSize { preset: Preset::Sampled, k: None, estimate: estimate(1_900_000_000, 0.002), mean_entries: 8.0 });
    let memory = |weights: &[(&'static str, Moment, u64)]| {
        let always =
            [("program, tokenizer and data", Moment::Always, 1_400_000_000), ("logits of a chunk", Moment::Head, 155_000_000)];
        let parts = always[..1].iter().chain(weights).chain(&always[1..]).map(|(name, when, bytes)| MemoryPart {
            name,
            when: *when,
            bytes: *bytes,
        });
        let parts: Vec<MemoryPart> = parts.collect();
        Memory { peak: parts.iter().map(|part| part.bytes).sum(), parts }
    };
    PlanReport {
        data_rows: 207_865,
        extent: Extent { rows: 207_834, tokens: 180_000_000, scored: 100_000_000 },
        part: None,
        skipped: BTreeMap::from([("duplicate of an earlier row".into(), 31)]),
        first_skipped: BTreeMap::from([(
            "duplicate of an earlier row".into(),
            "train_sft-00000-of-00003.parquet:row 4711\u{1b}[2J".into(),
        )]),
        longest: 1024,
        truncated_rows: 100_123,
        truncated_tokens: 70_123_456,
        shards: 203,
        weights: "AWQ int4",
        stored: StoredBytes { total: 19_200_000_000, layer: 260_000_000, embedding: 1_550_000_000, head: 1_550_000_000 },
        measured: Some(Measured {
            asked_seconds: 20.0,
            seconds: 18.2,
            extent: Extent { rows: 2, tokens: 1_200, scored: 700 },
            tokens_per_second: 1_200.0 / 18.2,
            passes: 1,
            warm_up_seconds: Some(9.5),
            sampled: Extent { rows: 3, tokens: 1_500, scored: 900 },
            not_finite: 1,
            residency: Residency::Streamed,
            pack_tokens: 1_200,
            run_pack_tokens: 4_096,
        }),
        seconds: Some(2_730_000.0),
        size: Some(PlannedSize {
            selection: "top-k 64".into(),
            values: Values::Logprob,
            mantissa_bits: 7,
            zstd_level: 3,
            estimate: estimate(16_160_000_000, 0.021),
            mean_entries: 64.0,
            per_scored_in_memory: 520.0,
        }),
        compared,
        kept_mass: BTreeMap::from([(8, 0.912), (64, 0.9871)]),
        typical: Vec::new(),
        memory: PlannedMemory {
            chosen: Residency::Streamed,
            available: Some(16 << 30),
            resident: memory(&[("weights", Moment::Always, 19_200_000_000)]),
            streamed: memory(&[
                ("two layers' weights", Moment::Layers, 520_000_000),
                ("head's weights", Moment::Head, 1_550_000_000),
            ]),
        },
        disk: Disk { folder: "caches".into(), free: Some(12_000_000_000), tokenizer: 7_028_043, joining: Some(80_000_000) },
    }
}

fn text(report: &PlanReport) -> String {
    let mut out = Vec::new();
    write(report, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

#[test]
fn a_plan_reads_well_at_80_columns() {
    let text = text(&report());
    assert!(text.lines().all(|line| line.chars().count() <= print::COLUMNS), "{text}");
    assert!(!text.contains('\u{1b}'), "{text:?}");
    // `POTSTILL_WRITE_SNAPSHOTS=1` stores what is printed now; look at the difference before you commit it.
    let stored = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/plan/screen.txt");
    if std::env::var_os("POTSTILL_WRITE_SNAPSHOTS").is_some() {
        std::fs::write(stored, &text).unwrap();
    }
    assert_eq!(text, std::fs::read_to_string(stored).unwrap(), "{text}");
}

#[test]
fn a_plan_that_asked_nobody_says_so() {
    let report =
        PlanReport { measured: None, seconds: None, size: None, compared: Vec::new(), kept_mass: BTreeMap::new(), ..report() };
    let text = text(&report);
    assert!(text.contains("not measured (--no-run)") && text.contains("not known what is needed"), "{text}");
    assert!(!text.contains("mass"), "{text}");
}
