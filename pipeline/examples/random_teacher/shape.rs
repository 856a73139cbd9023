//! The shape of a Qwen2 model: its tensors in the order of the files, how their values are spread, and its `config.json`.

use crate::Failure;
use crate::tensor::{Tensor, Values};
use half::{bf16, f16};
use serde_json::{Value, json};

/// Deviation of embeddings, head and biases.
const EMBEDDING_DEVIATION: f32 = 0.02;
/// int4 values in a word.
const PER_WORD: usize = 8;

pub struct Sizes {
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub intermediate: usize,
    pub vocab: usize,
    pub ids: Option<usize>,
    pub group: usize,
    pub awq: bool,
    pub tied: bool,
}

impl Sizes {
    fn float(&self) -> &'static str {
        if self.awq { "F16" } else { "BF16" }
    }

    /// A float tensor, uniform from `low` to `high`.
    fn uniform(&self, name: String, shape: Vec<usize>, low: f32, high: f32) -> Tensor {
        let bits = |v: f32| if self.awq { f16::from_f32(v).to_bits() } else { bf16::from_f32(v).to_bits() };
        let steps = if low == high { 1 } else { 1 << 16 };
        let values = (0..steps).map(|i| bits(low + (high - low) * (i as f32 + 0.5) / steps as f32)).collect();
        Tensor { name, dtype: self.float(), shape, values: Values::Chosen(values) }
    }

    fn spread(&self, name: String, shape: Vec<usize>, deviation: f32) -> Tensor {
        let most = deviation * 3f32.sqrt();
        self.uniform(name, shape, -most, most)
    }

    fn linear(&self, name: String, outputs: usize, inputs: usize) -> Vec<Tensor> {
        // A code less a zero point deviates by 4.6: four of them over √inputs make outputs as large as inputs.
        let deviation = 1.0 / (inputs as f32).sqrt();
        if !self.awq {
            return vec![self.spread(format!("{name}.weight"), vec![outputs, inputs], deviation)];
        }
        let (words, groups, scale) = (outputs / PER_WORD, inputs / self.group, deviation / 4.0);
        let packed =
            |part: &str, rows, values| Tensor { name: format!("{name}.{part}"), dtype: "I32", shape: vec![rows, words], values };
        vec![
            packed("qweight", inputs, Values::Codes),
            packed("qzeros", groups, Values::Zeros),
            self.uniform(format!("{name}.scales"), vec![groups, outputs], 0.75 * scale, 1.25 * scale),
        ]
    }

    /// Every tensor, in the order of the files.
    pub fn tensors(&self) -> Vec<Tensor> {
        let (h, d) = (self.hidden, self.hidden / self.heads);
        let norm = |name: String| self.uniform(name, vec![h], 1.0, 1.0);
        let wide = |name: &str| self.spread(name.into(), vec![self.vocab, h], EMBEDDING_DEVIATION);
        let mut all = vec![wide("model.embed_tokens.weight")];
        for layer in 0..self.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            all.push(norm(name("input_layernorm.weight")));
            for (part, outputs) in [("q", self.heads * d), ("k", self.kv_heads * d), ("v", self.kv_heads * d)] {
                all.extend(self.linear(name(&format!("self_attn.{part}_proj")), outputs, h));
                all.push(self.spread(name(&format!("self_attn.{part}_proj.bias")), vec![outputs], EMBEDDING_DEVIATION));
            }
            all.extend(self.linear(name("self_attn.o_proj"), h, self.heads * d));
            all.push(norm(name("post_attention_layernorm.weight")));
            all.extend(self.linear(name("mlp.gate_proj"), self.intermediate, h));
            all.extend(self.linear(name("mlp.up_proj"), self.intermediate, h));
            all.extend(self.linear(name("mlp.down_proj"), h, self.intermediate));
        }
        all.push(norm("model.norm.weight".into()));
        if !self.tied {
            all.push(wide("lm_head.weight"));
        }
        all
    }

    pub fn config(&self) -> Value {
        let mut config = json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": self.hidden,
            "intermediate_size": self.intermediate, "max_position_embeddings": 32_768, "max_window_layers": self.layers,
            "num_attention_heads": self.heads, "num_hidden_layers": self.layers, "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": 32_768, "tie_word_embeddings": self.tied,
            "torch_dtype": if self.awq { "float16" } else { "bfloat16" }, "use_sliding_window": false, "vocab_size": self.vocab,
        });
        if self.awq {
            config["quantization_config"] = json!({
                "bits": 4, "group_size": self.group, "modules_to_not_convert": null, "quant_method": "awq", "version": "gemm",
                "zero_point": true,
            });
        }
        config
    }

    pub fn check(&self) -> Result<(), Failure> {
        let wrong = |what: &str| Err(Failure::from(what));
        let packable = |n: usize| !self.awq || (n.is_multiple_of(self.group) && n.is_multiple_of(PER_WORD));
        match () {
            () if !self.hidden.is_multiple_of(2 * self.heads) => wrong("--hidden: expected an even multiple of --heads"),
            () if !self.heads.is_multiple_of(self.kv_heads) => wrong("--kv-heads: expected a divisor of --heads"),
            () if !packable(self.hidden) || !packable(self.intermediate) => {
                wrong("--hidden, --intermediate: expected multiples of --group and 8")
            }
            () if self.awq && !(self.hidden / self.heads * self.kv_heads).is_multiple_of(PER_WORD) => {
                wrong("--kv-heads: expected a multiple of 8 dimensions of k and v")
            }
            () => Ok(()),
        }
    }
}
