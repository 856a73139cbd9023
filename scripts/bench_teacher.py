#!/usr/bin/env python3
"""Puts stage one beside Hugging Face transformers on the CPU: one run, in turns, the same model, tokens, scored positions and threads.

    cargo build --release && cargo build --release -p potstill-pipeline --example random_teacher
    python scripts/bench_teacher.py --threads 2

Needs torch, transformers, numpy, safetensors and pyarrow; Linux. Prints a Markdown table; progress goes to stderr.

Models are made on the spot, AWQ int4 with random weights: one of the shape of a 0.5B model (`half`: 152k ids) and a small one. Chats are
the golden ones' texts, put together to conversations of realistic lengths. Potstill runs as a user runs it, preset `standard`, and
reports the seconds it spent scoring: they include writing the cache; loading and encoding are left out on both sides. transformers
gets the dequantised weights (f32, or cast to bf16) and only what scoring needs, nothing is written; of the ways that
bench_transformers.py knows, the fastest one is measured, chosen anew for each model and type. Both score only positions that are trained
on, take log-probabilities over the tokenizer's ids, and keep the 64 largest and the tail.

Before anything is timed, both must give the same distributions on the first conversations within `tolerance`, or the comparison is void and
the exit code 1. Ratios are medians over rounds of the ratio within a round, the order of a round turned round in every second one.
CPU seconds are those of scoring (for potstill from samples of its last seconds). GFLOP/s count multiplications and additions of the
linear layers, causal attention and the head at scored positions; 100 % of the limit is torch's own product of a layer's largest matrix
by 1,024 rows, at that type, with as many threads.
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
    sys.exit(f"bench_teacher: {missing.name} is not installed; needs torch, transformers, numpy, safetensors and pyarrow")

PEER = Path(__file__).resolve().parent / "bench_transformers.py"
TOKENS = {"small": 16384, "half": 8192, "tiny": 2048}
CHECKED = 4  # conversations
F32_TOLERANCE = {"mean": 1e-5, "max": 1e-4}
ROUNDINGS = 12  # in a layer: two norms, q, k and v, scores, attention, o, gate, up, their product, down and both sums, about


def say(text):
    print(text, file=sys.stderr, flush=True)


def tolerance(shape, dtype):
    """Nats by which log-probabilities may differ: on average, and the largest of some 1e5 of them.

    Logits deviate by s = 0.02 sqrt(hidden), 0.3 to 0.6, from how the models are drawn; wrong ones would lie as far apart. In f32 both sum
    thousands of terms in another order: 1e-6 of s for a layer is ample, and 24 layers of it at random. In bf16 each rounding moves a value
    by 2^-9 / sqrt(3) of itself; they add up at random, the worst of 1e5 lies five deviations out, and transformers rounds the logits
    themselves by up to 2^-7 (those from 2 to 4; most are from 1 to 2: 2^-9 on average). Twice that, because both sides round, each at
    other places; for the largest three times, because positions differ in how much they round. Wrong weights, or a wrong rope_theta, were
    off by 0.4 and more on average, and by 2 at the worst."""
    if dtype == "f32":
        return F32_TOLERANCE
    deviation = 0.02 * shape["hidden"] ** 0.5 * (ROUNDINGS * shape["layers"]) ** 0.5 * 2**-9 / 3**0.5
    return {"mean": 2 * (deviation + 2**-9), "max": 3 * (5 * deviation + 2**-7)}


class Comparison:
    """One model: its folder, its chats, its rows."""

    def __init__(self, name, options, folder):
        self.name, self.options, self.shape = name, options, SHAPES[name]
        self.tokens = options.tokens or TOKENS[name]
        self.width = self.shape.get("ids", self.shape["vocab"])
        self.home, self.scratch = (options.keep or folder) / name, folder / name
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.teacher, self.dense, self.chats = self.home / "teacher", self.home / "dense", self.scratch / "chats.jsonl"
        threads = str(options.threads)
        plain = {k: v for k, v in os.environ.items() if not k.startswith("POTSTILL_")}
        self.ours = plain | {"RAYON_NUM_THREADS": threads}
        self.theirs = plain | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}

    def peer(self, task, *arguments):
        said, figures, _ = measured([sys.executable, PEER, task, *arguments], self.theirs)
        return figures | json.loads(said)  # its own seconds and CPU seconds are those of scoring alone

    def potstill(self, dtype, keep=None, flags=()):
        """One run; its cache is removed unless `keep` names a place for it."""
        cache = keep or self.scratch / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        command = [self.options.potstill, "precompute", "--json", "--quiet", "--device", "cpu", "--teacher", self.teacher, "--data",
                   self.chats, "--cache", cache, "--compute", dtype, "--preset", "standard", "--max-length", MAX_LENGTH,
                   "--pack-tokens", self.options.pack_tokens, *flags]
        said, figures, cpu_of_last = measured(command, self.ours)
        if not keep:
            shutil.rmtree(cache)
        report = json.loads(said)
        if report["skipped"] or report["truncated_tokens"]:
            raise Failed(f"the chats were not made well: {report['skipped']} skipped, {report['truncated_tokens']} tokens cut away")
        speed = {"tokens": report["scored_tokens"], "seconds": report["seconds"], "cpu": cpu_of_last(report["seconds"]),
                 "tokens_per_s": report["scored_tokens"] / report["seconds"], "way": f"packed:{self.options.pack_tokens}"}
        return figures | speed

    def prepare(self):
        say(f"{self.name}: model and its dense copies")
        fresh = not (self.teacher / "shape.json").is_file()
        chats.model(self.teacher, self.options.maker, self.shape)
        if fresh or not all((self.dense / dtype / "model.safetensors").is_file() for dtype in DTYPES):
            self.peer("unpack", self.teacher, self.dense)
        chats.write_chats(self.chats, self.tokens)

    def check(self):
        """Both give the same; the rows for all that follows. The runs are also the warm-up: files are in memory afterwards."""
        self.agreement = {}
        for dtype in DTYPES:
            cache = self.scratch / f"exact-{dtype}"
            # All 23 bits of mantissa: what the preset rounds is no part of the comparison.
            self.potstill(dtype, keep=cache, flags=("--mantissa-bits", 23))
            rows = chats.rows(cache)
            shutil.rmtree(cache)
            for path, part, columns in (("rows", rows, ("input_ids", "positions")), (f"checked-{dtype}", rows[:CHECKED], rows[0])):
                short = [{column: row[column] for column in columns} for row in part]
                (self.scratch / f"{path}.json").write_text(json.dumps(short))
            found = self.peer("check", self.dense, self.scratch / f"checked-{dtype}.json", dtype, self.width)
            self.agreement[dtype] = found | {"allowed": tolerance(self.shape, dtype)}
            worst = max(found["logprob_max"], found["tail_max"], found["gap"])
            say(f"{self.name} {dtype}: {found['positions']} positions, log-probabilities differ by {found['logprob_mean']:.1e} on "
                f"average and at most by {found['logprob_max']:.1e}, the first id is the same at {found['same_first']}")
            allowed = tolerance(self.shape, dtype)
            # Written so that NaN does not pass.
            if not (worst <= allowed["max"] and found["logprob_mean"] <= allowed["mean"] and found["positions"] > 0):
                expected = f"{allowed['mean']:.1e} (mean), {allowed['max']:.1e} (largest)"
                seen = f"{found['logprob_mean']:.1e}, {worst:.1e}"
                raise Failed(f"{self.name} {dtype}: the comparison is void: expected differences of at most {expected}, found {seen}")
        self.rows = rows

    def flops(self):
        """GFLOP of a token, on average over the rows."""
        s = self.shape
        hidden, d = s["hidden"], s["hidden"] // s["heads"]
        layer = 2 * hidden * hidden + 2 * hidden * s["kv-heads"] * d + 3 * hidden * s["intermediate"]
        lengths = [len(row["input_ids"]) for row in self.rows]
        pairs = sum(n * (n + 1) // 2 for n in lengths) / sum(lengths)
        scored = sum(len(row["positions"]) for row in self.rows) / sum(lengths)
        return 2 * (s["layers"] * (layer + 2 * hidden * pairs) + self.width * hidden * scored) / 1e9

    def measure(self):
        self.search, self.runs = {}, {}
        rows, threads = self.scratch / "rows.json", self.options.threads
        for dtype in DTYPES:
            found = self.peer("search", self.dense, rows, dtype, self.width, threads, self.options.pack_tokens)
            self.search[dtype] = found
            ways = ", ".join(f"{way['way']} {way['tokens_per_s']:.0f}" for way in found["ways"])
            say(f"{self.name} {dtype}: transformers, tokens/s: {ways}; torch's product alone {found['product_gflops']:.0f} GFLOP/s")
        best = {dtype: max(self.search[dtype]["ways"], key=lambda way: way["tokens_per_s"])["way"] for dtype in DTYPES}
        theirs = lambda dtype, way: self.peer("measure", self.dense, rows, dtype, self.width, threads, way)
        turns = [(who, dtype) for dtype in DTYPES for who in ("potstill", "transformers")]
        expected = sum(len(row["input_ids"]) for row in self.rows)
        for number in range(self.options.rounds):
            for who, dtype in turns[:: -1 if number % 2 else 1]:
                found = self.potstill(dtype) if who == "potstill" else theirs(dtype, best[dtype])
                self.keep(who, dtype, found, number, expected)
        for dtype in DTYPES:
            self.keep("naive", dtype, theirs(dtype, "naive:0"), 0, expected)

    def keep(self, who, dtype, found, number, expected):
        if found["tokens"] != expected:
            raise Failed(f"{who} {dtype}: expected {expected} tokens, found {found['tokens']}")
        self.runs.setdefault((who, dtype), []).append(found)
        say(f"{self.name} round {number + 1}: {who} {dtype} {found['tokens_per_s']:.0f} tokens/s, peak {found['peak'] / 2**20:.0f} MiB "
            f"(load before {found['before']['load']:.1f}, others {found['others']:.2f} cores)")
        if found["others"] > BUSY_CORES:
            say("warning: others were at work meanwhile; this figure means little")

    def of(self, who, dtype, figure):
        return median(run[figure] for run in self.runs[who, dtype])

    def ratio(self, who, dtype, base):
        """Median over rounds of tokens/s against transformers at the type `base`."""
        pairs = zip(self.runs[who, dtype], self.runs["transformers", base])
        return median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs)

    def summary(self):
        lines, flops = [], self.flops()
        for who, dtype in sorted(self.runs, key=lambda run: (DTYPES.index(run[1]), ("naive", "transformers", "potstill").index(run[0]))):
            speed, limit = self.of(who, dtype, "tokens_per_s"), self.search[dtype]["product_gflops"]
            name, _, budget = self.runs[who, dtype][0]["way"].partition(":")
            label = {"naive": f"transformers {dtype}, all logits, one at a time"}.get(who, f"{who} {dtype}")
            if who == "transformers":
                label += ", one at a time" if name == "alone" else f", {name} to {budget} tokens"
            lines.append({
                "model": self.name, "label": label, "who": who, "dtype": dtype, "tokens_per_s": speed,
                "of_f32": self.ratio(who, dtype, "f32"), "of_same": self.ratio(who, dtype, dtype), "gflops": speed * flops,
                "of_limit": speed * flops / limit, **{name: self.of(who, dtype, name) for name in ("cpu", "peak", "anon", "file")},
            })
        return lines

    def everything(self):
        lengths = [len(row["input_ids"]) for row in self.rows]
        return {
            "model": self.name, "shape": self.shape, "conversations": len(lengths), "tokens": sum(lengths), "longest": max(lengths),
            "scored": sum(len(row["positions"]) for row in self.rows), "gflop_per_token": self.flops(), "agreement": self.agreement,
            "search": self.search, "runs": {f"{who} {dtype}": runs for (who, dtype), runs in self.runs.items()},
            "summary": self.summary(),
        }


def table(models):
    heads = ["", "tokens/s", "x transformers f32", "x same type", "GFLOP/s", "of limit", "CPU s", "peak MiB", "own + files"]
    for one in models:
        yield (f"\n{NAMES[one['model']]}: {one['conversations']} conversations, {one['tokens']:,} tokens, {one['scored']:,} scored; "
               f"{one['gflop_per_token']:.2g} GFLOP a token.\n")
        yield "| " + " | ".join(heads) + " |\n| --- |" + " ---: |" * (len(heads) - 1)
        for line in one["summary"]:
            mebi = {name: f"{line[name] / 2**20:,.0f}" for name in ("peak", "anon", "file")}
            cells = [line["label"], f"{line['tokens_per_s']:,.0f}", f"{line['of_f32']:.2f}", f"{line['of_same']:.2f}",
                     f"{line['gflops']:,.0f}", f"{line['of_limit']:.0%}", f"{line['cpu']:,.1f}", mebi["peak"],
                     f"{mebi['anon']} + {mebi['file']}"]
            yield "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SHAPES, help="one model (default: small and half; tiny is for trying this script out)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each (default: all cores)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, for medians (default 3)")
    parser.add_argument("--tokens", type=int, help="tokens, about (default: 16384 for small, 8192 for half)")
    parser.add_argument("--pack-tokens", type=int, default=4096, help="tokens of a pack, and of the largest batch tried (default 4096)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make models here and leave them; used again where they are there")
    parser.add_argument("--potstill", type=Path, default=chats.POTSTILL, help="the program (default: target/release/potstill)")
    parser.add_argument("--maker", type=Path, default=chats.MAKER, help="the built example (default: target/release/examples/...)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything to this file")
    options = parser.parse_args()
    for program in (options.potstill, options.maker):
        if not program.is_file():
            sys.exit(f"bench_teacher: {program}: not there; build it with\n  {chats.HOW_TO_BUILD}")
    if min(options.threads, options.rounds, options.pack_tokens // MAX_LENGTH, 1 if options.tokens is None else options.tokens) < 1:
        sys.exit(f"bench_teacher: expected at least one thread, round and token, and --pack-tokens of at least {MAX_LENGTH}")
    done = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in [options.only] if options.only else ["small", "half"]:
                comparison = Comparison(name, options, Path(folder))
                for step in (comparison.prepare, comparison.check, comparison.measure):
                    step()
                done.append(comparison.everything())
    except (OSError, ValueError, KeyError, Failed) as e:
        sys.exit(f"bench_teacher: {e}")
    others = max(run["others"] for one in done for runs in one["runs"].values() for run in runs)
    print(f"{options.threads} threads, medians of {options.rounds} rounds; others used up to {others:.2f} cores meanwhile.")
    print("\n".join(table(done)))
    imported = done[0]["search"]["f32"]["imported"] / 2**20
    print(f"\nOf transformers' memory, Python and its libraries take {imported:,.0f} MiB before a model is loaded.")
    if options.json:
        settings = {"threads": options.threads, "rounds": options.rounds, "pack_tokens": options.pack_tokens}
        options.json.write_text(json.dumps({"settings": settings, "models": done}, indent=2) + "\n")


if __name__ == "__main__":
    main()
