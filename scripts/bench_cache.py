#!/usr/bin/env python3
"""Puts potstill's cache beside other ways to keep a teacher's distributions: one run, the same data, one markdown table.

    cargo build --release -p potstill-cache --example measure
    python scripts/bench_cache.py --data dists_k128.parquet

Needs numpy and pyarrow; Hugging Face `datasets` for its rows, which are left out with a reason where it is missing. DistillKit's rows
follow the layout that its documentation describes (exact head, least-squares curve over the ranks, ids at 18 bits), written
anew here; its own program is not run. Times are CPU time of one thread, warm, of one random sequence decoded into arrays.
"""
import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

try:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as missing:
    sys.exit(f"bench_cache: {missing.name} is not installed; this script needs numpy and pyarrow")

ID_BITS = 18  # 2^17 < 151,936 <= 2^18
TAIL_FLOOR = 1e-9  # least probability that a tail can have, as in the cache's format
COLUMNS = ["input_ids", "topk_ids", "topk_logits", "logsumexp", "tail_logprob"]


class Data:
    """Sequences of `length` positions: ids [positions, 128] and f64 log-probabilities, falling; the tail's probability."""

    def __init__(self, path):
        table = pq.read_table(path, columns=COLUMNS)
        flat = lambda name: table[name].combine_chunks().flatten()
        self.sequences = table.num_rows
        self.positions = len(flat("logsumexp"))
        self.length, rest = divmod(self.positions, max(self.sequences, 1))
        width, uneven = divmod(len(flat("topk_ids").flatten()), max(self.positions, 1))
        if self.positions == 0 or rest or uneven:
            raise ValueError("expected sequences of one length with as many entries at each position")
        self.ids = flat("topk_ids").flatten().to_numpy().reshape(-1, width)
        logits = flat("topk_logits").flatten().to_numpy().reshape(-1, width).astype(np.float64)
        self.logprobs = np.minimum(logits - flat("logsumexp").to_numpy().astype(np.float64)[:, None], 0.0)
        self.rest = np.exp(flat("tail_logprob").to_numpy().astype(np.float64))

    def top(self, k):
        """Ids and log-probabilities of the first k, and the probability of all others."""
        if k > self.ids.shape[1]:
            raise ValueError(f"the data has {self.ids.shape[1]} entries a position, fewer than {k}")
        return self.ids[:, :k], self.logprobs[:, :k], self.rest + np.exp(self.logprobs[:, k:]).sum(1)


def divergence(logprobs, tail, stored):
    """KL(given, stored) in nats, mean and largest, over the kept entries and the tail, both normalised. None of these formats keeps
    the tail, so the stored one is what the stored entries leave of 1, at least TAIL_FLOOR."""
    p, q = np.exp(logprobs), np.exp(stored.astype(np.float64))
    p = np.concatenate([p, tail[:, None]], 1)
    q = np.concatenate([q, np.maximum(1 - q.sum(1), TAIL_FLOOR)[:, None]], 1)
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    kl = np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(q)), 0).sum(1)
    return float(kl.mean()), float(kl.max())


def read_time(read, sequences, reads):
    """Median CPU microseconds of `read(sequence)`."""
    generator = random.Random(1)
    order = [generator.randrange(sequences) for _ in range(reads)]
    for sequence in range(sequences):
        read(sequence)  # warm
    taken = []
    for sequence in order:
        start = time.thread_time_ns()
        read(sequence)
        taken.append((time.thread_time_ns() - start) / 1e3)
    return float(np.median(taken))


def row(name, kept, size, kl, micros, note, write=None):
    return {"name": name, "kept": kept, "bytes": size, "kl": kl, "read_us": micros, "write": write, "note": note}


def numpy_map(data, folder, reads, k=64):
    """Two .npy files, mapped: 4-byte ids and 2-byte log-probabilities."""
    ids, logprobs, tail = data.top(k)
    half = logprobs.astype(np.float16)
    np.save(folder / "ids.npy", ids.astype(np.int32))
    np.save(folder / "logprobs.npy", half)
    size = sum((folder / name).stat().st_size for name in ("ids.npy", "logprobs.npy"))
    mapped = [np.load(folder / name, mmap_mode="r") for name in ("ids.npy", "logprobs.npy")]
    n = data.length
    read = lambda s: [np.array(array[s * n : (s + 1) * n]) for array in mapped]
    note = "no tokens, no tail, no checks"
    micros = read_time(read, data.sequences, reads)
    return [row("numpy memory map, i32 + f16", k, size / data.positions, divergence(logprobs, tail, half), micros, note)]


def hugging_face(data, folder, reads, k=64):
    """An Arrow dataset on disk, one row a sequence, nested lists of 4-byte ids and 2-byte log-probabilities."""
    import datasets

    datasets.disable_progress_bars()
    ids, logprobs, tail = data.top(k)
    half = logprobs.astype(np.float16)

    def nested(values, kind):
        outer = np.arange(data.sequences + 1, dtype=np.int32) * data.length
        inner = np.arange(data.positions + 1, dtype=np.int32) * k
        lists = pa.ListArray.from_arrays(pa.array(inner), pa.array(values.reshape(-1), kind))
        return pa.ListArray.from_arrays(pa.array(outer), lists)

    table = pa.table({"topk_ids": nested(ids.astype(np.int32), pa.int32()), "topk_logprobs": nested(half, pa.float16())})
    place = folder / "datasets"
    datasets.Dataset(table).save_to_disk(str(place))
    size = sum(f.stat().st_size for f in place.rglob("*.arrow"))
    stored = datasets.load_from_disk(str(place))
    kl = divergence(logprobs, tail, half)
    as_numpy, as_arrow = stored.with_format("numpy"), stored.with_format("arrow")

    def flat(sequence):
        batch = as_arrow[sequence]
        return [batch[name].combine_chunks().flatten().flatten().to_numpy() for name in ("topk_ids", "topk_logprobs")]

    rows = []
    for kind, read in (("numpy", lambda s: as_numpy[s]), ("arrow", flat)):
        micros = read_time(read, data.sequences, reads if kind == "arrow" else min(reads, 20))
        note = f"`{kind}` format; no tokens, no tail, no checks"
        rows.append(row(f"HF datasets {datasets.__version__}, i32 + f16", k, size / data.positions, kl, micros, note))
    return rows


def bfloat16(values):
    """Float32 rounded to bfloat16, to nearest, ties to even: the upper halves."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def pack(ids):
    """[n, k] ids as [n, bytes], ID_BITS bits each, lowest bits first."""
    bits = (ids[:, :, None] >> np.arange(ID_BITS, dtype=np.uint32)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(len(ids), -1), axis=1, bitorder="little")


def unpacked(packed, k):
    """The ids of `pack`: each lies within 4 bytes."""
    offsets = np.arange(k) * ID_BITS
    padded = np.concatenate([packed, np.zeros((len(packed), 3), np.uint8)], 1)
    words = np.zeros((len(packed), k), np.uint32)
    for i in range(4):
        words |= padded[:, (offsets >> 3) + i].astype(np.uint32) << np.uint32(8 * i)
    return (words >> (offsets & 7).astype(np.uint32)) & np.uint32((1 << ID_BITS) - 1)


def distillkit(name, data, folder, reads, k, exact, terms):
    """`exact` values in bfloat16, the rest as float32 coefficients of `terms` over the rank, ids bit-packed."""
    ids, logprobs, tail = data.top(k)
    t = np.arange(k - exact, dtype=np.float32)
    basis = np.stack([np.sqrt(t) if term == "sqrt" else t**term for term in terms], 1).astype(np.float32)
    rest = logprobs[:, exact:].astype(np.float32)
    coefficients = np.ascontiguousarray(np.linalg.lstsq(basis, rest.T, rcond=None)[0].T, np.float32)
    head = np.ascontiguousarray(bfloat16(logprobs[:, :exact]))
    packed = np.concatenate([pack(ids[s : s + data.length]) for s in range(0, data.positions, data.length)])
    record = np.concatenate([head.view(np.uint8), coefficients.view(np.uint8).reshape(len(head), -1), packed], 1)
    path = folder / "packed.npy"
    np.save(path, record)
    mapped = np.load(path, mmap_mode="r")
    cuts = 2 * exact, 2 * exact + 4 * len(terms)

    def read(sequence):
        part = np.array(mapped[sequence * data.length : (sequence + 1) * data.length])
        whole = np.ascontiguousarray(part[:, : cuts[0]]).view(np.uint16).astype(np.uint32) << 16
        curve = np.ascontiguousarray(part[:, cuts[0] : cuts[1]]).view(np.float32) @ basis.T
        return unpacked(part[:, cuts[1] :], k), np.concatenate([whole.view(np.float32), curve], 1)

    if not np.array_equal(read(3)[0], ids[3 * data.length : 4 * data.length]):
        raise AssertionError("packed ids do not come back")
    stored = np.concatenate([read(s)[1] for s in range(data.sequences)])
    note = f"k = {k}, {exact} exact, {len(terms)} terms; no tokens, no tail, no checks"
    micros = read_time(read, data.sequences, reads)
    size = record.shape[1]
    kl = divergence(logprobs, tail, np.minimum(stored, 0.0))
    parquet = folder / "packed.parquet"
    lists = pa.array(list(record), pa.list_(pa.uint8()))
    offsets = np.arange(data.sequences + 1, dtype=np.int32) * data.length
    pq.write_table(pa.table({"packed": pa.ListArray.from_arrays(pa.array(offsets), lists)}), parquet)
    note += f"; {parquet.stat().st_size / data.positions:.0f} B in its Parquet"
    return [row(name, k, size, kl, micros, note)]


def angles(data, sharpness, vocabulary=151_936):
    """Degrees between the gradient of full distillation and that of what is kept, for a student whose distributions are the teacher's
    to the power `sharpness`. The gradient is that of the output layer's bias, summed over all positions: what an unbiased estimate
    adds in noise averages out there, and what is biased stays. Mass that the data does not name is spread over the vocabulary."""
    generator = np.random.default_rng(0)
    sums = {}

    def add(name, ids, named, unnamed):
        total = sums.setdefault(name, np.zeros(vocabulary))
        total += np.bincount(ids.ravel(), named.ravel(), minlength=vocabulary) + unnamed.sum() / vocabulary

    def drawn(name, ids, p, q, head, draws):
        tail = p[:, head:].sum(1, keepdims=True)
        share = p[:, head:] / tail
        counts = generator.multinomial(draws, share / share.sum(1, keepdims=True))
        estimate = np.concatenate([p[:, :head], tail * counts / draws], 1)
        add(name, ids, q[:, :-1] - estimate[:, :-1], q[:, -1])
        # Draws of unnamed mass fall on any id.
        weights = np.repeat(tail[:, 0] / draws, counts[:, -1])
        sums[name] -= np.bincount(generator.integers(0, vocabulary, len(weights)), weights, minlength=vocabulary)

    for start in range(0, data.positions, data.length):
        part = slice(start, start + data.length)
        p = np.concatenate([np.exp(data.logprobs[part]), data.rest[part, None]], 1)
        p /= p.sum(1, keepdims=True)
        q = p**sharpness
        q /= q.sum(1, keepdims=True)
        ids = data.ids[part].astype(np.int64)
        add("full", ids, (q - p)[:, :-1], (q - p)[:, -1])
        for k in (12, 50, 64):
            alone = np.where(np.arange(p.shape[1]) < k, p, 0)
            alone /= alone.sum(1, keepdims=True)
            add(f"top {k}, renormalised", ids, (q - alone)[:, :-1], (q - alone)[:, -1])
            # One outcome for the rest: the student's own shares of it are left as they are.
            bucket = p.copy()
            bucket[:, k:] = p[:, k:].sum(1, keepdims=True) * q[:, k:] / q[:, k:].sum(1, keepdims=True)
            add(f"top {k} and the tail", ids, (q - bucket)[:, :-1], (q - bucket)[:, -1])
        drawn("sampled, 50 draws", ids, p, q, 0, 50)
        drawn("hybrid, 16 + 32 draws", ids, p, q, 16, 32)
    full = sums.pop("full")
    cosine = lambda g: g @ full / np.linalg.norm(g) / np.linalg.norm(full)
    return {name: float(np.degrees(np.arccos(np.clip(cosine(g), -1, 1)))) for name, g in sums.items()}


def potstill(options):
    """The cache's own figures, from the example `measure`."""
    command = [str(options.measure), "--data", str(options.data), "--json"]
    for name in ("repeat", "tries", "reads", "shards"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{options.measure} failed with exit code {done.returncode}")
    report = json.loads(done.stdout)
    rows = []
    for s in report["storages"]:
        kl = None if s["kl_mean"] is None else (s["kl_mean"], s["kl_max"])
        note = f"{s['selection']}; Arrow reader {s['arrow_us']['p50']:.0f} us"
        kept, micros = s["entries"] or "drawn", s["read_us"]["p50"]
        rows.append(row(f"potstill {s['name']}", kept, s["bytes"], kl, micros, note, s["write_per_cpu_s"]))
    return rows, report


def table(rows):
    lines = ["| format | kept | B/position | KL mean | KL max | read, us | write, k/s | |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for r in rows:
        kl = ["-", "-"] if r["kl"] is None else ["0" if x == 0 else f"{x:.1e}" for x in r["kl"]]
        kept = r["kept"] if isinstance(r["kept"], str) else f"{r['kept']:.4g}"
        write = "" if r["write"] is None else f"{r['write'] / 1e3:.0f}"
        size, micros = f"{r['bytes']:.1f}", f"{r['read_us']:,.0f}"
        lines.append(f"| {r['name']} | {kept} | {size} | {kl[0]} | {kl[1]} | {micros} | {write} | {r['note']} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    built = Path(__file__).resolve().parent.parent / "target/release/examples/measure"
    parser.add_argument("--data", type=Path, required=True, help="Parquet file with " + ", ".join(COLUMNS))
    parser.add_argument("--measure", type=Path, default=built, help="the built example (default: target/release/examples/measure)")
    parser.add_argument("--repeat", type=int, default=4, help="copies of the data in each of potstill's caches (default 4)")
    parser.add_argument("--tries", type=int, default=3, help="times each of them is written, for the median (default 3)")
    parser.add_argument("--reads", type=int, default=300, help="random sequences read of each format (default 300)")
    parser.add_argument("--shards", type=int, default=1000, help="shards for the memory of open ones, 0 for none (default 1000)")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args()
    if not options.data.is_file():
        sys.exit(f"bench_cache: {options.data}: no such file")
    if not options.measure.is_file():
        how = "cargo build --release -p potstill-cache --example measure"
        sys.exit(f"bench_cache: {options.measure}: not there; build it with\n  {how}")
    try:
        data = Data(options.data)
        rows, report = potstill(options)
    except (OSError, ValueError, KeyError, RuntimeError, pa.ArrowException) as e:
        sys.exit(f"bench_cache: {options.data}: {e}")
    left_out = []
    peers = [
        ("numpy", lambda folder: numpy_map(data, folder, options.reads)),
        ("Hugging Face datasets", lambda folder: hugging_face(data, folder, options.reads)),
    ]
    for setting, *how in (("recommended", 128, 16, [0, 1, 2, 3, 4, "sqrt"]), ("budget", 50, 1, [0, 1, "sqrt"])):
        name = f"DistillKit's layout, {setting}"
        peers.append((name, lambda folder, name=name, how=how: distillkit(name, data, folder, options.reads, *how)))
    for name, measure in peers:
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows += measure(Path(folder))
            except (ImportError, ValueError, OSError, pa.ArrowException) as e:
                left_out.append(f"{name}: {e}")
    print(f"{data.sequences} sequences of {data.length} positions, in potstill's caches {options.repeat} times. "
          "KL in nats over kept entries and tail.\n")
    print(table(rows))
    flat, sharp = angles(data, 0.5), angles(data, 2.0)
    print(f"\nAngle to the gradient of full distillation, of the output layer's bias over {data.positions:,} positions.\n")
    print("| kept | student half as sharp | student twice as sharp |\n| --- | ---: | ---: |")
    for name, angle in flat.items():
        print(f"| {name} | {angle:.1f}° | {sharp[name]:.1f}° |")
    for reason in left_out:
        print(f"\nLeft out: {reason}")
    shards = report["open_shards"]
    if shards:
        print(f"\n{shards['shards']} open shards of {shards['rows']} rows: {shards['after'] / 2**20:.0f} MiB resident, "
              f"{shards['open']:.0f} us to open one.")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "angles": [flat, sharp], "left_out": left_out, "measure": report}, indent=2) + "\n")


if __name__ == "__main__":
    main()
