#!/usr/bin/env python3
"""Opens the shards of a cache with DuckDB, Polars, pandas, pyarrow and Hugging Face `datasets`, as they are, and compares what each
reads with `potstill inspect --json`. DuckDB also answers queries 2, 3 and 4 of scripts/queries.sql, and the README's. A reader that is
not installed is named and passed over; one is enough.

    pip install duckdb polars pandas pyarrow datasets
    scripts/check_readers.py CACHE [--potstill target/release/potstill]

For caches of kept log-probabilities (top-k and cutoff; not logits, not draws). Sums are taken in other orders: means agree to 1e-9.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TOLERANCE = 1e-9
QUERIES = Path(__file__).parent / "queries.sql"
README = Path(__file__).parent.parent / "README.md"


def wrong(sentence):
    sys.exit(f"check_readers: {sentence}")


def near(found, expected, what):
    if found is None or abs(found - expected) > TOLERANCE * max(1.0, abs(expected)):
        wrong(f"{what}: expected {expected!r}, found {found!r}")


def figures(rows):
    """From (input_ids, topk_ids, topk_logprobs, tail_logprob) of each row, however its lists are represented."""
    scored, top1, mass, tail, hits = 0, 0.0, 0.0, 0.0, 0
    for input_ids, ids, logprobs, tails in rows:
        for i in range(len(ids)):
            if len(ids[i]):
                p = np.exp(np.asarray(list(logprobs[i]), np.float64))
                scored, top1, mass = scored + 1, top1 + p[0], mass + p.sum()
                tail, hits = tail + np.exp(np.float64(tails[i])), hits + (ids[i][0] == input_ids[i + 1])
    return {"mean_top1": top1 / scored, "mean_kept_mass": mass / scored, "mean_tail_mass": tail / scored, "top1_is_next": hits / scored}, scored


COLUMNS = ["input_ids", "topk_ids", "topk_logprobs", "tail_logprob"]


def by_pyarrow(cache):
    import pyarrow.dataset as ds
    table = ds.dataset(sorted(map(str, cache.glob("shard-*.parquet")))).to_table(columns=COLUMNS)
    return zip(*(table[name].to_pylist() for name in COLUMNS))


def by_pandas(cache):
    import pandas as pd
    frames = [pd.read_parquet(shard, columns=COLUMNS) for shard in sorted(cache.glob("shard-*.parquet"))]
    return pd.concat(frames)[COLUMNS].itertuples(index=False, name=None)


def by_polars(cache):
    import polars as pl
    return pl.read_parquet(cache / "shard-*.parquet", columns=COLUMNS).select(COLUMNS).iter_rows()


def by_datasets(cache):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import datasets
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(map(str, cache.glob("shard-*.parquet")))
        read = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=folder)
        yield from ([row[name] for name in COLUMNS] for row in read)


def by_duckdb(cache):
    import duckdb
    shards = str(cache / "shard-*.parquet").replace("'", "''")
    return duckdb.sql(f"select {', '.join(COLUMNS)} from read_parquet('{shards}')").fetchall()


def rows_of(result):
    """A query's rows as dictionaries."""
    names = [column[0] for column in result.description]
    return [dict(zip(names, row)) for row in result.fetchall()]


def of_the_file(cache):
    """What queries 2, 3 and 4 of queries.sql answer."""
    import duckdb
    connection = duckdb.connect()
    connection.execute("set variable shards = ?", [str(cache / "shard-*.parquet")])
    for number in (2, 3, 4):
        text = QUERIES.read_text().split(f"\n-- {number}. ", 1)[1].split(";", 1)[0]
        yield rows_of(connection.execute(text[text.index("\nwith "):]))


def of_the_readme(cache):
    """What the README's three queries answer, after its view."""
    import duckdb
    text = README.read_text().split("```sql\n", 1)[1].split("```", 1)[0]
    text = text.replace("'caches/ultrachat/shard-*.parquet'", "'" + str(cache / "shard-*.parquet").replace("'", "''") + "'")
    connection = duckdb.connect()
    view, *queries = [statement for statement in text.split(";") if statement.strip()]
    connection.execute(view)
    yield from (rows_of(connection.execute(query)) for query in queries)


def check_queries(name, answers, found):
    """Three answers against the same figures: the whole cache, its most surprising conversations, its calibration."""
    inspected, ((whole,), ranked, answered) = found["distributions"], answers
    if whole.pop("scored") != found["scored"]:
        wrong(f"{name}: the first query counts other scored positions")
    for figure, value in whole.items():
        near(value, inspected[figure], f"{name}, {figure}")
    if [row["seq_id"] for row in ranked] != [row["seq_id"] for row in inspected["most_surprising"]]:
        wrong(f"{name}: other conversations are the most surprising")
    for row, expected in zip(ranked, inspected["most_surprising"]):
        for figure in ("scored", "perplexity_at_least", "top1_is_next"):
            near(row[figure], expected[figure], f"{name}, seq_id {row['seq_id']}, {figure}")
    bins = {round(bin["from"] * 10): bin for bin in inspected["calibration"] if bin["positions"]}
    if [round(row["from_probability"] * 10) for row in answered] != sorted(bins):
        wrong(f"{name}: other bins of calibration")
    for row in answered:
        for figure in ("positions", "mean_top1", "top1_is_next"):
            near(row[figure], bins[round(row["from_probability"] * 10)][figure], f"{name}, from {row['from_probability']}, {figure}")
    print(f"{name}: {len(whole) + 1 + 4 * len(ranked) + 4 * len(answered)} figures of three queries agree")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--potstill", default="target/release/potstill", help="the program (default: %(default)s)")
    options = parser.parse_args()
    printed = subprocess.run([options.potstill, "inspect", options.cache, "--json", "--quiet"], capture_output=True, text=True)
    if printed.returncode:
        wrong(printed.stderr.strip())
    found = json.loads(printed.stdout)["summary"]
    missing = []
    for name, read in [("pyarrow", by_pyarrow), ("pandas", by_pandas), ("polars", by_polars), ("datasets", by_datasets), ("duckdb", by_duckdb)]:
        try:
            version = __import__(name).__version__
        except ImportError:
            missing.append(name)
            continue
        values, scored = figures(read(options.cache))
        if scored != found["scored"]:
            wrong(f"{name}: expected {found['scored']} scored positions, found {scored}")
        for figure, value in values.items():
            near(value, found["distributions"][figure], f"{name}, {figure}")
        print(f"{name} {version}: {scored} positions, the same figures")
    if "duckdb" not in missing:
        check_queries("queries.sql", list(of_the_file(options.cache)), found)
        check_queries("README.md", list(of_the_readme(options.cache)), found)
    if missing:
        print(f"not installed, passed over: {', '.join(missing)}")
    if len(missing) == 5:
        wrong("none of the readers is installed")


if __name__ == "__main__":
    main()
