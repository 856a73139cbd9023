#!/usr/bin/env python3
"""Checks every row of shards: its crc32, and its key where the package blake3 is installed. Needs pyarrow, nothing of potstill.

    scripts/check_shard.py CACHE/shard-*.parquet

It was written from `cache/FORMAT.md` alone: a second implementation of what `potstill verify` checks of a row. Exits 1 at the first row
that is not what was written. (`scripts/read_shard.py` only reads.)
"""
import argparse
import struct
import sys
import zlib
from pathlib import Path

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError:
    sys.exit("check_shard: pyarrow is not installed; pip install pyarrow")
try:
    from blake3 import blake3
except ImportError:
    blake3 = None


def opened(path):
    """The shard and its key-values, or a sentence that says what is there instead."""
    if path.is_dir():
        shards = sorted(file.name for file in path.glob("shard-*.parquet"))
        inside = f"name one of its {len(shards)} shards, such as {path / shards[0]}" if shards else "it holds no shard-*.parquet"
        sys.exit(f"check_shard: {path} is a folder; {inside}")
    if not path.exists():
        sys.exit(f"check_shard: {path}: no such file")
    try:
        shard = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as e:
        sys.exit(f"check_shard: {path} is no Parquet file: {e}")
    about = {k.decode(): v.decode() for k, v in (shard.metadata.metadata or {}).items() if k.startswith(b"potstill.")}
    if "potstill.format_version" not in about:
        sys.exit(f"check_shard: {path} is a Parquet file, but no shard of a potstill cache")
    return shard, about


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
    opening, crc32 = f"check_shard: row of seq_id {one['seq_id']}: expected", crc32_of(one, version)
    if crc32 != one["crc32"]:
        sys.exit(f"{opening} crc32 {one['crc32']:08x}, found values with {crc32:08x}")
    if blake3 and key_of(one) != one["key"]:
        sys.exit(f"{opening} key {one['key']}, found tokens with {key_of(one)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shard", type=Path, nargs="+", help="files such as CACHE/shard-00000.parquet")
    for path in parser.parse_args().shard:
        shard, about = opened(path)
        version = int(about["potstill.format_version"])
        for group in range(shard.num_row_groups):
            for one in shard.read_row_group(group).to_pylist():
                check(one, version)
        what = "crc32 and key" if blake3 else "crc32 (keys need the package blake3)"
        print(f"{path}: {shard.metadata.num_rows} rows, {about.get('potstill.selection', '?')}: {what} of each are right")


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.stderr.close()
