//! The table against sizes worked out by hand for three students of the family, and against what the code holds.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::adapter::{Scaling, TargetModules};
use crate::kernel::Precision;
use crate::model::config::{Biases, Quantization};
use crate::model::decoder::{Decoder, Holding};
use crate::run::RunContext;
use crate::student::{LoraSettings, Student};
use crate::train::Objective;
use candle_core::Device;
use std::path::{Path, PathBuf};

struct Shape {
    hidden: usize,
    layers: usize,
    heads: (usize, usize),
    head_dim: usize,
    intermediate: usize,
    vocab: usize,
    tied: bool,
}

fn model(shape: &Shape) -> ModelConfig {
    ModelConfig {
        hidden_size: shape.hidden,
        intermediate_size: shape.intermediate,
        layers: shape.layers,
        heads: shape.heads.0,
        kv_heads: shape.heads.1,
        head_dim: shape.head_dim,
        vocab_size: shape.vocab,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        context: 32_768,
        tied: shape.tied,
        biases: Biases::QueryKeyValue,
        head_norms: false,
        quantization: Quantization::None,
    }
}

/// Qwen2.5-0.5B.
fn half_b() -> ModelConfig {
    let heads = (14, 2);
    model(&Shape { hidden: 896, layers: 24, heads, head_dim: 64, intermediate: 4864, vocab: 151_936, tied: true })
}

/// Qwen1.5-7B.
fn seven_b() -> ModelConfig {
    let heads = (32, 32);
    model(&Shape { hidden: 4096, layers: 32, heads, head_dim: 128, intermediate: 11_008, vocab: 151_936, tied: false })
}

/// Qwen1.5-14B.
fn fourteen_b() -> ModelConfig {
    let heads = (40, 40);
    model(&Shape { hidden: 5120, layers: 40, heads, head_dim: 128, intermediate: 13_696, vocab: 152_064, tied: false })
}

/// r = 64 on everything, one pack of several with 2,048 tokens that are all scored, the default chunk.
fn settings() -> MemorySettings {
    let (tokens, rank, targets, optimizer) = (2048, 64, TargetModules::ALL, StateWidth::F32);
    MemorySettings {
        tokens,
        scored: 2048,
        head_chunk: 256,
        keep_layers: 0,
        rank,
        targets,
        optimizer,
        packs: Packs::Several,
        unpacked: None,
    }
}

fn bytes(memory: &Memory, name: &str) -> u64 {
    memory.parts.iter().find(|part| part.name == name).map(|part| part.bytes).unwrap()
}

#[test]
fn sizes_of_three_students_are_those_worked_out_by_hand() {
    // Per layer of the 0.5B: q and o 896 · 896, k and v 128 · 896, gate, up and down 4864 · 896: 14,909,440 weights; 24 layers,
    // half a byte each. The 7B has 4 · 4096² + 3 · 4096 · 11008 in each of 32, the 14B 4 · 5120² + 3 · 5120 · 13696 in each of 40.
    // Trainable: 64 · (in + out) of each. Layer inputs: layers · 2048 · H · 4. A chunk: 256 · (V + 8192) · 4.
    let cases = [
        (half_b(), [178_913_280, 272_269_312, 140_771_328, 281_542_656, 176_160_768, 163_971_072]),
        (seven_b(), [3_238_002_688, 1_244_659_712, 639_631_360, 1_279_262_720, 1_073_741_824, 163_971_072]),
        (fourteen_b(), [6_304_563_200, 1_557_135_360, 997_457_920, 1_994_915_840, 1_677_721_600, 164_102_144]),
    ];
    let names = ["NF4 codes", "head", "adapter", "optimiser", "layer inputs", "logits of a chunk"];
    for (model, expected) in cases {
        let memory = memory(&model, &settings());
        assert_eq!(names.map(|name| bytes(&memory, name)), expected);
        assert_eq!((memory.host, bytes(&memory, "gradients")), (expected[1], expected[2]));
        assert_eq!(memory.trainable * 4, expected[2]);
    }
}

#[test]
fn small_parts_are_those_worked_out_by_hand() {
    let memory = memory(&half_b(), &settings());
    // Blocks of 64 in a layer: q, o 12,544 each, k, v 1,792 each, MLP 68,096 each: 232,960. Scales of 256 blocks: 49, 49, 7, 7 and
    // 3 · 266; one offset each: (232,960 + 4 · (910 + 7)) · 24.
    assert_eq!(bytes(&memory, "NF4 absolute maxima"), (232_960 + 4 * 917) * 24);
    // Two norms of 896, biases of 896 + 128 + 128, in each layer, and the last norm.
    assert_eq!(bytes(&memory, "norms and biases"), 4 * (24 * (2 * 896 + 1152) + 896));
    assert_eq!(bytes(&memory, "scored hidden states"), 2048 * 896 * 4);
    // The MLP's half, all rows at once (512 MiB / (28 · 4864) are 3,942). A token holds h, dy, dh (896 each), q and attended
    // (896 each), k and v (128 each), 14 log-sum-exps, 4 · 64 of A x; and 7 · 4864, 3 · 896 and 3 · 64 of the part.
    let token = 3 * 896 + 2 * 896 + 2 * 128 + 14 + 4 * 64 + 7 * 4864 + 3 * 896 + 3 * 64;
    assert_eq!(bytes(&memory, "one layer's backward"), 2048 * token * 4);
}

#[test]
fn the_mlp_of_a_wide_student_goes_back_in_parts() {
    // 512 MiB / (28 · 13,696) are 1,399 rows; dL/dh exists twice while parts are joined.
    let token = 2 * 5120 + 2 * 5120 + 2 * 5120 + 40 + 4 * 64 + 2 * 5120;
    let row = 7 * 13_696 + 3 * 5120 + 3 * 64;
    assert_eq!(bytes(&memory(&fourteen_b(), &settings()), "one layer's backward"), (2048 * token + 1399 * row) * 4);
}

#[test]
fn where_the_mlp_is_narrow_attention_is_the_peak_of_a_layer() {
    // Keys and values of two heads: its projections' way back. Beside what each moment has: dh, normed, d normed, dx (896 each), d attended, dq
    // twice (896 each), dk twice, dv (128 each), one packed (896).
    let narrow = |model: ModelConfig| memory(&ModelConfig { intermediate_size: 64, ..model }, &settings());
    let token = 2 * 896 + 2 * 896 + 2 * 128 + 14 + 4 * 64 + 4 * 896 + 3 * 896 + 3 * 128 + 896;
    assert_eq!(bytes(&narrow(half_b()), "one layer's backward"), 2048 * token * 4);
    // As many heads of keys and values as of queries: its own. dh, d attended, dq, dk, dv of all heads; dq, dk, dv of each head; three
    // panels: eleven of 4096.
    let token = 2 * 4096 + 2 * 4096 + 2 * 4096 + 32 + 4 * 64 + 11 * 4096;
    assert_eq!(bytes(&narrow(seven_b()), "one layer's backward"), 2048 * token * 4);
}

#[test]
fn kept_layers_hold_what_their_way_back_reads() {
    let of = |keep_layers: u64| memory(&half_b(), &MemorySettings { keep_layers, ..settings() });
    // h, q, attended (896 each), k, v (128 each), 14 log-sum-exps, gate, up (4864 each), seven A x of 64.
    let layer = 2048 * 4 * (3 * 896 + 2 * 128 + 14 + 2 * 4864 + 7 * 64);
    assert_eq!([0, 1, 24].map(|n| bytes(&of(n), "activations of kept layers")), [0, layer, 24 * layer]);
    // All rows go back at once, so a kept layer's own way back takes no more than another's.
    assert_eq!(of(1).device, of(0).device);
    assert_eq!(of(24).device - of(0).device, 23 * layer);
    // The 14B's go back in two parts, so keeping holds gate, up and A x of the other rows too.
    let of = |keep_layers: u64| memory(&fourteen_b(), &MemorySettings { keep_layers, ..settings() });
    assert_eq!(of(1).device - of(0).device, (2048 - 1399) * (2 * 13_696 + 3 * 64) * 4);
}

#[test]
fn a_gpu_holds_a_layer_unpacked_on_the_way_back() {
    let on = |unpacked| memory(&fourteen_b(), &MemorySettings { unpacked, ..settings() });
    // q, k, v and o of 5120 by 5120, gate, up and down of 5120 by 13696.
    let layer = 4 * 5120 * 5120 + 3 * 5120 * 13_696;
    assert_eq!(bytes(&on(Some(2)), "weights of a layer, unpacked"), 2 * layer);
    assert_eq!(on(Some(4)).device - on(None).device, 4 * layer);
    assert!(on(Some(2)).device < 16_000_000_000);
}

#[test]
fn rows_held_out_are_not_passed_over() {
    let config = TrainConfig { batch_size: 16, eval_rows: 20, ..TrainConfig::default() };
    assert_eq!(passes(&config, 100), (5, 1.0));
    assert_eq!(passes(&TrainConfig { steps: Some(15), ..config.clone() }, 100), (15, 3.0));
    assert_eq!(passes(&TrainConfig { eval_rows: 0, steps: Some(25), ..config }, 100), (25, 4.0));
}

#[test]
fn fourteen_b_at_2048_tokens_and_rank_64_fits_16_gb() {
    let whole = memory(&fourteen_b(), &settings());
    assert_eq!((whole.peak, whole.device), (When::Backward, 14_761_842_784));
    assert!(whole.device < 16_000_000_000);
    let eight = memory(&fourteen_b(), &MemorySettings { optimizer: StateWidth::Blocks8, ..settings() });
    // Two bytes a number and two scales a block: A and B of 64 · 5120 have 1,280 blocks, of 64 · 13,696 3,424.
    let blocks = 40 * (4 * (1280 + 1280) + 3 * (1280 + 3424));
    assert_eq!(bytes(&eight, "optimiser"), 2 * 249_364_480 + 8 * blocks);
    assert_eq!(whole.device - eight.device, bytes(&whole, "optimiser") - bytes(&eight, "optimiser"));
}

#[test]
fn the_peak_is_the_largest_phase_and_what_is_always_there() {
    let of = |s: MemorySettings| memory(&half_b(), &s);
    let one = of(MemorySettings { packs: Packs::One, ..settings() });
    assert_eq!((bytes(&one, "gradients of a layer"), of(settings()).device - one.device), (0, 140_771_328 / 24));
    // A chunk of everything makes the loss the peak; nothing of the backward counts then.
    let loss = of(MemorySettings { head_chunk: 4096, ..settings() });
    let parts = |when: &[When]| -> u64 {
        loss.parts.iter().filter(|p| p.place == Place::Device && when.contains(&p.when)).map(|p| p.bytes).sum()
    };
    assert_eq!(bytes(&loss, "logits of a chunk"), 2048 * (151_936 + 8192) * 4, "no more rows than are scored");
    assert_eq!((loss.peak, loss.device), (When::Loss, parts(&[When::Always, When::Pass, When::Loss])));
}

fn golden(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden")).join(name)
}

#[test]
fn the_reference_student_holds_what_the_table_says() {
    let device = Device::Cpu;
    let decoder =
        Decoder::from_folder(&golden("student"), Holding::Nf4, Precision::F32, &device, &RunContext::default()).unwrap();
    let targets = TargetModules::of(["v_proj", "down_proj"]).unwrap();
    let lora = LoraSettings { targets, scaling: Scaling::RankStabilised, ..LoraSettings::plain(4, 8.0, 0) };
    let student = Student::new(decoder, &lora).unwrap();
    let settings = MemorySettings { rank: 4, targets, ..settings() };
    let memory = memory(&student.decoder().config, &settings);
    let (mut packed, mut small) = (0, student.decoder().config.hidden_size as u64 * 4);
    for layer in &student.decoder().layers {
        for linear in layer.linears() {
            let crate::linear::Weight::Nf4(weight) = &linear.weight else { panic!("not NF4") };
            packed += weight.bytes() as u64;
            small += linear.bias.as_ref().map_or(0, |bias| 4 * bias.elem_count() as u64);
        }
        small += 4 * (layer.input_layernorm.elem_count() + layer.post_attention_layernorm.elem_count()) as u64;
    }
    assert_eq!(bytes(&memory, "NF4 codes") + bytes(&memory, "NF4 absolute maxima"), packed);
    assert_eq!(bytes(&memory, "norms and biases"), small);
    let trainable: usize = student.parameters().iter().map(|(_, tensor)| tensor.elem_count()).sum();
    assert_eq!(memory.trainable, trainable as u64);
}

#[test]
fn a_config_alone_is_enough_and_nothing_else_is_read() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(golden("student/config.json"), dir.path().join("config.json")).unwrap();
    let config = TrainConfig { student: dir.path().into(), pack_tokens: 512, batch_size: 1, ..TrainConfig::default() };
    let outlook = look(&config).unwrap();
    assert_eq!((outlook.pack_tokens, outlook.run.clone()), (512, None));
    assert_eq!(bytes(&outlook.memory, "gradients of a layer"), 0, "a step of one conversation is one pack");
    assert_eq!(bytes(&outlook.memory, "layer inputs"), 2 * 512 * 128 * 4);
    let several = look(&TrainConfig { batch_size: 16, ..config.clone() }).unwrap();
    assert!(bytes(&several.memory, "gradients of a layer") > 0);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was written");

    // Of chats the longest may be as long as the settings allow, and a step of one is no longer than that.
    let chats = TrainConfig { data: vec!["none".into()], objective: Objective::Sft, max_length: 300, ..config.clone() };
    assert_eq!(look(&chats).unwrap().pack_tokens, 300);
    assert_eq!(look(&TrainConfig { max_length: 600, batch_size: 16, ..chats.clone() }).unwrap().pack_tokens, 600);

    let error = |config: TrainConfig| look(&config).unwrap_err().to_string();
    assert!(error(TrainConfig { cache: dir.path().into(), ..config.clone() }).contains("manifest.json"));
    assert!(error(TrainConfig { batch_size: 0, ..config.clone() }).contains("batch_size"));
    assert!(
        error(TrainConfig { keep_layers: 3, ..config.clone() })
            .contains("keep_layers = 3: expected at most 2, the student's layers")
    );
    assert!(error(TrainConfig { dropout: 1.0, ..config.clone() }).contains("dropout"));
    // What a run refuses before it reads its rows is refused here too.
    assert!(error(TrainConfig { cache: "cache".into(), ..chats.clone() }).contains("both cache and data are given"));
    assert!(
        error(TrainConfig { objective: Objective::Distill, ..chats }).contains("objective = distill: expected sft with data")
    );
    assert!(error(TrainConfig { max_unknown_mass: 2.0, ..config.clone() }).contains("max_unknown_mass = 2"));
    assert!(error(TrainConfig { min_lr_ratio: 0.1, ..config.clone() }).contains("min_lr_ratio = 0.1"));
    assert!(error(TrainConfig { student: golden("teacher-awq"), ..config }).contains("quantised"));
}
