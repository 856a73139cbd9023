#!/usr/bin/env python3
"""What gpu-check.sh runs: parity on the GPU, then both stages at full size, in one table, and where the GPU's time went. See there for usage.

Everything is the program as a user runs it. Models have random weights, made on the spot; speeds are of whole runs without loading. The share is of the matrix
rate that this GPU reaches in the same run with bf16 factors (8192 cubed): stage one counts 2 operations a weight and token, stage two 6 (forward, again
on the way back, and the gradient to the activations; adapters not counted), the head its own at scored positions. Goals are those of an H200.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
FULL = {
    "teacher": {"hidden": 5120, "layers": 64, "heads": 40, "kv-heads": 8, "intermediate": 27392, "vocab": 152064},
    "student": {"hidden": 5120, "layers": 40, "heads": 40, "kv-heads": 40, "intermediate": 13696, "vocab": 152064},
    "chats": (160, 2048), "pack": 16384, "block": 65536, "lengths": (1024, 2048), "steps": 4, "rows": 4096, "rank": 64, "chunk": 1024,
}
TINY = {
    "teacher": {"hidden": 256, "layers": 2, "heads": 4, "kv-heads": 2, "intermediate": 512, "vocab": 2048},
    "student": {"hidden": 128, "layers": 2, "heads": 2, "kv-heads": 2, "intermediate": 256, "vocab": 2048},
    "chats": (4, 48), "pack": 128, "block": 256, "lengths": (96, 128), "steps": 3, "rows": 96, "rank": 4, "chunk": 32,
}
# Tests that hold rows to the same bits whatever they are packed or chunked with. On a GPU that is cuBLAS's to decide, which picks its way by sizes.
BITS = ("packs_and_chunks_decide_no_bit", "does_not_depend_on_packs_either", "draws_belong_to_the_conversation", "chunks_do_not_change_a_bit",
        "parts_of_the_mlp_change_no_output")
PARTS = ("tests", "peak", "parity", "nccl", "teacher", "student", "peers")


class Failed(Exception):
    """A part that did not do; the text is for the table."""


def say(text):
    print(text, file=sys.stderr, flush=True)


class Memory:
    """Peak memory of the GPU while a block runs, by nvidia-smi five times a second; None where it does not answer."""

    def __enter__(self):
        self.peak, self.over = None, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.over.wait(0.2):
            try:
                used = int(subprocess.run(query, capture_output=True, text=True, timeout=5).stdout.split()[0])
            except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
                return
            self.peak = max(self.peak or 0, used)

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    def words(self):
        return "-" if self.peak is None else f"{self.peak / 1024:.1f} GiB"


class Check:
    def __init__(self, options):
        self.o, self.s = options, TINY if options.tiny else FULL
        self.rows, self.profiles, self.peak, self.failed = [], [], None, False
        self.end = time.monotonic() + 60 * options.minutes
        packed = (HERE / "bin/potstill").exists()
        target = Path(os.environ.get("CARGO_TARGET_DIR", HERE / "target"))
        self.bin = HERE / "bin" if packed else Path(options.bin or target / "cuda/release")
        self.fixtures = HERE / ("fixtures" if packed else "tests/fixtures")
        self.work = Path(tempfile.mkdtemp(prefix="gpu-check-", dir=options.work))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("POTSTILL_") or k == "POTSTILL_CUDA_LIBRARIES"}
        self.environment["RUST_BACKTRACE"] = "0"
        # The program takes variables of its name for settings; these are its tests'.
        self.tests_environment = self.environment | {"POTSTILL_TEST_DEVICE": "cuda", "POTSTILL_FIXTURES": str(self.fixtures),
                                                     "POTSTILL_MATRIX": "64" if options.tiny else "8192"}

    def run(self, command, limit, check=True, environment=None):
        say("$ " + " ".join(map(str, command)))
        left = self.end - time.monotonic()
        if left <= 0:
            raise Failed(f"the {self.o.minutes:g} minutes are over")
        limit = min(limit, left)
        try:
            done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=limit,
                                  env=environment or self.environment)
        except subprocess.TimeoutExpired:
            raise Failed(f"not done after {limit:.0f} s") from None
        except OSError as e:
            raise Failed(str(e)) from None
        if check and done.returncode not in (0, 3):
            tail = (done.stderr or done.stdout).strip().splitlines()[-3:]
            raise Failed(f"exit code {done.returncode}: " + " | ".join(tail))
        return done

    def potstill(self, *arguments, limit=240):
        return self.run([self.bin / "potstill", *arguments], limit)

    def profile(self, title, *arguments):
        """One more run, whose kernels are timed; for the end of the report."""
        done = self.run([self.bin / "potstill", *arguments], 240, environment=self.environment | {"POTSTILL_CUDA_PROFILE": "1"})
        lines = done.stderr.splitlines()
        begin = next((i for i, line in enumerate(lines) if line.startswith("on the GPU ")), None)
        if begin is None:
            raise Failed("no profile: " + (lines or ["no word"])[-1])
        self.profiles.append("\n".join([title, *lines[begin:]]))

    def row(self, what, result, goal="", ok=True):
        state = "ok" if ok else "FAILED"
        self.rows.append((what, result, goal, state))
        self.failed |= not ok
        say(f"   {what}: {result}   {state}")

    def figure(self, what, result, goal, reached):
        """A speed beside its goal, which is an H200's at full size: missing it is said, and is no failure."""
        state = "" if self.o.tiny or reached is None else "reached" if reached else "missed"
        self.rows.append((what, result, goal, state))
        say(f"   {what}: {result}   {state}")

    def share(self, operations_a_second):
        """In words, and as a number."""
        share = operations_a_second / self.peak if self.peak else None
        return ("-" if share is None else f"{100 * share:.0f} %"), share

    def tests(self):
        skipped = [part for name in BITS for part in ("--skip", name)]
        done = self.run([self.bin / "cuda-tests", *skipped], 420, check=False, environment=self.tests_environment)
        lines = [line for line in done.stdout.splitlines() if line.startswith("test result")]
        failures = [line for line in done.stdout.splitlines() if line.startswith("test ") and line.endswith("FAILED")]
        result = lines[-1].removeprefix("test result: ") if lines else (done.stderr.strip().splitlines() or ["no result"])[-1]
        for line in failures:
            say("   " + line)
        self.row("test bodies on the GPU", result[:60], ok=done.returncode == 0)
        done = self.run([self.bin / "cuda-tests", *BITS], 240, check=False, environment=self.tests_environment)
        kept = "keep their bits" if done.returncode == 0 else "differ in last bits, or more: see above"
        say("\n".join(line for line in done.stdout.splitlines() if "panicked" in line or "differ" in line))
        self.figure("rows in other packs and chunks", kept, "", None)

    def matrix_peak(self):
        done = self.run([self.bin / "cuda-tests", "--ignored", "--exact", "matrix_peak", "--nocapture"], 60,
                        environment=self.tests_environment)
        self.peak = next(float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("matrix_peak "))
        self.row("matrix rate, bf16", f"{self.peak / 1e12:.3g} TFLOP/s")

    def parity(self):
        """Both stages on the CPU and on the GPU with the same program, from the fixtures."""
        golden, caches = self.fixtures / "golden", {d: self.work / f"parity-{d}" for d in ("cpu", "cuda")}
        for device, cache in caches.items():
            self.potstill("precompute", "--quiet", "--json", "--device", device, "--compute", "f32", "--teacher", golden / "teacher-awq",
                          "--data", golden / "chats.jsonl", "--cache", cache, "--top-k", 16, "--max-length", 128)
        figures = json.loads(self.potstill("diff", "--json", caches["cpu"], caches["cuda"]).stdout)["figures"]
        mean, agrees = figures["forward"]["mean"], figures["top1_agrees"]
        # f32 sums in another order, and values at a border of their rounding: 5e-11 on the emulated GPU; a wrong kernel is off by 1e-3 and more.
        self.row("cache of the GPU against the CPU's", f"KL {mean:.1e}, same first {100 * agrees:.2f} %", "below 1e-9", mean < 1e-9)
        losses = {}
        for device in caches:
            out = self.work / f"parity-run-{device}"
            self.run(self.three_steps(caches["cpu"], out, "--device", device), 240)
            losses[device] = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        off = max(abs(a - b) / a for a, b in zip(losses["cpu"], losses["cuda"]))
        self.row("losses of three steps against the CPU's", f"{off:.1e} apart", "below 1e-5", off < 1e-5)

    def three_steps(self, cache, out, *flags):
        return [self.bin / "potstill", "train", "--quiet", "--json", "--compute", "f32", "--student", self.fixtures / "golden/student", "--cache", cache,
                "--out", out, "--steps", 3, "--batch-size", 4, "--rank", 8, "--no-shuffle", "--warmup-steps", 0, *flags]

    def nccl(self):
        """One rank's gradients through NCCL: the run of the part parity once more."""
        before, after = self.work / "parity-run-cuda", self.work / "nccl-run"
        if not before.exists():
            raise Failed("needs the cache and the run that the part parity makes")
        done = self.run(self.three_steps(self.work / "parity-cpu", after, "--device", "cuda", "--dist-backend", "nccl"), 240, check=False)
        if done.returncode == 2 and "libnccl.so.2 was not found" in done.stderr:
            self.figure("one rank on NCCL", "skipped: libnccl.so.2 was not found", "", None)
            return
        if done.returncode != 0:
            raise Failed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        adapter = "adapter/adapter_model.safetensors"
        same = (before / adapter).read_bytes() == (after / adapter).read_bytes()
        self.row(f"one rank on NCCL {json.loads(done.stdout)['nccl']}", "the same adapter" if same else "another adapter", "the same adapter", same)

    def chats(self):
        rows, words = self.s["chats"]
        path, dice = self.work / "chats.jsonl", random.Random(1)
        stock = "the model reads what it is given and says how likely each next word would be while we write it down for later use again".split()
        with path.open("w") as file:
            for _ in range(rows):
                text = lambda n: " ".join(dice.choice(stock) for _ in range(n))
                messages = [{"role": "user", "content": text(max(words // 8, 4))}, {"role": "assistant", "content": text(words)}]
                file.write(json.dumps({"messages": messages}) + "\n")
        return path

    def model(self, name, *flags):
        folder = self.work / name
        sizes = [part for key, value in self.s[name].items() for part in (f"--{key}", value)]
        self.run([self.bin / "random_teacher", "--out", folder, "--tokenizer", self.fixtures / "golden/teacher-awq", *sizes, *flags], 180)
        return folder

    def weights(self, name):
        """Weights of a model's layers, and of its head."""
        s = self.s[name]
        h, kv = s["hidden"], s["hidden"] // s["heads"] * s["kv-heads"]
        return s["layers"] * (2 * h * h + 2 * h * kv + 3 * h * s["intermediate"]), h * s["vocab"]

    def teacher(self):
        folder, chats = self.model("teacher"), self.chats()
        layers, head_weights = self.weights("teacher")
        longest = max(self.s["lengths"])

        def score(cache, length, *flags):
            return self.potstill("precompute", "--quiet", "--json", "--device", "cuda", "--compute", "bf16", "--teacher", folder, "--data", chats,
                                 "--cache", self.work / cache, "--top-k", 64, "--max-length", length, "--truncate", "right",
                                 "--pack-tokens", self.s["pack"], "--head-chunk", self.s["chunk"], *flags)

        for residency in ("resident", "streamed"):
            block = [] if residency == "resident" else ["--block-tokens", self.s["block"]]
            with Memory() as memory:
                done = score(f"cache-{residency}", longest, "--residency", residency, *block)
            report = json.loads(done.stdout)
            rate = report["scored_tokens"] / report["seconds"]
            used = 2 * (layers * report["scored_tokens"] + head_weights * report["scored_now"]) / report["seconds"]
            words, share = self.share(used)
            head = 100 * report["head_seconds"] / report["seconds"]
            goal, least = ("70 % of the peak", 0.7) if residency == "resident" else ("60 % of the peak, below 8 GB", 0.6)
            small = residency == "resident" or (memory.peak or 0) * 2**20 < 8e9
            self.figure(f"stage one, {residency}", f"{rate:,.0f} tokens/s, {words} of the peak, {memory.words()}, head {head:.0f} % of the time", goal,
                        share and share >= least and small)
        same = (self.work / "cache-resident/shard-00000.parquet").read_bytes() == (self.work / "cache-streamed/shard-00000.parquet").read_bytes()
        self.row("streamed against resident", "the same bytes" if same else "other bytes", "the same bytes", same)
        for length in self.s["lengths"]:
            if length < longest:
                score(f"cache-{length}", length, "--residency", "resident")
        few = self.work / "few.jsonl"
        few.write_text("".join(chats.read_text().splitlines(keepends=True)[: max(2 * self.s["pack"] // longest, 2)]))
        self.profile(f"stage one, resident, {longest} tokens", "precompute", "--quiet", "--device", "cuda", "--compute", "bf16", "--teacher", folder,
                     "--data", few, "--cache", self.work / "cache-profile", "--top-k", 64, "--max-length", longest, "--truncate", "right",
                     "--pack-tokens", self.s["pack"], "--head-chunk", self.s["chunk"], "--residency", "resident")
        (self.work / "cache-resident").rename(self.work / f"cache-{longest}")
        shutil.rmtree(folder)

    def student(self):
        if not (self.work / f"cache-{max(self.s['lengths'])}").exists():
            raise Failed("needs the caches that the part teacher makes")
        folder = self.model("student", "--dense")
        layers, head = self.weights("student")

        def steps(objective, length, out):
            return ["train", "--quiet", "--json", "--device", "cuda", "--compute", "bf16", "--objective", objective, "--student", folder,
                    "--cache", self.work / f"cache-{length}", "--out", out, "--steps", self.s["steps"], "--rank", self.s["rank"],
                    "--batch-size", max(self.s["rows"] // length, 1), "--pack-tokens", max(length, 2 * 1024 if not self.o.tiny else length),
                    "--head-chunk", self.s["chunk"], "--no-shuffle", "--warmup-steps", 0, "--checkpoint-every", 0]

        for length in self.s["lengths"]:
            times = {}
            for objective in ("sft", "distill"):
                out = self.work / f"run-{objective}-{length}"
                with Memory() as memory:
                    self.potstill(*steps(objective, length, out))
                lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                # The first step sets things up.
                seconds = lines[-1]["seconds"] - lines[0]["seconds"]
                tokens, scored = (sum(line[key] for line in lines[1:]) for key in ("tokens", "scored"))
                used = (6 * layers * tokens + 4 * head * scored) / seconds
                times[objective] = seconds / tokens
                words, share = self.share(used)
                self.figure(f"stage two, {objective}, {length} tokens", f"{tokens / seconds:,.0f} tokens/s, {words} of the peak, {memory.words()}",
                            "50 % of the peak, 16 GB", share and share >= 0.5 and (memory.peak or 0) * 2**20 <= 16e9)
            ratio = times["distill"] / times["sft"]
            self.figure(f"distill against sft, {length} tokens", f"{ratio:.2f} x the time", "1.10 x at most", ratio <= 1.1)
        longest = max(self.s["lengths"])
        self.profile(f"stage two, distill, {longest} tokens, {self.s['steps']} steps", *steps("distill", longest, self.work / "run-profile"))

    def peers(self):
        """The same two jobs in PyTorch, where it is."""
        for job in ("teacher", "student"):
            for length in self.s["lengths"]:
                rows = max(self.s["pack" if job == "teacher" else "rows"] // length, 1)
                command = [sys.executable, HERE / "scripts/gpu_peer.py", job, json.dumps(self.s[job]), "--length", length, "--rows", rows,
                           "--rank", self.s["rank"], "--device", self.o.peer_device]
                done = self.run(command, 180, check=False)
                if done.returncode != 0:
                    why = (done.stderr.strip().splitlines() or ["no word"])[-1]
                    self.figure(f"PyTorch, {job}, {length} tokens", f"skipped: {why[:80]}", "", None)
                    break
                figures = json.loads(done.stdout.splitlines()[-1])
                memory = figures.get("peak_bytes")
                memory = "-" if memory is None else f"{memory / 2**30:.1f} GiB"
                self.figure(f"PyTorch, {job}, {length} tokens", f"{figures['tokens_per_second']:,.0f} tokens/s, {figures['base']}, {memory}", "", None)

    def all(self):
        bodies = {"tests": self.tests, "peak": self.matrix_peak, "parity": self.parity, "nccl": self.nccl, "teacher": self.teacher, "student": self.student,
                  "peers": self.peers}
        for part in self.o.only or PARTS:
            began = time.monotonic()
            try:
                bodies[part]()
            except Failed as e:
                self.row(part, str(e)[:160], ok=False)
            say(f"   {part}: {time.monotonic() - began:.0f} s")
        shutil.rmtree(self.work, ignore_errors=True)
        widths = [max(len(str(row[i])) for row in self.rows) for i in range(3)]
        for row in self.rows:
            print("  ".join(str(cell).ljust(width) for cell, width in zip(row, [*widths, 7])).rstrip())
        for profile in self.profiles:
            print("\n" + profile)
        return 1 if self.failed else 0


def main():
    parser = argparse.ArgumentParser(prog="gpu-check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models: tries this script itself")
    parser.add_argument("--minutes", type=float, default=10, help="what is not done by then has failed (default 10)")
    parser.add_argument("--work", help="folder for models and caches (default: the system's for temporary files)")
    parser.add_argument("--bin", help="folder of potstill, random_teacher and cuda-tests in a checkout")
    parser.add_argument("--peer-device", default="cuda", help="PyTorch's name of the GPU (cpu tries that part without one)")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part alone; may be given again")
    sys.exit(Check(parser.parse_args()).all())


if __name__ == "__main__":
    main()
