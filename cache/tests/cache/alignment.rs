//! The silent mistakes of the field, made again one by one: each keeps a cache readable and pairs distributions with tokens that they
//! are not of. Here each is refused, with a sentence that says which it was.

use crate::made::{self, companions, description, record, write};
use potstill_cache::{Cache, CacheWriter, Description, Error, ErrorClass, Misalignment, Record, RowKey, SoftTargets};

/// An id that Qwen's tokenizers give to `<|im_end|>`, above 2^17.
const IM_END: u32 = 151_645;

/// A conversation of 12 tokens of which tokens 4 to 6 and 9 to 11 are answers: their distributions follow tokens 3 to 5 and 8 to 10.
fn conversation(seq_id: u64, first: u32) -> Record {
    let positions = vec![3, 4, 5, 8, 9, 10];
    let mut targets = SoftTargets::default();
    positions.iter().for_each(|_| targets.push(&[5, IM_END], &[-0.5, -1.0], -3.627));
    let mut input_ids: Vec<u32> = (0..12).map(|i| first + 7 * i * i).collect();
    (input_ids[6], input_ids[11]) = (IM_END, IM_END);
    Record { seq_id, input_ids, positions, targets, codec: Default::default() }
}

/// A finished cache of conversations that share no token but the end marker.
fn cache(rows: u64) -> (tempfile::TempDir, Vec<Record>) {
    let records: Vec<Record> = (0..rows).map(|i| conversation(2 * i, 1000 * (i as u32 + 1))).collect();
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &description(rows, 3, 2), &records);
    (dir, records)
}

/// What reading row `row` for these tokens says after the folder and the row, and the kind of mistake.
fn refusal(cache: &Cache, row: u64, input_ids: &[u32], positions: &[u32]) -> String {
    let error = cache.row_for(row, input_ids, positions).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Mismatch, "{error}");
    let text = error.to_string();
    let opening = format!("{}: row {row}: ", cache.dir().display());
    text.strip_prefix(&opening).unwrap_or_else(|| panic!("{text}")).to_string()
}

/// The row that a search stumbled over, and what it said.
fn stumbled(cache: &Cache, input_ids: &[u32], positions: &[u32]) -> Option<(u64, Misalignment)> {
    match cache.find_for(input_ids, positions) {
        Err(Error::Misaligned { row, what, .. }) => Some((row, *what)),
        Ok(None) => None,
        other => panic!("{other:?}"),
    }
}

/// modelscope/easydistill#21: the cache is read by training step. Shuffled data gets other conversations' distributions, and steps of
/// a second epoch get zeros.
#[test]
fn a_cache_read_by_step_or_file_order() {
    let (dir, records) = cache(8);
    let cache = Cache::open(dir.path()).unwrap();
    let order = [3usize, 0, 2, 7, 1, 6, 5, 4];
    let mut refused = 0;
    for (step, &conversation) in order.iter().enumerate() {
        let Record { input_ids, positions, .. } = &records[conversation];
        if step == conversation {
            assert_eq!(cache.row_for(step as u64, input_ids, positions).unwrap().seq_id, records[conversation].seq_id);
            continue;
        }
        refused += 1;
        let expected = format!(
            "it holds another conversation, and row {conversation} holds this one; rows are found by their tokens, not by step or \
             order"
        );
        assert_eq!(refusal(&cache, step as u64, input_ids, positions), expected);
        let row = cache.find_for(input_ids, positions).unwrap().unwrap();
        assert_eq!(cache.row_for(row, input_ids, positions).unwrap().input_ids, *input_ids);
    }
    assert_eq!(refused, 7);
    let beyond = cache.row_for(8, &records[0].input_ids, &records[0].positions).unwrap_err();
    assert_eq!(beyond.to_string(), "row 8: the cache has 8 rows, numbered from 0");
}

/// areal-project/AReaL#1729: scores are written at the predicted tokens instead of the predicting ones, so each is one late, the last
/// falls off, and an answer of one token loses its only one.
#[test]
fn scores_shifted_by_one_and_the_last_dropped() {
    let (dir, records) = cache(4);
    let cache = Cache::open(dir.path()).unwrap();
    let Record { input_ids, positions, .. } = &records[1];
    let late: Vec<u32> = positions.iter().map(|p| p + 1).filter(|&p| p < 11).collect();
    assert_eq!(late.len(), positions.len() - 1);
    let sentence = "each scored position here is one higher than there: these are the places of the predicted tokens, and entry i \
                    predicts token i + 1; shift the mask by one";
    assert_eq!(refusal(&cache, 1, input_ids, &late), sentence);
    assert_eq!(stumbled(&cache, input_ids, &late), Some((1, Misalignment::UnshiftedMask)));

    let mut short = conversation(0, 40);
    (short.positions, short.targets) = (vec![10], short.targets.slice(0..1));
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &description(1, 3, 2), std::slice::from_ref(&short));
    let cache = Cache::open(dir.path()).unwrap();
    let sentence = "its last scored position, 10, is missing here: it predicts the conversation's last scored token";
    assert_eq!(refusal(&cache, 0, &short.input_ids, &[]), sentence);
}

/// areal-project/AReaL#1728, eullm/eullm#427: of L tokens with L - 1 distributions the last is lost, here or in the cache.
#[test]
fn the_last_position_dropped() {
    let (dir, records) = cache(4);
    let cache = Cache::open(dir.path()).unwrap();
    let Record { input_ids, positions, .. } = &records[2];
    let sentence = "its last scored position, 10, is missing here: it predicts the conversation's last scored token";
    assert_eq!(refusal(&cache, 2, input_ids, &positions[..5]), sentence);
    assert_eq!(stumbled(&cache, input_ids, &positions[..5]), Some((2, Misalignment::LastPositionDropped { position: 10 })));

    let mut lost = records[2].clone();
    (lost.positions, lost.targets) = (positions[..5].to_vec(), lost.targets.slice(0..5));
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &description(1, 3, 2), &[lost]);
    let cache = Cache::open(dir.path()).unwrap();
    let sentence = "the last scored position here, 10, is missing there: the cache was made without it";
    assert_eq!(refusal(&cache, 0, input_ids, positions), sentence);
    assert_eq!(stumbled(&cache, input_ids, positions), Some((0, Misalignment::LastPositionMissing { position: 10 })));
}

/// arcee-ai/DistillKit's loss mask is that of the labels, unshifted: the first token of each answer is left out and the one after each
/// answer is trained on.
#[test]
fn a_mask_of_labels_not_shifted() {
    let (dir, records) = cache(4);
    let cache = Cache::open(dir.path()).unwrap();
    let Record { input_ids, positions, .. } = &records[3];
    let labels: Vec<u32> = (0..12).filter(|i| (4..=6).contains(i) || (9..=11).contains(i)).collect();
    assert!(refusal(&cache, 3, input_ids, &labels).starts_with("each scored position here is one higher than there"));
    assert_eq!(stumbled(&cache, input_ids, &labels), Some((3, Misalignment::UnshiftedMask)));
    // Nor can such a row get into a cache: the last token predicts nothing.
    let dir = tempfile::tempdir().unwrap();
    let mut writer = CacheWriter::open(dir.path(), &description(1, 3, 2), companions()).unwrap();
    let unshifted = Record { positions: labels, ..records[3].clone() };
    let error = writer.append(&unshifted).unwrap_err().to_string();
    assert!(error.ends_with("expected scored positions below 11 (the last token predicts nothing), found 11"), "{error}");
    assert_eq!(positions.len(), 6);
}

/// linkedin/fmchisel#23: the teacher's side, aligned already, is shifted a second time.
#[test]
fn what_was_shifted_is_shifted_again() {
    let (dir, records) = cache(4);
    let cache = Cache::open(dir.path()).unwrap();
    let Record { input_ids, positions, .. } = &records[0];
    let early: Vec<u32> = positions.iter().map(|p| p - 1).collect();
    let sentence = "each scored position here is one lower than there: entry i predicts token i + 1 already; shift nothing again";
    assert_eq!(refusal(&cache, 0, input_ids, &early), sentence);
    assert_eq!(stumbled(&cache, input_ids, &early), Some((0, Misalignment::ShiftedTwice)));
    // The tokens moved instead of the positions: labels taken for inputs.
    let sentence = "token i + 1 there is token i + 0 here: one side lacks the first token";
    assert_eq!(refusal(&cache, 0, &input_ids[1..], positions), sentence);
    let with_start: Vec<u32> = std::iter::once(9).chain(input_ids.iter().copied()).collect();
    let later: Vec<u32> = positions.iter().map(|p| p + 1).collect();
    assert_eq!(refusal(&cache, 0, &with_start, &later), "token i + 0 there is token i + 1 here: one side lacks the first token");
    let expected = Misalignment::ShiftedTokens { cached_more: 0, here_more: 1 };
    assert_eq!(stumbled(&cache, &with_start, &later), Some((0, expected)));
    let sentence = "it has 12 tokens and here are 9, the same as far as both go: one side was cut off";
    assert_eq!(refusal(&cache, 0, &input_ids[..9], &positions[..3]), sentence);
    let sentence = "it has 6 scored positions and here are 4, and they differ from number 2 on: another mask";
    assert_eq!(refusal(&cache, 0, input_ids, &[3, 4, 8, 9]), sentence);
}

/// almogtavor/SE-KD3x keeps 17 bits of an id: `<|im_end|>`, 151,645, becomes 20,573. NVIDIA/Megatron-LM refuses such vocabularies.
#[test]
fn an_id_above_17_bits() {
    let (dir, records) = cache(2);
    let cache = Cache::open(dir.path()).unwrap();
    let Record { input_ids, positions, .. } = &records[1];
    let found = cache.row_for(1, input_ids, positions).unwrap();
    assert_eq!((found.input_ids[6], found.targets.position(5).ids), (IM_END, &[5, IM_END][..]));

    let cut: Vec<u32> = input_ids.iter().map(|id| id & 0x1_ffff).collect();
    assert_eq!(cut[6], 20_573);
    assert_ne!(RowKey::of(&cut, positions), RowKey::of(input_ids, positions));
    assert_eq!(cache.find_for(&cut, positions).unwrap(), None);
    let sentence =
        "token 6 is 151645 there and 20573 here, and all tokens are equal in their low 17 bits: ids were cut to 17 bits";
    assert_eq!(refusal(&cache, 1, &cut, positions), sentence);
}

/// A refused folder: the class, and the sentence without folder and advice.
fn mismatch(change: impl FnOnce(&mut Description)) -> String {
    let (dir, _) = cache(4);
    let mut other = description(4, 3, 2);
    change(&mut other);
    let error = CacheWriter::open(dir.path(), &other, companions()).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Mismatch);
    let by_reader = Cache::open(dir.path()).unwrap().manifest().description.differences(&other);
    let Error::Mismatch { differences, .. } = error else { panic!("{error}") };
    assert_eq!(differences, by_reader);
    differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

/// microsoft/LMOps#331, pytorch/torchtune#2119, paiml/aprender#1877: heads padded to 152,064 and 151,936 columns are cut or padded to
/// fit each other, and nobody is told.
#[test]
fn vocabularies_of_152064_and_151936() {
    let text = mismatch(|here| (here.vocab_size, here.tokenizer.size) = (151_936, 151_936));
    assert_eq!(
        text,
        "tokenizer.size: the cache has 152064, here it is 151936; vocab_size: the cache has 152064, here it is 151936"
    );
    // A distribution over the wider head does not pass for one over the narrower.
    let narrow = Description { vocab_size: 151_936, ..description(1, 3, 2) };
    let mut padded = conversation(0, 40);
    padded.targets = SoftTargets::default();
    padded.positions.iter().for_each(|_| padded.targets.push(&[5, 152_000], &[-0.5, -1.0], -3.627));
    let dir = tempfile::tempdir().unwrap();
    let mut writer = CacheWriter::open(dir.path(), &narrow, companions()).unwrap();
    let error = writer.append(&padded).unwrap_err().to_string();
    assert!(error.ends_with("position 3: ids below the vocabulary size 151936, found 152000"), "{error}");
}

/// axolotl-ai-cloud/axolotl#2978, huggingface/trl#4561: the student's chat template is not the teacher's.
#[test]
fn another_template() {
    let (ours, theirs) = (blake3::hash(b"template").to_hex(), blake3::hash(b"theirs").to_hex());
    let text = mismatch(|here| here.template.blake3 = theirs.to_string());
    assert_eq!(text, format!("template.blake3: the cache has \"{ours}\", here it is \"{theirs}\""));
    // And where nobody compares descriptions: a template that adds a system message.
    let (dir, records) = cache(4);
    let cache = Cache::open(dir.path()).unwrap();
    let Record { input_ids, positions, .. } = &records[1];
    let rendered: Vec<u32> = input_ids[..2].iter().chain(&[11, 12, 13]).chain(&input_ids[2..]).copied().collect();
    let shifted: Vec<u32> = positions.iter().map(|p| p + 3).collect();
    let sentence = "its tokens differ from place 2 on (2028 there, 11 here) and no row holds these: another conversation, template or \
                    tokenizer";
    assert_eq!(refusal(&cache, 1, &rendered, &shifted), sentence);
    assert_eq!(cache.find_for(&rendered, &shifted).unwrap(), None);
}

/// modelscope/easydistill#14 trains on teachers of several tokenizers: one of the same size whose ids mean
/// something else. Nothing in the tokens shows it; the fingerprint does.
#[test]
fn another_tokenizer_of_the_same_size() {
    let digest = |text: &str| blake3::hash(text.as_bytes()).to_hex().to_string();
    let text = mismatch(|here| {
        (here.tokenizer.vocabulary_blake3, here.tokenizer.blake3) = (digest("other"), digest("others"));
        assert_eq!(here.tokenizer.size, made::VOCAB);
    });
    let expected = format!(
        "tokenizer.vocabulary_blake3: the cache has {:?}, here it is {:?}; tokenizer.blake3: the cache has {:?}, here it is {:?}",
        digest("vocabulary"),
        digest("other"),
        digest("tokenizer"),
        digest("others")
    );
    assert_eq!(text, expected);
}

/// The index over keys finds every row of every shard, and of equal rows the first.
#[test]
fn every_row_is_found_by_its_tokens() {
    let mut records: Vec<Record> = (0..20).map(|i| record(i, 5 + (i as usize * 3) % 11, 2)).collect();
    records[13] = Record { seq_id: 13, ..records[4].clone() };
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &description(20, 3, 2), &records);
    let cache = Cache::open(dir.path()).unwrap();
    for (row, record) in records.iter().enumerate() {
        let expected = if row == 13 { 4 } else { row as u64 };
        assert_eq!(cache.find_for(&record.input_ids, &record.positions).unwrap(), Some(expected));
        assert_eq!(cache.row_for(row as u64, &record.input_ids, &record.positions).unwrap().seq_id, row as u64);
    }
}
