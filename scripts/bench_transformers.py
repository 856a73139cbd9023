#!/usr/bin/env python3
"""Stage one as a careful script would do it with Hugging Face transformers on the CPU. Started by bench_teacher.py, one process for
each measurement, so that time and memory are its own; prints one JSON object.

    bench_transformers.py unpack MODEL OUT                       dense copies of an AWQ model: OUT/f32 and OUT/bf16
    bench_transformers.py check OUT ROWS.json DTYPE WIDTH        log-probabilities beside those that ROWS.json holds
    bench_transformers.py search OUT ROWS.json DTYPE WIDTH THREADS TOKENS    tokens/s of every way; of torch's product alone
    bench_transformers.py measure OUT ROWS.json DTYPE WIDTH THREADS WAY      one way

A way is NAME:TOKENS, the budget of a batch: `alone` one conversation at a time; `padded` batches of similar length, filled up on the
right, where causal attention needs no mask; `packed` end to end under a block-diagonal mask; `naive` one at a time, with the logits of
all positions. All but naive take hidden states to the head at scored positions only, CHUNK at once, and keep the K largest
log-probabilities over the first WIDTH ids and the tail. attn_implementation is sdpa. Needs torch, transformers, numpy, safetensors.
"""
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen2ForCausalLM

K, CHUNK = 64, 256
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of word c is column 8 c + ORDER[i]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
PRODUCT_ROWS, PRODUCT_SECONDS = 1024, 2.0
NEAR = 0.85  # of the fastest way's speed: worth a second look


def nibbles(words):
    """Words [rows, n] as int4 values [rows, 8 n]."""
    out = np.empty((*words.shape, 8), np.int8)
    for i, column in enumerate(ORDER):
        out[..., column] = (words.view(np.uint32) >> np.uint32(4 * i)) & np.uint32(15)
    return out.reshape(len(words), -1)


def dequantised(qweight, qzeros, scales):
    """[out, in] in f32, exact: (q - z) * scale, as pipeline/src/linear/awq.rs says."""
    group = len(qweight) // len(scales)
    codes = nibbles(qweight) - np.repeat(nibbles(qzeros), group, 0)
    return np.ascontiguousarray((codes.astype(np.float32) * np.repeat(scales.astype(np.float32), group, 0)).T)


def unpack(model, out):
    tensors = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():
                if name.endswith(".qweight"):
                    stem = name.removesuffix(".qweight")
                    parts = (file.get_tensor(f"{stem}.{part}") for part in ("qweight", "qzeros", "scales"))
                    tensors[f"{stem}.weight"] = torch.from_numpy(dequantised(*parts))
                elif not name.endswith((".qzeros", ".scales")):
                    tensors[name] = torch.from_numpy(file.get_tensor(name).astype(np.float32))
    config = json.loads((model / "config.json").read_text())
    config.pop("quantization_config", None)
    for name, dtype in DTYPES.items():
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config))
        cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_file(cast, folder / "model.safetensors", metadata={"format": "pt"})
    return {"tensors": len(tensors)}


class Teacher:
    """The model and what is kept of it."""

    def __init__(self, folder, dtype, width):
        model, report = Qwen2ForCausalLM.from_pretrained(
            folder / dtype, dtype=DTYPES[dtype], attn_implementation="sdpa", output_loading_info=True
        )
        wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]]
        if wrong:
            sys.exit(f"bench_transformers: {folder / dtype}: {len(wrong)} tensors do not fit the model, such as {wrong[0]}")
        if model.lm_head.weight.dtype != DTYPES[dtype] or model.config._attn_implementation != "sdpa":
            sys.exit("bench_transformers: the model was loaded in another type or with another attention than asked for")
        self.model, self.width = model.eval(), width
        self.head = model.lm_head.weight[:width]

    def select(self, logits):
        """Ids, log-probabilities and tail of rows of logits."""
        logprobs = torch.log_softmax(logits.float(), -1)
        values, ids = logprobs.topk(K, -1)
        tail = torch.log((1 - values.exp().sum(-1)).clamp_min(1e-9))
        return ids.to(torch.int32).numpy(), values.numpy(), tail.numpy()

    def capture(self, hidden):
        """Of hidden states [n, H] at scored positions; logits of CHUNK of them exist at once."""
        parts = [self.select(torch.nn.functional.linear(hidden[s : s + CHUNK], self.head)) for s in range(0, len(hidden), CHUNK)]
        return [np.concatenate(part) for part in zip(*parts)]

    def backbone(self, **inputs):
        return self.model.model(use_cache=False, **inputs).last_hidden_state

    def padded(self, batch):
        ids = torch.zeros(len(batch), max(len(row["input_ids"]) for row in batch), dtype=torch.long)
        for i, row in enumerate(batch):
            ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        hidden = self.backbone(input_ids=ids)
        return self.capture(torch.cat([hidden[i, row["positions"]] for i, row in enumerate(batch)]))

    def packed(self, batch):
        lengths = torch.tensor([len(row["input_ids"]) for row in batch])
        segment = torch.repeat_interleave(torch.arange(len(batch)), lengths)
        ids = torch.tensor([i for row in batch for i in row["input_ids"]])
        places = torch.cat([torch.arange(n) for n in lengths.tolist()])
        mask = (segment[:, None] == segment[None]).tril()
        hidden = self.backbone(input_ids=ids[None], position_ids=places[None], attention_mask=mask[None, None])[0]
        starts = (lengths.cumsum(0) - lengths).tolist()
        return self.capture(hidden[[start + i for start, row in zip(starts, batch) for i in row["positions"]]])

    def naive(self, batch):
        """As most scripts do it: one conversation, the logits of every position, and only then what is wanted."""
        (row,) = batch
        logits = self.model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        return [part[row["positions"]] for part in self.select(logits[:, : self.width])]

    def run(self, way, rows):
        name, budget = way.split(":")
        step = {"alone": self.padded}.get(name) or getattr(self, name)
        return [step(batch) for batch in batches(name, int(budget), rows)]


def batches(name, budget, rows):
    """Rows by falling length (the tightest fit, and the largest batch first); padded ones count as what they are filled up to."""
    if name in ("alone", "naive"):
        return [[row] for row in rows]
    found, size = [], 0
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        length = len(found[-1][0]["input_ids"]) if found and name == "padded" else len(row["input_ids"])
        if not found or size + length > budget:
            found.append([])
            size, length = 0, len(row["input_ids"])
        found[-1].append(row)
        size += length
    return found


def timed(teacher, way, rows):
    # What is set up at first use is no part of the speed.
    teacher.run(way, [min(rows, key=lambda row: len(row["input_ids"]))])
    tokens = sum(len(row["input_ids"]) for row in rows)
    cpu, start = time.process_time(), time.perf_counter()
    kept = teacher.run(way, rows)
    seconds = time.perf_counter() - start
    positions = sum(len(part[0]) for part in kept)
    expected = sum(len(row["positions"]) for row in rows)
    if positions != expected:
        sys.exit(f"bench_transformers: {way}: expected {expected} scored positions, found {positions}")
    return {"way": way, "tokens": tokens, "seconds": seconds, "cpu": time.process_time() - cpu, "tokens_per_s": tokens / seconds}


def search(teacher, rows, tokens):
    """Every way over every second row, those that come near the fastest twice; torch's product of the largest shape of a layer."""
    some = sorted(rows, key=lambda row: len(row["input_ids"]))[::2] if len(rows) > 8 else rows
    ways = ["alone:0", *(f"padded:{tokens // n}" for n in (4, 2, 1)), *(f"packed:{tokens // n}" for n in (4, 2))]
    found = {way: timed(teacher, way, some) for way in ways}
    speed = lambda one: one["tokens_per_s"]
    near = NEAR * max(map(speed, found.values()))
    for way in [way for way in ways if speed(found[way]) > near]:
        found[way] = max(found[way], timed(teacher, way, some), key=speed)
    weight = teacher.model.model.layers[0].mlp.gate_proj.weight
    x = torch.randn(PRODUCT_ROWS, weight.shape[1], dtype=weight.dtype)
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < PRODUCT_SECONDS:
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - began)
    return {"ways": list(found.values()), "product_gflops": 2 * PRODUCT_ROWS * weight.numel() / best / 1e9}


def check(teacher, rows):
    """How far these log-probabilities are from those in `rows`: at the ids kept there, at the tail, and whether the first one is the
    same (`gap`: by how much less likely, here, the other's first id is than the own first one)."""
    found = {"positions": 0, "same_first": 0, "gap": 0.0, "logprob_mean": [], "logprob_max": 0.0, "tail_max": 0.0}
    for row in rows:
        hidden = teacher.backbone(input_ids=torch.tensor([row["input_ids"]]))[0, row["positions"]]
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            logprobs = torch.log_softmax(torch.nn.functional.linear(hidden[part], teacher.head).float(), -1)
            ids, theirs = torch.tensor(row["ids"][part]), torch.tensor(row["logprobs"][part])
            difference = (logprobs.gather(1, ids) - theirs).abs()
            tail = torch.log((1 - logprobs.topk(K, -1).values.exp().sum(-1)).clamp_min(1e-9)) - torch.tensor(row["tail"][part])
            gap = logprobs.max(-1).values - logprobs.gather(1, ids[:, :1])[:, 0]
            found["positions"] += len(ids)
            found["same_first"] += int((logprobs.argmax(-1) == ids[:, 0]).sum())
            found["logprob_mean"].append(float(difference.mean()))
            for name, value in (("gap", gap), ("logprob_max", difference), ("tail_max", tail.abs())):
                found[name] = max(found[name], float(value.max()))
    return found | {"logprob_mean": float(np.mean(found["logprob_mean"]))}


@torch.inference_mode()
def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    task, folder, *rest = sys.argv[1:]
    if task == "unpack":
        return unpack(Path(folder), Path(rest[0]))
    path, dtype, width, *rest = rest
    imported = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if rest:
        torch.set_num_threads(int(rest[0]))
    rows, teacher = json.loads(Path(path).read_text()), Teacher(Path(folder), dtype, int(width))
    if task == "check":
        return check(teacher, rows)
    if task == "search":
        return search(teacher, rows, int(rest[1])) | {"imported": imported}
    return timed(teacher, rest[1], rows)


if __name__ == "__main__":
    print(json.dumps(main()))
