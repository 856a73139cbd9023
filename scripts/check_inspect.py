#!/usr/bin/env python3
"""Works out every figure of `potstill inspect CACHE --json` again, with pyarrow and numpy alone, and compares.

    scripts/check_inspect.py CACHE [--potstill target/release/potstill]

Counts must be equal. Sums of f64 are taken in another order here, so means may differ by a few units in the last place for each
addition: 1e-9 (relative) leaves room for a million of them. Exits 1 at the first figure that differs by more.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

TOLERANCE = 1e-9
RANKED, AT_LEAST_SCORED, NEARLY_ALL = 10, 16, 0.99


def rows_of(cache):
    """Every row as a dictionary of columns, shard by shard."""
    for shard in sorted(cache.glob("shard-*.parquet")):
        yield from pq.read_table(shard).to_pylist()


def logprobs_of(row, i):
    """Log-probabilities kept after token i, f64; of logits: logit less logsumexp, rounded to f32, never above 0."""
    if "topk_logits" in row:
        exact = np.array(row["topk_logits"][i], np.float64) - row["logsumexp"][i]
        return np.minimum(exact.astype(np.float32), 0).astype(np.float64)
    return np.array(row.get("topk_logprobs", [[]] * (i + 1))[i], np.float64)


def positions_of(row):
    """What each scored position says."""
    lists = row.get("topk_ids", row.get("sample_ids"))
    for i, entries in enumerate(lists):
        if entries:
            drawn, counts = (row[name][i] if name in row else [] for name in ("sample_ids", "sample_counts"))
            yield {
                "next": row["input_ids"][i + 1],
                "ids": np.array(row["topk_ids"][i] if "topk_ids" in row else [], np.int64),
                "logprobs": logprobs_of(row, i),
                "tail": float(row["tail_logprob"][i]),
                "drawn": dict(zip(drawn, counts)),
            }


def entropy(p):
    p = np.asarray(p, np.float64)
    return float(-np.sum(p[p > 0] * np.log(p[p > 0])))


def of_position(at):
    """Figures of one position with kept entries."""
    place = np.flatnonzero(at["ids"] == at["next"])
    p, tail = np.exp(at["logprobs"]), np.exp(at["tail"])
    return {
        "top1": p[0],
        "hit": bool(at["ids"][0] == at["next"]),
        "entropy": entropy(np.append(p, tail)),
        "mass": p.sum(),
        "rank": int(place[0]) + 1 if len(place) else None,
        "next_logprob": at["logprobs"][place[0]] if len(place) else None,
        "surprise": -(at["logprobs"][place[0]] if len(place) else min(at["logprobs"][-1], at["tail"])),
    }


def counted(values, low, high, bins):
    """Positions in bins of equal width, those outside in the nearest."""
    index = np.floor((np.asarray(values) - low) / (high - low) * bins).astype(int)
    return np.bincount(np.clip(index, 0, bins - 1), minlength=bins).tolist()


def at_k(positions, figures, k):
    parts = []
    for at, f in zip(positions, figures):
        p = np.exp(at["logprobs"])
        first, others = p[:k], p[k:].sum() + np.exp(at["tail"])
        kept = f["rank"] is not None and f["rank"] <= k
        parts.append((len(first), first.sum(), first.sum() >= NEARLY_ALL, kept, entropy(np.append(first, others))))
    means = np.mean(np.array(parts, np.float64), axis=0)
    return dict(zip(("k", "mean_entries", "mean_mass", "nearly_all", "next_is_kept", "mean_entropy"), (k, *means)))


def ranks(figures, head):
    found = np.array([f["rank"] for f in figures if f["rank"]])
    edges = [1, 1] + [2 ** i for i in range(1, 17)]
    bins = [(low + 1 if i else 1, high) for i, (low, high) in enumerate(zip(edges, edges[1:]))]
    return [
        {"from": low, "to": min(high, head), "positions": int(((found >= low) & (found <= high)).sum())}
        for low, high in bins
        if low <= head
    ]


def calibration(figures):
    top1, hit = np.array([f["top1"] for f in figures]), np.array([f["hit"] for f in figures])
    which = np.clip((top1 * 10).astype(int), 0, 9)
    bins, error = [], 0.0
    for i in range(10):
        inside = which == i
        n = int(inside.sum())
        said, came = (float(x[inside].mean()) if n else None for x in (top1, hit))
        error += n / len(figures) * abs(said - came) if n else 0
        bins.append({"from": i / 10, "to": (i + 1) / 10, "positions": n, "mean_top1": said, "top1_is_next": came})
    return bins, error


def of_row(number, row, figures):
    surprise = float(np.mean([f["surprise"] for f in figures]))
    return {
        "row": number,
        "seq_id": row["seq_id"],
        "tokens": len(row["input_ids"]),
        "scored": len(figures),
        "mean_surprise": surprise,
        "perplexity_at_least": float(np.exp(surprise)),
        "top1_is_next": float(np.mean([f["hit"] for f in figures])),
        "mean_entropy": float(np.mean([f["entropy"] for f in figures])),
    }


def kept_figures(positions, figures, rows, head):
    mean = lambda name: float(np.mean([f[name] for f in figures]))
    where_kept = [f["next_logprob"] for f in figures if f["rank"]]
    doubling = [2 ** i for i in range(17) if 2 ** i < head]
    bins, error = calibration(figures)
    enough = [row for row in rows if row["scored"] >= AT_LEAST_SCORED]
    top1 = [f["top1"] for f in figures]
    return {
        "mean_top1": mean("top1"),
        "median_top1": float(np.sort(top1)[(len(top1) + 1) // 2 - 1]),
        "mean_entropy": mean("entropy"),
        "mean_kept_mass": mean("mass"),
        "top1_is_next": mean("hit"),
        "next_is_kept": len(where_kept) / len(figures),
        "perplexity_where_kept": float(np.exp(-np.mean(where_kept))) if where_kept else None,
        "perplexity_at_least": float(np.exp(mean("surprise"))),
        "entropy_histogram": {"from": 0, "to": 12, "counts": counted([f["entropy"] for f in figures], 0, 12, 48)},
        "top1_histogram": {"from": 0, "to": 1, "counts": counted(top1, 0, 1, 20)},
        "by_k": [at_k(positions, figures, k) for k in [*doubling, head]],
        "next_rank": ranks(figures, head),
        "calibration": bins,
        "calibration_error": error,
        "most_surprising": sorted(enough, key=lambda row: (-row["mean_surprise"], row["row"]))[:RANKED],
    }


def drawn_figures(positions):
    """Of counts: an entry stands for count / draws, of the tail's probability where there is a head."""
    chances, came = [], []
    for at in positions:
        draws = sum(at["drawn"].values())
        share = np.exp(at["tail"]) if len(at["ids"]) else 1.0
        drawn = at["drawn"].get(at["next"], 0) / draws * share if draws else 0.0
        kept = np.exp(at["logprobs"][at["ids"] == at["next"]]).sum()
        chances.append(drawn + kept)
        came.append(at["next"] in at["drawn"])
    ids = [len(at["drawn"]) for at in positions]
    return {"mean_ids": np.mean(ids), "next_is_drawn": np.mean(came), "mean_next_probability": np.mean(chances)}


def columns(cache):
    """Bytes of each column's pages, after and before zstd."""
    sizes = {}
    for shard in sorted(cache.glob("shard-*.parquet")):
        metadata = pq.ParquetFile(shard).metadata
        for group in range(metadata.num_row_groups):
            for i in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(i)
                size = sizes.setdefault(chunk.path_in_schema.split(".")[0], [0, 0])
                size[0] += chunk.total_compressed_size
                size[1] += chunk.total_uncompressed_size
    return [{"name": name, "compressed": a, "uncompressed": b} for name, (a, b) in sizes.items()]


def summary(cache):
    """The figures of the whole cache."""
    selection = json.loads((cache / "manifest.json").read_text())["description"]["selection"]
    head = 0 if selection["kind"] == "sampled" else selection["k"]
    positions, figures, rows, tokens, left_out, count = [], [], [], 0, 0, 0
    for number, row in enumerate(rows_of(cache)):
        here = list(positions_of(row))
        count, tokens, left_out = count + 1, tokens + len(row["input_ids"]), left_out + (not here)
        positions += here
        if head and here:
            its = [of_position(at) for at in here]
            figures += its
            rows.append(of_row(number, row, its))
    files = sorted(cache.glob("shard-*.parquet"))
    by_column, size, n = columns(cache), sum(file.stat().st_size for file in files), len(positions)
    entries = sum(len(at["ids"]) for at in positions)
    raw = n * 6 * (head + selection.get("draws", 0))
    tails = np.array([at["tail"] for at in positions])
    distributions = {
        **(kept_figures(positions, figures, rows, head) if head else {}),
        "mean_tail_mass": float(np.exp(tails).mean()),
        "tail_log10_histogram": {"from": -9, "to": 0, "counts": counted(tails / np.log(10), -9, 0, 18)},
        **({"drawn": drawn_figures(positions)} if "draws" in selection else {}),
    }
    return {
        "shards": len(files), "rows": count, "left_out": left_out, "tokens": tokens, "scored": n, "entries": entries,
        "drawn": sum(len(at["drawn"]) for at in positions), "bytes": size, "bytes_per_scored": size / n, "raw_bytes": raw,
        "raw_ratio": raw / size, "columns": by_column, "other_bytes": size - sum(c["compressed"] for c in by_column),
        "distributions": distributions,
    }


class Comparison:
    """Counts figures and remembers the largest difference."""

    def __init__(self):
        self.figures, self.largest, self.where = 0, 0.0, ""

    def compare(self, found, expected, where):
        if isinstance(expected, dict):
            if set(found) != set(expected):
                sys.exit(f"check_inspect: {where}: expected {sorted(expected)}, found {sorted(found)}")
            for name in expected:
                self.compare(found[name], expected[name], f"{where}.{name}")
        elif isinstance(expected, list):
            if len(found) != len(expected):
                sys.exit(f"check_inspect: {where}: expected {len(expected)} entries, found {len(found)}")
            for i, (a, b) in enumerate(zip(found, expected)):
                self.compare(a, b, f"{where}[{i}]")
        else:
            self.number(found, expected, where)

    def number(self, found, expected, where):
        self.figures += 1
        if expected is None or isinstance(expected, (str, int)) or found is None:
            if found != expected:
                sys.exit(f"check_inspect: {where}: expected {expected}, found {found}")
            return
        # The median is that of bins 1/4096 wide.
        if where.endswith("median_top1"):
            if abs(found - expected) > 1 / 8192 + 1e-12:
                sys.exit(f"check_inspect: {where}: expected {expected} to within 1/8192, found {found}")
            return
        off = abs(found - expected) / max(abs(expected), 1e-12)
        if off > self.largest:
            self.largest, self.where = off, where
        # Differences of equal size (an error of calibration) lose digits: an absolute 1e-12 is nothing.
        if off > TOLERANCE and abs(found - expected) > 1e-12:
            sys.exit(f"check_inspect: {where}: expected {expected!r}, found {found!r}, off by {off:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--potstill", default="target/release/potstill", help="the program (default: %(default)s)")
    options = parser.parse_args()
    printed = subprocess.run([options.potstill, "inspect", options.cache, "--json", "--quiet"], capture_output=True, text=True)
    if printed.returncode:
        sys.exit(f"check_inspect: {printed.stderr.strip()}")
    found = json.loads(printed.stdout)["summary"]
    found.pop("complete")
    comparison = Comparison()
    comparison.compare(found, summary(options.cache), "summary")
    print(f"{comparison.figures} figures agree; the largest relative difference is {comparison.largest:.1e} ({comparison.where})")


if __name__ == "__main__":
    main()
