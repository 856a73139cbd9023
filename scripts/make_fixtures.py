#!/usr/bin/env python3
"""Cut the reference data down to what the tests read (under 8 MB).

    make_fixtures.py REFERENCE_FOLDER tests/fixtures/golden

The manifest stays behind, and six large files, which keep their tensor names, lose rows, columns or tensors: teacher_topk (about
500 positions, whole chats), student_logits (16 of 32 ids, no full rows), loss_batch (student logits at the scored positions
only, as [N, V]), teacher_debug (no logits), nf4 (layer 0, and the others' absmax_dequant) and nf4_cases (no large_blocks).
"""
import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def keep_tensors(source, target, keep):
    """Copies the tensors whose names `keep` accepts, bytes untouched (numpy knows no bfloat16)."""
    data = source.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = {k: v for k, v in json.loads(data[8 : 8 + size]).items() if k != "__metadata__" and keep(k)}
    body, at = [], 0
    for entry in header.values():
        begin, end = entry["data_offsets"]
        body.append(data[8 + size + begin : 8 + size + end])
        entry["data_offsets"] = [at, at + end - begin]
        at += end - begin
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    target.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(body))


def topk(path):
    t = load_file(path)
    offsets = t["offsets"]
    chats = int(np.searchsorted(offsets, 500))
    rows = int(offsets[chats])
    return {k: (v[: chats + 1] if k == "offsets" else v[:rows]) for k, v in t.items()}


def student_logits(path):
    t = load_file(path)
    out = {}
    for k, v in t.items():
        if k.endswith(".full"):
            continue
        out[k] = np.ascontiguousarray(v[:, :16]) if k.endswith((".ids", ".logprobs")) else v
    return out


def loss_batch(path):
    t = load_file(path)
    mask = t["loss_mask"].astype(bool)
    t["student_logits"] = np.ascontiguousarray(t["student_logits"][mask])
    return t


def main(source, target):
    source, target = Path(source), Path(target)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("MANIFEST.json"))
    for name, cut in [("teacher_topk", topk), ("student_logits", student_logits), ("loss_batch", loss_batch)]:
        path = target / "expected" / f"{name}.safetensors"
        path.chmod(0o644)
        save_file(cut(source / "expected" / f"{name}.safetensors"), path)
    for name, keep in [
        ("teacher_debug", lambda t: t != "logits"),
        ("nf4", lambda t: t.startswith("model.layers.0.") or t.endswith(".absmax_dequant")),
        ("nf4_cases", lambda t: not t.startswith("large_blocks.")),
    ]:
        path = target / "expected" / f"{name}.safetensors"
        path.chmod(0o644)
        keep_tensors(source / "expected" / f"{name}.safetensors", path, keep)
    total = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    print(f"{total / 1e6:.2f} MB in {target}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
