//! `potstill demo --proof`: does distillation beat fine-tuning on the same data? Asked in miniature, several times over, and answered with
//! intervals.
//!
//! Owns the design of the trial. Refuses to know how its stages work. The one idea: everything but the objective is equal — base, rows, their
//! order, steps, learning rate, size of the adapter — and whatever chance decides is decided anew for each seed: the world's chats, both
//! models' first weights, which answers are spoiled.
//!
//! ```text
//! a seed ─► chats ─► teacher (long), weak teacher (short), student's base (short)
//!        ─► unseen chats ─► rows to train on, as they are or spoiled ─► a cache of one of the teachers ─► sft, distill, distill+sft
//!        ─► unseen chats, clean ─► the teacher's whole distributions ─► how each of them does
//! ```

mod account;

use super::{demo, drawn, interruptible};
use crate::cli::{self, Manner};
use crate::config;
use crate::exit::Outcome;
use crate::print;
use crate::settings;
use account::{Account, Quality, Trial, Variant};
use potstill_cache::Preset;
use potstill_pipeline::evaluate::held_out::{self, HeldOutConfig};
use potstill_pipeline::evaluate::{BasePrecision, Subject};
use potstill_pipeline::miniature::chats::{self, Conversation};
use potstill_pipeline::miniature::dice::Dice;
use potstill_pipeline::miniature::{self, MiniatureConfig};
use potstill_pipeline::precompute::{self, PrecomputeConfig};
use potstill_pipeline::run::RunContext;
use potstill_pipeline::train::schedule::Schedule;
use potstill_pipeline::train::{self, DivergenceName, Objective, Resume, TrainConfig};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What a proof makes beside the marker.
const PARTS: [&str; cli::MOST_SEEDS as usize + 1] =
    ["proof.json", "seed-1", "seed-2", "seed-3", "seed-4", "seed-5", "seed-6", "seed-7", "seed-8", "seed-9", "seed-10"];
/// Conversations to train on, and held out, unseen by teacher and base.
const TRAINED: usize = 320;
const HELD_OUT: usize = 160;
/// Optimiser steps of the weak teacher: it knows the language and few of the facts.
const WEAK_STEPS: u64 = 120;
/// Entries kept at a position of the caches that students learn from.
const TOP_K: u16 = 16;
/// Settings of every arm: the demo's, for more steps and with a cosine.
const RECIPE: &str = include_str!("../../pipeline/recipes/tiny.toml");
/// The sweep's other temperature, for which caches keep a sum.
const HOT: f64 = 2.0;
/// The stream of a seed that decides which answers are spoiled; the world has the first ones.
const STREAM_SPOIL: u64 = 16;

/// What is varied.
pub(super) const CONDITIONS: [Condition; 4] = [
    Condition { name: "clean", words: "every answer is right", spoiled: 0, weak: false },
    Condition { name: "a third wrong", words: "3 answers in 10 are another question's", spoiled: 30, weak: false },
    Condition { name: "most wrong", words: "6 answers in 10 are another question's", spoiled: 60, weak: false },
    Condition { name: "weak teacher", words: "every answer is right, the teacher half taught", spoiled: 0, weak: true },
];
/// The condition whose cache the sweep trains from.
pub(super) const SWEPT: usize = 2;
/// The arms.
pub(super) const ARMS: [Objective; 3] = [Objective::Sft, Objective::Distill, Objective::DistillSft];

/// A setting of the trial.
pub(super) struct Condition {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub words: &'static str,
    /// Of 100 answers, how many are wrong.
    spoiled: usize,
    /// Whether the teacher is the weak one.
    weak: bool,
}

/// A student of the sweep.
enum Tried {
    /// One of the arms, by its place.
    Arm(usize),
    /// Another one: a change to the settings that all arms share.
    Changed(fn(&mut TrainConfig)),
}

/// What is tried from one cache.
fn sweep() -> [(&'static str, Tried); 11] {
    use Tried::{Arm, Changed};
    [
        ("forward KL, 16 kept", Arm(1)),
        ("8 kept", Changed(|config| config.top_k = Some(8))),
        ("4 kept", Changed(|config| config.top_k = Some(4))),
        ("2 kept", Changed(|config| config.top_k = Some(2))),
        ("T = 2", Changed(|config| config.temperature = HOT)),
        ("reverse KL", Changed(|config| config.divergence = DivergenceName::ReverseKl)),
        ("JSD", Changed(|config| config.divergence = DivergenceName::Jsd)),
        ("total variation", Changed(|config| config.divergence = DivergenceName::TotalVariation)),
        ("1/4 of distill", Changed(|config| mix(config, 0.25))),
        ("1/2 of distill", Arm(2)),
        ("3/4 of distill", Changed(|config| mix(config, 0.75))),
    ]
}

/// Both terms, the distillation's with this weight.
fn mix(config: &mut TrainConfig, kd_alpha: f64) {
    config.objective = Objective::DistillSft;
    (config.kd_alpha, config.kd_ce_alpha) = (Some(kd_alpha), Some(1.0 - kd_alpha));
}

/// What all conditions of a seed share.
struct World {
    folder: PathBuf,
    seed: u64,
    /// Optimiser steps of an arm.
    steps: u64,
    student: PathBuf,
    /// The student before training, in NF4.
    base: Quality,
    good: Taught,
    weak: Taught,
    rows: Vec<Conversation>,
    /// Whole distributions of the good teacher over clean rows.
    held_out: PathBuf,
}

/// A teacher.
struct Taught {
    folder: PathBuf,
    quality: Quality,
}

/// Runs the trial.
pub fn run(flags: &cli::Demo, manner: Manner) -> anyhow::Result<Outcome> {
    let folder = flags.out.clone().unwrap_or_else(|| demo::free_folder("potstill-proof"));
    demo::prepare(&folder, &PARTS)?;
    let context = interruptible()?;
    let steps = flags.steps.unwrap_or(cli::DEFAULT_PROOF_STEPS);
    let seeds = flags.seeds.unwrap_or(cli::DEFAULT_SEEDS);
    let (mut trials, mut variants) = (Vec::new(), Vec::new());
    for seed in 1..=seeds {
        manner.remark(&format!("\n── seed {seed} of {seeds}: a world of its own"));
        let world = drawn(&context, manner, || World::make(&folder, (seed, steps), &context))?;
        for (number, condition) in CONDITIONS.iter().enumerate() {
            manner.remark(&format!("   {}: {}", condition.name, condition.words));
            let trial = drawn(&context, manner, || world.trial(number, condition, &context))?;
            if flags.sweep && seed == 1 && number == SWEPT {
                manner.remark("   a sweep: other losses from the same cache, without the teacher");
                variants = drawn(&context, manner, || world.sweep(&trial, &context))?;
            }
            trials.push(trial);
        }
    }
    let account = Account::of(trials, variants);
    std::fs::write(folder.join("proof.json"), serde_json::to_vec_pretty(&account)?)?;
    demo::mark(&folder, &PARTS, true)?;
    if manner.json {
        print::json(&account)?;
    } else {
        let mut out = print::out();
        account.write(&mut out)?;
        writeln!(out, "\nEverything made: {}", crate::text::visible(&folder.display().to_string()))?;
        out.flush()?;
    }
    Ok(Outcome::Done)
}

impl World {
    fn make(top: &Path, (seed, steps): (u64, u64), context: &RunContext) -> anyhow::Result<World> {
        let folder = top.join(format!("seed-{seed}"));
        let config = MiniatureConfig { seed, ..MiniatureConfig::default() };
        let good = miniature::build(&folder.join("world"), &config, context)?;
        // Its student is never used; its tokenizer is the good one's, whose chats it shares.
        let weak = MiniatureConfig { teacher_steps: WEAK_STEPS, student_steps: 0, ..config.clone() };
        let weak = miniature::build(&folder.join("weak"), &weak, context)?;
        let mut rows = miniature::unseen_chats(&config, TRAINED + HELD_OUT);
        let held_out_rows = rows.split_off(TRAINED);
        let held_out = folder.join("held-out");
        // As many entries as there are ids: nothing is left to a tail.
        let whole = u16::try_from(good.vocabulary)?;
        stage_one(&good.teacher, &held_out_rows, &held_out, whole, context)?;
        let quality = |subject| quality(subject, &held_out, context);
        let base = quality(Subject { student: good.student.clone(), base: BasePrecision::Nf4, ..Subject::default() })?;
        let taught = |teacher: PathBuf| -> anyhow::Result<Taught> {
            let quality = quality(Subject { student: teacher.clone(), ..Subject::default() })?;
            Ok(Taught { folder: teacher, quality })
        };
        let (student, good, weak) = (good.student, taught(good.teacher)?, taught(weak.teacher)?);
        Ok(World { folder, seed, steps, student, base, good, weak, rows, held_out })
    }

    /// All arms under one condition.
    fn trial(&self, number: usize, condition: &Condition, context: &RunContext) -> anyhow::Result<Trial> {
        let folder = self.condition(condition);
        let mut rows = self.rows.clone();
        chats::spoil(&mut rows, condition.spoiled, &mut Dice::new(self.seed, STREAM_SPOIL + number as u64));
        let cache = folder.join("cache");
        let teacher = if condition.weak { &self.weak } else { &self.good };
        stage_one(&teacher.folder, &rows, &cache, TOP_K, context)?;
        let mut arms = Vec::new();
        for objective in ARMS {
            arms.push(self.arm(&cache, folder.join(objective.to_string()), context, |config| config.objective = objective)?);
        }
        Ok(Trial { seed: self.seed, condition: number, base: self.base, teacher: teacher.quality, arms })
    }

    /// Trains a student from the cache with `change` to the settings that all arms share, and says how it does.
    fn arm(
        &self,
        cache: &Path,
        out: PathBuf,
        context: &RunContext,
        change: impl FnOnce(&mut TrainConfig),
    ) -> anyhow::Result<Quality> {
        let mut config = TrainConfig {
            student: self.student.clone(),
            cache: cache.to_path_buf(),
            out,
            steps: Some(self.steps),
            schedule: Schedule::Cosine,
            seed: self.seed,
            resume: Resume::Never,
            ..config::recipe(&settings::TRAIN, "pipeline/recipes/tiny.toml", RECIPE)?
        };
        change(&mut config);
        let adapter = train::run(&config, context)?.adapter;
        let subject = Subject { student: self.student.clone(), adapter: Some(adapter), ..Subject::default() };
        quality(subject, &self.held_out, context)
    }

    /// Other students from the cache of a trial: no teacher is asked again.
    fn sweep(&self, trial: &Trial, context: &RunContext) -> anyhow::Result<Vec<Variant>> {
        let folder = self.condition(&CONDITIONS[trial.condition]);
        let mut variants = Vec::new();
        for (name, tried) in sweep() {
            let out = folder.join("sweep").join(name.replace(' ', "-"));
            let quality = match tried {
                Tried::Arm(arm) => trial.arms[arm],
                Tried::Changed(change) => self.arm(&folder.join("cache"), out, context, change)?,
            };
            variants.push(Variant { name, quality });
        }
        Ok(variants)
    }

    /// The folder of a condition.
    fn condition(&self, condition: &Condition) -> PathBuf {
        self.folder.join(condition.name.replace(' ', "-"))
    }
}

/// How a model does on held-out rows.
fn quality(subject: Subject, held_out: &Path, context: &RunContext) -> anyhow::Result<Quality> {
    let config = HeldOutConfig { subject, cache: held_out.to_path_buf(), ..HeldOutConfig::default() };
    let figures = held_out::run(&config, context)?.figures;
    Ok(Quality {
        nll: figures.nll.mean,
        kl: figures.kl.map(|spread| spread.mean.mean),
        same_top_token: figures.same_top_token.map(|mean| mean.mean),
    })
}

/// Fills a cache of `rows` beside it.
fn stage_one(teacher: &Path, rows: &[Conversation], cache: &Path, top_k: u16, context: &RunContext) -> anyhow::Result<()> {
    let data = cache.with_extension("jsonl");
    if let Some(folder) = data.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(&data, chats::to_jsonl(rows)?)?;
    let config = PrecomputeConfig {
        teacher: teacher.to_path_buf(),
        data: vec![data],
        cache: cache.to_path_buf(),
        top_k: Some(top_k),
        // Held-out distributions are compared to the last digit they have.
        preset: if top_k == TOP_K { Preset::default() } else { Preset::Exact },
        max_length: miniature::CONTEXT,
        // For the sweep.
        lse_temperatures: vec![HOT],
        ..PrecomputeConfig::default()
    };
    precompute::run(&config, context)?;
    Ok(())
}
