#!/usr/bin/env python3
"""Check that PEFT and transformers read what potstill wrote, and compute the same.

    check_peft.py --student DIR --adapter DIR --merged DIR --ids IDS.json [--logits FILE] [--merged-logits FILE]

IDS.json holds lists of token ids. On each list, in float32 on the CPU with eager attention, log-probabilities of
  peft    the base model with the adapter, through PEFT,
  merged  the merged folder, through transformers,
  ours    a safetensors file written by the example `logits` (tensors ids_N i64 [T], logits_N f32 [T, V]): --logits for base and
          adapter, --merged-logits for the merged folder
are compared; the largest differences are printed. Exits with 1 when one is above its tolerance:
  float32 against float32: 1e-4 nats, seven times what correct implementations differ by on models of this size
  merged weights in bfloat16 or float16 against float32 ones: 0.02 and 0.005 nats on average over the probability; rounding a
  weight moves it by up to 2^-9 or 2^-12 of itself, which moved the average by 0.002 (bfloat16) on the reference student, while
  leaving the adapter out moved it by 0.28
Needs torch, transformers, peft, safetensors.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

FLOAT32_TOLERANCE = 1e-4
ROUNDED_TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.005}


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("student", "adapter", "merged", "ids"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--logits", help="our logits of base and adapter")
    parser.add_argument("--merged-logits", help="our logits of the merged folder")
    args = parser.parse_args()

    ids = json.loads(Path(args.ids).read_text())
    if not ids or not all(isinstance(row, list) and row for row in ids):
        sys.exit(f"{args.ids}: expected a list of lists of token ids")
    model = PeftModel.from_pretrained(load(args.student), args.adapter).eval()
    # PEFT only warns about missing tensors: a B that stayed at zero would compare equal to a base without adapter.
    silent = [n for n, p in model.named_parameters() if "lora_B" in n and not p.any()]
    if silent:
        sys.exit(f"{args.adapter}: {len(silent)} lora_B tensors are all zero, for example {silent[0]}")
    with_adapter = logprobs_of(model, ids)
    merged = logprobs_of(load(args.merged), ids)
    dtype = stored_dtype(args.merged)

    good = compare(f"merged ({dtype}) against peft", with_adapter, merged, dtype)
    if args.logits:
        good &= compare("ours against peft", with_adapter, logprobs_in(args.logits, ids), torch.float32)
    if args.merged_logits:
        good &= compare("ours against transformers, merged", merged, logprobs_in(args.merged_logits, ids), torch.float32)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
