#!/usr/bin/env python3
"""Peak memory of stage two and of a merge, beside what `train --dry-run` says: students of the sizes that fit this machine.

    cargo build --release && cargo build --release -p potstill-pipeline --example random_teacher
    python scripts/bench_memory_train.py

Needs numpy, pyarrow and tokenizers; Linux. Students are dense with random weights, made on the spot; a tiny teacher with the same
tokenizer makes the cache. Prints a Markdown table; progress goes to stderr. Exit code 1 where a run's own memory is more than LIMIT
above the estimate or a merge's peak is above half its model, 2 where something failed.
  estimate  the peak on the device by the dry run; on a CPU this is the process's own memory
  own       RssAnon at the highest sample: what the program itself holds. It has the loader, the batches read ahead and the
            allocator's slack on top of the list, BASE in all
  peak      VmHWM: own, and the pages of files that are mapped; the system takes those back when memory is short
  merge     VmHWM of merging the trained adapter, and the size of the base's files
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import bench_chats as chats
    from bench_process import Failed, measured
except ImportError as missing:
    print(f"bench_memory_train: {missing.name} is not installed; needs numpy, pyarrow and tokenizers", file=sys.stderr)
    sys.exit(2)

LIMIT = 0.15  # of the estimate, above which own memory is not explained by the list and BASE
BASE = 64 << 20
SHAPES = {
    "tiny": {"hidden": 256, "layers": 6, "heads": 8, "kv-heads": 2, "intermediate": 1024, "vocab": 8192, "ids": 8000},
    "small": {"hidden": 1024, "layers": 14, "heads": 16, "kv-heads": 16, "intermediate": 2816, "vocab": 32768, "ids": 32000},
    "0.5B": {"hidden": 896, "layers": 24, "heads": 14, "kv-heads": 2, "intermediate": 4864, "vocab": 151936, "tied": True},
}


def run(options, home, scratch, name):
    """Estimate and measured figures of a student."""
    student, teacher = home / name, home / f"teacher-{name}"
    chats.model(student, options.maker, SHAPES[name] | {"dense": True})
    narrow = {"hidden": 128, "layers": 1, "heads": 4, "kv-heads": 2, "intermediate": 128}
    chats.model(teacher, options.maker, SHAPES[name] | narrow)
    cache, out, merged = scratch / "cache", scratch / "run", scratch / "merged"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("POTSTILL_")}
    environment["RAYON_NUM_THREADS"] = str(options.threads)
    quiet = [options.potstill, "--json", "--quiet"]
    measured([*quiet, "precompute", "--teacher", teacher, "--data", scratch / "chats.jsonl", "--cache", cache, "--top-k", "32",
              "--device", "cpu"], environment)
    train = [*quiet, "train", "--student", student, "--cache", cache, "--out", out, "--rank", str(options.rank), "--steps",
             str(options.steps), "--batch-size", str(options.batch_size), "--pack-tokens", str(options.pack_tokens), "--device", "cpu"]
    outlook = json.loads(subprocess.check_output([*train, "--dry-run"], env=environment))
    _, figures, _ = measured(train, environment)
    _, merge, _ = measured([*quiet, "merge", "--student", student, "--adapter", out / "adapter", "--out", merged], environment)
    weights = sum(file.stat().st_size for file in student.glob("*.safetensors"))
    for folder in (cache, out, merged):
        shutil.rmtree(folder)
    found = {"estimate": outlook["memory"]["device"], "parts": outlook["memory"]["parts"], "own": figures["anon"],
             "files": figures["file"], "peak": figures["peak"], "merge": merge["peak"], "weights": weights,
             "pack_tokens": outlook["pack_tokens"]}
    shown = ", ".join(f"{key} {found[key] / 2**20:,.1f}" for key in ("estimate", "own", "files", "peak", "merge", "weights"))
    print(f"{name}: MiB: {shown}", file=sys.stderr, flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="students to measure (default: all)")
    parser.add_argument("--rank", type=int, default=64, help="rank of the adapter (default 64)")
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps (default 2: the second has everything)")
    parser.add_argument("--batch-size", type=int, default=8, help="conversations in a step (default 8)")
    parser.add_argument("--pack-tokens", type=int, default=1024, help="tokens at once (default 1024)")
    parser.add_argument("--tokens", type=int, default=20000, help="tokens of the chats, about (default 20000)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads (default: all cores)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make models here and leave them; used again where they are there")
    parser.add_argument("--potstill", type=Path, default=chats.POTSTILL, help="the program (default: target/release/potstill)")
    parser.add_argument("--maker", type=Path, default=chats.MAKER, help="the built example (default: target/release/examples/...)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything to this file")
    options = parser.parse_args()
    found = {}
    try:
        for program in (options.potstill, options.maker):
            if not program.is_file():
                raise Failed(f"{program}: not there; build it with\n  {chats.HOW_TO_BUILD}")
        with tempfile.TemporaryDirectory() as folder:
            scratch, home = Path(folder), options.keep or Path(folder)
            chats.write_chats(scratch / "chats.jsonl", options.tokens)
            for name in options.shapes:
                found[name] = run(options, home, scratch, name)
    except (OSError, ValueError, KeyError, subprocess.CalledProcessError, Failed) as e:
        print(f"bench_memory_train: {e}", file=sys.stderr)
        sys.exit(2)
    print(f"r = {options.rank}, packs of at most {options.pack_tokens} tokens, {options.threads} threads; MiB.\n")
    print("| student | estimate | own | peak | base's files | merge's peak |\n| --- |" + " ---: |" * 5)
    for name, figures in found.items():
        cells = (f"{figures[key] / 2**20:,.1f}" for key in ("estimate", "own", "peak", "weights", "merge"))
        print("| " + " | ".join([name, *cells]) + " |")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    wrong = [f"{name}: own memory is {f['own'] / 2**20:,.0f} MiB, estimated {f['estimate'] / 2**20:,.0f}" for name, f in found.items()
             if f["own"] > (1 + LIMIT) * f["estimate"] + BASE]
    wrong += [f"{name}: the merge took {f['merge'] / 2**20:,.0f} MiB of a model of {f['weights'] / 2**20:,.0f}" for name, f in
              found.items() if f["merge"] > f["weights"] / 2 + BASE]
    for sentence in wrong:
        print(f"bench_memory_train: {sentence}", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
