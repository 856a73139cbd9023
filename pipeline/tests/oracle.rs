//! The decoder against an independent one: candle-transformers' stock Qwen2, in f32, which gives the last position's logits.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::qwen2::{Config, ModelForCausalLM};
use potstill_pipeline::data::pack::{Pack, Sequence};
use potstill_pipeline::kernel::Precision;
use potstill_pipeline::model::decoder::{Decoder, Holding};
use potstill_pipeline::run::RunContext;
use support::{floats, golden, ids, load, max_difference, offsets};

#[test]
fn last_positions_equal_the_stock_decoder() {
    let config: Config = serde_json::from_slice(&std::fs::read(golden("student/config.json")).unwrap()).unwrap();
    let tensors = load("student/model.safetensors").into_iter().map(|(name, t)| (name, t.to_dtype(DType::F32).unwrap()));
    let builder = VarBuilder::from_tensors(tensors.collect(), DType::F32, &Device::Cpu);
    let mut stock = ModelForCausalLM::new(&config, builder).unwrap();
    let ours = Decoder::from_folder(&golden("student"), Holding::AsStored, Precision::F32, &Device::Cpu, &RunContext::default())
        .unwrap();

    let expected = load("expected/teacher_topk.safetensors");
    let (starts, input_ids) = (offsets(&expected["offsets"]), ids(&expected["input_ids"]));
    let conversations: Vec<&[u32]> = starts.windows(2).map(|w| &input_ids[w[0]..w[1]]).collect();
    assert!(conversations.len() >= 3);
    // All of them in one pack on our side, each alone on the other.
    let pack = Pack::new(conversations.iter().map(|c| Sequence { input_ids: c, positions: &[] }));
    let hidden = ours.final_norm(&ours.hidden(&pack).unwrap()).unwrap();
    for (conversation, end) in conversations.iter().zip(&pack.segments()[1..]) {
        stock.clear_kv_cache();
        let batch = Tensor::new(*conversation, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let want = stock.forward(&batch, 0).unwrap();
        let last = hidden.narrow(0, *end as usize - 1, 1).unwrap();
        let got = ours.logits(&last).unwrap();
        // Float32 against float32 on logits of order 10: the reference's two implementations differ by 4e-5.
        let difference = max_difference(&floats(&got), &floats(&want));
        assert!(difference < 2e-4, "{} tokens: {difference}", conversation.len());
    }
}
