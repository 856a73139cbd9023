//! A student's answers: prompts of MT-Bench, AlpacaEval or one's own in, their answer files out.
//!
//! Owns the order of things. Every answer is durable when it is finished (`generate/journal.rs`), and the answers file appears, whole and in
//! the questions' order, when all are. What an answer is follows from model, question and settings alone, not from the batch that it was
//! decoded in, nor from how often the run was interrupted.

mod batch;
mod journal;
mod questions;

pub use questions::Form;

use super::error::EvaluateError;
use super::subject::Subject;
use crate::adapter::{CONFIG_NAME, TENSORS_NAME};
use crate::data::{ChatTokenizer, Message, Role};
use crate::model::config::{MAX_CONFIG_BYTES, ModelConfig};
use crate::model::weights::Weights;
use crate::run::{RUN_AGAIN, RunContext};
use crate::student::Student;
use crate::{Error, Result, bounded, memory};
use batch::{Batch, Finished, Job, Limits};
use candle_transformers::generation::LogitsProcessor;
use journal::{Journal, Settings};
use questions::Questions;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Default for [`GenerateConfig::max_new_tokens`] (FastChat's).
pub const DEFAULT_MAX_NEW_TOKENS: u32 = 1024;
/// Default for [`GenerateConfig::batch_size`]: two blocks of the rows that a tile of products takes.
pub const DEFAULT_BATCH_SIZE: u32 = 24;
/// Default for [`GenerateConfig::pack_tokens`].
pub const DEFAULT_PACK_TOKENS: u32 = 4096;
/// Default for [`GenerateConfig::choices`].
pub const DEFAULT_CHOICES: u32 = 1;
/// Below this temperature the likeliest token is taken (FastChat's).
const GREEDY_BELOW: f64 = 1e-4;

/// What is to be answered, by whom and how.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateConfig {
    /// The model.
    pub subject: Subject,
    /// What the model is called in the answers.
    pub model_id: String,
    /// File of questions.
    pub questions: PathBuf,
    /// File of answers.
    pub out: PathBuf,
    /// Temperature, 0 for the likeliest token; where not given, that of a question's category (MT-Bench), else 0.
    pub temperature: Option<f64>,
    /// Tokens are drawn from the fewest that make up this probability, above 0 to 1.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
    /// Answers to each question.
    pub choices: u32,
    /// Most tokens of an answer.
    pub max_new_tokens: u32,
    /// Most sequences decoded together.
    pub batch_size: u32,
    /// Most new tokens that go through the model at once, unless one prompt alone is longer.
    pub pack_tokens: u32,
}

impl Default for GenerateConfig {
    fn default() -> Self {
        Self {
            subject: Subject::default(),
            model_id: String::new(),
            questions: PathBuf::new(),
            out: PathBuf::new(),
            temperature: None,
            top_p: 1.0,
            seed: 0,
            choices: DEFAULT_CHOICES,
            max_new_tokens: DEFAULT_MAX_NEW_TOKENS,
            batch_size: DEFAULT_BATCH_SIZE,
            pack_tokens: DEFAULT_PACK_TOKENS,
        }
    }
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// With a stop token.
    Stop,
    /// At its greatest length.
    Length,
    /// It never began: its prompt leaves no room in the model's context.
    TooLong,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    question: usize,
    choice: usize,
    turn: usize,
    text: String,
    tokens: usize,
    prompt_tokens: usize,
    end: End,
    /// Seconds since 1970.
    tstamp: f64,
}

/// What a run did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GenerateReport {
    /// The answers file.
    pub out: PathBuf,
    /// Which form it has.
    pub form: Form,
    /// Questions of the file.
    pub questions: usize,
    /// Answers in all, turn by turn.
    pub answers: usize,
    /// Those among them that an earlier run gave.
    pub resumed: usize,
    /// Those that end at their greatest length.
    pub cut: usize,
    /// Those that never began, because the prompt leaves no room in the model's context.
    pub too_long: usize,
    /// Tokens that answers are stopped by.
    pub stop_ids: BTreeSet<u32>,
    /// Tokens of this run's prompts.
    pub prompt_tokens: u64,
    /// Tokens of this run's answers.
    pub tokens: u64,
    /// Seconds that this run took to answer, without reading the model.
    pub seconds: f64,
}

/// Answers every question that is not answered yet, and writes the answers file. Counts answers in a phase of `context.progress`.
///
/// Errors: settings, questions, model or adapter that are wrong, an answers file that no such run made, a journal of other settings or in
/// use, logits that are not finite, a stop (every finished answer is durable then).
pub fn run(config: &GenerateConfig, context: &RunContext) -> Result<GenerateReport> {
    check(config)?;
    let questions = Questions::read(&config.questions)?;
    let folder = &config.subject.student;
    let tokenizer = ChatTokenizer::from_folder(folder)?;
    let stop_ids = stop_ids(folder, &tokenizer)?;
    let journal = journal::beside(&config.out);
    if let Some(folder) = config.out.parent() {
        std::fs::create_dir_all(folder).map_err(|source| EvaluateError::Io { path: folder.to_path_buf(), source })?;
    }
    if config.out.exists() && !journal.exists() {
        return Err(EvaluateError::Occupied { out: config.out.clone() }.into());
    }
    let settings = settings(config, &questions, &tokenizer, &stop_ids, context)?;
    let (journal, given) = Journal::open(&journal, &settings)?;
    let mut run = Run::new(config, &questions, &tokenizer, journal, given)?;
    let resumed = run.given.len();
    if resumed < run.total() {
        let student = config.subject.load(context)?;
        context.progress.begin_at("answering", "answers", run.total() as u64, resumed as u64);
        run.answer(&student, &stop_ids, context)?;
    }
    context.progress.end();
    run.write(blake3::hash(format!("{settings:?}").as_bytes()).to_hex().as_str())?;
    Ok(run.report(resumed, stop_ids))
}

/// Errors: a setting out of its range.
fn check(config: &GenerateConfig) -> Result<()> {
    let refuse = |name, found: String, expected: &str| Err(Error::Setting { name, found, expected: expected.into() });
    if let Some(temperature) = config.temperature.filter(|t| !(0.0..=100.0).contains(t)) {
        return refuse("temperature", temperature.to_string(), "a number from 0 to 100");
    }
    if !(config.top_p > 0.0 && config.top_p <= 1.0) {
        return refuse("top_p", config.top_p.to_string(), "a number above 0, at most 1");
    }
    let counts = [
        ("choices", config.choices),
        ("max_new_tokens", config.max_new_tokens),
        ("batch_size", config.batch_size),
        ("pack_tokens", config.pack_tokens),
    ];
    match counts.into_iter().find(|(_, value)| *value == 0) {
        Some((name, _)) => refuse(name, "0".into(), "at least 1"),
        None => Ok(()),
    }
}

/// `eos_token_id` of `generation_config.json`, else of `config.json`, and what the template ends an answer with: a base model's files do not
/// name the token that a student was taught to stop with.
fn stop_ids(folder: &Path, tokenizer: &ChatTokenizer) -> Result<BTreeSet<u32>> {
    let mut ids: BTreeSet<u32> = tokenizer.end_of_answer()?.into_iter().collect();
    for name in ["generation_config.json", "config.json"] {
        let path = folder.join(name);
        if !path.exists() {
            continue;
        }
        let bytes = bounded::read(&path, MAX_CONFIG_BYTES).map_err(|source| EvaluateError::Io { path: path.clone(), source })?;
        let wrong = |found: String| EvaluateError::StopIds { path: path.clone(), found };
        let config: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| wrong(e.to_string()))?;
        let Some(found) = config.get("eos_token_id").filter(|found| !found.is_null()) else { continue };
        let list = found.as_array().cloned().unwrap_or_else(|| vec![found.clone()]);
        for id in list {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            ids.insert(id.ok_or_else(|| wrong(found.to_string().chars().take(80).collect()))?);
        }
        break;
    }
    Ok(ids)
}

/// What decides the answers.
fn settings(
    config: &GenerateConfig,
    questions: &Questions,
    tokenizer: &ChatTokenizer,
    stop_ids: &BTreeSet<u32>,
    context: &RunContext,
) -> Result<Settings> {
    let Subject { student, adapter, compute, .. } = &config.subject;
    let stops: Vec<String> = stop_ids.iter().map(u32::to_string).collect();
    let template = tokenizer.template_fingerprint().map(|template| template.blake3.clone()).unwrap_or_default();
    let mut settings = Settings::from([
        ("student_blake3".into(), Weights::open(student)?.fingerprint(context)?),
        ("student_config_blake3".into(), ModelConfig::fingerprint(student)?),
        ("tokenizer_blake3".into(), tokenizer.tokenizer_fingerprint().blake3.clone()),
        ("template_blake3".into(), template),
        ("base_precision".into(), format!("{:?}", config.subject.held()).to_lowercase()),
        ("compute".into(), format!("{compute:?}").to_lowercase()),
        ("model_id".into(), config.model_id.clone()),
        ("questions_blake3".into(), questions.blake3.clone()),
        ("temperature".into(), config.temperature.map_or("by category, else 0".into(), |t| t.to_string())),
        ("top_p".into(), config.top_p.to_string()),
        ("seed".into(), config.seed.to_string()),
        ("choices".into(), config.choices.to_string()),
        ("max_new_tokens".into(), config.max_new_tokens.to_string()),
        ("stop_ids".into(), stops.join(" ")),
    ]);
    if let Some(adapter) = adapter {
        let mut digest = blake3::Hasher::new();
        for name in [CONFIG_NAME, TENSORS_NAME] {
            let path = adapter.join(name);
            digest.update_mmap_rayon(&path).map_err(|source| EvaluateError::Io { path, source })?;
        }
        settings.insert("adapter_blake3".into(), digest.finalize().to_hex().to_string());
    }
    Ok(settings)
}

/// A question, which of its answers, and which turn of that.
type Place = (usize, usize, usize);

/// A run under way.
struct Run<'a> {
    config: &'a GenerateConfig,
    questions: &'a Questions,
    tokenizer: &'a ChatTokenizer,
    journal: Journal,
    given: BTreeMap<Place, Answer>,
    context_tokens: usize,
    /// Of this run.
    prompt_tokens: u64,
    tokens: u64,
    seconds: f64,
}

impl<'a> Run<'a> {
    fn new(
        config: &'a GenerateConfig,
        questions: &'a Questions,
        tokenizer: &'a ChatTokenizer,
        journal: Journal,
        given: Vec<Answer>,
    ) -> Result<Self> {
        let context_tokens = ModelConfig::from_folder(&config.subject.student)?.context;
        let given = given.into_iter().map(|answer| ((answer.question, answer.choice, answer.turn), answer)).collect();
        Ok(Self { config, questions, tokenizer, journal, given, context_tokens, prompt_tokens: 0, tokens: 0, seconds: 0.0 })
    }

    /// Every dialogue, as question and choice, in order.
    fn dialogues(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let choices = self.choices();
        (0..self.questions.all.len()).flat_map(move |question| (0..choices).map(move |choice| (question, choice)))
    }

    /// AlpacaEval has one answer a question.
    fn choices(&self) -> usize {
        match self.questions.form {
            Form::AlpacaEval => 1,
            Form::MtBench | Form::Plain => self.config.choices as usize,
        }
    }

    /// Answers in all.
    fn total(&self) -> usize {
        self.choices() * self.questions.all.iter().map(|question| question.turns.len()).sum::<usize>()
    }

    /// Answers what is not answered yet.
    fn answer(&mut self, student: &Student, stop_ids: &BTreeSet<u32>, context: &RunContext) -> Result<()> {
        let began = Instant::now();
        let limits = Limits {
            sequences: self.config.batch_size as usize,
            tokens: self.config.pack_tokens as usize,
            bytes: memory::available().map_or(u64::MAX, |bytes| bytes / 2),
        };
        let ids = self.tokenizer.tokenizer_fingerprint().size as usize;
        let mut batch = Batch::new(student, stop_ids, ids, limits);
        // Places of the jobs that were made, by number.
        let mut places: Vec<Place> = Vec::new();
        let mut waiting: VecDeque<(usize, usize)> = self.dialogues().collect();
        let mut next: Option<Job> = None;
        loop {
            while let Some(job) =
                next.take().map_or_else(|| self.next_job(&mut waiting, &mut places, context), |job| Ok(Some(job)))?
            {
                if !batch.has_room(&job) {
                    next = Some(job);
                    break;
                }
                batch.add(job);
            }
            if batch.len() == 0 {
                break;
            }
            context.progress.note(format!("{} tokens, {} answers at once", self.tokens, batch.len()));
            let Some(finished) = (if context.stopping() { None } else { batch.step(context)? }) else {
                return Err(self.interrupted());
            };
            for Finished { number, prompt_tokens, ids, stopped } in finished {
                let place = places[number];
                let (tokens, end) = (ids.len(), if stopped { End::Stop } else { End::Length });
                self.keep(place, self.tokenizer.decode_text(&ids), (tokens, prompt_tokens, end), context)?;
                // Its next turn, if it has one, goes on at once.
                waiting.push_front((place.0, place.1));
            }
            self.seconds = began.elapsed().as_secs_f64();
        }
        Ok(())
    }

    /// The next turn of the next dialogue that has one to be answered; `None` when none waits. A turn without room is answered with nothing.
    fn next_job(
        &mut self,
        waiting: &mut VecDeque<(usize, usize)>,
        places: &mut Vec<Place>,
        context: &RunContext,
    ) -> Result<Option<Job>> {
        while let Some((question, choice)) = waiting.pop_front() {
            let turns = &self.questions.all[question].turns;
            while let Some(turn) = (0..turns.len()).find(|turn| !self.given.contains_key(&(question, choice, *turn))) {
                let place = (question, choice, turn);
                let prompt = self.tokenizer.encode_prompt(&self.messages(place))?;
                let most = self.context_tokens.saturating_sub(prompt.len()).min(self.config.max_new_tokens as usize);
                if most == 0 || prompt.is_empty() {
                    self.keep(place, String::new(), (0, prompt.len(), End::TooLong), context)?;
                    continue;
                }
                places.push(place);
                return Ok(Some(Job { number: places.len() - 1, prompt, most, sampler: self.sampler(place) }));
            }
        }
        Ok(None)
    }

    /// What was said before a turn, and what is said in it.
    fn messages(&self, (question, choice, turn): Place) -> Vec<Message> {
        let mut messages = Vec::new();
        for (i, said) in self.questions.all[question].turns.iter().enumerate().take(turn + 1) {
            messages.push(Message { role: Role::User, content: said.clone() });
            if let Some(answer) = self.given.get(&(question, choice, i)).filter(|_| i < turn) {
                messages.push(Message { role: Role::Assistant, content: answer.text.clone() });
            }
        }
        messages
    }

    /// What chooses a turn's tokens: a function of seed and place alone.
    fn sampler(&self, (question, choice, turn): Place) -> LogitsProcessor {
        let own = self.questions.all[question].temperature;
        let temperature = self.config.temperature.or(own).filter(|temperature| *temperature >= GREEDY_BELOW);
        let top_p = Some(self.config.top_p).filter(|p| *p < 1.0);
        let digest = blake3::hash(format!("potstill answer v1 {} {question} {choice} {turn}", self.config.seed).as_bytes());
        let seed = digest.as_bytes().iter().take(8).fold(0u64, |seed, byte| seed << 8 | u64::from(*byte));
        LogitsProcessor::new(seed, temperature, top_p)
    }

    /// Makes an answer durable.
    fn keep(
        &mut self,
        place: Place,
        text: String,
        (tokens, prompt_tokens, end): (usize, usize, End),
        context: &RunContext,
    ) -> Result<()> {
        let (question, choice, turn) = place;
        let tstamp = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        // FastChat's answers begin and end with text.
        let text = if self.questions.form == Form::MtBench { text.trim().to_string() } else { text };
        let answer = Answer { question, choice, turn, text, tokens, prompt_tokens, end, tstamp };
        self.journal.add(&answer)?;
        self.prompt_tokens += prompt_tokens as u64;
        self.tokens += tokens as u64;
        self.given.insert(place, answer);
        context.progress.add(1);
        Ok(())
    }

    fn interrupted(&self) -> Error {
        let kept = format!("{} of {} answers are durable", self.given.len(), self.total());
        Error::Interrupted { kept, again: RUN_AGAIN }
    }

    /// Writes the answers file, which appears by rename.
    fn write(&self, digest: &str) -> Result<()> {
        let mut answers: Vec<Vec<Vec<&Answer>>> = self.questions.all.iter().map(|_| Vec::new()).collect();
        for (question, choice) in self.dialogues() {
            let turns = 0..self.questions.all[question].turns.len();
            answers[question].push(turns.filter_map(|turn| self.given.get(&(question, choice, turn))).collect());
        }
        let text = self.questions.answers(&answers, &self.config.model_id, digest);
        let out = &self.config.out;
        let io = |source| EvaluateError::Io { path: out.clone(), source };
        let name = out.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let partial = out.with_file_name(format!(".{name}.partial"));
        let write = || {
            std::fs::write(&partial, &text)?;
            std::fs::File::open(&partial)?.sync_all()?;
            std::fs::rename(&partial, out)?;
            let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            std::fs::File::open(folder)?.sync_all()
        };
        Ok(write().map_err(io)?)
    }

    fn report(self, resumed: usize, stop_ids: BTreeSet<u32>) -> GenerateReport {
        let ended = |end| self.given.values().filter(|answer| answer.end == end).count();
        GenerateReport {
            out: self.config.out.clone(),
            form: self.questions.form,
            questions: self.questions.all.len(),
            answers: self.given.len(),
            resumed,
            cut: ended(End::Length),
            too_long: ended(End::TooLong),
            stop_ids,
            prompt_tokens: self.prompt_tokens,
            tokens: self.tokens,
            seconds: self.seconds,
        }
    }
}
