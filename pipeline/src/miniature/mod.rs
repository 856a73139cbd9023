//! A tiny world to distil in, made from nothing: chats, a tokenizer, an AWQ teacher and a dense student.
//!
//! Owns: what the demonstration needs before stage one can start. No network, no file of the repository: a seeded grammar
//! writes the chats, a byte-level BPE is trained on them, two small decoders are really trained on the rendered text, and
//! everything is written as ordinary Hugging Face folders. Refuses: to know how the rest of the program reads such folders;
//! it shares no code with the model or data rooms, so it can serve them as an independent witness in tests.
//!
//! The one idea: one seed decides every byte.

pub mod awq_pack;
pub mod chats;
pub mod decoder;
pub mod dice;
mod error;
pub mod folder;
mod grammar;
pub mod pretrain;
pub mod tokenizer;

pub use error::MiniatureError;

use crate::run::RunContext;
use crate::{Error, Result};
use chats::Conversation;
use decoder::{Decoder, DecoderShape, Head};
use dice::Dice;
use pretrain::PretrainConfig;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Default for [`MiniatureConfig::seed`].
pub const DEFAULT_SEED: u64 = 20_240_611;
/// Default for [`MiniatureConfig::conversations`].
pub const DEFAULT_CONVERSATIONS: usize = 480;
/// Default for [`MiniatureConfig::vocabulary`]: 256 bytes, 3 special tokens, and enough merges for the grammar's words.
pub const DEFAULT_VOCABULARY: usize = 640;
/// Default for [`MiniatureConfig::teacher_steps`].
pub const DEFAULT_TEACHER_STEPS: u64 = 450;
/// Default for [`MiniatureConfig::student_steps`]: fluent, but with most of the facts still to learn.
pub const DEFAULT_STUDENT_STEPS: u64 = 200;
/// Default for [`MiniatureConfig::batch`].
pub const DEFAULT_BATCH: usize = 4;
/// Inputs that share one AWQ scale. Smaller than the 128 of large models because a row here is only 128 long.
pub const GROUP_SIZE: usize = 64;
/// The teacher's head has a multiple of this many rows and more than the tokenizer has ids, as large models do.
pub const TEACHER_ROWS: usize = 64;
/// The student's head has the next multiple of this many rows; the teacher's has more, so the widths differ as in real pairs.
pub const STUDENT_ROWS: usize = 16;
/// Longest context written into `config.json`, in tokens; also the longest chat that is trained on.
pub const CONTEXT: u32 = 512;

/// Random streams of one seed, so that changing one part leaves the others as they were.
const STREAM_CHATS: u64 = 0;
const STREAM_TEACHER: u64 = 1;
const STREAM_STUDENT: u64 = 2;

/// Settings of [`build`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MiniatureConfig {
    /// Decides the chats, the first weights and the order of training.
    pub seed: u64,
    /// Conversations to write.
    pub conversations: usize,
    /// Most ids of the tokenizer, the three special ones included; fewer when the chats hold too few merges.
    pub vocabulary: usize,
    /// Optimiser steps of the teacher.
    pub teacher_steps: u64,
    /// Optimiser steps of the student's base.
    pub student_steps: u64,
    /// Conversations in an optimiser step.
    pub batch: usize,
}

impl Default for MiniatureConfig {
    fn default() -> Self {
        Self {
            seed: DEFAULT_SEED,
            conversations: DEFAULT_CONVERSATIONS,
            vocabulary: DEFAULT_VOCABULARY,
            teacher_steps: DEFAULT_TEACHER_STEPS,
            student_steps: DEFAULT_STUDENT_STEPS,
            batch: DEFAULT_BATCH,
        }
    }
}

/// What [`build`] made and where.
#[derive(Debug, Clone, PartialEq)]
pub struct Miniature {
    /// `chats.jsonl` in ultrachat_200k's schema.
    pub chats: PathBuf,
    /// Folder of the AWQ teacher: two safetensors files with an index.
    pub teacher: PathBuf,
    /// Folder of the dense bf16 student: one safetensors file, tied head.
    pub student: PathBuf,
    /// Conversations in `chats`.
    pub conversations: usize,
    /// Tokens of all rendered chats.
    pub tokens: usize,
    /// Ids of the tokenizer, special tokens included.
    pub vocabulary: usize,
    /// Rows of the teacher's head.
    pub teacher_rows: usize,
    /// Rows of the student's head.
    pub student_rows: usize,
    /// Parameters of the teacher and of the student.
    pub parameters: (usize, usize),
    /// Teacher's loss before and after training, in nats a token over the same sample of chats as the student's; measured
    /// before its weights are packed.
    pub teacher_loss: (f64, f64),
    /// Student's loss before and after training, in nats a token.
    pub student_loss: (f64, f64),
}

/// Makes chats, tokenizer, teacher and student under `out`, which is created; files of an earlier run are replaced.
///
/// The same `config` gives the same bytes. Errors: a setting out of its range, a file that cannot be written, a stop asked
/// for ([`Error::Interrupted`]), training that diverges.
pub fn build(out: &Path, config: &MiniatureConfig, context: &RunContext) -> Result<Miniature> {
    check(config)?;
    let conversations = chats::write_conversations(config.conversations, &mut Dice::new(config.seed, STREAM_CHATS));
    let chats_path = out.join("chats.jsonl");
    folder::create(out)?;
    folder::write(&chats_path, chats::to_jsonl(&conversations)?.as_bytes())?;

    let rendered: Vec<String> = conversations.iter().map(|conversation| tokenizer::render(&conversation.messages)).collect();
    let tokenizer = tokenizer::train(&rendered, config.vocabulary)?;
    let sequences = tokenizer.encode_all(&rendered, CONTEXT as usize)?;
    let vocabulary = tokenizer.size();

    let teacher_shape = teacher_shape((vocabulary + STUDENT_ROWS).next_multiple_of(TEACHER_ROWS));
    let student_shape = student_shape(vocabulary.next_multiple_of(STUDENT_ROWS));
    let settings = |steps| PretrainConfig { steps, batch: config.batch, ..PretrainConfig::default() };

    let mut dice = Dice::new(config.seed, STREAM_TEACHER);
    let teacher = pretrain::train("teacher", &teacher_shape, &sequences, &settings(config.teacher_steps), &mut dice, context)?;
    let teacher_path = out.join("teacher");
    folder::write_awq(&teacher_path, &teacher.decoder, &tokenizer, GROUP_SIZE)?;

    let mut dice = Dice::new(config.seed, STREAM_STUDENT);
    let student = pretrain::train("student", &student_shape, &sequences, &settings(config.student_steps), &mut dice, context)?;
    let student_path = out.join("student");
    folder::write_dense(&student_path, &student.decoder, &tokenizer)?;

    Ok(Miniature {
        chats: chats_path,
        teacher: teacher_path,
        student: student_path,
        conversations: conversations.len(),
        tokens: sequences.iter().map(Vec::len).sum(),
        vocabulary,
        teacher_rows: teacher_shape.vocabulary,
        student_rows: student_shape.vocabulary,
        parameters: (parameters(&teacher.decoder), parameters(&student.decoder)),
        teacher_loss: teacher.loss,
        student_loss: student.loss,
    })
}

/// `count` conversations of the same world that [`build`] with this `config` trains neither model on.
pub fn unseen_chats(config: &MiniatureConfig, count: usize) -> Vec<Conversation> {
    // A longer draw of the same stream begins with the same conversations. Past what the grammar can say it repeats itself.
    let mut drawn = config.conversations + count;
    loop {
        let mut all = chats::write_conversations(drawn, &mut Dice::new(config.seed, STREAM_CHATS));
        let later = all.split_off(config.conversations);
        let mut seen: HashSet<String> = all.into_iter().map(|c| c.prompt_id).collect();
        let unseen: Vec<Conversation> = later.into_iter().filter(|c| seen.insert(c.prompt_id.clone())).take(count).collect();
        if unseen.len() == count {
            return unseen;
        }
        drawn += count;
    }
}

/// The teacher: grouped-query attention, its own head, every input dimension a multiple of [`GROUP_SIZE`].
pub fn teacher_shape(vocabulary: usize) -> DecoderShape {
    DecoderShape {
        vocabulary,
        hidden: 128,
        intermediate: 320,
        layers: 3,
        heads: 4,
        kv_heads: 2,
        rope_theta: 1e6,
        rms_norm_eps: 1e-6,
        head: Head::Own,
    }
}

/// The student: half as wide, two layers, multi-head attention, head tied to the embeddings.
pub fn student_shape(vocabulary: usize) -> DecoderShape {
    DecoderShape {
        vocabulary,
        hidden: 64,
        intermediate: 192,
        layers: 2,
        heads: 2,
        kv_heads: 2,
        rope_theta: 1e6,
        rms_norm_eps: 1e-6,
        head: Head::Tied,
    }
}

fn check(config: &MiniatureConfig) -> Result<()> {
    let smallest = tokenizer::SMALLEST;
    let wrong = |name, found: usize, expected: String| Err(Error::Setting { name, found: found.to_string(), expected });
    if config.conversations == 0 {
        return wrong("conversations", 0, "at least 1".into());
    }
    if config.batch == 0 {
        return wrong("batch", 0, "at least 1".into());
    }
    if !(smallest..=tokenizer::LARGEST).contains(&config.vocabulary) {
        return wrong("vocabulary", config.vocabulary, format!("{smallest} to {}", tokenizer::LARGEST));
    }
    Ok(())
}

fn parameters(decoder: &Decoder) -> usize {
    decoder.tensors().map(|(_, tensor)| tensor.elem_count()).sum()
}
