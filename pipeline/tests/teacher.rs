//! The AWQ teacher against transformers on the dequantised weights, packed and alone.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use potstill_cache::{Selection, SoftTargets};
use potstill_pipeline::data::pack::{self, Pack, Sequence};
use potstill_pipeline::kernel::Precision;
use potstill_pipeline::model::decoder::{Decoder, Holding};
use potstill_pipeline::model::layer::Geometry;
use potstill_pipeline::ops::capture::Capture;
use potstill_pipeline::run::RunContext;
use potstill_pipeline::teacher::{Residency, Teacher};
use support::{floats, golden, ids, load, max_difference, offsets};

/// Float32 against float32: measured 6.3e-5, most of it the rotary angles' rounding; wrong implementations lie above 0.07.
const LOGPROB_BOUND: f32 = 5e-4;

fn teacher() -> Teacher {
    teacher_of(2048, Precision::F32, Residency::Resident).unwrap()
}

fn teacher_of(width: u32, precision: Precision, residency: Residency) -> Result<Teacher, String> {
    let settings = (precision, residency);
    Teacher::from_folder(&golden("teacher-awq"), width, settings, &support::device(), &RunContext::default())
        .map_err(|e| e.to_string())
}

/// One pack's targets.
fn score(teacher: &Teacher, pack: &Pack, capture: &Capture, chunk: usize) -> SoftTargets {
    teacher.score(std::slice::from_ref(pack), capture, chunk, &RunContext::default()).unwrap().unwrap().remove(0).sound().unwrap()
}

/// Logits of all of a pack's scored positions.
fn logits(teacher: &Teacher, pack: &Pack) -> Vec<Vec<f32>> {
    let hidden = teacher.hidden(std::slice::from_ref(pack), &RunContext::default()).unwrap().unwrap();
    teacher.logits(&hidden[0], 0, pack.scored().len()).unwrap().to_vec2().unwrap()
}

/// Every position but the last of each conversation is scored.
fn all_positions(input_ids: &[u32]) -> Vec<u32> {
    (0..input_ids.len() as u32 - 1).collect()
}

#[test]
fn top_64_equals_transformers() {
    let expected = load("expected/teacher_topk.safetensors");
    let (starts, input_ids) = (offsets(&expected["offsets"]), ids(&expected["input_ids"]));
    let (want_ids, want) = (ids(&expected["ids"]), floats(&expected["logprobs"]));
    let (lse, gap) = (floats(&expected["logsumexp"]), floats(&expected["boundary_gap"]));
    let teacher = teacher();
    let (mut worst, mut worst_lse, mut sets) = (0f32, 0f32, 0);
    for w in starts.windows(2) {
        let conversation = &input_ids[w[0]..w[1]];
        let positions = all_positions(conversation);
        let pack = Pack::new([Sequence { input_ids: conversation, positions: &positions }]);
        let targets = score(&teacher, &pack, &Capture::top_k(64), 100);
        for (t, logits) in logits(&teacher, &pack).iter().enumerate() {
            let (at, row) = (w[0] + t, targets.position(t));
            let found = logits.iter().map(|z| f64::from(*z).exp()).sum::<f64>().ln();
            worst_lse = worst_lse.max((found as f32 - lse[at]).abs());
            let (want_ids, want) = (&want_ids[at * 64..(at + 1) * 64], &want[at * 64..(at + 1) * 64]);
            worst = worst.max(max_difference(row.logprobs, want));
            let kept: f64 = row.logprobs.iter().map(|l| f64::from(*l).exp()).sum();
            assert!((kept + f64::from(row.tail_logprob).exp() - 1.0).abs() < 1e-6, "mass at {at}");
            let order_is_clear = want.windows(2).all(|p| p[0] - p[1] > 1e-3);
            if order_is_clear && gap[at] > 1e-3 {
                assert_eq!(row.ids, want_ids, "order at {at}");
            }
            if gap[at] > 1e-3 {
                let sorted = |v: &[u32]| {
                    let mut v = v.to_vec();
                    v.sort_unstable();
                    v
                };
                assert_eq!(sorted(row.ids), sorted(want_ids), "set at {at}");
                sets += 1;
            }
        }
    }
    println!("worst log-probability {worst:e}, log-sum-exp {worst_lse:e}, {sets} sets compared");
    assert!(worst < LOGPROB_BOUND && worst_lse < LOGPROB_BOUND, "{worst} {worst_lse}");
    assert!(sets > 400, "{sets} positions compared as sets");
}

#[test]
fn hidden_states_equal_transformers() {
    let expected = load("expected/teacher_debug.safetensors");
    let input_ids = ids(&expected["input_ids"]);
    let (device, context) = (support::device(), RunContext::default());
    let mut decoder = Decoder::from_folder(&golden("teacher-awq"), Holding::AsStored, Precision::F32, &device, &context).unwrap();
    decoder.place(&RunContext::default()).unwrap();
    let pack = Pack::new([Sequence { input_ids: &input_ids, positions: &[] }]);
    let geometry = Geometry::new(&pack, &decoder.config, decoder.device()).unwrap();
    let mut x = decoder.embed(&input_ids).unwrap();
    assert_eq!(floats(&x), floats(&expected["hidden_00"]), "embeddings");
    for (i, layer) in decoder.layers.iter().enumerate() {
        x = layer.forward(&x, &geometry, None).unwrap();
        // The last reference state is after the final norm.
        let last = i + 1 == decoder.layers.len();
        let ours = if last { decoder.final_norm(&x).unwrap() } else { x.clone() };
        let difference = max_difference(&floats(&ours), &floats(&expected[&format!("hidden_{:02}", i + 1)]));
        assert!(difference < 2e-4, "after layer {i}: {difference}");
    }
}

/// Four reference conversations, their scored positions, and the pack of all of them.
struct Four {
    conversations: Vec<Vec<u32>>,
    positions: Vec<Vec<u32>>,
}

impl Four {
    fn new() -> Self {
        let expected = load("expected/teacher_topk.safetensors");
        let (starts, input_ids) = (offsets(&expected["offsets"]), ids(&expected["input_ids"]));
        let conversations: Vec<Vec<u32>> = starts.windows(2).take(4).map(|w| input_ids[w[0]..w[1]].to_vec()).collect();
        let positions = conversations.iter().map(|c| all_positions(c)).collect();
        Self { conversations, positions }
    }

    fn sequences(&self) -> impl Iterator<Item = Sequence<'_>> {
        self.conversations.iter().zip(&self.positions).map(|(input_ids, positions)| Sequence { input_ids, positions })
    }
}

/// The bits of everything that is stored of some positions.
fn bits(targets: &SoftTargets, range: std::ops::Range<usize>) -> Vec<(Vec<u32>, Vec<u32>, u32)> {
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect();
    range.map(|i| targets.position(i)).map(|t| (t.ids.to_vec(), bits(t.logprobs), t.tail_logprob.to_bits())).collect()
}

#[test]
fn packs_and_chunks_decide_no_bit() {
    let expected = load("expected/teacher_topk.safetensors");
    let (starts, input_ids) = (offsets(&expected["offsets"]), ids(&expected["input_ids"]));
    let conversations: Vec<&[u32]> = starts.windows(2).map(|w| &input_ids[w[0]..w[1]]).collect();
    // One of two tokens, the shortest that has a position: alone it is the smallest product there is.
    let conversations = [conversations, vec![&input_ids[..2]]].concat();
    let positions: Vec<Vec<u32>> = conversations.iter().map(|c| all_positions(c)).collect();
    let teacher = teacher();
    let capture = Capture::top_k(2047);
    let pack = |range: std::ops::Range<usize>| {
        Pack::new(range.map(|i| Sequence { input_ids: conversations[i], positions: &positions[i] }))
    };
    let scored = |teacher: &Teacher, budget: usize, together: usize, chunk: usize| {
        let packs: Vec<Pack> = pack::plan(conversations.iter().map(|c| c.len()), budget).into_iter().map(pack).collect();
        let mut all = Vec::new();
        for block in packs.chunks(together) {
            let scored = teacher.score(block, &capture, chunk, &RunContext::default()).unwrap().unwrap();
            assert_eq!(scored.len(), block.len());
            all.extend(scored.iter().flat_map(|captured| bits(&captured.targets, 0..captured.targets.len())));
        }
        (packs.len(), all)
    };
    let (alone, want) = scored(&teacher, 1, 1, 1000);
    assert_eq!(alone, conversations.len());
    let streamed = teacher_of(2048, Precision::F32, Residency::Streamed).unwrap();
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    for (budget, together, chunk) in [(64, 1, 7), (300, 2, 1), (512, 100, 100), (4096, 1, 256), (1 << 20, 1, 1 << 20)] {
        for (teacher, name) in [(&teacher, "resident"), (&streamed, "streamed")] {
            let (packs, found) = scored(teacher, budget, together, chunk);
            let different = want.iter().zip(&found).filter(|(a, b)| a != b).count();
            println!("{name}, {budget} tokens: {packs} packs, {different} of {} positions differ", want.len());
            assert!(found == want, "{name}, {budget} tokens at once, blocks of {together}, {chunk} logits at once: {different}");
        }
        assert!(one_thread.install(|| scored(&streamed, budget, together, chunk)).1 == want, "one thread, {budget} tokens");
    }
}

/// bf16 keeps 8 bits of each factor, so a logit is off by about 2^-9 of its size for each of some 20 products it went through, averaged
/// over many terms: measured 0.06 at most and 0.008 on average in the log-probabilities of the 8 most likely.
#[test]
fn bf16_is_near_and_does_not_depend_on_packs_either() {
    let (four, exact) = (Four::new(), teacher());
    let rounded = teacher_of(2048, Precision::Bf16, Residency::Resident).unwrap();
    let pack = Pack::new(four.sequences());
    let (want, found) = (logits(&exact, &pack), logits(&rounded, &pack));
    let (mut worst, mut sum, mut n) = (0f64, 0f64, 0);
    for (want, found) in want.iter().zip(&found) {
        let lse = |z: &[f32]| z.iter().map(|z| f64::from(*z).exp()).sum::<f64>().ln();
        let (want_lse, found_lse) = (lse(want), lse(found));
        let mut order: Vec<usize> = (0..want.len()).collect();
        order.sort_by(|a, b| want[*b].total_cmp(&want[*a]));
        for &id in &order[..8] {
            let off = ((f64::from(want[id]) - want_lse) - (f64::from(found[id]) - found_lse)).abs();
            (worst, sum, n) = (worst.max(off), sum + off, n + 1);
        }
    }
    println!("bf16: {worst:.4} at most, {:.5} on average", sum / f64::from(n));
    assert!(worst < 0.2 && sum / f64::from(n) < 0.02 && worst > 1e-4, "{worst} {}", sum / f64::from(n));
    let capture = Capture::top_k(64);
    let (packed, mut alone) = (score(&rounded, &pack, &capture, 100), SoftTargets::default());
    for sequence in four.sequences() {
        alone.extend(&score(&rounded, &Pack::new([sequence]), &capture, 7));
    }
    assert_eq!(packed, alone);
}

#[test]
fn a_stop_is_seen_before_the_block_ends() {
    let (four, context) = (Four::new(), RunContext::default());
    context.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(teacher().score(&[Pack::new(four.sequences())], &Capture::top_k(4), 10, &context).unwrap().is_none());
    let context = RunContext::default();
    let pack = Pack::new(four.sequences());
    context.progress.begin("scoring", "tokens", pack.input_ids().len() as u64);
    teacher().score(std::slice::from_ref(&pack), &Capture::top_k(4), 10, &context).unwrap().unwrap();
    assert_eq!(context.progress.snapshot().1, pack.input_ids().len() as u64, "each token is counted once");
}

#[test]
fn draws_belong_to_the_conversation_and_not_to_its_pack_or_chunk() {
    let (four, teacher) = (Four::new(), teacher());
    for selection in [Selection::Sampled { draws: 25, seed: 7 }, Selection::Hybrid { k: 8, draws: 25, seed: 7 }] {
        let capture = Capture { selection, ..Capture::top_k(1) };
        let packed = score(&teacher, &Pack::new(four.sequences()), &capture, 7);
        assert_eq!(packed, score(&teacher, &Pack::new(four.sequences()), &capture, 1000), "{selection}");
        let mut alone = SoftTargets::default();
        for sequence in four.sequences() {
            alone.extend(&score(&teacher, &Pack::new([sequence]), &capture, 100));
        }
        assert_eq!(packed, alone, "{selection}");
    }
}

#[test]
fn padding_columns_of_the_head_are_left_out_before_the_softmax() {
    // The same model as if its tokenizer had 700 ids: the other 1,348 rows of the head are padding.
    let width = 700;
    let narrow = teacher_of(width, Precision::F32, Residency::Resident).unwrap();
    let input_ids: Vec<u32> = (1..40).collect();
    let positions = all_positions(&input_ids);
    let pack = Pack::new([Sequence { input_ids: &input_ids, positions: &positions }]);
    let targets = score(&narrow, &pack, &Capture::top_k(8), 10);
    let teacher = teacher();
    let full = logits(&teacher, &pack);
    let mut padding_would_have_won = 0;
    for (i, row) in full.iter().enumerate() {
        let (target, known) = (targets.position(i), &row[..width as usize]);
        let lse = known.iter().map(|z| f64::from(*z).exp()).sum::<f64>().ln();
        assert!(target.ids.iter().all(|id| *id < width));
        for (id, logprob) in target.ids.iter().zip(target.logprobs) {
            assert!((f64::from(*logprob) - (f64::from(known[*id as usize]) - lse)).abs() < 1e-5);
        }
        let most = |row: &[f32]| row.iter().copied().fold(f32::MIN, f32::max);
        padding_would_have_won += usize::from(most(row) > most(known));
    }
    assert!(padding_would_have_won > 0, "the case is a real one");
    let error = teacher_of(3000, Precision::F32, Residency::Resident).unwrap_err();
    assert!(error.ends_with("vocab_size: expected at least the tokenizer's 3000 ids, found 2048"), "{error}");
}

/// Bytes of a folder's mapped files that count as this process's memory.
#[cfg(target_os = "linux")]
fn mapped_in_memory(folder: &std::path::Path) -> u64 {
    let (maps, folder) = (std::fs::read_to_string("/proc/self/smaps").unwrap(), folder.to_str().unwrap());
    let (mut inside, mut sum) = (false, 0);
    for line in maps.lines() {
        if let Some(kilobytes) = line.strip_prefix("Rss:") {
            sum += if inside { kilobytes.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024 } else { 0 };
        } else if line.split(' ').next().is_some_and(|field| field.contains('-')) {
            inside = line.contains(folder);
        }
    }
    sum
}

/// While layers are computed, the embedding's pages are let go like a layer's: a block of many tokens touches most of them.
#[cfg(target_os = "linux")]
#[test]
fn a_streamed_teacher_holds_neither_layers_nor_embedding_after_them() {
    let copy = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(golden("teacher-awq")).unwrap().map(Result::unwrap) {
        std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    let of = |residency| {
        let settings = (Precision::F32, residency);
        Teacher::from_folder(copy.path(), 2048, settings, &support::device(), &RunContext::default()).unwrap()
    };
    let input_ids: Vec<u32> = (0..2048).collect();
    let pack = [Pack::new([Sequence { input_ids: &input_ids, positions: &[5] }])];
    let after = |teacher: &Teacher| {
        let hidden = teacher.hidden(&pack, &RunContext::default()).unwrap();
        assert!(hidden.is_some());
        mapped_in_memory(copy.path())
    };
    let streamed = of(Residency::Streamed);
    let loaded = mapped_in_memory(copy.path());
    let found = after(&streamed);
    // A fault maps up to 64 KiB around it: what a layer touches brings some of its neighbours with it. The embedding has 1 MiB.
    assert!(found <= loaded + (256 << 10), "{found} bytes after the layers, {loaded} before");
    drop(streamed);
    let all: u64 = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        .map(|file| std::fs::metadata(copy.path().join(file)).unwrap().len())
        .iter()
        .sum();
    // The head of the last file has not been used yet.
    let found = after(&of(Residency::Resident));
    assert!(found > all / 2, "{found} bytes of {all} resident: the measure measures");
}
