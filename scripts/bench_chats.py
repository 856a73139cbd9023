"""Models and chats to measure with, made on the spot; and what a cache holds of them. Part of bench_teacher.py and bench_memory.py.

The one idea: whoever is compared with potstill gets its tokens and scored positions from potstill's own cache, so that both see exactly
the same. Nothing here is timed.
"""
import json
import random
import shutil
import subprocess
from pathlib import Path
from statistics import NormalDist

import pyarrow.parquet as pq
from bench_process import Failed
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/fixtures/golden"
POTSTILL = ROOT / "target/release/potstill"
MAKER = ROOT / "target/release/examples/random_teacher"
HOW_TO_BUILD = "cargo build --release && cargo build --release -p potstill-pipeline --example random_teacher"

# What is compared: types of products, and shapes of models as flags of random_teacher.
DTYPES = ("f32", "bf16")
SHAPES = {
    "small": dict(hidden=512, layers=8, heads=8, intermediate=1408, vocab=8192, **{"kv-heads": 2}),
    "half": dict(hidden=896, layers=24, heads=14, intermediate=4864, vocab=151936, ids=151646, tied=True, **{"kv-heads": 2}),
    "tiny": dict(hidden=256, layers=2, heads=4, intermediate=512, vocab=4096, ids=4000, tied=True, **{"kv-heads": 2}),
}
NAMES = {"small": "small (8 x 512, 8k ids)", "half": "0.5B shape (24 x 896, 152k ids)", "tiny": "tiny (2 x 256, 4k ids)"}
MAX_LENGTH = 1024

# Lengths of conversations in tokens: log-normal, cut to what fits with room for the template.
MEDIAN_TOKENS, SPREAD, FEWEST, MOST = 500, 0.6, 48, 960
GOLDEN_RATIO = (5**0.5 - 1) / 2


def model(folder, maker, shape):
    """The model folder `folder` of `shape` (flags of random_teacher); made where it is not there, refused where it is another one.
    Its last file says of what shape it is, so a folder without it is one that was never finished."""
    label = folder / "shape.json"
    if label.is_file():
        found = json.loads(label.read_text())
        if found != shape:
            raise Failed(f"{folder}: expected a model of shape {shape}, found {found}; remove it or name another folder")
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    flags = [part for name, value in shape.items() for part in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]
    command = [str(maker), "--out", str(folder), "--tokenizer", str(GOLDEN / "teacher-awq"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{maker.name} failed: {done.stderr.strip()}")
    label.write_text(json.dumps(shape))
    return folder


def texts():
    """What users and what assistants say in the golden chats."""
    said = {"user": [], "assistant": []}
    for line in (GOLDEN / "chats.jsonl").read_bytes().split(b"\n"):
        for message in json.loads(line or b"{}").get("messages", []):
            if message.get("role") in said and isinstance(message.get("content"), str) and message["content"].strip():
                said[message["role"]].append(message["content"].strip())
    return said


def write_chats(path, tokens):
    """Chats of at least `tokens` tokens in all, the same at each call, no two alike: short questions, long answers, several turns."""
    tokenizer = Tokenizer.from_file(str(GOLDEN / "teacher-awq/tokenizer.json"))
    count = lambda text: len(tokenizer.encode(text).ids) + 5  # and the template's tokens

    def cut(text, most):
        while count(text) > most and len(text) > 1:
            text = text[: max(len(text) * 9 // 10, 1)].rstrip()
        return text

    said, dice, total, number = texts(), random.Random(4), 0, 0
    with path.open("w", encoding="utf-8") as file:
        while total < tokens:
            # Spread evenly over the distribution, however few there are.
            share = (0.5 + number * GOLDEN_RATIO) % 1
            wanted = MEDIAN_TOKENS * 2.718281828 ** (SPREAD * NormalDist().inv_cdf(min(max(share, 0.01), 0.99)))
            wanted = min(max(wanted, FEWEST), MOST, max(tokens - total, FEWEST))
            messages, length = [], 0
            while length < wanted:
                question = cut(f"Question {number}.{len(messages) // 2}: {dice.choice(said['user'])}", 60)
                answer, most = [], min(dice.randint(100, 400), max(wanted - length - count(question), 10))
                while count("\n\n".join(answer)) < most:
                    answer.append(dice.choice(said["assistant"]))
                answer = cut("\n\n".join(answer), most)
                if messages and length + count(question) + count(answer) > MOST:
                    break
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                length += count(question) + count(answer)
            total, number = total + length, number + 1
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def rows(cache):
    """The rows of a cache: input_ids, positions (scored ones), and ids, logprobs and tail of each scored position."""
    found = []
    for shard in sorted(cache.glob("shard-*.parquet")):
        for one in pq.read_table(shard).to_pylist():
            positions = [i for i, entries in enumerate(one["topk_ids"]) if entries]
            part = {"input_ids": one["input_ids"], "positions": positions}
            for name, column in (("ids", "topk_ids"), ("logprobs", "topk_logprobs"), ("tail", "tail_logprob")):
                part[name] = [one[column][i] for i in positions]
            found.append(part)
    if not found:
        raise Failed(f"{cache}: a cache without rows")
    return found
