#!/usr/bin/env python3
"""Puts stage two beside PEFT, transformers and bitsandbytes on the CPU: one run, in turns, the same NF4 student, adapter, packs, soft
labels, loss and threads.

    cargo build --release && cargo build --release -p potstill-pipeline --example random_teacher
    python scripts/bench_student.py --threads 2

Needs torch, transformers, peft, bitsandbytes, numpy, safetensors and pyarrow; Linux. Prints a Markdown table; progress goes to stderr.

Students are made on the spot with random weights (bf16 files): one of the shape of a 0.5B model (`half`: 152k ids) and a small one. A
small random teacher with the same ids fills a cache of 64 entries a position. Potstill runs as a user runs it; both sides start from one
adapter, see the same rows in the same order, and are timed over steps 2 and later, from what they write a step (the first one sets things
up on either side). What bitsandbytes and PEFT may do is in bench_peft.py; of its ways (packed or one conversation at a time, weights held
in 4 bits or dequantised once) each is tried for one step, the fastest one is measured in every round, and the leanest one's memory is
shown beside it. Potstill is measured twice: computing all activations again on the way back, and keeping those of as many layers as fit
into the goal's share of PEFT's memory (`--keep-layers`); both give the same adapter, which is checked too.

Before anything is timed, losses of all steps and the norm of the first gradient must agree, or the comparison is void and the exit
code 1. Ratios are medians over rounds of the ratio within a round, the order of a round turned round in every second one.
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
    from bench_chats import DTYPES, MAX_LENGTH, NAMES, SHAPES
    from bench_process import BUSY_CORES, Failed, measured
except ImportError as missing:
    sys.exit(f"bench_student: {missing.name} is not installed; needs torch, transformers, peft, bitsandbytes and pyarrow")

PEER = Path(__file__).resolve().parent / "bench_peft.py"
STEPS = {"small": 6, "half": 3, "tiny": 4}
BATCH = {"small": 8, "half": 2, "tiny": 4}
# Of the loss, and of the first gradient's norm. A few in a thousand of bitsandbytes' nested codes are their neighbours, 0.7 % of a block's
# scale; in bf16 both sides round every product by up to 2^-8, at other places.
TOLERANCE = {"f32": (2e-4, 2e-3), "bf16": (2e-2, 5e-2)}
WHO = ("potstill", "potstill keeping", "PEFT")
# The goal: this share of PEFT's memory.
SHARE = 0.6
WAYS = [(holding, way) for holding in ("dense", "bnb") for way in ("packed", "alone")]


def say(text):
    print(text, file=sys.stderr, flush=True)


class Comparison:
    """One student: its folder, its cache, its rows."""

    def __init__(self, name, options, folder):
        self.name, self.options, self.shape = name, options, SHAPES[name] | {"dense": True}
        self.steps, self.batch = options.steps or STEPS[name], BATCH[name]
        self.home, self.scratch = (options.keep or folder) / name, folder / name
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.student, self.teacher = self.home / "student", self.home / "small-teacher"
        self.cache, self.adapter = self.scratch / "cache", self.scratch / "start/adapter"
        threads = str(options.threads)
        plain = {k: v for k, v in os.environ.items() if not k.startswith("POTSTILL_")}
        self.ours = plain | {"RAYON_NUM_THREADS": threads}
        self.theirs = plain | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        self.runs = {}

    def train(self, out, *flags):
        shutil.rmtree(out, ignore_errors=True)
        o = self.options
        command = [o.potstill, "train", "--json", "--quiet", "--device", "cpu", "--student", self.student, "--cache", self.cache, "--out",
                   out, "--no-shuffle", "--rank", o.rank, "--alpha", 16, "--warmup-steps", 0, "--max-grad-norm", 0.3,
                   "--batch-size", self.batch, "--pack-tokens", o.pack_tokens, "--head-chunk", o.chunk, "--checkpoint-every", 0, *flags]
        _, figures, _ = measured(command, self.ours)
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return figures | {"steps": [json.loads(line) for line in lines], "way": ("NF4", "packed")}

    def potstill(self, dtype, objective, keep, steps=None):
        flags = ("--lr", self.options.lr, "--steps", steps or self.steps, "--objective", objective, "--compute", dtype, "--keep-layers", keep)
        return self.train(self.scratch / "run", *flags) | {"way": ("NF4", "packed", f"{keep} of {self.shape['layers']} layers kept")}

    def layers_that_fit(self, dtype, allowed):
        """As many as may be kept within `allowed` bytes: memory is linear in them."""
        layers = self.shape["layers"]
        none, every = (self.potstill(dtype, "distill", keep, 2)["peak"] for keep in (0, layers))
        return max(0, min(layers, int((allowed - none) / max(every - none, 1) * layers)))

    def peer(self, dtype, objective, way, steps=None):
        o, path = self.options, self.scratch / "settings.json"
        path.write_text(json.dumps({
            "dtype": dtype, "holding": way[0], "way": way[1], "objective": objective, "threads": o.threads, "steps": steps or self.steps,
            "batch_size": self.batch, "pack_tokens": o.pack_tokens, "chunk": o.chunk, "lr": o.lr, "max_grad_norm": 0.3,
        }))
        said, figures, _ = measured([sys.executable, PEER, self.student, self.adapter, self.scratch / "rows.json", path], self.theirs)
        return figures | json.loads(said) | {"way": way}

    def prepare(self):
        say(f"{self.name}: models, soft labels and the adapter to start from")
        chats.model(self.student, self.options.maker, self.shape)
        teacher = {k: v for k, v in self.shape.items() if k not in ("dense", "tied")}
        teacher |= {"hidden": 256, "layers": 2, "heads": 4, "kv-heads": 2, "intermediate": 512}
        chats.model(self.teacher, self.options.maker, teacher)
        path = self.scratch / "chats.jsonl"
        chats.write_chats(path, 700 * self.steps * self.batch)
        measured([self.options.potstill, "precompute", "--quiet", "--device", "cpu", "--teacher", self.teacher, "--data", path, "--cache",
                  self.cache, "--preset", "standard", "--max-length", MAX_LENGTH], self.ours)
        self.rows = chats.rows(self.cache)[: self.steps * self.batch]
        if len(self.rows) < self.steps * self.batch:
            raise Failed(f"{self.name}: expected {self.steps * self.batch} conversations, made {len(self.rows)}")
        (self.scratch / "rows.json").write_text(json.dumps(self.rows))
        # A step so small that it changes nothing: the adapter as it is drawn.
        self.train(self.scratch / "start", "--steps", 1, "--lr", 1e-30)

    def check(self, dtype, objective, ours, theirs):
        loss, norm = TOLERANCE[dtype]
        worst = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(ours["steps"], theirs["steps"]))
        first = abs(ours["steps"][0]["grad_norm"] / theirs["steps"][0]["grad_norm"] - 1)
        counts = [a["tokens"] == b["tokens"] for a, b in zip(ours["steps"], theirs["steps"])]
        say(f"{self.name} {dtype} {objective}: losses differ by {worst:.1e} at most, the first gradient's norm by {first:.1e}")
        # Written so that NaN does not pass.
        if not (worst <= loss and first <= norm and all(counts)):
            raise Failed(f"{self.name} {dtype} {objective}: the comparison is void: expected losses within {loss:.0e} and norms within "
                         f"{norm:.0e} and the same tokens, found {worst:.1e} and {first:.1e}")

    def measure(self):
        self.best, self.leanest, self.keep = {}, {}, {}
        for dtype in self.options.dtypes:
            tried = {way: self.peer(dtype, "distill", way, 2) for way in WAYS}
            self.best[dtype] = max(tried, key=lambda way: speed(tried[way]))
            self.leanest[dtype] = min(run["peak"] for run in tried.values())
            said = ", ".join(f"{' '.join(way)} {speed(run):.1f} ({run['peak'] / 2**20:,.0f} MiB)" for way, run in tried.items())
            self.keep[dtype] = self.layers_that_fit(dtype, SHARE * tried[self.best[dtype]]["peak"])
            say(f"{self.name} {dtype}: PEFT, tokens/s (peak): {said}; {self.keep[dtype]} layers fit into {SHARE} of its fastest way's memory")
        turns = [(one, d, objective) for d in self.options.dtypes for objective in self.options.objectives for one in WHO]
        for number in range(self.options.rounds):
            for who, dtype, objective in turns[:: -1 if number % 2 else 1]:
                keep = {"potstill": 0, "potstill keeping": self.keep[dtype]}
                run = self.potstill(dtype, objective, keep[who]) if who in keep else self.peer(dtype, objective, self.best[dtype])
                self.runs.setdefault((who, dtype, objective), []).append(run)
                say(f"{self.name} round {number + 1}: {who} {dtype} {objective} {speed(run):.1f} tokens/s, peak "
                    f"{run['peak'] / 2**20:,.0f} MiB (others {run['others']:.2f} cores)")
                if run["others"] > BUSY_CORES:
                    say("warning: others were at work meanwhile; this figure means little")
            for dtype in self.options.dtypes:
                for objective in self.options.objectives:
                    ours, keeping, theirs = (self.runs[one, dtype, objective][number] for one in WHO)
                    self.check(dtype, objective, ours, theirs)
                    if any(a["loss"] != b["loss"] or a["grad_norm"] != b["grad_norm"] for a, b in zip(ours["steps"], keeping["steps"])):
                        raise Failed(f"{self.name} {dtype} {objective}: keeping layers changed a loss or a gradient")

    def ratio(self, figure, above, below):
        return median(figure(a) / figure(b) for a, b in zip(self.runs[above], self.runs[below]))

    def summary(self):
        lines = []
        for dtype in self.options.dtypes:
            for objective in self.options.objectives:
                for who in ("PEFT", "potstill", "potstill keeping"):
                    runs, other = self.runs[who, dtype, objective], ("PEFT", dtype, objective)
                    lines.append({
                        "who": who, "dtype": dtype, "objective": objective, "way": " ".join(runs[0]["way"]),
                        "tokens_per_s": median(map(speed, runs)), "speed_ratio": self.ratio(speed, (who, dtype, objective), other),
                        "peak": median(run["peak"] for run in runs), "leanest": self.leanest[dtype],
                        "anon": median(run["anon"] for run in runs), "file": median(run["file"] for run in runs),
                        "step_ratio": 1 / self.ratio(speed, (who, dtype, objective), (who, dtype, self.options.objectives[-1])),
                    })
        return lines

    def everything(self):
        return {
            "model": self.name, "objectives": self.options.objectives, "shape": self.shape, "steps": self.steps, "tokens": sum(len(row["input_ids"]) for row in self.rows),
            "scored": sum(len(row["positions"]) for row in self.rows), "summary": self.summary(),
            "runs": {" ".join(key): runs for key, runs in self.runs.items()},
        }


def speed(run):
    """Tokens a second over the second step and later ones."""
    steps = run["steps"]
    return sum(step["tokens"] for step in steps[1:]) / (steps[-1]["seconds"] - steps[0]["seconds"])


def table(models):
    for one in models:
        yield f"\n{NAMES[one['model']]}: {one['steps']} steps, {one['tokens']:,} tokens, {one['scored']:,} scored.\n"
        yield f"| | tokens/s | x PEFT | a step / of {one['objectives'][-1]} | peak MiB | x PEFT's leanest | own + files |\n| --- |" + " ---: |" * 6
        for line in one["summary"]:
            mebi = {name: f"{line[name] / 2**20:,.0f}" for name in ("peak", "anon", "file")}
            cells = [f"{line['who']} {line['dtype']} {line['objective']}, {line['way']}", f"{line['tokens_per_s']:,.1f}",
                     f"{line['speed_ratio']:.2f}", f"{line['step_ratio']:.2f}", mebi["peak"], f"{line['peak'] / line['leanest']:.2f}",
                     f"{mebi['anon']} + {mebi['file']}"]
            yield "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SHAPES, help="one model (default: small and half; tiny is for trying this script out)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="what products are computed in (default: both)")
    parser.add_argument("--objectives", nargs="+", choices=("distill", "sft"), default=["distill", "sft"], help="losses (default: both)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each (default: all cores)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, for medians (default 3)")
    parser.add_argument("--steps", type=int, help="optimiser steps of a run, two or more (default: 6 for small, 3 for half)")
    parser.add_argument("--rank", type=int, default=64, help="LoRA rank (default 64)")
    parser.add_argument("--lr", type=float, default=2e-4, help="learning rate (default 2e-4)")
    parser.add_argument("--pack-tokens", type=int, default=2048, help="tokens of a pack (default 2048)")
    parser.add_argument("--chunk", type=int, default=256, help="positions whose logits exist at once, on both sides (default 256)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make models here and leave them; used again where they are there")
    parser.add_argument("--potstill", type=Path, default=chats.POTSTILL, help="the program (default: target/release/potstill)")
    parser.add_argument("--maker", type=Path, default=chats.MAKER, help="the built example (default: target/release/examples/...)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything to this file")
    options = parser.parse_args()
    for program in (options.potstill, options.maker):
        if not program.is_file():
            sys.exit(f"bench_student: {program}: not there; build it with\n  {chats.HOW_TO_BUILD}")
    if min(options.threads, options.rounds, options.pack_tokens // MAX_LENGTH, (options.steps or 2) - 1) < 1:
        sys.exit(f"bench_student: expected at least one thread and round, two steps, and --pack-tokens of at least {MAX_LENGTH}")
    done = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in [options.only] if options.only else ["small", "half"]:
                comparison = Comparison(name, options, Path(folder))
                comparison.prepare()
                comparison.measure()
                done.append(comparison.everything())
    except (OSError, ValueError, KeyError, Failed) as e:
        sys.exit(f"bench_student: {e}")
    others = max(run["others"] for one in done for runs in one["runs"].values() for run in runs)
    print(f"{options.threads} threads, rank {options.rank}, medians of {options.rounds} rounds; others used up to {others:.2f} cores.")
    print("\n".join(table(done)))
    imported = next(run["imported"] for runs in done[0]["runs"].values() for run in runs if "imported" in run) / 2**20
    print(f"\nOf PEFT's memory, Python and its libraries take {imported:,.0f} MiB before a model is loaded.")
    if options.json:
        options.json.write_text(json.dumps({"settings": vars(options) | {k: str(v) for k, v in vars(options).items() if isinstance(v, Path)}, "models": done}, indent=2) + "\n")


if __name__ == "__main__":
    main()
