//! The student against transformers, bitsandbytes and PEFT: logits of every variant, LoRA gradients, a training trajectory.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use candle_core::{DType, Tensor};
use potstill_cache::SoftTargets;
use potstill_pipeline::data::pack::{Pack, Sequence};
use potstill_pipeline::kernel::Precision;
use potstill_pipeline::linear::dense::DenseWeight;
use potstill_pipeline::linear::{Linear, Weight};
use potstill_pipeline::loss::{self, Divergence, LossSettings, LossSums, Tail};
use potstill_pipeline::model::decoder::{Decoder, Holding};
use potstill_pipeline::ops::add;
use potstill_pipeline::run::RunContext;
use potstill_pipeline::student::{LoraSettings, Moment, Student, Walk};
use potstill_pipeline::train::optimizer::{self, AdamW, AdamWConfig};
use std::collections::HashMap;
use support::{floats, golden, ids, load, max_difference, offsets, relative_l2};

fn decoder(holding: Holding) -> Decoder {
    decoder_at(holding, Precision::F32)
}

fn decoder_at(holding: Holding, precision: Precision) -> Decoder {
    Decoder::from_folder(&golden("student"), holding, precision, &support::device(), &RunContext::default()).unwrap()
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
    with_dropout(decoder, 0.0)
}

/// The same, of whose inputs training leaves out a share.
fn with_dropout(decoder: Decoder, dropout: f64) -> Student {
    let mut student = Student::new(decoder, &LoraSettings { dropout, ..LoraSettings::plain(8, 16.0, 0) }).unwrap();
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
    step_at(student, reference, settings, 0)
}

/// Step `number` of a run.
fn step_at(student: &Student, reference: &Reference, settings: &LossSettings, number: u64) -> (LossSums, Vec<Tensor>) {
    let (scale, context) = (1.0 / reference.scored as f64, RunContext::default());
    let (mut sums, mut total, mut first_row) = (LossSums::default(), Vec::new(), 0);
    for (pack, targets) in reference.packs.iter().zip(&reference.targets) {
        let moment = Moment { step: number, first_row };
        let (hidden, tape) = student.forward_training(pack, moment, &context).unwrap().unwrap();
        let head = student.head();
        let (part, d_hidden) = loss::fused(&hidden, head, pack.labels(), Some(targets), settings, scale, 13).unwrap();
        assert_eq!(student.backward_training(tape, &d_hidden, &mut total, &context).unwrap(), Walk::Done);
        first_row += pack.input_ids().len();
        sums.total += part.total * scale;
        sums.kd += part.kd * scale;
        sums.ce += part.ce * scale;
    }
    (sums, total)
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
                Some(sum) => sum.iter().zip(&g).map(|(a, b)| add(a, b).unwrap()).collect(),
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
            let from = floats(&start[&name]);
            moved.extend(floats(&tensor).iter().zip(&from).map(|(to, from)| to - from));
            moved_want.extend(floats(&want).iter().zip(&from).map(|(to, from)| to - from));
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

/// The loss moves in a random direction of each tensor as its gradient says, so what was left out on the way there is left out on the way
/// back, in every projection. (Along the gradient itself it would nearly so with any mask: their average is the gradient without one.)
///
/// A loss of some 3 nats carries f32 noise of about 5e-7; over a way of 2 · 0.02 that is 1.3e-5, and the third derivative adds as much. Of a
/// gradient of 0.1 or more, a random direction of 1,024 sees 3e-3; a mask missing on either way was off by 1e-4 and more in some tensor.
#[test]
fn gradients_with_dropout_equal_finite_differences() {
    let mut student = with_dropout(decoder(Holding::Nf4), 0.3);
    let batch = load("expected/loss_batch.safetensors");
    let (reference, settings) = (reference(&batch, "", true), settings(Tail::Bucket, 1.0, 0.7, 0.3));
    let (_, gradients) = step_at(&student, &reference, &settings, 3);
    let parameters = student.parameters();
    assert_eq!(gradients.len(), parameters.len());
    for (i, gradient) in gradients.iter().enumerate() {
        let gradient = floats(gradient);
        let signs = |j: usize| if (j * 7919 + i * 104_729) % 1009 < 504 { 1.0 } else { -1.0 };
        let unit: Vec<f32> = (0..gradient.len()).map(|j| (signs(j) / (gradient.len() as f64).sqrt()) as f32).collect();
        let along: f64 = gradient.iter().zip(&unit).map(|(g, u)| f64::from(*g) * f64::from(*u)).sum();
        let mut loss = |way: f64| {
            let mut moved = parameters.clone();
            let (from, like) = (floats(&moved[i].1), parameters[i].1.clone());
            let to = from.iter().zip(&unit).map(|(from, unit)| from + unit * way as f32).collect::<Vec<f32>>();
            moved[i].1 = Tensor::from_vec(to, like.dims(), like.device()).unwrap();
            student.set_parameters(&moved).unwrap();
            step_at(&student, &reference, &settings, 3).0.total
        };
        let numeric = (loss(0.02) - loss(-0.02)) / 0.04;
        println!("{}: {numeric} against {along}, {}", parameters[i].0, (numeric - along).abs());
        assert!((numeric - along).abs() < 3e-5, "{}: {numeric} against {along}", parameters[i].0);
    }
}

#[test]
fn dropout_depends_on_seed_step_and_place_alone() {
    let student = with_dropout(decoder(Holding::Nf4), 0.3);
    let batch = load("expected/loss_batch.safetensors");
    let (packed, apart) = (reference(&batch, "", true), reference(&batch, "", false));
    let settings = settings(Tail::Bucket, 1.0, 0.7, 0.3);
    let all = |gradients: &[Tensor]| gradients.iter().flat_map(floats).collect::<Vec<f32>>();
    let (one, g_one) = step_at(&student, &packed, &settings, 7);
    let (two, g_two) = step_at(&student, &apart, &settings, 7);
    assert!((one.total - two.total).abs() < 1e-5 * one.total, "packs: {one:?} {two:?}");
    let difference = relative_l2(&all(&g_two), &all(&g_one));
    assert!(difference < 1e-5, "packs: {difference}");
    let (again, g_again) = step_at(&student, &packed, &settings, 7);
    assert_eq!((again, all(&g_again)), (one, all(&g_one)), "the same step again");
    let (next, _) = step_at(&student, &packed, &settings, 8);
    let (without, _) = step_at(&with_adapter(decoder(Holding::Nf4)), &packed, &settings, 7);
    for (other, what) in [(next, "another step"), (without, "without dropout")] {
        assert!((other.total - one.total).abs() > 1e-4, "{what}: {other:?} {one:?}");
    }
    // Nobody leaves anything out when evaluating.
    let pack = &packed.packs[0];
    let plain = with_adapter(decoder(Holding::Nf4)).hidden(pack, &RunContext::default()).unwrap().unwrap();
    assert_eq!(floats(&student.hidden(pack, &RunContext::default()).unwrap().unwrap()), floats(&plain));
    assert_eq!(floats(&student.forward(pack).unwrap().0), floats(&plain));
}

/// 14B students take their MLP in parts, other ones there than back; small ones only when told to.
#[test]
fn parts_of_the_mlp_change_no_output_and_only_last_bits_of_gradients() {
    let parts = |rows: usize| {
        let mut decoder = decoder(Holding::Nf4);
        decoder.layers.iter_mut().for_each(|layer| layer.mlp_rows = Some(rows));
        with_dropout(decoder, 0.3)
    };
    let (whole, student) = (with_dropout(decoder(Holding::Nf4), 0.3), parts(7));
    let batch = load("expected/loss_batch.safetensors");
    let (reference, settings) = (reference(&batch, "", true), settings(Tail::Bucket, 1.0, 0.7, 0.3));
    assert!(reference.packs[0].input_ids().len() > 3 * 7);
    let ((a, g_a), (b, g_b)) = (step_at(&whole, &reference, &settings, 1), step_at(&student, &reference, &settings, 1));
    assert_eq!(a, b);
    for ((name, _), (a, b)) in whole.parameters().iter().zip(g_a.iter().zip(&g_b)) {
        let difference = relative_l2(&floats(b), &floats(a));
        assert!(difference < 1e-5, "{name}: {difference}");
    }
}

/// Whatever is kept, whether the MLP is taken in parts or not, and with dropout.
#[test]
fn kept_activations_change_no_bit() {
    let batch = load("expected/loss_batch.safetensors");
    let (reference, settings) = (reference(&batch, "", true), settings(Tail::Bucket, 1.0, 0.7, 0.3));
    for mlp_rows in [None, Some(7)] {
        let of = |keep: usize| {
            let mut decoder = decoder(Holding::Nf4);
            decoder.layers.iter_mut().for_each(|layer| layer.mlp_rows = mlp_rows);
            let mut student = with_dropout(decoder, 0.3);
            student.keep_layers(keep);
            let (sums, gradients) = step_at(&student, &reference, &settings, 1);
            (sums, gradients.iter().flat_map(floats).collect::<Vec<f32>>())
        };
        let again = of(0);
        for keep in [1, 2, 3] {
            assert_eq!(of(keep), again, "{keep} layers kept, parts of {mlp_rows:?}");
        }
    }
}

#[test]
fn a_stop_is_seen_on_every_way() {
    let student = with_adapter(decoder(Holding::Nf4));
    let batch = load("expected/loss_batch.safetensors");
    let (reference, settings) = (reference(&batch, "", true), settings(Tail::Bucket, 1.0, 1.0, 0.0));
    let (pack, targets) = (&reference.packs[0], &reference.targets[0]);
    let (hidden, tape) = student.forward(pack).unwrap();
    let stopped = RunContext::default();
    stopped.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(student.forward_training(pack, Moment { step: 0, first_row: 0 }, &stopped).unwrap().is_none());
    assert!(student.hidden(pack, &stopped).unwrap().is_none());
    let loss = loss::Batch { labels: pack.labels(), targets: Some(targets), lse_t: None, settings: &settings, scale: 1.0 };
    assert!(loss::fused_batch(&hidden, student.head(), &loss, 8, &stopped).unwrap().is_none());
    let mut sums = Vec::new();
    assert_eq!(student.backward_training(tape, &hidden, &mut sums, &stopped).unwrap(), Walk::Stopped);
}
