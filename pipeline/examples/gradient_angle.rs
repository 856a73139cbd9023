//! How far the gradient from what a cache keeps points from the gradient of full distillation.
//!
//!     cargo run -p potstill-pipeline --example gradient_angle [GOLDEN_FOLDER]
//!
//! Scores the reference chats with the reference teacher, takes the gradient of forward KL at T = 1 with respect to every LoRA number
//! of the reference student, summed over all scored positions, and prints its angle to the gradient against the teacher's whole
//! distribution. Drawn selections are drawn with several seeds; their angles are averaged. Nothing is rounded as a cache would.

use candle_core::{Device, Tensor};
use potstill_cache::{Cutoff, Selection, SoftTargets, Values};
use potstill_pipeline::adapter;
use potstill_pipeline::data::pack::{self, Pack, Sequence};
use potstill_pipeline::data::{self, BadRoles, ChatTokenizer, DataOptions, Example, Truncation};
use potstill_pipeline::kernel::Precision;
use potstill_pipeline::loss::{self, Divergence, LossSettings, Tail};
use potstill_pipeline::model::decoder::{Decoder, Holding};
use potstill_pipeline::ops::capture::Capture;
use potstill_pipeline::run::RunContext;
use potstill_pipeline::student::{LoraSettings, Student};
use potstill_pipeline::teacher::{Residency, Teacher};
use std::path::{Path, PathBuf};

type Failure = Box<dyn std::error::Error>;

/// Longest chat, in tokens.
const MAX_LENGTH: u32 = 256;
/// Tokens that go through a model at once.
const PACK_TOKENS: usize = 2048;
/// Positions whose logits exist at once.
const HEAD_CHUNK: usize = 256;
/// Seeds over which drawn angles are averaged.
const SEEDS: std::ops::Range<u64> = 0..8;

fn main() -> Result<(), Failure> {
    let given = std::env::args().nth(1).map(PathBuf::from);
    let golden = given.unwrap_or_else(|| concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden").into());
    let tokenizer = ChatTokenizer::from_folder(&golden.join("teacher-awq"))?;
    let width = tokenizer.tokenizer_fingerprint().size;
    let options = DataOptions { max_length: MAX_LENGTH, truncation: Truncation::Turns, on_bad_roles: BadRoles::Skip };
    let chats = data::load(&[golden.join("chats.jsonl")], &tokenizer, &options, &RunContext::default())?.examples;
    let teacher = Teacher::from_folder(
        &golden.join("teacher-awq"),
        width,
        (Precision::F32, Residency::Resident),
        &Device::Cpu,
        &RunContext::default(),
    )?;
    let bench = Bench { teacher, student: student(&golden)?, packs: packs(&chats) };

    let whole = bench.gradient(Selection::TopK { k: width as u16 }, Tail::Bucket)?;
    println!("{} chats, {} scored positions, {} numbers in the gradient\n", chats.len(), whole.positions, whole.numbers.len());
    println!("{:<24} {:<14} {:>14} {:>8}", "kept", "loss", "ids a position", "angle");
    for (selection, tail) in rows() {
        let seeded: Vec<Selection> = SEEDS.map(|seed| with_seed(selection, seed)).collect();
        let seeded = if selection.draws().is_some() { &seeded[..] } else { &seeded[..1] };
        let (mut angle, mut ids) = (0.0, 0.0);
        for selection in seeded {
            let gradient = bench.gradient(*selection, tail)?;
            angle += degrees_between(&whole.numbers, &gradient.numbers) / seeded.len() as f64;
            ids += gradient.ids as f64 / gradient.positions as f64 / seeded.len() as f64;
        }
        let loss = match tail {
            Tail::Bucket => "bucket",
            Tail::Renorm => "renorm",
            _ => "student full",
        };
        println!("{:<24} {loss:<14} {ids:>14.1} {angle:>7.2}°", named(&selection));
    }
    Ok(())
}

/// What is compared: exact heads by each treatment of the tail, drawn ones by estimates against the student's whole distribution.
fn rows() -> Vec<(Selection, Tail)> {
    let mut rows = Vec::new();
    for k in [12, 50] {
        rows.extend([Tail::Bucket, Tail::Renorm, Tail::StudentFull].map(|tail| (Selection::TopK { k }, tail)));
    }
    for rule in [Cutoff::MinProb(1e-5), Cutoff::MinProb(1e-3), Cutoff::MinMass(0.999), Cutoff::MinMass(0.95)] {
        rows.push((Selection::Cutoff { k: 2048, rule }, Tail::Bucket));
    }
    rows.extend([12, 25, 50, 100].map(|draws| (Selection::Sampled { draws, seed: 0 }, Tail::StudentFull)));
    rows.push((Selection::Hybrid { k: 12, draws: 25, seed: 0 }, Tail::StudentFull));
    rows
}

fn with_seed(selection: Selection, seed: u64) -> Selection {
    match selection {
        Selection::Sampled { draws, .. } => Selection::Sampled { draws, seed },
        Selection::Hybrid { k, draws, .. } => Selection::Hybrid { k, draws, seed },
        exact => exact,
    }
}

fn named(selection: &Selection) -> String {
    let name = selection.to_string();
    name.split(" seed").next().unwrap_or(&name).to_string()
}

/// The two models and the chats that both read.
struct Bench {
    teacher: Teacher,
    student: Student,
    packs: Vec<Pack>,
}

/// The gradient of all LoRA numbers, and over what.
struct Gradient {
    numbers: Vec<f64>,
    positions: usize,
    /// Ids kept and drawn, over all positions.
    ids: usize,
}

impl Bench {
    fn gradient(&self, selection: Selection, tail: Tail) -> Result<Gradient, Failure> {
        let settings =
            LossSettings { divergence: Divergence::ForwardKl, tail, temperature: 1.0, kd_alpha: 1.0, kd_ce_alpha: 0.0 };
        let capture = Capture { selection, values: Values::Logprob, lse_temperatures: Vec::new() };
        let mut sum = Gradient { numbers: Vec::new(), positions: 0, ids: 0 };
        for pack in &self.packs {
            let kept = self.teacher.score(std::slice::from_ref(pack), &capture, HEAD_CHUNK, &RunContext::default())?;
            let kept = kept.and_then(|mut all| all.pop()).ok_or("nobody asked for a stop")?.sound()?;
            let targets: SoftTargets = if selection.draws().is_some() { kept.estimate() } else { kept };
            let (hidden, tape) = self.student.forward(pack)?;
            let head = self.student.head();
            let (_, d_hidden) = loss::fused(&hidden, head, pack.labels(), Some(&targets), &settings, 1.0, HEAD_CHUNK)?;
            let gradients = self.student.backward(tape, &d_hidden)?;
            let flat = Tensor::cat(&gradients.iter().map(Tensor::flatten_all).collect::<Result<Vec<_>, _>>()?, 0)?;
            let flat: Vec<f32> = flat.to_vec1()?;
            sum.numbers.resize(flat.len(), 0.0);
            sum.numbers.iter_mut().zip(&flat).for_each(|(sum, g)| *sum += f64::from(*g));
            sum.positions += targets.len();
            sum.ids += targets.ids().len();
        }
        Ok(sum)
    }
}

fn degrees_between(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()).clamp(-1.0, 1.0).acos().to_degrees()
}

fn packs(chats: &[Example]) -> Vec<Pack> {
    let positions: Vec<Vec<u32>> = chats.iter().map(Example::positions).collect();
    let planned = pack::plan(chats.iter().map(|chat| chat.input_ids.len()), PACK_TOKENS);
    let sequence = |i: usize| Sequence { input_ids: &chats[i].input_ids, positions: &positions[i] };
    planned.into_iter().map(|range| Pack::new(range.map(sequence))).collect()
}

/// The reference student with the reference adapter, whose factors are both away from 0, so all of them have a gradient.
fn student(golden: &Path) -> Result<Student, Failure> {
    let decoder =
        Decoder::from_folder(&golden.join("student"), Holding::Nf4, Precision::F32, &Device::Cpu, &RunContext::default())?;
    let (config, tensors) = adapter::load(&golden.join("expected/lora"))?;
    let mut student = Student::new(decoder, &LoraSettings::of(&config)?)?;
    let named = student.parameters().into_iter().map(|(name, _)| {
        let tensor = tensors.get(&name).ok_or_else(|| format!("the adapter lacks {name}"))?;
        Ok((name, tensor.clone()))
    });
    let named: Vec<(String, Tensor)> = named.collect::<Result<_, Failure>>()?;
    student.set_parameters(&named)?;
    Ok(student)
}
