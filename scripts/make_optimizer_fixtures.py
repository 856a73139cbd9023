#!/usr/bin/env python3
"""Makes tests/fixtures/optimizer/adamw_8bit.safetensors with bitsandbytes: its two 8-bit maps, and ten steps of its block-wise AdamW.

    python scripts/make_optimizer_fixtures.py            needs torch, bitsandbytes and safetensors; the CPU is enough

Values and gradients are formulas of whole numbers (`start`, `gradient`), exact in f32, so that the test can make them again. Stretches of
16 elements get gradients of sizes up to 32 times apart, so that codes far below their block's largest are used.

States are quantised to the nearest entry of the map, which is the library's definition for devices without a kernel of their own. Its
kernel for the CPU overwrites the maps' first entry by -1, and so does something else there.
"""
import pathlib

import bitsandbytes as bnb
import bitsandbytes.backends.cpu.ops as cpu
import bitsandbytes.functional as F
import torch
from safetensors.torch import save_file

ELEMENTS = 4196  # sixteen whole blocks of 256 and one of 100
STEPS = 10
RATE, DECAY = 0.01, 0.01


def start():
    i = torch.arange(ELEMENTS, dtype=torch.int64)
    return ((i * 31) % 257 - 128).float() / 256


def gradient(step):
    i = torch.arange(ELEMENTS, dtype=torch.int64)
    return ((i * 7919 + step * 104729) % 2003 - 1001).float() / 1024 / (2.0 ** ((i // 16) % 6).float())


def quantize(values, code, absmax_out, codes_out, blocksize):
    for at in range(0, len(values), blocksize):
        block = values[at : at + blocksize]
        largest = block.abs().max()
        absmax_out[at // blocksize] = largest
        scaled = block * (1.0 / largest.clamp(min=1e-38))
        codes_out[at : at + blocksize] = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).to(torch.uint8)


cpu._quant_blockwise_fp32_direct = quantize
parameter = torch.nn.Parameter(start())
adamw = bnb.optim.AdamW8bit([parameter], lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)
for step in range(1, STEPS + 1):
    parameter.grad = gradient(step)
    adamw.step()
state = adamw.state[parameter]
out = pathlib.Path(__file__).resolve().parent.parent / "tests/fixtures/optimizer/adamw_8bit.safetensors"
out.parent.mkdir(parents=True, exist_ok=True)
save_file(
    {
        "map.signed": F.create_dynamic_map(signed=True),
        "map.unsigned": F.create_dynamic_map(signed=False),
        "p": parameter.detach().contiguous(),
        "m": state["state1"],
        "v": state["state2"],
        "m.absmax": state["absmax1"],
        "v.absmax": state["absmax2"],
    },
    out,
    metadata={"bitsandbytes": bnb.__version__, "torch": torch.__version__},
)
print(out, out.stat().st_size, "bytes; zero codes of v:", int((state["state2"] == 0).sum()))
