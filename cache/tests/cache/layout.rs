//! The shard as other Parquet readers see it: columns, encodings, one page a row, no dictionary, statistics on one column.

use crate::made;
use bytes::Bytes;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::basic::{Compression, Encoding};
use parquet::file::metadata::PageIndexPolicy;

fn shard(rows: u64) -> (Bytes, ArrowReaderMetadata) {
    let (dir, _) = made::cache(rows, 1000, 5);
    let bytes = Bytes::from(std::fs::read(dir.path().join("shard-00000.parquet")).unwrap());
    let options = ArrowReaderOptions::new().with_page_index_policy(PageIndexPolicy::Optional);
    let meta = ArrowReaderMetadata::load(&bytes, options).unwrap();
    (bytes, meta)
}

#[test]
fn columns_have_the_promised_types() {
    let (_, meta) = shard(3);
    let shown: Vec<String> =
        meta.schema().fields().iter().map(|f| format!("{} {} {}", f.name(), f.data_type(), f.is_nullable())).collect();
    let list = |inner: &str| format!("List(non-null {inner}, field: 'element')");
    let nested = |inner: &str| list(&list(inner));
    let expected = [
        "key Utf8 false".to_string(),
        "seq_id UInt64 false".into(),
        "selection Utf8 false".into(),
        "k UInt16 false".into(),
        format!("input_ids {} false", list("UInt32")),
        format!("topk_ids {} false", nested("UInt32")),
        format!("topk_logprobs {} false", nested("Float32")),
        format!("tail_logprob {} false", list("Float32")),
        "codec_kl_sum Float32 false".into(),
        "codec_kl_max Float32 false".into(),
        "crc32 UInt32 false".into(),
    ];
    assert_eq!(shown, expected);
}

#[test]
fn pages_follow_rows() {
    let (_, meta) = shard(150);
    let groups = meta.metadata().row_groups();
    assert_eq!(groups.iter().map(|g| g.num_rows()).collect::<Vec<_>>(), [64, 64, 22]);
    for (g, group) in groups.iter().enumerate() {
        let index = meta.metadata().page_index_for_row_group(g);
        for (c, column) in group.columns().iter().enumerate() {
            let name = column.column_path().parts()[0].as_str();
            let encoding = match name {
                "input_ids" | "topk_ids" | "topk_logprobs" | "tail_logprob" => Encoding::BYTE_STREAM_SPLIT,
                _ => Encoding::PLAIN,
            };
            assert!(column.encodings().any(|e| e == encoding), "{name}");
            assert!(!column.encodings().any(|e| e == Encoding::RLE_DICTIONARY || e == Encoding::PLAIN_DICTIONARY), "{name}");
            assert!(column.dictionary_page_offset().is_none());
            assert!(matches!(column.compression(), Compression::ZSTD(_)));
            assert_eq!(column.statistics().is_some(), name == "seq_id", "{name}");
            let pages = if encoding == Encoding::PLAIN { 1 } else { group.num_rows() as usize };
            assert_eq!(index.page_locations(c).unwrap().len(), pages, "{name}");
        }
    }
}

#[test]
fn the_footer_says_what_the_shard_holds() {
    let (bytes, meta) = shard(3);
    let stored = meta.metadata().file_metadata().key_value_metadata().unwrap();
    let value = |key: &str| stored.iter().find(|kv| kv.key == format!("potstill.{key}")).and_then(|kv| kv.value.clone()).unwrap();
    for (key, expected) in [
        ("format_version", "2"),
        ("first_row", "0"),
        ("selection", "top-k 5"),
        ("k", "5"),
        ("vocab_size", "152064"),
        ("value_codec", "logprob-m7"),
        ("alignment", "next"),
        ("temperature", "1"),
        ("teacher", "teacher-awq"),
    ] {
        assert_eq!(value(key), expected, "{key}");
    }
    assert_eq!(value("tokenizer_blake3"), blake3::hash(b"tokenizer").to_hex().as_str());
    assert!(stored.iter().all(|kv| kv.key.starts_with("potstill.")));
    assert_eq!(&bytes[..4], b"PAR1");
}
