#!/usr/bin/env python3
"""Prints one conversation of a shard: each scored token's next-token distribution. Needs pyarrow, nothing of potstill.

It was written from `cache/FORMAT.md` alone, and checks the row's crc32; its key too where the package blake3 is installed.
"""
import argparse
import math
import struct
import sys
import zlib
from pathlib import Path

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    sys.exit("read_shard: pyarrow is not installed; pip install pyarrow")
try:
    from blake3 import blake3
except ImportError:
    blake3 = None


def opened(path):
    """The shard and its key-values, or a sentence that says what is there instead."""
    if path.is_dir():
        shards = sorted(file.name for file in path.glob("shard-*.parquet"))
        inside = f"name one of its {len(shards)} shards, such as {path / shards[0]}" if shards else "it holds no shard-*.parquet"
        sys.exit(f"read_shard: {path} is a folder; {inside}")
    if not path.exists():
        sys.exit(f"read_shard: {path}: no such file")
    try:
        shard = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as e:
        sys.exit(f"read_shard: {path} is no Parquet file: {e}")
    about = {k.decode(): v.decode() for k, v in (shard.metadata.metadata or {}).items() if k.startswith(b"potstill.")}
    if "potstill.format_version" not in about:
        sys.exit(f"read_shard: {path} is a Parquet file, but no shard of a potstill cache")
    return shard, about


def row_of(shard, row):
    """Row `row`, read from its row group alone."""
    for group in range(shard.num_row_groups):
        rows = shard.metadata.row_group(group).num_rows
        if row < rows:
            return shard.read_row_group(group).slice(row, 1).to_pylist()[0]
        row -= rows


def scored(one):
    """The positions whose list is not empty."""
    return [i for i, entries in enumerate(one.get("topk_ids", one.get("sample_ids"))) if entries]


def key_of(one):
    """The key that tokens and scored positions have."""
    content = b"potstill row v1\0"
    for numbers in (one["input_ids"], scored(one)):
        content += struct.pack(f"<Q{len(numbers)}I", len(numbers), *numbers)
    return blake3(content).hexdigest()[:32]


def crc32_of(one, version):
    """The checksum that a row's values have: section crc32 of the format."""
    positions, content = scored(one), bytearray(bytes.fromhex(one["key"]) + struct.pack("<Q", one["seq_id"]))
    words = lambda numbers: content.extend(struct.pack(f"<{len(numbers)}I", *numbers))
    floats = lambda numbers: content.extend(struct.pack(f"<{len(numbers)}f", *numbers))
    at = lambda name: [one[name][i] for i in positions]
    joined = lambda lists: [x for inner in lists for x in inner]

    def ends(lists):
        end = 0
        return [end := end + len(inner) for inner in lists]

    if version >= 2:
        content += struct.pack("<I", len(one["selection"].encode())) + one["selection"].encode()
    content += struct.pack("<HQ", one["k"], len(one["input_ids"]))
    words(one["input_ids"])
    content += struct.pack("<Q", len(positions))
    if version == 1:
        for i in positions:
            words([i, len(one["topk_ids"][i]), *one["topk_ids"][i]])
            floats([*one["topk_logprobs"][i], one["tail_logprob"][i]])
        return zlib.crc32(content)
    words(positions)
    if "topk_ids" in one:
        words(ends(at("topk_ids")))
        words(joined(at("topk_ids")))
        floats(joined(at("topk_logits" if "topk_logits" in one else "topk_logprobs")))
        floats(at("logsumexp") if "logsumexp" in one else [])
    floats(at("tail_logprob"))
    if "sample_ids" in one:
        words(ends(at("sample_ids")))
        words(joined(at("sample_ids")))
        words(joined(at("sample_counts")))
    temperatures = [name for name in one if name.startswith("lse_t")]
    floats([one[name][i] for i in positions for name in temperatures])
    floats([one["codec_kl_sum"], one["codec_kl_max"]])
    return zlib.crc32(content)


def check(one, version):
    """Ends with a sentence where the row is not what was written."""
    opening, crc32 = f"read_shard: row of seq_id {one['seq_id']}: expected", crc32_of(one, version)
    if crc32 != one["crc32"]:
        sys.exit(f"{opening} crc32 {one['crc32']:08x}, found values with {crc32:08x}")
    if blake3 and key_of(one) != one["key"]:
        sys.exit(f"{opening} key {one['key']}, found tokens with {key_of(one)}")


def distribution(one, i, entries):
    """What is known of the distribution after token i, most likely first; None where nothing is scored."""
    ids, drawn = one.get("topk_ids", [[]] * (i + 1))[i], one.get("sample_ids", [[]] * (i + 1))[i]
    if not ids and not drawn:
        return None
    if "topk_logits" in one:
        logprobs = [z - one["logsumexp"][i] for z in one["topk_logits"][i]]
    else:
        logprobs = one.get("topk_logprobs", [[]] * (i + 1))[i]
    parts = [f"{t}:{math.exp(l):.3f}" for t, l in list(zip(ids, logprobs))[:entries]]
    if drawn:
        counts = one["sample_counts"][i]
        # Where there is a head, draws are from the tail and stand for its mass.
        mass = math.exp(one["tail_logprob"][i]) if ids else 1.0
        often = sorted(zip(drawn, counts), key=lambda pair: (-pair[1], pair[0]))[:entries]
        parts.append("drawn " + "  ".join(f"{t}:{mass * n / sum(counts):.3f}" for t, n in often))
    parts.append(f"tail {math.exp(one['tail_logprob'][i]):.2g}")
    parts += [f"{name} {one[name][i]:.3f}" for name in one if name.startswith("lse_t")]
    return "  ".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path, help="a file such as CACHE/shard-00000.parquet")
    parser.add_argument("row", type=int, nargs="?", default=0, help="row of the shard, from 0 (default 0)")
    parser.add_argument("entries", type=int, nargs="?", default=5, help="entries shown of each distribution (default 5)")
    options = parser.parse_args()
    shard, about = opened(options.shard)
    rows = shard.metadata.num_rows
    if not 0 <= options.row < rows:
        sys.exit(f"read_shard: row {options.row}: {options.shard} has {rows} rows, numbered from 0")
    get = lambda key: about.get(f"potstill.{key}", "?")
    print(f"{options.shard}: format version {get('format_version')}, {rows} rows from {get('first_row')}, {get('selection')}, "
          f"k = {get('k')}, {get('value_codec')}, teacher {get('teacher')}")
    one = row_of(shard, options.row)
    check(one, int(get("format_version")))
    codec = f", codec KL {one['codec_kl_sum']:.2g} in all" if "codec_kl_sum" in one else ""
    print(f"row {options.row}: key {one['key']}, seq_id {one['seq_id']}, {len(one['input_ids'])} tokens{codec}")
    for i in range(len(one["input_ids"]) - 1):
        shown = distribution(one, i, options.entries)
        if shown:  # list i predicts token i + 1
            print(f"{i:5} {one['input_ids'][i]:7} -> {one['input_ids'][i + 1]:7} | {shown}")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.stderr.close()
