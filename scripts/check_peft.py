#!/usr/bin/env python3
"""Check that PEFT and transformers read what potstill wrote, and compute the same.

    check_peft.py --student DIR --adapter DIR --merged DIR --ids IDS.json [--logits FILE] [--merged-logits FILE]

IDS.json holds lists of token ids. On each list, in float32 on the CPU with eager attention, log-probabilities of
  peft    the base model with the adapter, through PEFT,
  merged  the merged folder, through transformers,
  ours    a safetensors file written by the example `logits` (tensors ids_N i64 [T], logits_N f32 [T, V]): --logits for base and
          adapter, --merged-logits for the merged folder
are compared; the largest differences are printed. Adapters on some projections alone and rank-stabilised ones are checked alike:
PEFT must adapt exactly the modules that the file has tensors for, by the factor alpha / r or alpha / sqrt(r).

The adapter's folder is also held against what vLLM's LoRA loader reads: adapter_model.safetensors with names of the form
[base_model.model.]MODULE.lora_A.weight and lora_B.weight, MODULE ending in one of a decoder's projections; r, lora_alpha and
target_modules in adapter_config.json, r at most --max-lora-rank, bias "none", and nothing switched on that it refuses.

Exits with 1 when one is above its tolerance:
  float32 against float32: 1e-4 nats, seven times what correct implementations differ by on models of this size
  merged weights in bfloat16 or float16 against float32 ones: 0.02 and 0.005 nats on average over the probability; rounding a
  weight moves it by up to 2^-9 or 2^-12 of itself, which moved the average by 0.002 (bfloat16) on the reference student, while
  leaving the adapter out moved it by 0.28
Needs torch, transformers, peft, safetensors.
"""
import argparse
import json
import math
import sys
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FLOAT32_TOLERANCE = 1e-4
ROUNDED_TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.005}

# What vLLM replaces by LoRA layers in a decoder of this family, unpacked (it packs q, k, v and gate, up itself).
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
# Read by vLLM only to refuse them.
REFUSED = ("use_dora", "lora_bias", "modules_to_save", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def stored_dtype(folder):
    """The coarsest type among the folder's weights."""
    found = set()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}
    if not found:
        sys.exit(f"{folder}: no safetensors file")
    return torch.bfloat16 if "BF16" in found else torch.float16 if "F16" in found else torch.float32


@torch.no_grad()
def logprobs_of(model, ids):
    return [torch.log_softmax(model(torch.tensor([row])).logits[0].double(), -1) for row in ids]  # [T, V]


def logprobs_in(path, ids):
    tensors = load_file(path)
    out = []
    for n, row in enumerate(ids):
        if tensors[f"ids_{n}"].tolist() != row:
            sys.exit(f"{path}: ids_{n} differs from list {n} of the ids file")
        out.append(torch.log_softmax(tensors[f"logits_{n}"].double(), -1))
    return out


def compare(name, reference, found, dtype):
    """Prints the differences of two lists of [T, V]; whether they are within the tolerance."""
    difference, kl, positions = 0.0, 0.0, 0
    mean = 0.0
    for a, b in zip(reference, found, strict=True):
        if a.shape != b.shape:
            print(f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)} differ")
            return False
        gap = (a - b).abs()
        difference = max(difference, gap.max().item())
        mean += (a.exp() * gap).sum().item()
        kl += (a.exp() * (a - b)).sum().item()
        positions += len(a)
    rounded = dtype in ROUNDED_TOLERANCE
    tolerance = ROUNDED_TOLERANCE.get(dtype, FLOAT32_TOLERANCE)
    good = (mean / positions if rounded else difference) <= tolerance
    print(
        f"{name}: largest |d logprob| {difference:.2e}, weighted mean {mean / positions:.2e}, mean KL {kl / positions:.2e} nats over "
        f"{positions} positions; {'mean' if rounded else 'largest'} allowed {tolerance:g}: {'ok' if good else 'TOO FAR'}"
    )
    return good


def layout_faults(folder, max_rank):
    """What vLLM or PEFT would stumble over in an adapter's folder, as sentences; and its modules."""
    config = json.loads((folder / "adapter_config.json").read_text())
    faults = [f"adapter_config.json lacks {key}" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    faults += [f"adapter_config.json: {key} is {config[key]}" for key in REFUSED if config.get(key)]
    unknown = set(config) - {field.name for field in fields(LoraConfig)}
    faults += [f"adapter_config.json: PEFT does not know {sorted(unknown)}"] if unknown else []
    rank, modules = config.get("r", 0), set()
    if config.get("bias", "none") != "none" or isinstance(config.get("init_lora_weights", True), str):
        faults.append("adapter_config.json: bias or init_lora_weights is not plain")
    if not 0 < rank <= max_rank:
        faults.append(f"adapter_config.json: r = {rank} is not from 1 to {max_rank}")
    if not set(config.get("target_modules", ())) <= PROJECTIONS:
        faults.append(f"adapter_config.json: target_modules {config.get('target_modules')} are not all projections")
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        if (file.metadata() or {}).get("format") != "pt":
            faults.append(f"adapter_model.safetensors: metadata {file.metadata()} does not say format pt")
        for name in file.keys():
            parts = name.removeprefix("base_model.model.").split(".")
            module, matrix = ".".join(parts[:-2]), parts[-2:]
            shape = file.get_slice(name).get_shape()
            if matrix not in (["lora_A", "weight"], ["lora_B", "weight"]) or not name.startswith("base_model.model."):
                faults.append(f"{name}: not a name of a LoRA matrix")
            elif parts[-3] not in config.get("target_modules", ()):
                faults.append(f"{name}: not one of the target modules")
            elif len(shape) != 2 or shape[0 if matrix[0] == "lora_A" else 1] != rank:
                faults.append(f"{name}: shape {shape} does not have the rank {rank}")
            modules.add(module)
        pairs = {f"base_model.model.{module}.lora_{m}.weight" for module in modules for m in "AB"}
        faults += [f"{name} has no partner" for name in pairs - set(file.keys())]
    try:
        AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as e:
        faults.append(f"no tokenizer loads from the folder: {e}")
    return faults, modules


def adapted_by(model):
    """Module names that PEFT put an adapter on, and the factors it uses."""
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(getattr(m, "scaling", None), dict)}
    return set(layers), {factor for layer in layers.values() for factor in layer.scaling.values()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "adapter", "merged", "ids"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--logits", help="our logits of base and adapter")
    parser.add_argument("--merged-logits", help="our logits of the merged folder")
    parser.add_argument("--max-lora-rank", type=int, default=64, help="what vLLM is served with (default 64)")
    args = parser.parse_args()

    ids = json.loads(Path(args.ids).read_text())
    if not ids or not all(isinstance(row, list) and row for row in ids):
        sys.exit(f"{args.ids}: expected a list of lists of token ids")
    model = PeftModel.from_pretrained(load(args.student), args.adapter).eval()
    # PEFT only warns about missing tensors: a B that stayed at zero would compare equal to a base without adapter.
    silent = [n for n, p in model.named_parameters() if "lora_B" in n and not p.any()]
    if silent:
        sys.exit(f"{args.adapter}: {len(silent)} lora_B tensors are all zero, for example {silent[0]}")
    faults, modules = layout_faults(Path(args.adapter), args.max_lora_rank)
    adapted, factors = adapted_by(model)
    config = model.peft_config["default"]
    factor = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    if adapted != modules:
        faults.append(f"PEFT adapts {len(adapted)} modules, the file has {len(modules)}: {sorted(adapted ^ modules)[:4]} differ")
    if factors != {factor}:
        faults.append(f"PEFT's factors are {factors}, expected {factor}")
    for fault in faults:
        print(f"layout: {fault}")
    print(f"layout: {len(modules)} modules of {sorted(config.target_modules)}, factor {factor:g}: {'WRONG' if faults else 'ok'}")

    with_adapter = logprobs_of(model, ids)
    merged = logprobs_of(load(args.merged), ids)
    dtype = stored_dtype(args.merged)

    good = not faults
    good &= compare(f"merged ({dtype}) against peft", with_adapter, merged, dtype)
    if args.logits:
        good &= compare("ours against peft", with_adapter, logprobs_in(args.logits, ids), torch.float32)
    if args.merged_logits:
        good &= compare("ours against transformers, merged", merged, logprobs_in(args.merged_logits, ids), torch.float32)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
