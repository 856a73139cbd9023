//! Writes a cache of two tiny conversations and reads one back: `cargo run -p potstill-cache --example write_tiny -- FOLDER`.

use potstill_cache::{
    Cache, CacheWriter, DataFingerprint, Description, EncodingFingerprint, Record, Selection, SoftTargets, TeacherFingerprint,
    TemplateFingerprint, TokenizerFingerprint, WriterOptions,
};
use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    let dir = PathBuf::from(std::env::args().nth(1).ok_or("usage: write_tiny FOLDER")?);
    let mut writer = CacheWriter::open(&dir, &description(), WriterOptions::default())?;
    for seq_id in writer.committed_rows()..2 {
        let mut targets = SoftTargets::default();
        // After token 0 the teacher thinks of 7 and 3; after token 1 of 2 alone.
        targets.push(&[7, 3], &[0.8f32.ln(), 0.15f32.ln()], 0.05f32.ln());
        targets.push(&[2], &[0.9f32.ln()], 0.1f32.ln());
        writer.append(&Record {
            seq_id,
            input_ids: vec![5, 7, 2, seq_id as u32],
            positions: vec![0, 1],
            targets,
            codec: Default::default(),
        })?;
    }
    let manifest = writer.finish()?;
    let record = Cache::open(&dir)?.row(1)?;
    println!("{} rows, {} bytes; row 1 is {}", manifest.rows(), manifest.bytes(), record.key());
    for (i, position) in record.positions.iter().enumerate() {
        let target = record.targets.position(i);
        println!("after token {position}: {:?} with {:?}, tail {}", target.ids, target.logprobs, target.tail_logprob);
    }
    Ok(())
}

fn description() -> Description {
    let none = String::new;
    Description {
        teacher: TeacherFingerprint {
            name: "by hand".into(),
            config_blake3: none(),
            weights_blake3: none(),
            weights: "float32".into(),
            compute: "float32".into(),
        },
        tokenizer: TokenizerFingerprint { vocabulary_blake3: none(), blake3: none(), size: 10 },
        template: TemplateFingerprint { source: none(), blake3: none() },
        data: DataFingerprint { files: Vec::new(), rows: 2, skipped: Default::default() },
        encoding: EncodingFingerprint { max_length: 4, truncation: "turns".into(), truncated_tokens: 0 },
        selection: Selection::TopK { k: 2 },
        mantissa_bits: 7,
        values: Default::default(),
        lse_temperatures: Vec::new(),
        zstd_level: 3,
        id_encoding: Default::default(),
        rows_per_shard: 1024,
        vocab_size: 10,
        expected_rows: 2,
        part: None,
        derived: Vec::new(),
    }
}
