#!/usr/bin/env python3
"""Prints one conversation of a shard: after each scored token what came next, and what the teacher expected. Needs pyarrow alone.

    scripts/read_shard.py CACHE/shard-00000.parquet [ROW, from 0] [ENTRIES shown, 5 unless given]
"""
import math
import signal
import sys

import pyarrow.parquet as pq

signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
if not 2 <= len(sys.argv) <= 4:
    sys.exit(__doc__)
shard = pq.ParquetFile(sys.argv[1])
row, entries = (int(sys.argv[n]) if len(sys.argv) > n else default for n, default in ((2, 0), (3, 5)))
if not 0 <= row < shard.metadata.num_rows:
    sys.exit(f"read_shard: row {row}: {sys.argv[1]} has {shard.metadata.num_rows} rows, numbered from 0")
one = shard.read_row_group(row // 64).slice(row % 64, 1).to_pylist()[0]  # a row group has 64 rows
print(f"seq_id {one['seq_id']}, key {one['key']}, {one.get('selection', 'top-k')}, {len(one['input_ids'])} tokens")
for i, ids in enumerate(one.get("topk_ids", one.get("sample_ids"))):
    if ids:  # list i is the distribution after token i, and predicts token i + 1
        if "topk_logits" in one:
            p = [math.exp(z - one["logsumexp"][i]) for z in one["topk_logits"][i]]
        elif "topk_logprobs" in one:
            p = [math.exp(logprob) for logprob in one["topk_logprobs"][i]]
        else:
            p = [n / sum(one["sample_counts"][i]) for n in one["sample_counts"][i]]
        likeliest = sorted(zip(ids, p), key=lambda entry: -entry[1])[:entries]
        expected = "  ".join(f"{id}:{chance:.3f}" for id, chance in likeliest)
        print(f"{i:5} {one['input_ids'][i]:7} -> {one['input_ids'][i + 1]:7} | {expected}  tail {math.exp(one['tail_logprob'][i]):.2g}")
