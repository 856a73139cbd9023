//! The miniature as a whole: chats, tokenizer, and folders that are read back by nothing but safetensors and JSON.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use candle_core::{Device, Tensor};
use half::f16;
use potstill_pipeline::Error;
use potstill_pipeline::miniature::chats::{Conversation, spoil};
use potstill_pipeline::miniature::decoder::{Decoder, DecoderShape};
use potstill_pipeline::miniature::dice::Dice;
use potstill_pipeline::miniature::pretrain::{SAMPLE, batch_loss};
use potstill_pipeline::miniature::{GROUP_SIZE, Miniature, MiniatureConfig, build, student_shape, teacher_shape, unseen_chats};
use potstill_pipeline::run::RunContext;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;
use tempfile::TempDir;
use tokenizers::Tokenizer;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/golden");
const CONFIG: MiniatureConfig =
    MiniatureConfig { seed: 11, conversations: 96, vocabulary: 500, teacher_steps: 40, student_steps: 15, batch: 8 };
const SHORT: MiniatureConfig = MiniatureConfig { conversations: 12, teacher_steps: 2, student_steps: 2, batch: 4, ..CONFIG };

/// One build that most tests look at.
fn built() -> &'static Miniature {
    static BUILT: OnceLock<(TempDir, Miniature)> = OnceLock::new();
    let (_, miniature) = BUILT.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let miniature = build(folder.path(), &CONFIG, &RunContext::default()).unwrap();
        (folder, miniature)
    });
    miniature
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn chats() -> Vec<Value> {
    let text = std::fs::read_to_string(&built().chats).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn tensors(folder: &Path, files: &[&str]) -> BTreeMap<String, Tensor> {
    files.iter().flat_map(|file| candle_core::safetensors::load(folder.join(file), &Device::Cpu).unwrap()).collect()
}

fn teacher_files() -> [&'static str; 2] {
    ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
}

/// Every file under a folder by its relative path.
fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        if path.is_dir() {
            found.extend(files(&path).into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes)));
        } else {
            found.insert(name, std::fs::read(&path).unwrap());
        }
    }
    found
}

#[test]
fn the_seed_decides_every_byte() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for (folder, seed) in folders.iter().zip([11, 11, 12]) {
        build(folder.path(), &MiniatureConfig { seed, ..SHORT }, &RunContext::default()).unwrap();
    }
    let [first, again, other] = folders.each_ref().map(|folder| files(folder.path()));
    assert_eq!(first.len(), 1 + 7 + 5, "{:?}", first.keys());
    assert_eq!(first.keys().collect::<Vec<_>>(), again.keys().collect::<Vec<_>>());
    for (name, bytes) in &first {
        assert!(*bytes == again[name], "{name} differs between two builds of one seed");
    }
    for name in ["chats.jsonl", "student/model.safetensors", "teacher/model-00001-of-00002.safetensors"] {
        assert!(first[name] != other[name], "{name} is the same for another seed");
    }
}

#[test]
fn chats_follow_the_schema() {
    let chats = chats();
    assert_eq!(chats.len(), CONFIG.conversations);
    let mut identities = BTreeSet::new();
    let (mut systems, mut several) = (0, 0);
    for chat in &chats {
        let keys: Vec<&String> = chat.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["prompt", "prompt_id", "messages"]);
        let messages = chat["messages"].as_array().unwrap();
        let roles: Vec<&str> = messages.iter().map(|message| message["role"].as_str().unwrap()).collect();
        let turns = roles.strip_prefix(&["system"]).unwrap_or(&roles);
        systems += roles.len() - turns.len();
        several += usize::from(turns.len() > 2);
        assert!(!turns.is_empty() && turns.chunks(2).all(|turn| turn == ["user", "assistant"]), "{roles:?}");
        assert!(messages.iter().all(|message| !message["content"].as_str().unwrap().is_empty()));
        assert_eq!(chat["prompt"], messages[roles.len() - turns.len()]["content"]);
        let identity = chat["prompt_id"].as_str().unwrap();
        assert!(identity.len() == 64 && identity.bytes().all(|b| b.is_ascii_hexdigit()));
        assert!(identities.insert(identity.to_string()), "the same conversation twice");
    }
    assert!(systems > 5 && several > 20, "{systems} with a system message, {several} with several turns");
}

#[test]
fn the_tokenizer_is_of_qwen2s_kind() {
    let miniature = built();
    let golden = json(&Path::new(GOLDEN).join("student/tokenizer.json"));
    let ours = json(&miniature.student.join("tokenizer.json"));
    for part in ["normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"] {
        assert_eq!(ours[part], golden[part], "{part}");
    }
    assert!(miniature.vocabulary <= CONFIG.vocabulary && miniature.vocabulary > 256 + 100, "{}", miniature.vocabulary);
    let tokenizer = Tokenizer::from_file(miniature.student.join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.get_vocab_size(true), miniature.vocabulary);
    let last = miniature.vocabulary as u32 - 1;
    for (token, id) in [("<|endoftext|>", last - 2), ("<|im_start|>", last - 1), ("<|im_end|>", last)] {
        assert_eq!(tokenizer.token_to_id(token), Some(id), "{token}");
        assert_eq!(tokenizer.encode(token, false).unwrap().get_ids(), [id], "{token} is one token in text");
    }
    // Every byte is in the alphabet: text the chats never held comes back, and their own words are short.
    let strange = "Zażółć 12 🍍\tümlaut \u{1} 中文";
    let ids = tokenizer.encode(strange, false).unwrap();
    assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), strange);
    assert!(tokenizer.encode("What is the opposite of hot?", false).unwrap().len() <= 12);
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert_eq!(std::fs::read(miniature.student.join(name)).unwrap(), std::fs::read(miniature.teacher.join(name)).unwrap());
    }
}

/// What is trained on is what the folder's own template says, through the template engine.
#[test]
fn the_template_renders_what_was_trained_on() {
    let miniature = built();
    let config = json(&miniature.teacher.join("tokenizer_config.json"));
    let golden = json(&Path::new(GOLDEN).join("student/tokenizer_config.json"));
    assert_eq!(config["chat_template"], golden["chat_template"]);
    let tokenizer = Tokenizer::from_file(miniature.teacher.join("tokenizer.json")).unwrap();
    let mut tokens = 0;
    for chat in chats() {
        tokens += tokenizer.encode(template(&config, &chat), false).unwrap().len();
    }
    assert_eq!(tokens, miniature.tokens);
}

/// The template has no line of its own outside strings, so block trimming makes no difference to it.
fn template(config: &Value, chat: &Value) -> String {
    let context = serde_json::json!({"messages": chat["messages"]});
    minijinja::Environment::new().render_str(config["chat_template"].as_str().unwrap(), minijinja::value::Serde(context)).unwrap()
}

fn shape_of(folder: &Path) -> (DecoderShape, Value) {
    let config = json(&folder.join("config.json"));
    let vocabulary = config["vocab_size"].as_u64().unwrap() as usize;
    let tied = config["tie_word_embeddings"].as_bool().unwrap();
    let shape = if tied { student_shape(vocabulary) } else { teacher_shape(vocabulary) };
    let number = |name: &str| config[name].as_u64().unwrap() as usize;
    assert_eq!(shape.hidden, number("hidden_size"));
    assert_eq!(shape.intermediate, number("intermediate_size"));
    assert_eq!(shape.layers, number("num_hidden_layers"));
    assert_eq!((shape.heads, shape.kv_heads), (number("num_attention_heads"), number("num_key_value_heads")));
    assert_eq!(config["model_type"], "qwen2");
    (shape, config)
}

#[test]
fn the_teacher_folder_is_awq_in_two_files() {
    let miniature = built();
    let (shape, config) = shape_of(&miniature.teacher);
    assert_eq!(config["quantization_config"]["group_size"], GROUP_SIZE);
    assert_eq!(config["quantization_config"]["quant_method"], "awq");
    assert_eq!(config["torch_dtype"], "float16");
    assert!(shape.heads > shape.kv_heads, "grouped queries");
    assert!(shape.vocabulary > miniature.vocabulary && shape.vocabulary.is_multiple_of(64), "padded head");

    let index = json(&miniature.teacher.join("model.safetensors.index.json"));
    let map = index["weight_map"].as_object().unwrap();
    let mut bytes = 0;
    let mut expected = BTreeMap::new();
    for file in teacher_files() {
        let here = tensors(&miniature.teacher, &[file]);
        assert!(here.len() > 5, "{file} holds {}", here.len());
        for (name, tensor) in here {
            assert_eq!(map[&name], file, "{name}");
            bytes += tensor.elem_count() * tensor.dtype().size_in_bytes();
            expected.insert(name, tensor);
        }
    }
    assert_eq!(map.len(), expected.len());
    assert_eq!(index["metadata"]["total_size"], bytes);
    for (name, dims) in shape.tensors() {
        let Some(module) = name.strip_suffix("_proj.weight") else {
            assert_eq!(expected[&name].dims(), dims, "{name}");
            continue;
        };
        let (outputs, inputs) = (dims[0], dims[1]);
        let part = |what: &str| expected[&format!("{module}_proj.{what}")].dims().to_vec();
        assert_eq!(part("qweight"), [inputs, outputs / 8]);
        assert_eq!(part("qzeros"), [inputs / GROUP_SIZE, outputs / 8]);
        assert_eq!(part("scales"), [inputs / GROUP_SIZE, outputs]);
        assert!(!expected.contains_key(&name), "{name} must not be there twice");
    }
}

#[test]
fn the_student_folder_is_dense_and_tied() {
    let miniature = built();
    let (shape, config) = shape_of(&miniature.student);
    assert_eq!(config["torch_dtype"], "bfloat16");
    assert!(config.get("quantization_config").is_none());
    assert_ne!(miniature.student_rows, miniature.teacher_rows, "the widths differ");
    let tensors = tensors(&miniature.student, &["model.safetensors"]);
    assert!(!tensors.contains_key("lm_head.weight"));
    assert_eq!(tensors.len(), shape.tensors().len());
    for (name, dims) in shape.tensors() {
        assert_eq!(tensors[&name].dims(), dims, "{name}");
        assert_eq!(tensors[&name].dtype(), candle_core::DType::BF16, "{name}");
    }
}

/// Both models learnt, the teacher more; and what lies in the folders is what was trained: read back by the formulas, the
/// loss over the same chats is the reported one, up to rounding (bf16: 2^-9 of each weight; int4: half a step of each,
/// 1/30 of a group's range).
#[test]
fn the_folders_hold_what_was_trained() {
    let miniature = built();
    let uniform = (miniature.teacher_rows as f64).ln();
    assert!((miniature.teacher_loss.0 - uniform).abs() < 0.3, "{:?}", miniature.teacher_loss);
    assert!(miniature.teacher_loss.1 < 2.0, "{:?}", miniature.teacher_loss);
    assert!(miniature.student_loss.1 < miniature.student_loss.0 - 1.0, "{:?}", miniature.student_loss);
    assert!(miniature.student_loss.1 > miniature.teacher_loss.1 + 0.5, "{:?}", miniature.student_loss);

    let student = tensors(&miniature.student, &["model.safetensors"]);
    let student = Decoder::from_tensors(&shape_of(&miniature.student).0, &student).unwrap();
    let loss = loss(&miniature.student, &student);
    println!("student {:?} read back {loss}", miniature.student_loss);
    assert!((loss - miniature.student_loss.1).abs() < 0.01, "{loss}");

    let teacher = dequantised(tensors(&miniature.teacher, &teacher_files()));
    let teacher = Decoder::from_tensors(&shape_of(&miniature.teacher).0, &teacher).unwrap();
    let loss = self::loss(&miniature.teacher, &teacher);
    println!("teacher {:?} read back {loss}", miniature.teacher_loss);
    assert!((loss - miniature.teacher_loss.1).abs() < 0.1, "{loss}");
}

fn loss(folder: &Path, decoder: &Decoder) -> f64 {
    let config = json(&folder.join("tokenizer_config.json"));
    let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json")).unwrap();
    let ids: Vec<Vec<u32>> = chats()
        .iter()
        .take(SAMPLE)
        .map(|chat| tokenizer.encode(template(&config, chat), false).unwrap().get_ids().to_vec())
        .collect();
    let batch: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
    f64::from(batch_loss(decoder, &batch).unwrap().to_scalar::<f32>().unwrap())
}

/// AWQ modules back to `weight` [out, in] by W[o][i] = (q[i][o] − z[i/g][o]) · scale[i/g][o].
fn dequantised(mut tensors: BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    let modules: Vec<String> = tensors.keys().filter_map(|name| Some(name.strip_suffix(".qweight")?.to_string())).collect();
    assert_eq!(modules.len(), 7 * 3);
    for module in modules {
        let mut take = |what: &str| tensors.remove(&format!("{module}.{what}")).unwrap();
        let (qweight, qzeros) = (take("qweight").to_vec2::<i32>().unwrap(), take("qzeros").to_vec2::<i32>().unwrap());
        let scales = take("scales").to_vec2::<f16>().unwrap();
        let (inputs, outputs) = (qweight.len(), scales[0].len());
        let code = |words: &[i32], o: usize| ((words[o / 8] as u32 >> [0, 16, 4, 20, 8, 24, 12, 28][o % 8]) & 15) as f32;
        let value = |o: usize, i: usize| {
            let g = i / GROUP_SIZE;
            (code(&qweight[i], o) - code(&qzeros[g], o)) * scales[g][o].to_f32()
        };
        let weight: Vec<f32> = (0..outputs * inputs).map(|n| value(n / inputs, n % inputs)).collect();
        let weight = Tensor::from_vec(weight, (outputs, inputs), &Device::Cpu).unwrap();
        tensors.insert(format!("{module}.weight"), weight);
    }
    tensors
}

#[test]
fn settings_and_stops_are_honoured() {
    let folder = tempfile::tempdir().unwrap();
    let context = RunContext::default();
    for config in [
        MiniatureConfig { conversations: 0, ..SHORT },
        MiniatureConfig { batch: 0, ..SHORT },
        MiniatureConfig { vocabulary: 258, ..SHORT },
        MiniatureConfig { vocabulary: 1 << 20, ..SHORT },
    ] {
        assert!(matches!(build(folder.path(), &config, &context), Err(Error::Setting { .. })), "{config:?}");
    }
    let file = folder.path().join("file");
    std::fs::write(&file, "in the way").unwrap();
    let message = build(&file, &SHORT, &context).unwrap_err().to_string();
    assert!(message.contains("file"), "{message}");
    context.stop.store(true, Ordering::Relaxed);
    assert!(matches!(build(folder.path(), &SHORT, &context), Err(Error::Interrupted { .. })));
    assert!(!folder.path().join("teacher").exists());
}

#[test]
fn unseen_chats_are_none_that_the_models_were_trained_on() {
    let trained = std::fs::read_to_string(&built().chats).unwrap();
    let id = |line: &str| serde_json::from_str::<Value>(line).unwrap()["prompt_id"].as_str().unwrap().to_string();
    let mut seen: BTreeSet<String> = trained.lines().map(id).collect();
    assert_eq!(seen.len(), CONFIG.conversations);
    let unseen = unseen_chats(&CONFIG, 150);
    assert_eq!(unseen.len(), 150);
    assert!(unseen.iter().all(|chat| seen.insert(chat.prompt_id.clone())), "each is new");
    assert_eq!(unseen_chats(&CONFIG, 40), unseen[..40], "a longer list begins with the shorter one");
}

#[test]
fn spoiled_chats_keep_their_questions_and_lose_their_answers() {
    let clean = unseen_chats(&CONFIG, 150);
    let spoiled = |percent: usize| {
        let mut chats = clean.clone();
        spoil(&mut chats, percent, &mut Dice::new(1, 1));
        chats
    };
    let said = |chats: &[Conversation], role: &str| -> Vec<String> {
        chats.iter().flat_map(|chat| &chat.messages).filter(|m| m.role == role).map(|m| m.content.clone()).collect()
    };
    assert_eq!(spoiled(0), clean);
    let answers = said(&clean, "assistant");
    let pool: BTreeSet<&String> = answers.iter().collect();
    for percent in [30, 100] {
        let chats = spoiled(percent);
        assert_eq!((said(&chats, "user"), said(&chats, "system")), (said(&clean, "user"), said(&clean, "system")));
        let now = said(&chats, "assistant");
        assert!(now.iter().all(|answer| pool.contains(answer)));
        let changed = now.iter().zip(&answers).filter(|(a, b)| a != b).count() as f64 / answers.len() as f64;
        // Some 350 answers: five deviations are 0.13 at 30 of 100; a drawn answer is the same one now and then.
        assert!((changed - percent as f64 / 100.0).abs() < 0.13, "{percent}: {changed}");
        for (a, b) in clean.iter().zip(&chats) {
            assert_eq!(a.messages == b.messages, a.prompt_id == b.prompt_id, "an identity is that of the words");
        }
    }
}
