#!/usr/bin/env python3
"""Works out the figures of `potstill diff A B --json` again, with pyarrow and numpy alone, and compares.

    scripts/check_diff.py A B [--potstill target/release/potstill]

For caches of kept log-probabilities. Means agree to 1e-9 (sums in another order), quantiles to the factor of 1.004 of their bins.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


def rows_of(cache):
    for shard in sorted(cache.glob("shard-*.parquet")):
        yield from pq.read_table(shard, columns=["key", "topk_ids", "topk_logprobs", "tail_logprob"]).to_pylist()


def partition(one, other, i):
    """Probabilities of `one` at position i: of the ids that both keep, in order, and of all else; normalised."""
    p = dict(zip(one["topk_ids"][i], np.exp(np.array(one["topk_logprobs"][i], np.float64))))
    shared = sorted(p.keys() & set(other["topk_ids"][i]))
    rest = sum(chance for id, chance in p.items() if id not in shared) + np.exp(one["tail_logprob"][i])
    p = np.array([*(p[id] for id in shared), rest])
    return p / p.sum(), len(shared), rest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--potstill", default="target/release/potstill", help="the program (default: %(default)s)")
    options = parser.parse_args()
    printed = subprocess.run([options.potstill, "diff", options.first, options.second, "--json", "--quiet"], capture_output=True, text=True)
    if printed.returncode:
        sys.exit(f"check_diff: {printed.stderr.strip()}")
    found = json.loads(printed.stdout)
    second = {row["key"]: row for row in rows_of(options.second)}
    pairs = [(row, second[row["key"]]) for row in rows_of(options.first) if row["key"] in second]
    forward, backward, same, shared, rests = [], [], [], [], []
    for a, b in pairs:
        for i in (i for i, ids in enumerate(a["topk_ids"]) if ids):
            (p, count, rest_a), (q, _, rest_b) = partition(a, b, i), partition(b, a, i)
            forward.append((p * np.log(p / q)).sum())
            backward.append((q * np.log(q / p)).sum())
            same.append(a["topk_ids"][i][0] == b["topk_ids"][i][0])
            shared.append(count)
            rests.append((rest_a, rest_b))
    figures = found["figures"]

    def compare(name, value, expected, relative):
        if abs(value - expected) > relative * abs(expected) + 1e-14:
            sys.exit(f"check_diff: {name}: expected {expected!r}, found {value!r}")

    if (found["rows"], found["positions"]) != (len(pairs), len(forward)):
        sys.exit(f"check_diff: expected {len(pairs)} rows and {len(forward)} positions, found {found['rows']} and {found['positions']}")
    for name, kl in (("forward", forward), ("backward", backward)):
        compare(f"{name}.mean", figures[name]["mean"], np.mean(kl), 1e-9)
        compare(f"{name}.largest", figures[name]["largest"], np.max(kl), 1e-9)
        for quantile, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99)):
            exact = np.quantile(kl, share, method="inverted_cdf")
            compare(f"{name}.{quantile}", figures[name][quantile], exact if exact > 1.01e-10 else 0.0, 0.004)
    for name, expected in (("top1_agrees", np.mean(same)), ("mean_shared_ids", np.mean(shared)),
                           ("mean_rest_first", np.mean(rests, 0)[0]), ("mean_rest_second", np.mean(rests, 0)[1])):
        compare(name, figures[name], expected, 1e-9)
    print(f"{len(pairs)} rows, {len(forward)} positions: 14 figures agree; KL {np.mean(forward):.3e} and {np.mean(backward):.3e} nats")


if __name__ == "__main__":
    main()
