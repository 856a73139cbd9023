"""Prints one conversation of a shard: each scored token's next-token distribution. Needs pyarrow, nothing of potstill.

usage: python scripts/read_shard.py SHARD.parquet [ROW] [ENTRIES]
"""
import math
import sys

import pyarrow.parquet as pq

path, row, entries = (sys.argv[1:] + ["0", "5"][len(sys.argv) - 2 :])[:3]
row, entries = int(row), int(entries)
shard = pq.ParquetFile(path)
about = {k.decode(): v.decode() for k, v in shard.metadata.metadata.items() if k.startswith(b"potstill.")}
print(f"{path}: {shard.metadata.num_rows} rows from {about['potstill.first_row']}, {about['potstill.selection']}, "
      f"k = {about['potstill.k']}, {about['potstill.value_codec']}, teacher {about['potstill.teacher']}")
one = shard.read().slice(row, 1).to_pylist()[0]
print(f"row {row}: key {one['key']}, seq_id {one['seq_id']}, {len(one['input_ids'])} tokens")
for i, (ids, logprobs, tail) in enumerate(zip(one["topk_ids"], one["topk_logprobs"], one["tail_logprob"])):
    if ids:  # an empty list: not scored. List i predicts token i + 1.
        top = "  ".join(f"{t}:{math.exp(l):.3f}" for t, l in list(zip(ids, logprobs))[:entries])
        print(f"{i:5} {one['input_ids'][i]:7} -> {one['input_ids'][i + 1]:7} | {top} | tail {math.exp(tail):.2g}")
