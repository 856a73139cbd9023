#!/usr/bin/env python3
"""Peak memory of stage one for a shallow and a deep teacher of the same width: with streamed weights it must not grow with depth.

    cargo build --release && cargo build --release -p potstill-pipeline --example random_teacher
    python scripts/bench_memory.py

Needs numpy, pyarrow and tokenizers; Linux. Both teachers are AWQ int4 with random weights, made on the spot. Prints a Markdown table;
progress goes to stderr. Exit code 1 where the streamed peaks differ by LIMIT or more, 2 where something failed. A peak is the process's
VmHWM, the median of the rounds; `own` (RssAnon) and `files` (RssFile: the program itself and mapped weights) are those at the highest
sample. `resident` stands beside it for comparison. A few hundred tokens are enough: what depends on their number is the same at any depth.
"""
import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median

try:
    import bench_chats as chats
    from bench_process import Failed, measured
except ImportError as missing:
    print(f"bench_memory: {missing.name} is not installed; needs numpy, pyarrow and tokenizers", file=sys.stderr)
    sys.exit(2)

LIMIT = 0.05
RESIDENCIES = ("streamed", "resident")


def shape(options, layers):
    return {"hidden": options.hidden, "layers": layers, "heads": 16, "kv-heads": 4, "intermediate": 4 * options.hidden,
            "vocab": 32768, "ids": 32000}


def peak(options, home, scratch, layers, residency):
    """The figures of one run, and the size of the weights."""
    teacher, cache = home / f"{options.hidden}x{layers}", scratch / "cache"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("POTSTILL_")}
    command = [options.potstill, "precompute", "--json", "--quiet", "--device", "cpu", "--teacher", teacher, "--data",
               scratch / "chats.jsonl", "--cache", cache, "--residency", residency, "--compute", options.compute]
    said, figures, _ = measured(command, environment | {"RAYON_NUM_THREADS": str(options.threads)})
    shutil.rmtree(cache)
    report = json.loads(said)
    if report["skipped"] or not report["scored"]:
        raise Failed(f"expected every conversation to be scored, found {report}")
    speed = report["scored_tokens"] / report["seconds"]
    print(f"{layers} layers {residency}: peak {figures['peak'] / 2**20:.1f} MiB, own {figures['anon'] / 2**20:.1f}, files "
          f"{figures['file'] / 2**20:.1f}, {speed:.0f} tokens/s", file=sys.stderr, flush=True)
    weights = sum(file.stat().st_size for file in teacher.glob("*.safetensors"))
    return figures | {"tokens": report["scored_tokens"], "tokens_per_s": speed, "weights": weights}


def table(runs, depths):
    mebi = lambda found, name: f"{median(run[name] for run in found) / 2**20:,.1f}"
    yield "| weights | layers | on disk, MiB | peak MiB | own | files | more than with the fewest |\n| --- |" + " ---: |" * 6
    for residency in RESIDENCIES:
        for layers in depths:
            found = runs[residency, layers]
            cells = [residency, str(layers), *(mebi(found, name) for name in ("weights", "peak", "anon", "file"))]
            more = "" if layers == depths[0] else f"{growth(runs, residency, depths[0], layers):+.1%}"
            yield "| " + " | ".join([*cells, more]) + " |"


def growth(runs, residency, few, many):
    few, many = (median(run["peak"] for run in runs[residency, layers]) for layers in (few, many))
    return many / few - 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=[8, 64], metavar=("FEW", "MANY"), help="the two depths (default 8 64)")
    parser.add_argument("--hidden", type=int, default=1024, help="width, a multiple of 128 (default 1024)")
    parser.add_argument("--tokens", type=int, default=400, help="tokens scored, about (default 400)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, for medians (default 3)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads (default: all cores)")
    parser.add_argument("--compute", choices=("f32", "bf16"), default="f32", help="type of the products' factors (default f32)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make models here and leave them; used again where they are there")
    parser.add_argument("--potstill", type=Path, default=chats.POTSTILL, help="the program (default: target/release/potstill)")
    parser.add_argument("--maker", type=Path, default=chats.MAKER, help="the built example (default: target/release/examples/...)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything to this file")
    options = parser.parse_args()
    runs = {}
    try:
        for program in (options.potstill, options.maker):
            if not program.is_file():
                raise Failed(f"{program}: not there; build it with\n  {chats.HOW_TO_BUILD}")
        if min(*options.layers, options.tokens, options.rounds, options.threads) < 1 or options.hidden % 128 or options.hidden < 128:
            raise Failed("expected positive numbers, and a width that is a multiple of 128")
        with tempfile.TemporaryDirectory() as folder:
            scratch, home = Path(folder), options.keep or Path(folder)
            chats.write_chats(scratch / "chats.jsonl", options.tokens)
            for layers in options.layers:
                chats.model(home / f"{options.hidden}x{layers}", options.maker, shape(options, layers))
            for _ in range(options.rounds):
                for residency in RESIDENCIES:
                    for layers in options.layers:
                        runs.setdefault((residency, layers), []).append(peak(options, home, scratch, layers, residency))
    except (OSError, ValueError, KeyError, Failed) as e:
        print(f"bench_memory: {e}", file=sys.stderr)
        sys.exit(2)
    more = growth(runs, "streamed", *options.layers)
    tokens = runs["streamed", options.layers[0]][0]["tokens"]
    print(f"Hidden {options.hidden}, intermediate {4 * options.hidden}, 32k ids, AWQ int4; {tokens} tokens, "
          f"{options.compute}, {options.threads} threads, medians of {options.rounds} rounds.\n")
    print("\n".join(table(runs, options.layers)))
    if options.json:
        listed = {f"{residency} {layers}": found for (residency, layers), found in runs.items()}
        settings = {"hidden": options.hidden, "threads": options.threads, "compute": options.compute, "limit": LIMIT}
        options.json.write_text(json.dumps({"settings": settings, "growth": more, "runs": listed}, indent=2) + "\n")
    # Written so that NaN does not pass; a peak that fell with depth would be as unexplained as one that rose.
    if not abs(more) < LIMIT:
        print(f"bench_memory: expected streamed peaks that differ by less than {LIMIT:.0%}, found {more:+.1%}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
