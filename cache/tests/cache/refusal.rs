//! What a writer refuses: records that break a rule, folders that hold something else, a second writer.

use crate::made::{self, VOCAB, companions, description, record};
use potstill_cache::{Cache, CacheWriter, Companion, Error, ErrorClass, Record, SoftTargets, WriterOptions};

/// One scored position after the first of three tokens.
fn one(ids: &[u32], logprobs: &[f32], tail: f32) -> Record {
    let mut targets = SoftTargets::default();
    targets.push(ids, logprobs, tail);
    Record { seq_id: 0, input_ids: vec![1, 2, 3], positions: vec![0], targets, codec: Default::default() }
}

fn refused(record: &Record) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = CacheWriter::open(dir.path(), &description(1, 4, 2), companions()).unwrap();
    let error = writer.append(record).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Runtime);
    // The writer is none the worse for it.
    writer.append(&one(&[5, 6], &[-1.0, -2.0], -0.7)).unwrap();
    assert_eq!(writer.finish().unwrap().rows(), 1);
    assert_eq!(Cache::open(dir.path()).unwrap().row(0).unwrap().targets.ids(), [5, 6]);
    error.to_string()
}

#[test]
fn records_that_break_a_rule_are_refused_with_both_sides() {
    let good = || one(&[5, 6], &[-1.0, -2.0], -0.7);
    let with = |change: &dyn Fn(&mut Record)| {
        let mut record = good();
        change(&mut record);
        refused(&record)
    };
    let row = "row 0 (seq_id 0): expected ";
    let cases = [
        // Alignment: the last token predicts nothing, so a list shifted by one has no place.
        (with(&|r| r.positions = vec![2]), "scored positions below 2 (the last token predicts nothing), found 2"),
        (with(&|r| r.positions = vec![]), "one target for each of 0 positions, found 1 targets"),
        (with(&|r| r.positions = vec![0, 1]), "one target for each of 2 positions, found 1 targets"),
        (
            with(&|r| {
                r.positions = vec![1, 1];
                r.targets.extend(&good().targets);
            }),
            "rising positions (at least 2 here), found 1",
        ),
        (with(&|r| r.input_ids = vec![]), "2 to 1024 tokens, found 0"),
        (with(&|r| r.input_ids[2] = VOCAB), "input ids below the vocabulary size 152064, found 152064"),
        (refused(&one(&[5, VOCAB], &[-1.0, -2.0], -0.9)), "position 0: ids below the vocabulary size 152064, found 152064"),
        (
            refused(&one(&[5, u32::MAX], &[-1.0, -2.0], -0.9)),
            "position 0: ids below the vocabulary size 152064, found 4294967295",
        ),
        (refused(&one(&[5, 5], &[-1.0, -2.0], -0.9)), "position 0: each id once, found id 5 twice"),
        (refused(&one(&[], &[], 0.0)), "position 0: 1 to 2 entries, found 0"),
        (refused(&one(&[5, 6, 7], &[-1.0, -2.0, -3.0], -0.9)), "position 0: 1 to 2 entries, found 3"),
        (
            refused(&one(&[5, 6], &[-2.0, -1.0], -0.9)),
            "position 0: entries by falling log-probability, ties by rising id, found id 5 with -2 before id 6 with -1",
        ),
        (
            refused(&one(&[6, 5], &[-1.0, -1.0], -0.9)),
            "position 0: entries by falling log-probability, ties by rising id, found id 6 with -1 before id 5 with -1",
        ),
        (refused(&one(&[5], &[f32::NAN], -0.9)), "position 0: finite log-probabilities of at most 0, found NaN"),
        (refused(&one(&[5], &[f32::NEG_INFINITY], -0.9)), "position 0: finite log-probabilities of at most 0, found -inf"),
        (refused(&one(&[5], &[0.25], -0.9)), "position 0: finite log-probabilities of at most 0, found 0.25"),
        (refused(&one(&[5], &[-0.1], f32::NAN)), "position 0: a tail log-probability of at most 0, found NaN"),
        (refused(&one(&[5], &[-0.1], 0.5)), "position 0: a tail log-probability of at most 0, found 0.5"),
        // exp(-0.125) + exp(-0.5) = 0.8825 + 0.6065; the bound is 3^(1/128) * 1.001 = 1.0096.
        (refused(&one(&[5], &[-0.125], -0.5)), "position 0: kept and tail probability of 0.9905 to 1.0096, found 1.4890"),
        // A tail that was forgotten.
        (refused(&one(&[5], &[-0.125], -30.0)), "position 0: kept and tail probability of 0.9905 to 1.0096, found 0.8825"),
    ];
    for (found, expected) in cases {
        assert_eq!(found, format!("{row}{expected}"));
    }
}

#[test]
fn row_numbers_of_the_data_rise() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = CacheWriter::open(dir.path(), &description(3, 1, 3), companions()).unwrap();
    writer.append(&record(4, 5, 3)).unwrap();
    let error = writer.append(&record(4, 6, 3)).unwrap_err();
    assert_eq!(error.to_string(), "row 1 (seq_id 4): expected a seq_id above 4, that of the row before, found 4");
    drop(writer);
    // Known again after the cache is reopened.
    let mut writer = CacheWriter::open(dir.path(), &description(3, 1, 3), companions()).unwrap();
    assert!(matches!(writer.append(&record(3, 6, 3)), Err(Error::BadRecord { row: 1, seq_id: 3, .. })));
}

#[test]
fn another_description_is_refused_field_by_field() {
    let (dir, _) = made::cache(3, 2, 4);
    let before = made::files(dir.path());
    let mut other = description(3, 2, 8);
    other.teacher.weights_blake3 = "feed".into();
    other.data.files.push(other.data.files[0].clone());
    other.data.skipped.insert("long".into(), 1);
    let mut options = companions();
    options.companions[0].bytes.push(b' ');
    let error = CacheWriter::open(dir.path(), &other, options).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Mismatch);
    let message = error.to_string();
    let weights = blake3::hash(b"weights").to_hex();
    let (old, new) = (blake3::hash(b"{\"model\": 1}").to_hex(), blake3::hash(b"{\"model\": 1} ").to_hex());
    let file = serde_json::to_value(&other.data.files[1]).unwrap();
    let expected = format!(
        "{}: holds a cache made from something else (teacher.weights_blake3: the cache has \"{weights}\", here it is \"feed\"; \
         data.files[1]: the cache has nothing, here it is {file}; data.skipped.long: the cache has nothing, here it is 1; \
         selection.k: the cache has 4, here it is 8; companions[tokenizer/tokenizer.json].blake3: the cache has \"{old}\", here it \
         is \"{new}\"); give it another folder, or use what it was made from",
        dir.path().display()
    );
    assert_eq!(message, expected);
    assert_eq!(made::files(dir.path()), before, "a refused folder is left alone");
}

#[test]
fn a_second_writer_is_locked_out() {
    let dir = tempfile::tempdir().unwrap();
    let first = CacheWriter::open(dir.path(), &description(3, 2, 4), companions()).unwrap();
    let error = CacheWriter::open(dir.path(), &description(3, 2, 4), companions()).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Locked);
    let expected = format!("{}: another process is writing this cache; wait for it or stop it", dir.path().display());
    assert_eq!(error.to_string(), expected);
    // Readers need no lock.
    assert!(!Cache::open(dir.path()).unwrap().is_complete());
    drop(first);
    CacheWriter::open(dir.path(), &description(3, 2, 4), companions()).unwrap();
}

#[test]
fn nobodys_folder_is_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("shard-00000.parquet.tmp"), "mine").unwrap();
    let error = CacheWriter::open(dir.path(), &description(3, 2, 4), companions()).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Usage);
    assert!(
        error.to_string().ends_with("holds \"shard-00000.parquet.tmp\" but no manifest.json; a new cache needs an empty folder")
    );
    assert_eq!(made::files(dir.path()).len(), 1);
}

#[test]
fn settings_and_companions_out_of_range_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = description(3, 2, 4);
    settings.mantissa_bits = 24;
    let error = CacheWriter::open(dir.path(), &settings, companions()).unwrap_err();
    assert_eq!((error.to_string().as_str(), error.class()), ("mantissa_bits = 24: expected 1 to 23", ErrorClass::Usage));
    for path in
        ["../x", "/x", "a/../../x", "", ".x", "a//b", "manifest.json", "cache.lock", "shard-00000.parquet", "a.tmp", "a\\b"]
    {
        let options = WriterOptions { companions: vec![Companion { path: path.into(), bytes: vec![] }] };
        let error = CacheWriter::open(dir.path(), &description(3, 2, 4), options).unwrap_err();
        assert!(matches!(error, Error::Setting { name: "companions", .. }), "{path}: {error}");
    }
    let twice = WriterOptions { companions: vec![companions().companions[0].clone(); 2] };
    assert!(matches!(CacheWriter::open(dir.path(), &description(3, 2, 4), twice), Err(Error::Setting { .. })));
    assert!(made::files(dir.path()).is_empty());
}

#[test]
fn as_many_rows_as_announced() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = CacheWriter::open(dir.path(), &description(2, 8, 4), companions()).unwrap();
    writer.append(&record(0, 5, 4)).unwrap();
    let error = writer.finish().unwrap_err();
    assert!(error.to_string().ends_with(": expected 2 rows in the finished cache, found 1"), "{error}");
    let mut writer = CacheWriter::open(dir.path(), &description(2, 8, 4), companions()).unwrap();
    assert_eq!(writer.committed_rows(), 0);
    (0..2).for_each(|i| writer.append(&record(i, 5, 4)).unwrap());
    assert!(matches!(writer.append(&record(2, 5, 4)), Err(Error::RowCount { expected: 2, found: 3, .. })));
    assert!(writer.finish().unwrap().complete);
}
