#!/usr/bin/env python3
"""Make the tiny random models that the decoder is checked against, one for each architecture, and what transformers says of them.

    make_decoder_fixtures.py tests/fixtures/decoders

Needs torch, transformers (4.57 or 5) and safetensors. Writes, deterministically, a folder NAME/ for each case:

    config.json              as transformers 4 or 5 writes it; the case says which
    model.safetensors        f32, bf16, or AWQ (packed here by the format's own rules)
    expected.safetensors     input_ids i32 [T] and offsets i64 [3]: two sequences, computed apart
                             logits f32 [T, V] of every position
                             cotangent f32 [T, V] and d_embeddings f32 [T, H]: the gradient of sum(logits * cotangent) with
                             respect to the embedded tokens, by torch's autograd (dense cases)

and defaults.json: what each configuration class makes of a config.json that leaves out all that may be left out.
Everything is computed in f32 with eager attention from the values that the file stores.
"""
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

LENGTHS = (9, 14)
SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2)
WIDE = dict(hidden_size=48, intermediate_size=80)

# name: (model type, settings beyond SIZES, stored as, generation of config.json)
CASES = {
    "qwen2_tied": ("qwen2", dict(tie_word_embeddings=True, rope_theta=1e6, sliding_window=16, use_sliding_window=False), "f32", 4),
    "qwen2_head_dim": ("qwen2", dict(WIDE, head_dim=16, rope_theta=1e6), "bf16", 5),
    "llama": ("llama", dict(WIDE, rms_norm_eps=1e-6), "bf16", 4),
    "llama_bias": ("llama", dict(attention_bias=True), "f32", 5),
    "llama_tied": ("llama", dict(WIDE, tie_word_embeddings=True, rope_theta=5e5, head_dim=8), "bf16", 5),
    "mistral": ("mistral", dict(WIDE, head_dim=16, rope_theta=1e6, sliding_window=None), "bf16", 4),
    "mistral_window": ("mistral", dict(sliding_window=14), "f32", 5),
    "qwen3": ("qwen3", dict(WIDE, head_dim=16, rope_theta=1e6, tie_word_embeddings=True), "bf16", 4),
    "qwen3_bias": ("qwen3", dict(head_dim=8, rope_theta=1e6, attention_bias=True), "f32", 5),
    "llama_awq": ("llama", dict(hidden_size=64, intermediate_size=96, head_dim=24), "awq", 4),
    "qwen3_awq": ("qwen3", dict(hidden_size=64, intermediate_size=96, head_dim=24, rope_theta=1e6), "awq", 5),
}
GROUP = 32
# Nibble i of a word holds column 8c + ORDER[i].
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def randomise(model, generator):
    """Values at which every part matters: logits of order 5, attention far from uniform, norms and biases that are seen."""
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() == 1:
            p.data = 1 + 0.3 * noise if "norm" in name else 0.5 * noise
        else:
            p.data = noise * (0.4 if "embed" in name or "lm_head" in name else 1.5 / p.shape[1] ** 0.5)


def pack_words(values):
    """[rows, columns] of 4 bits -> i32 [rows, columns / 8]."""
    values = values.reshape(values.shape[0], -1, 8).to(torch.int64)
    words = sum(values[:, :, column] << 4 * i for i, column in enumerate(ORDER))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def to_awq(linear):
    """Quantises a layer in groups of inputs; its weight becomes what the packed tensors stand for, (q - z) * scale."""
    w = linear.weight.data.t().reshape(-1, GROUP, linear.out_features)  # [groups, inputs, out]
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    q = (w / scales.float() + zeros).round().clamp(0, 15)
    w = (q - zeros) * scales.float()  # exact in f32
    linear.weight.data = w.reshape(linear.in_features, linear.out_features).t().contiguous()
    q = q.reshape(linear.in_features, linear.out_features)
    return {"qweight": pack_words(q), "qzeros": pack_words(zeros[:, 0]), "scales": scales[:, 0]}


def tensors_of(model, stored, tied):
    """What the file holds; the model is rounded to it."""
    tensors = {}
    if stored == "awq":
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                tensors |= {f"{name}.{part}": t.contiguous() for part, t in to_awq(module).items()}
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "awq": torch.float16}[stored]
    for name, p in model.named_parameters():
        packed = f"{name.removesuffix('.weight')}.qweight" in tensors
        if packed or (tied and name == "lm_head.weight"):
            continue
        tensors[name] = p.data.to(dtype).contiguous()
        p.data = tensors[name].float()
    return tensors


def config_of(config, kind, settings, stored, generation):
    """config.json as transformers `generation` writes it; the words that the two generations share come from the library."""
    out = config.to_dict()
    rope = out.pop("rope_parameters", None) or {}
    theta = settings.get("rope_theta", 10000.0)
    for key in ("rope_theta", "rope_scaling", "dtype", "torch_dtype", "transformers_version", "quantization_config"):
        out.pop(key, None)
    assert rope.get("rope_theta", theta) == theta, rope
    dtype = {"f32": "float32", "bf16": "bfloat16", "awq": "float16"}[stored]
    if generation == 4:
        out |= {"rope_theta": theta, "rope_scaling": None, "torch_dtype": dtype, "transformers_version": "4.57.6"}
    else:
        out |= {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}, "dtype": dtype, "transformers_version": "5.23.0"}
    if stored == "awq":
        out["quantization_config"] = {"bits": 4, "group_size": GROUP, "modules_to_not_convert": None, "quant_method": "awq",
                                      "version": "gemm", "zero_point": True}
    out["architectures"] = [{"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}[kind] + "ForCausalLM"]
    return dict(sorted(out.items()))


def make(folder, number, kind, settings, stored, generation):
    generator = torch.Generator().manual_seed(1000 + number)
    config = AutoConfig.for_model(kind, **(SIZES | settings))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).float().eval()
    tied = bool(settings.get("tie_word_embeddings"))
    randomise(model, generator)
    if tied:
        model.tie_weights()
    folder.mkdir(parents=True)
    text = json.dumps(config_of(config, kind, settings, stored, generation), indent=1)
    (folder / "config.json").write_text(text + "\n")
    save_file(tensors_of(model, stored, tied), folder / "model.safetensors", metadata={"format": "pt"})
    if tied:
        model.tie_weights()
    ids = torch.randint(3, config.vocab_size, (sum(LENGTHS),), generator=generator)
    cotangent = torch.randn((sum(LENGTHS), config.vocab_size), generator=generator) / config.vocab_size**0.5
    logits, slopes = [], []
    for part, g in zip(ids.split(LENGTHS), cotangent.split(LENGTHS)):
        embedded = model.get_input_embeddings()(part[None]).detach().requires_grad_()
        out = model(inputs_embeds=embedded, use_cache=False).logits[0]
        (out * g).sum().backward()
        logits.append(out.detach())
        slopes.append(embedded.grad[0])
    offsets = torch.tensor([0, LENGTHS[0], sum(LENGTHS)])
    expected = {"input_ids": ids.int(), "offsets": offsets, "logits": torch.cat(logits)}
    if stored != "awq":
        expected |= {"cotangent": cotangent, "d_embeddings": torch.cat(slopes)}
    save_file(expected, folder / "expected.safetensors")
    print(f"{folder.name}: logits up to {expected['logits'].abs().max():.1f}")


def defaults():
    """Each class on a config.json that gives sizes alone."""
    sizes = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=4, num_attention_heads=64, vocab_size=96)
    out = {}
    for kind in ("qwen2", "qwen3", "llama", "mistral"):
        architecture = kind.capitalize() + "ForCausalLM"
        given = dict(sizes, model_type=kind, architectures=[architecture])
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(given))
            c = AutoConfig.from_pretrained(folder)
        rope = getattr(c, "rope_parameters", None) or {"rope_theta": getattr(c, "rope_theta", None)}
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        out[kind] = {"given": given, "means": {
            "kv_heads": c.num_key_value_heads, "head_dim": head_dim, "rms_norm_eps": c.rms_norm_eps,
            "rope_theta": rope["rope_theta"], "positions": c.max_position_embeddings, "tied": c.tie_word_embeddings,
            "window": getattr(c, "sliding_window", None), "attention_bias": getattr(c, "attention_bias", None)}}
    return out


def main(target):
    target = Path(target)
    shutil.rmtree(target, ignore_errors=True)
    for number, (name, case) in enumerate(CASES.items()):
        make(target / name, number, *case)
    (target / "defaults.json").write_text(json.dumps(defaults(), indent=1) + "\n")
    total = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(f"{total / 1e6:.2f} MB in {target}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
