//! Dumps this program's logits for given token ids, so that another implementation can be held against them.
//!
//!     cargo run --release -p potstill-pipeline --example logits -- MODEL_FOLDER IDS.json OUT.safetensors [--nf4] [--adapter FOLDER]
//!
//! `IDS.json` is a list of lists of ids. OUT holds `ids_N` i64 [T] and `logits_N` f32 [T, V] for each. With `--nf4` the linear layers
//! are quantised as a student's are.

use candle_core::{Device, Tensor};
use potstill_pipeline::adapter;
use potstill_pipeline::data::pack::{Pack, Sequence};
use potstill_pipeline::kernel::Precision;
use potstill_pipeline::model::decoder::{Decoder, Holding};
use potstill_pipeline::run::RunContext;
use potstill_pipeline::student::{LoraSettings, Student};
use std::collections::HashMap;
use std::path::Path;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, ids, out, options @ ..] = arguments.as_slice() else {
        return Err("expected MODEL_FOLDER IDS.json OUT.safetensors [--nf4] [--adapter FOLDER]".into());
    };
    let holding = if options.iter().any(|o| o == "--nf4") { Holding::Nf4 } else { Holding::AsStored };
    let mut decoder = Decoder::from_folder(Path::new(folder), holding, Precision::F32, &Device::Cpu, &RunContext::default())?;
    if let Some(at) = options.iter().position(|o| o == "--adapter") {
        let folder = options.get(at + 1).ok_or("--adapter: expected a folder")?;
        decoder = adapted(decoder, Path::new(folder))?;
    }
    let lists: Vec<Vec<u32>> = serde_json::from_slice(&std::fs::read(ids)?)?;
    let mut tensors = HashMap::new();
    for (n, input_ids) in lists.iter().enumerate() {
        let pack = Pack::new([Sequence { input_ids, positions: &[] }]);
        let hidden = decoder.final_norm(&decoder.hidden(&pack)?)?;
        tensors.insert(format!("logits_{n}"), decoder.logits(&hidden)?);
        let ids: Vec<i64> = input_ids.iter().map(|id| i64::from(*id)).collect();
        tensors.insert(format!("ids_{n}"), Tensor::new(ids, &Device::Cpu)?);
    }
    candle_core::safetensors::save(&tensors, out)?;
    println!("{} lists of ids in {out}", lists.len());
    Ok(())
}

fn adapted(decoder: Decoder, folder: &Path) -> Result<Decoder, Failure> {
    let (config, mut tensors) = adapter::load(folder)?;
    let mut student = Student::new(decoder, &LoraSettings::of(&config)?)?;
    let named = student.parameters().into_iter().filter_map(|(name, _)| tensors.remove(&name).map(|t| (name, t)));
    student.set_parameters(&named.collect::<Vec<_>>())?;
    Ok(student.decoder().clone())
}
