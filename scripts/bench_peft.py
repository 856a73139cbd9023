#!/usr/bin/env python3
"""Stage two as a careful script would do it with transformers, PEFT and bitsandbytes on the CPU. Started by bench_student.py, one process
for each measurement, so that time and memory are its own; prints one JSON object.

    bench_peft.py MODEL ADAPTER ROWS.json SETTINGS.json

SETTINGS: dtype f32 | bf16 (bf16: automatic mixed precision), holding bnb (Linear4bit, NF4 with double quantisation) | dense (the same
values, dequantised by bitsandbytes once, so nothing is unpacked in a step), way packed (the packs of potstill, end to end under a
block-diagonal mask) | alone (one conversation at a time), objective sft | distill, threads, steps, batch_size, pack_tokens, chunk, lr,
max_grad_norm. ADAPTER is where both start.

Everything a careful user would do is done: gradient checkpointing, sdpa, hidden states taken to the head at scored positions only, and
a head that makes CHUNK positions' logits at once with the gradient written out by hand (no autograd through 152k columns). The loss is
potstill's: forward KL over the kept ids and one bucket for the rest, or cross entropy; mean over the step's scored positions.
"""
import json
import os
import sys
import time
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from torch.nn.utils import clip_grad_norm_
from transformers import BitsAndBytesConfig, Qwen2ForCausalLM

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


class FusedHead(torch.autograd.Function):
    """Sum of the rows' losses times `scale`, and its gradient to the hidden states, formed chunk by chunk on the way there."""

    @staticmethod
    def forward(ctx, hidden, head, labels, targets, scale, chunk):
        gradient, total = torch.empty_like(hidden), 0.0
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ head.T).float()
            log_sum = torch.logsumexp(logits, -1, keepdim=True)
            rows = torch.arange(len(logits))
            if targets is None:
                total -= float((logits[rows, labels[part]] - log_sum[:, 0]).double().sum())
                d = logits.sub_(log_sum).exp_()
                d[rows, labels[part]] -= 1
            else:
                ids, logprobs, tail = (column[part] for column in targets)
                p = torch.cat([logprobs, tail[:, None]], -1)
                p = p - torch.logsumexp(p, -1, keepdim=True)
                kept = logits.gather(1, ids) - log_sum
                d = logits.sub_(log_sum).exp_()
                rest = d.scatter(1, ids, 0.0).sum(-1, keepdim=True)
                q = torch.cat([kept, rest.log()], -1)
                total += float((p.exp() * (p - q)).double().sum())
                d.mul_(1 - p[:, -1:].exp() / rest)
                d.scatter_(1, ids, kept.exp() - p[:, :-1].exp())
            gradient[part] = (d.mul_(scale).to(head.dtype) @ head).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return hidden.new_tensor(total * scale, dtype=torch.float64)

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream.to(gradient.dtype), *[None] * 5)


def student(folder, adapter, dtype, holding):
    """The model with the adapter on it, ready to train."""
    options = {"dtype": DTYPES[dtype], "attn_implementation": "sdpa"}
    if holding == "bnb":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=DTYPES[dtype],
            llm_int8_skip_modules=["lm_head"],
        )
        options["device_map"] = "cpu"
    model = Qwen2ForCausalLM.from_pretrained(folder, **options)
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    for linear in linears:
        if holding == "bnb":
            if not isinstance(linear, bnb.nn.Linear4bit):
                sys.exit("bench_peft: a layer was not quantised")
        else:
            packed, state = quantize_4bit(linear.weight.data.float(), quant_type="nf4", compress_statistics=True)
            linear.weight.data = dequantize_4bit(packed, state).to(DTYPES[dtype])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    model.train()
    return model


def packs(rows, budget):
    """Consecutive rows of at most `budget` tokens together, as pipeline/src/data/pack.rs cuts them."""
    found, size = [], 0
    for row in rows:
        length = len(row["input_ids"])
        if not found or size + length > budget:
            found.append([])
            size = 0
        found[-1].append(row)
        size += length
    return found


def inputs(pack):
    """ids, places, mask and scored places of rows end to end."""
    lengths = torch.tensor([len(row["input_ids"]) for row in pack])
    ids = torch.tensor([i for row in pack for i in row["input_ids"]])
    starts = (lengths.cumsum(0) - lengths).tolist()
    scored = torch.tensor([start + i for start, row in zip(starts, pack) for i in row["positions"]])
    labels = torch.tensor([row["input_ids"][i + 1] for row in pack for i in row["positions"]])
    if len(pack) == 1:
        return {"input_ids": ids[None]}, scored, labels
    segment = torch.repeat_interleave(torch.arange(len(pack)), lengths)
    mask = (segment[:, None] == segment[None]).tril()
    places = torch.cat([torch.arange(n) for n in lengths.tolist()])
    return {"input_ids": ids[None], "position_ids": places[None], "attention_mask": mask[None, None]}, scored, labels


def targets_of(pack):
    column = lambda name: [value for row in pack for value in row[name]]
    return torch.tensor(column("ids")), torch.tensor(column("logprobs")), torch.tensor(column("tail"))


def main():
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    folder, adapter, rows, settings = sys.argv[1], sys.argv[2], *(json.loads(Path(p).read_text()) for p in sys.argv[3:])
    imported = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    torch.set_num_threads(settings["threads"])
    model = student(folder, adapter, settings["dtype"], settings["holding"])
    backbone, head = model.base_model.model.model, model.base_model.model.lm_head.weight
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    mixed = torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings["dtype"] == "bf16")
    size, steps, began = settings["batch_size"], [], time.perf_counter()
    for number in range(settings["steps"]):
        batch = rows[number * size : (number + 1) * size]
        scale = 1 / sum(len(row["positions"]) for row in batch)
        loss, tokens = 0.0, 0
        for pack in packs(batch, settings["pack_tokens"]) if settings["way"] == "packed" else [[row] for row in batch]:
            with mixed:
                given, scored, labels = inputs(pack)
                hidden = backbone(**given, use_cache=False).last_hidden_state[0, scored]
            targets = targets_of(pack) if settings["objective"] == "distill" else None
            part = FusedHead.apply(hidden.to(head.dtype), head, labels, targets, scale, settings["chunk"])
            part.backward()
            loss, tokens = loss + float(part), tokens + given["input_ids"].shape[1]
        norm = float(clip_grad_norm_(trained, settings["max_grad_norm"]))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append({"loss": loss, "grad_norm": norm, "tokens": tokens, "seconds": time.perf_counter() - began})
    return {"steps": steps, "imported": imported}


if __name__ == "__main__":
    print(json.dumps(main()))
