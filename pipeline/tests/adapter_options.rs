//! What an adapter may be: on some projections alone, scaled by √r; and that a run's folder says so.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use candle_core::{Device, Tensor};
use potstill_pipeline::adapter::{AdapterConfig, Scaling, TargetModules};
use potstill_pipeline::data::pack::{Pack, Sequence};
use potstill_pipeline::kernel::Precision;
use potstill_pipeline::model::decoder::{Decoder, Holding};
use potstill_pipeline::run::RunContext;
use potstill_pipeline::student::{LoraSettings, Student};
use std::collections::BTreeMap;
use support::{floats, golden, max_difference};

fn student(settings: &LoraSettings) -> Student {
    let decoder =
        Decoder::from_folder(&golden("student"), Holding::Nf4, Precision::F32, &support::device(), &RunContext::default())
            .unwrap();
    Student::new(decoder, settings).unwrap()
}

fn on(names: &str) -> LoraSettings {
    LoraSettings { targets: TargetModules::of(names.split(',')).unwrap(), ..LoraSettings::plain(4, 8.0, 7) }
}

/// The student with these values instead of its parameters'; 0 for parameters that are not among them.
fn with(mut student: Student, values: &BTreeMap<String, Tensor>) -> Student {
    let named = student.parameters().into_iter().map(|(name, old)| {
        let value = values.get(&name).cloned().unwrap_or_else(|| old.zeros_like().unwrap());
        (name, value)
    });
    let named: Vec<_> = named.collect();
    student.set_parameters(&named).unwrap();
    student
}

/// Names and gradients of all parameters, from a fixed dL/d(hidden), and the hidden states.
fn gradients(student: &Student) -> (Vec<f32>, BTreeMap<String, Vec<f32>>) {
    let input_ids: Vec<u32> = (0..24).map(|i| (i * 37 + 11) % 2000).collect();
    let positions: Vec<u32> = (3..23).collect();
    let pack = Pack::new([Sequence { input_ids: &input_ids, positions: &positions }]);
    let (hidden, tape) = student.forward(&pack).unwrap();
    let d: Vec<f32> = (0..hidden.elem_count()).map(|i| (i as f32 * 0.7).sin() * 0.01).collect();
    let d = Tensor::from_vec(d, hidden.dims(), &support::device()).unwrap();
    let all = student.backward(tape, &d).unwrap();
    let names = student.parameters();
    assert_eq!(names.len(), all.len(), "a gradient for each parameter and no other");
    let by_name = names.into_iter().zip(&all).map(|((name, parameter), gradient)| {
        assert_eq!(parameter.dims(), gradient.dims(), "{name}");
        (name, floats(gradient))
    });
    (floats(&hidden), by_name.collect())
}

/// Both factors of some projections away from 0, by name.
fn factors(of: &Student) -> BTreeMap<String, Tensor> {
    let mut values = BTreeMap::new();
    for (n, (name, tensor)) in of.parameters().into_iter().enumerate() {
        let flat: Vec<f32> = (0..tensor.elem_count()).map(|i| ((i * 7 + n) as f32 * 0.31).sin() * 0.05).collect();
        values.insert(name, Tensor::from_vec(flat, tensor.dims(), &Device::Cpu).unwrap());
    }
    values
}

#[test]
fn projections_without_an_adapter_have_no_parameters_and_change_nothing_for_the_others() {
    for names in ["q_proj,v_proj", "down_proj", "k_proj,o_proj,gate_proj", "up_proj"] {
        let part = student(&on(names));
        let values = factors(&part);
        // PEFT's names of the same target modules, layer by layer.
        let expected: Vec<String> = (0..2)
            .flat_map(|layer| {
                potstill_pipeline::model::layer::PROJECTIONS.into_iter().filter_map(move |p| {
                    let last = p.rsplit('.').next().unwrap();
                    names.split(',').any(|name| name == last).then(|| format!("model.layers.{layer}.{p}"))
                })
            })
            .flat_map(|module| ["A", "B"].map(|matrix| format!("{module}.lora_{matrix}.weight")))
            .collect();
        let found: Vec<String> = part.parameters().into_iter().map(|(name, _)| name).collect();
        assert_eq!(found, expected);

        // An adapter on everything whose other factors are 0 is the same function, with the same gradients of the same factors.
        let (hidden, part) = gradients(&with(part, &values));
        let (hidden_of_whole, whole) = gradients(&with(student(&on("all")), &values));
        // Sums of the same numbers, with zeros added: f32's last bits at most.
        assert!(max_difference(&hidden, &hidden_of_whole) < 1e-6);
        assert_eq!(part.len(), values.len());
        for (name, gradient) in &part {
            assert!(gradient.iter().any(|v| *v != 0.0), "{name} gets a gradient");
            assert!(max_difference(gradient, &whole[name]) < 1e-7, "{name}");
        }
    }
}

#[test]
fn a_part_cannot_be_set_from_the_whole() {
    let (mut part, whole) = (student(&on("q_proj")), student(&on("all")));
    let before = floats(&part.parameters()[0].1);
    let refused = |part: &mut Student, parameters: &[(String, Tensor)]| part.set_parameters(parameters).unwrap_err().to_string();
    // Both begin with A and B of the first layer's q (r 4, 128 in and out); what comes third is k's A there and the second layer's q here.
    let k = "model.layers.0.self_attn.k_proj.lora_A.weight [4, 128]";
    let q = "model.layers.1.self_attn.q_proj.lora_A.weight [4, 128]";
    assert_eq!(refused(&mut part, &whole.parameters()), format!("adapter = {k}: expected {q}"));
    // Right as far as they go, but half of them: two matrices of q in each of two layers are wanted.
    let half = part.parameters()[..2].to_vec();
    assert_eq!(refused(&mut part, &half), "adapter = 2 tensors: expected 4 tensors");
    assert_eq!(floats(&part.parameters()[0].1), before, "nothing was set");
}

#[test]
fn rank_stabilised_scaling_is_alpha_by_the_root_of_r() {
    let stable = LoraSettings { scaling: Scaling::RankStabilised, ..on("all") };
    let student_of = |settings: &LoraSettings| {
        let student = student(settings);
        let values = factors(&student);
        gradients(&with(student, &values))
    };
    // 8 / √4 = 16 / 4.
    let (hidden, of_stable) = student_of(&stable);
    let (same, of_same) = student_of(&LoraSettings { alpha: 16.0, ..on("all") });
    let (other, _) = student_of(&on("all"));
    assert_eq!((hidden.clone(), of_stable), (same, of_same));
    assert!(max_difference(&hidden, &other) > 1e-3);

    let config = AdapterConfig {
        rank: 4,
        alpha: 8.0,
        scaling: Scaling::RankStabilised,
        dropout: 0.1,
        base_model: String::new(),
        revision: None,
        target_modules: vec!["v_proj".into(), "o_proj".into()],
    };
    let settings = LoraSettings::of(&config).unwrap();
    let expected = LoraSettings { scaling: Scaling::RankStabilised, seed: 0, ..on("o_proj,v_proj") };
    assert_eq!(settings, expected, "dropout belongs to training");
    let wrong = AdapterConfig { target_modules: vec!["lm_head".into()], ..config };
    assert!(LoraSettings::of(&wrong).unwrap_err().to_string().contains("lm_head"));
}

#[test]
fn settings_out_of_their_ranges_are_refused() {
    for (settings, words) in [
        (LoraSettings { rank: 0, ..on("all") }, ["rank", "1 to 1024"]),
        (LoraSettings { rank: 1025, ..on("all") }, ["rank", "1025"]),
        (LoraSettings { dropout: 1.0, ..on("all") }, ["dropout", "0 to below 1"]),
        (LoraSettings { dropout: f64::NAN, ..on("all") }, ["dropout", "NaN"]),
    ] {
        let error = settings.check().unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    }
}
