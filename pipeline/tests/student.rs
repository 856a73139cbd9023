//! The student against transformers, bitsandbytes and PEFT: logits of every variant, LoRA gradients, a training trajectory.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use candle_core::{DType, Device, Tensor};
use potstill_cache::SoftTargets;
use potstill_pipeline::data::pack::{Pack, Sequence};
use potstill_pipeline::kernel::Precision;
use potstill_pipeline::linear::dense::DenseWeight;
use potstill_pipeline::linear::{Linear, Weight};
use potstill_pipeline::loss::{self, Divergence, LossSettings, LossSums, Tail};
use potstill_pipeline::model::decoder::{Decoder, Holding};
use potstill_pipeline::run::RunContext;
use potstill_pipeline::student::{LoraSettings, Student};
use potstill_pipeline::train::optimizer::{self, AdamW, AdamWConfig};
use std::collections::HashMap;
use support::{floats, golden, ids, load, max_difference, offsets, relative_l2};

fn decoder(holding: Holding) -> Decoder {
    decoder_at(holding, Precision::F32)
}

fn decoder_at(holding: Holding, precision: Precision) -> Decoder {
    Decoder::from_folder(&golden("student"), holding, precision, &Device::Cpu, &RunContext::default()).unwrap()
}

/// NF4 with the absolute maxima as the library stored them where its byte is not the nearest one: the reference's own base.
fn stored_nf4() -> Decoder {
    let mut decoder = decoder(Holding::Nf4);
    let expected = load("expected/nf4.safetensors");
    for (i, layer) in decoder.layers.iter_mut().enumerate() {
        for (linear, name) in layer.linears_mut().into_iter().zip(potstill_pipeline::model::layer::PROJECTIONS) {
            let key = format!("model.layers.{i}.{name}.weight");
            let (Some(absmax), Weight::Nf4(nf4)) = (expected.get(&format!("{key}.absmax_dequant")), &linear.weight) else {
                continue;
            };
            let absmax = floats(absmax);
            let levels = potstill_pipeline::linear::nf4::LEVELS;
            let code = |j: usize| nf4.codes()[j / 2] >> (4 - 4 * (j % 2)) & 15;
            let n = nf4.rows() * nf4.columns();
            let values: Vec<f32> = (0..n).map(|j| levels[code(j) as usize] * absmax[j / 64]).collect();
            let dense = DenseWeight::from_f32(nf4.rows(), nf4.columns(), &values).unwrap();
            *linear = Linear::new(Weight::Dense(dense), linear.bias.clone());
        }
    }
    decoder
}

/// The reference adapter: r = 8, alpha = 16.
fn with_adapter(decoder: Decoder) -> Student {
    let mut student = Student::new(decoder, &LoraSettings::plain(8, 16.0, 0)).unwrap();
    let file = load("expected/lora/adapter_model.safetensors");
    let named = student.parameters().into_iter().map(|(name, _)| {
        let tensor = file[&format!("base_model.model.{name}")].clone();
        (name, tensor)
    });
    student.set_parameters(&named.collect::<Vec<_>>()).unwrap();
    student
}

/// Logits [T, V] of one sequence, every position.
fn logits(student: &Student, input_ids: &[u32]) -> Tensor {
    let pack = Pack::new([Sequence { input_ids, positions: &[] }]);
    let hidden = student.decoder().final_norm(&student.decoder().hidden(&pack).unwrap()).unwrap();
    student.decoder().logits(&hidden).unwrap()
}

fn compare_variant(student: &Student, variant: &str, bound: f32) {
    let worst = worst_logprob(student, &load("expected/student_logits.safetensors"), variant);
    println!("{variant}: worst log-probability {worst:e}");
    assert!(worst < bound, "{variant}: {worst}");
}

fn worst_logprob(student: &Student, expected: &HashMap<String, Tensor>, variant: &str) -> f32 {
    let (starts, input_ids) = (offsets(&expected["offsets"]), ids(&expected["input_ids"]));
    let want_ids = ids(&expected[&format!("{variant}.ids")]);
    let want = floats(&expected[&format!("{variant}.logprobs")]);
    let k = want.len() / input_ids.len();
    let mut worst = 0f32;
    for w in starts.windows(2) {
        let rows: Vec<Vec<f32>> = logits(student, &input_ids[w[0]..w[1]]).to_vec2().unwrap();
        for (t, row) in rows.iter().enumerate() {
            let lse = row.iter().map(|z| f64::from(*z).exp()).sum::<f64>().ln() as f32;
            for j in (w[0] + t) * k..(w[0] + t + 1) * k {
                worst = worst.max((row[want_ids[j] as usize] - lse - want[j]).abs());
            }
        }
    }
    worst
}

fn bare(decoder: Decoder) -> Student {
    // A fresh adapter has B = 0 and changes nothing.
    Student::new(decoder, &LoraSettings::plain(4, 8.0, 3)).unwrap()
}

#[test]
fn logits_equal_transformers_bitsandbytes_and_peft() {
    // Float32 against float32: 1.4e-5 measured; 0.02 where our nearest nested bytes differ from the library's by a step.
    compare_variant(&bare(decoder(Holding::AsStored)), "base", 1e-4);
    compare_variant(&with_adapter(decoder(Holding::AsStored)), "base_lora", 1e-4);
    compare_variant(&bare(decoder(Holding::Nf4)), "nf4", 0.02);
    compare_variant(&with_adapter(decoder(Holding::Nf4)), "nf4_lora", 0.02);
    // The widest bound sees what it should: without its adapter the student is far off.
    let expected = load("expected/student_logits.safetensors");
    assert!(worst_logprob(&bare(decoder(Holding::Nf4)), &expected, "nf4_lora") > 1.0);
}

/// One reference batch: tokens, masks and teacher lists of B sequences.
struct Reference {
    packs: Vec<Pack>,
    targets: Vec<SoftTargets>,
    scored: usize,
}

/// `prefix` is empty for the loss batch and `stepN.` for the trajectory.
fn reference(tensors: &HashMap<String, Tensor>, prefix: &str, packed: bool) -> Reference {
    let get = |name: &str| &tensors[&format!("{prefix}{name}")];
    let (b, s) = get("input_ids").dims2().unwrap();
    let k = get("teacher_ids").dim(2).unwrap();
    let (input_ids, attention) = (ids(get("input_ids")), ids(get("attention_mask")));
    let mask = support::bytes(get("loss_mask"));
    let (teacher_ids, logprobs) = (ids(get("teacher_ids")), floats(get("teacher_logprobs")));
    let tails = floats(get("teacher_tail_logprob"));
    let mut sequences = Vec::new();
    let mut targets = Vec::new();
    for row in 0..b {
        let length = (0..s).filter(|t| attention[row * s + t] == 1).count();
        let positions: Vec<u32> = (0..s).filter(|t| mask[row * s + t] == 1).map(|t| t as u32).collect();
        let mut of_row = SoftTargets::with_capacity(positions.len(), k);
        for p in &positions {
            let at = row * s + *p as usize;
            of_row.push(&teacher_ids[at * k..(at + 1) * k], &logprobs[at * k..(at + 1) * k], tails[at]);
        }
        sequences.push((input_ids[row * s..row * s + length].to_vec(), positions));
        targets.push(of_row);
    }
    let scored = targets.iter().map(SoftTargets::len).sum();
    let view = |(ids, positions): &(Vec<u32>, Vec<u32>)| Pack::new([Sequence { input_ids: ids, positions }]);
    if !packed {
        return Reference { packs: sequences.iter().map(view).collect(), targets, scored };
    }
    let pack = Pack::new(sequences.iter().map(|(ids, positions)| Sequence { input_ids: ids, positions }));
    let mut all = SoftTargets::default();
    targets.iter().for_each(|t| all.extend(t));
    Reference { packs: vec![pack], targets: vec![all], scored }
}

/// Mean loss over the batch, and its gradients: what a training step does.
fn step(student: &Student, reference: &Reference, settings: &LossSettings) -> (LossSums, Vec<Tensor>) {
    let scale = 1.0 / reference.scored as f64;
    let (mut sums, mut total): (LossSums, Option<Vec<Tensor>>) = Default::default();
    for (pack, targets) in reference.packs.iter().zip(&reference.targets) {
        let (hidden, tape) = student.forward(pack).unwrap();
        let head = student.head();
        let (part, d_hidden) = loss::fused(&hidden, head, pack.labels(), Some(targets), settings, scale, 13).unwrap();
        let gradients = student.backward(tape, &d_hidden).unwrap();
        total = Some(match total {
            None => gradients,
            Some(t) => t.iter().zip(&gradients).map(|(a, b)| (a + b).unwrap()).collect(),
        });
        sums.total += part.total * scale;
        sums.kd += part.kd * scale;
        sums.ce += part.ce * scale;
    }
    (sums, total.unwrap())
}

fn settings(tail: Tail, temperature: f64, kd_alpha: f64, kd_ce_alpha: f64) -> LossSettings {
    LossSettings { divergence: Divergence::ForwardKl, tail, temperature, kd_alpha, kd_ce_alpha }
}

#[test]
fn lora_gradients_equal_peft() {
    let student = with_adapter(stored_nf4());
    let (batch, expected) = (load("expected/loss_batch.safetensors"), load("expected/lora_grads.safetensors"));
    for (name, tail) in [("forward_kl.renorm.T1", Tail::Renorm), ("forward_kl.bucket.T1", Tail::Bucket)] {
        let (_, gradients) = step(&student, &reference(&batch, "", true), &settings(tail, 1.0, 1.0, 0.0));
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for ((parameter, _), gradient) in student.parameters().iter().zip(&gradients) {
            let want = floats(&expected[&format!("{name}/base_model.model.{parameter}")]);
            let got = floats(gradient);
            assert!(got.iter().all(|v| v.is_finite()) && got.iter().any(|v| *v != 0.0), "{parameter} gets a gradient");
            let worst = relative_l2(&got, &want);
            assert!(worst < 1e-3, "{name} {parameter}: {worst}");
            ours.extend(got);
            theirs.extend(want);
        }
        let all = relative_l2(&ours, &theirs);
        println!("{name}: relative L2 of all gradients {all:e}");
        assert!(all < 1e-4, "{name}: {all}");
    }
}

#[test]
fn losses_of_a_batch_equal_the_reference() {
    let student = with_adapter(stored_nf4());
    let batch = load("expected/loss_batch.safetensors");
    let want: serde_json::Value = serde_json::from_slice(&std::fs::read(golden("expected/losses.json")).unwrap()).unwrap();
    let reference = reference(&batch, "", false);
    for (name, tail, t) in [("renorm.T1", Tail::Renorm, 1.0), ("bucket.T1", Tail::Bucket, 1.0), ("bucket.T2", Tail::Bucket, 2.0)]
    {
        let (sums, _) = step(&student, &reference, &settings(tail, t, 1.0, 0.0));
        let want = want["values"][format!("forward_kl.{name}")].as_f64().unwrap();
        // The student's own logits, not the stored ones: 1.4e-5 in a logit moves the mean of 49 positions by less.
        assert!((sums.kd - want).abs() < 1e-4, "{name}: {} {want}", sums.kd);
        assert!((sums.total - t * t * sums.kd).abs() < 1e-12);
    }
}

#[test]
fn accumulation_equals_one_pack() {
    let student = with_adapter(decoder(Holding::Nf4));
    let batch = load("expected/loss_batch.safetensors");
    let settings = settings(Tail::Bucket, 2.0, 0.7, 0.3);
    let (one, g_one) = step(&student, &reference(&batch, "", true), &settings);
    let (two, g_two) = step(&student, &reference(&batch, "", false), &settings);
    assert!((one.total - two.total).abs() < 1e-5 * one.total, "{one:?} {two:?}");
    for (a, b) in g_one.iter().zip(&g_two) {
        let difference = relative_l2(&floats(a), &floats(b));
        assert!(difference < 1e-5, "{difference}");
    }
}

#[test]
fn any_number_of_ranks_agrees() {
    let student = with_adapter(decoder(Holding::Nf4));
    let batch = load("expected/loss_batch.safetensors");
    let settings = settings(Tail::Bucket, 2.0, 0.7, 0.3);
    let (one, g_one) = step(&student, &reference(&batch, "", true), &settings);
    let whole = reference(&batch, "", false);
    let rows = whole.packs.len();
    for ranks in 2..=rows {
        // Each rank has every ranks-th row, knows how many positions all ranks score together, and sends its sums.
        let (mut total, mut sum): (f64, Option<Vec<Tensor>>) = (0.0, None);
        for rank in 0..ranks {
            let mine = |i: &usize| i % ranks == rank;
            let packs = (0..rows).filter(mine).map(|i| whole.packs[i].clone()).collect();
            let targets = (0..rows).filter(mine).map(|i| whole.targets[i].clone()).collect();
            let (part, g) = step(&student, &Reference { packs, targets, scored: whole.scored }, &settings);
            total += part.total;
            sum = Some(match sum {
                None => g,
                Some(sum) => sum.iter().zip(&g).map(|(a, b)| (a + b).unwrap()).collect(),
            });
        }
        assert!((one.total - total).abs() < 1e-5 * one.total, "{ranks} ranks: {} {total}", one.total);
        for (a, b) in g_one.iter().zip(&sum.unwrap()) {
            let difference = relative_l2(&floats(a), &floats(b));
            assert!(difference < 1e-5, "{ranks} ranks: {difference}");
        }
    }
    // The mean of the ranks' own means is another number: rows differ in scored positions.
    let own = whole.packs.iter().zip(&whole.targets).map(|(pack, targets)| {
        let (packs, scored) = (vec![pack.clone()], targets.len());
        step(&student, &Reference { packs, targets: vec![targets.clone()], scored }, &settings).0.total
    });
    assert!((one.total - own.sum::<f64>() / rows as f64).abs() > 1e-3 * one.total);
}

#[test]
fn five_steps_follow_the_reference_trajectory() {
    let batches = load("expected/traj_batches.safetensors");
    let want: serde_json::Value = serde_json::from_slice(&std::fs::read(golden("expected/traj.json")).unwrap()).unwrap();
    for (run, loss) in [("a", settings(Tail::Renorm, 1.0, 1.0, 0.0)), ("b", settings(Tail::Renorm, 2.0, 0.7, 0.3))] {
        let student = with_adapter(stored_nf4());
        // The update changes values where they lie.
        let start: HashMap<String, Tensor> =
            student.parameters().into_iter().map(|(name, tensor)| (name, tensor.copy().unwrap())).collect();
        let config = AdamWConfig { weight_decay: 0.01, ..AdamWConfig::default() };
        let mut adamw = AdamW::new(config, &student.parameters()).unwrap();
        let want = &want["runs"][run];
        for i in 0..5 {
            let (sums, mut gradients) = step(&student, &reference(&batches, &format!("step{i}."), true), &loss);
            let norm = optimizer::clip(&mut gradients, 0.0).unwrap();
            let (want_loss, want_norm) =
                (want["loss_per_step"][i].as_f64().unwrap(), want["grad_norm_per_step"][i].as_f64().unwrap());
            println!("run {run} step {i}: loss {} ({want_loss}), norm {norm} ({want_norm})", sums.total);
            assert!((sums.total - want_loss).abs() < 1e-4 * want_loss.max(1.0), "run {run} step {i}: {} {want_loss}", sums.total);
            assert!((norm - want_norm).abs() < 1e-3 * want_norm, "run {run} step {i}: norm {norm} {want_norm}");
            adamw.step(&student.parameters(), &gradients, 0.002).unwrap();
        }
        let (last, _) = step(&student, &reference(&batches, "step0.", true), &loss);
        assert!((last.total - want["loss_batch0_after_step5"].as_f64().unwrap()).abs() < 5e-4, "run {run}: {}", last.total);
        let finals = load(&format!("expected/traj_{run}_final.safetensors"));
        let (mut moved, mut moved_want, mut worst) = (Vec::new(), Vec::new(), 0f32);
        for (name, tensor) in student.parameters() {
            let want = finals[&format!("base_model.model.{name}")].to_dtype(DType::F32).unwrap();
            worst = worst.max(max_difference(&floats(&tensor), &floats(&want)));
            moved.extend(floats(&(&tensor - &start[&name]).unwrap()));
            moved_want.extend(floats(&(&want - &start[&name]).unwrap()));
        }
        let relative = relative_l2(&moved, &moved_want);
        println!("run {run}: final adapter differs by {relative:e} of the way, at most {worst:e}");
        assert!(relative < 1e-3 && worst < 2e-4, "run {run}: {relative} {worst}");
    }
}

/// bf16 rounds each factor of a product by 2^-9 / sqrt(3), about 1e-3, of itself on average. Some twenty products lie between a loss and a
/// gradient two layers down, and their errors add at random: about 0.5 %. Four times that is allowed; a wrong product is off by its size.
#[test]
fn gradients_in_bf16_are_those_in_f32_rounded() {
    let (exact, rounded) = (with_adapter(decoder(Holding::Nf4)), with_adapter(decoder_at(Holding::Nf4, Precision::Bf16)));
    let batch = load("expected/loss_batch.safetensors");
    let settings = settings(Tail::Bucket, 1.0, 0.7, 0.3);
    let (a, g_a) = step(&exact, &reference(&batch, "", true), &settings);
    let (b, g_b) = step(&rounded, &reference(&batch, "", true), &settings);
    assert!((a.total - b.total).abs() < 2e-3 * a.total && a.total != b.total, "{a:?} {b:?}");
    let all = |gradients: &[Tensor]| gradients.iter().flat_map(floats).collect::<Vec<f32>>();
    let difference = relative_l2(&all(&g_b), &all(&g_a));
    println!("bf16 against f32: relative L2 of all gradients {difference:e}");
    assert!((1e-4..2e-2).contains(&difference), "{difference}");
}
