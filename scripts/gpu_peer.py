#!/usr/bin/env python3
"""The two jobs of gpu-check.sh in PyTorch and transformers (and PEFT, bitsandbytes), for the same shapes and lengths, on the same GPU: what people use
today. Part of gpu_check.py, which gives the shapes and prints the figures; alone:

    python scripts/gpu_peer.py teacher '{"hidden": 5120, "layers": 64, ...}' --length 1024 --rows 16
    python scripts/gpu_peer.py student '{...}' --length 2048 --rows 2 --rank 64

`teacher` scores rows with a dense bf16 model of random weights (no AWQ kernels are asked for, so nothing is unpacked: that favours it), takes the 64 largest
and the log-sum-exp of each position, and brings them to the host. `student` trains LoRA on all projections of a base in NF4 where bitsandbytes is there and
in bf16 where not, with gradient checkpointing and a forward KL over 64 ids and the rest. Prints one JSON object.
"""
import argparse
import json
import sys
import time

try:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM
except ImportError as missing:
    sys.exit(f"gpu_peer: {missing.name} is not installed")

KEPT = 64


def model(shape, device):
    config = Qwen2Config(
        hidden_size=shape["hidden"], num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], num_key_value_heads=shape["kv-heads"],
        intermediate_size=shape["intermediate"], vocab_size=shape["vocab"], max_position_embeddings=32768, tie_word_embeddings=False)
    # Made where it is used, in bf16: a 32B would not pass through the host in time.
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        made = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return made.eval()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(device, rounds, work):
    """Seconds of the best round; the first one sets things up."""
    best = float("inf")
    for i in range(rounds + 1):
        synchronize(device)
        began = time.perf_counter()
        work()
        synchronize(device)
        best = min(best, time.perf_counter() - began) if i else best
    return best


def teacher(o, device):
    scored = model(o.shape, device)
    ids = torch.randint(0, o.shape["vocab"], (o.rows, o.length), device=device)

    @torch.no_grad()
    def work():
        hidden = scored.model(ids).last_hidden_state.reshape(-1, o.shape["hidden"])
        for chunk in hidden.split(1024):
            logits = scored.lm_head(chunk).float()
            for part in (*logits.topk(min(KEPT, logits.shape[1])), logits.logsumexp(-1)):
                part.cpu()

    return {"base": "dense bf16", "seconds": timed(device, 3, work)}


def student(o, device):
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        sys.exit("gpu_peer: peft is not installed")
    base, kind = model(o.shape, device), "bf16"
    try:
        import bitsandbytes as bnb

        for layer in base.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, linear in list(block.named_children()):
                    if isinstance(linear, torch.nn.Linear):
                        packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, torch.bfloat16,
                                                   compress_statistics=True, quant_type="nf4")
                        packed.load_state_dict(linear.state_dict())
                        setattr(block, name, packed.to(device))
        kind = "NF4"
    except ImportError:
        pass
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tuned = get_peft_model(base, LoraConfig(r=o.rank, lora_alpha=16, target_modules=projections)).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-4)
    vocab = o.shape["vocab"]
    ids = torch.randint(0, vocab, (o.rows, o.length), device=device)
    kept = torch.stack([torch.randperm(vocab, device=device)[: min(KEPT, vocab)] for _ in range(o.length)]).expand(o.rows, -1, -1)
    p = torch.full(kept.shape, 0.9 / kept.shape[-1], device=device)

    def work():
        for row in range(o.rows):
            logits = tuned(ids[row : row + 1]).logits.float()
            log_q = logits.gather(-1, kept[row : row + 1]) - logits.logsumexp(-1, keepdim=True)
            rest = torch.log1p(-log_q.exp().sum(-1).clamp(max=1 - 1e-6))
            (-(p[row : row + 1] * log_q).sum(-1) - 0.1 * rest).mean().div(o.rows).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"base": kind, "seconds": timed(device, 2, work)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("teacher", "student"))
    parser.add_argument("shape", type=json.loads, help="sizes by name, as random_teacher takes them, in JSON")
    parser.add_argument("--length", type=int, required=True, help="tokens of a row")
    parser.add_argument("--rows", type=int, required=True, help="rows of a batch or an optimiser step")
    parser.add_argument("--rank", type=int, default=64, help="LoRA's r (default 64)")
    parser.add_argument("--device", default="cuda", help="default cuda")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_peer: this PyTorch sees no GPU")
    figures = {"teacher": teacher, "student": student}[options.job](options, device)
    figures["tokens_per_second"] = options.rows * options.length / figures["seconds"]
    if device.type == "cuda":
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
